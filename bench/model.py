"""Ours against transformers' T5Gemma 2 at the same text dimensions: training, memory, decoding, and the loss alone.

    python bench/model.py [--rounds 3] [--only train|decode|loss] [--json FILE]

Every measurement runs in a process of its own; ours and theirs take turns, so that a machine whose speed drifts
slows both. Both see the same UL2 examples of package-docs (1:1:1:1:4). Ours come packed as our loader makes them;
T5Gemma 2 gets the same examples as its users make batches: one a row, padded to the longest. Tokens are real tokens,
padding not counted. Memory is the peak resident size of a training step (forward, backward, AdamW) above what stood
there before the first step. Ratios are ours / theirs, min / median / max over the rounds.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZES = {
    "small": {"hidden_size": 256, "layers": 6, "vocab_size": 16_000, "heads": 4, "kv_heads": 2, "head_dim": 96},
    "wide": {"hidden_size": 1024, "layers": 2, "vocab_size": 152_036, "heads": 16, "kv_heads": 8, "head_dim": 128},
}
EXAMPLES = {"small": 32, "wide": 24}
TARGETS = [  # name, measurement, wanted ratio, whether more is better
    ("train-throughput", "tokens_per_second", 2.0, True),
    ("train-memory", "peak_gb", 0.5, False),
]


def our_model(size: dict):
    """Our encoder-decoder."""
    from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM

    return Qwen3ForSeq2SeqLM(
        Qwen3EncoderDecoderConfig(
            vocab_size=size["vocab_size"],
            hidden_size=size["hidden_size"],
            intermediate_size=3 * size["hidden_size"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["kv_heads"],
            head_dim=size["head_dim"],
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def their_model(size: dict):
    """T5Gemma 2 with the same text dimensions, full attention in every layer, and a vision tower of nothing."""
    from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

    text = {
        "vocab_size": size["vocab_size"],
        "hidden_size": size["hidden_size"],
        "intermediate_size": 3 * size["hidden_size"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["head_dim"],
        "query_pre_attn_scalar": size["head_dim"],
        "layer_types": ["full_attention"] * size["layers"],
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = T5Gemma2Config(
        encoder={"text_config": text, "vision_config": {**vision, "image_size": 28, "patch_size": 14},
                 "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5},
        decoder=text, image_token_index=5,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return T5Gemma2ForConditionalGeneration(config)


def examples(size: dict, number: int):
    """The first UL2 examples of package-docs at 512/256, ids folded into the vocabulary."""
    from qwen3_encdec.data.config import DataConfig
    from qwen3_encdec.data.stream import UL2Stream
    from qwen3_encdec.data.ul2 import Example
    from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

    tokenizer = build_tokenizer(num_ranks=15_000 if size["vocab_size"] < 100_000 else None)
    found: list = []
    for row in UL2Stream(DataConfig(), tokenizer):
        found += [Example(e.source % size["vocab_size"], e.target % size["vocab_size"], e.denoiser) for e in row]
        if len(found) >= number:
            return found[:number]
    raise AssertionError("the stream is endless")


def batches(side: str, found: list):
    """One training batch of the examples: packed for us, padded to the longest for them."""
    import torch

    from qwen3_encdec.data.collator import collate
    from qwen3_encdec.data.packing import pack

    rows = pack(found, 512, 256) if side == "ours" else [[example] for example in found]
    batch = collate(rows, pad_id=0)
    batch.pop("denoiser")
    if side == "theirs":
        batch["decoder_attention_mask"] = (batch["decoder_attention_mask"] > 0).long()
    return {name: torch.as_tensor(value) for name, value in batch.items()}


def train(side: str, size: dict, dtype: str, number: int) -> dict:
    """Steps per second and peak memory of training on one batch."""
    import torch

    found = examples(size, number)
    batch = batches(side, found)
    tokens = sum(len(e.source) + len(e.target) for e in found)
    torch.manual_seed(0)
    model = (our_model if side == "ours" else their_model)(size).to(getattr(torch, dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    start = _resident()
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": tokens / statistics.median(seconds[1:]), "peak_gb": (peak - start) / 1e9}


def decode(side: str, size: dict, dtype: str, number: int) -> dict:
    """Greedy tokens per second of a batch of 4 after a source of `number` tokens, and the encoder's prefill."""
    import torch

    torch.manual_seed(0)
    model = (our_model if side == "ours" else their_model)(size).to(getattr(torch, dtype)).eval()
    ids = torch.randint(10, size["vocab_size"] - 200, (4, number))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    model.generation_config.decoder_start_token_id = 2
    model.generation_config.pad_token_id = 0

    def generate(new: int) -> float:
        began = time.perf_counter()
        model.generate(**inputs, min_new_tokens=new, max_new_tokens=new)
        return time.perf_counter() - began

    generate(2)
    prefill = min(generate(1) for _ in range(2))
    long = min(generate(33) for _ in range(2))
    return {"decode_tokens_per_second": 4 * 32 / (long - prefill), "prefill_tokens_per_second": 4 * number / prefill}


def loss(side: str, size: dict, dtype: str, number: int) -> dict:
    """The loss step alone, hidden states to gradients: ours, or the plain head with one cross-entropy in fp32."""
    import torch

    from qwen3_encdec.modeling_qwen3_encdec import chunked_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(number, size["hidden_size"], dtype=getattr(torch, dtype)).requires_grad_()
    weight = (0.02 * torch.randn(size["vocab_size"], size["hidden_size"])).to(hidden.dtype).requires_grad_()
    labels = torch.randint(0, size["vocab_size"], (number,))
    start = _resident()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        if side == "ours":
            value = chunked_cross_entropy(hidden, weight, labels)[0]
        else:
            value = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels)
        value.backward()
        hidden.grad = weight.grad = None
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds[1:]), "peak_gb": (peak - start) / 1e9}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


STAGES = {"train": train, "decode": decode, "loss": loss}


def measure(stage: str, size: str, dtype: str, number: int, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Ours / theirs of every figure of a stage: (min, median, max) over rounds taken in turn."""
    figures: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for side, collected in figures.items():
            command = [sys.executable, __file__, "--run", stage, side, size, dtype, str(number)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            collected.append(json.loads(output.splitlines()[-1]))
    ratios = {}
    for name in figures["ours"][0]:
        pairs = [(a[name], b[name]) for a, b in zip(figures["ours"], figures["theirs"], strict=True)]
        each = sorted(a / b for a, b in pairs)
        median = statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
        ratios[name] = (each[0], median, each[-1])
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(
            f"{stage} {size} {dtype} {number:>5} {name:<26} ours {ours:10.3f}  theirs {theirs:10.3f}  "
            f"ratio {each[0]:.2f} / {median:.2f} / {each[-1]:.2f}",
            flush=True,
        )
    return ratios


def main() -> None:
    """Measure everything asked for and compare with the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(STAGES))
    parser.add_argument("--json", type=Path, help="also write all ratios here")
    parser.add_argument("--run", nargs=5, metavar=("STAGE", "SIDE", "SIZE", "DTYPE", "NUMBER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        stage, side, size, dtype, number = args.run
        print(json.dumps(STAGES[stage](side, SIZES[size], dtype, int(number))))
        return
    results: dict[str, dict] = {}
    verdicts: list[tuple[str, float, float, bool]] = []
    for dtype in ("bfloat16", "float32"):
        for size in SIZES:
            if args.only in (None, "train"):
                ratios = measure("train", size, dtype, EXAMPLES[size], args.rounds)
                results[f"train {size} {dtype}"] = ratios
                verdicts += [(f"{n}-{size}-{dtype}", ratios[key][1], wanted, up) for n, key, wanted, up in TARGETS]
        for source, wanted in ((512, 1.3), (4096, 1.6)):
            if args.only in (None, "decode"):
                ratios = measure("decode", "small", dtype, source, args.rounds)
                results[f"decode {source} {dtype}"] = ratios
                verdicts.append((f"decode-{source}-{dtype}", ratios["decode_tokens_per_second"][1], wanted, True))
        if args.only in (None, "loss"):
            ratios = measure("loss", "wide", dtype, 2048, args.rounds)
            results[f"loss {dtype}"] = ratios
            verdicts.append((f"loss-memory-{dtype}", ratios["peak_gb"][1], 0.45, False))
            verdicts.append((f"loss-time-{dtype}", ratios["seconds"][1], 1.0, False))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    for name, figure, wanted, up in verdicts:
        met = figure >= wanted if up else figure <= wanted
        print(f"target {name}: {figure:.2f}x (wanted {'>=' if up else '<='} {wanted}x) {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
