"""One evaluation for each kind of folder: denoising for an encoder-decoder, tasks and geometry for
an encoder.

Every embedder, baselines first, goes through the same function in the same run. What is not
installed is reported as not run, with what to install.
"""

import functools
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import heldout_examples
from qwen3_encdec.evaluation import baselines
from qwen3_encdec.evaluation.baselines import Embedder, NotRun
from qwen3_encdec.evaluation.denoising import denoising_losses, infill_examples
from qwen3_encdec.evaluation.mteb_tasks import mteb_tasks
from qwen3_encdec.evaluation.retrieval import normalize
from qwen3_encdec.evaluation.tasks import PACKAGE_DOCS, TASKS, Task, documents_by_package
from qwen3_encdec.folders import (
    InputError,
    default_device,
    describe_source,
    load_model,
    load_tokenizer,
    package_versions,
    resolve_checkpoint,
)

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
MAP_PACKAGES, MAP_TEXTS = 6, 50


def evaluate_denoising(
    folders: Mapping[str, str | Path], *, num_examples: int = 64, data: DataConfig | None = None
) -> dict[str, Any]:
    """`denoising` (nats per target token, by label and denoiser) and the `infill` of the last
    folder.

    `infill` holds what `infill_examples` says of the first denoiser, and `by_denoiser` the share of
    exactly filled gaps of each that leaves gaps.

    Raises:
        InputError: a folder holds no encoder-decoder, or there is too little held-out text.
    """
    data = data or DataConfig()
    names = [denoiser.name for denoiser in data.denoisers]
    device = default_device()
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
        by_denoiser = {}
        for index, denoiser in enumerate(data.denoisers):
            if denoiser.mean_span is not None:
                own = [example for example in examples if example.denoiser == index]
                found = infill_examples(model, tokenizer, own)
                metrics.setdefault("infill", found)
                by_denoiser[denoiser.name] = found["exact_rate"]
        if by_denoiser:
            metrics["infill"] |= {"by_denoiser": by_denoiser}
        progress.advance(task)
    return metrics


def evaluate_retrieval(
    encoders: Mapping[str, str | Path],
    *,
    parent: str | Path | None = None,
    num_queries: int = 1000,
    seed: int = 0,
    tasks: Sequence[str] = (PACKAGE_DOCS,),
    mteb: Sequence[str] = (),
    outside: bool = True,
) -> dict[str, Any]:
    """Scores of sentence-transformers folders, by name, after the baselines, on held-out packages
    and other tasks.

    Args:
        encoders: Folders by name.
        parent: The causal Qwen3, folder or hub id, for three of the baselines.
        num_queries: Most queries or test texts of each task.
        seed: Chooses them.
        tasks: Names among `TASKS`.
        mteb: Names of mteb's tasks and benchmarks, such as "MTEB(eng, v2)".
        outside: Score TF-IDF, WordLlama and MiniLM as well.

    Returns:
        `tasks` (by name `metric`, `size` and `scores`: by embedder `score`, `low`, `high`),
        `tasks_not_run` and `not_run` (what each task, each baseline that could not run would need);
            if package-docs is among the tasks, `retrieval` (scores and geometry by embedder),
        `num_queries` and `num_documents`.

    Raises:
        InputError: a folder cannot be loaded, a task's name is unknown, or no installed package is
            held out.
    """
    chosen, tasks_not_run = _tasks(tasks, mteb, num_queries, seed)
    loaders: dict[str, Callable[[], Embedder]] = {}
    if outside:
        loaders |= {baselines.WORDLLAMA: baselines.wordllama, baselines.MINILM: baselines.minilm}
    not_run = {}
    if parent is not None:
        parent = resolve_checkpoint(parent)
        loaders[baselines.CAUSAL_MEAN] = lambda: baselines.parent(parent, pooling="mean")
        loaders[baselines.CAUSAL_LAST] = lambda: baselines.parent(parent, pooling="lasttoken")
        loaders[baselines.UNMASKED_MEAN] = lambda: baselines.parent(
            parent, pooling="mean", causal=False
        )
    else:
        names = (baselines.CAUSAL_MEAN, baselines.CAUSAL_LAST, baselines.UNMASKED_MEAN)
        not_run = dict.fromkeys(names, "name the parent's folder")
    for name, folder in encoders.items():
        loaders[name] = functools.partial(baselines.encoder, folder)

    found: dict[str, dict[str, dict[str, float]]] = {task.name: {} for task in chosen}
    with _progress() as progress:

        def measure(name: str, task: Task, embed: Embedder) -> None:
            if task.name in tasks_not_run:
                return
            bar = progress.add_task(f"{name}: {task.name}", total=None)
            try:
                found[task.name][name] = task.measure(
                    lambda texts: _embed(
                        embed, texts, task.max_tokens, functools.partial(progress.advance, bar)
                    )
                )
            except NotRun as reason:
                tasks_not_run[task.name] = str(reason)
            progress.remove_task(bar)

        for task in chosen:
            if outside and task.corpus:
                measure(baselines.TFIDF, task, baselines.tfidf(task.corpus))
        for name, load in loaders.items():
            try:
                embed = load()
            except NotRun as reason:
                not_run[name] = str(reason)
                continue
            for task in chosen:
                measure(name, task, embed)
    keys = ("score", "low", "high")
    metrics: dict[str, Any] = {
        "tasks": {
            task.name: {
                "metric": task.metric,
                "size": task.size,
                "scores": {
                    name: {key: row[key] for key in keys if key in row}
                    for name, row in found[task.name].items()
                },
            }
            for task in chosen
            if found[task.name]
        },
        "tasks_not_run": tasks_not_run,
        "not_run": not_run,
    }
    if PACKAGE_DOCS in found:
        metrics["retrieval"] = {
            name: {key: value for key, value in row.items() if key not in keys}
            for name, row in found[PACKAGE_DOCS].items()
        }
        packages = next(task for task in chosen if task.name == PACKAGE_DOCS)
        metrics |= {"num_queries": packages.size, "num_documents": len(packages.corpus)}
    return metrics


def _tasks(
    names: Sequence[str], mteb: Sequence[str], most: int, seed: int
) -> tuple[list[Task], dict[str, str]]:
    """The tasks by name, ours before mteb's, and what those that cannot run would need."""
    found: list[Task] = []
    not_run: dict[str, str] = {}
    for name in names:
        if name not in TASKS:
            raise InputError(f"task {name!r} is not one of {', '.join(TASKS)}")
        try:
            found += TASKS[name](most, seed)
        except NotRun as reason:
            not_run[name] = str(reason)
    for name in mteb:
        try:
            found += mteb_tasks(name)
        except NotRun as reason:
            not_run[name] = str(reason)
    return found, not_run


def embedding_space(folder: str | Path, name: str, seed: int = 0) -> dict[str, Any]:
    """What the report shows of an encoder under its `name`.

    `labels` and `matrix` of the cosines of `SIMILARITY_TEXTS`; `map` of documents of the largest
    held-out packages, in two dimensions that keep neighbours together; `neighbours` of one of each
    package among them.
    """
    from sklearn.manifold import TSNE

    embed = baselines.encoder(folder)
    texts = normalize(embed(list(SIMILARITY_TEXTS)))
    space: dict[str, Any] = {
        "name": name,
        "labels": list(SIMILARITY_TEXTS),
        "matrix": (texts @ texts.T).tolist(),
    }
    documents = documents_by_package(MAP_PACKAGES, MAP_TEXTS, seed)
    if len(documents) <= MAP_PACKAGES:
        return space
    embeddings = normalize(embed([document.text for document in documents]))
    tsne = TSNE(init="pca", perplexity=min(30, len(documents) / 4), random_state=seed)
    points = np.round(tsne.fit_transform(embeddings), 2)
    titles = [" ".join(document.text.split())[:100] for document in documents]
    groups = [document.package for document in documents]
    similar = embeddings @ embeddings.T
    np.fill_diagonal(similar, -2)
    space["map"] = {"points": points.tolist(), "groups": groups}
    space["neighbours"] = [
        {
            "text": titles[i],
            "package": group,
            "nearest": [
                [titles[j], groups[j], round(float(similar[i, j]), 3)]
                for j in np.argsort(-similar[i])[:3]
            ],
        }
        for group in dict.fromkeys(groups)
        for i in [groups.index(group)]
    ]
    return space


def provenance(
    *, started: float | None = None, commit: str | None = None, **facts: Any
) -> dict[str, Any]:
    """What a number must carry:

    command, commit, versions, hardware, and `seconds` since `started` (monotonic).
    """
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu
        )
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **({"commit": commit} if (commit := commit or describe_source("--exclude", "*")) else {}),
        **facts,
        "hardware": f"{cpu or platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        **({"seconds": round(time.monotonic() - started, 1)} if started is not None else {}),
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def _embed(
    embed: Embedder,
    texts: Sequence[str],
    max_tokens: int,
    advance: Callable[[int], None],
    block: int = 256,
) -> np.ndarray:
    """Embeddings in the order of `texts`, computed in order of length, so that little is padding."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    parts = []
    for start in range(0, len(texts), block):
        rows = order[start : start + block]
        parts.append(embed([texts[i] for i in rows], max_tokens))
        advance(len(rows))
    embeddings = np.concatenate(parts).astype(np.float32, copy=False)
    return embeddings[np.argsort(order)]


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}")
    return Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty()
    )
