"""One evaluation for each kind of folder: denoising for an encoder-decoder, retrieval and geometry for an encoder.

Retrieval asks for the body of a docstring by its summary line, among all bodies of the packages that no training
sees. Every embedder, baselines first, goes through the same function in the same run.
"""

import functools
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.package_docs import summary_pairs
from qwen3_encdec.data.stream import heldout_examples
from qwen3_encdec.evaluation import baselines
from qwen3_encdec.evaluation.baselines import Embedder
from qwen3_encdec.evaluation.denoising import denoising_losses, infill_examples
from qwen3_encdec.evaluation.geometry import geometry
from qwen3_encdec.evaluation.report import denoising_table, retrieval_table, write_report
from qwen3_encdec.evaluation.retrieval import normalize, retrieval_scores
from qwen3_encdec.extraction import checkpoints_to_average
from qwen3_encdec.files import (
    PROVENANCE_FILE,
    InputError,
    check_output,
    new_folder,
    package_versions,
    read_json,
    write_json,
)
from qwen3_encdec.loading import load_model, load_tokenizer, resolve_checkpoint

SIMILARITY_TEXTS = (
    "Return the largest element of a list.",
    "Find the maximum value in an array.",
    "Compute the mean of a sequence of numbers.",
    "Open a file and read it line by line.",
    "Load the contents of a text document from disk.",
    "Write the given string to a path.",
    "Send an HTTP request and return the response.",
    "Download a page from a web server.",
    "Close the connection to the remote host.",
    "Train a neural network by gradient descent.",
    "Update the weights of the model from the loss.",
    "Split the data into training and test sets.",
)
"""Four subjects of three texts each, in that order."""


def evaluate(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    parent: str | Path | None = None,
    initialization: str | Path | None = None,
    num_queries: int = 1000,
    num_examples: int = 64,
    data: DataConfig | None = None,
    seed: int = 0,
    commit: str | None = None,
) -> dict[str, Any]:
    """Evaluate a folder and write metrics.json, report.md and report.html.

    Args:
        model_dir: An encoder-decoder (a folder, a checkpoint or a run), or an extracted encoder.
        output_dir: Written beside and renamed into place.
        parent: The causal Qwen3, folder or hub id, that an encoder comes from, for three of the baselines.
        initialization: What an encoder-decoder was trained from; its losses then stand beside.
        num_queries: Most retrieval queries.
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
    similarity = None
    if (model_dir / "modules.json").exists():
        tuned = (model_dir / PROVENANCE_FILE).exists() and "finetuned_from" in read_json(model_dir / PROVENANCE_FILE)
        name = baselines.CONTRASTIVE if tuned else baselines.ENCODER
        metrics, similarity = evaluate_retrieval({name: model_dir}, parent=parent, num_queries=num_queries, seed=seed)
    else:
        folders = {"initialization": Path(initialization)} if initialization else {}
        folders["trained"] = checkpoints_to_average(model_dir, 1)[0]
        metrics = evaluate_denoising(folders, num_examples=num_examples, data=data)
    metrics["provenance"] = provenance(model=str(model_dir), seed=seed, commit=commit, started=started)
    with new_folder(output_dir, "evaluation", model=str(model_dir)) as folder:
        write_json(folder / "metrics.json", metrics)
        write_report(folder, metrics, similarity=similarity, title=f"Evaluation of {model_dir.name}")
    return metrics


def evaluate_denoising(
    folders: Mapping[str, str | Path], *, num_examples: int = 64, data: DataConfig | None = None
) -> dict[str, Any]:
    """`denoising` (nats per target token, by label and denoiser) and the `infill` of the last folder.

    Raises:
        InputError: a folder holds no encoder-decoder, or there is too little held-out text.
    """
    data = data or DataConfig()
    names = [denoiser.name for denoiser in data.denoisers]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    metrics: dict[str, Any] = {"denoising": {}}
    with _progress() as progress:
        task = progress.add_task("held-out denoising", total=len(folders) + 1)
        for label, folder in folders.items():
            model, tokenizer = load_model(folder).to(device), load_tokenizer(folder)
            examples = heldout_examples(data, tokenizer, num_examples)
            metrics["denoising"][label] = denoising_losses(
                model, examples, denoiser_names=names, pad_token_id=tokenizer.pad_token_id
            )
            progress.advance(task)
        short = [example for example in examples if example.denoiser == 0]
        metrics["infill"] = infill_examples(model, tokenizer, short)
        progress.advance(task)
    return metrics


def evaluate_retrieval(
    encoders: Mapping[str, str | Path],
    *,
    parent: str | Path | None = None,
    num_queries: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Retrieval and geometry of sentence-transformers folders, by name, after the baselines.

    Returns:
        `retrieval` (scores and geometry by embedder), `num_queries`, `num_documents` and `not_run` (what each baseline
        that could not run would need); and the cosines of `SIMILARITY_TEXTS` under the last encoder, for the report.

    Raises:
        InputError: a folder cannot be loaded, or no installed package is held out.
    """
    pairs = summary_pairs("heldout")
    if not pairs:
        raise InputError("no held-out package has a docstring with a summary and a body; install more packages")
    documents = [body for _, body in pairs]
    relevant = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:num_queries])
    queries = [pairs[i][0] for i in relevant]

    loaders: dict[str, Callable[[], Embedder]] = {
        baselines.TFIDF: lambda: baselines.tfidf(documents),
        baselines.MINILM: baselines.minilm,
    }
    not_run = {}
    if parent is not None:
        parent = resolve_checkpoint(parent)
        loaders[baselines.CAUSAL_MEAN] = lambda: baselines.parent(parent, pooling="mean")
        loaders[baselines.CAUSAL_LAST] = lambda: baselines.parent(parent, pooling="lasttoken")
        loaders[baselines.UNMASKED_MEAN] = lambda: baselines.parent(parent, pooling="mean", causal=False)
    else:
        names = (baselines.CAUSAL_MEAN, baselines.CAUSAL_LAST, baselines.UNMASKED_MEAN)
        not_run = dict.fromkeys(names, "name the parent's folder")
    for name, folder in encoders.items():
        loaders[name] = functools.partial(baselines.encoder, folder)

    results: dict[str, dict[str, float]] = {}
    similarity: dict[str, Any] = {}
    with _progress() as progress:
        for name, load in loaders.items():
            task = progress.add_task(name, total=len(queries) + len(documents))
            try:
                embed = load()
            except ModuleNotFoundError as error:
                package = {"sklearn": "scikit-learn"}.get(error.name or "", (error.name or "").replace("_", "-"))
                not_run[name] = f"pip install {package}"
                continue
            advance = functools.partial(progress.advance, task)
            q, d = _embed(embed, queries, advance), _embed(embed, documents, advance)
            results[name] = retrieval_scores(q, d, relevant) | geometry(q, d[relevant], seed=seed)
            if name in encoders:
                texts = normalize(embed(list(SIMILARITY_TEXTS)))
                similarity = {"labels": list(SIMILARITY_TEXTS), "matrix": (texts @ texts.T).tolist(), "name": name}
    metrics = {"retrieval": results, "num_queries": len(queries), "num_documents": len(documents), "not_run": not_run}
    return metrics, similarity


def summary(metrics: Mapping[str, Any]) -> str:
    """The tables of the report for a terminal."""
    tables = []
    if "denoising" in metrics:
        tables.append(denoising_table(metrics["denoising"]))
    if "retrieval" in metrics:
        tables.append(retrieval_table(metrics["retrieval"], metrics["not_run"]))
    text = []
    for header, rows in tables:
        lines = [header, *rows]
        widths = [max(len(line[i]) for line in lines if len(line) == len(header)) for i in range(len(header))]
        widths[0] = max(len(line[0]) for line in lines)
        text += ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
        text.append("")
    return "\n".join(text).rstrip()


def provenance(*, started: float | None = None, commit: str | None = None, **facts: Any) -> dict[str, Any]:
    """What a number must carry: command, commit, versions, hardware, and `seconds` since `started` (monotonic)."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **({"commit": commit} if (commit := commit or _commit()) else {}),
        **facts,
        "hardware": f"{cpu or platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        **({"seconds": round(time.monotonic() - started, 1)} if started is not None else {}),
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def _commit() -> str | None:
    """The checkout's commit as git describes it, with -dirty where files differ; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _embed(embed: Embedder, texts: Sequence[str], advance: Callable[[int], None], block: int = 256) -> np.ndarray:
    """Embeddings in the order of `texts`, computed in order of length, so that little is padding."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    parts = []
    for start in range(0, len(texts), block):
        rows = order[start : start + block]
        parts.append(embed([texts[i] for i in rows]))
        advance(len(rows))
    embeddings = np.concatenate(parts).astype(np.float32, copy=False)
    return embeddings[np.argsort(order)]


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty())
