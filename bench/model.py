"""Compare our model with transformers' T5Gemma 2 at the same text dimensions, in one run.

    python bench/model.py    # half an hour on an idle Linux machine with 2 cores

The stages are the functions `train`, `loss`, `prefill` and `growth`; decoding has no target. All
matrices of both sides have the same shapes (tests/test_bench.py checks), and both use SDPA and the
same optimizer. They get the same UL2 examples of package-docs: T5Gemma 2 one per row, padded to the
longest, as its users batch them; ours packed. Only real tokens count. Every measurement runs in its
own process, the sides take turns, and ratios are of the medians over rounds. Peak memory is the
high-water mark of resident memory above its level before the first step.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import alone, command_line, generate, target, write
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import heldout_examples
from qwen3_encdec.loss_qwen3_encdec import chunked_cross_entropy
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WANTED = {
    ("train", "tokens/s"): ("train-throughput", ">= 4.0"),
    ("train", "peak GB"): ("train-memory", "<= 0.5"),
    ("loss", "peak GB"): ("loss-memory", "<= 0.45"),
    ("loss", "seconds"): ("loss-time", "<= 1.0"),
}
Pair = tuple[np.ndarray, np.ndarray]  # source and target ids
Figures = dict[str, float]


class Size(NamedTuple):
    """Dimensions of both models, and their training batches."""

    hidden: int
    layers: int
    vocabulary: int
    heads: int
    head_dim: int
    ranks: int | None  # of the tokenizer that fits the vocabulary; None is all of Qwen3's
    examples: int  # in a training batch


FULL = {
    "small": Size(256, 6, 16_000, heads=4, head_dim=96, ranks=15_000, examples=32),
    "wide": Size(1024, 2, 152_036, heads=16, head_dim=128, ranks=None, examples=8),
}
QUICK = {"tiny": Size(32, 2, 800, heads=4, head_dim=16, ranks=600, examples=4)}


def make_model(side: str, size: Size, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Build the model of a side, seeded: "ours", or "theirs" with full attention in every layer and
    next to no vision tower.
    """
    text: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "head_dim": size.head_dim,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    if side == "ours":
        config, kind = Qwen3EncoderDecoderConfig(**text), Qwen3ForSeq2SeqLM
    else:
        text |= {"query_pre_attn_scalar": size.head_dim, "hidden_activation": "silu"}
        text |= {"layer_types": ["full_attention"] * size.layers, "bos_token_id": 2}
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
        tokens = {"boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5}
        encoder = {"text_config": text, "vision_config": vision, **tokens}
        dropout = {"dropout_rate": 0.0, "attention_dropout": 0.0}
        config = T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=5, **dropout)
        kind = T5Gemma2ForConditionalGeneration
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.decoder_start_token_id = 2
    return model


def read_examples(size: Size, number: int) -> list[Pair]:
    """Read UL2 examples of package-docs."""
    tokenizer = build_tokenizer(num_ranks=size.ranks)
    assert len(tokenizer) <= size.vocabulary
    config = DataConfig(source_length=512, target_length=256)
    found = heldout_examples(config, tokenizer, -(-number // len(config.denoisers)))
    return [(example.source, example.target) for example in found[:number]]


def random_pairs(source: int, target: int, number: int, size: Size) -> list[Pair]:
    """Make pairs of random ids, all of the same lengths."""
    ids = np.random.default_rng(0).integers(10, size.vocabulary, (number, source + target))
    return [(row[:source], row[source:]) for row in ids]


def make_batches(side: str, pairs: list[Pair], number: int) -> list[dict]:
    """Cut the pairs into training batches: packed for us, padded to the longest for them."""

    def padded(rows: Any, value: int) -> torch.Tensor:
        rows = [torch.as_tensor(row).long() for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=value)

    batches = []
    for start in range(0, len(pairs), len(pairs) // number):
        sources, targets = zip(*pairs[start : start + len(pairs) // number], strict=True)
        if side == "ours":
            batches.append(collate_packed(sources, targets))
            continue
        mask = padded([np.ones(len(source)) for source in sources], 0)
        ids, labels = padded(sources, 0), padded(targets, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def count_tokens(pairs: list[Pair]) -> int:
    """Count source and target tokens together."""
    return sum(len(source) + len(target) for source, target in pairs)


class Trainer:
    """A model, its optimizer and one training step, warmed up on a few tokens."""

    def __init__(self, side: str, size: Size, dtype: torch.dtype):
        self.model = make_model(side, size, dtype).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        (self.few,) = make_batches(side, random_pairs(8, 4, 2, size), 1)
        self.model(**self.few).loss.backward()
        self.optimizer.zero_grad()

    def step(self, batch: dict) -> float:
        """Take one step; return its seconds."""
        began = time.perf_counter()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def train(side: str, size: Size, dtype: torch.dtype, pairs: list[Pair], number: int) -> Figures:
    """Measure real tokens per second over all batches, and the peak memory of a step in GB."""
    batches = make_batches(side, pairs, number)
    trainer = Trainer(side, size, dtype)
    start = reset_peak()
    trainer.step(trainer.few)  # makes AdamW's states
    seconds = sum(trainer.step(batch) for batch in batches)
    return {"tokens/s": count_tokens(pairs) / seconds, "peak GB": (memory("VmHWM") - start) / 1e9}


def loss(side: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Figures:
    """Measure seconds and peak GB from hidden states to gradients: chunked, or one fp32 product."""
    tokens, width, classes = shape
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype).requires_grad_()
    weight = torch.randn(classes, width, dtype=hidden.dtype).mul_(0.02).requires_grad_()
    labels = torch.randint(0, classes, (tokens,))

    def step(number: int) -> float:
        began = time.perf_counter()
        if side == "theirs":  # as transformers' ForMaskedLMLoss
            value = cross_entropy(linear(hidden[:number], weight).float(), labels[:number])
        else:
            value, _ = chunked_cross_entropy(hidden[:number], weight, labels[:number])
        value.backward()
        hidden.grad = weight.grad = None
        return time.perf_counter() - began

    step(8)
    start = reset_peak()
    return {"seconds": step(tokens), "peak GB": (memory("VmHWM") - start) / 1e9}


def prefill(side: str, size: Size, dtype: torch.dtype, sources: tuple, new_tokens: int) -> Figures:
    """Measure source tokens/s of a batch of 4 up to the first token, target tokens/s after it."""
    model = make_model(side, size, dtype).eval()
    figures = {}
    for source in sources:
        for _ in range(2):  # the first time allocates memory and loads kernels
            first, rest = generate(model, 4, source, new_tokens)
        figures[f"prefill tokens/s @{source}"] = 4 * source / first
        figures[f"decode tokens/s @{source}"] = 4 * (new_tokens - 1) / rest
    return figures


def growth(side: str, size: Size, dtype: torch.dtype, documents: tuple[int, ...]) -> Figures:
    """Measure microseconds per token of training steps over documents of one length, by length."""
    trainer, figures = Trainer(side, size, dtype), {}
    for source in documents:
        pairs = random_pairs(source, source // 4, documents[-1] // source, size)
        (batch,) = make_batches(side, pairs, 1)
        trainer.step(batch)
        figures[str(source)] = 1e6 * trainer.step(batch) / count_tokens(pairs)
    return figures


def reset_peak() -> int:
    """Release freed memory, reset the high-water mark and return what is held, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    """Return resident memory, VmRSS, or its high-water mark since `reset_peak`, VmHWM, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def compare(rounds: int, stage: Callable, label: str, *arguments: Any) -> list[dict[str, Any]]:
    """Run a stage for each side in turn; print and return its figures and ours / theirs of them."""
    found: dict[str, list[Figures]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for side, figures in found.items():
            figures.append(alone(stage, side, *arguments))
    measurements = []
    for name in found["ours"][0]:
        ours, theirs = ([figures[name] for figures in found[side]] for side in found)
        each = [a / b for a, b in zip(ours, theirs, strict=True)]
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(
            f"{stage.__name__:<7} {label:<11} {name:<24}"
            f"  ours {statistics.median(ours):10.4g}  theirs {statistics.median(theirs):10.4g}"
            f"  ratio {min(each):.2f} | {ratio:.2f} | {max(each):.2f}",
            flush=True,
        )
        entry = {"stage": stage.__name__, "of": label, "figure": name, "ratio": ratio}
        measurements.append(entry | {"ours": ours, "theirs": theirs})
    return measurements


def main() -> None:
    """Run the stages, print figures, then targets."""
    arguments = command_line(__doc__).parse_args()
    quick = arguments.quick
    sizes, batches, rounds = (QUICK, 2, 1) if quick else (FULL, 4, 3)
    lengths = ((16, 48), 3) if quick else ((512, 4096), 17)  # sources, new tokens
    shape = (64, 32, 800) if quick else (2048, 1024, 152_036)  # tokens, hidden size, classes
    documents = (16, 64) if quick else (256, 1024, 4096)  # sources; targets are a quarter

    measurements = []
    for name, size in sizes.items():
        pairs = read_examples(size, batches * size.examples)
        for short, dtype in DTYPES.items():
            label = f"{name} {short}"
            measurements += compare(rounds, train, label, size, dtype, pairs, batches)
            measurements += compare(rounds, prefill, label, size, dtype, *lengths)
    for short, dtype in DTYPES.items():
        measurements += compare(rounds, loss, short, shape, dtype)
    smallest = next(iter(sizes.values()))
    measurements += compare(rounds, growth, "us a token", smallest, torch.bfloat16, documents)
    for entry in measurements:
        if goal := WANTED.get((entry["stage"], entry["figure"])):
            label = entry["of"].replace(" ", "-")
            target(f"{goal[0]}-{label}", entry["ratio"], goal[1])
    write(arguments.output, measurements=measurements)


if __name__ == "__main__":
    main()
