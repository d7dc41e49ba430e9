"""Inputs of every kind, what is said about bad ones, and the analysis of a data config."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from qwen3_encdec.data import sources
from qwen3_encdec.data.analysis import analyze
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.sources import open_corpus
from qwen3_encdec.data.stream import UL2Stream
from qwen3_encdec.files import InputError
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_ranks=512)


def read(*inputs, **options) -> list[str]:
    return [document.text for shard in open_corpus(list(map(str, inputs)), **options) for document in shard.read()]


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("three\nfour\n")
    (tmp_path / "sub" / "a.jsonl").write_text('{"body": "five"}\n\n{"body": "\\ud83d six"}\n')
    (tmp_path / "notes.md").write_text("not read")
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("seven")
    assert read(tmp_path, text_column="body") == ["three", "four", "seven", "five", "", "\ufffd six"]
    assert read(tmp_path / "*.txt*", tmp_path / "b.txt") == ["three", "four", "seven"]  # each file once


def test_a_hub_dataset_is_read_by_shards(tmp_path):
    """`load_dataset` opens a local folder by the same code as a hub id; only the name differs."""
    for number in range(3):
        pq.write_table(
            pa.table({"text": [f"{number}.{row}" for row in range(4)]}), tmp_path / f"train-{number}.parquet"
        )
    shards = sources._hub_shards(7 << 40, str(tmp_path), "text", "train")
    documents = [document for shard in shards for document in shard.read()]
    assert len(shards) == 3
    assert [document.text for document in documents] == [f"{n}.{row}" for n in range(3) for row in range(4)]
    assert len({document.id for document in documents}) == 12
    with pytest.raises(InputError, match="no text in column 'body'; there is text"):
        list(sources._hub_shards(0, str(tmp_path), "body", "train")[0].read())


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
    elif kind == "jsonl.zst-plain" or kind == "parquet-plain":
        path.write_text(good)
    elif kind == "parquet-column":
        pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    elif kind == "parquet-number":
        pq.write_table(pa.table({"text": [1]}), path)
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
        ("jsonl.gz-cut", r"bad.jsonl.gz line \d{4,}: .*end-of-stream"),
        ("jsonl.zst-plain", r"bad.jsonl.zst line 1: "),
        ("parquet-plain", r"bad.parquet is not a parquet file"),
        ("parquet-column", r"no column 'text'; there is body, id"),
        ("parquet-number", r"column 'text' is int64, not a text"),
        ("txt-empty", r"the corpus is empty"),
        ("csv-unknown", r"bad.csv is none of .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, monkeypatch, kind, message):
    monkeypatch.setattr(sources, "SHARD_BYTES", 4096)  # the fault lies many shards in
    with pytest.raises(InputError, match=message):
        read(write_bad(tmp_path, kind))


@pytest.mark.parametrize("name", ["no/such/folder/*.jsonl", "missing.jsonl", "nobody/no-such-dataset"])
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
    words = ["shares", "lengths", "rates", "and", "efficiency", "are", "measured", "on", "the", "stream", "itself"]
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
