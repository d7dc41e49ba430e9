"""Report on one or more runs: curves, scores with intervals, and infilled gaps.

A run is the folder of a training (metrics.jsonl), an evaluation or a demo (metrics.json).
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from qwen3_encdec.folders import (
    PROVENANCE_FILE,
    InputError,
    check_output,
    new_folder,
    read_json,
    read_optional,
)
from qwen3_encdec.reports import page
from qwen3_encdec.reports.scores import score_sections

CURVES = {
    "loss": ("Training loss.", "nats per target token"),
    "eval_loss": ("Held-out loss.", "nats per target token"),
    "grad_norm": ("Gradient norm.", "norm"),
    "lr": ("Learning rate.", "learning rate"),
    "tokens_per_second": ("Throughput, source and target tokens.", "tokens per second"),
    "finetuning_loss": ("Finetuning loss.", "loss"),
    "eval_ndcg@10": ("Held-out pairs.", "nDCG@10"),
}
"""Caption and axis label of each quantity."""
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """Records of a folder: `metrics` of metrics.json, `curves` of metrics.jsonl."""

    name: str
    folder: Path
    kind: str
    metrics: dict[str, Any] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)


def compare(folders: Sequence[str | Path], output_dir: str | Path) -> None:
    """Write report.html about the runs into `output_dir`.

    Raises:
        InputError: a folder is not one of ours or has no metrics, or `output_dir` is not ours.
    """
    check_output(output_dir, "report", inputs=folders)
    paths = [Path(folder).resolve() for folder in folders]
    root = os.path.commonpath([path.parent for path in paths])
    runs = [_read(path, path.relative_to(root).as_posix()) for path in dict.fromkeys(paths)]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    with new_folder(output_dir, "report", runs=[str(folder) for folder in folders]) as folder:
        write_page(folder, runs, title)


def write_page(folder: Path, runs: Sequence[Run], title: str) -> None:
    """Write report.html about the runs into an existing folder; a part without data is left out."""
    figures = []
    for key, (caption, label) in CURVES.items():
        if lines := _lines(runs, key):
            figures.append(page.figure(partial(_draw_curves, lines, label), caption))
    sections = [page.Section("Training", figures=figures)] if figures else []
    sections += score_sections({run.name: run.metrics for run in runs})
    if any("infill" in run.metrics for run in runs):
        sections.append(_infilling(runs))
    sections.append(page.Section("Provenance", fields=[_facts(run) for run in runs]))
    page.write_page(folder / "report.html", title, sections)


def read_curves(file: Path) -> list[dict[str, Any]]:
    """Parse a metrics.jsonl, ignoring an incomplete last line from a running or killed process.

    Raises:
        InputError: another line is not a JSON object with a step.
    """
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "step" in record:
            records.append(record)
        elif number < len(lines) or record is not None:
            raise InputError(f"{file}:{number} is not a JSON object with a step")
    return records


def _read(folder: Path, name: str) -> Run:
    if not (folder / PROVENANCE_FILE).is_file():
        raise InputError(f"run {folder} was not written by qwen3-encdec: no {PROVENANCE_FILE}")
    kind, metrics = str(read_json(folder / PROVENANCE_FILE).get("kind")), folder / "metrics.json"
    logs = [folder / "metrics.jsonl", folder / "ul2" / "metrics.jsonl"]
    curves = [record for log in logs if log.exists() for record in read_curves(log)]
    if not curves and not metrics.exists():
        raise InputError(f"run {folder} has neither metrics.json nor a line in metrics.jsonl")
    if kind == "encoder":  # finetuned: its loss is not a denoising loss
        names = {"loss": "finetuning_loss", "learning_rate": "lr"}
        curves = [{names.get(key, key): line[key] for key in line} for line in curves]
    return Run(name, folder, kind, read_optional(metrics), curves)


def _lines(runs: Sequence[Run], key: str) -> dict[str, Points]:
    """Collect a quantity's points by run or, for a single run that records them, by denoiser."""
    lines: dict[str, Points] = {}
    for run in runs:
        for record in run.curves:
            known = {name: value for name, value in record.items() if value is not None}
            values = {name: known[name] for name in known if name.startswith(f"{key}/")}
            if len(runs) > 1 and values:
                known.setdefault(key, sum(values.values()) / len(values))
            if len(runs) > 1 or not values:
                values = {f"{key}/{run.name}": known[key]} if key in known else {}
            for name, value in values.items():
                lines.setdefault(name.removeprefix(f"{key}/"), []).append((record["step"], value))
    return lines


def _draw_curves(lines: Mapping[str, Points], label: str, axes: Axes) -> None:
    for name, points in lines.items():
        color = page.denoiser_color(name) if name in page.DENOISERS else None
        steps, values = zip(*points, strict=True)
        marker = "." if len(points) <= 200 else None  # an SVG element each
        axes.plot(steps, values, marker=marker, markersize=3, label=name, color=color)
    axes.set(xlabel="optimizer step", ylabel=label)
    if label == "tokens per second":
        axes.set_ylim(bottom=0)


def _infilling(runs: Sequence[Run]) -> page.Section:
    shares: dict[str, dict[str, str]] = {}
    examples = []
    for run in runs:
        infill = run.metrics.get("infill", {})
        rates = infill.get("by_denoiser", {})
        shares[run.name] = {name: f"{share:.1%}" for name, share in rates.items()}
        name = [("run", run.name)] if len(runs) > 1 else []
        for example in infill.get("examples", [])[:5]:
            examples.append([*name, *example.items()])
    note = "Share of gaps filled exactly by greedy decoding, and examples."
    return page.Section("Infilling", note, page.grid("Denoiser", shares), fields=examples)


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = {"run": run.name, "folder": run.folder, "kind": run.kind}
    if trained := [record for record in run.curves if "target_tokens" in record]:
        tokens = trained[-1]["source_tokens"] + trained[-1]["target_tokens"]
        facts |= {"steps": f"{trained[-1]['step']:,}", "tokens": f"{tokens:,}"}
    facts |= run.metrics.get("provenance", {})
    return [(name, str(value)) for name, value in facts.items()]
