"""Compare our model with transformers' T5Gemma 2 at the same text dimensions, in one run.

    python bench/model.py            # 3 rounds, on an idle Linux machine
    python bench/model.py --quick    # the same stages at toy size, to test this script

| stage   | measured                                                                              |
|---------|---------------------------------------------------------------------------------------|
| train   | steps (forward, backward, fused AdamW) over UL2 examples: real tokens/s, peak memory   |
| loss    | hidden states to gradients over the large vocabulary: seconds, peak memory             |
| prefill | greedy generation of a batch of 4: source tokens/s to the first token, and target      |
|         | tokens/s after it, which is reported but has no target                                 |
| growth  | microseconds per token as documents grow, at constant tokens per step                  |

Both sides have the same dimensions, layers, heads, vocabulary, activation, precision, threads,
optimizer and labels, SDPA and full attention, and parameter counts within 1 % (checked). Both get
the same UL2 examples of package-docs: T5Gemma 2 one per row, padded to the longest, as its users
batch them; ours packed. Only real tokens count. Every measurement runs in its own process, the sides
take turns, and ratios are of the medians over rounds. Peak memory is the high-water mark of resident
memory above its level before the first step.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHORT = {"bfloat16": "bf16", "float32": "fp32"}
Pair = tuple[Any, Any]  # source and target ids, int64 arrays
Figures = dict[str, float]


@dataclass(frozen=True)
class Size:
    """Dimensions of both models, and of a training batch."""

    hidden: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    ranks: int | None  # of the tokenizer that fits the vocabulary; None is all of Qwen3's
    examples: int  # in a training batch


@dataclass(frozen=True)
class Plan:
    """Sizes of what is measured."""

    sizes: dict[str, Size]
    batches: int
    sources: tuple[int, ...]
    new_tokens: int
    loss_shape: tuple[int, int, int]  # tokens, hidden size, classes
    documents: tuple[int, ...]  # source lengths of `growth`; targets are a quarter
    rounds: int


FULL = Plan(
    sizes={
        "small": Size(256, 6, 16_000, 4, 2, 96, 15_000, 32),
        "wide": Size(1024, 2, 152_036, 16, 8, 128, None, 8),
    },
    batches=4,
    sources=(512, 4096),
    new_tokens=17,
    loss_shape=(2048, 1024, 152_036),
    documents=(256, 1024, 4096),
    rounds=3,
)
QUICK = Plan(
    sizes={"tiny": Size(32, 2, 800, 4, 2, 16, 600, 4)},
    batches=2,
    sources=(16, 48),
    new_tokens=3,
    loss_shape=(64, 32, 800),
    documents=(16, 64),
    rounds=1,
)


# The two models and their batches


def make_model(side: str, size: Size, dtype: str, device: str = "cpu") -> Any:
    """Build the model of a side, seeded: "ours", or "theirs" with full attention in every layer and
    next to no vision tower.
    """
    import torch
    from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

    from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM

    text: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
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
        model = kind._from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.generation_config.decoder_start_token_id = 2
    return model


def read_examples(size: Size, number: int) -> list[Pair]:
    """Read UL2 examples of package-docs."""
    from qwen3_encdec.data.config import DataConfig
    from qwen3_encdec.data.stream import heldout_examples
    from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

    tokenizer = build_tokenizer(num_ranks=size.ranks)
    assert len(tokenizer) <= size.vocabulary
    config = DataConfig(source_length=512, target_length=256)
    found = heldout_examples(config, tokenizer, -(-number // len(config.denoisers)))
    return [(example.source, example.target) for example in found[:number]]


def random_pairs(source: int, target: int, number: int, vocabulary: int) -> list[Pair]:
    """Make pairs of random ids, all of the same lengths."""
    import numpy as np

    ids = np.random.default_rng(0).integers(10, vocabulary, (number, source + target))
    return [(row[:source], row[source:]) for row in ids]


def make_batches(side: str, pairs: list[Pair], number: int) -> list[dict]:
    """Cut the pairs into training batches: packed for us, padded to the longest for them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from qwen3_encdec.data.collate import collate_packed

    def padded(rows: list, value: int) -> torch.Tensor:
        rows = [torch.as_tensor(row).long() for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=value)

    batches = []
    for start in range(0, len(pairs), len(pairs) // number):
        sources, targets = zip(*pairs[start : start + len(pairs) // number], strict=True)
        if side == "ours":
            batches.append(collate_packed(sources, targets))
            continue
        ids = padded(sources, 0)
        mask = padded([torch.ones(len(source), dtype=torch.long) for source in sources], 0)
        labels = padded(targets, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def count_tokens(pairs: list[Pair]) -> int:
    """Count source and target tokens together."""
    return sum(len(source) + len(target) for source, target in pairs)


# The stages, each run in its own process


class Trainer:
    """A model, its optimizer and one training step, warmed up on a few tokens."""

    def __init__(self, side: str, size: Size, dtype: str):
        import torch

        self.model = make_model(side, size, dtype).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        (self.few,) = make_batches(side, random_pairs(8, 4, 2, size.vocabulary), 1)
        self.model(**self.few).loss.backward()
        self.optimizer.zero_grad()

    def step(self, batch: dict) -> float:
        """Take one step; return its seconds."""
        began = time.perf_counter()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def train(side: str, size: Size, dtype: str, pairs: list[Pair], number: int) -> Figures:
    """Measure real tokens per second over all batches, and the peak memory of a step in GB."""
    batches = make_batches(side, pairs, number)
    trainer = Trainer(side, size, dtype)
    start = reset_peak()
    trainer.step(trainer.few)  # makes AdamW's states
    seconds = sum(trainer.step(batch) for batch in batches)
    return {"tokens/s": count_tokens(pairs) / seconds, "peak GB": (peak() - start) / 1e9}


def loss(side: str, shape: tuple[int, int, int], dtype: str) -> Figures:
    """Measure seconds and peak GB from hidden states to gradients: chunked, or one fp32 product."""
    import torch
    from torch.nn.functional import cross_entropy, linear

    from qwen3_encdec.loss_qwen3_encdec import chunked_cross_entropy

    tokens, width, classes = shape
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=getattr(torch, dtype)).requires_grad_()
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
    return {"seconds": step(tokens), "peak GB": (peak() - start) / 1e9}


def prefill(
    side: str, size: Size, dtype: str, sources: tuple[int, ...], new_tokens: int
) -> Figures:
    """Measure source tokens/s of a batch of 4 up to the first token, target tokens/s after it."""
    model = make_model(side, size, dtype).eval()
    figures = {}
    for source in sources:
        generate(model, source, new_tokens)  # warm-up: allocates memory, loads kernels
        first, rest = generate(model, source, new_tokens)
        figures[f"prefill tokens/s @{source}"] = 4 * source / first
        figures[f"decode tokens/s @{source}"] = 4 * (new_tokens - 1) / rest
    return figures


def generate(model: Any, source: int, new_tokens: int) -> tuple[float, float]:
    """Generate after random sources; return seconds to the first token and from it to the last."""
    import torch
    from transformers import StoppingCriteria

    times = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    ids = torch.randint(10, model.get_input_embeddings().num_embeddings, (4, source))
    began = time.perf_counter()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        stopping_criteria=[Clock()],
    )
    assert len(times) == new_tokens
    return times[0] - began, times[-1] - times[0]


def growth(side: str, size: Size, dtype: str, documents: tuple[int, ...]) -> Figures:
    """Measure microseconds per token of training steps over documents of one length, by length."""
    trainer, figures = Trainer(side, size, dtype), {}
    tokens = documents[-1]
    for source in documents:
        pairs = random_pairs(source, source // 4, tokens // source, size.vocabulary)
        (batch,) = make_batches(side, pairs, 1)
        trainer.step(batch)
        figures[str(source)] = 1e6 * trainer.step(batch) / (tokens + tokens // 4)
    return figures


def reset_peak() -> int:
    """Release freed memory, reset the high-water mark and return what is held, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def peak() -> int:
    """Return the high-water mark of memory since `reset_peak`, in bytes."""
    return _memory("VmHWM")


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


# Running in turns, printing and writing


@dataclass
class Bench:
    """Run stages side by side, print a line for each figure and keep the figures."""

    rounds: int
    measurements: list[dict[str, Any]] = field(default_factory=list)

    def compare(self, stage: Any, label: str, *arguments: Any) -> Figures:
        """Run a stage for each side in turn; return ours / theirs of the medians, by figure."""
        found: dict[str, list[Figures]] = {"ours": [], "theirs": []}
        for _ in range(self.rounds):
            for side, figures in found.items():
                figures.append(self.run(stage, side, *arguments))
        ratios = {}
        for name in found["ours"][0]:
            ours, theirs = ([figures[name] for figures in found[side]] for side in found)
            each = [a / b for a, b in zip(ours, theirs, strict=True)]
            ratios[name] = statistics.median(ours) / statistics.median(theirs)
            print(
                f"{stage.__name__:<7} {label:<11} {name:<24}"
                f"  ours {statistics.median(ours):10.4g}  theirs {statistics.median(theirs):10.4g}"
                f"  ratio {min(each):.2f} | {ratios[name]:.2f} | {max(each):.2f}",
                flush=True,
            )
            entry = {"stage": stage.__name__, "of": label, "figure": name, "ratio": ratios[name]}
            self.measurements.append(entry | {"ours": ours, "theirs": theirs})
        return ratios

    def run(self, stage: Any, *arguments: Any) -> Figures:
        """Run a stage in a fork of a process that has imported everything and computed nothing."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["qwen3_encdec.modeling_qwen3_encdec", "transformers.models.t5gemma2.modeling_t5gemma2"]
        )
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(stage, *arguments).result()


def check_same_size(plan: Plan) -> None:
    """Stop if the parameter counts, without the vision tower, differ by more than 1 %."""
    for label, size in plan.sizes.items():
        counts = []
        for side in ("ours", "theirs"):
            named = make_model(side, size, "float32", "meta").named_parameters()
            counts.append(
                sum(p.numel() for n, p in named if not re.search("vision|multi_modal", n))
            )
        print(f"{label}: {counts[0]:,} parameters, theirs {counts[1]:,}")
        assert abs(counts[1] / counts[0] - 1) < 0.01, f"{label}: the sizes differ by over 1 %"


def main() -> None:
    """Run the stages, print figures, then targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = ("train", "loss", "prefill", "growth")
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument("--only", choices=stages, action="append", help="leave the others out")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    from qwen3_encdec.evaluation.suite import provenance

    plan, wanted = QUICK if arguments.quick else FULL, arguments.only or stages
    bench, targets = Bench(plan.rounds), []
    check_same_size(plan)
    for name, size in plan.sizes.items():
        pairs = read_examples(size, plan.batches * size.examples) if "train" in wanted else []
        for dtype, short in SHORT.items():
            label = f"{name} {short}"
            if "train" in wanted:
                ratios = bench.compare(train, label, size, dtype, pairs, plan.batches)
                targets.append((f"train-throughput {label}", ratios["tokens/s"], 4.0, True))
                targets.append((f"train-memory {label}", ratios["peak GB"], 0.5, False))
            if "prefill" in wanted:
                bench.compare(prefill, label, size, dtype, plan.sources, plan.new_tokens)
    for dtype, short in SHORT.items():
        if "loss" in wanted:
            ratios = bench.compare(loss, short, plan.loss_shape, dtype)
            targets.append((f"loss-memory {short}", ratios["peak GB"], 0.45, False))
            targets.append((f"loss-time {short}", ratios["seconds"], 1.0, False))
    if "growth" in wanted:
        size = next(iter(plan.sizes.values()))
        bench.compare(growth, "us a token", size, "bfloat16", plan.documents)
    for name, figure, goal, more in targets:
        met = figure >= goal if more else figure <= goal
        sign = ">=" if more else "<="
        outcome = "met" if met else "missed"
        print(f"target {name.replace(' ', '-')}: {figure:.2f} (wanted {sign} {goal}) {outcome}")
    if arguments.output:
        result = {"provenance": provenance(), "measurements": bench.measurements}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
