"""Guard a run against faults and report its progress."""

import faulthandler
import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_encdec.folders import PROVENANCE_FILE, InputError


class SpikeGuard:
    """Detect loss and gradient-norm spikes.

    A step is skipped when either lies ``sigma`` standard deviations above the mean of the last
    ``window`` steps; 0 never skips, and nothing is skipped before half of the window is filled.
    Skipped values enter the window, so that a new level is accepted after a while. ``state`` is
    JSON and belongs into a checkpoint.
    """

    def __init__(self, sigma: float, window: int, state: dict | None = None) -> None:
        self.sigma = sigma
        state = state or {}
        before = state.get("recent", state.get("applied", ()))  # as earlier versions called it
        self.recent = deque[tuple[float, float]](map(tuple, before), maxlen=window)

    @property
    def state(self) -> dict:
        """Return what a resumed run needs to decide as this one would."""
        return {"recent": [list(pair) for pair in self.recent]}

    def skips(self, loss: float, norm: float) -> bool:
        """Decide whether to leave a step out, and remember its values."""
        spike = False
        if self.sigma and len(self.recent) * 2 >= (self.recent.maxlen or 0):
            past = np.array(self.recent)  # (steps, 2)
            limits = past.mean(0) + self.sigma * past.std(0)
            spike = bool((np.array([loss, norm]) > limits).any())
        self.recent.append((loss, norm))
        return spike


class StopRequest:
    """Tell whether this process is asked to save and end: SIGTERM in the block, or a file STOP."""

    def __init__(self, run_dir: Path) -> None:
        self.file, self.asked = run_dir / "STOP", False

    def ask(self, *signal_and_frame: object) -> None:
        """Ask, as a signal handler."""
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked or self.file.exists()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM; handlers can be set in the main thread only."""
        here = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self.ask) if here else None
        try:
            yield
        finally:
            if here:
                signal.signal(signal.SIGTERM, before)


def ignore_sigterm(worker: int) -> None:
    """Shield a data worker: a launcher's SIGTERM reaches it, and the last checkpoint needs it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def expect_step(seconds: float) -> None:
    """End the process, non-zero, with its stacks, unless called again in time; 0 waits for ever.

    A collective call waits for ever for a rank that is gone, so only another thread can notice.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in a folder. Raises InputError if one does already.

    A folder that was made for a run that ended before it wrote anything is removed again.
    """
    existed = run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = run_dir / ".lock"
    with ExitStack() as stack:
        if not existed:
            stack.callback(_remove_unused, run_dir)
        file = stack.enter_context(lock.open("a+", encoding="utf-8"))
        try:
            # A record lock ends with the process and is not inherited by its data workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise InputError(
                f"another run trains in {run_dir} (process {file.read().strip() or 'unknown'}); "
                "stop it, or use another output_dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _remove_unused(run_dir: Path) -> None:
    """Remove a run folder that holds its lock and its provenance alone."""
    if {path.name for path in run_dir.iterdir()} <= {".lock", PROVENANCE_FILE}:
        shutil.rmtree(run_dir, ignore_errors=True)


TOTALS = ("target_tokens", "source_tokens", "examples")


class Meter:
    """Sum up the steps between two log lines, and ``totals`` of the run across resumes.

    ``flops_per_sum`` are the FLOPs for each of `flops.length_sums`.
    """

    def __init__(
        self, denoisers: list[str], flops_per_sum: np.ndarray, totals: dict[str, int]
    ) -> None:
        self.denoisers, self.flops_per_sum = denoisers, flops_per_sum
        self.totals = dict.fromkeys((*TOTALS, "skipped_steps"), 0) | totals
        self._clear()

    def _clear(self) -> None:
        self.losses = torch.zeros(2, len(self.denoisers), dtype=torch.float64)
        self.tokens = 0
        self.flops = self.seconds = self.waited = 0.0

    def add(self, counts: list[float], losses: torch.Tensor, seconds: float, waited: float) -> None:
        """Add a step: `Report`'s counts and losses, and ``waited`` seconds without data."""
        for name, count in zip(TOTALS, counts, strict=False):
            self.totals[name] += int(count)
        self.tokens += int(counts[0] + counts[1])
        self.flops += float(self.flops_per_sum @ counts[len(TOTALS) :])
        self.losses += losses
        self.seconds += seconds
        self.waited += waited

    def read(self, peak: float | None) -> dict[str, Any]:
        """Return the metrics since the last call; ``peak`` is FLOP/s of all devices, if known."""
        metrics = {"loss": float(self.losses[0].sum() / self.losses[1].sum())}
        for name, loss, tokens in zip(self.denoisers, *self.losses.tolist(), strict=True):
            if tokens:
                metrics[f"loss/{name}"] = loss / tokens
        metrics |= self.totals
        metrics["tokens_per_second"] = self.tokens / self.seconds
        metrics["tflops"] = self.flops / self.seconds / 1e12
        if peak:
            metrics["mfu"] = self.flops / self.seconds / peak
        metrics["data_wait"] = self.waited / self.seconds
        peak_bytes: float = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak_bytes = torch.cuda.max_memory_allocated()
        metrics["memory_gib"] = peak_bytes / 2**30
        self._clear()
        return metrics


def progress_line(step: int, steps: int, metrics: dict[str, Any], done: int, elapsed: float) -> str:
    """Say where a run is, with units; ``done`` steps took ``elapsed`` seconds."""
    parts = [form.format(metrics[name]) for name, form in _SHOWN.items() if name in metrics]
    for name, value in metrics.items():
        if name.startswith("eval_loss/"):
            parts.append(f"held-out {name.removeprefix('eval_loss/')} {value:.4f} nats/token")
    parts.append(f"elapsed {timedelta(seconds=round(elapsed))}")
    if done:
        remaining = elapsed / done * (steps - step)
        parts.append(f"remaining {timedelta(seconds=round(remaining))}")
    return f"step {step:,} of {steps:,}: {', '.join(parts)}"


_SHOWN = {
    "loss": "loss {:.4f} nats/token",
    "lr": "lr {:.2e}",
    "grad_norm": "gradient norm {:.3g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "data_wait": "data wait {:.1%}",
    "memory_gib": "{:.2f} GiB",
    "skipped_steps": "{} skipped",
}


def keep_lines(path: Path, last_step: int) -> None:
    """Drop lines of metrics.jsonl from after a step, and a line that a crash has torn."""
    path.touch()
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
