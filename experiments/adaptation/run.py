"""Measure how much an adapted decoder gains by starting as the language model that it was.

    python experiments/adaptation/run.py --parent FOLDER --minutes 20

A trained language model becomes an encoder-decoder and is trained with UL2. There is a run for each
arm, learning rate and seed in the queue of settings.yaml; runs of a seed see the same rows in the
same order. The learning rate does not decay and held-out loss is measured at powers of two, so any
run can be extended. Finished runs are skipped; a stopped run resumes from its saved state and loses
at most `save_minutes`. Several processes can share the queue. `--check` repeats the beginning of a
committed run and compares. See docs/results.md.
"""

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ROWS = HERE / "check.json"
if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import yaml
from experiments.adaptation.arms import Arm, install
from safetensors.torch import load_file, save_file

from qwen3_encdec import folders
from qwen3_encdec.conversion.initialize import initialize
from qwen3_encdec.data.collate import (
    Row,
    collate_masked_rows,
    collate_rows,
)
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import RowLoader, UL2Data
from qwen3_encdec.data.ul2 import Example
from qwen3_encdec.evaluation.denoising import denoising_losses, infill_examples
from qwen3_encdec.evaluation.suite import provenance
from qwen3_encdec.training import optimization
from qwen3_encdec.training.config import TrainingConfig

Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training: the arm's name, the learning rate of its weights and the seed of its data."""

    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return f"{self.arm.replace(', ', '_').replace(' ', '-')}_{self.lr:g}_{self.seed}"


class Training:
    """A run in progress: model, optimizer, data and the record of its measurements."""

    def __init__(self, run: Run, settings: Settings, init: Path, state: Path | None = None) -> None:
        self.run, self.settings = run, settings
        self.arm = Arm(**settings["arms"][run.arm])
        self.model = folders.load_model(init).float().to(settings["device"])
        self.tokenizer = folders.load_tokenizer(init)
        install(self.model, self.tokenizer, self.arm)
        self.config = TrainingConfig(
            lr=run.lr,
            source_gate_lr_multiplier=self.arm.gate_lr,
            warmup_steps=settings["warmup_steps"],
            max_steps=10**9,  # the learning rate does not decay
            decay_fraction=0.0,
        )
        self.optimizer = optimization.build_optimizer(self.model, self.config)
        self.data = UL2Data(DataConfig(**settings["data"], seed=run.seed), self.tokenizer)
        self.heldout = self.data.heldout_examples(self.data.choose_heldout(settings["heldout"]))
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.points: list[dict[str, Any]] = []
        position = None
        if state is not None and state.exists():
            position = self._load(state)
        collate: Any = collate_rows
        if self.arm.mntp:
            # SmolLM2 has no reserved token to mask with.
            mask_id = self.tokenizer.sentinel_token_ids[-1]
            masking = {"mask_id": mask_id, "kept_ids": self.data.kept_ids}
            collate = partial(collate_masked_rows, probability=0.2, **masking)
        loading = {name: settings[name] for name in ("batch_size", "num_workers")}
        self.loader = RowLoader(self.data, collate=collate, state=position, **loading)
        self.batches = iter(self.loader)

    def advance(self) -> None:
        """Take one optimizer step."""
        began = time.process_time()
        batch = next(self.batches)
        del batch["denoiser"]
        batch = {k: v.to(self.model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        if self.arm.mntp:
            batch["encoder_loss_weight"] = self.arm.mntp
        with self._precision():
            loss = self.model.train()(**batch).loss
        loss.backward()
        if self.tokens < self.arm.frozen_tokens:
            for name, parameter in self.model.model.decoder.named_parameters():
                if not name.endswith("source_gate"):
                    parameter.grad = None
        self.step += 1
        update(self.model, self.optimizer, self.step, self.config)
        self.tokens += batch["input_ids"].numel() + batch["labels"].numel()
        self.seconds += time.process_time() - began

    def measure(self) -> None:
        """Add a point to the learning curve."""
        names = [denoiser.name for denoiser in self.data.config.denoisers]
        with self._precision():
            losses = denoising_losses(self.model, self.heldout, denoiser_names=names)
        losses = {name: round(loss, 4) for name, loss in losses.items()}
        gates = [layer.self_attn.source_gate.data for layer in self.model.model.decoder.layers]
        gate = round(float(torch.cat(gates).abs().mean()), 4)
        point = {"tokens": self.tokens, "steps": self.step, "losses": losses, "mean |gate|": gate}
        self.points.append(point | {"processor seconds": round(self.seconds, 1)})
        print(f"{self.run.name} {self.tokens:,} {losses}", flush=True)

    def record(self, infill: bool = False) -> dict[str, Any]:
        """Return what the report reads, including filled gaps if the arm supports a cache."""
        others = ("arms", "queue", "check")
        record = {
            "run": asdict(self.run),
            "arm": asdict(self.arm),
            "settings": {k: value for k, value in self.settings.items() if k not in others},
            "data": self.data.fingerprint,
            "tokens": self.tokens,
            "points": self.points,
            "provenance": provenance(threads=torch.get_num_threads()),
        }
        if infill and self.arm.merge == "softmax":
            gaps = self.heldout, self.settings["infilled"]
            with self._precision():
                record["infilled"] = infill_examples(self.model, self.tokenizer, *gaps)["examples"]
        return record

    def save(self, folder: Path) -> None:
        """Write the state, replacing the previous one."""
        parameters = dict(self.model.named_parameters())
        tensors = {f"weight {name}": parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{part} {name}": tensor for part, tensor in moments.items()}
        kept = {name: getattr(self, name) for name in ("step", "tokens", "seconds", "points")}
        with folders.new_folder(folder, "state") as building:
            save_file(tensors, building / "state.safetensors")
            folders.write_json(building / "state.json", [kept, self.loader.state_dict()])

    def _load(self, folder: Path) -> Any:
        """Load a saved state. Returns the position in the data."""
        kept, position = folders.read_json(folder / "state.json", list)
        vars(self).update(kept)
        parameters = dict(self.model.named_parameters())
        for key, tensor in load_file(folder / "state.safetensors").items():
            part, name = key.split(" ")
            if part == "weight":
                parameters[name].data.copy_(tensor)
            else:
                self.optimizer.state[parameters[name]][part] = tensor.to(self.model.device)
        return position

    def _precision(self) -> Any:
        enabled = self.settings["precision"] == "bf16"
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=enabled)


def update(model: torch.nn.Module, optimizer: Any, step: int, config: TrainingConfig) -> None:
    """Apply the clipped gradients at the learning rate of optimizer step `step`, from 1."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimization.set_learning_rate(optimizer, optimization.learning_rate(step, config))
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Lock a file while the block runs; yield False if another process holds it."""
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def train(run: Run, tokens: int, last: bool, settings: Settings, arguments: Any) -> None:
    """Train a run up to `tokens`, or as far as time allows."""
    state, results = arguments.runs / run.name, arguments.results / f"{run.name}.json"
    training = Training(run, settings, arguments.runs / "init", state)
    if not training.points:
        training.measure()
    saved = time.monotonic()
    while training.tokens < tokens and time.monotonic() < arguments.deadline:
        training.advance()
        following = 2 * power(training.points[-1]["tokens"])
        if training.tokens >= max(following, settings["first_point"]):
            training.measure()
            folders.write_json(results, training.record())
        if time.monotonic() - saved > 60 * settings["save_minutes"]:
            training.save(state)
            saved = time.monotonic()
    done = training.tokens >= tokens
    if done:
        folders.write_json(results, training.record(infill=True))
    if done and last:
        shutil.rmtree(state, ignore_errors=True)
    else:
        training.save(state)


def power(tokens: int) -> int:
    """Return the largest power of two that is at most `tokens`, or 0 for 0."""
    return 1 << (tokens.bit_length() - 1) if tokens else 0


def queue(settings: Settings) -> Iterator[tuple[Run, int, bool]]:
    """Yield run, tokens and whether the run ends there, in the order of settings.yaml."""
    stages = [
        (Run(arm, lr, seed), stage["tokens"])
        for stage in settings["queue"]
        for seed in stage["seeds"]
        for lr in stage["lr"]
        for arm in stage["arms"]
    ]
    ends: dict[Run, int] = {}
    for run, tokens in stages:
        ends[run] = max(tokens, ends.get(run, 0))
    for run, tokens in stages:
        yield run, tokens, tokens == ends[run]


def walk(settings: Settings, arguments: Any) -> None:
    """Train runs that are not finished or claimed by another process, one after another."""
    for run, tokens, last in queue(settings):
        results = arguments.results / f"{run.name}.json"
        with claim(arguments.runs / f"{run.name}.lock") as mine:
            if not mine:
                continue
            if not results.exists() or folders.read_json(results)["tokens"] < tokens:
                train(run, tokens, last, settings, arguments)
        if time.monotonic() >= arguments.deadline:
            return


def check(settings: Settings, init: Path, results: Path) -> None:
    """Repeat the beginning of a committed run; exit with 1 if a loss differs by too much.

    Its examples are committed too, since the corpus depends on the installed packages.
    """
    wanted = settings["check"]
    run = Run(wanted["arm"], wanted["lr"], wanted["seed"])
    committed = folders.read_json(results / f"{run.name}.json")["points"][: wanted["points"]]
    training = Training(run, settings, init)
    if not ROWS.exists():
        write_rows(training, committed[-1]["steps"])
    kept = folders.read_json(ROWS)
    training.heldout = examples_of(kept["heldout"])
    rows = (Row(examples_of(step), 0, 0, {}) for step in kept["steps"])
    training.batches = (collate_rows([row]) for row in rows)
    worst = 0.0
    for expected in committed:
        while training.step < expected["steps"]:
            training.advance()
        training.measure()
        losses = training.points[-1]["losses"]
        worst = max(worst, *(abs(losses[name] - x) for name, x in expected["losses"].items()))
    print(f"largest difference {worst:.4f} nats, tolerance {wanted['tolerance']}")
    raise SystemExit(int(worst > wanted["tolerance"]))


def write_rows(training: Training, steps: int) -> None:
    """Write the examples of a run's first steps and its held-out ones, for `check`."""
    loader = RowLoader(training.data, batch_size=training.settings["batch_size"], collate=list)
    taken = [[e for row in batch for e in row.examples] for batch in islice(loader, steps)]
    listed = [
        [(e.source.tolist(), e.target.tolist(), e.denoiser) for e in examples]
        for examples in (training.heldout, *taken)
    ]
    folders.write_json(ROWS, {"heldout": listed[0], "steps": listed[1:]})


def examples_of(listed: list[Any]) -> list[Example]:
    """Rebuild the examples that `write_rows` has listed."""
    return [
        Example(np.array(source, np.int32), np.array(target, np.int32), denoiser)
        for source, target, denoiser in listed
    ]


def main() -> None:
    """Work on the queue, or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parent", type=Path, help="Qwen3 folder; needed on the first call")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after these; resumable")
    parser.add_argument("--check", action="store_true", help="rerun committed first steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="settings block")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="JSON, committed")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "adaptation", help="weights")
    arguments = parser.parse_args()
    plan = yaml.safe_load((HERE / "settings.yaml").read_text(encoding="utf-8"))
    settings = {**plan[arguments.device], "arms": plan["arms"], "device": arguments.device}
    arguments.deadline = time.monotonic() + 60 * arguments.minutes
    signal.signal(signal.SIGTERM, lambda *_: setattr(arguments, "deadline", 0.0))
    arguments.results.mkdir(parents=True, exist_ok=True)
    init = arguments.runs / "init"
    if not init.exists():
        print(initialize(arguments.parent, init), flush=True)
    if arguments.check:
        check(settings, init, arguments.results)
    walk(settings, arguments)


if __name__ == "__main__":
    main()
