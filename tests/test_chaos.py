"""Faults that a run must survive or end by, in real processes:

kills, NaNs, spikes, requests to stop, lost ranks.
"""

import copy
import importlib.util
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen3_encdec import Qwen3ForSeq2SeqLM
from tests.chaos import DDP, ZERO2, ZERO3, Life, kill_test, last_step, outcome, settings
from tests.test_training import write_corpus

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def log(run: Path, rank: int = 0) -> str:
    return run.with_suffix(f".rank{rank}.log").read_text()


def test_killed_and_resumed_is_as_left_alone(init_folder, corpus, tmp_path):
    alone, killed, inside = kill_test(
        tmp_path, init_folder, corpus, kills=int(os.environ.get("KILLS", "2"))
    )
    assert killed == alone
    assert inside
    # the control: one row dealt twice, or one step forgotten, is seen
    other = copy.deepcopy(killed)
    other["consumed"]["3/1"] = other["consumed"]["2/1"]
    assert other != alone


def test_nan_on_one_rank_stops_all_before_the_step(init_folder, corpus, tmp_path):
    run = tmp_path / "run"
    assert Life(settings(init_folder, corpus, run, save_every=0), nan=4).end() == [2, 2]
    for rank in range(2):
        assert "step 4: loss" in log(run, rank)
        assert "stopped before the update" in log(run, rank)
    assert (run / "checkpoints/latest").resolve().name == "step-000003"
    # and it is the third step's: gone on with, it gives what an untroubled run gives
    assert Life(settings(init_folder, corpus, run, save_every=0)).end() == [0, 0]
    straight = tmp_path / "straight"
    assert Life(settings(init_folder, corpus, straight, save_every=0)).end() == [0, 0]
    assert outcome(run) == outcome(straight)
    assert Qwen3ForSeq2SeqLM.from_pretrained(run / "checkpoints/latest").dtype.is_floating_point


def test_a_spike_is_skipped_and_counted(init_folder, corpus, tmp_path):
    run, control = tmp_path / "run", tmp_path / "control"
    changes = {"spike_window": 8, "max_steps": 9}
    assert Life(settings(init_folder, corpus, run, **changes), spike=7).end() == [0, 0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0] * 6 + [1] * 3
    assert lines[6]["grad_norm"] > 30 * lines[5]["grad_norm"]
    assert "step 7 is skipped" in log(run)
    # without the guard it is applied, which the next loss shows
    assert Life(
        settings(init_folder, corpus, control, spike_sigma=0, **changes), spike=7
    ).end() == [0, 0]
    applied = [
        json.loads(line)["loss"] for line in (control / "metrics.jsonl").read_text().splitlines()
    ]
    assert applied[:7] == [line["loss"] for line in lines[:7]]
    assert applied[7] != lines[7]["loss"]


@pytest.mark.parametrize("how", ["SIGTERM", "STOP"])
def test_asked_to_stop_it_saves_and_ends_well(init_folder, corpus, tmp_path, how):
    run, straight = tmp_path / "run", tmp_path / "straight"
    changes = {"max_steps": 60, "save_every": 0}
    life = Life(settings(init_folder, corpus, run, **changes))
    while last_step(run) < 3:
        time.sleep(0.01)
    if how == "SIGTERM":
        os.kill(life.ranks[1].pid, signal.SIGTERM)  # one rank is enough
    else:
        (run / "STOP").touch()
    assert life.end() == [0, 0]
    saved = (run / "checkpoints/latest").resolve().name
    assert "asked to stop: ending after step" in log(run)
    assert saved == f"step-{last_step(run):06d}" != "step-000060"
    assert not (run / "STOP").exists()
    for folder in (run, straight):
        assert Life(settings(init_folder, corpus, folder, **changes)).end() == [0, 0]
    assert outcome(run) == outcome(straight)


@pytest.mark.parametrize("how", ["killed", "hang"])
def test_the_others_do_not_wait_for_a_lost_rank(init_folder, corpus, tmp_path, how):
    run = tmp_path / "run"
    faults = {"hang": 4} if how == "hang" else {}
    life = Life(settings(init_folder, corpus, run, stall_seconds=5, max_steps=400), **faults)
    while last_step(run) < 3:
        time.sleep(0.01)
    if how == "killed":
        life.ranks[1].kill()
    life.ranks[0].join(20)
    assert life.ranks[0].exitcode not in (0, None)
    if how == "hang":
        assert "no step has finished in 5 s since step 3" in log(run)
    life.kill()


def trace(run: Path) -> list[tuple[float, ...]]:
    lines = [
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]
    names = ("loss", "grad_norm", "grad_norm/encoder", "grad_norm/decoder", "grad_norm/embedding")
    return [tuple(line[name] for name in names) for line in lines]


def consumed(run: Path) -> dict[str, list[str]]:
    """Rows of each step, whichever ranks had them."""
    rows: dict[str, list[str]] = {}
    for place, seen in outcome(run)["consumed"].items():
        step = place.partition("/")[0]
        rows[step] = sorted(rows.get(step, []) + seen)
    return rows


def gradients(run: Path) -> dict[str, torch.Tensor]:
    """Of the first step, by parameter: a first moment is (1 - beta1) of it."""
    tensors: dict[str, torch.Tensor] = {}
    for file in (run / "checkpoints/step-000001/state").glob("optimizer-*.safetensors"):
        tensors |= {n: t / 0.1 for n, t in load_file(file).items() if n.endswith(".exp_avg")}
    return tensors


def test_any_number_of_ranks_and_micro_batches_is_one_process(init_folder, corpus, tmp_path):
    def run(name: str, world: int, batch: int, accumulation: int, **faults) -> Path:
        changes = {
            "max_steps": 6,
            "save_every": 1,
            "keep_last": 0,
            "batch_size": batch,
            "max_grad_norm": 0.5,
        }
        overrides = settings(
            init_folder,
            corpus,
            tmp_path / name,
            gradient_accumulation_steps=accumulation,
            **changes,
        )
        assert Life(overrides, world, dealt=True, **faults).end() == [0] * world, log(
            tmp_path / name
        )
        return tmp_path / name

    expected = run("1 x 4", 1, 4, 1)
    model = Qwen3ForSeq2SeqLM.from_pretrained(expected / "checkpoints/latest")
    of = gradients(expected)
    assert {name.removesuffix(".exp_avg") for name in of} == {
        name for name, _ in model.named_parameters()
    }
    for name, world, batch, accumulation, faults in [
        ("4 x 1", 1, 1, 4, {}), ("FSDP2 2", 2, 1, 2, {}), ("FSDP2 4", 4, 1, 1, {}), ("DDP 2", 2, 1, 2, {"launch": DDP}),
        *([("ZeRO-2", 2, 1, 2, {"launch": ZERO2}), ("ZeRO-3", 2, 1, 2, {"launch": ZERO3})] if DEEPSPEED else []),
    ]:  # fmt: skip
        other = run(name, world, batch, accumulation, **faults)
        assert len(trace(other)) == 6
        torch.testing.assert_close(trace(other), trace(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            gradients(other), of, rtol=1e-4, atol=1e-6
        )  # the tied matrix is one of them
    wrong = run("wrong", 2, 1, 2, means=True)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trace(wrong), trace(expected), rtol=1e-5, atol=1e-5)


def test_another_number_of_ranks_goes_on_with_the_same_losses(init_folder, corpus, tmp_path):
    """Where the same rows come in the same steps;

    the stream itself deals whole blocks out (see test_stream).
    """

    def go_on(run: Path, world: int, until: int) -> None:
        more = {"gradient_accumulation_steps": 6 // world, "max_steps": until, "warmup_steps": 0, "schedule": "wsd",
                "decay_fraction": 0, "save_every": 0}  # fmt: skip
        assert (
            Life(settings(init_folder, corpus, run, **more), world, dealt=True).end() == [0] * world
        ), log(run)

    straight, changed = tmp_path / "straight", tmp_path / "changed"
    go_on(straight, 2, 9)
    for world, until in [(2, 3), (1, 6), (3, 9)]:
        go_on(changed, world, until)
    assert len(trace(changed)) == 9
    torch.testing.assert_close(trace(changed), trace(straight), rtol=1e-5, atol=1e-5)
    assert consumed(changed) == consumed(straight)
    assert len(consumed(straight)) == 9
    assert len(list((changed / "checkpoints/latest").glob("model-*-of-00003.safetensors"))) == 3


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return
    if how == "flipped":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[: -100 if how == "truncated" else None])


@pytest.mark.parametrize("how", ["missing", "flipped", "truncated"])
@pytest.mark.parametrize(
    "part",
    ["model-00002-of", "state/optimizer-00001-of", "state/rank-00002-of", "state/sha256-00001"],
)
def test_a_damaged_checkpoint_is_passed_over_aloud(
    init_folder, corpus, finished, tmp_path, part, how
):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    damage(next(run.glob(f"checkpoints/step-000004/{part}*")), how)
    assert Life(settings(init_folder, corpus, run, max_steps=4)).end() == [0, 0]
    assert "step-000004 is damaged: " in log(run)
    assert f"resuming from {run}/checkpoints/step-000002" in log(run)
    assert outcome(run)["files"] == outcome(finished)["files"]
    assert (run / "checkpoints/damaged-step-000004").exists()


@pytest.fixture(scope="module")
def finished(init_folder, corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert Life(settings(init_folder, corpus, run, max_steps=4)).end() == [0, 0]
    return run


def test_a_full_disk_stops_cleanly_and_goes_on_when_there_is_room(
    init_folder, corpus, finished, tmp_path
):
    run = tmp_path / "run"
    assert Life(settings(init_folder, corpus, run, max_steps=2)).end() == [0, 0]
    assert Life(settings(init_folder, corpus, run, max_steps=40), full=True).end() == [2, 2]
    for rank in range(2):
        found = re.search(
            "could not be written to: (.*); training stopped, the last checkpoint is (.*)",
            log(run, rank),
        )
        assert "File too large" in found[1]
        assert found[2] == str(run / "checkpoints/step-000002")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest",
        "step-000002",
    ]
    assert Life(settings(init_folder, corpus, run, max_steps=4)).end() == [0, 0]


@pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed: make test-distributed")
@pytest.mark.parametrize("launch", [ZERO2, ZERO3], ids=["ZeRO-2", "ZeRO-3"])
def test_deepspeed_resumes_skips_and_exchanges_checkpoints_with_others(
    init_folder, corpus, tmp_path, launch
):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    zero = {"launch": launch}
    changes = {"spike_window": 8, "max_steps": 9, "save_every": 0, "schedule": "wsd", "decay_fraction": 0,
               "eval_every": 3, "eval_examples_per_denoiser": 2}  # fmt: skip
    assert Life(settings(init_folder, corpus, straight, **changes), spike=7, **zero).end() == [
        0,
        0,
    ], log(straight)
    assert "step 7 is skipped" in log(straight)
    # five steps with FSDP2, then four with DeepSpeed
    assert Life(settings(init_folder, corpus, cut, **changes | {"max_steps": 5})).end() == [0, 0], (
        log(cut)
    )
    assert Life(settings(init_folder, corpus, cut, **changes), spike=7, **zero).end() == [0, 0], (
        log(cut)
    )
    torch.testing.assert_close(trace(cut), trace(straight), rtol=1e-5, atol=1e-5)
    last = [
        Qwen3ForSeq2SeqLM.from_pretrained(run / "checkpoints/latest") for run in (cut, straight)
    ]
    torch.testing.assert_close(*(model.model.shared.weight for model in last), rtol=1e-4, atol=1e-5)
