"""Write the page of a data config's analysis."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from qwen3_encdec.data.analysis import Analysis
from qwen3_encdec.reports import page
from qwen3_encdec.reports.page import Section, denoiser_color, figure


def write_page(analysis: Analysis, file: Path, settings: Mapping[str, Any]) -> None:
    """Write the page; `settings` are listed at the bottom."""
    figures = [
        figure(partial(_draw_shares, analysis), "Share of target tokens by denoiser."),
        figure(partial(_draw_lengths, analysis), "Lengths of examples."),
    ]
    note = "Nominal values in parentheses; lengths as mean ≤ maximum."
    sections = [
        Section("", fields=[analysis.totals]),
        Section("Denoisers", note, analysis.table, figures),
        Section("Examples", fields=[[("", text) for text in analysis.shown]]),
        Section("Settings", fields=[[(name, str(value)) for name, value in settings.items()]]),
    ]
    page.write_page(file, "UL2 data analysis", sections)


def _draw_shares(analysis: Analysis, axes: Axes) -> None:
    for denoiser, (_, _, share) in zip(analysis.denoisers, analysis.shares, strict=True):
        axes.bar(denoiser.name, share, color=denoiser_color(denoiser.name))
    axes.set(xlabel="denoiser", ylabel="share of target tokens")


def _draw_lengths(analysis: Analysis, axes: Axes) -> None:
    sizes = np.concatenate(analysis.of_each)
    axes.hist(sizes[:, :2], 40, histtype="step", label=["source", "target"])
    axes.set(xlabel="tokens", ylabel="examples", yscale="log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
