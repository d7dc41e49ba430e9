"""What a run reports: sums between two log lines, and where the lines go."""

import json
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
        self.totals = {"target_tokens": 0, "source_tokens": 0, "examples": 0} | totals
        self._clear()

    def _clear(self) -> None:
        self.counts = [0, 0, 0]
        self.losses = torch.zeros(2, len(self.denoisers), dtype=torch.float64)
        self.seconds = 0.0

    def add(self, counts: list[int], losses: torch.Tensor, seconds: float) -> None:
        """Add one optimizer step: token and example counts, and the losses' sums and counts by denoiser."""
        self.counts = [have + new for have, new in zip(self.counts, counts, strict=True)]
        self.totals = {name: have + new for (name, have), new in zip(self.totals.items(), counts, strict=True)}
        self.losses += losses
        self.seconds += seconds

    def read(self, flops: Callable[[float, float, float], float], peak: float | None) -> dict[str, float]:
        """The metrics since the last call."""
        target, source, examples = self.counts
        metrics = {"loss": float(self.losses[0].sum() / self.losses[1].sum())}
        for name, loss, tokens in zip(self.denoisers, *self.losses.tolist(), strict=True):
            if tokens:
                metrics[f"loss/{name}"] = loss / tokens
        rate = flops(source / examples, target / examples, examples) / self.seconds
        metrics |= {"tokens_per_second": (target + source) / self.seconds, "tflops": rate / 1e12, **self.totals}
        if peak:
            metrics["mfu"] = rate / peak
        self._clear()
        return metrics


def metrics_logger(accelerator: Accelerator, path: Path, progress: tqdm) -> Callable[[int, dict[str, Any]], None]:
    """A function that writes one step's metrics to metrics.jsonl, to the trackers and to the terminal."""

    def log(step: int, metrics: dict[str, Any]) -> None:
        accelerator.log(metrics, step=step)
        if accelerator.is_main_process:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            numbers = (
                f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
                for name, value in metrics.items()
            )
            progress.write(f"step {step}: " + ", ".join(numbers))

    return log
