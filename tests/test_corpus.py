"""Corpora: every kind of file, in whatever folders, and one sentence about each fault."""

import bz2
import csv
import gzip
import json
import lzma
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3_encdec.data import corpus as module
from qwen3_encdec.data.corpus import LinesFile, open_corpus
from qwen3_encdec.folders import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def read(*inputs, **options) -> list[str]:
    corpus = open_corpus(list(map(str, inputs)), **options)
    return [document.content for document in corpus.documents()]


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("three\nfour\n")
    (tmp_path / "sub" / "a.jsonl").write_text('{"body": "five"}\n\n{"body": "\\ud83d six"}\n')
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"seven"))
    expected = ["three", "four", "seven", "five", "", "\ufffd six"]
    assert read(tmp_path, text_column="body") == expected
    assert read(tmp_path / "*.txt*", tmp_path / "b.txt") == ["three", "four", "seven"]
    # A glob that matches a folder reads the folder.
    assert read(tmp_path / "s*", text_column="body") == ["five", "", "\ufffd six"]
    assert open_corpus([str(tmp_path)]).passed_over == [f"{tmp_path}/notes.md (no known kind)"]


@pytest.mark.parametrize("cache_bytes", [2**30, 0], ids=["unpacked", "streamed"])
def test_every_kind_of_file(tmp_path, cache_bytes, own_cache):
    texts = ["one, with a comma", 'two\nwith a line and "quotes"', "three Ü"]
    packings = {"": bytes, "gz": gzip.compress, "BZ2": bz2.compress, "xz": lzma.compress}
    for suffix, pack in packings.items():
        (tmp_path / f"a.JSONL.{suffix}".rstrip(".")).write_bytes(pack(lines(*texts).encode()))
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as out:
        out.write(lines(*texts).encode())
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "c.json").write_text(lines(*texts))
    column = pa.array(texts).dictionary_encode()
    pq.write_table(pa.table({"text": column, "n": [1, 2, 3]}), tmp_path / "d.parquet")
    assert sorted(read(tmp_path, cache_bytes=cache_bytes)) == sorted(texts * 9)
    unpacked = list((own_cache / "qwen3-encdec/texts").glob("*.parquet"))
    assert len(unpacked) == (6 if cache_bytes else 0)
    # Unpacked once; again when a file has changed.
    times = [file.stat().st_mtime_ns for file in unpacked]
    read(tmp_path, cache_bytes=cache_bytes)
    assert [file.stat().st_mtime_ns for file in unpacked] == times
    (tmp_path / "b.json").write_text(json.dumps([{"text": "changed"}]))
    assert "changed" in read(tmp_path, cache_bytes=cache_bytes)


def test_links_and_hidden_folders(tmp_path):
    (tmp_path / "data/.ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data/a.txt").write_text("plain")
    (tmp_path / "data/.hidden.txt").write_text("hidden")
    (tmp_path / "data/.ipynb_checkpoints/a.txt").write_text("hidden too")
    (tmp_path / "elsewhere/b.txt").write_text("behind a link")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    corpus = open_corpus([str(tmp_path / "data")])
    assert [document.content for document in corpus.documents()] == ["plain", "behind a link"]
    assert len(corpus.passed_over) == 3


def write_bad(folder, kind: str) -> str:
    """Make a corpus with one fault; returns its path."""
    path = folder / f"bad.{kind.split('-')[0]}"
    good = '{"text": "fine"}\n' * 2000
    array = pa.array(["fine"])
    made = {
        "jsonl-broken": good + '{"text": "fi\n' + good,
        "jsonl-column": '{"body": "x", "id": 3}\n',
        "jsonl-number": '{"text": 3}\n',
        "jsonl-list": good + "[1]\n",
        "json-array": json.dumps([{"text": "fine"}, {"body": "x"}]),
        "csv-column": "id,body\n1,x\n",
        "txt-bytes": b"fine\n" * 3 + b"caf\xe9\n",
        "jsonl.gz-broken": gzip.compress(good.encode() + b"{"),
        "jsonl.gz-cut": gzip.compress(good.encode() * 9)[:-300],
        "jsonl.zst-plain": good,
        "parquet-plain": good,
        "txt-empty": "",
        "arrow-unknown": "x",
    }
    tables = {
        "parquet-column": pa.table({"body": ["x"], "id": [1]}),
        "parquet-number": pa.table({"text": [1]}),
        "parquet-twice": pa.Table.from_arrays([array, array], names=["text", "text"]),
    }
    if kind in made:
        content = made[kind]
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif kind in tables:
        pq.write_table(tables[kind], path)
    elif kind == "parquet-bytes":
        offsets = pa.py_buffer(np.array([0, 4, 8, 12], np.int32).tobytes())
        buffers = [None, offsets, pa.py_buffer(b"fineca\xe9sfine")]
        words = pa.Array.from_buffers(pa.string(), 3, buffers)
        table = pa.table({"text": pa.chunked_array([["fine"] * 5, words])})
        pq.write_table(table, path, row_group_size=4)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("jsonl-broken", r"bad.jsonl line 2001: not valid JSON"),
        ("jsonl-column", r"bad.jsonl line 1: no column 'text'; there is body, id"),
        ("jsonl-number", r"line 1: column 'text' is a int, not a text"),
        ("jsonl-list", r"line 2001: no column 'text'; there is a list"),
        ("json-array", r"bad.json item 2: no column 'text'; there is body"),
        ("csv-column", r"bad.csv row 1: no column 'text'; there is id, body"),
        ("txt-bytes", r"bad.txt line 4: not valid UTF-8"),
        ("jsonl.gz-broken", r"bad.jsonl.gz line 2001: not valid JSON"),
        ("jsonl.gz-cut", r"bad.jsonl.gz after line \d+: Truncated compressed stream"),
        ("jsonl.zst-plain", r"bad.jsonl.zst after line 0: "),
        ("parquet-plain", r"bad.parquet: "),
        ("parquet-column", r"no column 'text'; there is body, id"),
        ("parquet-twice", r"more than one column 'text'"),
        ("parquet-number", r"column 'text' is int64, not a text"),
        ("parquet-bytes", r"bad.parquet row group 1 row 3: not valid UTF-8"),
        ("txt-empty", r"the corpus is empty"),
        ("arrow-unknown", r"bad.arrow is not .jsonl"),
    ],
)
@pytest.mark.parametrize("cache_bytes", [2**30, 0], ids=["unpacked", "streamed"])
def test_bad_files_are_named(tmp_path, kind, message, cache_bytes, own_cache):
    with pytest.raises(InputError, match=message) as caught:
        read(write_bad(tmp_path, kind), cache_bytes=cache_bytes)
    assert "\n" not in str(caught.value)
    assert not list((own_cache / "qwen3-encdec").rglob("*.parquet"))


@pytest.mark.parametrize(
    "name", ["no/such/folder/*.jsonl", "missing.jsonl", "nobody/no-such-dataset"]
)
def test_missing_inputs_are_named(name):
    with pytest.raises(InputError, match=f"input '{name.replace('*', '[*]')}': no such file"):
        open_corpus([name])


def test_a_folder_without_a_known_file(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.pdf").write_text("x")
    with pytest.raises(InputError, match=r"no file in it is .jsonl"):
        open_corpus([str(tmp_path / "x")])


@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
def test_a_file_that_changes_while_it_is_read(tmp_path, name):
    def write(count: int) -> None:
        texts = [f"document {i} tells of many things" for i in range(count)]
        if name == "a.txt":
            (tmp_path / name).write_text("\n".join(texts))
        else:
            pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=100)

    write(3000)
    corpus = open_corpus([str(tmp_path / name)])
    assert len(list(corpus.documents())) == 3000
    write(150)
    with pytest.raises(InputError, match=rf"{name} (has become shorter|row group)"):
        list(corpus.documents())
    os.unlink(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}.*No such file"):
        list(corpus.documents())


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1000, 10**6])
def test_blocks_partition_a_file_at_any_size(tmp_path, block_bytes):
    texts = [f"line {i} " + "ü" * (i % 40) for i in range(200)] + ["x" * 5000, "last"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    size = (tmp_path / "a.txt").stat().st_size
    file = LinesFile(str(tmp_path / "a.txt"), size, None, block_bytes)
    blocks = range(file.num_blocks)
    found = [file.parse(place).content for block in blocks for place in file.places(block)]
    assert found == texts


def test_blocks_are_many_and_small(tmp_path):
    """A corpus of one file has blocks for all streams; one of repeated text none of 57 MB."""
    (tmp_path / "a.jsonl").write_text(lines(*(f"text {i}" * 9 for i in range(3000))))
    assert open_corpus([str(tmp_path / "a.jsonl")]).num_blocks > 64 * 4
    pq.write_table(
        pa.table({"text": ["the same long text " * 60] * 50_000}), tmp_path / "b.parquet"
    )
    corpus = open_corpus([str(tmp_path / "b.parquet")])
    file, block = corpus.block(0)
    assert sum(len(place.raw.as_py()) for place in file.places(block)) < 3e6


def test_a_line_of_eight_megabytes_is_read_once(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines("word " * 1_600_000, *["short"] * 100))
    began = time.process_time()
    corpus = open_corpus([str(tmp_path / "a.jsonl")])
    found = [document.content for document in corpus.documents()]
    assert [len(text) for text in found] == [8_000_000, *[5] * 100]
    assert time.process_time() - began < 2


def test_ten_thousand_files_open_in_a_moment(tmp_path):
    for number in range(10_000):
        (tmp_path / f"{number:05}.txt").write_text("one\n")
    began = time.process_time()
    corpus = open_corpus([str(tmp_path)])
    assert time.process_time() - began < 2
    assert corpus.num_blocks == 10_000


def test_the_fingerprint_knows_names_sizes_and_ends(tmp_path):
    def fingerprint() -> int:
        return open_corpus([str(tmp_path / "a")]).fingerprint()

    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_text("one\ntwo\n")
    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "a/x.txt").write_text("one\nTWO\n")
    second = fingerprint()
    (tmp_path / "a/x.txt").rename(tmp_path / "a/y.txt")
    assert len({first, second, fingerprint()}) == 3
    (tmp_path / "a").rename(tmp_path / "b")  # moved
    third = open_corpus([str(tmp_path / "b")]).fingerprint()
    assert third not in (first, second)
    assert third == open_corpus([str(tmp_path / "b/y.txt")]).fingerprint()


def test_copies_have_one_key():
    assert module.text_key("a") == module.text_key("a") != module.text_key("b")
    assert 0 <= module.text_key("\ud800") < 2**63
