"""The page of a data config's analysis."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from qwen3_encdec.data.analysis import Analysis
from qwen3_encdec.reports import page
from qwen3_encdec.reports.page import Section, denoiser_color, figure

_EXAMPLES, _TARGETS = page.COLORS[5], page.COLORS[6]


def write_page(analysis: Analysis, file: Path, settings: dict[str, Any]) -> None:
    """Write the page; `settings` are listed at its foot."""
    drawn = [
        figure(draw, analysis, caption, 2.6)
        for draw, caption in (
            (_draw_shares, "Share of examples and of target tokens by denoiser; ticks: nominal."),
            (_draw_lengths, "Source lengths (filled) and target lengths (outlined) in tokens."),
            (_draw_spans, "Sentinels per example by denoiser."),
            (_draw_fills, "Filled share of the rows' source and target budgets."),
        )
    ]
    note = "Nominal values in brackets; lengths are mean and most."
    sections = [
        Section("", examples=[analysis.totals]),
        Section("Denoisers", note, analysis.table, drawn),
        Section("Examples", examples=[[("", text)] for text in analysis.shown]),
    ]
    footer = [[(name, str(value)) for name, value in settings.items()]]
    page.write_page(file, "What UL2 makes of the corpus", sections, footer)


def _draw_shares(axes: Axes, analysis: Analysis) -> None:
    at = np.arange(len(analysis.denoisers))
    nominal, examples, targets = analysis.shares.T
    axes.bar(at - 0.2, examples, 0.38, label="examples", color=_EXAMPLES)
    axes.bar(at + 0.2, targets, 0.38, label="target tokens", color=_TARGETS)
    axes.hlines(nominal, at - 0.4, at, color="C6", linewidth=2)
    axes.set_xticks(at, [d.name for d in analysis.denoisers])
    axes.set(xlabel="denoiser", ylabel="share")
    axes.legend()


def _draw_lengths(axes: Axes, analysis: Analysis) -> None:
    sizes = np.concatenate(analysis.of_each)
    bins = np.linspace(0, sizes[:, :2].max(), 40).tolist()
    axes.hist(sizes[:, 0], bins, alpha=0.6, label="source")
    axes.hist(sizes[:, 1], bins, histtype="step", label="target")
    axes.set(xlabel="tokens", ylabel="examples", yscale="log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend()


def _draw_spans(axes: Axes, analysis: Analysis) -> None:
    counts = [own[:, 2] if len(own) else [0] for own in analysis.of_each]
    drawn = axes.boxplot(counts, whis=(0, 100), showfliers=False, patch_artist=True)
    for box, denoiser in zip(drawn["boxes"], analysis.denoisers, strict=True):
        box.set_facecolor(denoiser_color(denoiser.name))
    axes.set_xticks(np.arange(len(counts)) + 1, [d.name for d in analysis.denoisers])
    axes.set(xlabel="denoiser", ylabel="sentinels")


def _draw_fills(axes: Axes, analysis: Analysis) -> None:
    bins = np.linspace(0, 1, 41).tolist()
    axes.hist(analysis.fills[:, 0], bins, alpha=0.6, label="source")
    axes.hist(analysis.fills[:, 1], bins, alpha=0.6, label="target")
    axes.set(xlabel="filled share of the budget", ylabel="rows")
    axes.legend()
