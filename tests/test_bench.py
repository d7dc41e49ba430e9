import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_encdec.data.ul2 import PRESETS, check_capacity
from qwen3_encdec.folders import InputError

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def model_bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("model")


@pytest.fixture
def gpu_report(model_bench):
    return importlib.import_module("gpu_report")


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, BENCH / script, *arguments], capture_output=True, text=True
    )


SCRIPTS = sorted({path.name for path in BENCH.glob("*.py")} - {"measure.py"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_bench_answers_help(script, run_script):
    code, out, _ = run_script(BENCH / script, "--help")
    assert code == 0
    assert "usage" in out


@pytest.mark.slow
def test_model_bench_runs_whole_at_toy_size(tmp_path):
    done = run("model.py", "--quick", "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "hardware", "versions"} <= results["provenance"].keys()
    stages = {entry["stage"] for entry in results["measurements"]}
    assert stages == {"train", "loss", "prefill", "growth"}
    for entry in results["measurements"]:
        assert all(value > 0 for side in ("ours", "theirs") for value in entry[side]), entry
    assert len(re.findall(r"^target .*\(wanted .*\) (?:met|missed)$", done.stdout, re.M)) == 8


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_both_sides_train_on_the_same_tokens(model_bench, side):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(2, 99, size=source), rng.integers(2, 99, size=target))
        for source, target in ((5, 3), (9, 2), (1, 1), (7, 6), (4, 4), (2, 8))
    ]
    found = []
    for batch in model_bench.make_batches(side, pairs, 3):
        ids, labels = batch["input_ids"], batch["labels"]
        real = batch["attention_mask"].bool() if side == "theirs" else torch.ones_like(ids).bool()
        found += [ids[real], labels[labels != -100]]
    for start, (sources, targets_) in zip(
        (0, 2, 4), zip(found[::2], found[1::2], strict=True), strict=True
    ):
        expected = [np.concatenate(part) for part in zip(*pairs[start : start + 2], strict=True)]
        assert sources.tolist() == expected[0].tolist()
        assert targets_.tolist() == expected[1].tolist()
    assert model_bench.count_tokens(pairs) == 28 + 24


@pytest.mark.parametrize("size", ["small", "wide"])
def test_both_models_have_the_same_text_dimensions(model_bench, size):
    def shapes(side):
        named = model_bench.make_model(
            side, model_bench.FULL[size], torch.bfloat16, "meta"
        ).named_parameters()
        return sorted(
            tuple(parameter.shape)
            for name, parameter in named
            if parameter.dim() == 2 and "vision" not in name and "multi_modal" not in name
        )

    assert shapes("ours") == shapes("theirs")


def test_peak_memory_counts_what_is_held_at_once_after_the_reset(model_bench):
    def hold(megabytes):
        return torch.ones(megabytes, 250_000)  # fp32

    hold(300)  # before the reset: does not count
    start = model_bench.reset_peak()
    hold(100)
    hold(100)
    assert 95e6 < model_bench.memory("VmHWM") - start < 150e6
    both = hold(100), hold(100)
    assert model_bench.memory("VmHWM") - start > 190e6
    del both


def test_ratios_are_of_medians(model_bench, capsys, monkeypatch):
    readings = iter([1.0, 4.0, 2.0, 4.0, 9.0, 2.0])  # ours 1 2 9, theirs 4 4 2
    monkeypatch.setattr(model_bench, "alone", lambda stage, side: {"seconds": next(readings)})
    (measured,) = model_bench.compare(3, model_bench.train, "tiny")
    assert measured["ratio"] == 2 / 4
    assert "0.25 | 0.50 | 4.50" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_report_runs_whole_at_toy_size(tmp_path):
    done = run("gpu_report.py", "--quick", "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert not {name: part for name, part in parts.items() if "failed" in part}
    absent = {name.removeprefix("attention, ") for name, part in parts.items() if "absent" in part}
    assert absent <= {f"flash_attention_{n}" for n in (2, 3, 4)} | {"flex_attention"}
    shares = [value for name, value in parts["baseline"].items() if name.startswith("share of")]
    assert sum(shares) == pytest.approx(1)
    for name in ("step, bf16 weights", "FSDP2, compiled after", "FSDP2, compiled before"):
        assert parts[name]["tokens/s"] > 0
    assert parts["run_training"]["tokens_per_second"] > 0


def test_a_part_that_fails_is_one_line(gpu_report, capsys, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: out of luck\nand a long trace")

    gpu_report.part("one", broken)
    assert gpu_report.part("two", lambda: {"seconds": 1.0}) == {"seconds": 1.0}
    monkeypatch.setattr(gpu_report, "TIME_LIMIT", -1)
    assert "minutes has passed" in gpu_report.part("late", lambda: {"seconds": 1.0})["failed"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split(maxsplit=2)[1:] == ["failed", "RuntimeError: CUDA error: out of luck"]


def test_the_full_size_gpu_run_has_enough_sentinels(gpu_report):
    check_capacity(PRESETS["t5gemma2"], *gpu_report.LENGTHS, 100)
    with pytest.raises(InputError, match="needs up to 115 sentinels"):  # what it ran before
        check_capacity(PRESETS["t5gemma2"], 2048, 1024, 100)


@pytest.mark.parametrize(
    ("figure", "wanted", "verdict"),
    [
        (2.0, ">= 2 x", "met"),
        (1.9, ">= 2 x", "missed"),
        (3.0, "< 3 ms", "missed"),
        (0, "== 0", "met"),
    ],
)
def test_a_target_says_whether_it_is_met(model_bench, figure, wanted, verdict, capsys):
    model_bench.target("speed of all", figure, wanted, "{:.1f} x")
    assert (
        capsys.readouterr().out
        == f"target speed of all: {figure:.1f} x (wanted {wanted}) {verdict}\n"
    )


def test_an_output_that_cannot_be_written_is_refused_before_measuring(run_script, tmp_path):
    code, _, err = run_script(BENCH / "model.py", "--output", tmp_path / "missing/out.json")
    assert code == 2
    assert "must be a file in an existing folder" in err


def test_gpu_report_without_a_gpu_says_so(run_script):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = run_script(BENCH / "gpu_report.py")
    assert code == 2
    assert "no CUDA GPU is visible" in err
