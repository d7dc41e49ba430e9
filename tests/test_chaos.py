"""Faults that a run must survive or end by, in real processes: kills, NaNs, spikes, requests to
stop, lost ranks, damage, a full disk.
"""

import copy
import importlib.util
import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from qwen3_encdec import Qwen3ForSeq2SeqLM
from tests.chaos import (
    DDP,
    FSDP2,
    HSDP,
    ZERO2,
    ZERO3,
    Life,
    consumed,
    kill_test,
    last_step,
    outcome,
)

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="deepspeed: make test-distributed")


@pytest.fixture
def live(init_folder, corpus):
    return partial(Life, init_folder, corpus)


def log(run: Path, rank: int = 0) -> str:
    return run.with_suffix(f".rank{rank}.log").read_text()


def flip(file: Path) -> None:
    """Change a bit of a file."""
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def metrics(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def trace(run: Path) -> list[tuple[float, ...]]:
    names = ("loss", "grad_norm", "grad_norm/encoder", "grad_norm/decoder", "grad_norm/embedding")
    return [tuple(line[name] for name in names) for line in metrics(run)]


def test_killed_and_resumed_is_as_left_alone(init_folder, corpus, tmp_path):
    kills = int(os.environ.get("KILLS", "2"))
    alone, killed, inside = kill_test(tmp_path, init_folder, corpus, kills)
    assert killed == alone
    assert inside
    # the control: one document dealt twice, or one step forgotten, is seen
    other = copy.deepcopy(killed)
    other["consumed"][3] = other["consumed"][2]
    assert other != alone


def test_nan_on_one_rank_stops_all_before_the_step(live, tmp_path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert live(run, save_every=0, nan=4).end() == [2, 2]
    for rank in range(2):
        assert "step 4: loss" in log(run, rank)
        assert "stopped before the update" in log(run, rank)
    assert (run / "checkpoints/latest").resolve().name == "step-000003"
    # and it is the third step's: continued, it gives what an untroubled run gives
    for folder in (run, straight):
        assert live(folder, save_every=0).end() == [0, 0]
    assert outcome(run) == outcome(straight)


def test_a_spike_is_skipped_and_counted(live, tmp_path):
    run, changes = tmp_path / "run", {"spike_window": 8, "max_steps": 9}
    assert live(run, **changes, spike=7).end() == [0, 0]
    lines = metrics(run)
    assert [line["skipped_steps"] for line in lines] == [0] * 6 + [1] * 3
    assert lines[6]["grad_norm"] > 30 * lines[5]["grad_norm"]
    assert "step 7 skipped" in log(run)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "STOP"])
def test_asked_to_stop_it_saves_and_ends_well(live, tmp_path, how):
    run, straight = tmp_path / "run", tmp_path / "straight"
    changes = {"max_steps": 60, "save_every": 0}
    life = live(run, **changes)
    while last_step(run) < 3:
        time.sleep(0.01)
    if how == "STOP":
        (run / "STOP").touch()
    else:
        os.kill(life.ranks[1].pid, signal.Signals[how])  # one rank is enough
    assert life.end() == [0, 0]
    saved = (run / "checkpoints/latest").resolve().name
    assert "stop requested: stopped after step" in log(run)
    assert saved == f"step-{last_step(run):06d}" != "step-000060"
    assert not (run / "STOP").exists()
    for folder in (run, straight):
        assert live(folder, **changes).end() == [0, 0]
    assert outcome(run) == outcome(straight)


@pytest.mark.parametrize("how", ["killed", "hang"])
def test_the_others_do_not_wait_for_a_lost_rank(live, tmp_path, how):
    run = tmp_path / "run"
    faults = {"hang": 4} if how == "hang" else {}
    life = live(run, stall_seconds=5, max_steps=400, **faults)
    while last_step(run) < 3:
        time.sleep(0.01)
    if how == "killed":
        life.ranks[1].kill()
    life.ranks[0].join(40)
    ended = life.ranks[0].exitcode
    life.kill()
    assert ended not in (0, None)
    if how == "hang":
        assert "Timeout (0:00:05)!" in log(run)
        assert "most recent call first" in log(run)  # where it waited


def test_a_late_rank_joins_a_new_run(live, tmp_path):
    life = live(tmp_path / "run", max_steps=1, late=4)
    assert life.end() == [0, 0], log(tmp_path / "run", 1)


def gradients(run: Path) -> dict[str, torch.Tensor]:
    """Of the first step, by parameter: a first moment is (1 - beta1) of it."""
    reader = HuggingFaceStorageReader(str(run / "checkpoints/step-000001/state"))
    stored = reader.read_metadata().state_dict_metadata
    moments = {n: torch.empty(s.size) for n, s in stored.items() if n.endswith(".exp_avg")}
    load(moments, storage_reader=reader, no_dist=True)
    return {name: moment / 0.1 for name, moment in moments.items()}


def test_any_number_of_ranks_and_micro_batches_is_one_process(live, tmp_path):
    def run(name: str, world: int, batch: int, accumulation: int, **faults) -> Path:
        changes = {"max_steps": 6, "save_every": 1, "keep_last": 0, "max_grad_norm": 0.5}
        changes |= {"batch_size": batch, "gradient_accumulation_steps": accumulation}
        folder = tmp_path / name
        assert live(folder, world, **changes, **faults).end() == [0] * world, log(folder)
        return folder

    expected = run("1 x 4", 1, 4, 1)
    model = Qwen3ForSeq2SeqLM.from_pretrained(expected / "checkpoints/latest")
    of = gradients(expected)
    names = {name for name, _ in model.named_parameters()}
    assert {name.removesuffix(".exp_avg") for name in of} == names
    ways = [("4 x 1", 1, 1, 4, {}), ("FSDP2 2", 2, 1, 2, {}), ("FSDP2 4", 4, 1, 1, {})]
    ways += [("DDP 2", 2, 1, 2, {"launch": DDP})]
    if DEEPSPEED:
        ways += [("ZeRO-2", 2, 1, 2, {"launch": ZERO2}), ("ZeRO-3", 2, 1, 2, {"launch": ZERO3})]
    for name, world, batch, accumulation, faults in ways:
        other = run(name, world, batch, accumulation, **faults)
        assert consumed(other) == consumed(expected)
        torch.testing.assert_close(trace(other), trace(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(other), of, rtol=1e-4, atol=1e-6)
    wrong = run("wrong", 2, 1, 2, means=True)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trace(wrong), trace(expected), rtol=1e-5, atol=1e-5)


def test_another_number_of_ranks_goes_on_with_the_same_losses(live, tmp_path):
    def go_on(run: Path, world: int, until: int) -> None:
        more = {"gradient_accumulation_steps": 6 // world, "max_steps": until, "warmup_steps": 0}
        more |= {"schedule": "wsd", "decay_fraction": 0, "save_every": 0}
        life = live(run, world, **more)
        assert life.end() == [0] * world, log(run)

    straight, changed = tmp_path / "straight", tmp_path / "changed"
    go_on(straight, 2, 9)
    for world, until in [(2, 3), (1, 6), (3, 9)]:
        go_on(changed, world, until)
    assert len(trace(changed)) == 9
    torch.testing.assert_close(trace(changed), trace(straight), rtol=1e-5, atol=1e-5)
    assert consumed(changed) == consumed(straight)
    assert len(list((changed / "checkpoints/latest/state").glob("rank-*-of-00003.json"))) == 3


@pytest.mark.parametrize("launch", [FSDP2, HSDP, DDP], ids=["FSDP2", "HSDP", "DDP"])
def test_a_checkpoint_is_copied_and_read_once_by_all_ranks_together(live, tmp_path, launch):
    run = tmp_path / "run"
    evaluated = {"eval_every": 2, "eval_examples_per_denoiser": 2}  # just before it is saved
    written = live(run, 4, max_steps=2, **evaluated, launch=launch)
    assert written.end() == [0] * 4, log(run)
    ranks = [json.loads(file.read_text()) for file in run.glob("*/step-000002/state/rank*")]
    parts = [len(rank["checksums"]) for rank in ranks]
    assert 0 < max(parts) < 1.2 * min(parts)  # each has copied and written as much
    resumed = live(run, 4, max_steps=3, launch=launch)
    assert resumed.end() == [0] * 4, log(run)
    read = [int(re.findall(r"READ (\d+)", log(run, rank))[-1]) for rank in range(4)]
    latest = run / "checkpoints/step-000002"
    size = sum(file.stat().st_size for file in latest.rglob("*.safetensors"))
    assert 0.9 * size < sum(read) <= 1.2 * size
    assert max(read) < 0.4 * size


def test_a_damaged_shard_of_another_rank_is_passed_over(live, tmp_path):
    run = tmp_path / "run"
    assert live(run, max_steps=4).end() == [0, 0], log(run)
    finished = outcome(run)
    flip(next(run.glob("checkpoints/step-000004/state/shard-00002*")))
    assert live(run, max_steps=4).end() == [0, 0], log(run)
    assert "step-000004 is damaged: " in log(run)
    assert f"resuming from {run}/checkpoints/step-000002" in log(run)
    assert outcome(run)["tensors"] == finished["tensors"]
    assert (run / "checkpoints/damaged-step-000004").exists()


@pytest.mark.parametrize("limit", [20_000, 100_000], ids=["at rank 0's tokenizer", "at tensors"])
def test_a_full_disk_stops_cleanly_and_goes_on_when_there_is_room(live, tmp_path, limit):
    run = tmp_path / "run"
    assert live(run, max_steps=2).end() == [0, 0]
    assert live(run, max_steps=40, full=limit).end() == [2, 2]
    sentence = "cannot write to [^:]*: (.*); training stopped, the last checkpoint is (.*)"
    for rank in range(2):
        found = re.search(sentence, log(run, rank))
        assert "File too large" in found[1]
        assert found[2] == str(run / "checkpoints/step-000002")
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["latest", "step-000002"]
    assert live(run, max_steps=4).end() == [0, 0]


@needs_deepspeed
@pytest.mark.parametrize("launch", [ZERO2, ZERO3], ids=["ZeRO-2", "ZeRO-3"])
def test_deepspeed_resumes_skips_and_exchanges_checkpoints_with_others(live, tmp_path, launch):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    zero = {"launch": launch, "spike": 7}
    changes = {"spike_window": 8, "max_steps": 9, "save_every": 0, "decay_fraction": 0}
    changes |= {"eval_every": 3, "eval_examples_per_denoiser": 2}
    alone = live(straight, **changes, **zero)
    assert alone.end() == [0, 0], log(straight)
    assert "step 7 skipped" in log(straight)
    # five steps with FSDP2, a sixth whose weights are damaged, then four with DeepSpeed
    first = changes | {"max_steps": 6, "save_every": 5}
    assert live(cut, **first).end() == [0, 0], log(cut)
    flip(cut / "checkpoints/step-000006/model.safetensors")
    assert live(cut, **changes, **zero).end() == [0, 0], log(cut)
    assert "step-000006 is damaged: model." in log(cut)
    torch.testing.assert_close(trace(cut), trace(straight), rtol=1e-5, atol=1e-5)
    latest = [run / "checkpoints/latest" for run in (cut, straight)]
    weights = [Qwen3ForSeq2SeqLM.from_pretrained(folder).model.shared.weight for folder in latest]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
