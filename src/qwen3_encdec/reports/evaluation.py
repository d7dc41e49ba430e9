"""Evaluate a folder and write its page."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from qwen3_encdec.conversion.extract import checkpoints_to_average
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.evaluation.retrieval import package_retrieval, pairs_retrieval
from qwen3_encdec.evaluation.suite import evaluate_denoising, evaluate_retrieval, provenance
from qwen3_encdec.folders import InputError, check_output, new_folder, write_json
from qwen3_encdec.reports.comparison import Run, write_page
from qwen3_encdec.reports.scores import score_text


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
) -> dict[str, Any]:
    """Evaluate an encoder, or an encoder-decoder (a folder, a checkpoint or a run).

    Raises InputError if a folder or file cannot be read, or an option is for the other kind.

    Args:
        output_dir: Folder for metrics.json, whose content is returned, and report.html.
        parent: An encoder's causal Qwen3 (folder or hub id), for three of the baselines.
        initialization: Encoder-decoder before training, to score beside the trained one.
        pairs: .jsonl files of queries and their documents to retrieve, instead of package-docs.
        mteb: Names of mteb's tasks and benchmarks for an encoder.
        num_queries: Maximum number of queries per task; `seed` chooses them.
        num_examples: Held-out texts per denoiser.
        data: Data of the encoder-decoder's training; by default package-docs.
    """
    given = [path for path in (parent, initialization) if path]
    check_output(output_dir, "evaluation", inputs=[model_dir, *given, *pairs])
    logging.disable_progress_bar()
    model_dir, started = Path(model_dir), time.monotonic()
    is_encoder = (model_dir / "modules.json").exists()
    unused: dict[str, Any] = {"parent": parent, "pairs": pairs, "mteb": mteb}
    if is_encoder:
        unused = {"initialization": initialization, "data": data}
    for name, value in unused.items():
        if value:
            kind = "an encoder" if is_encoder else "not an encoder"
            raise InputError(f"{name} cannot be used with {model_dir}, {kind}")
    if is_encoder:
        tasks = [pairs_retrieval(file, num_queries, seed) for file in pairs]
        if not pairs and not mteb:
            tasks = [package_retrieval(num_queries, seed)]
        encoders = {model_dir.resolve().name: model_dir}
        metrics = evaluate_retrieval(encoders, tasks=tasks, parent=parent, mteb=mteb)
    else:
        folders = {"initialization": Path(initialization)} if initialization else {}
        folders["trained"] = checkpoints_to_average(model_dir, 1)[0]
        metrics = evaluate_denoising(folders, num_examples=num_examples, data=data)
    metrics["provenance"] = provenance(model=str(model_dir), seed=seed, started=started)
    with new_folder(output_dir, "evaluation", model=str(model_dir)) as folder:
        write_json(folder / "metrics.json", metrics)
        name = f"Evaluation of {model_dir.absolute().name}"
        write_page(folder, [Run(name, model_dir, "evaluation", metrics)], name)
    return metrics


def compare_soup(models: Sequence[str | Path], merged: str | Path, seed: int = 0) -> str:
    """Return retrieval tables of a soup and its inputs, and a comparison with the best input."""
    causal = [model for model in models if not (Path(model) / "modules.json").is_file()]
    encoders = {str(model): model for model in (*models, merged) if model not in causal}
    parent = causal[0] if causal else None
    metrics = evaluate_retrieval(encoders, tasks=[package_retrieval(1000, seed)], parent=parent)
    scores = {name: metrics["retrieval"][name]["ndcg@10"] for name in encoders}
    soup_score = scores.pop(str(merged))
    best = max(scores, key=lambda name: scores[name])
    verdict = "better than" if soup_score > scores[best] else "not better than"
    figures = f"nDCG@10 {soup_score:.3f} vs. {scores[best]:.3f}"
    return f"{score_text(metrics)}\n{merged} is {verdict} its best input {best}: {figures}"
