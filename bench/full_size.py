"""Initialize a random full-size Qwen3-0.6B on one machine, then take one bf16 training step.

    python bench/full_size.py [--folder runs/full-size]

Each stage runs in its own process to measure its own peak memory. The step has 512 source and 256
target tokens, fp32 weights under bf16 autocast, and AdamW. The last lines compare with the targets.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

PARAMETERS = 1_036_619_776


def make(folder: Path) -> dict:
    """Write a Qwen3-0.6B checkpoint with random weights and the real tokenizer."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from qwen3_encdec import Qwen3EncoderDecoderConfig
    from qwen3_encdec.configuration_qwen3_encdec import SHARED_WITH_QWEN3
    from qwen3_encdec.tokenization_qwen3_encdec import qwen3_backend

    ours = Qwen3EncoderDecoderConfig()
    sizes = {name: getattr(ours, name) for name in (*SHARED_WITH_QWEN3, "rope_parameters")}
    config = Qwen3Config(**sizes, vocab_size=151_936, tie_word_embeddings=True)
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder / "qwen3")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=qwen3_backend(), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokenizer.save_pretrained(folder / "qwen3")
    return {}


def initialize(folder: Path) -> dict:
    """Initialize and verify in fp32, without the gate, which the target's count excludes."""
    from qwen3_encdec.conversion.initialize import initialize

    report = initialize(folder / "qwen3", folder / "encdec", source_gate=False)
    print(report, file=sys.stderr)
    return {"parameters": report.parameters}


def train(folder: Path) -> dict:
    """Take one optimizer step on a random pair of 512 source and 256 target tokens."""
    import torch

    from qwen3_encdec import Qwen3ForSeq2SeqLM

    model = Qwen3ForSeq2SeqLM.from_pretrained(folder / "encdec").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    torch.manual_seed(0)
    ids = torch.randint(0, 151_643, (1, 768))
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids[:, :512], labels=ids[:, 512:]).loss
    loss.backward()
    optimizer.step()
    return {"loss": loss.item(), "step_seconds": round(time.perf_counter() - began, 1)}


def run(stage: str, folder: Path) -> dict:
    """Run a stage in a fresh process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--stage", stage]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{stage}: {output.splitlines()[-1]}", flush=True)
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Run the stages and print the figures beside their targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = {"make": make, "initialize": initialize, "train": train}
    parser.add_argument("--folder", type=Path, default=Path("runs/full-size"))
    parser.add_argument("--stage", choices=stages)
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.stage:
        began = time.perf_counter()
        result = stages[arguments.stage](folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        result |= {"seconds": round(time.perf_counter() - began, 1), "peak_gb": round(peak, 2)}
        print(json.dumps(result))
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "qwen3" / "tokenizer.json").exists():
        run("make", folder)
    made, trained = run("initialize", folder), run("train", folder)
    for name, figure, unit, wanted, met in (
        ("parameters", made["parameters"], "", PARAMETERS, made["parameters"] == PARAMETERS),
        ("initialize-peak", made["peak_gb"], " GB", "< 16", made["peak_gb"] < 16),
        ("train-step-peak", trained["peak_gb"], " GB", "< 20", trained["peak_gb"] < 20),
    ):
        print(f"target {name}: {figure}{unit} (wanted {wanted}) {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
