"""One evaluation for each kind of folder: denoising for an encoder-decoder, retrieval, mteb and
geometry for an encoder.

Every embedder, baselines first, goes through the same function in the same run, each text with the
prompt of its role. A baseline or task whose package is missing is reported as not run, with what to
install.
"""

import functools
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import heldout_examples
from qwen3_encdec.evaluation import baselines
from qwen3_encdec.evaluation.baselines import Embedder, NotRun
from qwen3_encdec.evaluation.denoising import denoising_losses, infill_examples
from qwen3_encdec.evaluation.retrieval import (
    PACKAGE_DOCS,
    Embed,
    Task,
    package_retrieval,
)
from qwen3_encdec.folders import (
    InputError,
    default_device,
    describe_source,
    load_model,
    load_tokenizer,
    package_versions,
    resolve_checkpoint,
)

MTEB_MAX_TOKENS = 512


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
    for label, folder in tqdm(folders.items(), "held-out denoising", disable=None):
        model, tokenizer = load_model(folder).to(device), load_tokenizer(folder)
        examples = heldout_examples(data, tokenizer, num_examples)
        metrics["denoising"][label] = denoising_losses(model, examples, denoiser_names=names)
    by_denoiser = {}
    for index, denoiser in enumerate(data.denoisers):
        if denoiser.mean_span is not None:
            own = [example for example in examples if example.denoiser == index]
            found = infill_examples(model, tokenizer, own)
            metrics.setdefault("infill", found)
            by_denoiser[denoiser.name] = found["exact_rate"]
    if by_denoiser:
        metrics["infill"] |= {"by_denoiser": by_denoiser}
    return metrics


def evaluate_retrieval(
    encoders: Mapping[str, str | Path],
    *,
    parent: str | Path | None = None,
    tasks: Sequence[Task] | None = None,
    mteb: Sequence[str] = (),
    num_queries: int = 1000,
    seed: int = 0,
    outside: bool = True,
) -> dict[str, Any]:
    """Score sentence-transformers folders, by name, after the baselines.

    Args:
        encoders: Folders by name.
        parent: The causal Qwen3, folder or hub id, for three of the baselines.
        tasks: By default retrieval in the docstrings of held-out packages.
        mteb: Names of mteb's tasks and benchmarks, such as "MTEB(eng, v2)".
        num_queries: Most queries of the default task.
        seed: Chooses them.
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
    chosen = [package_retrieval(num_queries, seed)] if tasks is None else list(tasks)
    tasks_not_run: dict[str, str] = {}
    for name in mteb:
        try:
            chosen += mteb_tasks(name)
        except NotRun as reason:
            tasks_not_run[name] = str(reason)
    loaders, not_run = _loaders(encoders, parent, outside)
    found: dict[str, dict[str, dict[str, float]]] = {task.name: {} for task in chosen}

    def measure(name: str, task: Task, embedder: Embedder) -> None:
        if task.name in tasks_not_run:
            return
        with tqdm(desc=f"{name}: {task.name}", unit="text", disable=None, leave=False) as bar:
            embed = functools.partial(_embed, embedder, task.max_tokens, bar.update)
            try:
                found[task.name][name] = task.measure(embed)
            except NotRun as reason:
                tasks_not_run[task.name] = str(reason)

    for task in chosen:
        if outside and task.corpus:
            measure(baselines.TFIDF, task, baselines.tfidf(task.corpus))
    for name, load in loaders.items():
        try:
            embedder = load()
        except NotRun as reason:
            not_run[name] = str(reason)
            continue
        for task in chosen:
            measure(name, task, embedder)
    return _as_metrics(chosen, found) | {"tasks_not_run": tasks_not_run, "not_run": not_run}


def _loaders(
    encoders: Mapping[str, str | Path], parent: str | Path | None, outside: bool
) -> tuple[dict[str, Callable[[], Embedder]], dict[str, str]]:
    """Embedders by name, not loaded yet, and why some cannot be."""
    loaders: dict[str, Callable[[], Embedder]] = {}
    if outside:
        loaders |= {baselines.WORDLLAMA: baselines.wordllama, baselines.MINILM: baselines.minilm}
    not_run = {}
    if parent is not None:
        read = functools.partial(baselines.parent, resolve_checkpoint(parent))
        loaders[baselines.CAUSAL_MEAN] = functools.partial(read, pooling="mean")
        loaders[baselines.CAUSAL_LAST] = functools.partial(read, pooling="lasttoken")
        loaders[baselines.UNMASKED_MEAN] = functools.partial(read, pooling="mean", causal=False)
    else:
        names = (baselines.CAUSAL_MEAN, baselines.CAUSAL_LAST, baselines.UNMASKED_MEAN)
        not_run = dict.fromkeys(names, "name the parent's folder")
    for name, folder in encoders.items():
        loaders[name] = functools.partial(baselines.encoder, folder)
    return loaders, not_run


def _as_metrics(
    tasks: Sequence[Task], found: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> dict[str, Any]:
    """The scores in the form of metrics.json."""
    keys = ("score", "low", "high")
    metrics: dict[str, Any] = {"tasks": {}}
    for task in tasks:
        rows = found[task.name]
        if not rows:
            continue
        scores = {name: {key: row[key] for key in keys if key in row} for name, row in rows.items()}
        facts = {"metric": task.metric, "size": task.size}
        metrics["tasks"][task.name] = facts | {"scores": scores}
        if task.name == PACKAGE_DOCS:
            metrics["retrieval"] = {
                name: {key: value for key, value in row.items() if key not in keys}
                for name, row in rows.items()
            }
            metrics |= {"num_queries": task.size, "num_documents": len(task.corpus)}
    return metrics


@dataclass(frozen=True)
class MtebTask:
    """One task of mteb, scored by mteb.

    In mteb's retrieval the order of the results decides a tie, so that a model which cannot tell
    texts apart scores above zero.
    """

    task: Any
    max_tokens: int = MTEB_MAX_TOKENS

    @property
    def name(self) -> str:
        """mteb's name of it."""
        return self.task.metadata.name

    @property
    def metric(self) -> str:
        """mteb's main score of it."""
        return self.task.metadata.main_score

    @property
    def corpus(self) -> list[str]:
        """Nothing: mteb's texts are not known beforehand, so TF-IDF is not run."""
        return []

    @property
    def size(self) -> int:
        """Splits and subsets that the score is a mean of."""
        return len(self.task.eval_splits) * len(self.task.hf_subsets)

    def measure(self, embed: Embed) -> dict[str, float]:
        """`score`; mteb gives no interval. Raises NotRun if the data cannot be had."""
        import mteb

        if not self.task.data_loaded:
            try:
                self.task.load_data()
            except Exception as error:  # the hub client raises a dozen unrelated types
                reason = str(error).strip().partition("\n")[0]
                raise NotRun(f"its data cannot be loaded: {reason}") from None
        results = mteb.evaluate(mteb_model(embed), self.task, cache=None, show_progress_bar=False)
        return {"score": float(results.task_results[0].get_score())}


def mteb_tasks(name: str) -> list[Task]:
    """The tasks of a benchmark, such as "MTEB(eng, v2)", or one task, such as "STSBenchmark".

    Raises:
        NotRun: mteb is not installed.
        InputError: mteb knows neither.
    """
    try:
        import mteb
    except ModuleNotFoundError:
        raise NotRun("pip install mteb") from None
    try:
        return [MtebTask(task) for task in mteb.get_benchmark(name).tasks]
    except KeyError:
        pass
    try:
        return [MtebTask(mteb.get_task(name))]
    except KeyError:
        raise InputError(f"mteb knows neither a benchmark nor a task {name!r}") from None


def mteb_model(embed: Embed, name: str = "qwen3-encdec/embedder") -> Any:
    """An embedder as mteb's encoder; mteb's prompt type of a text is its role."""
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder

    class Encoder(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": "local", "modalities": ["text"]}
        )

        def encode(self, inputs: Any, *, prompt_type: Any = None, **kwargs: Any) -> np.ndarray:
            role = None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type))
            return embed([text for batch in inputs for text in batch["text"]], role)

    return Encoder()


def provenance(
    *, started: float | None = None, commit: str | None = None, **facts: Any
) -> dict[str, Any]:
    """Facts that a number must carry: command, commit, versions, hardware, and `seconds` since
    `started` (monotonic).
    """
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if match := re.search(r"model name\s*: (.*)", text):
            cpu = match[1]
    hardware = f"{cpu}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.get_device_name()}"
    found: dict[str, Any] = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    if commit := commit or describe_source("--exclude", "*"):
        found["commit"] = commit
    found |= {**facts, "hardware": hardware}
    if started is not None:
        found["seconds"] = round(time.monotonic() - started, 1)
    return found | {"versions": {"python": platform.python_version(), **package_versions()}}


def _embed(
    embedder: Embedder,
    max_tokens: int,
    advance: Callable[[int], Any],
    texts: Sequence[str],
    role: str | None = None,
    block: int = 256,
) -> np.ndarray:
    """Embeddings in the order of `texts`, computed by length, so that little is padding."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    parts = []
    for start in range(0, len(texts), block):
        rows = order[start : start + block]
        parts.append(embedder([texts[i] for i in rows], max_tokens, role))
        advance(len(rows))
    embeddings = np.concatenate(parts).astype(np.float32, copy=False)
    return embeddings[np.argsort(order)]
