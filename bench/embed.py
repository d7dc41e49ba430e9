"""Measure texts per second of `TextEncoder`, sentence-transformers and exported forms.

    python bench/embed.py            # 8 to 17 minutes on 2 idle cores
    python bench/embed.py --quick    # toy size: tests this script, measures nothing

The encoder has Qwen3-0.6B's width, 6 of its 28 layers and random weights. Texts are random words, 1
to about 500 tokens, with lengths even on a log scale, in random order. Sides take turns in one
process; the median of the rounds counts.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer
from transformers.utils import logging

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.embedding.export import FORMS, export_encoder, sample_texts
from qwen3_encdec.evaluation.suite import provenance
from qwen3_encdec.folders import InputError, write_json
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

FULL = {"layers": 6, "texts": 96, "longest": 500, "rounds": 3, "sizes": {}}
TOY = {"num_ranks": 512, "vocab_size": 740, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
       "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
QUICK = {"layers": 1, "texts": 12, "longest": 60, "rounds": 1, "sizes": TOY}
RUNTIMES = {"onnx": "onnxruntime", "onnx-int8": "onnxruntime", "gguf-q8_0": "xllamacpp"}


def main() -> None:
    """Run all sides, print figures, then targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument("--forms", default=",".join(RUNTIMES), help="comma-separated export forms")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    started, plan = time.monotonic(), QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_encoder(Path(scratch), plan["layers"], **plan["sizes"])
        texts = sample_texts(AutoTokenizer.from_pretrained(folder), plan["texts"], plan["longest"])
        sides = {}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            options = {"model_kwargs": {"dtype": dtype}, "device": "cpu"}
            sides[f"sentence-transformers {name}"] = SentenceTransformer(
                str(folder), **options
            ).encode
            sides[f"ours {name}"] = TextEncoder(folder, dtype=dtype, device="cpu").encode
        for form in filter(None, arguments.forms.split(",")):
            if importlib.util.find_spec(RUNTIMES[form]) is None:
                print(f"{form}: not run, {RUNTIMES[form]} is not installed")
                continue
            try:
                export_encoder(folder, form, Path(scratch) / form)
                sides[form] = FORMS[form].read(Path(scratch) / form)
            except InputError as error:
                print(f"{form}: not run, {error}")
        seconds, found = take_turns(sides, texts, plan["rounds"])
    show(seconds, found, len(texts))
    if arguments.output:
        facts = provenance(started=started, plan=plan, threads=torch.get_num_threads())
        write_json(arguments.output, {"seconds": seconds, "provenance": facts})


def make_encoder(root: Path, layers: int, num_ranks: int | None = None, **sizes: int) -> Path:
    """Write an encoder folder with random weights; `num_ranks` cuts Qwen3's vocabulary."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(num_ranks=num_ranks)
    config = Qwen3EncoderDecoderConfig(
        num_hidden_layers=layers,
        num_decoder_layers=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    Qwen3ForSeq2SeqLM(config).save_pretrained(root / "encdec")
    tokenizer.save_pretrained(root / "encdec")
    extract_encoder(root / "encdec", root / "encoder")
    return root / "encoder"


def take_turns(sides: dict, texts: list[str], rounds: int) -> tuple[dict, dict]:
    """Return the seconds of each round and the vectors of each side."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found = {}
    for encode in sides.values():
        encode(texts[:4])
    for _ in range(rounds):
        for side, encode in sides.items():
            began = time.perf_counter()
            found[side] = np.asarray(encode(texts), dtype=np.float32)
            seconds[side].append(time.perf_counter() - began)
    return seconds, found


def show(seconds: dict[str, list[float]], found: dict, texts: int) -> None:
    """Print the table, then the targets."""
    median = {side: statistics.median(times) for side, times in seconds.items()}
    base = median["sentence-transformers float32"]
    reference = found["sentence-transformers float32"]
    print(f"{'':32}{'texts/s':>9}{'x':>7}{'cosine >=':>12}")
    for side, taken in median.items():
        cosine = float((found[side] * reference).sum(1).min())
        print(f"{side:32}{texts / taken:9.2f}{base / taken:7.2f}{cosine:12.6f}")
    for name in ("float32", "bfloat16"):
        ratio = median[f"sentence-transformers {name}"] / median[f"ours {name}"]
        target(f"same dtype, {name}", f"{ratio:.2f} x", ">= 1.3 x", ratio >= 1.3)
    least = float((found["ours float32"] * reference).sum(1).min())
    target("cosine to sentence-transformers", f"{least:.7f}", ">= 0.99999", least >= 0.99999)


def target(name: str, figure: str, wanted: str, met: bool) -> None:
    """Print whether a figure meets its target."""
    print(f"target {name}: {figure} (wanted {wanted}) {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
