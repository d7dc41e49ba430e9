"""Ours against transformers' T5Gemma 2 at the same text dimensions, side by side in one run.

    python bench/model.py            # 3 rounds, half an hour on 2 cores with nothing beside it; Linux
    python bench/model.py --quick    # the same stages at toy size, in seconds: tests this script, measures nothing

| stage  | what is measured                                                                                          |
|--------|-----------------------------------------------------------------------------------------------------------|
| train  | steps (forward, backward, fused AdamW) over several batches of UL2 examples: real tokens/s, peak memory   |
| decode | greedy generation of a batch of 4: source tokens/s up to the first token, target tokens/s after it        |
| loss   | hidden states to gradients over the large vocabulary: seconds and peak memory                             |
| share  | seconds of a training step inside and outside matrix products                                             |
| growth | seconds a token as documents grow, tokens a step constant                                                 |
| packed | seconds a token as rows grow and documents do not (ours only)                                             |

What makes it fair:

- Same dimensions, layers, heads, vocabulary, activation, precision, threads, optimizer, labels;
  SDPA and full attention on both sides; parameter counts within 1 % (checked). T5Gemma 2's two
  further norms a layer are its design and stay.
- Same UL2 examples of package-docs (R1, R2, X1, X2, S as 1:1:1:1:4), shuffled. T5Gemma 2 gets them
  as its users make batches, one example a row, padded to the longest; ours packs the examples of
  the same batch. Tokens are real tokens, padding is not counted. `theirs-grouped` sorts the
  examples by length before they are cut into batches.
- Every measurement has a process of its own, ours and theirs take turns, a ratio is that of the
  medians over rounds. While decoding, both processes stay and have twice as many turns, of seconds
  each: what else a shared host does to the memory's speed, for minutes at a time, then happens to
  both.
- Peak memory is the high-water mark of resident memory over all steps, above what stands there
  before the first one (weights). Before that, libraries and kernels are loaded by a few tokens,
  freed memory is handed back and the mark is reset.
- Matrix products are the profiler's own time of mm, addmm, bmm, baddbmm, fused scaled-dot-product
  attention (softmax and all) and oneDNN linear kernels, forward and backward; outside is the
  unprofiled step less that.
"""

import argparse
import ctypes
import gc
import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

SOURCE_LENGTH, TARGET_LENGTH = 512, 256  # of a row, as package-docs is trained on by default
MATMUL = re.compile(
    r"(aten|mkldnn)::(mm|addmm|bmm|baddbmm|_scaled_dot_product_\w+|_linear_pointwise|mkldnn_linear\w*)"
)
SHORT = {"bfloat16": "bf16", "float32": "fp32"}

Pair = tuple[Any, Any]  # source and target ids, int64 arrays
Figures = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    sizes: dict[str, dict[str, int]]
    ranks: dict[
        str, int | None
    ]  # of the tokenizer that fits each size's vocabulary; None is all of Qwen3's
    examples: dict[str, int]  # in a training batch
    batches: int
    sources: tuple[int, int]  # of decoding
    new_tokens: int
    loss_shape: tuple[int, int, int]  # tokens, hidden size, classes
    documents: tuple[
        int, ...
    ]  # source lengths of `growth` and row lengths of `packed`; targets are a quarter
    steps: int  # timed, of `growth` and `packed`
    rounds: int


FULL = Plan(
    sizes={
        "small": {
            "hidden_size": 256,
            "layers": 6,
            "vocab_size": 16_000,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 96,
        },
        "wide": {
            "hidden_size": 1024,
            "layers": 2,
            "vocab_size": 152_036,
            "heads": 16,
            "kv_heads": 8,
            "head_dim": 128,
        },
    },
    ranks={"small": 15_000, "wide": None},
    examples={"small": 32, "wide": 8},
    batches=4,
    sources=(512, 4096),
    new_tokens=33,
    loss_shape=(2048, 1024, 152_036),
    documents=(256, 512, 1024, 2048, 4096),
    steps=1,
    rounds=3,
)
QUICK = Plan(
    sizes={
        "tiny": {
            "hidden_size": 32,
            "layers": 2,
            "vocab_size": 800,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
        }
    },
    ranks={"tiny": 600},
    examples={"tiny": 4},
    batches=2,
    sources=(16, 48),
    new_tokens=3,
    loss_shape=(64, 32, 800),
    documents=(16, 32, 64),
    steps=1,
    rounds=1,
)


# ---- the two models and their batches


def our_model(size: dict[str, int], dtype: str):
    """Our encoder-decoder with random weights."""
    import torch

    from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM

    config = Qwen3EncoderDecoderConfig(
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
    return Qwen3ForSeq2SeqLM._from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )


def their_model(size: dict[str, int], dtype: str):
    """T5Gemma 2 with the same text dimensions, full attention in every layer, and next to no vision
    tower.
    """
    import torch
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
        "hidden_activation": "silu",
        "layer_types": ["full_attention"] * size["layers"],
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = T5Gemma2Config(
        encoder={"text_config": text, "vision_config": {**vision, "image_size": 28, "patch_size": 14},
                 "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5},
        decoder=text, image_token_index=5, dropout_rate=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = T5Gemma2ForConditionalGeneration._from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model.generation_config.decoder_start_token_id = 2
    return model


def make_model(side: str, size: dict[str, int], dtype: str, device: str = "cpu"):
    """The model of a side ("ours", or anything that begins with "theirs"), seeded."""
    import torch

    torch.manual_seed(0)
    with torch.device(device):
        return (our_model if side == "ours" else their_model)(size, dtype)


def read_examples(vocab_size: int, ranks: int | None, number: int) -> list[Pair]:
    """UL2 examples of package-docs, a random choice from the first 2,048 of the stream."""
    import numpy as np

    from qwen3_encdec.data.config import DataConfig
    from qwen3_encdec.data.stream import UL2Stream
    from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

    tokenizer = build_tokenizer(num_ranks=ranks)
    assert len(tokenizer) <= vocab_size
    config = DataConfig(source_length=SOURCE_LENGTH, target_length=TARGET_LENGTH, packing=False)
    rows = list(itertools.islice(UL2Stream(config, tokenizer), 2048))
    chosen = np.random.default_rng(0).permutation(len(rows))[:number]
    return [(example.source, example.target) for (example,) in (rows[i] for i in chosen)]


def make_batches(
    side: str, pairs: list[Pair], number: int, budget: Pair = (SOURCE_LENGTH, TARGET_LENGTH)
) -> list[dict]:
    """`number` training batches of all the pairs:

    packed for us; for them one pair a row, padded to the longest.
    """
    from qwen3_encdec.data.collate import collate, pack
    from qwen3_encdec.data.ul2 import Example

    if side == "theirs-grouped":
        pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = []
    for start in range(0, len(pairs), len(pairs) // number):
        found = [
            Example(source, target, 0)
            for source, target in pairs[start : start + len(pairs) // number]
        ]
        batch = collate(
            pack(found, *budget) if side == "ours" else [[example] for example in found], pad_id=0
        )
        del batch["denoiser"]
        batches.append(batch)
    return batches


def random_pairs(source: int, target: int, number: int, vocab_size: int) -> list[Pair]:
    """Pairs of random ids, all of one length."""
    import numpy as np

    ids = np.random.default_rng(0).integers(10, vocab_size, (number, source + target))
    return [(row[:source], row[source:]) for row in ids]


def count_tokens(pairs: list[Pair]) -> int:
    """Source and target tokens together."""
    return sum(len(source) + len(target) for source, target in pairs)


# ---- the stages


class Trainer:
    """A model, its optimizer and one training step, warmed up on a few tokens."""

    def __init__(self, side: str, size: dict[str, int], dtype: str, device: str = "cpu"):
        import torch

        self.device = device
        # Ours reads on the CPU how rows are divided.
        self.kept = ("attention_mask", "decoder_attention_mask") if side == "ours" else ()
        self.model = make_model(side, size, dtype, device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        (self.few,) = make_batches(side, random_pairs(8, 4, 2, size["vocab_size"]), 1)
        self.model(**{name: value.to(device) for name, value in self.few.items()}).loss.backward()
        self.optimizer.zero_grad()

    def step(self, batch: dict) -> float:
        """One step; its seconds."""
        batch = {
            name: value if name in self.kept else value.to(self.device)
            for name, value in batch.items()
        }
        synchronize(self.device)
        began = time.perf_counter()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        return time.perf_counter() - began


def train(
    side: str, size: dict[str, int], dtype: str, pairs: list[Pair], number: int, device: str = "cpu"
) -> Figures:
    """Real tokens per second over all batches, and the peak memory of a step in GB."""
    batches = make_batches(side, pairs, number)
    trainer = Trainer(side, size, dtype, device)
    if device != "cpu":  # kernels are tuned for a shape on first use
        for batch in batches:
            trainer.step(batch)
        trainer.optimizer.state.clear()
    start = reset_peak(device)
    trainer.step(trainer.few)  # makes AdamW's states
    seconds = sum(trainer.step(batch) for batch in batches)
    return {"tokens/s": count_tokens(pairs) / seconds, "peak GB": (peak(device) - start) / 1e9}


@lru_cache(1)
def ready_to_decode(
    side: str, size: tuple, dtype: str, sources: tuple[int, ...], new_tokens: int, device: str
):
    """A model that has generated once:

    the first time it meets memory that nobody has touched, and loads kernels.
    """
    model = make_model(side, dict(size), dtype, device).eval()
    for source in sources:
        generate(model, 4, source, new_tokens)
    return model


def decode(
    side: str,
    size: dict[str, int],
    dtype: str,
    sources: tuple[int, ...],
    new_tokens: int,
    device: str = "cpu",
) -> Figures:
    """Greedy tokens per second of a batch of 4 after the first token, and source tokens per second
    up to it.
    """
    model = ready_to_decode(side, tuple(size.items()), dtype, sources, new_tokens, device)
    figures = {}
    for source in sources:
        first, rest = generate(model, 4, source, new_tokens)
        figures[f"prefill tokens/s @{source}"] = 4 * source / first
        figures[f"decode tokens/s @{source}"] = 4 * (new_tokens - 1) / rest
    return figures


def generate(model, batch: int, source: int, new_tokens: int, **options) -> tuple[float, float]:
    """Greedy generation after random sources;

    seconds up to the first token, and from there to the last.
    """
    import torch
    from transformers import StoppingCriteria

    times = [0.0]

    class Clock(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            synchronize(input_ids.device.type)
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids = torch.randint(
        10, model.get_input_embeddings().num_embeddings, (batch, source), device=model.device
    )
    synchronize(ids.device.type)
    times[0] = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens, stopping_criteria=[Clock()], **options,
    )  # fmt: skip
    assert len(times) == new_tokens + 1
    return times[1] - times[0], times[-1] - times[1]


def loss(side: str, shape: tuple[int, int, int], dtype: str, device: str = "cpu") -> Figures:
    """Seconds and peak GB from hidden states to gradients.

    "theirs" is one product and one fp32 cross-entropy, "ours" the chunked loss; any other side is a
    `loss_implementation` of ours.
    """
    import torch

    from qwen3_encdec.modeling_qwen3_encdec import linear_cross_entropy

    tokens, width, classes = shape
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=getattr(torch, dtype), device=device).requires_grad_()
    weight = (
        torch.randn(classes, width, dtype=hidden.dtype, device=device).mul_(0.02).requires_grad_()
    )
    labels = torch.randint(0, classes, (tokens,), device=device)

    def step(number: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        if side == "theirs":  # as transformers' ForMaskedLMLoss
            logits = torch.nn.functional.linear(hidden[:number], weight)
            value = torch.nn.functional.cross_entropy(logits.float(), labels[:number])
        else:
            implementation = "chunked" if side == "ours" else side
            value = linear_cross_entropy(implementation, hidden[:number], weight, labels[:number])[
                0
            ]
        value.backward()
        hidden.grad = weight.grad = None
        synchronize(device)
        return time.perf_counter() - began

    step(8)
    if device != "cpu":  # kernels are tuned for a shape on first use
        step(tokens)
    start = reset_peak(device)
    return {"seconds": step(tokens), "peak GB": (peak(device) - start) / 1e9}


def share(side: str, size: dict[str, int], dtype: str, pairs: list[Pair]) -> Figures:
    """Seconds of a training step inside and outside matrix products, and the share of the latter."""
    from torch.profiler import ProfilerActivity, profile

    (batch,) = make_batches(side, pairs, 1)
    trainer = Trainer(side, size, dtype)
    trainer.step(trainer.few)  # makes AdamW's states
    seconds = trainer.step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.step(batch)
    events = profiler.key_averages()
    inside = sum(event.self_cpu_time_total for event in events if MATMUL.fullmatch(event.key)) / 1e6
    outside = seconds - inside
    return {
        "inside matmuls, s": inside,
        "outside matmuls, s": outside,
        "outside / all": outside / seconds,
    }


def growth(
    side: str, size: dict[str, int], dtype: str, documents: tuple[int, ...], steps: int
) -> Figures:
    """Microseconds a token of training steps on full rows of one document each, by source length."""
    return _by_length(
        side, size, dtype, [(source, source) for source in documents], documents[-1], steps
    )


def packed(
    side: str, size: dict[str, int], dtype: str, documents: tuple[int, ...], steps: int
) -> Figures:
    """Microseconds a token of training steps on the shortest documents, by the length of the rows
    that hold them.
    """
    rows = sorted({documents[0], documents[len(documents) // 2], documents[-1]})
    return _by_length(
        side, size, dtype, [(row, documents[0]) for row in rows], documents[-1], steps
    )


def _by_length(side, size, dtype, shapes, tokens, steps) -> Figures:
    trainer = Trainer(side, size, dtype)
    batches, seconds = {}, {}
    for row, source in shapes:
        pairs = random_pairs(source, source // 4, tokens // source, size["vocab_size"])
        batches[row] = make_batches(side, pairs, 1, (row, row // 4))[0]
        seconds[row] = [trainer.step(batches[row])]
    for _ in range(steps):  # in turn, so that drift hits all lengths
        for row, batch in batches.items():
            seconds[row].append(trainer.step(batch))
    return {
        str(row): 1e6 * statistics.mean(times[1:]) / (tokens + tokens // 4)
        for row, times in seconds.items()
    }


def synchronize(device: str) -> None:
    """Wait for a GPU, so that a clock read afterwards is true."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str = "cpu") -> int:
    """Hand freed memory back, lower the high-water mark to what is held now, and return that in
    bytes.
    """
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def peak(device: str = "cpu") -> int:
    """High-water mark of memory since `reset_peak`, in bytes."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else _memory("VmHWM")


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


# ---- taking turns, and what is printed and written


@contextmanager
def own_process() -> Iterator[Callable[..., Figures]]:
    """A function that runs stages in a fork of a process that has imported everything and computed
    nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["qwen3_encdec", "transformers.models.t5gemma2.modeling_t5gemma2"]
    )
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield lambda stage, *arguments: pool.submit(stage, *arguments).result()


def in_own_process(stage: Callable[..., Figures], *arguments) -> Figures:
    """Run one stage in a process of its own."""
    with own_process() as run_stage:
        return run_stage(stage, *arguments)


class Bench:
    """Runs stages, prints a line for each figure, and keeps what the results file will hold."""

    def __init__(self, rounds: int, run: Callable[..., Figures]):
        self.rounds, self.run = rounds, run
        self.measurements: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []

    def compare(
        self,
        stage: Callable[..., Figures],
        label: str,
        *arguments,
        sides=("ours", "theirs"),
        rounds: int | None = None,
        stay: bool = False,
    ) -> Figures:
        """Run a stage for each side in turn; ours / theirs of the medians over rounds, by figure.

        With `stay`, a side has one process for all its turns.
        """
        figures: dict[str, list[Figures]] = {side: [] for side in sides}
        with ExitStack() as stack:
            runs = {
                side: stack.enter_context(own_process()) if stay else self.run for side in sides
            }
            for _ in range(rounds or self.rounds):
                for side in sides:
                    figures[side].append(runs[side](stage, side, *arguments))
        ratios = {}
        for name in figures[sides[0]][0]:
            values = {side: [figure[name] for figure in figures[side]] for side in sides}
            medians = {side: statistics.median(found) for side, found in values.items()}
            entry: dict[str, Any] = {
                "stage": stage.__name__,
                "of": label,
                "figure": name,
                "values": values,
            }
            line = f"{stage.__name__:<6} {label:<11} {name:<24}" + "".join(
                f"  {side} {_digits(median)}" for side, median in medians.items()
            )
            if "theirs" in sides:
                each = [a / b for a, b in zip(values["ours"], values["theirs"], strict=True)]
                ratios[name] = medians["ours"] / medians["theirs"]
                entry["ours / theirs"] = {
                    "min": min(each),
                    "of medians": ratios[name],
                    "max": max(each),
                }
                line += f"  ours / theirs {min(each):.2f} | {ratios[name]:.2f} | {max(each):.2f}"
            else:
                ratios[name] = medians["ours"]
            self.measurements.append(entry)
            print(line, flush=True)
        return ratios

    def target(self, name: str, figure: float, wanted: float, more_is_better: bool) -> None:
        """Hold a ratio against what it should be."""
        met = figure >= wanted if more_is_better else figure <= wanted
        sign = ">=" if more_is_better else "<="
        self.targets.append(
            {
                "name": name.replace(" ", "-"),
                "figure": figure,
                "wanted": f"{sign} {wanted}",
                "met": met,
            }
        )

    def median(self, stage: str, side: str) -> dict[int, float]:
        """Medians of a stage whose figures are named by a length."""
        found = [entry for entry in self.measurements if entry["stage"] == stage]
        return {int(entry["figure"]): statistics.median(entry["values"][side]) for entry in found}


def _digits(value: float) -> str:
    return f"{value:>10,.0f}" if value >= 100 else f"{value:>10.3f}"


def run(plan: Plan, bench: Bench, stages: set[str]) -> None:
    """Every stage that is asked for."""
    pairs: dict[str, list[Pair]] = {}
    if stages & {"train", "share"}:
        for name, size in plan.sizes.items():
            pairs[name] = read_examples(
                size["vocab_size"], plan.ranks[name], plan.batches * plan.examples[name]
            )
            batches = make_batches("theirs", pairs[name], plan.batches)
            places = sum(batch["input_ids"].numel() + batch["labels"].numel() for batch in batches)
            tokens = count_tokens(pairs[name])
            print(
                f"{name}: {plan.batches} batches of {plan.examples[name]} UL2 examples, {tokens:,} tokens, "
                f"{tokens / places:.0%} of the places when padded to the longest"
            )
    check_same_size(plan)
    for dtype, (name, size) in itertools.product(SHORT, plan.sizes.items()):
        label = f"{name} {SHORT[dtype]}"
        if "train" in stages:
            grouped = label.split() == [
                next(iter(plan.sizes)),
                "bf16",
            ]  # once is enough, it is for information
            sides = ("ours", "theirs", "theirs-grouped") if grouped else ("ours", "theirs")
            ratios = bench.compare(
                train, label, size, dtype, pairs[name], plan.batches, sides=sides
            )
            bench.target(f"train-throughput {label}", ratios["tokens/s"], 2.0, True)
            bench.target(f"train-memory {label}", ratios["peak GB"], 0.5, False)
        if "decode" in stages:
            turns = 2 * bench.rounds
            ratios = bench.compare(
                decode, label, size, dtype, plan.sources, plan.new_tokens, rounds=turns, stay=True
            )
            for source, wanted in zip(plan.sources, (1.3, 1.6), strict=True):
                bench.target(
                    f"decode-{source} {label}", ratios[f"decode tokens/s @{source}"], wanted, True
                )
    if "loss" in stages:
        for dtype, short in SHORT.items():
            ratios = bench.compare(loss, short, plan.loss_shape, dtype)
            bench.target(f"loss-memory {short}", ratios["peak GB"], 0.45, False)
            bench.target(f"loss-time {short}", ratios["seconds"], 1.0, False)
    if "share" in stages:
        for name, size in plan.sizes.items():
            one_batch = pairs[name][: plan.examples[name]]
            bench.compare(share, f"{name} bf16", size, "bfloat16", one_batch, rounds=1)
    size = next(iter(plan.sizes.values()))
    if "growth" in stages:
        bench.compare(growth, "us a token", size, "bfloat16", plan.documents, plan.steps)
    if "packed" in stages:
        times = bench.compare(
            packed, "us a token", size, "bfloat16", plan.documents, plan.steps, sides=("ours",)
        )
        bench.target(
            "packed-slowest/fastest", max(times.values()) / min(times.values()), 1.15, False
        )


def check_same_size(plan: Plan) -> None:
    """Stop if the models differ by more than 1 % in parameters, the vision tower that text never
    passes left out.
    """
    for label, size in plan.sizes.items():
        counts = []
        for side in ("ours", "theirs"):
            named = make_model(side, size, "float32", "meta").named_parameters()
            counts.append(
                sum(
                    p.numel()
                    for name, p in named
                    if "vision" not in name and "multi_modal" not in name
                )
            )
        print(f"{label}: {counts[0]:,} parameters, theirs {counts[1]:,}")
        assert abs(counts[1] / counts[0] - 1) < 0.01, f"{label}: not the same size"


def curves(bench: Bench) -> dict[str, dict[int, float]]:
    """Microseconds a token by length."""
    return {
        "T5Gemma 2, one document a row": bench.median("growth", "theirs"),
        "ours, one document a row": bench.median("growth", "ours"),
        f"ours, rows of {min(bench.median('packed', 'ours'))}-token documents": bench.median(
            "packed", "ours"
        ),
    }


def print_plot(lines: dict[str, dict[int, float]], width: int = 60) -> None:
    """Bars of microseconds a token."""
    longest = max(max(line.values()) for line in lines.values())
    for name, line in lines.items():
        print(f"\nmicroseconds a token by source length of the row: {name}")
        for length, value in line.items():
            print(f"{length:>6} {'#' * max(1, round(width * value / longest))} {value:.1f}")


def save_plot(lines: dict[str, dict[int, float]], path: Path, title: str) -> None:
    """The same as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, line in lines.items():
        axes.plot(list(line), list(line.values()), marker="o", label=name)
    lengths = sorted({length for line in lines.values() for length in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("source tokens in a row")
    axes.set_ylabel("microseconds a token, training step")
    axes.set_title(title, fontsize="medium")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def environment() -> dict[str, Any]:
    """What a figure needs beside it: commit, versions, hardware."""
    import torch

    from qwen3_encdec.folders import package_versions

    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "commit": described.stdout.strip() or "not a git checkout",
        "versions": {"python": platform.python_version(), **package_versions()},
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory GB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
    }


def slug(name: str) -> str:
    """A name for a file: Intel(R) Xeon(R) Processor -> intel-xeon-processor."""
    return re.sub(r"\W+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def main() -> None:
    """Measure everything asked for, write it down, and compare with the targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["train", "decode", "loss", "share", "growth", "packed"]
    parser.add_argument("--quick", action="store_true", help="toy size; the figures mean nothing")
    parser.add_argument("--rounds", type=int, help="how often each side has its turn")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="STAGE", help="some stages; nothing is written"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for the results",
    )
    args = parser.parse_args()
    plan, suffix = (QUICK, "-quick") if args.quick else (FULL, "")
    bench, described, began = (
        Bench(args.rounds or plan.rounds, in_own_process),
        environment(),
        time.time(),
    )
    print(json.dumps(described))
    run(plan, bench, set(args.only or names))
    minutes = round((time.time() - began) / 60, 1)
    print(f"{minutes} minutes")
    if not args.only:
        from qwen3_encdec.folders import write_json

        lines, path = curves(bench), args.output / f"model-{slug(described['cpu'])}{suffix}.json"
        print_plot(lines)
        args.output.mkdir(parents=True, exist_ok=True)
        title = f"{described['cpu']}, {described['threads']} threads, bf16"
        save_plot(lines, args.output / f"cost-growth{suffix}.png", title)
        found = {"measurements": bench.measurements, "targets": bench.targets}
        write_json(path, {**described, "rounds": bench.rounds, "minutes": minutes, **found})
        print(f"\nwrote {path}")
    for target in bench.targets:
        verdict = "met" if target["met"] else "missed"
        print(
            f"target {target['name']}: {target['figure']:.2f}x (wanted {target['wanted']}x) {verdict}"
        )


if __name__ == "__main__":
    main()
