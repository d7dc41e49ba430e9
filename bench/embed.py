"""Measure texts per second of `TextEncoder`, sentence-transformers and exported forms.

    python bench/embed.py    # 8 to 17 minutes on 2 idle cores

The encoder has Qwen3-0.6B's width, 6 of its 28 layers and random weights. Texts are random words, 1
to about 500 tokens, with lengths even on a log scale, in random order. Sides take turns in one
process; the median of the rounds counts.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import command_line, save_pair, target, write
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer
from transformers.utils import logging

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.embedding.export import FORMS, export_encoder, sample_texts
from qwen3_encdec.folders import InputError

TOY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
TOY |= {"num_key_value_heads": 1, "head_dim": 32, "num_ranks": 512}


def main() -> None:
    """Run all sides, print figures, then targets."""
    arguments = command_line(__doc__).parse_args()
    logging.disable_progress_bar()
    layers, number, longest, rounds = (1, 12, 60, 1) if arguments.quick else (6, 96, 500, 3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_encoder(Path(scratch), layers, **TOY if arguments.quick else {})
        texts = sample_texts(AutoTokenizer.from_pretrained(folder), number, longest)
        sides: dict[str, Callable] = {}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            plain = SentenceTransformer(str(folder), model_kwargs={"dtype": dtype}, device="cpu")
            sides[f"sentence-transformers {name}"] = plain.encode
            sides[f"ours {name}"] = TextEncoder(folder, dtype=dtype, device="cpu").encode
        for form in () if arguments.quick else ("onnx", "onnx-int8", "gguf-q8_0"):
            try:
                export_encoder(folder, form, Path(scratch) / form)
                sides[form] = FORMS[form].read(Path(scratch) / form)
            except InputError as error:
                print(f"{form}: not run, {error}")
        seconds, found = take_turns(sides, texts, rounds)
    show(seconds, found, number)
    write(arguments.output, seconds=seconds)


def make_encoder(root: Path, layers: int, **sizes: int) -> Path:
    """Write an encoder folder with random weights."""
    pair = save_pair(root / "encdec", num_hidden_layers=layers, num_decoder_layers=1, **sizes)
    extract_encoder(pair, root / "encoder")
    return root / "encoder"


def take_turns(sides: dict[str, Callable], texts: list[str], rounds: int) -> tuple[dict, dict]:
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
    reference = "sentence-transformers float32"
    median = {side: statistics.median(times) for side, times in seconds.items()}
    cosine = {side: float((rows * found[reference]).sum(1).min()) for side, rows in found.items()}
    print(f"{'':32}{'texts/s':>9}{'x':>7}{'cosine >=':>12}")
    for side, taken in median.items():
        ratio = median[reference] / taken
        print(f"{side:32}{texts / taken:9.2f}{ratio:7.2f}{cosine[side]:12.6f}")
    for name in ("float32", "bfloat16"):
        ratio = median[f"sentence-transformers {name}"] / median[f"ours {name}"]
        target(f"same dtype, {name}", ratio, ">= 1.3 x", "{:.2f} x")
    target("cosine to sentence-transformers", cosine["ours float32"], ">= 0.99999", "{:.7f}")


if __name__ == "__main__":
    main()
