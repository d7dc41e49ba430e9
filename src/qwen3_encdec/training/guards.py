"""What stands between a run and its faults: steps that spike, requests to stop, and steps that never end."""

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from qwen3_encdec.files import InputError

_MOST_IN_A_ROW = 16


class SpikeGuard:
    """Tells steps whose loss or gradient norm lies far above that of the last applied steps.

    ``sigma`` are standard deviations, 0 never skips; nothing is skipped before half of ``window`` is filled. A
    skipped step does not enter the window. ``state`` is JSON and belongs into a checkpoint.
    """

    def __init__(self, sigma: float, window: int, state: dict | None = None) -> None:
        self.sigma = sigma
        self.applied = deque[tuple[float, float]](map(tuple, (state or {}).get("applied", ())), maxlen=window)
        self.skipped_in_a_row: int = (state or {}).get("skipped_in_a_row", 0)

    @property
    def state(self) -> dict:
        """What a resumed run needs to decide as this one would."""
        return {"applied": [list(pair) for pair in self.applied], "skipped_in_a_row": self.skipped_in_a_row}

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
    """Within the block, SIGTERM no longer ends the process but is a request to stop; so is a file ``STOP``."""
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
    """For workers that load data: a launcher sends SIGTERM to them as well, and the last checkpoint needs them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Watchdog(threading.Thread):
    """Ends the process, non-zero, when no step has finished for ``seconds``; 0 never does.

    A collective call waits for ever for a rank that is gone, so nothing but another thread can notice.
    """

    def __init__(self, seconds: float, step: int) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.seconds, self.step, self.since, self.ended = seconds, step, time.monotonic(), threading.Event()
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
