"""Several runs on one page: curves, scores with intervals, and infilled gaps.

A run is a folder of this project of training (metrics.jsonl), of an evaluation or of the demo
(metrics.json).
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from qwen3_encdec.folders import PROVENANCE_FILE, InputError, check_output, new_folder, read_json
from qwen3_encdec.reports import page
from qwen3_encdec.reports.page import Section, denoiser_color, figure, legend, read_metrics
from qwen3_encdec.reports.scores import (
    TASKS_NOTE,
    denoising_table,
    retrieval_table,
    tasks_table,
)

SHOWN_EXAMPLES = 5
RETRIEVAL_NOTE = (
    "{num_queries:,} summary lines of docstrings, each looking for its body among "
    "{num_documents:,} of held-out packages. Ties count against the model. Lower is better for "
    "alignment, uniformity and mean cosine; higher for the rest."
)
CURVES = {
    "loss": ("Training loss.", "nats per target token"),
    "eval_loss": ("Held-out loss.", "nats per target token"),
    "grad_norm": ("Norm of the gradient.", "norm"),
    "lr": ("Learning rate.", "learning rate"),
    "tokens_per_second": ("Throughput, source and target tokens.", "tokens per second"),
}
"""Caption and axis label of each quantity."""


@dataclass(frozen=True)
class Run:
    """The records of a folder."""

    name: str
    """Unique on the page."""
    folder: Path
    kind: str
    metrics: dict[str, Any] = field(default_factory=dict)
    """Of metrics.json."""
    curves: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl."""


def compare(folders: Sequence[str | Path], output_dir: str | Path) -> list[Run]:
    """Write report.html about the runs into `output_dir`.

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
    return runs


def write_page(folder: Path, runs: Sequence[Run], title: str) -> None:
    """Write report.html about the runs into an existing folder; a part without data is left out."""
    footer = []
    for run in runs:
        facts = {"folder": str(run.folder), "kind": run.kind, **run.metrics.get("provenance", {})}
        footer.append([(key, _one_line(value)) for key, value in facts.items()])
    page.write_page(folder / "report.html", title, _sections(runs), footer)


def _read(folder: Path, name: str) -> Run:
    if not (folder / PROVENANCE_FILE).exists():
        reason = "was not written by qwen3-encdec" if folder.is_dir() else "does not exist"
        raise InputError(f"run {folder} {reason}")
    places = (folder / "metrics.jsonl", folder / "ul2" / "metrics.jsonl")
    lines = next((file for file in places if file.exists()), None)
    metrics = folder / "metrics.json"
    if lines is None and not metrics.exists():
        raise InputError(
            f"run {folder} holds neither metrics.json nor metrics.jsonl: there is nothing to show"
        )
    return Run(
        name,
        folder,
        read_json(folder / PROVENANCE_FILE)["kind"],
        read_json(metrics) if metrics.exists() else {},
        read_metrics(lines) if lines else [],
    )


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Paths below the folder that holds all of them."""
    paths = [folder.resolve() for folder in folders]
    root = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(root).as_posix() for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"a run is named twice: {', '.join(map(str, folders))}")
    return names


def _sections(runs: Sequence[Run]) -> list[Section]:
    several = len(runs) > 1
    sections = [Section("", table=_overview(runs))]
    if charts := _curves(runs):
        sections.append(Section("Training", figures=charts))
    denoising = {
        f"{run.name}: {label}" if several else label: losses
        for run in runs
        for label, losses in run.metrics.get("denoising", {}).items()
    }
    if denoising:
        note = "Mean loss on held-out text, in nats per target token; lower is better."
        sections.append(Section("Denoising", note, denoising_table(denoising)))
    for run in runs:
        if retrieval := run.metrics.get("retrieval"):
            title = f"Retrieval and geometry: {run.name}" if several else "Retrieval and geometry"
            table = retrieval_table(retrieval, run.metrics.get("not_run", {}))
            sections.append(Section(title, RETRIEVAL_NOTE.format(**run.metrics), table))
    tasks, not_run = _merged_tasks(runs)
    if tasks or not_run:
        sections.append(Section("Tasks", TASKS_NOTE, tasks_table(tasks, not_run)))
    shares, examples = _infilled(runs)
    if shares:
        sections.append(Section("Infilling", paragraphs=shares, examples=examples))
    return sections


def _overview(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for run in runs:
        facts = run.metrics.get("provenance", {})
        steps = [line for line in run.curves if "target_tokens" in line]
        tokens = f"{steps[-1]['source_tokens'] + steps[-1]['target_tokens']:,}" if steps else "–"
        step = f"{run.curves[-1]['step']:,}" if run.curves else "–"
        origin = [str(facts.get(name, "–")) for name in ("commit", "hardware")]
        rows.append([run.name, run.kind, step, tokens, *origin])
    return ["Run", "Kind", "Steps", "Tokens", "Commit", "Hardware"], rows


def _curves(runs: Sequence[Run]) -> list[str]:
    """A figure for each quantity: a line for each run that has it, or of a single run for each
    denoiser.
    """
    figures: list[str] = []
    for key, (caption, label) in CURVES.items():
        sources = {run.name: (run.curves, key) for run in runs}
        colors: dict[str, str] = {}
        if len(runs) == 1:  # room for a line by denoiser
            names = dict.fromkeys(
                name for line in runs[0].curves for name in line if name.startswith(f"{key}/")
            )
            by_denoiser = {name.partition("/")[2]: (runs[0].curves, name) for name in names}
            colors = {name: denoiser_color(name) for name in by_denoiser}
            sources = by_denoiser or sources
        lines = {name: points for name, source in sources.items() if (points := _points(*source))}
        if lines:
            data = {"lines": lines, "colors": colors, "label": label, "from_0": "second" in label}
            figures.append(figure(_draw_curves, data, caption, 2.7))
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


def _draw_curves(axes: Axes, data: Mapping[str, Any]) -> None:
    for name, points in data["lines"].items():
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 12 else ""
        color = data["colors"].get(name)
        axes.plot(steps, values, label=name, marker=marker, markersize=3, color=color)
    axes.set(xlabel="optimizer step", ylabel=data["label"])
    if data["from_0"]:
        axes.set_ylim(bottom=0)
    legend(axes)


def _merged_tasks(runs: Sequence[Run]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tasks of all runs, one of two sizes in two rows; an embedder whose scores differ is named
    with its run.
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


def _infilled(runs: Sequence[Run]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Shares of exactly filled gaps by run, and every run's answers to the same gaps."""
    shares: list[str] = []
    by_source: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for run in runs:
        infill = run.metrics.get("infill")
        if not infill:
            continue
        rates = infill.get("by_denoiser") or {"all": infill["exact_rate"]}
        listed = ", ".join(f"{name} {share:.1%}" for name, share in rates.items())
        shares.append(f"{run.name}: gaps filled exactly, greedily: {listed}.")
        for example in infill["examples"]:
            answers = by_source.setdefault((example["source"], example["expected"]), [])
            answers.append((run.name, example["generated"]))
    examples = [
        [("source", source), ("expected", expected), *answers]
        for (source, expected), answers in list(by_source.items())[:SHOWN_EXAMPLES]
    ]
    return shares, examples


def _one_line(value: Any) -> str:
    return (
        ", ".join(f"{k} {v}" for k, v in value.items())
        if isinstance(value, Mapping)
        else str(value)
    )
