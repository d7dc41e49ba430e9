"""Evaluate a folder: denoising for an encoder-decoder, retrieval and mteb for an encoder.

Every embedder, baselines first, is scored by the same function in the same run. A baseline or task
whose package is missing is reported as not run, with the package to install.
"""

import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import heldout_examples
from qwen3_encdec.evaluation import baselines
from qwen3_encdec.evaluation.baselines import NotRun
from qwen3_encdec.evaluation.denoising import denoising_losses, infill_examples
from qwen3_encdec.evaluation.retrieval import PACKAGE_DOCS, Embed, Task
from qwen3_encdec.folders import (
    InputError,
    default_device,
    describe_source,
    first_line,
    load_model,
    load_tokenizer,
    package_versions,
    resolve_checkpoint,
)


def evaluate_denoising(
    folders: Mapping[str, str | Path], *, num_examples: int = 64, data: DataConfig | None = None
) -> dict[str, Any]:
    """Return `denoising`, nats per target token by label and denoiser, and `infill` (last folder).

    `infill` holds `infill_examples` of the first denoiser with gaps, each example with the other
    folders' text by label, and `by_denoiser`, the share of exactly filled gaps by denoiser.
    Raises InputError as `load_model` and `heldout_examples` do.
    """
    data = data or DataConfig()
    names = [denoiser.name for denoiser in data.denoisers]
    metrics: dict[str, Any] = {"denoising": {}}
    gapped = [i for i, denoiser in enumerate(data.denoisers) if denoiser.mean_span is not None]
    filled: dict[str, dict[str, Any]] = {}
    for label, folder in tqdm(folders.items(), "held-out denoising", disable=None):
        model, tokenizer = load_model(folder).to(default_device()), load_tokenizer(folder)
        examples = heldout_examples(data, tokenizer, num_examples)
        metrics["denoising"][label] = denoising_losses(model, examples, denoiser_names=names)
        own = [[example for example in examples if example.denoiser == i] for i in gapped]
        if gapped:
            filled[label] = infill_examples(model, tokenizer, own[0])
    if gapped:
        _, infill = filled.popitem()  # the last folder's
        rest = [infill_examples(model, tokenizer, gaps)["exact_rate"] for gaps in own[1:]]
        rates = (infill["exact_rate"], *rest)
        infill["by_denoiser"] = dict(zip((names[i] for i in gapped), rates, strict=True))
        for label, found in filled.items():
            for row, other in zip(infill["examples"], found["examples"], strict=True):
                row[label] = other["generated"]
        metrics["infill"] = infill
    return metrics


def evaluate_retrieval(
    encoders: Mapping[str, str | Path],
    *,
    tasks: Sequence[Task],
    parent: str | Path | None = None,
    mteb: Sequence[str] = (),
    outside: bool = True,
) -> dict[str, Any]:
    """Score the baselines, then sentence-transformers folders by name.

    Args:
        encoders: Folders by name.
        tasks: Such as `package_retrieval` and `pairs_retrieval` build.
        parent: The causal Qwen3 (folder or hub id) for three of the baselines.
        mteb: Names of mteb's tasks and benchmarks, such as "MTEB(eng, v2)".
        outside: Also score TF-IDF and MiniLM, and list the parent baselines if `parent` is None.

    Returns:
        `tasks` (by name `metric`, `size` and `scores` by embedder), `tasks_not_run` and `not_run`
        (what each would need); for package-docs also `retrieval` (scores by embedder),
        `num_queries` and `num_documents`.

    Raises:
        InputError: a folder cannot be loaded, or a task's name is unknown or occurs twice.
    """
    if parent is not None:
        parent = resolve_checkpoint(parent)  # before any work
    chosen = list(tasks)
    tasks_not_run: dict[str, str] = {}
    for name in mteb:
        try:
            chosen += mteb_tasks(name)
        except NotRun as reason:
            tasks_not_run[name] = str(reason)
    not_run: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for task in chosen:
        if task.name in found:
            raise InputError(f"two tasks are named {task.name}; rename one or list it once")
        found[task.name] = {"metric": task.metric, "size": task.size, "scores": {}}
    loaders = _loaders(encoders, parent, outside)
    for name, load in tqdm(loaders.items(), "retrieval", disable=None):
        try:
            embedder = load()
        except NotRun as reason:
            not_run[name] = str(reason)
            continue
        for task in chosen:
            if task.name in tasks_not_run or (name == baselines.TFIDF and not task.documents):
                continue
            use = baselines.tfidf(task.documents) if name == baselines.TFIDF else embedder
            embed = partial(use, max_tokens=task.max_tokens)
            try:
                found[task.name]["scores"][name] = task.measure(embed)
            except NotRun as reason:
                tasks_not_run[task.name] = str(reason)
    scored = {name: entry for name, entry in found.items() if entry["scores"]}
    metrics: dict[str, Any] = {"tasks": scored, "tasks_not_run": tasks_not_run, "not_run": not_run}
    if PACKAGE_DOCS in scored:
        (task,) = [task for task in chosen if task.name == PACKAGE_DOCS]
        metrics |= {"num_queries": task.size, "num_documents": len(task.documents), "retrieval": {}}
        for name, row in scored[PACKAGE_DOCS]["scores"].items():
            metrics["retrieval"][name] = {key: row[key] for key in ("mrr", "ndcg@10", "r@1")}
    return metrics


def _loaders(
    encoders: Mapping[str, str | Path], parent: str | Path | None, outside: bool
) -> dict[str, Callable[[], Any]]:
    """Return functions that load the embedders by name; TF-IDF is fitted for each task instead."""

    def read(**options: Any) -> Embed:
        if parent is None:
            raise NotRun("pass the causal parent's folder or hub id")
        return baselines.parent(parent, **options)

    own = {name: partial(baselines.encoder, folder) for name, folder in encoders.items()}
    parents = {
        baselines.CAUSAL_MEAN: partial(read, pooling="mean"),
        baselines.CAUSAL_LAST: partial(read, pooling="lasttoken"),
        baselines.UNMASKED_MEAN: partial(read, pooling="mean", causal=False),
    }
    others = {baselines.TFIDF: lambda: None, baselines.MINILM: baselines.minilm}
    return (others if outside else {}) | (parents if outside or parent else {}) | own


class MtebTask:
    """A single mteb task, scored by mteb, which gives no interval.

    mteb's retrieval breaks ties by the order of the results, so a model that embeds all texts alike
    scores above zero.
    """

    def __init__(self, task: Any) -> None:
        self.task, self.name, self.metric = task, task.metadata.name, task.metadata.main_score
        self.size = len(task.eval_splits) * len(task.hf_subsets)
        self.max_tokens = 512
        self.documents: list[str] = []  # unknown in advance, so TF-IDF is not run

    def measure(self, embed: Embed) -> dict[str, float]:
        """Return `score`. Raises NotRun if the data cannot be loaded."""
        import mteb

        try:
            if not self.task.data_loaded:
                self.task.load_data()
        except Exception as error:  # the hub client raises a dozen unrelated types
            raise NotRun(f"its data cannot be loaded: {first_line(error)}") from None
        results = mteb.evaluate(mteb_model(embed), self.task, cache=None, show_progress_bar=False)
        return {"score": float(results.task_results[0].get_score())}


def mteb_tasks(name: str) -> list[Task]:
    """Return the tasks of a benchmark ("MTEB(eng, v2)") or a single task ("STSBenchmark").

    Raises NotRun if mteb is not installed, InputError if it knows neither.
    """
    try:
        import mteb
    except ModuleNotFoundError:
        raise NotRun("pip install mteb") from None
    for find in (lambda: mteb.get_benchmark(name).tasks, lambda: [mteb.get_task(name)]):
        try:
            return [MtebTask(task) for task in find()]
        except KeyError:
            continue
    raise InputError(f"mteb has no benchmark or task named {name!r}")


def mteb_model(embed: Embed) -> Any:
    """Wrap an embedder as an mteb encoder; the prompt type of a text is its role."""
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder

    facts = {"name": "qwen3-encdec/embedder", "revision": "local", "modalities": ["text"]}

    class Encoder(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty(facts)

        def encode(self, inputs: Any, *, prompt_type: Any = None, **kwargs: Any) -> np.ndarray:
            role = None if prompt_type is None else prompt_type.value
            return embed([text for batch in inputs for text in batch["text"]], role)

    return Encoder()


def provenance(*, started: float | None = None, **facts: Any) -> dict[str, Any]:
    """Return the facts to record with a result: command, commit, versions, hardware, and `seconds`
    since `started` (monotonic).
    """
    hardware = f"{_processor()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.get_device_name()}"
    found: dict[str, Any] = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    if commit := facts.pop("commit", None) or describe_source("--exclude", "*"):
        found["commit"] = commit
    found |= {**facts, "hardware": hardware}
    if started is not None:
        found["seconds"] = round(time.monotonic() - started, 1)
    return found | {"versions": {"python": platform.python_version(), **package_versions()}}


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    return match[1] if match else platform.processor() or platform.machine()
