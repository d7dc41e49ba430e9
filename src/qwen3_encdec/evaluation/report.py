"""Metrics to a report that opens anywhere: one HTML file with its figures inside and no script, and Markdown.

Figures are inline SVG whose lines and text take the page's colour, so that they follow light and dark themes.
"""

import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
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
SHOWN_EXAMPLES = 5
CSS = """
:root { color-scheme: light dark; --line: #8884; --muted: color-mix(in srgb, CanvasText 68%, Canvas) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p, figcaption, footer { color: var(--muted) } p { margin: .4rem 0 .8rem; max-width: 46rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; min-width: min(100%, 34rem) }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums } th:first-child, td:first-child { text-align: left; padding-left: 0 }
th { font-weight: 600 } td.note { text-align: left; color: var(--muted) }
ol { font-size: .85rem; line-height: 1.4; columns: 20rem; padding-left: 1.6rem; margin: .3rem 0 }
.figures { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 1rem 0 } figcaption { font-size: .85rem; line-height: 1.4; margin-top: .3rem }
svg { width: 100%; height: auto; display: block; max-width: 34rem }
svg text { font-family: system-ui, sans-serif !important }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0 0 .8rem; font-size: .85rem }
dt { color: var(--muted) } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap }
.example { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem; margin: 1rem 0 }
.example dd { font-family: ui-monospace, monospace; font-size: .78rem; max-height: 9rem; overflow-y: auto }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .4rem } }
"""

Table = tuple[list[str], list[list[str]]]


def write_report(
    output_dir: Path,
    metrics: Mapping[str, Any],
    *,
    curves: Sequence[Mapping[str, Any]] | None = None,
    similarity: Mapping[str, Any] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
    title: str = "Evaluation",
) -> None:
    """Write report.html and report.md into an existing folder; a part without data is left out.

    Args:
        output_dir: Both files are replaced.
        metrics: What `evaluate` returns: `denoising`, `retrieval`, `num_queries`, `num_documents`, `not_run`,
            `infill`, `provenance`, any of them absent.
        curves: The lines of a run's metrics.jsonl.
        similarity: `labels` and the square `matrix` of their cosines, optionally the embedder's `name`.
        examples: Infilled examples; by default those of `metrics`.
        title: Of the page.
    """
    sections: list[tuple[str, str, Table | None, list[str]]] = []  # heading, explanation, table, figures
    if retrieval := metrics.get("retrieval"):
        note = (
            f"{metrics['num_queries']:,} summary lines of docstrings, each looking for its body among "
            f"{metrics['num_documents']:,} of held-out packages. Ties count against the model. Lower is better for "
            "alignment, uniformity and mean cosine; higher for the rest."
        )
        charts = [_figure(_draw_scores, retrieval, "Retrieval scores by embedder; longer bars are better.", 4.6)]
        sections.append(
            ("Retrieval and geometry", note, retrieval_table(retrieval, metrics.get("not_run", {})), charts)
        )
    if similarity:
        name = f" under {similarity['name']}" if similarity.get("name") else ""
        caption = f"Cosine of every two of these texts{name}; light is similar. Related texts should be light blocks."
        texts = "".join(f"<li>{escape(label)}</li>" for label in similarity["labels"])
        sections.append(
            ("Similarity", "", None, [_figure(_draw_similarity, similarity, caption, 3.8), f"<ol>{texts}</ol>"])
        )
    denoising = metrics.get("denoising")
    charts = _curve_figures(curves) if curves else []
    if denoising:
        charts = [
            _figure(_draw_denoising, denoising, "Held-out loss by denoiser; shorter bars are better.", 2.7),
            *charts,
        ]
    if charts:
        note = "Mean loss on held-out text, in nats per target token; lower is better." if denoising else ""
        sections.append(("Denoising", note, denoising_table(denoising) if denoising else None, charts))
    infill = metrics.get("infill", {})
    shown = list(infill.get("examples", []) if examples is None else examples)[:SHOWN_EXAMPLES]
    rate = infill.get("exact_rate")
    infilled = (
        "" if rate is None else f"{rate:.1%} of the gaps are filled with exactly the tokens of the text, greedily."
    )
    provenance = _flatten(metrics.get("provenance", {}))

    html = [f"<h1>{escape(title)}</h1>"]
    markdown = [f"# {_cell(title)}"]
    for heading, note, table, figures in sections:
        html += [f"<section><h2>{heading}</h2>", f"<p>{escape(note)}</p>" if note else ""]
        if table:
            html.append(_html_table(table))
            markdown += [f"## {heading}", note, _markdown_table(table)]
        html += ['<div class="figures">', *figures, "</div></section>"]
    if shown or infilled:
        html += ["<section><h2>Infilling</h2>", f"<p>{infilled}</p>"]
        markdown += ["## Infilling", infilled]
        for example in shown:
            fields = [(key, str(example[key])) for key in ("source", "expected", "generated") if key in example]
            html.append('<div class="example">' + _html_list(fields) + "</div>")
            markdown.append("\n".join(f"- {key}: {_code(value)}" for key, value in fields))
        html.append("</section>")
    if provenance:
        html.append("<footer>" + _html_list(provenance) + "</footer>")
        markdown += ["## Provenance", "\n".join(f"- {_cell(key)}: {_code(value)}" for key, value in provenance)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n"
    )
    (output_dir / "report.html").write_text(page + "\n".join(html) + "\n</body></html>\n", encoding="utf-8")
    (output_dir / "report.md").write_text("\n\n".join(markdown) + "\n", encoding="utf-8")


def retrieval_table(retrieval: Mapping[str, Mapping[str, float]], not_run: Mapping[str, str]) -> Table:
    """Header and rows of the scores and geometry by embedder; one that was not run has its reason as the only cell."""
    digits = {"uniformity": ".2f", "effective_rank": ".1f"}
    rows = [
        [name, *(format(row[key], digits.get(key, ".3f")) for key in (*SCORES, *GEOMETRY))]
        for name, row in retrieval.items()
    ]
    rows += [[name, f"not run: {reason}"] for name, reason in not_run.items()]
    return ["Embedder", *SCORES.values(), *GEOMETRY.values()], rows


def denoising_table(denoising: Mapping[str, Mapping[str, float]]) -> Table:
    """Header and rows of the losses by denoiser."""
    names = list(dict.fromkeys(name for losses in denoising.values() for name in losses))
    rows = [
        [name, *(f"{losses[name]:.3f}" if name in losses else "–" for losses in denoising.values())] for name in names
    ]
    return ["Denoiser", *(label.capitalize() for label in denoising)], rows


def _figure(draw: Callable[[Axes, Any], None], data: Any, caption: str, height: float) -> str:
    """A figure element: `draw(axes, data)` as inline SVG, 5 inches wide, the caption as its description too."""
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


def _draw_scores(axes: Axes, retrieval: Mapping[str, Mapping[str, float]]) -> None:
    for offset, (key, label) in enumerate(SCORES.items()):
        values = [row[key] for row in retrieval.values()]
        places = [i + (offset - 1) * 0.26 for i in range(len(values))]
        axes.barh(places, values, height=0.24, label=label, color=COLORS[offset])
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {value:.2f}", va="center", fontsize=7)
    axes.set_yticks(range(len(retrieval)), list(retrieval))
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.1, 0.05 + 1.1 * max(row[key] for row in retrieval.values() for key in SCORES)))
    axes.figure.legend(loc="outside upper right", ncols=3)


def _draw_denoising(axes: Axes, denoising: Mapping[str, Mapping[str, float]]) -> None:
    names = list(dict.fromkeys(name for losses in denoising.values() for name in losses))
    width = 0.8 / len(denoising)
    for i, (label, losses) in enumerate(denoising.items()):
        color = COLORS[0] if label == "trained" else COLORS[5 - i]
        places = [k + (i - (len(denoising) - 1) / 2) * width for k in range(len(names))]
        values = [losses.get(name, 0.0) for name in names]
        axes.bar(places, values, width=0.93 * width, label=label, color=color)
        for place, value in zip(places, values, strict=True):
            axes.text(place, value, f"{value:.2f}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("nats per token")
    axes.figure.legend(loc="outside upper right", ncols=len(denoising))


def _draw_similarity(axes: Axes, similarity: Mapping[str, Any]) -> None:
    labels, matrix = similarity["labels"], similarity["matrix"]
    others = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
    image = axes.pcolormesh(matrix, cmap="viridis", vmin=min(others), vmax=max(others), edgecolor="face", linewidth=0.1)
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


def _curve_figures(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss, held-out loss, learning rate and throughput over steps, where the lines have them."""
    denoisers = list(dict.fromkeys(key[5:] for line in curves for key in line if key.startswith("loss/")))

    def draw(axes: Axes, keys: Mapping[str, str]) -> None:
        for key, label in keys.items():
            points = [(line["step"], line[key]) for line in curves if key in line]
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 12 else "", markersize=3)
        axes.set_xlabel("optimizer step")
        axes.set_ylim(bottom=0 if "loss" not in next(iter(keys)) else None)
        if len(keys) > 1:
            axes.figure.legend(loc="outside upper right", ncols=len(keys), columnspacing=1, handlelength=1.2)

    wanted = [
        ({f"loss/{name}": name for name in denoisers} or {"loss": "loss"}, "Training loss, nats per target token."),
        ({f"eval_loss/{name}": name for name in denoisers}, "Held-out loss, nats per target token."),
        ({"lr": "learning rate"}, "Learning rate."),
        ({"tokens_per_second": "tokens/s"}, "Throughput, source and target tokens per second."),
    ]
    present = {key for line in curves for key in line}
    drawn = [({key: label for key, label in keys.items() if key in present}, caption) for keys, caption in wanted]
    return [_figure(draw, keys, caption, 2.7) for keys, caption in drawn if keys]


def _html_table(table: Table) -> str:
    header, rows = table
    lines = ["".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)]
    for row in rows:
        span = f' class="note" colspan="{len(header) - 1}"' if len(row) < len(header) else ""
        lines.append(f"<td>{escape(row[0])}</td>" + "".join(f"<td{span}>{escape(cell)}</td>" for cell in row[1:]))
    return '<div class="scroll"><table>' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _markdown_table(table: Table) -> str:
    header, rows = table
    rules = [":---", *["---:"] * (len(header) - 1)]
    lines = [header, rules, *(row + [""] * (len(header) - len(row)) for row in rows)]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _html_list(fields: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in fields) + "</dl>"


def _flatten(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, ", ".join(f"{k} {v}" for k, v in item.items()) if isinstance(item, Mapping) else str(item))
        for key, item in value.items()
    ]


def _cell(text: str) -> str:
    return re.sub(r"([\\|<>*_`\[\]#])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A Markdown code span that whatever is in the text cannot end."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall(r"`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}"
