"""Shared rendering of all pages: a template, a style sheet, and inline SVG figures.

Lines and text of a figure inherit the page's color, so that they follow light and dark themes. A
denoiser has the same color in every figure of every page.
"""

import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"  # stands for currentColor until the SVG is written
COLORS = ("#4078c0", "#d9822b", "#2f9e79", "#b5539c", "#8f7a3a", "#7c8794", "#c2453f")
DENOISERS = ("R1", "R2", "X1", "X2", "S", "R", "X")
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "qwen3-encdec", "text.parse_math": False,
    "font.family": "DejaVu Sans", "font.size": 9, "lines.linewidth": 1.5, "legend.frameon": False,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "axes.prop_cycle": cycler(color=COLORS),
}  # fmt: skip
Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


@dataclass
class Section:
    """A part of a page; empty fields are left out."""

    title: str
    note: str = ""
    table: Table | None = None
    figures: Sequence[Markup] = ()
    fields: Sequence[Sequence[tuple[str, str]]] = ()
    """One list per example or run."""


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("qwen3_encdec", "reports"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(file: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a self-contained page; every text in it is escaped."""
    html = _TEMPLATES.get_template("page.html").render(title=title, sections=sections)
    file.write_text(html, encoding="utf-8")


def grid(corner: str, columns: Mapping[str, Mapping[str, str]]) -> Table:
    """Build a table from cells by column and row, in the order of their first appearance."""
    rows = dict.fromkeys(row for cells in columns.values() for row in cells)
    return [corner, *columns], [
        [row, *(cells.get(row, "–") for cells in columns.values())] for row in rows
    ]


def transpose(table: Table) -> Table:
    """Turn columns into rows."""
    header, *rows = map(list, zip(table[0], *table[1], strict=True))
    return header, rows


def denoiser_color(name: str) -> str:
    """Return the color of a denoiser, the same on every page."""
    known = name in DENOISERS
    return COLORS[(DENOISERS.index(name) if known else zlib.crc32(name.encode())) % len(COLORS)]


def figure(draw: Callable[[Axes], None], caption: str) -> Markup:
    """Render what `draw` plots on the axes as a figure element: inline SVG with a caption."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(5, 2.7), layout="constrained")
        axes = drawn.add_subplot()
        draw(axes)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            drawn.legend(loc="outside lower center", ncols=2, fontsize=7)
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace(INK, "currentColor")
    prefix = f"f{zlib.crc32(caption.encode())}-"  # ids must be unique on the whole page
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return Markup(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>\n")
