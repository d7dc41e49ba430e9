"""Measure what the training loop and its checkpoints cost beside model and optimizer.

python bench/training.py    # minutes
"""

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import command_line, save_pair, target, write

from qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.modeling_qwen3_encdec import Qwen3Seq2SeqLMOutput
from qwen3_encdec.training import loop
from qwen3_encdec.training.config import load_config
from qwen3_encdec.training.distributed import TrainingState

HEADS = {"head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "num_ranks": 8000}
TINY = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, **HEADS}
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, **HEADS}


def main() -> None:
    """Print the figures, then the targets."""
    arguments = command_line(__doc__).parse_args()
    idle_steps, steps, rounds = (120, 12, 1) if arguments.quick else (400, 60, 3)
    every = steps // 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = save_pair(folder / "tiny", **TINY)
        forward = mock.patch.object(Qwen3ForSeq2SeqLM, "forward", no_op)
        with forward, mock.patch.object(TrainingState, "step"):
            # One row per step, so that the loop never waits for data.
            idle = step_seconds(tiny, folder / "run", max_steps=idle_steps, batch_size=1)
        overhead = 1000 * statistics.median(idle[100:])
        print(f"loop without model and optimizer: median {overhead:.2f} ms per step")

        small = save_pair(folder / "small", **SMALL)
        means: dict[str, list[float]] = {"none": [], "asynchronous": []}
        for number in range(rounds):  # in turn: a machine that slows down slows both
            for mode, save_every in (("none", 0), ("asynchronous", every)):
                run = folder / f"{mode}-{number}"
                taken = step_seconds(small, run, max_steps=steps, save_every=save_every)
                means[mode].append(1000 * statistics.fmean(taken[5:]))
    for mode, values in means.items():
        shown = ", ".join(f"{mean:.1f}" for mean in values)
        print(f"checkpoints {mode}: {shown} ms per step by round, one every {every} steps")
    cost = statistics.median(means["asynchronous"]) / statistics.median(means["none"]) - 1
    target("loop-overhead", overhead, "< 3 ms", "{:.2f} ms")
    target("async-checkpoint-cost", 100 * cost, "< 5 %", "{:.1f} %")
    write(arguments.output, milliseconds=means)


def step_seconds(model: Path, run: Path, **changes: Any) -> list[float]:
    """Return the duration of each optimizer step of a run, checkpoints included."""
    values = {
        "model": model, "output_dir": run, "warmup_steps": 1, "trackers": "[]",
        "eval_every": 0, "save_every": 0, "log_every": 10, "num_workers": 1,
    } | changes  # fmt: skip
    config = load_config(None, [f"{key}={value}" for key, value in values.items()])
    times, rate = [], loop.learning_rate

    def at_step(step: int, config: Any) -> float:
        times.append(time.perf_counter())
        return rate(step, config)

    with mock.patch.object(loop, "learning_rate", at_step):
        with contextlib.redirect_stdout(io.StringIO()):
            loop.run_training(config)
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def no_op(self: Any, labels: torch.Tensor, **options: Any) -> Any:
    """Replace the forward pass: compute nothing that has a gradient."""
    loss = torch.zeros((), device=labels.device, requires_grad=True)
    return Qwen3Seq2SeqLMOutput(loss=loss, token_losses=torch.ones_like(labels.float()))


if __name__ == "__main__":
    main()
