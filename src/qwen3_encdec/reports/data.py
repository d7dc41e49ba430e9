"""The analysis of a data config as a page: one HTML file with its figures inside and no script."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from qwen3_encdec.data.analysis import Analysis
from qwen3_encdec.reports.training import CSS, figure, html_list, html_table


def write_page(analysis: Analysis, file: Path, settings: dict[str, Any]) -> None:
    """Write the page. `settings` are listed at its foot."""
    figures = [
        (
            _draw_shares,
            "Share of the examples and of the target tokens by denoiser; ticks are nominal shares.",
            2.6,
        ),
        (
            _draw_lengths,
            "Source lengths (filled) and target lengths (outlined) of the examples, in tokens.",
            2.6,
        ),
        (_draw_spans, "Sentinels per example by denoiser.", 2.6),
        (
            _draw_positions,
            "Share of noise by position in the text. Flat lines are unbiased; S takes the end.",
            2.6,
        ),
        (_draw_fills, "Filled share of the rows' source and target budgets.", 2.6),
        (
            _draw_speed,
            "Source and target tokens made in one process; a block is made at once.",
            2.6,
        ),
    ]
    examples = "".join(
        f'<div class="example"><dl><dt></dt><dd>{escape(text)}</dd></dl></div>'
        for text in analysis.shown
    )
    drawn = "".join(figure(draw, analysis, caption, height) for draw, caption, height in figures)
    body = (
        f"<h1>What UL2 makes of the corpus</h1>{html_list(analysis.totals)}"
        f"<h2>Denoisers</h2><p>Nominal values in brackets; lengths are mean and most.</p>{html_table(analysis.table)}"
        f'<div class="figures">{drawn}</div><h2>Examples</h2>{examples}'
        f"<footer>{html_list([(name, str(value)) for name, value in settings.items()])}</footer>"
    )
    file.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>UL2 data</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>\n'
        f"<body>{body}</body></html>\n",
        encoding="utf-8",
    )


def _draw_shares(axes: Axes, analysis: Analysis) -> None:
    at = np.arange(len(analysis.denoisers))
    axes.bar(at - 0.2, [d.example_share for d in analysis.denoisers], 0.38, label="examples")
    axes.bar(at + 0.2, [d.target_share for d in analysis.denoisers], 0.38, label="target tokens")
    axes.hlines(
        [d.nominal_share for d in analysis.denoisers], at - 0.4, at, color="C6", linewidth=2
    )
    axes.set_xticks(at, [d.name for d in analysis.denoisers])
    axes.legend()


def _draw_lengths(axes: Axes, analysis: Analysis) -> None:
    bins = np.linspace(0, analysis.sizes[:, :2].max(), 40).tolist()
    axes.hist(analysis.sizes[:, 0], bins, alpha=0.6, label="source")
    axes.hist(analysis.sizes[:, 1], bins, histtype="step", label="target")
    axes.set(xlabel="tokens", ylabel="examples", yscale="log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend()


def _draw_spans(axes: Axes, analysis: Analysis) -> None:
    of_each = [analysis.sizes[analysis.sizes[:, 3] == i, 2] for i in range(len(analysis.denoisers))]
    axes.boxplot(
        [counts if len(counts) else [0] for counts in of_each], whis=(0, 100), showfliers=False
    )
    axes.set_xticks(np.arange(len(of_each)) + 1, [d.name for d in analysis.denoisers])
    axes.set_ylabel("sentinels")


def _draw_positions(axes: Axes, analysis: Analysis) -> None:
    at = (np.arange(analysis.noise_by_position.shape[1]) + 0.5) / analysis.noise_by_position.shape[
        1
    ]
    for denoiser, noise in zip(analysis.denoisers, analysis.noise_by_position, strict=True):
        axes.plot(at, noise, label=denoiser.name)
    axes.set(xlabel="position in the text", ylabel="share of noise", ylim=(0, 1.2))
    axes.legend(ncols=len(analysis.denoisers))


def _draw_fills(axes: Axes, analysis: Analysis) -> None:
    bins = np.linspace(0, 1, 41).tolist()
    axes.hist(analysis.fills[:, 0], bins, alpha=0.6, label="source")
    axes.hist(analysis.fills[:, 1], bins, alpha=0.6, label="target")
    axes.set(xlabel="filled share of the budget", ylabel="rows")
    axes.legend()


def _draw_speed(axes: Axes, analysis: Analysis) -> None:
    seconds, tokens = np.vstack([np.zeros((1, 2)), analysis.progress]).T
    axes.plot(seconds, tokens / 1e6)
    axes.set(xlabel="seconds", ylabel="M tokens", xlim=(0, None), ylim=(0, None))
