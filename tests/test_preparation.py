"""Tokenizing a corpus beforehand, and the analysis of a data config."""

import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3_encdec.data import corpus as corpora
from qwen3_encdec.data import prepare as module
from qwen3_encdec.data.analysis import analyze
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.prepare import Preparation, prepare
from qwen3_encdec.data.stream import UL2Data, rows
from qwen3_encdec.folders import InputError
from qwen3_encdec.reports.data import write_page
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer
from qwen3_encdec.training.config import read_dataclass

pytestmark = pytest.mark.usefixtures("own_cache")
DATATROVE = Path(__file__).parents[1] / "examples" / "prepare_with_datatrove.py"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_ranks=512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, "data.inputs is empty"),
        ({"preset": "ul3"}, "preset 'ul3'"),
        ({"source_length": 1}, "source_length: .* greater than or equal to 2, got 1"),
        ({"sorce_length": 3}, "unknown key sorce_length; did you mean source_length?"),
        ({"source_length": 12, "target_length": 12}, "data.min_tokens=8 is more than half"),
        ({"min_tokens": 1}, "min_tokens: .* got 1"),
        ({"heldout_every": 1}, "heldout_every: .* got 1"),
        ({"streams": True}, "streams: Input should be a valid integer, got True"),
        ({"seed": -1}, "seed: .* got -1"),
        ({"cache_gib": math.nan}, "cache_gib: .* got nan"),
        ({"cache_gib": True}, "cache_gib: Input should be a valid number"),
        ({"inputs": "a.txt"}, "inputs: Input should be a valid list, got 'a.txt'"),
        ({"heldout_inputs": [""]}, "heldout_inputs.0: String should have at least 1"),
        ({"text_column": ""}, "data.text_column='' is not the name of a column"),
        ({"mixture": [{"inputs": [3]}]}, r"not a list of names: \[3\]"),
        ({"mixture": [{"inputs": ["a"], "text_column": None}]}, "data.text_column=None"),
        ({"mixture": [{"inputs": ["a"], "weight": math.inf}]}, "weight=inf of"),
        ({"mixture": [{"inputs": ["a"], "weight": True}]}, "weight=True of"),
        ({"mixture": [{"inputs": ["a"], "wieght": 1}]}, "data.mixture: .*argument 'wieght'"),
        ({"mixture": ["a"]}, "mixture.0: Input should be a valid dictionary, got 'a'"),
    ],
)
def test_bad_configs_name_the_field_and_the_value(changes, message):
    with pytest.raises(InputError, match=message):
        read_dataclass(DataConfig, changes, "mine.yaml")
    with pytest.raises(ValueError, match="for DataConfig"):
        DataConfig(**changes)


def test_sources_of_one_name_are_numbered():
    names = ["x-2", "x", "x", "x"]
    config = DataConfig(mixture=[{"inputs": ["a"], "name": name} for name in names])
    assert len({source.name for source in config.sources}) == 4


def test_too_few_sentinels_stop_the_stream_before_it_reads():
    few = build_tokenizer(num_ranks=512, num_sentinel_tokens=20)
    with pytest.raises(InputError, match="needs up to"):
        UL2Data(DataConfig(inputs=["not/looked/at"]), few)


def test_analysis(tmp_path, tokenizer):
    words = [f"word{i}" for i in range(11)]
    texts = [" ".join(words[(i * j) % 11] for j in range(5 + i % 90)) for i in range(900)]
    texts += ["x"] * 400  # after the last row of some streams
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(inputs=[str(tmp_path)], source_length=256, target_length=128)
    analysis = analyze(config, tokenizer, num_examples=10**6, show=1)
    drawn = list(rows(UL2Data(config, tokenizer), epochs=1))
    last = {row.stream: row.position for row in drawn}
    tokens = sum(position["tokens"] for position in last.values())
    assert dict(analysis.totals)["documents"].startswith("1,300 = ")
    assert dict(analysis.totals)["tokens"].startswith(f"{tokens:,} in")
    assert dict(analysis.totals)["rows"].startswith(f"{len(drawn):,} with")
    assert sum(map(len, analysis.of_each)) == sum(len(row.examples) for row in drawn)
    nominal, examples, targets = analysis.shares.T
    assert sum(examples) == sum(targets) == pytest.approx(1)
    assert examples == pytest.approx(nominal, abs=0.08)
    sizes = np.concatenate(analysis.of_each)
    assert (sizes[:, :2].max(axis=0) <= (256, 128)).all()
    for denoiser, line in zip(config.denoisers, analysis.table[1], strict=True):
        assert float(line[3].split()[0]) == pytest.approx(denoiser.corruption, abs=0.01)
    printed = str(analysis)
    for word in ("R1", "X2", "filled", "<extra_id_0>", "<|im_end|>"):
        assert word in printed

    write_page(analysis, tmp_path / "report.html", {"tokenizer": "<here>"})
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    for word in ("&lt;here&gt;", "&lt;extra_id_0&gt;", f"{len(drawn):,} with"):
        assert word in page
    assert "<script" not in page
    assert "mathdefault" not in page


def test_a_corpus_that_gives_no_example_is_not_analyzed(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("short\n\n")
    with pytest.raises(InputError, match="no documents to train on|no examples in"):
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
    lines = [json.dumps({"text": text}) + "\n" for text in texts[:400]]
    (folder / "a.jsonl").write_text("".join(lines))
    table = pa.table({"text": [*texts[400:], None, "", "a", "a"]})
    pq.write_table(table, folder / "b.parquet", row_group_size=50)
    return folder


def config_of(folder, **changes) -> DataConfig:
    return DataConfig(inputs=[str(folder)], source_length=128, target_length=96, **changes)


def examples_of(folder, tokenizer) -> Counter:
    made = rows(UL2Data(config_of(folder), tokenizer), epochs=1)
    examples = [example for row in made for example in row.examples]
    return Counter((e.source.tobytes(), e.target.tobytes(), e.denoiser) for e in examples)


def prepared(config, tokenizer, output, **options) -> Counter:
    counts = prepare(config, tokenizer, output, **{"processes": 1, **options})
    assert counts["documents"] == counts["used"] + counts["short"] + counts["duplicate"]
    return counts


@pytest.mark.parametrize("processes", [1, 2])
def test_a_prepared_corpus_gives_the_same_examples(
    corpus, tokenizer, tmp_path, processes, monkeypatch
):
    out = tmp_path / "out"
    counts = prepared(config_of(corpus), tokenizer, out, processes=processes)
    assert counts["documents"] == 604
    assert counts["short"] >= 4
    assert not (tmp_path / "out.partial").exists()
    assert len(list(out.rglob("part-*.parquet"))) > 3
    assert examples_of(out, tokenizer) == examples_of(corpus, tokenizer)
    line = UL2Data(config_of(out), tokenizer).report()[0]
    assert f"{counts['used']:,} documents, {counts['tokens']:,} tokens" in line
    mixed = DataConfig(inputs=[str(out), str(corpus / "a.jsonl")])
    about = re.search(r"about ([\d,]+) documents", UL2Data(mixed, tokenizer).report()[0])[1]
    assert int(about.replace(",", "")) == pytest.approx(counts["used"] + 400, rel=0.1)
    # Any tool opens the folder, and the index spares opening its files.
    assert pq.read_table(out / "data").num_rows == counts["used"]
    opened = []
    monkeypatch.setattr(corpora.pq, "ParquetFile", lambda *a, **b: opened.append(a))
    UL2Data(config_of(out), tokenizer)
    assert not opened
    monkeypatch.undo()
    for config in (config_of(out), config_of(corpus, heldout_inputs=[str(out)])):
        with pytest.raises(InputError, match="prepared with another tokenizer"):
            UL2Data(config, build_tokenizer(num_ranks=500))
    with pytest.raises(InputError, match="is already tokenized"):
        prepared(config_of(out), tokenizer, tmp_path / "again")
    assert not (tmp_path / "again.partial").exists()


def test_prepared_folders_that_are_taken_apart_or_written_again(corpus, tokenizer, tmp_path):
    out = tmp_path / "out"
    first = prepared(config_of(corpus), tokenizer, out)
    UL2Data(config_of(out), tokenizer)
    (tmp_path / "link").symlink_to(out)
    second = prepared(config_of(corpus / "a.jsonl"), tokenizer, tmp_path / "link")
    assert f"{second['tokens']:,} tokens" in UL2Data(config_of(out), tokenizer).report()[0]
    assert second["tokens"] < first["tokens"]
    (out / "data/_index.json").rename(tmp_path / "_index.json")
    assert f"{second['tokens']:,} tokens" in UL2Data(config_of(out), tokenizer).report()[0]
    (out / "data/_index.json").write_text('{"shards": "of another program"}')
    assert f"{second['tokens']:,} tokens" in UL2Data(config_of(out), tokenizer).report()[0]
    (tmp_path / "_index.json").rename(out / "data/_index.json")
    next(out.rglob("part-*")).unlink()
    with pytest.raises(InputError, match=r"lacks 1 of its files, such as part-\d+"):
        UL2Data(config_of(out), tokenizer)


def test_preparations_that_would_be_useless(corpus, tokenizer, tmp_path):
    mixture = DataConfig(mixture=[{"inputs": [str(corpus)]}])
    for config in (config_of(corpus), mixture):
        with pytest.raises(InputError, match=r"output .* is inside input .*corpus; choose another"):
            prepared(config, tokenizer, corpus / "tokens")
    (tmp_path / "a.txt").write_text("short\n" * 3)
    with pytest.raises(InputError, match="none of the 3 documents has 24 tokens"):
        prepared(config_of(tmp_path / "a.txt", min_tokens=24), tokenizer, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_copies_are_left_out_and_counted(corpus, tokenizer, tmp_path):
    exact = prepared(config_of(corpus), tokenizer, tmp_path / "exact", deduplicate="exact")
    assert exact["duplicate"] == 10 + 1  # "a" twice
    assert examples_of(tmp_path / "exact", tokenizer) < examples_of(corpus, tokenizer)
    pytest.importorskip("rensa")
    alike = prepared(config_of(corpus), tokenizer, tmp_path / "alike", deduplicate="minhash")
    assert 14 <= alike["duplicate"] <= 16  # of five near copies the shortest may be too different


def test_a_killed_preparation_goes_on_without_doing_finished_parts_again(
    corpus, tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = """
import sys, time
from pathlib import Path
from qwen3_encdec.data import corpus, prepare
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.folders import load_tokenizer
corpus.BLOCK_BYTES = 3000
write = prepare.Preparation.write
prepare.Preparation.write = lambda *a: (time.sleep(0.3), write(*a))
config = DataConfig(inputs=[sys.argv[1]])
prepare.prepare(config, load_tokenizer(sys.argv[2]), Path(sys.argv[3]), processes=2)
"""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", code, corpus, tmp_path / "tokenizer", out])
    deadline = time.monotonic() + 60
    while len(list(partial.rglob("part-*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) == 2
    while any(worker.is_running() and worker.status() != "zombie" for worker in workers):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.1)
    finished = {file.name: file.stat().st_mtime_ns for file in partial.rglob("part-*.parquet")}
    assert len(finished) >= 2
    assert not out.exists()
    (partial / "data/part-00099-of-00100.parquet.tmp1").write_text("half a file, its process gone")
    with pytest.raises(InputError, match="unfinished preparation with another corpus"):
        prepared(config_of(corpus, min_tokens=9), tokenizer, out)
    counts = prepared(config_of(corpus), tokenizer, out)
    assert {name: (out / "data" / name).stat().st_mtime_ns for name in finished} == finished
    assert len(list(out.rglob("part-*"))) > len(finished)
    straight = tmp_path / "straight"
    assert counts == prepared(config_of(corpus), tokenizer, straight)
    assert examples_of(out, tokenizer) == examples_of(straight, tokenizer)
    assert not list(out.rglob("*.tmp*"))


def test_a_datatrove_pipeline_writes_the_same_files(corpus, tokenizer, tmp_path, run_script):
    pytest.importorskip("datatrove", reason="needs the extra datatrove: make test-extras")
    here, there = tmp_path / "here", tmp_path / "there"
    prepared(config_of(corpus), tokenizer, here, deduplicate="exact")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = (tmp_path / "tokenizer", there, corpus, "--deduplicate", "exact", "--tasks", 3)
    code, _, errors = run_script(DATATROVE, *arguments)
    assert code == 0, errors
    files = [path.relative_to(here) for path in here.rglob("*") if path.is_file()]
    assert len(files) > 5
    for file in files:
        assert (here / file).read_bytes() == (there / file).read_bytes(), file


def test_the_steps_of_a_preparation(corpus, tokenizer, tmp_path):
    """By any number of tasks, in any order; what a task has not written is not passed over."""
    out = tmp_path / "out"
    preparation = Preparation(config_of(corpus), tokenizer, out)
    preparation.begin()
    assert len(preparation.parts) > 3
    for rank in (2, 0):
        preparation.run(None, rank, 3)
    with pytest.raises(InputError, match=r"\d+ parts are not written yet"):
        preparation.finish()
    assert not out.exists()
    preparation.run(None, 1, 3)
    assert preparation.finish(None, 0, 1)["documents"] == 604
    assert examples_of(out, tokenizer) == examples_of(corpus, tokenizer)


def test_a_prepared_folder_that_cannot_be_replaced_stays(corpus, tokenizer, tmp_path, monkeypatch):
    config, out = config_of(corpus), tmp_path / "out"
    prepared(config, tokenizer, out)
    before = examples_of(out, tokenizer)
    rename = os.rename

    def failing(source, target):
        if Path(source).name == "out.partial":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(InputError, match="cannot be written: Input/output error"):
        prepared(config, tokenizer, out)
    assert examples_of(out, tokenizer) == before
    # All that is left to do is to move it.
    monkeypatch.undo()
    monkeypatch.setattr(module, "_find_copies", lambda *_: pytest.fail("looked for copies again"))
    monkeypatch.setattr(corpora, "BLOCK_BYTES", 3000)
    prepared(config, tokenizer, out)
    assert sorted(path.name for path in out.iterdir()) == ["data", "qwen3_encdec.json"]


def test_parts_share_the_list_of_copies(corpus, tokenizer, tmp_path):
    """Was: every process held all of it as a set."""
    preparation = Preparation(config_of(corpus), tokenizer, tmp_path / "out")
    preparation.begin()
    np.save(tmp_path / "out.partial" / "copies.npy", 3 + np.arange(10**6))
    tracemalloc.start()
    preparation.write(0)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_a_preparation_takes_the_cpus_that_it_may_use(corpus, tokenizer, tmp_path, monkeypatch):
    given = {}
    loader = lambda todo, **options: given.update(options) or iter(())  # noqa: E731
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7})
    monkeypatch.setattr("qwen3_encdec.data.prepare.DataLoader", loader)
    with pytest.raises(InputError, match="parts are not written yet"):
        prepare(config_of(corpus), tokenizer, tmp_path / "out")
    assert given["num_workers"] == 3


def test_a_full_disk_while_preparing(corpus, tokenizer, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(
            InputError, match=r"part-\d+.* cannot be written: .*(too large|No space)"
        ):
            prepared(config_of(corpus), tokenizer, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").rglob("*.tmp*"))
    assert prepared(config_of(corpus), tokenizer, tmp_path / "out")["documents"] == 604


def test_the_command_prepares_and_draws(corpus, tokenizer, tmp_path, monkeypatch, command):
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def prepare_data(*arguments) -> str:
        code, out, errors = command("prepare-data", *arguments)
        return errors if code else out

    tokens, page = tmp_path / "tokens", tmp_path / "page"
    shared = ("--tokenizer", tmp_path / "tokenizer", "--input", corpus)
    exact = ("--output", tokens, "--deduplicate", "exact", "--processes", 1)
    out = prepare_data(*shared, *exact)
    assert "604 documents" in out
    assert "11 duplicate" in out
    counts = json.loads(prepare_data(*shared, *exact, "--json"))
    assert (counts["documents"], counts["duplicate"]) == (604, 11)
    out = prepare_data(*shared[:2], "--input", tokens, "--analyze-only", "--output", page)
    assert "filled" in out
    pattern = r"documents +([\d,]+) = ([\d,]+) used \+ ([\d,]+) refused \+ ([\d,]+) held out"
    numbers = re.search(pattern, out).groups()
    documents, *parts = (int(number.replace(",", "")) for number in numbers)
    assert documents == sum(parts) > 500
    assert all(parts[:1] + parts[2:])
    assert "<svg" in (page / "report.html").read_text()
    assert "holds a data report" in prepare_data(*shared, "--output", page)
    assert "holds a prepared corpus" in prepare_data(*shared, "--analyze-only", "--output", tokens)
    monkeypatch.setitem(sys.modules, "rensa", None)
    minhash = prepare_data(*shared, "--output", tmp_path / "x", "--deduplicate", "minhash")
    assert "needs the package rensa" in minhash


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_input_stops_a_preparation(tmp_path, tokenizer, processes):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "fi\n')
    with pytest.raises(InputError, match="a.jsonl line 2: not valid JSON"):
        prepared(config_of(path), tokenizer, tmp_path / "out", processes=processes)
