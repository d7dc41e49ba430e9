"""Measure what a data config will feed to a model, on the stream itself, before training."""

import sys
import time
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import COUNTS, Row, UL2Data, rows
from qwen3_encdec.data.ul2 import Example, Preset, render
from qwen3_encdec.folders import InputError


@dataclass(frozen=True)
class DenoiserReport:
    """Figures of one denoiser:

    shares of all examples and of all target tokens, lengths as (mean, most).
    """

    name: str
    nominal_share: float
    example_share: float
    target_share: float
    nominal_corruption: float
    corruption: float
    source_length: tuple[float, int]
    target_length: tuple[float, int]
    most_sentinels: int


@dataclass(frozen=True)
class Analysis:
    """Figures of a sample of the stream."""

    denoisers: list[DenoiserReport]
    counts: dict[str, int]
    """Documents read, used, refused and held out, and tokens made of them."""
    rows: int
    examples: int
    tokens_per_second: float
    """Source and target tokens from text to rows, in one process."""
    encoder: str
    """Which library, and if it is `tokenizers`, why."""
    shown: list[str]
    """Examples as text."""
    sizes: np.ndarray
    """Source length, target length, sentinels and index of the denoiser of every example, int64
    (examples, 4).
    """
    fills: np.ndarray
    """Filled share of each row's source and target budget, (rows, 2)."""

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, one a denoiser; nominal values in brackets, lengths as mean and most."""
        header = ["Denoiser", "Examples", "Targets", "Corruption", "Source", "Target", "Sentinels"]
        return header, [
            [
                d.name,
                f"{d.example_share:.1%} ({d.nominal_share:.1%})",
                f"{d.target_share:.1%}",
                f"{d.corruption:.3f} ({d.nominal_corruption:.2f})",
                *(f"{mean:.0f} ≤ {most}" for mean, most in (d.source_length, d.target_length)),
                str(d.most_sentinels),
            ]
            for d in self.denoisers
        ]

    @property
    def totals(self) -> list[tuple[str, str]]:
        """Names and figures of the whole sample."""
        number = {name: f"{count:,}" for name, count in self.counts.items()}
        became = "{documents} = {used} used + {refused} refused + {heldout} held out"
        (source, target), fuller = self.fills.mean(axis=0), self.fills.max(axis=1).mean()
        return [
            ("documents", became.format(**number)),
            ("tokens", f"{number['tokens']} in sources and targets"),
            ("rows", f"{self.rows:,} with {self.examples:,} examples"),
            (
                "filled",
                f"{source:.1%} of the source and {target:.1%} of the target budget; "
                f"the fuller one {fuller:.1%}",
            ),
            (
                "speed",
                f"{self.tokens_per_second:,.0f} tokens/s in one process, encoding with "
                f"{self.encoder}",
            ),
        ]

    def print(self, console: Console | None = None) -> None:
        """Tables for a human."""
        # 80 columns would cut the table in a pipe.
        console = console or Console(width=None if sys.stdout.isatty() else 110)
        table = Table(title="nominal values in brackets; lengths are mean ≤ most")
        header, rows = self.table
        for heading in header:
            table.add_column(heading, justify="left" if heading == "Denoiser" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for name, figure in self.totals:
            console.print(f"{name:18}  {figure}", highlight=False)
        for text in self.shown:
            console.print(Text(text))


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
    drawn: list[Row] = []
    examples: list[Example] = []
    start = time.perf_counter()
    for row in rows(data, epochs=1):
        drawn.append(row)
        examples += row.examples
        if len(examples) >= num_examples:
            break
    seconds = time.perf_counter() - start
    if not drawn:
        raise InputError(f"there is no example in {', '.join(config.inputs)}")
    sizes = np.array([_sizes(example, data) for example in examples])
    ends = np.cumsum([len(row.examples) for row in drawn])
    lengths = np.add.reduceat(sizes[:, :2], np.append(0, ends[:-1]))
    numbers = range(len(config.denoisers))
    of_each = [[e for e in examples if e.denoiser == number][:show] for number in numbers]
    reason = data.encode.fallback_reason
    lead = int(config.mode_tokens)
    return Analysis(
        denoisers=[_report(config.denoisers, number, sizes, lead) for number in numbers],
        counts=_counts(drawn),
        rows=len(drawn),
        examples=len(examples),
        tokens_per_second=float(lengths.sum() / seconds),
        encoder=data.encode.name if reason is None else f"tokenizers ({reason})",
        shown=[render(e, tokenizer, config.denoisers) for some in of_each for e in some],
        sizes=sizes,
        fills=lengths / (config.source_length, config.target_length),
    )


def _sizes(example: Example, data: UL2Data) -> tuple[int, int, int, int]:
    sentinels = int(np.isin(example.source, data.sentinel_ids).sum())
    return len(example.source), len(example.target), sentinels, example.denoiser


def _counts(drawn: list[Row]) -> dict[str, int]:
    """Add up what became of documents, out of each stream's last row."""
    last = {(row.stream, row.corpus): row.position for row in drawn}
    total = {name: sum(position[name] for position in last.values()) for name in COUNTS}
    total["used"] = total.pop("documents")
    return total | {"documents": total["used"] + total["refused"] + total["heldout"]}


def _report(preset: Preset, index: int, sizes: np.ndarray, lead: int) -> DenoiserReport:
    """Sum up a denoiser; `lead` is the number of mode tokens of a source."""
    chosen = sizes[:, 3] == index
    own = sizes[chosen, :3] if chosen.any() else np.zeros((1, 3), dtype=int)
    source, target, sentinels = own.T
    kept, noise = (source - 1 - lead - sentinels).sum(), (target - 1 - sentinels).sum()
    return DenoiserReport(
        name=preset[index].name,
        nominal_share=preset[index].weight / sum(denoiser.weight for denoiser in preset),
        example_share=float(chosen.mean()),
        target_share=float(target.sum() / sizes[:, 1].sum()),
        nominal_corruption=preset[index].corruption,
        corruption=float(noise / (kept + noise)),
        source_length=(float(source.mean()), int(source.max())),
        target_length=(float(target.mean()), int(target.max())),
        most_sentinels=int(sentinels.max()),
    )
