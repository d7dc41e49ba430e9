"""Measure what the training loop and its checkpoints cost beside the model's own work.

    python bench/training.py

The last lines say for each target whether it is met.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.modeling_qwen3_encdec import Qwen3Seq2SeqLMOutput
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer
from qwen3_encdec.training import loop
from qwen3_encdec.training.config import load_config


def model_folder(folder: Path, hidden: int, layers: int) -> Path:
    """Save a random model with a small tokenizer of its own."""
    tokenizer = build_tokenizer(num_ranks=8000)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    sizes |= {"head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3EncoderDecoderConfig(vocab_size=len(tokenizer), **sizes, **ids)
    Qwen3ForSeq2SeqLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def step_seconds(model: Path, run: Path, steps: int, **changes: Any) -> list[float]:
    """Return the duration of each optimizer step of a run, checkpoints included."""
    values = {
        "model": model, "output_dir": run, "max_steps": steps, "warmup_steps": 1, "trackers": "[]",
        "eval_every": 0, "save_every": 0, "log_every": 10, "num_workers": 1,
    } | changes  # fmt: skip
    times, rate = [], loop.learning_rate

    def at_step(step: int, config: Any) -> float:
        times.append(time.perf_counter())
        return rate(step, config)

    loop.learning_rate = at_step
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            settings = [f"{key}={value}" for key, value in values.items()]
            loop.run_training(load_config(None, settings))
    finally:
        loop.learning_rate = rate
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def no_op(self: Any, labels: torch.Tensor, **options: Any) -> Any:
    """Replace the forward pass: touch every parameter once and compute nothing."""
    loss = sum((parameter.flatten()[0] * 0 for parameter in self.parameters()), torch.zeros(()))
    return Qwen3Seq2SeqLMOutput(loss=loss, token_losses=torch.ones(labels.shape))


def main() -> None:
    """Measure, print figures, then targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps per run with the real model")
    parser.add_argument("--rounds", type=int, default=3, help="runs per checkpoint mode")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forward, Qwen3ForSeq2SeqLM.forward = Qwen3ForSeq2SeqLM.forward, no_op
        tiny = model_folder(folder / "tiny", 32, 1)
        # One row per step, so that the loop never waits for data.
        durations = step_seconds(tiny, folder / "run", 400, batch_size=1)[100:]
        Qwen3ForSeq2SeqLM.forward = forward
        overhead = 1000 * statistics.median(durations)
        print(f"loop with a no-op model: median {overhead:.2f} ms per step")

        model, every = model_folder(folder / "model", 256, 4), args.steps // 3
        modes: dict[str, dict[str, Any]] = {
            "none": {},
            "asynchronous": {"save_every": every},
        }
        means: dict[str, list[float]] = {mode: [] for mode in modes}
        for number in range(args.rounds):  # in turn: a machine that slows down slows all of them
            for mode, changes in modes.items():
                taken = step_seconds(model, folder / f"{mode}-{number}", args.steps, **changes)
                means[mode].append(statistics.fmean(taken[5:]))
    for mode, values in means.items():
        shown = ", ".join(f"{1000 * mean:.1f}" for mean in values)
        print(f"checkpoints {mode}: {shown} ms per step by round, one every {every} steps")
    cost = statistics.median(means["asynchronous"]) / statistics.median(means["none"]) - 1
    verdict = {True: "met", False: "missed"}
    print(f"target loop-overhead: {overhead:.2f} ms (wanted < 3 ms) {verdict[overhead < 3]}")
    print(f"target async-checkpoint-cost: {cost:.1%} (wanted < 5 %) {verdict[cost < 0.05]}")


if __name__ == "__main__":
    main()
