"""The whole road in one call:

parent, encoder-decoder, UL2, encoder, contrastive stage, evaluation, report.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.conversion.initialize import initialize
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.package_docs import package_docs, summary_pairs
from qwen3_encdec.demo.parent import causal_embedder, parent_tokenizer, train_causal_parent
from qwen3_encdec.embedding.finetune import finetune
from qwen3_encdec.evaluation.baselines import CONTRASTIVE, ENCODER
from qwen3_encdec.evaluation.suite import (
    evaluate_denoising,
    evaluate_retrieval,
    provenance,
)
from qwen3_encdec.folders import check_output, new_folder, resolve_checkpoint, write_json
from qwen3_encdec.reports.comparison import Run, write_page
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.loop import train_to_the_end

CAUSAL_CONTRASTIVE = "Causal parent + contrastive"


@dataclass(frozen=True)
class Budget:
    """Sizes of every stage.

    Steps, not seconds: a slower machine takes longer and computes the same.
    """

    num_ranks: int = 8192
    """Entries of Qwen3's BPE that the nano parent keeps."""
    hidden_size: int = 192
    """Width of the nano parent."""
    num_hidden_layers: int = 4
    """Its layers."""
    parent_steps: int = 600
    """Causal steps of 1024 tokens."""
    ul2_steps: int = 600
    """UL2 steps."""
    ul2_batch_size: int = 4
    """Rows a UL2 step."""
    ul2_lr: float = 2e-3
    """Peak learning rate of UL2."""
    source_length: int = 256
    """Source tokens a row."""
    target_length: int = 128
    """Target tokens a row."""
    contrastive_steps: int = 160
    """Steps of each contrastive stage."""
    contrastive_batch_size: int = 32
    """Pairs a step."""
    contrastive_max_length: int = 64
    """Tokens per text in the contrastive stages."""
    contrastive_lr: float = 2e-3
    """Peak learning rate of the contrastive stages."""
    heldout_texts: int = 64
    """Held-out texts under each denoiser."""
    num_queries: int = 1000
    """Most retrieval queries."""


NANO = Budget()
"""Minutes on two cores."""
TOY = Budget(
    num_ranks=512, hidden_size=64, num_hidden_layers=2, parent_steps=3, ul2_steps=3, ul2_batch_size=2,
    contrastive_steps=2, contrastive_batch_size=8, heldout_texts=4, num_queries=50,
)  # fmt: skip
"""Seconds: shows that the parts fit, and nothing else."""
CHECKPOINT = replace(NANO, ul2_lr=1e-4, contrastive_lr=2e-5)
"""For a parent that knows something already: the learning rates of a fine-tuning."""


def run_demo(
    output_dir: str | Path = "runs/demo",
    *,
    qwen3_model: str | Path | None = None,
    budget: Budget | None = None,
    commit: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Walk the whole road and leave every box of it, metrics.json and report.html in `output_dir`.

    Args:
        output_dir: A former demo there is replaced when this one is complete.
        qwen3_model: Folder or hub id of a dense Qwen3 to start from; None trains a nano one.
        budget: By default `NANO`, or `CHECKPOINT` with a `qwen3_model`.
        commit: Recorded in the provenance.
        seed: Of every stage.

    Returns:
        What metrics.json holds: `denoising`, `retrieval`, `num_queries`, `num_documents`, `infill`,
        `not_run`, `stages` (what each stage says of itself), `seconds` by stage, `provenance`.

    Raises:
        InputError: `output_dir` is not ours, or `qwen3_model` is no dense Qwen3.
    """
    started = time.monotonic()
    budget = budget or (CHECKPOINT if qwen3_model else NANO)
    output_dir = check_output(output_dir, "demo")
    given = resolve_checkpoint(qwen3_model) if qwen3_model else None
    logging.disable_progress_bar()
    with new_folder(output_dir, "demo", seed=seed) as root:
        metrics, curves = _walk(root, given, budget, seed)
        metrics["provenance"] = provenance(
            started=started,
            commit=commit,
            seed=seed,
            qwen3_model=str(qwen3_model or "nano"),
            budget=asdict(budget),
        )
        write_json(root / "metrics.json", metrics)
        run = Run("Qwen3 to text encoder: the demo", output_dir, "demo", metrics, curves)
        write_page(root, [run], run.name)
    print(f"{summary(metrics)}\n\nreport: {output_dir / 'report.html'}", flush=True)
    return metrics


def _walk(
    root: Path, given: Path | None, budget: Budget, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All stages from a given parent, or one of our own: metrics and training curves."""
    seconds: dict[str, float] = {}
    parent = given or root / "parent"
    stages: dict[str, Any] = {}
    data = DataConfig(
        source_length=budget.source_length, target_length=budget.target_length, seed=seed
    )
    with _stage("corpus", seconds) as say:
        texts = [document.text for document in package_docs("train")]
        pairs = summary_pairs("train")
        say(f"{len(texts):,} docstrings and {len(pairs):,} pairs of the installed packages")
    if given is None:
        with _stage("parent", seconds) as say:
            stages["parent"] = trained = train_causal_parent(
                parent,
                tokenizer=parent_tokenizer(budget.num_ranks),
                texts=texts,
                hidden_size=budget.hidden_size,
                num_hidden_layers=budget.num_hidden_layers,
                steps=budget.parent_steps,
                seed=seed,
            )
            say(
                f"a nano Qwen3 of {trained['parameters']:,} parameters, {trained['loss']:.3f} nats a token"
            )
    with _stage("initialize", seconds) as say:
        report = initialize(parent, root / "init", seed=seed)
        say(f"encoder-decoder of {report.parameters:,} parameters, verified against its parent")
    with _stage("ul2", seconds) as say:
        config = TrainingConfig(
            model=str(root / "init"),
            output_dir=str(root / "ul2"),
            data=data,
            max_steps=budget.ul2_steps,
            batch_size=budget.ul2_batch_size,
            lr=budget.ul2_lr,
            warmup_steps=budget.ul2_steps // 20,
            log_every=max(1, budget.ul2_steps // 50),
            eval_every=max(1, budget.ul2_steps // 4),
            eval_examples_per_denoiser=budget.heldout_texts,
            save_every=0,
            seed=seed,
        )
        with (root / "ul2.log").open("w", encoding="utf-8") as log, redirect_stdout(log):
            checkpoint = train_to_the_end(config)
        curves = [
            json.loads(line)
            for line in (root / "ul2" / "metrics.jsonl").read_text("utf-8").splitlines()
        ]
        steps = [line for line in curves if "tokens_per_second" in line]
        tokens = steps[-1]["source_tokens"] + steps[-1]["target_tokens"]
        say(
            f"{budget.ul2_steps} steps, {tokens:,} tokens, {steps[-1]['tokens_per_second']:,.0f} a second at the end"
        )
    with _stage("extract", seconds) as say:
        extracted = extract_encoder(checkpoint, root / "encoder")
        causal_embedder(parent, root / "parent-embedder")
        say(
            f"a plain Qwen3Model of {extracted.parameters:,} parameters, read alike by the stock tools"
        )
    tuned = {CAUSAL_CONTRASTIVE: "parent-embedder", CONTRASTIVE: "encoder"}
    with _stage("contrastive", seconds) as say:
        for name, folder in tuned.items():
            stages[name] = finetune(
                root / folder,
                root / f"{folder}-contrastive",
                pairs,
                steps=budget.contrastive_steps,
                batch_size=budget.contrastive_batch_size,
                lr=budget.contrastive_lr,
                max_length=budget.contrastive_max_length,
                seed=seed,
            )
        say(
            f"{budget.contrastive_steps} steps of {budget.contrastive_batch_size} pairs, encoder and causal parent"
        )
    with _stage("evaluate", seconds) as say:
        metrics = evaluate_denoising(
            {"initialization": root / "init", "trained": checkpoint},
            num_examples=budget.heldout_texts,
            data=data,
        )
        encoders = {name: root / f"{folder}-contrastive" for name, folder in tuned.items()}
        metrics |= evaluate_retrieval(
            {ENCODER: root / "encoder", **encoders},
            parent=parent,
            num_queries=budget.num_queries,
            seed=seed,
        )
        say(
            f"{metrics['num_queries']:,} queries among {metrics['num_documents']:,} documents of held-out packages"
        )
    metrics |= {
        "stages": stages,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    return metrics, curves


def summary(metrics: dict[str, Any]) -> str:
    """The numbers of metrics.json as two small tables for a terminal."""
    before, after = metrics["denoising"]["initialization"], metrics["denoising"]["trained"]
    lines = ["", "held-out loss     " + "".join(f"{name:>8}" for name in before)]
    lines += [f"{label:<18}" + "".join(f"{x:8.3f}" for x in losses.values()) for label, losses in
              (("initialization", before), ("after UL2", after))]  # fmt: skip
    scores = metrics["retrieval"]
    width = max(map(len, scores))
    lines += ["", f"{'retrieval':<{width}}     MRR  nDCG@10     R@1"]
    lines += [
        f"{name:<{width}}  {s['mrr']:6.3f}   {s['ndcg@10']:6.3f}  {s['r@1']:6.3f}"
        for name, s in scores.items()
    ]
    return "\n".join(lines)


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[Any]:
    """Time a stage and, when it ends, print one line with what it said."""
    said: list[str] = []
    began = time.monotonic()
    yield said.append
    seconds[name] = time.monotonic() - began
    print(f"{name:<12}{seconds[name]:6.1f} s  {said[-1]}", flush=True)
