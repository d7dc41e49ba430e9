"""What stands between a run and its faults:

steps that spike, requests to stop, and steps that never end.
"""

import faulthandler
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from qwen3_encdec.folders import InputError

_MOST_IN_A_ROW = 16


class SpikeGuard:
    """Tells steps whose loss or gradient norm lies far above that of the last applied steps.

    ``sigma`` are standard deviations, 0 never skips; nothing is skipped before half of ``window``
    is filled. A skipped step does not enter the window. ``state`` is JSON and belongs into a
    checkpoint.
    """

    def __init__(self, sigma: float, window: int, state: dict | None = None) -> None:
        self.sigma = sigma
        self.applied = deque[tuple[float, float]](
            map(tuple, (state or {}).get("applied", ())), maxlen=window
        )
        self.skipped_in_a_row: int = (state or {}).get("skipped_in_a_row", 0)

    @property
    def state(self) -> dict:
        """What a resumed run needs to decide as this one would."""
        return {
            "applied": [list(pair) for pair in self.applied],
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def skips(self, step: int, loss: float, norm: float) -> bool:
        """Whether to leave a step out. Raises InputError when that has become a habit."""
        spikes = False
        if self.sigma and len(self.applied) * 2 >= (self.applied.maxlen or 0):
            past = np.array(self.applied)  # (steps, 2)
            spikes = bool((np.array([loss, norm]) > past.mean(0) + self.sigma * past.std(0)).any())
        if not spikes:
            self.applied.append((loss, norm))
            self.skipped_in_a_row = 0
            return False
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > _MOST_IN_A_ROW:
            raise InputError(
                f"step {step}: loss {loss:.4g} and gradient norm {norm:.4g} are the {self.skipped_in_a_row}th in a row "
                f"beyond {self.sigma:g} standard deviations; look at the data, lower lr, or raise spike_sigma"
            )
        return True


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raise InputError unless a step may be applied."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(
            f"step {step}: loss {loss} and gradient norm {norm} are not both finite; stopped before the update; "
            "try a lower lr or a longer warm-up"
        )


@contextmanager
def stop_requests(run_dir: Path) -> Iterator["StopRequest"]:
    """Within the block, SIGTERM no longer ends the process but is a request to stop;

    so is a file ``STOP``.
    """
    request = StopRequest(run_dir / "STOP")
    here = threading.current_thread() is threading.main_thread()  # handlers can be set nowhere else
    before = signal.signal(signal.SIGTERM, request.ask) if here else None
    try:
        yield request
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Whether this process has been asked to save and end."""

    def __init__(self, file: Path) -> None:
        self.file, self.asked = file, False

    def ask(self, *signal_and_frame: object) -> None:
        """Ask, as a signal handler."""
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked or self.file.exists()


def ignore_sigterm(worker: int) -> None:
    """For workers that load data:

    a launcher sends SIGTERM to them as well, and the last checkpoint needs them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Watchdog(threading.Thread):
    """Ends the process, non-zero, when no step has finished for ``seconds``; 0 never does.

    A collective call waits for ever for a rank that is gone, so nothing but another thread can
    notice.
    """

    def __init__(self, seconds: float, step: int) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.seconds, self.step, self.since, self.ended = (
            seconds,
            step,
            time.monotonic(),
            threading.Event(),
        )
        if seconds:
            self.start()

    def beat(self, step: int) -> None:
        """Step ``step`` has finished."""
        self.step, self.since = step, time.monotonic()

    def run(self) -> None:
        """Watch."""
        while not self.ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self.since > self.seconds:
                faulthandler.dump_traceback()
                print(
                    f"error: no step has finished in {self.seconds:g} s since step {self.step}; another rank is gone "
                    "or hangs, see the stacks above; start again to go on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(3)


class Meter:
    """Sums between two log lines, and totals of the whole run that outlive a resume."""

    def __init__(self, denoisers: list[str], totals: dict[str, int]) -> None:
        self.denoisers = denoisers
        self.totals = {
            "target_tokens": 0,
            "source_tokens": 0,
            "examples": 0,
            "skipped_steps": 0,
        } | totals
        self._clear()

    def _clear(self) -> None:
        self.counts = [0, 0, 0]
        self.losses = torch.zeros(2, len(self.denoisers), dtype=torch.float64)
        self.seconds = self.waited = 0.0

    def add(
        self, counts: list[int], losses: torch.Tensor, seconds: float, waited: float, skipped: bool
    ) -> None:
        """Add one optimizer step: token and example counts, the losses' sums and counts by
        denoiser, its duration.

        ``waited`` are the seconds that this rank had no data to work on, ``skipped`` that the step
        was left out.
        """
        self.counts = [have + new for have, new in zip(self.counts, counts, strict=True)]
        new_totals = [*counts, int(skipped)]
        self.totals = {
            name: have + new
            for (name, have), new in zip(self.totals.items(), new_totals, strict=True)
        }
        self.losses += losses
        self.seconds += seconds
        self.waited += waited

    def read(
        self, flops: Callable[[float, float, float], float], peak: float | None
    ) -> dict[str, float]:
        """The metrics since the last call."""
        target, source, examples = self.counts
        metrics = {"loss": float(self.losses[0].sum() / self.losses[1].sum())}
        for name, loss, tokens in zip(self.denoisers, *self.losses.tolist(), strict=True):
            if tokens:
                metrics[f"loss/{name}"] = loss / tokens
        rate = flops(source / examples, target / examples, examples) / self.seconds
        metrics |= {
            "tokens_per_second": (target + source) / self.seconds,
            "tflops": rate / 1e12,
            **self.totals,
        }
        metrics |= {"data_wait": self.waited / self.seconds, "memory_gib": _peak_memory() / 2**30}
        if peak:
            metrics["mfu"] = rate / peak
        self._clear()
        return metrics


def metrics_logger(
    accelerator: Accelerator, path: Path, progress: tqdm, fail: Callable[[OSError], None]
) -> Callable[[int, dict[str, Any]], None]:
    """A function that writes one step's metrics to metrics.jsonl, to the trackers and, shortly, to
    the terminal.

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
    parts += [
        f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval_loss/")
    ]
    return ", ".join(parts + [f"skipped {n}" for n in [metrics.get("skipped_steps")] if n])


def _peak_memory() -> float:
    """The most bytes that this process has held: of its GPU, or else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
