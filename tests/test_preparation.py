"""Inputs of every kind, what is said about bad ones, tokenizing beforehand, and the analysis of a
data config.
"""

import gzip
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from qwen3_encdec import cli
from qwen3_encdec.data import corpus as sources
from qwen3_encdec.data.analysis import analyze
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.corpus import open_corpus
from qwen3_encdec.data.prepare import Preparation, prepare
from qwen3_encdec.data.stream import UL2Stream
from qwen3_encdec.data.ul2 import uncorrupt
from qwen3_encdec.folders import InputError
from qwen3_encdec.reports.data import write_page
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_ranks=512)


def read(*inputs, **options) -> list[str]:
    shards = open_corpus(list(map(str, inputs)), **options)
    return [document.text for shard in shards for block in shard.blocks() for document in block]


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("three\nfour\n")
    (tmp_path / "sub" / "a.jsonl").write_text('{"body": "five"}\n\n{"body": "\\ud83d six"}\n')
    (tmp_path / "notes.md").write_text("not read")
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("seven")
    assert read(tmp_path, text_column="body") == [
        "three",
        "four",
        "seven",
        "five",
        "",
        "\ufffd six",
    ]
    assert read(tmp_path / "*.txt*", tmp_path / "b.txt") == [
        "three",
        "four",
        "seven",
    ]  # each file once


def test_a_hub_dataset_is_read_by_shards(tmp_path):
    """`load_dataset` opens a local folder by the same code as a hub id; only the name differs."""
    for number in range(3):
        pq.write_table(
            pa.table({"text": [f"{number}.{row}" for row in range(4)]}),
            tmp_path / f"train-{number}.parquet",
        )
    shards = sources._hub_shards(7 << 40, str(tmp_path), "text", "train")
    documents = [document for shard in shards for block in shard.blocks() for document in block]
    assert len(shards) == 3
    assert [document.text for document in documents] == [
        f"{n}.{row}" for n in range(3) for row in range(4)
    ]
    assert len({document.id for document in documents}) == 12
    with pytest.raises(InputError, match="no text in column 'body'; there is text"):
        list(sources._hub_shards(0, str(tmp_path), "body", "train")[0].blocks())
    before = sources.corpus_fingerprint(shards)
    assert (
        sources.corpus_fingerprint(sources._hub_shards(7 << 40, str(tmp_path), "text", "train"))
        == before
    )
    pq.write_table(
        pa.table({"text": ["1.0", "1.1", "1.2", "changed"]}), tmp_path / "train-1.parquet"
    )
    assert (
        sources.corpus_fingerprint(sources._hub_shards(7 << 40, str(tmp_path), "text", "train"))
        != before
    )
    (tmp_path / "train-2.parquet").unlink()
    with pytest.raises(InputError, match=r"file 2 row 1: .*train-2.parquet"):
        list(shards[2].blocks())


def write_bad(folder, kind: str) -> str:
    """Make a corpus with one fault; returns its path."""
    path = folder / f"bad.{kind.split('-')[0]}"
    good = '{"text": "fine"}\n' * 2000
    if kind == "jsonl-broken":
        path.write_text(good + '{"text": "fi\n' + good)
    elif kind == "jsonl-column":
        path.write_text('{"body": "x", "id": 3}\n')
    elif kind == "jsonl-number":
        path.write_text('{"text": 3}\n')
    elif kind == "jsonl-list":
        path.write_text(good + "[1]\n")
    elif kind == "txt-bytes":
        path.write_bytes(b"fine\n" * 3 + b"caf\xe9\n")
    elif kind == "jsonl.gz-broken":
        path.write_bytes(gzip.compress(good.encode() + b"{"))
    elif kind == "jsonl.gz-cut":
        path.write_bytes(gzip.compress(good.encode() * 9)[:-300])
    elif kind == "jsonl.gz-checksum":
        packed = gzip.compress(good.encode())
        path.write_bytes(packed[:-8] + bytes(4) + packed[-4:])
    elif kind == "jsonl.zst-plain" or kind == "parquet-plain":
        path.write_text(good)
    elif kind == "parquet-column":
        pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    elif kind == "parquet-number":
        pq.write_table(pa.table({"text": [1]}), path)
    elif kind == "parquet-bytes":
        offsets = pa.py_buffer(np.array([0, 4, 8, 12], np.int32).tobytes())
        words = pa.Array.from_buffers(
            pa.string(), 3, [None, offsets, pa.py_buffer(b"fineca\xe9sfine")]
        )
        pq.write_table(
            pa.table({"text": pa.chunked_array([["fine"] * 5, words])}), path, row_group_size=4
        )
    elif kind == "txt-empty":
        path.write_text("")
    elif kind == "csv-unknown":
        path.write_text("text\nfine\n")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("jsonl-broken", r"bad.jsonl line 2001: not valid JSON"),
        ("jsonl-column", r"bad.jsonl line 1: no column 'text'; there is body, id"),
        ("jsonl-number", r"line 1: column 'text' is a int, not a text"),
        ("jsonl-list", r"line 2001: no column 'text'; there is no columns but a list"),
        ("txt-bytes", r"bad.txt line 4: not valid UTF-8"),
        ("jsonl.gz-broken", r"bad.jsonl.gz line 2001: not valid JSON"),
        ("jsonl.gz-cut", r"bad.jsonl.gz line \d+: Truncated compressed stream"),
        ("jsonl.gz-checksum", r"bad.jsonl.gz line \d+: .*incorrect data check"),
        ("jsonl.zst-plain", r"bad.jsonl.zst line 1: "),
        ("parquet-plain", r"bad.parquet is not a parquet file"),
        ("parquet-column", r"no column 'text'; there is body, id"),
        ("parquet-number", r"column 'text' is int64, not a text"),
        ("parquet-bytes", r"bad.parquet row group 1 row 3: not valid UTF-8"),
        ("txt-empty", r"the corpus is empty"),
        ("csv-unknown", r"bad.csv is none of .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, monkeypatch, kind, message):
    monkeypatch.setattr(sources, "SHARD_BYTES", 4096)  # the fault lies many shards in
    with pytest.raises(InputError, match=message):
        read(write_bad(tmp_path, kind))


@pytest.mark.parametrize(
    "name", ["no/such/folder/*.jsonl", "missing.jsonl", "nobody/no-such-dataset"]
)
def test_missing_inputs_are_named(name):
    with pytest.raises(InputError, match=f"input '{name.replace('*', '[*]')}': no such file"):
        open_corpus([name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, "data.inputs is empty"),
        ({"preset": "ul3"}, "preset 'ul3'"),
        ({"source_length": 1}, "data.source_length=1"),
        ({"source_length": 12, "target_length": 12}, "data.min_tokens=8 is more than half"),
        ({"min_tokens": 1}, "data.min_tokens=1"),
        ({"heldout_every": 1}, "data.heldout_every=1"),
        ({"seed": -1}, "data.seed=-1"),
    ],
)
def test_bad_configs_name_the_field_and_the_value(changes, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**changes)


def test_too_few_sentinels_stop_the_stream_before_it_reads():
    few = build_tokenizer(num_ranks=512, num_sentinel_tokens=20)
    with pytest.raises(InputError, match="denoiser R1 needs up to"):
        UL2Stream(DataConfig(inputs=["not/looked/at"]), few)


def test_analysis(tmp_path, tokenizer):
    words = [
        "shares",
        "lengths",
        "rates",
        "and",
        "efficiency",
        "are",
        "measured",
        "on",
        "the",
        "stream",
        "itself",
    ]
    texts = [" ".join(words[(i * j) % 11] for j in range(5 + i % 90)) for i in range(900)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(inputs=[str(tmp_path)], source_length=256, target_length=128)
    analysis = analyze(config, tokenizer, num_examples=10**6, show=1)
    stream = UL2Stream(config, tokenizer, epochs=1)
    rows = list(stream)
    assert analysis.counts == stream.counts
    assert (analysis.rows, analysis.examples) == (len(rows), sum(map(len, rows)))
    assert sum(d.example_share for d in analysis.denoisers) == pytest.approx(1)
    assert sum(d.target_share for d in analysis.denoisers) == pytest.approx(1)
    for denoiser in analysis.denoisers:
        assert denoiser.corruption == pytest.approx(denoiser.nominal_corruption, abs=0.01)
        assert denoiser.example_share == pytest.approx(denoiser.nominal_share, abs=0.08)
        assert denoiser.source_length[1] <= 256
        assert denoiser.target_length[1] <= 128
    assert analysis.packing_efficiency > 0.8
    console = Console(record=True, width=110)
    analysis.print(console)
    printed = console.export_text()
    for word in ("R1", "X2", "packing efficiency", "<extra_id_0>", "<|im_end|>"):
        assert word in printed

    assert abs(analysis.noise_by_position[:4].mean(axis=1) - [0.15, 0.5, 0.15, 0.5]).max() < 0.03
    assert (analysis.noise_by_position[4, :5] < 0.3).all()  # S takes the end
    assert (analysis.noise_by_position[4, 6:] == 1).all()
    assert analysis.progress[-1, 1] <= analysis.sizes[:, :2].sum()
    write_page(analysis, tmp_path / "report.html", {"tokenizer": "<here>"})
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6
    for word in (
        "&lt;here&gt;",
        "&lt;extra_id_0&gt;",
        "Packing".lower(),
        f"{analysis.rows:,} with",
    ):
        assert word in page
    assert "<script" not in page
    assert "mathdefault" not in page


def test_a_corpus_that_gives_no_example_is_not_analyzed(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("short\n\n")
    with pytest.raises(InputError, match="no example .*'documents': 2"):
        analyze(DataConfig(inputs=[str(tmp_path)]), tokenizer)


def test_odd_documents_are_used_or_counted(tmp_path, tokenizer):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh ", k=5)) for _ in range(1000)]
    long = " ".join(rng.choices(words, k=1_700_000))[:10_000_000]
    lines = [
        json.dumps({"text": text})
        for text in ("", "a", None, long, "an ordinary document of some words")
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    pq.write_table(
        pa.table({"text": [None, "", "a", "again an ordinary document of some words"]}),
        tmp_path / "b.parquet",
    )
    config = DataConfig(inputs=[str(tmp_path)], min_tokens=8, heldout_inputs=["elsewhere"])
    counts: Counter = Counter()
    tokens = 0
    for rank in range(3):
        stream = UL2Stream(config, tokenizer, rank=rank, world_size=3, epochs=1)
        for row in stream:
            tokens += sum(
                len(e.source) + len(e.target) - 2 - 2 * (e.source >= 640).sum() for e in row
            )
        counts += stream.counts
    assert counts["documents"] == counts["used"] + counts["refused"] == 6 + 4
    assert counts["used"] == 3
    assert tokens == counts["tokens"] > 3_000_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_a_shard_that_vanishes_is_named(tmp_path, tokenizer, monkeypatch, name):
    monkeypatch.setattr(sources, "SHARD_BYTES", 4096)
    texts = [f"document {i} tells of {'many ' * (i % 50)}things" for i in range(900)]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=100)
    else:
        with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    stream = iter(UL2Stream(DataConfig(inputs=[str(tmp_path)]), tokenizer))
    next(stream)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=rf"{name} (line \d+|row group \d+): .*No such file"):
        list(islice(stream, 10_000))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_shrinks_or_loses_its_column_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "SHARD_BYTES", 4096)
    file = tmp_path / name
    words = [f"document {i} tells of many things" for i in range(3000)]

    def write(texts: list[str], column: str = "text") -> None:
        if name.endswith("parquet"):
            pq.write_table(pa.table({column: texts}), file, row_group_size=100)
        elif name.endswith("gz"):
            file.write_bytes(
                gzip.compress("".join(json.dumps({column: text}) + "\n" for text in texts).encode())
            )
        else:
            file.write_text("".join(text + "\n" for text in texts))

    write(words)
    shards = open_corpus([str(file)])
    assert sum(len(block) for shard in shards for block in shard.blocks()) == 3000
    if name != "a.jsonl.gz":  # of one that is read in one go nobody knows how long it was
        write(words[:1500])  # ends with a line
        with pytest.raises(
            InputError, match=rf"{name} (line 1501: the file has become shorter|row group 15: )"
        ):
            [block for shard in shards for block in shard.blocks()]
    if name != "a.txt":
        write(words, "body")
        with pytest.raises(
            InputError, match=rf"{name} .*(no column 'text'|Field \"text\" does not exist)"
        ):
            [block for shard in shards for block in shard.blocks()]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Lines and a parquet file with copies, near copies and short documents, in many shards."""
    monkeypatch.setattr(sources, "SHARD_BYTES", 3000)
    rng = random.Random(1)
    words = [f"word{i}" for i in range(300)]
    texts = [" ".join(rng.choices(words, k=rng.randrange(5, 120))) for _ in range(600)]
    texts[100:110] = texts[:10]
    texts[200:205] = [text.replace(text.split()[-1], "changed") for text in texts[20:25]]
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts[:400])
    )
    pq.write_table(
        pa.table({"text": [*texts[400:], None, "", "a", "a"]}),
        folder / "b.parquet",
        row_group_size=50,
    )
    return folder


def rows_of(stream: UL2Stream) -> Counter:
    return Counter(
        (e.source.tobytes(), e.target.tobytes(), e.denoiser) for row in stream for e in row
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_prepared_corpus_gives_the_same_examples(corpus, tokenizer, tmp_path, processes):
    counts = prepare(Preparation([str(corpus)]), tokenizer, tmp_path / "out", processes)
    assert counts["documents"] == 604
    assert (
        counts["documents"]
        == counts["used"] + counts["short"] + counts["long"] + counts["duplicate"]
    )
    assert counts["short"] >= 4
    assert not (tmp_path / "out.partial").exists()
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) > 3
    settings = {"source_length": 128, "target_length": 96}
    text = UL2Stream(DataConfig(inputs=[str(corpus)], **settings), tokenizer, epochs=1)
    tokens = UL2Stream(DataConfig(inputs=[str(tmp_path / "out")], **settings), tokenizer, epochs=1)
    assert rows_of(tokens) == rows_of(text)
    assert tokens.counts["used"] == text.counts["used"]
    assert tokens.counts["heldout"] > 0
    shares = [
        UL2Stream(tokens.config, tokenizer, rank=rank, world_size=3, epochs=1) for rank in range(3)
    ]
    assert sum(map(rows_of, shares), Counter()) == rows_of(text)
    other = build_tokenizer(num_ranks=500)
    with pytest.raises(InputError, match="prepared with another tokenizer"):
        UL2Stream(tokens.config, other)
    with pytest.raises(InputError, match="is tokenized already"):
        prepare(Preparation([str(tmp_path / "out")]), tokenizer, tmp_path / "again", 1)


def test_copies_and_lengths_are_filtered_and_counted(corpus, tokenizer, tmp_path):
    plain = prepare(Preparation([str(corpus)], max_tokens=300), tokenizer, tmp_path / "plain", 1)
    assert plain["long"] > 10
    assert plain["duplicate"] == 0
    prepare(Preparation([str(corpus)]), tokenizer, tmp_path / "whole", 1)
    exact = prepare(
        Preparation([str(corpus)], deduplicate="exact"), tokenizer, tmp_path / "exact", 1
    )
    assert exact["duplicate"] == 10 + 1  # "a" twice
    pytest.importorskip("rensa")
    alike = prepare(
        Preparation([str(corpus)], deduplicate="minhash"), tokenizer, tmp_path / "alike", 1
    )
    assert 14 <= alike["duplicate"] <= 16  # of five near copies the shortest may be too different
    for counts in (plain, exact, alike):
        assert (
            counts["documents"]
            == counts["used"] + counts["short"] + counts["long"] + counts["duplicate"]
        )

    def chunks(folder) -> Counter:
        stream = UL2Stream(
            DataConfig(inputs=[str(folder)], heldout_inputs=["elsewhere"]), tokenizer, epochs=1
        )
        ids = {"sentinel_ids": stream.sentinel_ids, "eos_id": stream.eos_id}
        return Counter(
            (e.denoiser, uncorrupt(e.source, e.target, **ids).tobytes())
            for row in stream
            for e in row
        )

    assert chunks(tmp_path / "exact") < chunks(corpus) == chunks(tmp_path / "whole")


def test_a_killed_preparation_goes_on_without_doing_finished_parts_again(
    corpus, tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys, time; from pathlib import Path; from transformers import PreTrainedTokenizerFast\n"
        "from qwen3_encdec.data import prepare as p, corpus as sources; sources.SHARD_BYTES = 3000\n"
        "write = p._PartWriter.__call__\n"
        "p._PartWriter.__call__ = lambda *a: (time.sleep(0.3), write(*a))\n"
        "from qwen3_encdec.folders import load_tokenizer\n"
        "p.prepare(p.Preparation([sys.argv[1]]), load_tokenizer(sys.argv[2]), Path(sys.argv[3]), 1)"
    )
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", code, corpus, tmp_path / "tokenizer", out])
    deadline = time.monotonic() + 60
    while len(list(partial.glob("part-*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {file.name: file.stat().st_mtime_ns for file in partial.glob("part-*.parquet")}
    assert len(finished) >= 2
    assert not out.exists()
    (partial / "part-00099-of-00100.parquet.tmp1").write_text(
        "half a file of a process that is gone"
    )
    with pytest.raises(InputError, match="unfinished preparation of another corpus"):
        prepare(Preparation([str(corpus)], min_tokens=9), tokenizer, out, 1)
    counts = prepare(Preparation([str(corpus)]), tokenizer, out, 1)
    again = {name: (out / name).stat().st_mtime_ns for name in finished}
    assert again == finished
    assert len(list(out.glob("part-*"))) > len(finished)
    assert counts == prepare(Preparation([str(corpus)]), tokenizer, tmp_path / "straight", 1)
    read = [
        UL2Stream(DataConfig(inputs=[str(f)]), tokenizer, epochs=1)
        for f in (out, tmp_path / "straight")
    ]
    assert rows_of(read[0]) == rows_of(read[1])
    assert not list(out.glob("*.tmp*"))


def test_a_full_disk_while_preparing(corpus, tokenizer, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*part-\d+.*(too large|No space)"):
            prepare(Preparation([str(corpus)]), tokenizer, tmp_path / "out", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.tmp*"))
    assert prepare(Preparation([str(corpus)]), tokenizer, tmp_path / "out", 1)["documents"] == 604


def test_the_command_prepares_and_draws(corpus, tokenizer, tmp_path, monkeypatch, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def command(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["qwen3-encdec", "prepare-data", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return captured.err if stop.value.code else captured.out

    shared = ("--tokenizer", tmp_path / "tokenizer", "--input", corpus)
    out = command(
        *shared, "--output", tmp_path / "tokens", "--deduplicate", "exact", "--processes", 1
    )
    assert "604 documents" in out
    assert "11 duplicate" in out
    out = command(
        *shared[:2], "--input", tmp_path / "tokens", "--analyze-only", "--output", tmp_path / "page"
    )
    assert "packing efficiency" in out
    numbers = re.search(
        r"documents +([\d,]+) = ([\d,]+) used \+ ([\d,]+) refused \+ ([\d,]+) held out", out
    )
    documents, *parts = (int(number.replace(",", "")) for number in numbers.groups())
    assert documents == sum(parts) > 500
    assert all(parts[:1] + parts[2:])
    assert "<svg" in (tmp_path / "page/report.html").read_text()
    assert "holds a data report" in command(*shared, "--output", tmp_path / "page")
    assert "holds a prepared corpus" in command(
        *shared, "--analyze-only", "--output", tmp_path / "tokens"
    )
    monkeypatch.setitem(sys.modules, "rensa", None)
    assert "needs the package rensa" in command(
        *shared, "--output", tmp_path / "x", "--deduplicate", "minhash"
    )


def test_bad_input_stops_a_preparation(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "fi\n')
    for processes in (1, 2):
        with pytest.raises(InputError, match="a.jsonl line 2: not valid JSON"):
            prepare(
                Preparation([str(tmp_path / "a.jsonl")]), tokenizer, tmp_path / "out", processes
            )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="was not written by"):
        prepare(Preparation([str(tmp_path / "a.jsonl")]), tokenizer, tmp_path / "taken")
