"""Score tables of evaluations, for pages and for a terminal."""

from collections.abc import Mapping
from typing import Any

from qwen3_encdec.evaluation.retrieval import PACKAGE_DOCS
from qwen3_encdec.reports.page import Section, Table, grid, transpose

DENOISING_NOTE = "Mean loss on held-out text, in nats per target token; lower is better."
RETRIEVAL_NOTE = (
    "Find the body of each of {num_queries:,} docstring summary lines among {num_documents:,} "
    "bodies from held-out packages. Ties count against the model."
)
TASKS_NOTE = (
    "Score ± half the width of its 95 % interval (bootstrap over queries, texts or documents). "
    "The metric and the number of answers are in parentheses."
)


def score_sections(runs: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """Build the denoising, retrieval and task sections from the runs' metrics.json, by run name."""
    losses: dict[str, dict[str, str]] = {}
    tasks: dict[str, dict[str, str]] = {}
    reasons: dict[str, str] = {}
    sections = []
    for run, metrics in runs.items():
        suffix = f" ({run})" if len(runs) > 1 else ""
        for label, values in metrics.get("denoising", {}).items():
            losses[label + suffix] = {name: f"{loss:.3f}" for name, loss in values.items()}
        if retrieval := metrics.get("retrieval"):
            cells = {
                embedder: {name: f"{score:.3f}" for name, score in scores.items()}
                for embedder, scores in retrieval.items()
            }
            note, title = RETRIEVAL_NOTE.format(**metrics), f"Retrieval{suffix}"
            sections.append(Section(title, note, transpose(grid("Embedder", cells))))
        for embedder, column in _task_scores(metrics.get("tasks", {})).items():
            if tasks.setdefault(embedder, column) != column:  # from another model or sample
                tasks[embedder + suffix] = column
        reasons |= metrics.get("not_run", {}) | metrics.get("tasks_not_run", {})
    if losses:
        sections.insert(0, Section("Denoising", DENOISING_NOTE, grid("Denoiser", losses)))
    if tasks or reasons:
        fields = [(name, f"not run: {reason}") for name, reason in reasons.items()]
        sections.append(Section("Tasks", TASKS_NOTE, _task_table(tasks), fields=[fields]))
    return sections


def score_text(metrics: Mapping[str, Any]) -> str:
    """Format the tables of one run for a terminal."""
    lines = []
    for section in score_sections({"": metrics}):
        if section.table:
            rows = [section.table[0], *section.table[1]]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        for fields in section.fields:
            lines += [f"{name}  {reason}" for name, reason in fields]
    return "\n".join(lines)


def _task_table(columns: Mapping[str, Mapping[str, str]]) -> Table | None:
    """Build a table with embedders as columns, or as rows where they would not fit the page."""
    if not columns:
        return None
    table = grid("Task", columns)
    if len(columns) <= max(4, len(table[1])):
        return table
    return transpose(grid("Embedder", columns))


def _task_scores(tasks: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Format cells by embedder, then by task with its metric and size.

    The further scores of retrieval follow, except those of package-docs, which has its own table.
    """
    cells: dict[str, dict[str, str]] = {}
    for name, task in tasks.items():
        for embedder, score in task["scores"].items():
            text = f"{score['score']:.3f}"
            if "low" in score:
                text += f" ±{(score['high'] - score['low']) / 2:.3f}".replace("±0", "±")
            column = cells.setdefault(embedder, {})
            column[f"{name} ({task['metric']}, {task['size']:,})"] = text
            if name != PACKAGE_DOCS:
                further = [key for key in ("mrr", "ndcg@10") if key in score]
                column |= {f"{name} ({key})": f"{score[key]:.3f}" for key in further}
    return cells
