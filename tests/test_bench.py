import importlib
import json
import operator
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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


def targets(output: str) -> dict[str, str]:
    """Verdict by name of the `target NAME: FIGURE (wanted ...) VERDICT` lines."""
    lines = [line.split() for line in output.splitlines() if line.startswith("target ")]
    return {words[1].rstrip(":"): words[-1] for words in lines}


@pytest.mark.parametrize("script", sorted(path.name for path in BENCH.glob("*.py")))
def test_every_bench_answers_help(script, run_script):
    code, out, _ = run_script(BENCH / script, "--help")
    assert code == 0
    assert "usage" in out


@pytest.mark.slow
def test_model_bench_runs_whole_at_toy_size(tmp_path):
    done = run("model.py", "--quick", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("model-*-quick.json")
    results = json.loads(written.read_text())
    assert {"commit", "versions", "cpu", "threads", "rounds", "minutes"} <= results.keys()
    stages = {entry["stage"] for entry in results["measurements"]}
    assert stages == {"train", "decode", "loss", "share", "growth", "packed"}
    for entry in results["measurements"]:
        if not entry["figure"].startswith(
            "outside"
        ):  # a difference of two timings, of nothing much at this size
            assert all(value > 0 for values in entry["values"].values() for value in values), entry
    assert targets(done.stdout) == {
        target["name"]: "met" if target["met"] else "missed" for target in results["targets"]
    }
    assert {target["wanted"] for target in results["targets"]} == {
        ">= 2.0", "<= 0.5", ">= 1.3", ">= 1.6", "<= 0.45", "<= 1.0", "<= 1.15",
    }  # fmt: skip
    for target in results["targets"]:
        sign, wanted = target["wanted"].split()
        compare = {">=": operator.ge, "<=": operator.le}[sign]
        assert target["met"] == compare(target["figure"], float(wanted))
    assert (tmp_path / "cost-growth-quick.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("side", ["ours", "theirs", "theirs-grouped"])
def test_both_sides_train_on_the_same_tokens(model_bench, side):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(3, 99, rng.integers(2, 40)), rng.integers(3, 99, rng.integers(2, 20)))
        for _ in range(12)
    ]

    def tokens(pairs):
        batches = model_bench.make_batches(side, pairs, 3, (64, 32))
        assert len(batches) == 3
        sources = torch.cat([batch["input_ids"][batch["attention_mask"] > 0] for batch in batches])
        labels = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
        return sources.sort().values.tolist(), labels.sort().values.tolist()

    expected = tuple(sorted(np.concatenate(part).tolist()) for part in zip(*pairs, strict=True))
    assert tokens(pairs) == expected
    assert sum(map(len, expected)) == model_bench.count_tokens(pairs)
    assert tokens(pairs[:9]) != expected


def test_theirs_is_one_pair_a_row_and_grouping_pads_less(model_bench):
    pairs = model_bench.random_pairs(4, 2, 4, 99) + model_bench.random_pairs(40, 20, 4, 99)
    mixed = pairs[::2] + pairs[1::2]
    places = {}
    for side in ("theirs", "theirs-grouped"):
        batches = model_bench.make_batches(side, mixed, 2)
        assert [len(batch["input_ids"]) for batch in batches] == [4, 4]
        places[side] = sum(batch["input_ids"].numel() for batch in batches)
    assert places == {"theirs": 8 * 40, "theirs-grouped": 4 * 4 + 4 * 40}


@pytest.mark.parametrize("size", ["small", "wide"])
def test_both_models_have_the_same_text_dimensions(model_bench, size):
    def shapes(side):
        named = model_bench.make_model(
            side, model_bench.FULL.sizes[size], "bfloat16", "meta"
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
    assert 95e6 < model_bench.peak() - start < 150e6
    both = hold(100), hold(100)
    assert model_bench.peak() - start > 190e6
    del both


@pytest.mark.parametrize(
    ("kernel", "inside"),
    [
        ("aten::mm", True),
        ("aten::addmm", True),
        ("aten::bmm", True),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", True),
        ("mkldnn::_linear_pointwise", True),
        ("aten::mul", False),
        ("aten::matmul", False),  # calls mm
        ("aten::scaled_dot_product_attention", False),  # calls the fused one
        ("aten::_softmax", False),
    ],
)
def test_what_counts_as_matrix_product(model_bench, kernel, inside):
    assert bool(model_bench.MATMUL.fullmatch(kernel)) == inside


def test_ratios_are_of_medians(model_bench, capsys):
    readings = iter([1.0, 4.0, 2.0, 4.0, 9.0, 2.0])  # ours 1 2 9, theirs 4 4 2

    def stage(side):
        return {"seconds": next(readings)}

    bench = model_bench.Bench(3, lambda stage, side: stage(side))
    assert bench.compare(stage, "tiny") == {"seconds": 2 / 4}
    assert bench.measurements[0]["ours / theirs"] == {
        "min": 1 / 4,
        "of medians": 2 / 4,
        "max": 9 / 2,
    }
    assert "0.25 | 0.50 | 4.50" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_report_runs_whole_at_toy_size(tmp_path):
    done = run("gpu_report.py", "--device", "cpu", "--tiny", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("gpu-*-tiny.json")
    parts = json.loads(written.read_text())["parts"]
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
    assert "minutes were up" in gpu_report.part("late", lambda: {"seconds": 1.0})["failed"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split()[1:] == [
        "failed",
        "RuntimeError:",
        "CUDA",
        "error:",
        "out",
        "of",
        "luck",
    ]


def test_gpu_report_without_a_gpu_says_so(run_script):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = run_script(BENCH / "gpu_report.py")
    assert code == 2
    assert "no CUDA GPU is visible" in err
