"""Several runs on one page: curves, scores with intervals, what is written into the same gaps, and
the spaces.

A run is any folder of this project with something to show: of training (metrics.jsonl), of an
evaluation or of the demo (metrics.json). The model card beside the page holds what the folders
record and nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from qwen3_encdec.folders import PROVENANCE_FILE, InputError, check_output, new_folder, read_json
from qwen3_encdec.reports.model_card import model_card
from qwen3_encdec.reports.training import (
    SHOWN_EXAMPLES,
    TASKS_NOTE,
    denoising_table,
    figure,
    html_list,
    html_page,
    html_table,
    retrieval_table,
    space_figures,
    task_figures,
    tasks_table,
)

RETRIEVAL_NOTE = (
    "{num_queries:,} summary lines of docstrings, each looking for its body among {num_documents:,} of held-out "
    "packages. Ties count against the model. Lower is better for alignment, uniformity and mean cosine; higher for the "
    "rest."
)
CURVES = {
    "loss": "Training loss, nats per target token.",
    "eval_loss": "Held-out loss, nats per target token.",
    "grad_norm": "Norm of the gradient.",
    "lr": "Learning rate.",
    "tokens_per_second": "Throughput, source and target tokens per second.",
}


@dataclass(frozen=True)
class Run:
    """What a folder records."""

    name: str
    """Unique on the page."""
    folder: Path
    kind: str
    metrics: dict[str, Any] = field(default_factory=dict)
    """Of metrics.json."""
    curves: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl."""
    space: dict[str, Any] = field(default_factory=dict)
    """Of space.json."""


def compare(folders: Sequence[str | Path], output_dir: str | Path) -> list[Run]:
    """Write report.html and model_card.md about the runs into `output_dir`.

    Raises:
        InputError: none is given, a folder is not one of ours or has nothing to show, or
            `output_dir` may not be written.
    """
    check_output(output_dir, "report")
    if not folders:
        raise InputError("name at least one folder of a run, an evaluation or a demo")
    names = _short_names([Path(folder) for folder in folders])
    runs = [_read(Path(folder), name) for folder, name in zip(folders, names, strict=True)]
    with new_folder(output_dir, "report", runs=[str(folder) for folder in folders]) as folder:
        write_page(folder, runs, names[0] if len(names) == 1 else f"{len(names)} runs")
        (folder / "model_card.md").write_text(
            model_card([run.folder for run in runs]), encoding="utf-8"
        )
    return runs


def write_page(folder: Path, runs: Sequence[Run], title: str) -> None:
    """Write report.html about the runs into an existing folder; a part without data is left out."""
    (folder / "report.html").write_text(html_page(title, _body(title, runs)), encoding="utf-8")


def _read(folder: Path, name: str) -> Run:
    if not (folder / PROVENANCE_FILE).exists():
        reason = "was not written by qwen3-encdec" if folder.is_dir() else "does not exist"
        raise InputError(f"run {folder} {reason}")
    lines = next(
        (
            file
            for file in (folder / "metrics.jsonl", folder / "ul2" / "metrics.jsonl")
            if file.exists()
        ),
        None,
    )
    found: dict[str, Any] = {
        part: read_json(folder / f"{part}.json")
        for part in ("metrics", "space")
        if (folder / f"{part}.json").exists()
    }
    if lines is None and "metrics" not in found:
        raise InputError(
            f"run {folder} holds neither metrics.json nor metrics.jsonl, so there is nothing to show"
        )
    try:
        curves = (
            [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
            if lines
            else []
        )
    except json.JSONDecodeError as error:
        raise InputError(f"{lines} is not valid JSON: {error}") from None
    return Run(name, folder, read_json(folder / PROVENANCE_FILE)["kind"], curves=curves, **found)


def _short_names(folders: Sequence[Path]) -> list[str]:
    """For each path the shortest end that no other has."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        lengths = range(1, len(own) + 1)
        names.append(
            next(
                (own[-n:] for n in lengths if sum(other[-n:] == own[-n:] for other in parts) == 1),
                None,
            )
        )
    if None in names:
        raise InputError(f"a run is named twice: {', '.join(map(str, folders))}")
    return ["/".join(name) for name in names if name]


def _body(title: str, runs: Sequence[Run]) -> list[str]:
    html = [f"<h1>{escape(title)}</h1>", html_table(_overview(runs))]
    if charts := _curves(runs):
        html += ["<section><h2>Training</h2>", '<div class="figures">', *charts, "</div></section>"]
    denoising = {
        f"{run.name}: {label}" if len(runs) > 1 else label: losses
        for run in runs
        for label, losses in run.metrics.get("denoising", {}).items()
    }
    if denoising:
        note = "<p>Mean loss on held-out text, in nats per target token; lower is better.</p>"
        html += [
            "<section><h2>Denoising</h2>",
            note,
            html_table(denoising_table(denoising)),
            "</section>",
        ]
    for run in runs:
        if retrieval := run.metrics.get("retrieval"):
            name = f": {escape(run.name)}" if len(runs) > 1 else ""
            note = RETRIEVAL_NOTE.format(**run.metrics)
            table = html_table(retrieval_table(retrieval, run.metrics.get("not_run", {})))
            html += [
                f"<section><h2>Retrieval and geometry{name}</h2>",
                f"<p>{note}</p>",
                table,
                "</section>",
            ]
    tasks, not_run = _merged_tasks(runs)
    if tasks or not_run:
        html += [
            "<section><h2>Tasks</h2>",
            f"<p>{TASKS_NOTE}</p>",
            html_table(tasks_table(tasks, not_run)),
        ]
        html += ['<div class="figures">', *task_figures(tasks), "</div></section>"]
    if infilled := _infilled(runs):
        html += ["<section><h2>Infilling</h2>", *infilled, "</section>"]
    for run in runs:
        if run.space:
            space = run.space | {
                "name": f"{run.space['name']} ({run.name})" if len(runs) > 1 else run.space["name"]
            }
            html.append(f"<section><h2>Space: {escape(space['name'])}</h2>")
            html += ['<div class="figures">', *space_figures(space), "</div></section>"]
    html.append("<footer>")
    for run in runs:
        facts = {"folder": str(run.folder), "kind": run.kind, **run.metrics.get("provenance", {})}
        html.append(html_list([(key, _one_line(value)) for key, value in facts.items()]))
    return [*html, "</footer>"]


def _overview(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for run in runs:
        facts = run.metrics.get("provenance", {})
        steps = [line for line in run.curves if "target_tokens" in line]
        tokens = f"{steps[-1]['source_tokens'] + steps[-1]['target_tokens']:,}" if steps else "–"
        step = f"{run.curves[-1]['step']:,}" if run.curves else "–"
        rows.append(
            [
                run.name,
                run.kind,
                step,
                tokens,
                str(facts.get("commit", "–")),
                str(facts.get("hardware", "–")),
            ]
        )
    return ["Run", "Kind", "Steps", "Tokens", "Commit", "Hardware"], rows


def _curves(runs: Sequence[Run]) -> list[str]:
    """A figure for each quantity, a line for each run that has it, or of a single run for each
    denoiser.
    """
    figures = []
    for key, caption in CURVES.items():
        sources = {run.name: (run.curves, key) for run in runs}
        if len(runs) == 1:  # room for a line by denoiser
            names = dict.fromkeys(
                name for line in runs[0].curves for name in line if name.startswith(f"{key}/")
            )
            sources = {name.partition("/")[2]: (runs[0].curves, name) for name in names} or sources
        lines = {name: points for name, source in sources.items() if (points := _points(*source))}
        if lines:
            figures.append(figure(_draw_curves, lines, caption, 2.7))
    return figures


def _points(curves: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value); of what is recorded by denoiser only, the mean."""
    points = []
    for line in curves:
        names = [key] if key in line else [name for name in line if name.startswith(f"{key}/")]
        values = [line[name] for name in names]
        if values and all(value is not None for value in values):
            points.append((line["step"], sum(values) / len(values)))
    return points


def _draw_curves(axes: Axes, lines: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for name, points in lines.items():
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            marker="o" if len(points) < 12 else "",
            markersize=3,
        )
    axes.set_xlabel("optimizer step")
    if len(lines) > 1:
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=7)


def _merged_tasks(runs: Sequence[Run]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tasks of all runs, one of two sizes in two rows;

    an embedder whose scores differ is named with its run.
    """
    found = [
        (name, embedder, run, task, score)
        for run in runs
        for name, task in run.metrics.get("tasks", {}).items()
        for embedder, score in task["scores"].items()
    ]
    sizes: dict[str, set[int]] = {}
    seen: dict[tuple[str, str, int], set[str]] = {}
    for name, embedder, _, task, score in found:
        sizes.setdefault(name, set()).add(task["size"])
        seen.setdefault((embedder, name, task["size"]), set()).add(json.dumps(score))
    differ = {embedder for (embedder, *_), scores in seen.items() if len(scores) > 1}
    tasks: dict[str, Any] = {}
    for name, embedder, run, task, score in found:
        row = name if len(sizes[name]) == 1 else f"{name}, {task['size']:,}"
        merged = tasks.setdefault(row, task | {"scores": {}})
        merged["scores"][f"{embedder} ({run.name})" if embedder in differ else embedder] = score
    not_run = {
        name: why for run in runs for name, why in run.metrics.get("tasks_not_run", {}).items()
    }
    return tasks, {name: reason for name, reason in not_run.items() if name not in sizes}


def _infilled(runs: Sequence[Run]) -> list[str]:
    """What each run writes into the same gaps."""
    html: list[str] = []
    by_source: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for run in runs:
        infill = run.metrics.get("infill")
        if infill:
            rates = infill.get("by_denoiser") or {"all": infill["exact_rate"]}
            shares = ", ".join(f"{name} {share:.1%}" for name, share in rates.items())
            html.append(
                f"<p>{escape(run.name)}: gaps filled exactly, greedily: {escape(shares)}.</p>"
            )
            for example in infill["examples"]:
                answers = by_source.setdefault((example["source"], example["expected"]), [])
                answers.append((run.name, example["generated"]))
    for (source, expected), answers in list(by_source.items())[:SHOWN_EXAMPLES]:
        fields = [("source", source), ("expected", expected), *answers]
        html.append(f'<div class="example">{html_list(fields)}</div>')
    return html


def _one_line(value: Any) -> str:
    return (
        ", ".join(f"{k} {v}" for k, v in value.items())
        if isinstance(value, Mapping)
        else str(value)
    )
