"""Measure, on the stream itself, what a data config will feed to a model."""

from collections import Counter
from dataclasses import dataclass
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import COUNTS, UL2Data, rows
from qwen3_encdec.data.ul2 import Denoiser, Preset, render
from qwen3_encdec.folders import InputError


@dataclass(frozen=True)
class Analysis:
    """Statistics of a sample of the stream."""

    denoisers: Preset
    of_each: list[np.ndarray]
    """Per denoiser, [examples, 3]: source length, target length and number of sentinels."""
    totals: list[tuple[str, str]]
    """Names and values of statistics of the whole sample."""
    shown: list[str]
    """Examples as text."""

    @property
    def shares(self) -> np.ndarray:
        """Nominal share of examples, share of examples, share of target tokens, [denoisers, 3]."""
        weights = [denoiser.weight for denoiser in self.denoisers]
        examples = [len(own) for own in self.of_each]
        targets = [own[:, 1].sum() for own in self.of_each]
        found = np.array([weights, examples, targets], dtype=float)
        return (found / found.sum(axis=1, keepdims=True)).T

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and denoiser rows; nominal values in parentheses, lengths as mean and maximum."""
        header = ["Denoiser", "Examples", "Targets", "Corruption", "Source", "Target", "Sentinels"]
        parts = zip(self.denoisers, self.shares, self.of_each, strict=True)
        return header, [_line(*part) for part in parts]

    def __str__(self) -> str:
        header, lines = self.table
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        table = ["  ".join(map(str.rjust, line, widths)) for line in (header, *lines)]
        totals = [f"{name:9}  {figure}" for name, figure in self.totals]
        return "\n".join([*table, *totals, *self.shown])


def _line(denoiser: Denoiser, shares: np.ndarray, own: np.ndarray) -> list[str]:
    own = own if len(own) else np.zeros((1, 3), int)
    source, target, sentinels = own.T
    noise = (target - 1 - sentinels).sum()
    # Without EOS and sentinels.
    corruption = noise / max((source - 1 - sentinels).sum() + noise, 1)
    return [
        denoiser.name,
        f"{shares[1]:.1%} ({shares[0]:.1%})",
        f"{shares[2]:.1%}",
        f"{corruption:.3f} ({denoiser.corruption:.2f})",
        f"{source.mean():.0f} ≤ {source.max()}",
        f"{target.mean():.0f} ≤ {target.max()}",
        str(sentinels.max()),
    ]


def analyze(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_examples: int = 10_000,
    show: int = 2,
) -> Analysis:
    """Measure about `num_examples` examples (at most one epoch), and render `show` of each
    denoiser.

    Raises InputError like the stream.
    """
    data = UL2Data(config, tokenizer)
    sizes: list[list[tuple]] = [[] for _ in config.denoisers]
    shown: list[list[str]] = [[] for _ in config.denoisers]
    fills, last, is_whole = [], {}, True
    for row in rows(data, epochs=1):
        if not row.position["row"]:  # its documents are counted
            last[row.stream, row.corpus] = row.position
        made = []
        for example in row.examples:
            sentinels = np.isin(example.source, data.sentinel_ids).sum()
            made.append((len(example.source), len(example.target), sentinels))
            sizes[example.denoiser].append(made[-1])
            if len(shown[example.denoiser]) < show:
                shown[example.denoiser].append(render(example, tokenizer, config.denoisers))
        fills.append(np.sum(made, axis=0)[:2])
        if sum(map(len, sizes)) >= num_examples:
            is_whole = False
            break
    if not fills:
        raise InputError(f"there are no examples in {', '.join(config.inputs)}")
    counts = {name: sum(position[name] for position in last.values()) for name in COUNTS}
    if is_whole:  # also the documents after the last row of a stream
        documents = chain.from_iterable(corpus.documents() for corpus in data.opened)
        counts |= Counter(data.outcome(document)[0] for document in documents)
    used, refused, heldout = counts["documents"], counts["refused"], counts["heldout"]
    filled = np.array(fills) / (config.source_length, config.target_length)
    source, target = filled.mean(axis=0).tolist()
    fuller = filled.max(axis=1).mean()
    total = f"{used + refused + heldout:,} = {used:,} used + {refused:,} refused"
    budgets = f"{source:.1%} of the source and {target:.1%} of the target budget"
    totals = [
        ("documents", f"{total} + {heldout:,} held out"),
        ("tokens", f"{counts['tokens']:,} in sources and targets"),
        ("rows", f"{len(fills):,} with {sum(map(len, sizes)):,} examples"),
        ("filled", f"{budgets}; the fuller of the two {fuller:.1%}"),
    ]
    of_each = [np.array(own, int).reshape(-1, 3) for own in sizes]
    examples = [text for texts in shown for text in texts]
    return Analysis(config.denoisers, of_each, totals, examples)
