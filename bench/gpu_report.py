"""What one GPU makes of the model: correctness, training speed and memory, decoding. Random weights, no network.

    python bench/gpu_report.py                        # one CUDA GPU, a few minutes; the 0.6B pair
    python bench/gpu_report.py --device cpu --tiny    # the same steps at toy size, to test this script

Prints a table and writes bench/results/gpu-DEVICE.json. Training steps are forward, backward and fused AdamW in bf16
autocast over fp32 weights, on packed rows whose source and target lengths are the UL2 mixture's.
"""

import argparse
import json
import platform
import re
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.data.collator import collate
from qwen3_encdec.data.packing import pack
from qwen3_encdec.data.ul2 import PRESETS, Example, raw_length
from qwen3_encdec.files import package_versions
from qwen3_encdec.training.budget import count_parameters, flops, peak_flops

TINY = {
    "vocab_size": 331, "num_sentinel_tokens": 11, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 300, "eos_token_id": 301,
}  # fmt: skip


def make_rows(source_length: int, target_length: int, rows: int, vocab_size: int) -> list[list[Example]]:
    """Packed rows of random tokens with the length mixture of UL2 on documents of up to two raw chunks."""
    rng = np.random.default_rng(0)
    preset = PRESETS["t5gemma2"]
    weights = np.array([denoiser.weight for denoiser in preset])
    examples: list[Example] = []
    while len(packed := pack(examples, source_length, target_length)) < rows + 1:
        for _ in range(4 * rows):
            index = int(rng.choice(len(preset), p=weights / weights.sum()))
            raw = int(rng.integers(16, raw_length(preset[index], source_length, target_length) + 1))
            source = max(2, round(raw * (1 - preset[index].corruption)))
            ids = rng.integers(0, vocab_size - 110, size=(source + max(2, raw - source + 1)))
            examples.append(Example(ids[:source], ids[source:], index))
    return packed[:rows]


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards is true."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def correctness(device: torch.device) -> dict[str, float]:
    """Relative difference of the packed loss to a padded fp32 eager one on the CPU, by dtype and for a control."""
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig(**TINY, initializer_range=0.2))
    rows = make_rows(64, 48, 3, TINY["vocab_size"])
    flat = [[example] for row in rows for example in row]
    model.set_attn_implementation("eager")
    batch = collate(flat, pad_id=300)
    batch.pop("denoiser")
    labels = batch["labels"]
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model.eval()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=shifted
    ).logits
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    differences = {}
    model.train()
    for name in ("float32", "bfloat16", "control"):
        moved = {k: v.to(device) for k, v in collate(rows, pad_id=300).items() if k != "denoiser"}
        if name == "control":  # the pairs of a row see each other
            moved |= {k: (moved[k] > 0).long() for k in ("attention_mask", "decoder_attention_mask")}
        model.to(device, torch.bfloat16 if name == "bfloat16" else torch.float32)
        with torch.no_grad():
            differences[name] = abs(model(**moved).loss.item() - reference) / reference
    return differences


def training(device: torch.device, tiny: bool, checkpointing: bool) -> dict[str, float]:
    """Real tokens per second, MFU and peak memory of training steps."""
    config = Qwen3EncoderDecoderConfig(**(TINY if tiny else {}))
    lengths = (64, 48, 2) if tiny else (2048, 1024, 4)
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(config).to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows = make_rows(*lengths, config.vocab_size)
    batch = {k: v.to(device) for k, v in collate(rows, pad_id=config.pad_token_id).items() if k != "denoiser"}
    pairs = [example for row in rows for example in row]
    seconds = []
    for _ in range(3 if tiny else 8):
        synchronize(device)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[2:])
    tokens = sum(len(e.source) + len(e.target) for e in pairs)
    sizes = count_parameters(config)
    work = sum(flops(config, sizes, len(e.source), len(e.target)) for e in pairs)
    figures = {"step_seconds": step, "tokens_per_second": tokens / step, "tflops": work / step / 1e12}
    if peak := peak_flops(device, 1):
        figures["mfu"] = work / step / peak
    if device.type == "cuda":
        figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return figures


def decoding(device: torch.device, tiny: bool) -> dict[str, float]:
    """Greedy tokens per second, batch 8, after a source of 2,048 tokens."""
    config = Qwen3EncoderDecoderConfig(**(TINY if tiny else {}))
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(config).to(device, torch.bfloat16).eval()
    ids = torch.randint(0, config.pad_token_id, (8, 32 if tiny else 2048), device=device)
    new = 4 if tiny else 64
    for _ in range(2):
        synchronize(device)
        began = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new)
        synchronize(device)
    return {"decode_tokens_per_second": 8 * new / (time.perf_counter() - began)}


def main() -> None:
    """Run everything on one device and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="toy size")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible; --device cpu --tiny tests this script without one")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu goes with --tiny; the full size is for a GPU")
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu"
    report: dict = {"device": name, "tiny": args.tiny, "versions": package_versions()}
    report["correctness"] = correctness(device)
    for checkpointing in (False, True):
        report["training" + " checkpointed" * checkpointing] = training(device, args.tiny, checkpointing)
    report["decoding"] = decoding(device, args.tiny)
    for part, figures in report.items():
        if isinstance(figures, dict):
            for figure, value in figures.items():
                print(f"{part:<22} {figure:<26} {value if isinstance(value, str) else format(value, '.4g')}")
    slug = re.sub(r"\W+", "-", name.lower()).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"gpu-{slug}{'-tiny' * args.tiny}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {path}")
    speed = report["training"]
    control = report["correctness"].pop("control")
    checks = [
        ("correctness", max(report["correctness"].values()), 2e-3, False),
        ("correctness-control", control, 2e-3, True),
    ]
    if "mfu" in speed:
        checks += [("mfu", speed["mfu"], 0.40, True), ("tokens-per-second", speed["tokens_per_second"], 85_000, True)]
    for target, figure, wanted, up in checks:
        met = figure >= wanted if up else figure <= wanted
        print(f"target {target}: {figure:.3g} (wanted {'>=' if up else '<='} {wanted:g}) {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
