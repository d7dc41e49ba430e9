"""Compare the memory estimate of a dry run with the measured peak of one CPU process.

    python bench/memory.py

Each case is a process of its own: three optimizer steps on full rows in fp32, two documents a row.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from typing import Any

SIZES = {"vocab_size": 8000, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
CASES: dict[str, tuple[dict[str, int], list[str]]] = {
    "small": ({"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}, []),
    "recomputed": (
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
        ["gradient_checkpointing=full", "batch_size=32"],
    ),
    "wide": (
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2},
        ["batch_size=4", "ema_decay=0.99"],
    ),
}


def work(name: str) -> dict[str, Any]:
    """Train for three steps; the peak and the estimate in bytes."""
    import numpy as np
    import torch

    from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
    from qwen3_encdec.data.collate import collate_packed
    from qwen3_encdec.training import flops, plan
    from qwen3_encdec.training.config import load_config
    from qwen3_encdec.training.layers import recompute_layers
    from qwen3_encdec.training.optimization import build_optimizer

    torch.set_num_threads(1)
    sizes, overrides = CASES[name]
    model_config = Qwen3EncoderDecoderConfig(**SIZES, **sizes, pad_token_id=0, eos_token_id=1)
    config = load_config(None, ["mixed_precision=no", *overrides])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = Qwen3ForSeq2SeqLM(model_config).train()
    recompute_layers(model, config)
    optimizer, rng = build_optimizer(model, config), np.random.default_rng(0)
    for _ in range(3):
        sides = []
        for length in (config.data.source_length, config.data.target_length):
            halves = [length // 2] * 2 * config.batch_size
            sides.append([rng.integers(2, 7000, size=size) for size in halves])
        model(**collate_packed(*sides)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    counted = flops.count_parameters(model_config)
    parts = plan.memory(model_config, counted, config, plan.Machines())
    return {"measured": measured, "estimated": sum(parts.values())}


def main() -> None:
    """Measure every case and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # a process of its own
    if case := parser.parse_args().case:
        print(json.dumps(work(case)))
        return
    # glibc keeps freed memory in holes by default.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["estimated"] / found["measured"]
        gib = {key: f"{value / 2**30:.3f} GiB" for key, value in found.items()}
        state = "met" if 0.85 <= ratio <= 1.2 else "missed"
        print(f"{name}: measured {gib['measured']}, estimated {gib['estimated']}")
        print(f"target memory-{name}: {ratio:.2f}x (wanted 0.85 to 1.2x) {state}", flush=True)


if __name__ == "__main__":
    main()
