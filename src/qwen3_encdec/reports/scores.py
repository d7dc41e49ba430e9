"""Tables of evaluations: denoising, retrieval and tasks."""

from collections.abc import Mapping
from typing import Any

from qwen3_encdec.reports.page import Table

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
        found = f"{score['score']:.3f}"
        if "low" in score:
            half = f"{(score['high'] - score['low']) / 2:.3f}"
            found += f" ±{half.removeprefix('0')}"
        return found

    rows = [
        [
            f"{name} ({task['metric']}, {task['size']:,})",
            *(cell(task["scores"].get(column)) for column in embedders),
        ]
        for name, task in tasks.items()
    ]
    rows += [[name, f"not run: {reason}"] for name, reason in not_run.items()]
    return ["Task", *(embedders or ["Score"])], rows


def denoising_table(denoising: Mapping[str, Mapping[str, float]]) -> Table:
    """Header and rows of the losses by denoiser."""
    names = list(dict.fromkeys(name for losses in denoising.values() for name in losses))
    rows = [
        [name, *(f"{losses[name]:.3f}" if name in losses else "–" for losses in denoising.values())]
        for name in names
    ]
    return ["Denoiser", *denoising], rows
