"""Corpora: every kind of file, in whatever folders, and one sentence about each fault."""

import bz2
import csv
import gzip
import json
import lzma
import os
import resource
import signal
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3_encdec.data import corpus as module
from qwen3_encdec.data.config import DataConfig, Source
from qwen3_encdec.data.corpus import Corpus, File, open_corpus
from qwen3_encdec.folders import InputError

pytestmark = pytest.mark.usefixtures("own_cache")


def opened(*inputs, column="text", cache_gib=1.0) -> Corpus:
    source = Source(list(map(str, inputs)), text_column=column)
    return open_corpus(source, DataConfig(cache_gib=cache_gib))


def read(*inputs, **options) -> list[str]:
    return [document.content for document in opened(*inputs, **options).documents()]


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("three\nfour\n")
    (tmp_path / "sub" / "a.jsonl").write_text('{"body": "five"}\n\n{"body": "\\ud83d six"}\n')
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"seven"))
    expected = ["three", "four", "seven", "five", "", "\ufffd six"]
    assert read(tmp_path, column="body") == expected
    assert read(tmp_path / "*.txt*", tmp_path / "b.txt") == ["three", "four", "seven"]
    # A glob that matches a folder reads the folder.
    assert read(tmp_path / "s*", column="body") == ["five", "", "\ufffd six"]
    assert opened(tmp_path, column="body").passed_over == [f"{tmp_path}/notes.md (unknown type)"]


@pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["unpacked", "streamed"])
def test_every_kind_of_file(tmp_path, cache_gib, own_cache):
    texts = ["one, with a comma" * 9000, 'two\nwith a line and "quotes"', "three Ü"]
    packings = {"": bytes, "gz": gzip.compress, "BZ2": bz2.compress, "xz": lzma.compress}
    for suffix, pack in packings.items():
        (tmp_path / f"a.JSONL.{suffix}".rstrip(".")).write_bytes(pack(lines(*texts).encode()))
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as out:
        out.write(lines(*texts).encode())
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    (tmp_path / "b.json").write_text(
        "\n" + json.dumps([{"text": text} for text in texts], indent=1)
    )
    (tmp_path / "c.json").write_text(lines(*texts))
    column = pa.array(texts).dictionary_encode()
    pq.write_table(pa.table({"text": column, "n": [1, 2, 3]}), tmp_path / "d.parquet")
    assert sorted(read(tmp_path, cache_gib=cache_gib)) == sorted(texts * 9)
    unpacked = {file: file.stat().st_mtime_ns for file in own_cache.glob("*.jsonl")}
    assert len(unpacked) == (7 if cache_gib else 0)
    # Unpacked once; again when a file has changed.
    read(tmp_path, cache_gib=cache_gib)
    assert {file: file.stat().st_mtime_ns for file in own_cache.glob("*.jsonl")} == unpacked
    (tmp_path / "b.json").write_text(json.dumps([{"text": "changed"}]))
    assert "changed" in read(tmp_path, cache_gib=cache_gib)


def test_package_docs_beside_files_with_another_column(tmp_path, monkeypatch):
    (tmp_path / "docs.jsonl").write_text(lines("docstring"))
    (tmp_path / "a.jsonl").write_text('{"body": "text"}')
    monkeypatch.setattr(module, "package_docs_file", lambda split: tmp_path / "docs.jsonl")
    assert read("package-docs", tmp_path / "a.jsonl", column="body") == ["docstring", "text"]


def test_links_and_hidden_folders(tmp_path):
    (tmp_path / "data/.ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data/a.txt").write_text("plain")
    (tmp_path / "data/.hidden.txt").write_text("hidden")
    (tmp_path / "data/.ipynb_checkpoints/a.txt").write_text("hidden too")
    (tmp_path / "elsewhere/b.txt").write_text("behind a link")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/newest.txt").symlink_to("a.txt")
    assert read(tmp_path / "data") == ["plain", "behind a link"]
    passed_over = opened(tmp_path / "data").passed_over
    assert len(passed_over) == 4
    assert f"newest.txt (the same file as {tmp_path}/data/a.txt)" in passed_over[-1]
    again = [tmp_path / "data", f"{tmp_path}/data/.", f"{tmp_path}/elsewhere/../data/*.txt"]
    assert read(*again) == ["plain", "behind a link"]
    assert sum("the same file" in line for line in opened(*again).passed_over) == 1 + 3 + 2
    (tmp_path / "data/a.txt").unlink()
    with pytest.raises(InputError, match=r"newest.txt: .*No such file"):
        opened(tmp_path / "data")


def test_paths_do_not_depend_on_the_order_of_a_listing(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.txt").write_text("once")
    (tmp_path / "a").symlink_to("b")
    walk = os.walk

    def backwards(*arguments, **options):
        for top, folders, names in walk(*arguments, **options):
            folders.sort(reverse=True)
            yield top, folders, names

    monkeypatch.setattr(os, "walk", backwards)
    assert [file.path for file in opened(tmp_path).files] == [f"{tmp_path}/a/x.txt"]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="closed cannot be read: Permission denied"):
        opened(tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path, own_cache, monkeypatch):
    """An unpacked file needs it no more; another is one sentence, and nothing half-written."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(os.urandom(20_000).hex().encode()))
    read(tmp_path / "a.txt.gz")
    with monkeypatch.context() as context:
        context.setattr(module, "FileLock", lambda path: pytest.fail("locked"))
        read(tmp_path / "a.txt.gz")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot unpack .*b.txt.gz into .*File too large"):
            read(tmp_path / "b.txt.gz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(own_cache.glob("*.partial"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.txt.gz"))
    with pytest.raises(InputError, match=r"cache folder .*Not a directory; set XDG_CACHE_HOME"):
        read(tmp_path / "b.txt.gz")


OFFSETS = pa.py_buffer(np.array([0, 4, 8], np.int32).tobytes())
NOT_UTF8 = pa.Array.from_buffers(pa.string(), 2, [None, OFFSETS, pa.py_buffer(b"fineca\xe9s")])
GOOD = '{"text": "fine"}\n' * 2000
FINE = pa.array(["fine"])
BAD = {
    "a.jsonl": [
        (GOOD + '{"text": "fi\n' + GOOD, r"a.jsonl line 2001: not valid JSON"),
        ('{"body": "x", "id": 3}\n', r"line 1: no column 'text'; found body, id"),
        ('{"text": 3}\n', r"line 1: column 'text' is int, not a string"),
        ('{"text": null}\n{"text": 0}\n', r"line 2: column 'text' is int, not a string"),
        (GOOD + "[1]\n", r"line 2001: no column 'text'; found a list"),
        (GOOD + "[" * 10**5, r"line 2001: not valid JSON \(maximum recursion depth"),
    ],
    "a.json": [(json.dumps([{"text": "fine"}, {"body": "x"}]), r"line 2: no column 'text'")],
    "a.csv": [
        ("id,body\n1,x\n", r"a.csv line 1: no column 'text'; found id, body"),
        ("id,text\n1,a, b\n", r"a.csv: line 2: 3 cells, but the header has 2"),
        ("id,text\n1\n", r"a.csv: line 2: 1 cells, but the header has 2"),
        ('id,text\n1,"a\n\n2,b\n', r"a.csv: line 4: unexpected end of data"),
        (b"id,text\n1,fine\n2,caf\xe9\n", r"a.csv: line 3: 'utf-8' codec"),
        ("text,text\na,b\n", r"a.csv: line 1: more than one column 'text'"),
    ],
    "a.txt": [(b"fine\n" * 3 + b"caf\xe9\n", r"a.txt line 4: 'utf-8' codec"), ("", r"is empty")],
    "a.jsonl.gz": [
        (gzip.compress(GOOD.encode() + b"{"), r"a.jsonl.gz line 2001: not valid JSON"),
        (gzip.compress(GOOD.encode() * 9)[:-30], r"a.jsonl.gz: Compressed file ended before"),
    ],
    "a.jsonl.zst": [(GOOD, r"a.jsonl.zst: ")],
    "a.parquet": [
        (GOOD, r"a.parquet: "),
        (pa.table({"body": ["x"], "id": [1]}), r"no column 'text'; found body, id"),
        (pa.Table.from_arrays([FINE, FINE], names=["text", "text"]), "more than one column 'text'"),
        (pa.table({"text": [1]}), r"column 'text' is int64, not a string"),
        (pa.table({"text": NOT_UTF8}), r"a.parquet row group 1: 'utf-8' codec"),
    ],
    "a.arrow": [("x", r"a.arrow is not .jsonl")],
}


@pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["unpacked", "streamed"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for name, cases in BAD.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_bad_files_are_named(tmp_path, name, content, message, cache_gib, own_cache):
    path = tmp_path / name
    if isinstance(content, pa.Table):
        pq.write_table(content, path, row_group_size=1)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read(path, cache_gib=cache_gib)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["no/such/folder/*.jsonl", "missing.jsonl", "nobody/no-such-dataset"]
)
def test_missing_inputs_are_named(name):
    with pytest.raises(InputError, match=f"input '{name.replace('*', '[*]')}': no such file"):
        opened(name)


def test_a_folder_without_a_known_file(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(InputError, match=r"has no file of type .jsonl"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
def test_a_file_that_changes_while_it_is_read(tmp_path, name):
    def write(count: int) -> None:
        texts = [f"document {i} tells of many things" for i in range(count)]
        if name == "a.txt":
            (tmp_path / name).write_text("\n".join(texts))
        else:
            pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=100)

    write(3000)
    corpus = opened(tmp_path / name)
    assert len(list(corpus.documents())) == 3000
    write(150)
    with pytest.raises(InputError, match=rf"{name} (was truncated|row group)"):
        list(corpus.documents())
    os.unlink(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}.*No such file"):
        list(corpus.documents())


@pytest.mark.parametrize("num_blocks", [1, 7, 64, 1000, 10**4])
def test_blocks_partition_a_file_at_any_size(tmp_path, num_blocks):
    texts = [f"line {i} " + "ü" * (i % 40) for i in range(200)] + ["x" * 5000, "last"]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(texts))
    file = File(str(path), str(path), path.stat().st_size, num_blocks)
    found = [
        document.content
        for block in range(num_blocks)
        for _, document in file.read(range(block, block + 1))
    ]
    assert found == texts


def test_blocks_are_many_and_small(tmp_path):
    """A corpus of one file has blocks for all streams; one of repeated text none of 57 MB."""
    (tmp_path / "a.jsonl").write_text(lines(*(f"text {i}" * 9 for i in range(3000))))
    assert opened(tmp_path / "a.jsonl").num_blocks > 64 * 4
    table = pa.table({"text": ["the same long text " * 60] * 50_000})
    pq.write_table(table, tmp_path / "b.parquet")
    corpus = opened(tmp_path / "b.parquet")
    assert sum(len(document.content) for document in corpus.read(0)) < 3e6
    assert sum(1 for _ in corpus.documents()) == 50_000


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz"])
def test_a_file_is_decoded_once_and_never_held(tmp_path, name, monkeypatch):
    texts = [os.urandom(250).hex() for _ in range(40_000)]
    if name == "a.parquet":  # as pandas writes it: one row group, and many blocks
        pq.write_table(pa.table({"text": texts}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(lines(*texts).encode(), 1))
    corpus, files, unopened = opened(tmp_path / name, cache_gib=0), [], module._open
    monkeypatch.setattr(module, "_open", lambda path: files.append(path) or unopened(path))
    assert sorted(document.content for document in corpus.documents()) == sorted(texts)
    assert len(files) == 1 < corpus.num_blocks / 10
    numbers = [number for number, _ in corpus.numbered(range(corpus.num_blocks))]
    assert sorted(set(numbers)) == numbers
    process = psutil.Process()
    before = process.memory_info().rss
    streams = [corpus.read(block) for block in range(16)]
    assert len({next(stream).content for stream in streams}) == 16
    assert process.memory_info().rss - before < 4 * 20e6


def test_a_line_of_eight_megabytes_is_read_once(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines("word " * 1_600_000, *["short"] * 100))
    began = time.process_time()
    assert [len(text) for text in read(tmp_path)] == [8_000_000, *[5] * 100]
    assert time.process_time() - began < 2


def test_ten_thousand_files_open_in_a_moment(tmp_path):
    for number in range(10_000):
        (tmp_path / f"{number:05}.txt").write_text("one\n")
    began = time.process_time()
    corpus = opened(tmp_path)
    assert time.process_time() - began < 2
    assert corpus.num_blocks == 10_000


def test_the_fingerprint_knows_names_sizes_and_ends(tmp_path):
    def fingerprint(folder: str) -> int:
        return opened(tmp_path / folder).fingerprint()

    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_text("one\ntwo\n")
    first = fingerprint("a")
    assert fingerprint("a") == first
    (tmp_path / "a/x.txt").write_text("one\nTWO\n")
    second = fingerprint("a")
    (tmp_path / "a/x.txt").rename(tmp_path / "a/y.txt")
    third = fingerprint("a")
    assert len({first, second, third}) == 3
    (tmp_path / "a").rename(tmp_path / "b")  # moved
    assert fingerprint("b") == fingerprint("b/y.txt") == third
