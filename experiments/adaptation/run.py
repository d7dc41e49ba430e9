"""What is it worth that an adapted decoder begins as the language model it was?

    python experiments/adaptation/run.py --parent FOLDER --all --minutes 20
    python experiments/adaptation/run.py --parent FOLDER --arm "raw values" --lr 1e-4 --tokens 65536

See docs/results.md. A trained language model becomes an encoder-decoder and is trained with UL2, in
one run for each arm, learning rate and seed: the same rows in every arm, at a constant rate, with
the held-out loss measured at powers of two, so that any run can be taken further later. A run
continues where it was stopped, at most `save_minutes` are lost. `--all` walks the queue of
settings.yaml, and several processes can do so at once. `--check` repeats the beginning of a
committed run and compares.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from experiments.adaptation.arms import Arm, install  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from qwen3_encdec.conversion.initialize import initialize  # noqa: E402
from qwen3_encdec.data.collate import collate_masked_rows, collate_rows, mask_token_id  # noqa: E402
from qwen3_encdec.data.config import DataConfig  # noqa: E402
from qwen3_encdec.data.stream import RowLoader, UL2Data  # noqa: E402
from qwen3_encdec.evaluation.denoising import denoising_losses, infill_examples  # noqa: E402
from qwen3_encdec.evaluation.suite import provenance  # noqa: E402
from qwen3_encdec.folders import load_model, load_tokenizer, read_json, write_json  # noqa: E402
from qwen3_encdec.training.config import TrainingConfig  # noqa: E402
from qwen3_encdec.training.optimization import (  # noqa: E402
    build_optimizer,
    learning_rate,
    set_learning_rate,
)

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
MASKED = 0.2
"""Share of the source that MNTP masks."""


@dataclass(frozen=True)
class Run:
    """One training: the arm's name, the rate of its weights and the seed of its data."""

    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return f"{self.arm.replace(', ', '_').replace(' ', '-')}_{self.lr:g}_{self.seed}"


class Training:
    """A run under way: model, optimizer and data, with what has been measured so far."""

    def __init__(self, run: Run, settings: dict[str, Any], init: Path) -> None:
        self.run, self.settings = run, settings
        self.arm = Arm(**settings["arms"][run.arm])
        self.device = torch.device(settings["device"])
        self.model = load_model(init).float().to(self.device)
        self.tokenizer = load_tokenizer(init)
        install(self.model, self.tokenizer, self.arm)
        self.config = TrainingConfig(
            lr=run.lr,
            source_gate_lr_multiplier=self.arm.gate_lr,
            warmup_steps=settings["warmup_steps"],
            max_steps=10**9,
            decay_fraction=0.0,
        )
        self.optimizer = build_optimizer(self.model, self.config)
        self.data = UL2Data(DataConfig(**settings["data"], seed=run.seed), self.tokenizer)
        self.denoisers = [denoiser.name for denoiser in self.data.config.denoisers]
        self.heldout = self.data.heldout_examples(self.data.choose_heldout(settings["heldout"]))
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.points: list[dict[str, Any]] = []
        self.infilled: list[dict[str, str]] = []

    def load(self, folder: Path) -> None:
        """Continue from a saved state, or begin."""
        position = None
        if (folder / "state.json").exists():
            state = read_json(folder / "state.json")
            position = state.pop("position")
            parts = folder / state.pop("folder")
            vars(self).update(state)
            parameters = dict(self.model.named_parameters())
            for name, tensor in load_file(parts / "weights.safetensors").items():
                parameters[name].data.copy_(tensor)
            for part in MOMENTS:
                for name, tensor in load_file(parts / f"{part}.safetensors").items():
                    self.optimizer.state[parameters[name]][part] = tensor.to(self.device)
        collate: Any = collate_rows
        if self.arm.mntp:
            collate = partial(
                collate_masked_rows,
                mask_id=mask_token_id(self.tokenizer),
                kept_ids=self.data.kept_ids,
                probability=MASKED,
            )
        self.loader = RowLoader(
            self.data,
            batch_size=self.settings["batch_size"],
            num_workers=self.settings["num_workers"],
            collate=collate,
            state=position,
        )
        self.batches = iter(self.loader)

    def save(self, folder: Path) -> None:
        """Write the state, and only then forget the one before."""
        parts = folder / str(self.step)
        parts.mkdir(parents=True, exist_ok=True)
        parameters = dict(self.model.named_parameters())
        save_file({n: p.data for n, p in parameters.items()}, parts / "weights.safetensors")
        for part in MOMENTS:
            states = {n: self.optimizer.state.get(p, {}) for n, p in parameters.items()}
            tensors = {n: state[part].clone() for n, state in states.items() if part in state}
            save_file(tensors, parts / f"{part}.safetensors")
        kept = ("step", "tokens", "seconds", "points", "infilled")
        state = {name: getattr(self, name) for name in kept}
        position = self.loader.state_dict()
        write_json(folder / "state.json", {**state, "position": position, "folder": str(self.step)})
        for other in folder.iterdir():
            if other.is_dir() and other != parts:
                shutil.rmtree(other)

    def advance(self) -> float:
        """Make one optimizer step. Returns its loss."""
        began = time.process_time()
        batch = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in next(self.batches).items()
            if name != "denoiser"
        }
        if self.arm.mntp:
            batch["encoder_loss_weight"] = self.arm.mntp
        with self._precision():
            loss = self.model.train()(**batch).loss
        loss.backward()
        if self.tokens < self.arm.frozen_tokens:
            for name, parameter in self.model.model.decoder.named_parameters():
                if not name.endswith("source_gate"):
                    parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.step += 1
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += batch["input_ids"].numel() + batch["labels"].numel()
        self.seconds += time.process_time() - began
        return loss.item()

    def measure(self) -> dict[str, Any]:
        """Add a point to the learning curve."""
        with self._precision():
            losses = denoising_losses(self.model, self.heldout, denoiser_names=self.denoisers)
        gates = [layer.self_attn.source_gate.data for layer in self.model.model.decoder.layers]
        point = {
            "tokens": self.tokens,
            "steps": self.step,
            "processor seconds": round(self.seconds, 1),
            "losses": {name: round(loss, 4) for name, loss in losses.items()},
            "gate": [round(float(gate.mean()), 4) for gate in gates],
        }
        self.points.append(point)
        return point

    def infill(self, number: int) -> None:
        """Let the model fill gaps of held-out texts; the other merges have no cache."""
        if self.arm.merge == "softmax":
            with self._precision():
                found = infill_examples(self.model, self.tokenizer, self.heldout, number)
            keys = ("source", "expected", "generated")
            self.infilled = [{key: row[key] for key in keys} for row in found["examples"]]

    def _precision(self) -> Any:
        enabled = self.settings["precision"] == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def record(self) -> dict[str, Any]:
        """Everything that the report reads."""
        names = ("device", "precision", "batch_size", "warmup_steps", "data", "heldout")
        return {
            "run": asdict(self.run),
            "arm": asdict(self.arm),
            "settings": {name: self.settings[name] for name in names},
            "data": self.data.fingerprint,
            "points": self.points,
            "infilled": self.infilled,
            "provenance": provenance(threads=torch.get_num_threads()),
        }


def train(run: Run, tokens: int, last: bool, settings: dict[str, Any], arguments: Any) -> bool:
    """Take a run to so many tokens, or as far as time allows. Returns whether it is there."""
    folder, results = arguments.runs / run.name, arguments.results / f"{run.name}.json"
    training = Training(run, settings, arguments.runs / "init")
    training.load(folder)
    saved = time.monotonic()
    print(f"{run.name}: from {training.tokens:,} to {tokens:,} tokens", flush=True)
    if not training.points:
        training.measure()
    while training.tokens < tokens:
        loss = training.advance()
        following = max(settings["first_point"], 2 * powers(training.points))
        if training.tokens >= following:
            point = training.measure()
            write_json(results, training.record())
            print(f"{point['tokens']:,} {loss:.2f} {point['losses']}", flush=True)
        stopping = arguments.stopped or time.monotonic() > arguments.deadline
        if stopping or time.monotonic() - saved > 60 * settings["save_minutes"]:
            training.save(folder)
            saved = time.monotonic()
        if stopping:
            return False
    training.infill(settings["infilled"])
    write_json(results, training.record())
    if last:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        training.save(folder)
    return True


def powers(points: list[dict[str, Any]]) -> int:
    """Largest power of two that the last point has reached; 0 at the start."""
    tokens = points[-1]["tokens"]
    return 1 << (tokens.bit_length() - 1) if tokens else 0


def reached(file: Path) -> int:
    """Tokens of the last point in a run's record."""
    return read_json(file)["points"][-1]["tokens"] if file.exists() else 0


def queue(settings: dict[str, Any]) -> Iterator[tuple[Run, int, bool]]:
    """Yield run, tokens and whether the run ends there, in the order of settings.yaml."""
    stages = [
        (Run(arm, float(lr), seed), stage["tokens"])
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


@contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Hold a run for this process alone; False where another has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def walk(runs: list[tuple[Run, int, bool]], settings: dict[str, Any], arguments: Any) -> None:
    """Do what is unfinished, one run after another."""
    for run, tokens, last in runs:
        with locked(arguments.runs / "locks" / run.name) as mine:
            if not mine or reached(arguments.results / f"{run.name}.json") >= tokens:
                continue
            if not train(run, tokens, last, settings, arguments):
                return


def check(settings: dict[str, Any], arguments: Any) -> None:
    """Repeat the beginning of a committed run; exit with 1 if a loss differs by too much."""
    wanted = settings["check"]
    run = Run(wanted["arm"], float(wanted["lr"]), wanted["seed"])
    committed = read_json(HERE / "results" / f"{run.name}.json")
    training = Training(run, settings, arguments.runs / "init")
    training.load(arguments.runs / "none")
    if training.data.fingerprint != committed["data"]:
        print("the corpus is another one: other packages or versions are installed")
        raise SystemExit(1)
    points = committed["points"][: wanted["points"]]
    worst = 0.0
    for expected in points:
        while training.tokens < expected["tokens"]:
            training.advance()
        losses = training.measure()["losses"]
        for name, loss in expected["losses"].items():
            worst = max(worst, abs(loss - losses[name]))
        print(f"{training.tokens:,} tokens: committed {expected['losses']}, here {losses}")
    print(f"largest difference {worst:.4f} nats, allowed {wanted['tolerance']}")
    raise SystemExit(int(worst > wanted["tolerance"]))


def main() -> None:
    """Read the command line and do one run, the queue or the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--arm", help="one arm, by its name in settings.yaml")
    what.add_argument("--all", action="store_true", help="the queue of settings.yaml")
    what.add_argument("--check", action="store_true", help="repeat a committed beginning")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop, resumable, after these")
    parser.add_argument("--parent", type=Path, help="Qwen3 folder; needed by the first call only")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="block of settings"
    )
    parser.add_argument("--settings", type=Path, default=HERE / "settings.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="JSON, committed")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "adaptation", help="weights")
    arguments = parser.parse_args()
    plan = yaml.safe_load(arguments.settings.read_text(encoding="utf-8"))
    settings = {**plan[arguments.device], "arms": plan["arms"], "device": arguments.device}
    arguments.deadline = time.monotonic() + 60 * arguments.minutes
    arguments.stopped = False
    signal.signal(signal.SIGTERM, lambda *_: setattr(arguments, "stopped", True))
    arguments.results.mkdir(parents=True, exist_ok=True)
    with locked(arguments.runs / "locks" / "init"):
        if not (arguments.runs / "init").exists():
            print(initialize(arguments.parent, arguments.runs / "init"), flush=True)
    if arguments.check:
        check(settings, arguments)
    one = Run(arguments.arm or "", arguments.lr, arguments.seed)
    walk(
        list(queue(settings)) if arguments.all else [(one, arguments.tokens, False)],
        settings,
        arguments,
    )


if __name__ == "__main__":
    main()
