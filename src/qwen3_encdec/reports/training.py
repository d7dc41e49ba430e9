"""Parts of a page that opens anywhere, without a script: tables, in HTML and Markdown, and figures.

Figures are inline SVG whose lines and text take the page's colour, so that they follow light and
dark themes.
"""

import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"  # stands for currentColor until the SVG is written
COLORS = ("#4078c0", "#d9822b", "#2f9e79", "#b5539c", "#8f7a3a", "#7c8794", "#c2453f")
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "qwen3-encdec", "text.parse_math": False,
    "font.family": "DejaVu Sans", "font.size": 9, "lines.linewidth": 1.5, "legend.frameon": False,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=COLORS),
}  # fmt: skip
SCORES = {"mrr": "MRR", "ndcg@10": "nDCG@10", "r@1": "R@1"}
GEOMETRY = {
    "alignment": "Alignment", "uniformity": "Uniformity", "mean_cosine": "Mean cosine", "effective_rank": "Eff. rank",
}  # fmt: skip
TASKS_NOTE = (
    "Score and half the width of its 95 % interval (bootstrap over queries, texts or documents). In brackets the "
    "metric and how many answers it is made of. A needle is a passage in a text of so many words, at its start, "
    "middle or end."
)
SHOWN_EXAMPLES = 5
CSS = """
:root { color-scheme: light dark; --line: #8884; --muted: color-mix(in srgb, CanvasText 68%, Canvas) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
h1, h2, p, li, figcaption { overflow-wrap: anywhere }
p, figcaption, footer { color: var(--muted) } p { margin: .4rem 0 .8rem; max-width: 46rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; min-width: min(100%, 34rem) }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom;
  font-variant-numeric: tabular-nums } td { white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
th { font-weight: 600 } td.note { text-align: left; color: var(--muted) }
ol { font-size: .85rem; line-height: 1.4; columns: 20rem; padding-left: 1.6rem; margin: .3rem 0 }
.figures { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 1rem 0 } figcaption { font-size: .85rem; line-height: 1.4; margin-top: .3rem }
svg { width: 100%; height: auto; display: block; max-width: 34rem }
svg text { font-family: system-ui, sans-serif !important }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0 0 .8rem; font-size: .85rem }
dt { color: var(--muted) } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap }
.example { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem; margin: 1rem 0 }
.example dd { font-family: ui-monospace, monospace; font-size: .78rem; max-height: 9rem; overflow-y: auto;
  margin-bottom: .4rem }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .4rem } }
"""

Table = tuple[list[str], list[list[str]]]


def html_page(title: str, body: Sequence[str]) -> str:
    """A whole page around the lines of its body; its first heading is not added."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def retrieval_table(
    retrieval: Mapping[str, Mapping[str, float]], not_run: Mapping[str, str]
) -> Table:
    """Header and rows of the scores and geometry by embedder;

    one that was not run has its reason as the only cell.
    """
    digits = {"uniformity": ".2f", "effective_rank": ".1f"}
    rows = [
        [name, *(format(row[key], digits.get(key, ".3f")) for key in (*SCORES, *GEOMETRY))]
        for name, row in retrieval.items()
    ]
    rows += [[name, f"not run: {reason}"] for name, reason in not_run.items()]
    return ["Embedder", *SCORES.values(), *GEOMETRY.values()], rows


def tasks_table(tasks: Mapping[str, Mapping[str, Any]], not_run: Mapping[str, str]) -> Table:
    """Header and rows of the scores by task and embedder, with half the width of their 95 %
    intervals.
    """
    embedders = list(dict.fromkeys(name for task in tasks.values() for name in task["scores"]))

    def cell(score: Mapping[str, float] | None) -> str:
        if score is None:
            return "–"
        spread = (
            f" ±{(score['high'] - score['low']) / 2:.3f}".replace("±0.", "±.")
            if "low" in score
            else ""
        )
        return f"{score['score']:.3f}{spread}"

    rows = [
        [
            f"{name} ({task['metric']}, {task['size']:,})",
            *(cell(task["scores"].get(column)) for column in embedders),
        ]
        for name, task in tasks.items()
    ]
    rows += [[name, f"not run: {reason}"] for name, reason in not_run.items()]
    return ["Task", *(embedders or ["Score"])], rows


def task_figures(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Scores with their intervals, and how they change with the length of the text around a needle."""
    needles = {name: task for name, task in tasks.items() if name.startswith("needle ")}
    others = {name: task for name, task in tasks.items() if name not in needles}
    embedders = len({name for task in tasks.values() for name in task["scores"]})
    drawn = [
        (
            _draw_tasks,
            others,
            "Scores by task, with 95 % intervals.",
            0.8 + len(others) * (0.2 + 0.13 * embedders),
        ),
        (
            _draw_needles,
            needles,
            "Passages found by the length of the text around them, mean over places.",
            3.0,
        ),
    ]
    return [figure(draw, data, caption, height) for draw, data, caption, height in drawn if data]


def space_figures(space: Mapping[str, Any]) -> list[str]:
    """Cosines of some texts, a map and nearest neighbours under one embedder, as far as `space`
    holds them.
    """
    name = f" under {space['name']}" if space.get("name") else ""
    caption = f"Cosine of every two of these texts{name}; light is similar. Related texts should be light blocks."
    texts = "".join(f"<li>{escape(label)}</li>" for label in space["labels"])
    figures = [figure(_draw_similarity, space, caption, 3.8), f"<ol>{texts}</ol>"]
    if "map" in space:
        caption = f"Held-out docstrings{name}, coloured by package (t-SNE: near is alike, far says little)."
        figures.append(figure(_draw_map, space["map"], caption, 4.2))
    rows = []
    for item in space.get("neighbours", ()):
        nearest = "".join(
            f"<li>{cosine:.2f} <b>{escape(group)}</b> {escape(text)}</li>"
            for text, group, cosine in item["nearest"]
        )
        rows.append(
            f"<dt>{escape(item['package'])}</dt><dd>{escape(item['text'])}<ul>{nearest}</ul></dd>"
        )
    if rows:
        figures.append(
            f"<div><p>Nearest neighbours{escape(name)}</p><dl>{''.join(rows)}</dl></div>"
        )
    return figures


def denoising_table(denoising: Mapping[str, Mapping[str, float]]) -> Table:
    """Header and rows of the losses by denoiser."""
    names = list(dict.fromkeys(name for losses in denoising.values() for name in losses))
    rows = [
        [name, *(f"{losses[name]:.3f}" if name in losses else "–" for losses in denoising.values())]
        for name in names
    ]
    return ["Denoiser", *denoising], rows


def figure(draw: Callable[[Axes, Any], None], data: Any, caption: str, height: float) -> str:
    """A figure element: `draw(axes, data)` as inline SVG, 5 inches wide, the caption as its
    description too.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, height), layout="constrained")
        draw(figure.add_subplot(), data)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace(INK, "currentColor")
    mark = f"f{zlib.crc32(caption.encode())}-"  # ids are those of the whole page
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{mark}", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _draw_tasks(axes: Axes, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    embedders = list(dict.fromkeys(name for task in tasks.values() for name in task["scores"]))
    height = 0.8 / len(embedders)
    for j, embedder in enumerate(embedders):
        rows = [
            (i, task["scores"][embedder])
            for i, task in enumerate(tasks.values())
            if embedder in task["scores"]
        ]
        places = [i + (j - (len(embedders) - 1) / 2) * height for i, _ in rows]
        scores = [row["score"] for _, row in rows]
        spread = [
            [abs(row.get(end, row["score"]) - row["score"]) for _, row in rows]
            for end in ("low", "high")
        ]
        mark, color = "os^D"[j // len(COLORS) % 4], COLORS[j % len(COLORS)]
        axes.errorbar(
            scores, places, xerr=spread, fmt=mark, color=color, markersize=3.5, label=embedder
        )
    axes.set_yticks(range(len(tasks)), list(tasks))
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(axis="x", alpha=0.25)
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize=7)


def _draw_needles(axes: Axes, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    points: dict[str, dict[int, list[float]]] = {}
    for name, task in tasks.items():
        for embedder, row in task["scores"].items():
            points.setdefault(embedder, {}).setdefault(int(name.split()[1]), []).append(
                row["score"]
            )
    for i, (embedder, by_length) in enumerate(points.items()):
        lengths = sorted(by_length)
        means = [sum(by_length[n]) / len(by_length[n]) for n in lengths]
        axes.plot(lengths, means, "os^D"[i // len(COLORS) % 4] + "-", label=embedder, markersize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlabel("words")
    axes.set_ylim(bottom=0)
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize=7)


def _draw_map(axes: Axes, points: Mapping[str, Any]) -> None:
    groups = list(dict.fromkeys(points["groups"]))
    for group in groups:
        chosen = [
            point
            for point, own in zip(points["points"], points["groups"], strict=True)
            if own == group
        ]
        x, y = zip(*chosen, strict=True)
        axes.scatter(x, y, s=9, alpha=0.8, label=group)
    axes.set_axis_off()
    axes.set_aspect("equal", adjustable="datalim")
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=7)


def _draw_similarity(axes: Axes, similarity: Mapping[str, Any]) -> None:
    labels, matrix = similarity["labels"], similarity["matrix"]
    others = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
    image = axes.pcolormesh(
        matrix, cmap="viridis", vmin=min(others), vmax=max(others), edgecolor="face", linewidth=0.1
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    places = [i + 0.5 for i in range(len(labels))]
    names = [str(i) for i in range(1, len(labels) + 1)]
    axes.set_xticks(places, names)
    axes.set_yticks(places, names)
    axes.tick_params(length=0)
    colorbar: Any = axes.figure.colorbar(image, ax=axes, shrink=0.8, aspect=20)
    colorbar.solids.set(rasterized=False, edgecolor="face")
    colorbar.outline.set_visible(False)


def html_table(table: Table) -> str:
    """An HTML table of a header and rows; a row shorter than the header spans what is left."""
    header, rows = table
    lines = ["".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)]
    for row in rows:
        span = f' class="note" colspan="{len(header) - 1}"' if len(row) < len(header) else ""
        lines.append(
            f"<td>{escape(row[0])}</td>"
            + "".join(f"<td{span}>{escape(cell)}</td>" for cell in row[1:])
        )
    return (
        '<div class="scroll"><table>'
        + "\n".join(f"<tr>{line}</tr>" for line in lines)
        + "</table></div>"
    )


def markdown_table(table: Table) -> str:
    """The same table in Markdown."""
    header, rows = table
    rules = [":---", *["---:"] * (len(header) - 1)]
    lines = [header, rules, *(row + [""] * (len(header) - len(row)) for row in rows)]
    return "\n".join("| " + " | ".join(map(escape_markdown, line)) + " |" for line in lines)


def html_list(fields: Sequence[tuple[str, str]]) -> str:
    """A description list of (key, value)."""
    return (
        "<dl>"
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in fields)
        + "</dl>"
    )


def escape_markdown(text: str) -> str:
    """One line of text without the characters that Markdown reads."""
    return re.sub(r"([\\|<>*_`\[\]#])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A Markdown code span that whatever is in the text cannot end."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall(r"`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}"
