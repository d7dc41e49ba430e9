"""Guard a run against faults and report its progress."""

import faulthandler
import fcntl
import json
import os
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from qwen3_encdec.folders import InputError, write_text

_STOPPING = (signal.SIGTERM, signal.SIGINT)
TOTALS = ("target_tokens", "source_tokens", "examples")
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


class SpikeGuard:
    """Detect a loss or gradient norm ``sigma`` deviations above the mean of the ``recent`` steps.

    A sigma of 0 never skips. No step is skipped before half of the ``window`` is filled. Skipped
    values enter the window too, so that a new level is accepted after a while.
    """

    def __init__(self, sigma: float, window: int, recent: Iterable[list[float]]) -> None:
        self.sigma, self.window = sigma, window
        self.recent = deque(recent, maxlen=window)

    def skips(self, loss: float, norm: float) -> bool:
        """Decide whether to skip a step, and record its values."""
        spike = False
        if self.sigma and len(self.recent) * 2 >= self.window:
            past = np.array(self.recent)  # (steps, 2)
            limits = past.mean(0) + self.sigma * past.std(0)
            spike = bool((np.array([loss, norm]) > limits).any())
        self.recent.append([loss, norm])
        return spike


@contextmanager
def hearing_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM, or the first Ctrl-C, sets instead of ending the process.

    Only the main thread can handle signals; in another one they keep their effect.
    """
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        asked.set()
        if number == signal.SIGINT:
            os.write(2, b"stopping after this step; press Ctrl-C again to end at once\n")
            signal.signal(signal.SIGINT, signal.default_int_handler)

    is_main = threading.current_thread() is threading.main_thread()
    numbers = _STOPPING if is_main else ()
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Let a data worker go on after a request to stop: the last step still needs it."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


class StallGuard:
    """Dump all stacks and exit if no step ends for about ``seconds``: a rank may be gone."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._next = seconds, 0.0

    def step_ended(self) -> None:
        """Start the time again."""
        now = time.monotonic()
        if self.seconds and now >= self._next:  # a new timer is a new thread
            self._next = now + self.seconds / 100
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__ or 2)

    def close(self) -> None:
        """Stop watching."""
        faulthandler.cancel_dump_traceback_later()


def lock(run_dir: Path) -> TextIO:
    """Create a run's folder and lock out other processes while the returned file is open.

    On a file system without locks it prints a warning instead.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("w")
    try:
        # A record lock ends with the process and is not inherited by its data workers.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"another run is training in {run_dir}; stop it first") from None
    except OSError as error:  # Lustre and NFS may be mounted without locks
        print(f"warning: {run_dir} cannot be locked ({error.strerror})", flush=True)
    return file


class Meter:
    """Sum up the steps between two log lines, and the run's ``totals`` across resumes."""

    def __init__(
        self, denoisers: list[str], per_sum: np.ndarray, peak: float, totals: dict[str, int]
    ) -> None:
        # FLOPs per unit of each `flops.length_sums`; peak FLOP/s of all devices, 0 if unknown.
        self.denoisers, self.per_sum, self.peak = denoisers, per_sum, peak
        self.totals = dict.fromkeys((*TOTALS, "skipped_steps"), 0) | totals
        self.losses = np.zeros((2, len(denoisers)))
        self.sums = np.zeros(9)

    def add(self, counts: np.ndarray, losses: np.ndarray, seconds: float, waited: float) -> None:
        """Add counts and losses of `Run.agree`, ``seconds``, and those ``waited`` for data."""
        for name, count in zip(TOTALS, counts, strict=False):
            self.totals[name] += int(count)
        self.losses += losses
        self.sums += [*counts, seconds, waited]

    def read(self) -> dict[str, Any]:
        """Return the metrics since the last call."""
        metrics = {"loss": self.losses[0].sum() / self.losses[1].sum(), **self.totals}
        for name, loss, tokens in zip(self.denoisers, *self.losses, strict=True):
            if tokens:
                metrics[f"loss/{name}"] = loss / tokens
        targets, sources, _, *lengths, seconds, waited = self.sums
        flops = self.per_sum @ lengths / seconds
        metrics |= {"tokens_per_second": (targets + sources) / seconds, "tflops": flops / 1e12}
        if self.peak:
            metrics["mfu"] = flops / self.peak
        unit = 1 if sys.platform == "darwin" else 1024
        memory: float = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        self.losses, self.sums = self.losses * 0, self.sums * 0
        return metrics | {"data_wait": waited / seconds, "memory_gib": memory / 2**30}


def progress_line(step: int, steps: int, metrics: dict[str, Any], done: int, elapsed: float) -> str:
    """Format a run's progress with units; ``done`` steps took ``elapsed`` seconds."""
    parts = [form.format(metrics[name]) for name, form in _SHOWN.items() if name in metrics]
    for name, value in metrics.items():
        if name.startswith(("eval_loss/", "eval_loss_on/")):
            parts.append(f"held-out {name.partition('/')[2]} {value:.4f} nats/token")
    parts.append(f"elapsed {timedelta(seconds=round(elapsed))}")
    if done:
        parts.append(f"remaining {timedelta(seconds=round(elapsed / done * (steps - step)))}")
    return f"step {step:,} of {steps:,}: {', '.join(parts)}"


def keep_lines(path: Path, last_step: int) -> None:
    """Drop lines of metrics.jsonl after ``last_step``, and a line left incomplete by a crash."""
    kept: list[str] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))
