"""Initialize a random full-size Qwen3-0.6B on one machine, then take one bf16 training step.

    python bench/full_size.py    # half an hour on 2 cores, needs 20 GB

Each stage runs in its own process to measure its own peak memory. The step has 512 source and 256
target tokens, fp32 weights under bf16 autocast, and AdamW. The last lines compare with the targets.
"""

import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import alone, command_line, target, write
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.conversion import initialize as conversion
from qwen3_encdec.demo.parent import parent_tokenizer

PARAMETERS = 1_036_619_776
SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
SIZES |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936}
QUICK = SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


def make(folder: Path, sizes: dict) -> None:
    """Write a Qwen3 checkpoint with random weights and the real tokenizer."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    model.bfloat16().save_pretrained(folder / "qwen3")
    parent_tokenizer().save_pretrained(folder / "qwen3")


def initialize(folder: Path) -> dict:
    """Initialize and verify in fp32, without the gate, which the target's count excludes."""
    report = conversion.initialize(folder / "qwen3", folder / "encdec", source_gate=False)
    print(report)
    return {"parameters": report.parameters}


def train(folder: Path) -> dict:
    """Take one optimizer step on a random pair of 512 source and 256 target tokens."""
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


def measured(stage: Callable[[Path], dict], folder: Path) -> dict:
    """Run a stage; print and return its figures, seconds and the peak memory of this process."""
    began = time.perf_counter()
    figures = stage(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    figures |= {"seconds": round(time.perf_counter() - began, 1), "peak_gb": round(peak, 2)}
    print(f"{stage.__name__}: {json.dumps(figures)}", flush=True)
    return figures


def main() -> None:
    """Run the stages and print the figures beside their targets."""
    arguments = command_line(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(make, folder, QUICK if arguments.quick else SIZES)
        made, trained = alone(measured, initialize, folder), alone(measured, train, folder)
    target("parameters", made["parameters"], f"== {PARAMETERS}", "{}")
    target("initialize-peak", made["peak_gb"], "< 16 GB", "{} GB")
    target("train-step-peak", trained["peak_gb"], "< 20 GB", "{} GB")
    write(arguments.output, initialize=made, train=trained)


if __name__ == "__main__":
    main()
