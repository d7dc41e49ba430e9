"""Tokenizing a corpus beforehand, and the analysis of a data config."""

import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from qwen3_encdec import cli
from qwen3_encdec.data import corpus as corpora
from qwen3_encdec.data.analysis import analyze
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.prepare import Preparation, prepare
from qwen3_encdec.data.stream import UL2Data, rows
from qwen3_encdec.data.ul2 import uncorrupt
from qwen3_encdec.folders import InputError
from qwen3_encdec.reports.data import write_page
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_ranks=512)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
    with pytest.raises(InputError, match="needs up to"):
        UL2Data(DataConfig(inputs=["not/looked/at"]), few)


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
    drawn = list(rows(UL2Data(config, tokenizer), epochs=1))
    assert analysis.counts["tokens"] == sum(p["tokens"] for p in last_positions(drawn))
    assert (analysis.rows, analysis.examples) == (len(drawn), sum(len(r.examples) for r in drawn))
    assert sum(d.example_share for d in analysis.denoisers) == pytest.approx(1)
    assert sum(d.target_share for d in analysis.denoisers) == pytest.approx(1)
    for denoiser in analysis.denoisers:
        assert denoiser.corruption == pytest.approx(denoiser.nominal_corruption, abs=0.01)
        assert denoiser.example_share == pytest.approx(denoiser.nominal_share, abs=0.08)
        assert denoiser.source_length[1] <= 256
        assert denoiser.target_length[1] <= 128
    console = Console(record=True, width=110)
    analysis.print(console)
    printed = console.export_text()
    for word in ("R1", "X2", "filled", "<extra_id_0>", "<|im_end|>"):
        assert word in printed

    write_page(analysis, tmp_path / "report.html", {"tokenizer": "<here>"})
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    for word in ("&lt;here&gt;", "&lt;extra_id_0&gt;", f"{analysis.rows:,} with"):
        assert word in page
    assert "<script" not in page
    assert "mathdefault" not in page


def test_a_corpus_that_gives_no_example_is_not_analyzed(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("short\n\n")
    with pytest.raises(InputError, match="there is nothing to train on|no example in"):
        analyze(DataConfig(inputs=[str(tmp_path)]), tokenizer)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Lines and a parquet file with copies, near copies and short documents, in many shards."""
    monkeypatch.setattr(corpora, "BLOCK_BYTES", 3000)
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


def last_positions(drawn) -> list[dict]:
    return list({(row.stream, row.corpus): row.position for row in drawn}.values())


def examples_of(config, tokenizer) -> Counter:
    return Counter(
        (e.source.tobytes(), e.target.tobytes(), e.denoiser)
        for row in rows(UL2Data(config, tokenizer), epochs=1)
        for e in row.examples
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_prepared_corpus_gives_the_same_examples(
    corpus, tokenizer, tmp_path, processes, monkeypatch
):
    counts = prepare(Preparation([str(corpus)]), tokenizer, tmp_path / "out", processes)
    assert counts["documents"] == 604
    assert (
        counts["documents"]
        == counts["used"] + counts["short"] + counts["long"] + counts["duplicate"]
    )
    assert counts["short"] >= 4
    assert not (tmp_path / "out.partial").exists()
    assert len(list((tmp_path / "out").rglob("part-*.parquet"))) > 3
    settings = {"source_length": 128, "target_length": 96}
    text = DataConfig(inputs=[str(corpus)], **settings)
    tokens = DataConfig(inputs=[str(tmp_path / "out")], **settings)
    assert examples_of(tokens, tokenizer) == examples_of(text, tokenizer)
    prepared = UL2Data(tokens, tokenizer)
    line = prepared.report()[0]
    assert f"{counts['used']:,} documents, {counts['tokens']:,} tokens" in line
    # Any tool opens the folder, and the index spares opening its files.
    assert pq.read_table(tmp_path / "out/data").num_rows == counts["used"]
    opened = []
    monkeypatch.setattr(corpora.pq, "ParquetFile", lambda *a, **b: opened.append(a))
    UL2Data(tokens, tokenizer)
    assert not opened
    monkeypatch.undo()
    other = build_tokenizer(num_ranks=500)
    with pytest.raises(InputError, match="prepared with another tokenizer"):
        UL2Data(tokens, other)
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
        data = UL2Data(DataConfig(inputs=[str(folder)], heldout_every=10**9), tokenizer)
        ids = {"sentinel_ids": data.sentinel_ids, "eos_id": data.eos_id}
        return Counter(
            (e.denoiser, uncorrupt(e.source, e.target, **ids).tobytes())
            for row in rows(data, epochs=1)
            for e in row.examples
        )

    assert chunks(tmp_path / "exact") < chunks(corpus) == chunks(tmp_path / "whole")


def test_a_killed_preparation_goes_on_without_doing_finished_parts_again(
    corpus, tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys, time; from pathlib import Path; from transformers import PreTrainedTokenizerFast\n"
        "from qwen3_encdec.data import prepare as p, corpus; corpus.BLOCK_BYTES = 3000\n"
        "write = p._PartWriter.write\n"
        "p._PartWriter.write = lambda *a: (time.sleep(0.3), write(*a))\n"
        "from qwen3_encdec.folders import load_tokenizer\n"
        "p.prepare(p.Preparation([sys.argv[1]]), load_tokenizer(sys.argv[2]), Path(sys.argv[3]), 1)"
    )
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", code, corpus, tmp_path / "tokenizer", out])
    deadline = time.monotonic() + 60
    while len(list(partial.rglob("part-*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {file.name: file.stat().st_mtime_ns for file in partial.rglob("part-*.parquet")}
    assert len(finished) >= 2
    assert not out.exists()
    (partial / "data/part-00099-of-00100.parquet.tmp1").write_text(
        "half a file of a process that is gone"
    )
    with pytest.raises(InputError, match="unfinished preparation of another corpus"):
        prepare(Preparation([str(corpus)], min_tokens=9), tokenizer, out, 1)
    counts = prepare(Preparation([str(corpus)]), tokenizer, out, 1)
    again = {name: (out / "data" / name).stat().st_mtime_ns for name in finished}
    assert again == finished
    assert len(list(out.rglob("part-*"))) > len(finished)
    assert counts == prepare(Preparation([str(corpus)]), tokenizer, tmp_path / "straight", 1)
    straight = tmp_path / "straight"
    both = [examples_of(DataConfig(inputs=[str(f)]), tokenizer) for f in (out, straight)]
    assert both[0] == both[1]
    assert not list(out.rglob("*.tmp*"))


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
    assert not list((tmp_path / "out.partial").rglob("*.tmp*"))
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
    assert "filled" in out
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
