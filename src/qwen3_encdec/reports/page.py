"""The one look of every page: a template, a style sheet, and figures without a script.

Figures are inline SVG whose lines and text take the page's colour, so that they follow light and
dark themes. A denoiser has the same colour in every figure of every page.
"""

import io
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen3_encdec.folders import InputError

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
"""Header and rows; a row shorter than the header spans the rest of it."""


@dataclass
class Section:
    """A part of a page; empty parts of it are left out."""

    title: str
    note: str = ""
    table: Table | None = None
    figures: Sequence[str] = ()
    """HTML of `figure`, or of a template of one's own."""
    paragraphs: Sequence[str] = ()
    examples: Sequence[Sequence[tuple[str, str]]] = field(default_factory=tuple)
    """Name and text of each field of each example."""


_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
{% macro list(fields) %}
<dl>{% for key, value in fields %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% endmacro %}
{% macro table(header, rows) %}
<div class="scroll"><table>
<tr>{% for cell in header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row %}{% set rest = header|length - row|length %}
<td{% if loop.last and rest %} class="note" colspan="{{ rest + 1 }}"{% endif %}>{{ cell }}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ css }}</style></head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
{% if section.title %}<h2>{{ section.title }}</h2>{% endif %}
{% if section.note %}<p>{{ section.note }}</p>{% endif %}
{% if section.table %}{{ table(*section.table) }}{% endif %}
{% if section.figures %}<div class="figures">
{% for figure in section.figures %}{{ figure }}
{% endfor %}
</div>{% endif %}
{% for text in section.paragraphs %}<p>{{ text }}</p>
{% endfor %}
{% for example in section.examples %}<div class="example">{{ list(example) }}</div>
{% endfor %}
</section>
{% endfor %}
<footer>{% for facts in footer %}{{ list(facts) }}{% endfor %}</footer>
</body></html>
"""
)
_CSS = """
:root { color-scheme: light dark; --line: #8884;
  --muted: color-mix(in srgb, CanvasText 68%, Canvas) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto;
  padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
h1, h2, p, li, figcaption { overflow-wrap: anywhere }
p, figcaption, footer { color: var(--muted) } p { margin: .4rem 0 .8rem; max-width: 46rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; min-width: min(100%, 34rem) }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: bottom; font-variant-numeric: tabular-nums } td { white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
th { font-weight: 600 } td.note { text-align: left; color: var(--muted) }
.figures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 1rem 0 } figcaption { font-size: .85rem; line-height: 1.4; margin-top: .3rem }
svg { width: 100%; height: auto; display: block; max-width: 34rem }
svg text { font-family: system-ui, sans-serif !important }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0 0 .8rem;
  font-size: .85rem }
dt { color: var(--muted) } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap }
.example { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem; margin: 1rem 0 }
.example dd { font-family: ui-monospace, monospace; font-size: .78rem; max-height: 9rem;
  overflow-y: auto; margin-bottom: .4rem }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .4rem } }
"""


def write_page(
    file: Path,
    title: str,
    sections: Sequence[Section],
    footer: Sequence[Sequence[tuple[str, str]]] = (),
) -> None:
    """Write a page that opens anywhere and reaches for nothing; every text in it is escaped."""
    html = _PAGE.render(title=title, sections=sections, footer=footer, css=Markup(_CSS))
    file.write_text(html.lstrip(), encoding="utf-8")


def denoiser_color(name: str) -> str:
    """The colour of a denoiser, the same on every page."""
    if name in DENOISERS:
        return COLORS[DENOISERS.index(name) % len(COLORS)]
    return COLORS[zlib.crc32(name.encode()) % len(COLORS)]


def figure(draw: Callable[[Axes, Any], None], data: Any, caption: str, height: float) -> Markup:
    """A figure element: `draw(axes, data)` as inline SVG, 5 inches wide, the caption as its
    description too.
    """
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(5, height), layout="constrained")
        draw(drawn.add_subplot(), data)
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace(INK, "currentColor")
    mark = f"f{zlib.crc32(caption.encode())}-"  # ids are those of the whole page
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{mark}", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return Markup(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")


def legend(axes: Axes, columns: int = 2) -> None:
    """Name the lines below the axes, if there are several."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.figure.legend(loc="outside lower center", ncols=columns, fontsize=7)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a running or killed process half wrote is left
    out.

    Raises:
        InputError: another line is not a JSON object.
    """
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise InputError(f"{file}:{number} is not valid JSON: {error}") from None
        if not isinstance(value, Mapping):
            raise InputError(f"{file}:{number} is not a JSON object")
        found.append(dict(value))
    return found
