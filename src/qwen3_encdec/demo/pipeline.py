"""Run every stage in one call, from a causal parent to the report of a finetuned text encoder."""

import time
from contextlib import redirect_stdout
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
from qwen3_encdec.evaluation.retrieval import package_retrieval
from qwen3_encdec.evaluation.suite import evaluate_denoising, evaluate_retrieval, provenance
from qwen3_encdec.folders import check_output, new_folder, resolve_checkpoint, write_json
from qwen3_encdec.reports.comparison import Run, read_curves, write_page
from qwen3_encdec.reports.scores import score_text
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.loop import train_to_the_end

NANO: dict[str, Any] = {
    "num_ranks": 4096,
    "parent": {"hidden_size": 128, "num_hidden_layers": 2, "steps": 600},
    "data": {"source_length": 256, "target_length": 128},
    "ul2": {"max_steps": 800, "warmup_steps": 40, "batch_size": 4, "lr": 2e-3},
    "contrastive": {"steps": 1400, "batch_size": 64, "max_length": 24, "lr": 2e-3},
    "heldout_texts": 64,
    "num_queries": 1000,
}
"""Budget for minutes on two cores: entries of Qwen3's BPE, arguments of `train_causal_parent`,
`DataConfig`, `TrainingConfig` and `finetune`, held-out texts per denoiser, and retrieval queries.
"""
CHECKPOINT: dict[str, Any] = {
    "data": {"source_length": 128, "target_length": 64},
    "ul2": {"max_steps": 150, "warmup_steps": 15, "batch_size": 4, "lr": 1e-4},
    "contrastive": {"steps": 64, "batch_size": 32, "max_length": 32, "heldout_pairs": 64},
    "heldout_texts": 16,
    "num_queries": 500,
    "num_documents": 500,
}
"""Budget for about an hour on two cores with a pre-trained parent of 135M parameters."""


def run_demo(
    output_dir: str | Path = "runs/demo",
    *,
    qwen3_model: str | Path | None = None,
    budget: dict[str, Any] | None = None,
    full: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Run every stage and write its folder, metrics.json and report.html to `output_dir`.

    Args:
        output_dir: An earlier demo there is replaced when this one is complete.
        qwen3_model: Folder or hub id of a dense Qwen3 to start from; None trains a nano one.
        budget: By default `CHECKPOINT` if `qwen3_model` is given, else `NANO`.
        full: Also finetune the causal parent, and score it, TF-IDF and MiniLM beside the encoder.
        seed: Seed of every stage.

    Returns the contents of metrics.json. Raises InputError if `output_dir` is not a demo's or
    `qwen3_model` is not a dense Qwen3.
    """
    started = time.monotonic()
    output_dir = check_output(output_dir, "demo", inputs=[qwen3_model] if qwen3_model else ())
    budget = budget or (CHECKPOINT if qwen3_model else NANO)
    given = resolve_checkpoint(qwen3_model) if qwen3_model else None
    logging.disable_progress_bar()
    with new_folder(output_dir, "demo", seed=seed) as root:
        metrics = _run_stages(root, given, budget, full, seed)
        metrics["provenance"] = provenance(
            started=started,
            seed=seed,
            qwen3_model=str(qwen3_model or "nano"),
            budget=budget,
            full=full,
        )
        write_json(root / "metrics.json", metrics)
        curves = read_curves(root / "ul2" / "metrics.jsonl")
        run = Run("Qwen3 to text encoder: the demo", output_dir, "demo", metrics, curves)
        write_page(root, [run], run.name)
    print(f"\n{score_text(metrics)}\n\nreport: {output_dir / 'report.html'}", flush=True)
    return metrics


def _run_stages(
    root: Path, given: Path | None, budget: dict[str, Any], full: bool, seed: int
) -> dict[str, Any]:
    """Run all stages from the given parent, or a new nano one, and return the metrics."""
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def lap(stage: str, summary: str) -> None:
        seconds[stage] = round(time.monotonic() - began - sum(seconds.values()), 1)
        print(f"{stage:<12}{seconds[stage]:6.1f} s  {summary}", flush=True)

    texts, pairs = [document.text for document in package_docs("train")], summary_pairs("train")
    lap("corpus", f"{len(texts):,} docstrings and {len(pairs):,} pairs in installed packages")

    parent = given or root / "parent"
    if given is None:
        tokenizer = parent_tokenizer(budget["num_ranks"])
        result = train_causal_parent(
            parent, tokenizer=tokenizer, texts=texts, seed=seed, **budget["parent"]
        )
        lap("parent", f"nano Qwen3 with a loss of {result['loss']:.3f} nats per token")

    report = initialize(parent, root / "init", seed=seed)
    lap("initialize", f"encoder-decoder of {report.parameters:,} parameters, verified")

    config = _training(root, budget, seed)
    with (root / "ul2.log").open("w", encoding="utf-8") as log, redirect_stdout(log):
        checkpoint = train_to_the_end(config)
    lap("ul2", f"{config.max_steps} steps, logged in ul2.log")

    extracted = extract_encoder(checkpoint, root / "encoder")
    lap("extract", f"plain Qwen3Model of {extracted.parameters:,} parameters")

    encoders = {ENCODER: root / "encoder"}
    tuned = {CONTRASTIVE: "encoder"}
    if full:
        causal_embedder(parent, root / "parent-embedder")
        tuned = {"Causal parent + contrastive": "parent-embedder"} | tuned
    for name, folder in tuned.items():
        encoders[name] = root / f"{folder}-contrastive"
        finetune(root / folder, encoders[name], pairs, seed=seed, **budget["contrastive"])
    lap("contrastive", "encoder and causal parent" if full else "summary lines and bodies")

    folders = {"initialization": root / "init", "trained": checkpoint}
    metrics = evaluate_denoising(folders, num_examples=budget["heldout_texts"], data=config.data)
    task = package_retrieval(budget["num_queries"], seed, budget.get("num_documents"))
    scored = parent if full else None
    metrics |= evaluate_retrieval(encoders, parent=scored, tasks=[task], outside=full)
    lap("evaluate", f"{metrics['num_documents']:,} documents from held-out packages")
    return metrics | {"seconds": seconds}


def _training(root: Path, budget: dict[str, Any], seed: int) -> TrainingConfig:
    """Return the config of the demo's UL2 training."""
    steps = budget["ul2"]["max_steps"]
    return TrainingConfig(
        model=str(root / "init"),
        output_dir=str(root / "ul2"),
        data=DataConfig(**budget["data"], seed=seed),
        log_every=max(1, steps // 50),
        eval_every=max(1, steps // 4),
        eval_examples_per_denoiser=budget["heldout_texts"],
        save_every=0,
        seed=seed,
        **budget["ul2"],
    )
