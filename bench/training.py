"""What the training loop and its checkpoints cost beside the model's own work.

    python bench/training.py

The last lines say for each target whether it is met.
"""

import argparse
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
    """A random model with a small tokenizer of its own."""
    tokenizer = build_tokenizer(num_ranks=8000)
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "head_dim": 32,
    }
    config = Qwen3EncoderDecoderConfig(
        vocab_size=len(tokenizer), num_attention_heads=8, num_key_value_heads=4, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    Qwen3ForSeq2SeqLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def step_seconds(model: Path, run: Path, steps: int, **changes: Any) -> list[float]:
    """Duration of each optimizer step of a run, checkpoints included."""
    values = {
        "model": model, "output_dir": run, "max_steps": steps, "warmup_steps": 1, "trackers": "[]", "eval_every": 0,
        "save_every": 0, "log_every": 10, "data.inputs": "[package-docs]", "num_workers": 1,
    } | changes  # fmt: skip
    times, learning_rate = [], loop.learning_rate

    def at_step(step: int, config: Any) -> float:
        times.append(time.perf_counter())
        return learning_rate(step, config)

    loop.learning_rate = at_step
    try:
        loop.run_training(load_config(None, [f"{key}={value}" for key, value in values.items()]))
    finally:
        loop.learning_rate = learning_rate
    times.append(time.perf_counter())
    return [later - earlier for earlier, later in zip(times, times[1:])]  # noqa: B905, RUF007


def no_op(self: Any, labels: torch.Tensor, **options: Any) -> Any:
    """A forward pass that touches every parameter once and computes nothing."""
    loss = sum((parameter.flatten()[0] * 0 for parameter in self.parameters()), torch.zeros(()))
    return Qwen3Seq2SeqLMOutput(loss=loss, token_losses=torch.ones(labels.shape))


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="of each run with the real model")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each way to write checkpoints"
    )
    args = parser.parse_args()
    steps = args.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forward, Qwen3ForSeq2SeqLM.forward = Qwen3ForSeq2SeqLM.forward, no_op
        tiny = model_folder(folder / "tiny", 32, 1)
        durations = step_seconds(tiny, folder / "run", 400)[100:-1]
        Qwen3ForSeq2SeqLM.forward = forward
        overhead = 1000 * statistics.median(durations)
        print(
            f"loop with a no-op model: median {overhead:.2f} ms a step, mean {1000 * statistics.fmean(durations):.2f}"
        )

        model = model_folder(folder / "model", 256, 4)
        every = steps // 3
        seconds: dict[str, list[float]] = {}
        modes: dict[str, dict[str, Any]] = {
            "none": {},
            "asynchronous": {"save_every": every},
            "synchronous": {"save_every": every, "async_checkpoints": False},
        }
        for number in range(
            args.rounds
        ):  # in turn, so that a machine that grows slower slows all of them
            for mode, changes in modes.items():
                taken = step_seconds(model, folder / f"{mode}-{number}", steps, **changes)
                seconds.setdefault(mode, []).append(statistics.fmean(taken[5:-1]))
        for mode, means in seconds.items():
            shown = ", ".join(f"{1000 * mean:.1f}" for mean in means)
            print(f"checkpoints {mode}: {shown} ms a step in each round, one each {every} steps")
        cost = statistics.median(seconds["asynchronous"]) / statistics.median(seconds["none"]) - 1
        print(
            f"target loop-overhead: {overhead:.2f} ms (wanted < 3 ms) {'met' if overhead < 3 else 'missed'}"
        )
        print(
            f"target async-checkpoint-cost: {cost:.1%} of step time (wanted < 5 %) {'met' if cost < 0.05 else 'missed'}"
        )


if __name__ == "__main__":
    main()
