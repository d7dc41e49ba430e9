"""The training loop against a plain one written out here, and the inputs it refuses."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_encdec import Qwen3EncoderDecoderTokenizer, Qwen3ForSeq2SeqLM
from qwen3_encdec.data.collate import collate_masked_rows, collate_rows, mask_token_id
from qwen3_encdec.data.stream import RowLoader, UL2Data
from qwen3_encdec.folders import InputError
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.monitor import Meter, SpikeGuard, hearing_signals, lock
from qwen3_encdec.training.optimization import (
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from tests.conftest import small_run

ROOT = Path(__file__).parents[1]


def read_metrics(run_dir: Path, *names: str) -> list[tuple]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines if names[0] in line]


def plain_trace(
    config: TrainingConfig, world_size: int, per_micro_batch: bool = False
) -> Iterator[tuple[float, float]]:
    """(loss, gradient norm) by step, from one process and one backward pass over all rows of an
    optimizer step.

    ``per_micro_batch`` is the common mistake: a mean over micro-batches of each one's mean.
    """
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(config.model)
    model = Qwen3ForSeq2SeqLM.from_pretrained(config.model, dtype=torch.float32).train()
    optimizer = build_optimizer(model, config)
    data = UL2Data(config.data, tokenizer)
    parts = config.gradient_accumulation_steps * world_size
    rows = RowLoader(
        data, batch_size=config.batch_size * parts, rank=0, ranks=1, num_workers=0, collate=list
    )
    options = {"z_loss": config.z_loss}
    make_batch = collate_rows
    if config.mntp_weight:
        make_batch = partial(
            collate_masked_rows,
            mask_id=mask_token_id(tokenizer),
            kept_ids=data.kept_ids,
            probability=config.mntp_probability,
        )
        options["encoder_loss_weight"] = config.mntp_weight
    for step, step_rows in zip(range(1, config.max_steps + 1), rows, strict=False):
        count = parts if per_micro_batch else 1
        size = len(step_rows) // count
        loss = torch.zeros(())
        for part in range(count):
            batch = make_batch(step_rows[part * size :][:size])
            batch.pop("denoiser")
            output = model(**batch, **options)
            loss = loss + output.loss / count
            likelihood = output.token_losses.sum() / (batch["labels"] != -100).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        set_learning_rate(optimizer, learning_rate(step, config))
        optimizer.step()
        optimizer.zero_grad()
        # The log has the negative log-likelihood, whatever the loss adds to it.
        yield float(loss.detach()) if per_micro_batch else float(likelihood), float(norm)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "gradient checkpointing"])
def test_trace_is_that_of_a_plain_loop(train, init_folder, corpus, tmp_path, recompute):
    options = {"gradient_accumulation_steps": 3, "gradient_checkpointing": recompute}
    config = small_run(init_folder, corpus, **options)
    assert train(**options) == tmp_path / "run/checkpoints/step-000004"
    trace = read_metrics(tmp_path / "run", "loss", "grad_norm")
    assert len(trace) == 4
    torch.testing.assert_close(trace, list(plain_trace(config, 1)), rtol=1e-5, atol=1e-5)
    wrong = list(plain_trace(config, 1, per_micro_batch=True))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trace, wrong, rtol=1e-5, atol=1e-5)

    rates = [learning_rate(step, config) for step in range(1, 5)]
    assert read_metrics(tmp_path / "run", "lr") == [(rate,) for rate in rates]
    evaluated = read_metrics(tmp_path / "run", "eval_loss/S", "step")
    assert [step for _, step in evaluated] == [0, 2, 4]
    assert evaluated[-1][0] < evaluated[0][0]


def test_a_mixture_has_a_held_out_loss_for_each_corpus(train, corpus, tmp_path):
    words = " ".join(f"{n} plus {n} is {n + n}." for n in range(99))
    (tmp_path / "sums.txt").write_text("\n".join(words[n:] for n in range(300)))
    parts = [{"inputs": [str(corpus)], "name": "prose"}, {"inputs": [str(tmp_path / "sums.txt")]}]
    settings = {"data.inputs": [], "data.mixture": parts, "data.heldout_every": 4}
    train(**settings)
    keys = ["eval_loss_on/prose", "eval_loss_on/sums.txt", "eval_loss/S"]
    losses = np.array(read_metrics(tmp_path / "run", *keys))
    assert len(losses) == 3
    assert (losses[:, 0] != losses[:, 1]).all()
    names = ["tokens/prose", "tokens/sums.txt", "source_tokens", "target_tokens"]
    for *tokens, source, target in read_metrics(tmp_path / "run", *names):
        assert sum(tokens) == source + target
    # In another order the names stay with their texts; at lr 1e-9 nothing else changes.
    turned = settings | {"data.mixture": parts[::-1], "data.accept_changes": True}
    train(**turned, max_steps=6, lr=1e-9)
    after = np.array(read_metrics(tmp_path / "run", *keys))
    np.testing.assert_allclose(after[3:], after[[2]], rtol=1e-4)
    settings |= {"data.heldout_inputs": [str(tmp_path / "sums.txt")]}  # of no corpus
    settings |= {"data.mixture": [parts[0], parts[0]], "max_steps": 1}
    train(output_dir=tmp_path / "apart", **settings)
    assert not read_metrics(tmp_path / "apart", "eval_loss_on/prose")


@pytest.mark.parametrize("option", ["z_loss=0.01", "mntp_weight=0.5"])
def test_optional_signals_train_as_in_a_plain_loop(train, init_folder, corpus, tmp_path, option):
    name, value = option.split("=")
    options = {"gradient_accumulation_steps": 2, "eval_every": 0, name: value}
    train(**options)
    trace = read_metrics(tmp_path / "run", "loss", "grad_norm")
    # the control: without the signal it is another run
    with_it, without = (
        list(plain_trace(small_run(init_folder, corpus, **options | {name: weight}), 1))
        for weight in (value, 0.0)
    )
    torch.testing.assert_close(trace, with_it, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trace, without, rtol=1e-5, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_step(train, init_folder, tmp_path):
    broken = shutil.copytree(init_folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.decoder.norm.weight"].fill_(float("inf"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"step 1: loss nan .*stopped before the update") as held:
        train(broken, eval_every=0, num_workers=1)
    # The traceback keeps the run alive, but not its workers: a process that ends would wait for them.
    assert held.tb
    assert not multiprocessing.active_children()
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_killed_data_worker_is_a_sentence(train, monkeypatch):
    monkeypatch.setattr(UL2Data, "examples", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="DataLoader worker .*; lower num_workers if memory"):
        train(eval_every=0, num_workers=1)


def test_bad_folders_are_refused_in_a_sentence(train, tmp_path):
    with pytest.raises(InputError, match="qwen3-encdec initialize --model"):
        train(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"R2 needs up to \d+ sentinels"):
        train(**{"data.source_length": 512, "data.target_length": 512})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="was not written by qwen3-encdec"):
        train(output_dir=foreign)


def test_what_people_see(train, capfd):
    last = train()
    printed, errors = capfd.readouterr()
    lines = printed.splitlines()
    assert errors == ""  # no foreign progress bars
    steps = [line for line in lines if re.match(r"step [1-4] of 4: loss", line)]
    assert len(steps) == 4
    for unit in ("nats/token", "tokens/s", "GiB", "data wait", "elapsed 0:00:", "remaining 0:00:"):
        assert all(unit in line for line in steps)
    assert lines[-2] == f"last checkpoint: {last}"
    assert lines[-1].startswith(f"next: qwen3-encdec extract --model {last}")


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """The folder of a run that has not begun."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "qwen3_encdec.json").write_text('{"kind": "training run"}')
    return folder


def test_two_runs_in_one_folder(train, run_dir):
    script = "import pathlib, sys, time; from qwen3_encdec.training.monitor import lock"
    script += "; held = lock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=r"another run is training in .*run; stop it first"):
            train()
        other.kill()
    assert train().exists()


def test_a_file_system_without_locks_stops_nothing(tmp_path, monkeypatch, capsys):
    unsupported = Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented"))
    monkeypatch.setattr("fcntl.lockf", unsupported)
    assert lock(tmp_path / "run").name == str(tmp_path / "run/.lock")
    assert "run cannot be locked (Function not implemented)" in capsys.readouterr().out


def test_stop_is_looked_at_during_start_up(train, run_dir, capsys):
    (run_dir / "STOP").touch()
    train()
    assert "stop requested: stopped after step 0 of 4" in capsys.readouterr().out
    assert not (run_dir / "STOP").exists()
    assert not (run_dir / "checkpoints").exists()
    train()
    assert [step for _, step in read_metrics(run_dir, "eval_loss/S", "step")] == [0, 2, 4]


def test_the_second_ctrl_c_ends_at_once(capfd):
    with hearing_signals() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "press Ctrl-C again to end at once" in capfd.readouterr().err


def test_a_run_may_be_in_any_thread(train):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, eval_every=0).result().name == "step-000004"


def test_a_tracker_that_fails_stops_nothing(train, tmp_path, monkeypatch, capsys):
    broken = Mock(side_effect=ConnectionError("the tracker's server is gone"))
    for method in ("init_trackers", "log", "end_training"):
        monkeypatch.setattr(f"accelerate.Accelerator.{method}", broken)
    assert train(trackers="[tensorboard]").name == "step-000004"
    assert "step 4 could not be logged: the tracker's server is gone" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "run", "loss")) == 4


def test_a_new_level_is_accepted_after_a_while_and_survives_a_restart():
    guard = SpikeGuard(6.0, 16, [])
    noise = np.random.default_rng(0).normal(0, 0.05, 200)
    assert not any(guard.skips(3 + delta, 1.0) for delta in noise[:50])
    skipped = [guard.skips(6 + delta, 1.0) for delta in noise[50:60]]  # a new language
    assert skipped[0]
    assert sum(skipped) <= 3
    assert not any(skipped[5:])
    again = SpikeGuard(6.0, 16, json.loads(json.dumps(list(guard.recent))))
    assert again.recent == guard.recent
    assert not again.skips(6.0, 1.0)
    assert again.skips(60.0, 1.0)  # a spike is still one


def test_peak_memory_is_in_bytes_on_a_mac(monkeypatch):
    meter, found = Meter(["R1"], np.zeros(4), 0.0, {}), []
    for system in ("linux", "darwin"):
        monkeypatch.setattr(sys, "platform", system)
        meter.add(np.ones(7), np.ones((2, 1)), 1.0, 0.0)
        found.append(meter.read()["memory_gib"])
    assert found[0] == pytest.approx(1024 * found[1], rel=0.01)


def test_data_that_fails_saves_what_was_finished(train, corpus, tmp_path):
    broken = tmp_path / "broken.jsonl"
    lines = corpus.read_text().splitlines()
    lines[100] = '{"text": 3}'
    broken.write_text("\n".join(lines) + "\n")
    run_dir = tmp_path / "run"
    with pytest.raises(InputError, match=r"broken\.jsonl"):
        train(inputs=broken, max_steps=60, eval_every=0, log_every=50)
    last = read_metrics(run_dir, "step")[-1][0]  # the last steps are logged too
    assert 0 < last < 60
    assert (run_dir / "checkpoints/latest").resolve().name == f"step-{last:06d}"
