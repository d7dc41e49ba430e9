"""Evaluate a folder and write its page; the tables of the page as text for a terminal."""

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from qwen3_encdec.conversion.extract import checkpoints_to_average
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.evaluation import baselines
from qwen3_encdec.evaluation.retrieval import Task, pairs_retrieval
from qwen3_encdec.evaluation.suite import (
    evaluate_denoising,
    evaluate_retrieval,
    provenance,
)
from qwen3_encdec.folders import PROVENANCE_FILE, check_output, new_folder, read_json, write_json
from qwen3_encdec.reports.comparison import Run, write_page
from qwen3_encdec.reports.scores import denoising_table, retrieval_table, tasks_table


def evaluate(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    parent: str | Path | None = None,
    initialization: str | Path | None = None,
    pairs: Sequence[str | Path] = (),
    mteb: Sequence[str] = (),
    num_queries: int = 3000,
    num_examples: int = 64,
    data: DataConfig | None = None,
    seed: int = 0,
    commit: str | None = None,
) -> dict[str, Any]:
    """Evaluate a folder and write metrics.json and report.html.

    Args:
        model_dir: An encoder-decoder (a folder, a checkpoint or a run), or an extracted encoder.
        output_dir: Written beside and renamed into place.
        parent: The causal Qwen3, folder or hub id, that an encoder comes from, for three of the
            baselines.
        initialization: What an encoder-decoder was trained from; its losses then stand beside.
        pairs: .jsonl files of queries and their documents to retrieve, instead of package-docs.
        mteb: mteb's tasks and benchmarks for an encoder, by name.
        num_queries: Most queries or test texts of each task.
        num_examples: Held-out texts under each denoiser.
        data: What the encoder-decoder was trained on; by default package-docs.
        seed: Chooses the queries.
        commit: Recorded.

    Raises:
        InputError: `model_dir` is neither, is damaged, or `output_dir` may not be written.
    """
    check_output(output_dir, "evaluation")
    logging.disable_progress_bar()
    model_dir, started = Path(model_dir), time.monotonic()
    tasks: list[Task] = [pairs_retrieval(file, num_queries, seed) for file in pairs]
    if (model_dir / "modules.json").exists():
        tuned = (model_dir / PROVENANCE_FILE).exists() and "finetuned_from" in read_json(
            model_dir / PROVENANCE_FILE
        )
        name = baselines.CONTRASTIVE if tuned else baselines.ENCODER
        metrics = evaluate_retrieval(
            {name: model_dir},
            parent=parent,
            num_queries=num_queries,
            seed=seed,
            tasks=tasks if pairs or mteb else None,
            mteb=mteb,
        )
    else:
        folders = {"initialization": Path(initialization)} if initialization else {}
        folders["trained"] = checkpoints_to_average(model_dir, 1)[0]
        metrics = evaluate_denoising(folders, num_examples=num_examples, data=data)
    metrics["provenance"] = provenance(
        model=str(model_dir), seed=seed, commit=commit, started=started
    )
    with new_folder(output_dir, "evaluation", model=str(model_dir)) as folder:
        write_json(folder / "metrics.json", metrics)
        name = f"Evaluation of {model_dir.name}"
        write_page(folder, [Run(name, model_dir, "evaluation", metrics)], name)
    return metrics


def summary(metrics: Mapping[str, Any]) -> str:
    """The tables of the report for a terminal."""
    tables = []
    if "denoising" in metrics:
        tables.append(denoising_table(metrics["denoising"]))
    if "retrieval" in metrics:
        tables.append(retrieval_table(metrics["retrieval"], metrics["not_run"]))
    if metrics.get("tasks") or metrics.get("tasks_not_run"):
        tables.append(tasks_table(metrics["tasks"], metrics["tasks_not_run"]))
    text = io.StringIO()
    console = Console(file=text, width=160, markup=False, highlight=False)
    for header, rows in tables:
        table = Table(box=None, pad_edge=False)
        table.add_column(header[0])
        for name in header[1:]:
            table.add_column(name, justify="right")
        for row in rows:
            if len(row) == len(header):
                table.add_row(*row)
        console.print(table)
        for row in rows:
            if len(row) < len(header):
                console.print("  ".join(row))
        console.print()
    return text.getvalue().rstrip()


def compare_soup(models: Sequence[str | Path], merged: str | Path, seed: int = 0) -> str:
    """Compare a soup with each of its inputs in retrieval of held-out packages, and say if it is
    better than all of them.
    """
    causal = [model for model in models if not (Path(model) / "modules.json").is_file()]
    encoders = {str(model): model for model in models if model not in causal} | {
        str(merged): merged
    }
    metrics = evaluate_retrieval(encoders, parent=causal[0] if causal else None, seed=seed)
    scores = {name: metrics["retrieval"][name]["ndcg@10"] for name in encoders}
    soup_score = scores.pop(str(merged))
    best = max(scores, key=lambda name: scores[name])
    verdict = "better than" if soup_score > scores[best] else "not better than"
    figures = f"{soup_score:.3f}, {scores[best]:.3f}"
    return f"{summary(metrics)}\n{merged} is {verdict} its best input {best}: {figures}"
