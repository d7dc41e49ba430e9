"""Full size on one machine: initialize a random Qwen3-0.6B folder, then one bf16 training step.

    python bench/full_size.py [--folder runs/full-size] [--steps 1]

Each stage runs in a process of its own, so that its peak memory is its own. Source 512 and target
256 tokens, fp32 master weights under bf16 autocast, AdamW. The last lines compare with the targets.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

PARAMETERS = 1_036_619_776


def make(folder: Path) -> None:
    """A Qwen3-0.6B checkpoint with random weights and the real tokenizer."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from qwen3_encdec import Qwen3EncoderDecoderConfig
    from qwen3_encdec.tokenization_qwen3_encdec import qwen3_backend

    sizes = Qwen3EncoderDecoderConfig()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "max_position_embeddings", "rope_parameters")  # fmt: skip
    config = Qwen3Config(
        **{name: getattr(sizes, name) for name in names},
        vocab_size=151_936,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder / "qwen3")
    PreTrainedTokenizerFast(
        tokenizer_object=qwen3_backend(), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    ).save_pretrained(folder / "qwen3")


def initialize(folder: Path) -> dict:
    """The package's own initialization, verified, in fp32."""
    from qwen3_encdec.conversion.initialize import initialize

    report = initialize(folder / "qwen3", folder / "encdec")
    print(report, file=sys.stderr)
    return {"parameters": report.parameters, "verified": report.verification is not None}


def train(folder: Path, steps: int) -> dict:
    """`steps` optimizer steps on one random pair of 512 source and 256 target tokens."""
    import torch

    from qwen3_encdec import Qwen3ForSeq2SeqLM

    model = Qwen3ForSeq2SeqLM.from_pretrained(folder / "encdec").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    torch.manual_seed(0)
    batch = {
        "input_ids": torch.randint(0, 151_643, (1, 512)),
        "labels": torch.randint(0, 151_643, (1, 256)),
    }
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds}


def stage(name: str, folder: Path, steps: int) -> dict:
    """Run one stage in a fresh process; its result, seconds and peak memory in GB."""
    start = time.perf_counter()
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--steps",
        str(steps),
        "--stage",
        name,
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1]) | {
        "wall_seconds": round(time.perf_counter() - start, 1)
    }
    print(f"{name}: {result}", flush=True)
    return result


def main() -> None:
    """Run the stages and print the figures beside their targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/full-size"))
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--stage", choices=["make", "initialize", "train"])
    args = parser.parse_args()
    if args.stage:
        result = {"make": make, "initialize": initialize}.get(
            args.stage, lambda f: train(f, args.steps)
        )(args.folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps((result or {}) | {"peak_gb": round(peak, 2)}))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "qwen3" / "tokenizer.json").exists():
        stage("make", args.folder, args.steps)
    initialized, trained = (
        stage(name, args.folder, args.steps) for name in ("initialize", "train")
    )
    for name, figure, wanted, met in (
        (
            "parameters",
            f"{initialized['parameters']:,}",
            f"{PARAMETERS:,}",
            initialized["parameters"] == PARAMETERS,
        ),
        ("initialize-peak", f"{initialized['peak_gb']} GB", "< 16 GB", initialized["peak_gb"] < 16),
        ("train-step-peak", f"{trained['peak_gb']} GB", "< 20 GB", trained["peak_gb"] < 20),
    ):
        print(f"target {name}: {figure} (wanted {wanted}) {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
