"""The memory and bytes sent that `train --dry-run` estimates against those of training steps.
Linux, CPU.

    python bench/memory.py            # a few minutes on 2 cores, wants 8 GB
    python bench/memory.py --quick    # the same at toy size: tests this script, measures nothing

Measured is the high-water mark of resident memory over three optimizer steps on full rows, above
what the process held
before the model was made: libraries, and a step of a toy model that warms them up. Each
configuration has processes of its own; of several, sharding one model by FSDP2 over gloo, the
largest counts. glibc is told to hand freed memory back (MALLOC_MMAP_THRESHOLD_): by default it
keeps much of it, in holes, and the mark would measure those. Bytes sent are those of FSDP2's
collectives, by the arithmetic of a ring: all but one share of the whole tensor.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from model import environment, our_model, peak, reset_peak, slug

SMALL = {
    "hidden_size": 256,
    "layers": 6,
    "vocab_size": 16_000,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 96,
}
WIDE = {
    "hidden_size": 1024,
    "layers": 2,
    "vocab_size": 152_036,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 128,
}
DEEP = {
    "hidden_size": 512,
    "layers": 8,
    "vocab_size": 32_000,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 64,
}
TOY = {"hidden_size": 32, "layers": 2, "vocab_size": 800, "heads": 4, "kv_heads": 2, "head_dim": 16}
# name: sizes, training config, numbers of processes
CASES: dict[str, tuple[dict[str, int], list[str], tuple[int, ...]]] = {
    "packed": (SMALL, ["batch_size=8"], (1,)),
    "recomputed": (SMALL, ["batch_size=32", "gradient_checkpointing=full"], (1,)),
    "selective": (
        SMALL,
        ["batch_size=12", "gradient_checkpointing=selective", "optimizer=muon"],
        (1,),
    ),
    "vocabulary": (
        WIDE,
        ["batch_size=4", "ema_decay=0.999", "gradient_accumulation_steps=2"],
        (1,),
    ),
    "sharded": (DEEP, ["batch_size=2"], (1, 2, 4)),
}
ALLOWED = 0.15
ROOT = Path(__file__).parents[1]


def work(name: str, quick: bool) -> None:
    """One process: print measured and estimated bytes of the case as JSON."""
    import functools

    import torch

    from qwen3_encdec.training import plan as budget
    from qwen3_encdec.training.config import load_config
    from qwen3_encdec.training.distributed import make_accelerator, prepare, prepare_layers, release
    from qwen3_encdec.training.optimization import build_optimizer

    size, overrides, _ = CASES[name]
    lengths = ["data.source_length=64", "data.target_length=32", "batch_size=2"] if quick else []
    config = load_config(None, [*overrides, *lengths])
    accelerator = make_accelerator(config, "")

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        batch = budget.full_rows(model.config, config, config.batch_size)
        tokens = config.gradient_accumulation_steps * batch["labels"].numel()
        for _ in range(number):
            for _ in range(config.gradient_accumulation_steps):
                accelerator.backward(model(**batch, num_items_in_batch=tokens).loss)
            optimizer.step()
            optimizer.zero_grad()

    warm = our_model(TOY, "float32").train()
    steps(warm, build_optimizer(warm, config), 1)
    start = reset_peak()
    model = our_model(TOY if quick else size, "float32").train()
    prepare_layers(model, config)
    state = prepare(model, build_optimizer(model, config), accelerator)
    machines, sent = budget.machines(accelerator), []

    def counting(collective, *args, **kwargs):
        whole = max(
            value.nbytes for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)
        )
        sent.append(whole * (machines.processes - 1) / machines.processes)
        return collective(*args, **kwargs)

    for name in ("all_gather_single", "reduce_scatter_single"):
        setattr(
            torch.distributed, name, functools.partial(counting, getattr(torch.distributed, name))
        )
    reset_peak()  # making and dealing out the weights does not count
    steps(state.model, state.optimizer, 3)
    measured = torch.tensor([peak() - start])
    measured = int(accelerator.gather(measured).max())
    config = load_config(None, [*overrides, *lengths, "mixed_precision=no"])
    sizes, saved = (
        budget.count_parameters(model.config),
        budget.saved_by_layers(model.config, config, machines),
    )
    parts, moments = budget.memory(model.config, sizes, config, machines, saved)
    found = {"measured": measured, "parts": parts, "moments": moments, "sent": sum(sent) / 3}
    found["communication"] = budget.communication(sizes, config, machines)
    accelerator.print("FOUND " + json.dumps(found))
    release(accelerator)


def measure(name: str, processes: int, quick: bool) -> dict[str, Any]:
    """Run a case in processes of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / "configs/accelerate_fsdp2.yaml"),
        ]
        launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    settings = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [*launcher, __file__, "--worker", name, *(["--quick"] if quick else [])]
    done = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} on {processes} processes failed:\n{done.stderr}")
    return json.loads(done.stdout.split("FOUND ")[1].splitlines()[0])


def main() -> None:
    """Measure everything, write it down, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy size; the figures mean nothing")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(CASES),
        metavar="CASE",
        help="some cases; nothing is written",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for the results",
    )
    parser.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.quick)
        return
    described, found, verdicts = environment(), {}, []
    print(json.dumps(described))
    for name in args.only or CASES:
        for processes in CASES[name][2]:
            result = measure(name, processes, args.quick)
            moment, estimate = max(result["moments"].items(), key=lambda item: item[1])
            ratio = estimate / result["measured"]
            label = name if processes == 1 else f"{name}-{processes}"
            found[label] = {"processes": processes, "ratio": ratio, **result}
            print(
                f"{label:<12} {processes} processes  measured {result['measured'] / 2**30:6.3f} GiB  "
                f"estimated {estimate / 2**30:6.3f}, {moment}; sent a step {result['sent'] / 2**20:.1f} MiB, "
                f"estimated {result['communication'] / 2**20:.1f}",
                flush=True,
            )
            ratios = {"memory": ratio}
            if processes > 1:
                ratios["sent"] = result["communication"] / result["sent"]
            for figure, value in ratios.items():
                verdict = "met" if abs(value - 1) <= ALLOWED else "missed"
                verdicts.append(
                    f"target {figure}-{label}: {value:.2f}x (wanted 0.85 to 1.15x) {verdict}"
                )
    if not args.only:
        from qwen3_encdec.folders import write_json

        path = args.output / f"memory-{slug(described['cpu'])}{'-quick' if args.quick else ''}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**described, "found": found})
        print(f"wrote {path}")
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
