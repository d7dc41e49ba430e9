"""What a run reports: sums between two log lines, and where the lines go."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm


class Meter:
    """Sums between two log lines, and totals of the whole run that outlive a resume."""

    def __init__(self, denoisers: list[str], totals: dict[str, int]) -> None:
        self.denoisers = denoisers
        self.totals = {"target_tokens": 0, "source_tokens": 0, "examples": 0, "skipped_steps": 0} | totals
        self._clear()

    def _clear(self) -> None:
        self.counts = [0, 0, 0]
        self.losses = torch.zeros(2, len(self.denoisers), dtype=torch.float64)
        self.seconds = self.waited = 0.0

    def add(self, counts: list[int], losses: torch.Tensor, seconds: float, waited: float, skipped: bool) -> None:
        """Add one optimizer step: token and example counts, the losses' sums and counts by denoiser, its duration.

        ``waited`` are the seconds that this rank had no data to work on, ``skipped`` that the step was left out.
        """
        self.counts = [have + new for have, new in zip(self.counts, counts, strict=True)]
        new_totals = [*counts, int(skipped)]
        self.totals = {name: have + new for (name, have), new in zip(self.totals.items(), new_totals, strict=True)}
        self.losses += losses
        self.seconds += seconds
        self.waited += waited

    def read(self, flops: Callable[[float, float, float], float], peak: float | None) -> dict[str, float]:
        """The metrics since the last call."""
        target, source, examples = self.counts
        metrics = {"loss": float(self.losses[0].sum() / self.losses[1].sum())}
        for name, loss, tokens in zip(self.denoisers, *self.losses.tolist(), strict=True):
            if tokens:
                metrics[f"loss/{name}"] = loss / tokens
        rate = flops(source / examples, target / examples, examples) / self.seconds
        metrics |= {"tokens_per_second": (target + source) / self.seconds, "tflops": rate / 1e12, **self.totals}
        metrics |= {"data_wait": self.waited / self.seconds, "memory_gib": _peak_memory() / 2**30}
        if peak:
            metrics["mfu"] = rate / peak
        self._clear()
        return metrics


def metrics_logger(
    accelerator: Accelerator, path: Path, progress: tqdm, fail: Callable[[OSError], None]
) -> Callable[[int, dict[str, Any]], None]:
    """A function that writes one step's metrics to metrics.jsonl, to the trackers and, shortly, to the terminal.

    It gives an error of writing to ``fail``, since the other ranks have to hear of it.
    """

    def log(step: int, metrics: dict[str, Any]) -> None:
        if not accelerator.is_main_process:
            return
        try:
            accelerator.log(metrics, step=step)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            fail(error)
        progress.write(f"step {step}: {_line(metrics)}")

    return log


_SHORT = {
    "loss": "loss {:.4f}", "lr": "lr {:.2e}", "grad_norm": "norm {:.3g}", "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}", "data_wait": "data wait {:.1%}", "memory_gib": "{:.2f} GiB",
}  # fmt: skip


def _line(metrics: dict[str, Any]) -> str:
    """What somebody who watches wants to see."""
    parts = [form.format(metrics[name]) for name, form in _SHORT.items() if name in metrics]
    parts += [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval_loss/")]
    return ", ".join(parts + [f"skipped {n}" for n in [metrics.get("skipped_steps")] if n])


def _peak_memory() -> float:
    """The most bytes that this process has held: of its GPU, or else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
