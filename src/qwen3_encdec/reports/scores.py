"""Tables and figures of evaluations: denoising, retrieval, tasks, and the embedding space."""

from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.axes import Axes

from qwen3_encdec.reports.page import COLORS, Table, figure, legend

SCORES = {"mrr": "MRR", "ndcg@10": "nDCG@10", "r@1": "R@1"}
GEOMETRY = {
    "alignment": "Alignment",
    "uniformity": "Uniformity",
    "mean_cosine": "Mean cosine",
    "effective_rank": "Eff. rank",
}
TASKS_NOTE = (
    "Score and half the width of its 95 % interval (bootstrap over queries, texts or documents). "
    "In brackets the metric and how many answers it is made of."
)
_NEIGHBOURS = jinja2.Environment(autoescape=True).from_string("""\
<div><p>Nearest neighbours{{ name }}</p><dl>{% for item in items %}
<dt>{{ item.package }}</dt><dd>{{ item.text }}<ul>
{%- for text, group, cosine in item.nearest -%}
<li>{{ "%.2f" % cosine }} <b>{{ group }}</b> {{ text }}</li>
{%- endfor %}</ul></dd>{% endfor %}</dl></div>""")
_TEXTS = jinja2.Environment(autoescape=True).from_string(
    "<ol>{% for text in texts %}<li>{{ text }}</li>{% endfor %}</ol>"
)


def retrieval_table(
    retrieval: Mapping[str, Mapping[str, float]], not_run: Mapping[str, str]
) -> Table:
    """Header and rows of the scores and geometry by embedder; one that was not run has its reason
    as the only cell.
    """
    digits = {"uniformity": ".2f", "effective_rank": ".1f"}

    def cell(row: Mapping[str, float], key: str) -> str:
        return format(row[key], digits.get(key, ".3f")) if key in row else "–"

    rows = [
        [name, *(cell(row, key) for key in (*SCORES, *GEOMETRY))] for name, row in retrieval.items()
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


def task_figures(tasks: Mapping[str, Mapping[str, Any]]) -> list[Markup]:
    """Scores with their intervals."""
    embedders = len({name for task in tasks.values() for name in task["scores"]})
    if not embedders:
        return []
    height = 0.8 + len(tasks) * (0.2 + 0.13 * embedders)
    return [figure(_draw_tasks, tasks, "Scores by task, with 95 % intervals.", height)]


def space_figures(space: Mapping[str, Any]) -> list[Markup]:
    """Cosines of some texts, a map and nearest neighbours under one embedder, as far as `space`
    holds them.
    """
    name = f" under {space['name']}" if space.get("name") else ""
    caption = f"Cosine of every two of these texts{name}; related texts should be light blocks."
    texts = Markup(_TEXTS.render(texts=space["labels"]))
    figures = [figure(_draw_similarity, space, caption, 3.8), texts]
    if "map" in space:
        caption = f"Held-out docstrings{name}, coloured by package (t-SNE: near is alike)."
        figures.append(figure(_draw_map, space["map"], caption, 4.2))
    if space.get("neighbours"):
        html = _NEIGHBOURS.render(name=name, items=space["neighbours"])
        figures.append(Markup(html))
    return figures


def denoising_table(denoising: Mapping[str, Mapping[str, float]]) -> Table:
    """Header and rows of the losses by denoiser."""
    names = list(dict.fromkeys(name for losses in denoising.values() for name in losses))
    rows = [
        [name, *(f"{losses[name]:.3f}" if name in losses else "–" for losses in denoising.values())]
        for name in names
    ]
    return ["Denoiser", *denoising], rows


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
    axes.set_xlabel("score")
    axes.grid(axis="x", alpha=0.25)
    legend(axes)


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
    legend(axes, 3)


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
    axes.set(xlabel="text", ylabel="text")
    colorbar: Any = axes.figure.colorbar(image, ax=axes, shrink=0.8, aspect=20)
    colorbar.solids.set(rasterized=False, edgecolor="face")
    colorbar.outline.set_visible(False)
