"""Hold what the steps of a training run share, and do each of them."""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from qwen3_encdec.data.stream import RowLoader
from qwen3_encdec.evaluation.denoising import denoising_losses
from qwen3_encdec.folders import InputError
from qwen3_encdec.training import flops
from qwen3_encdec.training.checkpoint import Checkpointer
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.distributed import STACKS, TrainingState
from qwen3_encdec.training.monitor import Meter, SpikeGuard, StopRequest, progress_line
from qwen3_encdec.training.optimization import learning_rate

Batch = dict[str, Any]


@dataclass
class Run:
    """Hold what the steps of a run share; each method is one step of `_train`."""

    config: TrainingConfig
    accelerator: Accelerator
    stop: StopRequest
    state: TrainingState
    loader: RowLoader
    saver: Checkpointer
    heldout: list[Any]
    loss_options: dict[str, Any]
    start: int
    guard: SpikeGuard
    meter: Meter
    upcoming: list[Batch] = field(default_factory=list)
    """Micro-batches of the next step."""
    position: dict[str, Any] = field(default_factory=dict)
    """Position in the data after the last finished step."""
    data_error: str | None = None
    heldout_losses: dict[int, float] = field(default_factory=dict)
    """Mean held-out loss by step."""

    def __post_init__(self) -> None:
        self.run_dir = Path(self.config.output_dir)
        self.denoisers = [denoiser.name for denoiser in self.config.data.denoisers]
        self.began = time.monotonic()
        self.batches: Iterator[Batch] = iter(self.loader)
        device, processes = self.accelerator.device, self.accelerator.num_processes
        self.peak = flops.peak_flops(device, processes)

    def fetch(self) -> float:
        """Fetch the micro-batches of the next step to the device. Returns the seconds it took."""
        began = time.perf_counter()
        try:
            for _ in range(self.config.gradient_accumulation_steps):
                batch = next(self.batches)
                self.upcoming.append(_move(batch, self.accelerator.device))
        except InputError as error:
            self.data_error = str(error)  # the other ranks learn of it in `agree`
        return time.perf_counter() - began

    def backward(self, step: int, tokens: float) -> torch.Tensor:
        """Accumulate the gradient of the step's loss over the micro-batches.

        ``tokens`` are the step's target tokens on all ranks; gradients are averaged over the ranks,
        so the loss is multiplied by their number. A dropout draws by seed, step and rank, so that
        nothing of it need be saved. Returns loss sums and token counts by denoiser, (2, denoisers)
        fp64, on the device.
        """
        device = self.accelerator.device
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        torch.manual_seed(self.config.seed + step * processes + rank)
        totals = torch.zeros(2, len(self.denoisers), dtype=torch.float64, device=device)
        batches, self.upcoming = self.upcoming, []
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            denoiser = batch.pop("denoiser").flatten()
            batch.pop("counts")
            with self.state.accumulating(last):
                output = self.state.model(
                    **batch, num_items_in_batch=int(tokens), **self.loss_options
                )
                self.state.backward(output.loss * processes, last)
            token_losses = output.token_losses.detach().flatten().double()
            totals[0].index_add_(0, denoiser, token_losses)
            totals[1].index_add_(0, denoiser, torch.ones_like(token_losses))
        return totals

    def agree(self, totals: torch.Tensor | None = None) -> "Report":
        """Sum over all ranks what each knows: the host's one wait for the device in a step."""
        device = self.accelerator.device
        flags = [*self.saver.flags(), bool(self.stop), self.data_error is not None]
        counts = sum((batch["counts"] for batch in self.upcoming), np.zeros(7))
        numbers = torch.tensor([*flags, *counts], dtype=torch.float64).to(device)
        parts = [numbers]
        if totals is not None:
            parts += [totals.flatten(), self.state.squared_norms()]
        summed = self.accelerator.reduce(torch.cat(parts), "sum").tolist()
        written, failed, stops, data_errors, *rest = summed
        self.saver.settle(int(written), int(failed))
        losses = torch.tensor(rest[7 : -len(STACKS)], dtype=torch.float64).view(2, -1)
        return Report(rest[:7], losses, rest[-len(STACKS) :], bool(stops), bool(data_errors))

    def log_step(self, step: int, rate: float, report: "Report") -> None:
        """Log what the meter has summed up since the last time."""
        metrics = self.meter.read(self.peak)
        metrics |= {"lr": rate, "grad_norm": report.norm, "epoch": self.loader.epoch()}
        for stack, square in zip(STACKS, report.squares, strict=True):
            metrics[f"grad_norm/{stack}"] = math.sqrt(square)
        for counts in gather_object([self.loader.counts()]):
            for name, count in counts.items():
                metrics[name] = metrics.get(name, 0) + count
        self.log(step, metrics)

    def evaluate(self, step: int) -> None:
        """Log the held-out loss of each denoiser."""
        losses = denoising_losses(
            self.state.model,
            self.heldout,
            denoiser_names=self.denoisers,
            batch_size=self.config.batch_size,
        )
        self.heldout_losses[step] = sum(losses.values()) / len(losses)
        self.log(step, {f"eval_loss/{name}": loss for name, loss in losses.items()})

    def save(self, step: int) -> None:
        """Begin to write a checkpoint after ``step``."""
        progress = {
            "totals": self.meter.totals,
            "guard": self.guard.state,
            "lr": learning_rate(max(step, 1), self.config),
            "heldout_loss": self.heldout_losses.get(step),
        }
        self.saver.save(step, self.position, progress)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write metrics to metrics.jsonl, trackers and terminal; a failure stops nothing."""
        if not self.accelerator.is_main_process:
            return
        try:
            with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.accelerator.log(metrics, step=step)
        except Exception as error:  # trackers raise whatever they like
            print(f"warning: step {step} could not be logged: {error}", file=sys.stderr)
        elapsed, done = time.monotonic() - self.began, step - self.start
        line = progress_line(step, self.config.max_steps, metrics, done, elapsed)
        print(line, flush=True)


@dataclass
class Report:
    """Sums over all ranks: the next step's counts, and this step's losses and gradient norms."""

    counts: list[float]
    """Target tokens, source tokens, examples, and the four `flops.length_sums`."""
    losses: torch.Tensor
    squares: list[float]
    stops: bool
    data_failed: bool

    @property
    def loss(self) -> float:
        """Mean loss in nats per target token."""
        return float(self.losses[0].sum() / self.losses[1].sum())

    @property
    def norm(self) -> float:
        """Global gradient norm."""
        return math.sqrt(sum(self.squares))


def _move(batch: Batch, device: torch.device) -> Batch:
    """Send a packed batch to the device, after counting on the host what it holds.

    Adds ``counts``: target tokens, source tokens, examples, and the four `flops.length_sums`.
    """
    source = np.diff(batch["cu_seqlens"].numpy())
    target = np.diff(batch["decoder_cu_seqlens"].numpy())
    targets = int((batch["labels"] != -100).sum())
    counts = [targets, source.sum(), len(source), *flops.length_sums(source, target)]
    moved = {"counts": np.array(counts, dtype=np.float64)}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            # Only pinned memory is copied while the host goes on.
            value = value.pin_memory() if device.type == "cuda" else value
            value = value.to(device, non_blocking=True)
        moved[name] = value
    return moved
