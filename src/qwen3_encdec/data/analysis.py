"""Measure what a data config will feed to a model, on the stream itself, before training."""

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import COUNTS, UL2Data, rows
from qwen3_encdec.data.ul2 import Preset, render
from qwen3_encdec.folders import InputError


@dataclass(frozen=True)
class Analysis:
    """Figures of a sample of the stream."""

    denoisers: Preset
    sizes: np.ndarray
    """Of every example: source length, target length, sentinels and denoiser, [examples, 4]."""
    fills: np.ndarray
    """Filled share of each row's source and target budget, [rows, 2]."""
    totals: list[tuple[str, str]]
    """Names and figures of the whole sample."""
    shown: list[str]
    """Examples as text."""
    mode_tokens: bool = False

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, one a denoiser; nominal values in brackets, lengths as mean and most."""
        header = ["Denoiser", "Examples", "Targets", "Corruption", "Source", "Target", "Sentinels"]
        lines = []
        for denoiser, (nominal, examples, targets), own in zip(
            self.denoisers, self.shares, self.of_each, strict=True
        ):
            source, target, sentinels, _ = own.T
            kept = (source - 1 - self.mode_tokens - sentinels).sum()
            noise = (target - 1 - sentinels).sum()
            lines.append(
                [
                    denoiser.name,
                    f"{examples:.1%} ({nominal:.1%})",
                    f"{targets:.1%}",
                    f"{noise / max(kept + noise, 1):.3f} ({denoiser.corruption:.2f})",
                    f"{source.mean():.0f} ≤ {source.max()}",
                    f"{target.mean():.0f} ≤ {target.max()}",
                    str(sentinels.max()),
                ]
            )
        return header, lines

    @property
    def of_each(self) -> list[np.ndarray]:
        """Sizes of the examples of each denoiser; a line of zeros where there is none."""
        numbers = range(len(self.denoisers))
        of_each = [self.sizes[self.sizes[:, 3] == number] for number in numbers]
        return [own if len(own) else np.zeros((1, 4), int) for own in of_each]

    @property
    def shares(self) -> np.ndarray:
        """Nominal share of examples, share of examples, share of target tokens, [denoisers, 3]."""
        weights = [denoiser.weight for denoiser in self.denoisers]
        of_each = [
            [w, (own[:, 0] > 0).sum(), own[:, 1].sum()] for w, own in zip(weights, self.of_each)
        ]
        return np.array(of_each) / np.sum(of_each, axis=0)

    def __str__(self) -> str:
        header, lines = self.table
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        cells = [map(str.rjust, line, widths) for line in (header, *lines)]
        totals = [f"{name:9}  {figure}" for name, figure in self.totals]
        return "\n".join([*map("  ".join, cells), *totals, *self.shown])


def analyze(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_examples: int = 10_000,
    show: int = 2,
) -> Analysis:
    """Draw about `num_examples` examples (at most one epoch) and measure them; `show` of each
    denoiser are rendered.

    Raises InputError as the stream does.
    """
    data = UL2Data(config, tokenizer)
    examples, fills, last = [], [], {}
    start = time.perf_counter()
    for row in rows(data, epochs=1):
        examples += row.examples
        filled = [(len(example.source), len(example.target)) for example in row.examples]
        fills.append(np.sum(filled, axis=0))
        last[row.stream, row.corpus] = row.position
        if len(examples) >= num_examples:
            break
    seconds = time.perf_counter() - start
    if not examples:
        raise InputError(f"there is no example in {', '.join(config.inputs)}")
    sizes = []
    for example in examples:
        sentinels = np.isin(example.source, data.sentinel_ids).sum()
        sizes.append((len(example.source), len(example.target), sentinels, example.denoiser))
    shown = []
    for number in range(len(config.denoisers)):
        own = [example for example in examples if example.denoiser == number]
        shown += [render(example, tokenizer, config.denoisers) for example in own[:show]]
    share = np.array(fills) / (config.source_length, config.target_length)
    counts = {name: sum(position[name] for position in last.values()) for name in COUNTS}
    used, refused, heldout = counts["documents"], counts["refused"], counts["heldout"]
    source, target = share.mean(axis=0)
    why = f" ({data.encode.fallback_reason})" if data.encode.fallback_reason else ""
    totals = [
        (
            "documents",
            f"{used + refused + heldout:,} = {used:,} used + {refused:,} refused + "
            f"{heldout:,} held out",
        ),
        ("tokens", f"{counts['tokens']:,} in sources and targets"),
        ("rows", f"{len(fills):,} with {len(examples):,} examples"),
        (
            "filled",
            f"{source:.1%} of the source and {target:.1%} of the target budget; the fuller one "
            f"{share.max(axis=1).mean():.1%}",
        ),
        (
            "speed",
            f"{np.sum(fills) / seconds:,.0f} tokens/s in one process, encoding with "
            f"{data.encode.name}{why}",
        ),
    ]
    return Analysis(config.denoisers, np.array(sizes), share, totals, shown, config.mode_tokens)
