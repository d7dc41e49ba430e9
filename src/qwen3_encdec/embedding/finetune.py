"""Finetune an encoder into an embedding model with sentence-transformers' own trainer and losses.

Held-out pairs are scored before, during and after training, and the best weights are kept.
Finetuning fails without writing a folder if batches cannot be filled with distinct texts or if a
loss or weight is not finite.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from datasets import (
    Dataset,
    Features,
    Value,
    concatenate_datasets,
    disable_progress_bars,
    load_dataset,
)
from datasets.exceptions import DatasetsError
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from qwen3_encdec.conversion.card import inherited, write_card
from qwen3_encdec.data.config import Count, Natural, NotNegative, Number, Positive, Seed, Several
from qwen3_encdec.data.package_docs import summary_pairs
from qwen3_encdec.evaluation.retrieval import retrieval_of_pairs
from qwen3_encdec.folders import (
    InputError,
    check_output,
    copy_without_weights,
    input_errors,
    new_folder,
    read_json,
    write_json,
)

SCORE = "eval_ndcg@10"
PROJECTION = "projection.safetensors"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FinetuneConfig:
    """Settings of a finetuning, except the encoder it starts from."""

    inputs: Annotated[list[str], Field(min_length=1)] = field(
        default_factory=lambda: ["package-docs"]
    )
    """package-docs (summary line and body of docstrings), .jsonl, .csv or .parquet files, hub
    datasets (ORG/NAME:CONFIG).
    """
    columns: Annotated[list[str], Field(min_length=2)] = field(
        default_factory=lambda: ["anchor", "positive"]
    )
    """Text columns of files and hub datasets: a query, its document, then hard negatives."""
    query_prompt: str | None = None
    """Prefix of every query, in training and, through the written folder, in every later use; None
    keeps the encoder's own.
    """
    document_prompt: str | None = None
    """The same for documents and negatives."""
    max_length: Count = 128
    """Tokens per text while training; the folder keeps its own limit for use."""
    teacher: str | None = None
    """sentence-transformers folder to distill from; None learns from the pairs, contrastively."""
    temperature: Positive = 0.05
    """Temperature of the softmax over cosines."""
    symmetric: bool = True
    """Also contrast each document with all queries, not only each query with all documents."""
    matryoshka_dims: list[Number] = field(default_factory=list)
    """Leading dimensions trained as embeddings of their own, as counts or shares of width (0.5)."""
    spread_weight: NotNegative = 0.0
    """Weight of the spread-out regularizer on each side's embeddings."""
    steps: Count = 200
    """Optimizer steps."""
    batch_size: Several = 64
    """Pairs per step; each is a negative for the others, so all their texts are distinct."""
    mini_batch_size: Natural = 0
    """Pairs in memory at once (GradCache, at the cost of one more forward pass); 0 is all."""
    lr: Positive | None = None
    """Peak learning rate after linear warm-up over a tenth of the steps, then decayed linearly.
    Default: 2e-5 from width 1024 on, 2e-5 x (1024 / width)^2 below it, at most 1e-3.
    """
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    heldout_pairs: Natural = 256
    """Pairs held out of training for scoring, at most a tenth of all; 0 disables scoring."""
    eval_every: Natural = 0
    """Steps between scores and checkpoints; 0 is a quarter of the steps."""
    seed: Seed = 0
    """Seed for the choice and order of the pairs."""


def finetune(
    encoder_dir: str | Path,
    output_dir: str | Path,
    examples: Sequence[tuple[str, ...]] | None = None,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Train an encoder so that matching texts are closer than those that do not match.

    Args:
        encoder_dir: A sentence-transformers folder, such as `extract_encoder` writes.
        output_dir: Receives a copy of it with trained weights, the config's prompts, a model card
            and metrics.jsonl. Until then, checkpoints are in OUTPUT.training.
        examples: (query, document) or (query, document, negative, ...) texts, instead of the
            config's `inputs`. They are shuffled and repeated as often as the steps need.
        config: By default `FinetuneConfig()`.
        resume: Continue an interrupted call from its newest checkpoint, with the same settings.
        changes: Fields of the config to replace.

    Returns:
        `loss` (mean of the last tenth of the steps), `pairs` trained on and, if some are held out,
        `heldout`: their nDCG@10 `before`, `after` and at the `best` step, which is kept.

    Raises InputError if batches cannot be filled with distinct texts, a value is not finite, an
    input or folder cannot be read, settings conflict, or a launcher started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("finetuning runs in one process: start it without a launcher")
    disable_progress_bars()
    config = replace(config or FinetuneConfig(), **changes)
    encoder_dir = Path(encoder_dir)
    given = [encoder_dir, *config.inputs, config.teacher or encoder_dir]
    output_dir = check_output(output_dir, "encoder", inputs=given)
    model = _load(encoder_dir)
    config = _fitted(config, model)
    if config.teacher and (config.mini_batch_size or config.spread_weight):
        raise InputError("mini_batch_size and spread_weight cannot be used with a teacher")
    teacher = _load(config.teacher) if config.teacher else None
    if teacher is not None and config.matryoshka_dims:
        own, wanted = (each.get_embedding_dimension() for each in (model, teacher))
        if own != wanted:  # the projection to the teacher's width takes whole embeddings
            raise InputError(f"matryoshka_dims need a teacher of width {own}, not {wanted}")
    full = read_examples(config) if examples is None else _complete("examples", _dataset(examples))
    dataset, heldout = _split(config, full)
    _check_batches(config, dataset)
    settings = {"encoder": str(encoder_dir.resolve()), "examples": len(full), **asdict(config)}
    work, checkpoint = _open_work(output_dir, settings, resume)
    saved_dtype = model.dtype
    if teacher is not None:
        dataset = dataset.select(range(min(len(dataset), config.steps * config.batch_size)))
    if checkpoint is not None and checkpoint.name == f"checkpoint-{config.steps}":
        # Only the folder is missing; the trainer would make one step more.
        model = _load(checkpoint)
        history = read_json(checkpoint / "trainer_state.json")["log_history"]
    else:
        try:
            if teacher is not None:
                dataset = _add_labels(dataset, teacher, work / "labels.arrow")
            history = _train(config, model, dataset, heldout, work, checkpoint)
        except InputError:  # any other error keeps the checkpoints
            shutil.rmtree(work)
            raise
    scores = {line["step"]: line[SCORE] for line in history if SCORE in line}
    best = max(scores, key=scores.__getitem__, default=config.steps)  # the earliest of equals
    if scores:
        model = _load(work / f"checkpoint-{best}" if best else encoder_dir)
    facts = {"finetuned_from": str(encoder_dir), "config": asdict(config)}
    with new_folder(output_dir, "encoder", **facts) as folder:
        model.to(saved_dtype).save_pretrained(str(folder), create_model_card=False)
        copy_without_weights(encoder_dir, folder)
        shutil.copy(work / "metrics.jsonl", folder)
        file = folder / "config_sentence_transformers.json"
        prompts = {"query": config.query_prompt, "document": config.document_prompt}
        write_json(file, {**read_json(file), "prompts": {**model.prompts, **prompts}})
        held = {f"nDCG@10 at step {step}": f"{score:.4f}" for step, score in scores.items()}
        sections = {"Held-out pairs": held | {"kept": f"step {best}"}, "Finetuning": asdict(config)}
        write_card(folder, output_dir.resolve().name, inherited(encoder_dir), sections)
    shutil.rmtree(work)
    loss = [line["loss"] for line in history if "loss" in line][-1]
    result: dict[str, Any] = {"loss": loss, "pairs": len(dataset)}
    if scores:
        steps = {"before": 0, "after": max(scores), "best": best}
        result["heldout"] = {name: scores[step] for name, step in steps.items()}
    return result


def _fitted(config: FinetuneConfig, model: SentenceTransformer) -> FinetuneConfig:
    """Fill in the settings that depend on the encoder's width and prompts."""
    width = model.get_embedding_dimension() or 0
    lr = config.lr or min(1e-3, 2e-5 * max(1.0, 1024 / width) ** 2)
    dims = [round(size * width) if 0 < size < 1 else size for size in config.matryoshka_dims]
    if not all(2 <= size <= width and size == int(size) for size in dims):
        limits = f"shares below 1 or integers from 2 to the width {width}"
        raise InputError(f"matryoshka_dims {config.matryoshka_dims} must be {limits}")
    if config.query_prompt is None:
        config = replace(config, query_prompt=model.prompts.get("query") or "")
    if config.document_prompt is None:
        config = replace(config, document_prompt=model.prompts.get("document") or "")
    return replace(config, lr=lr, matryoshka_dims=[int(size) for size in dims])


def _split(config: FinetuneConfig, full: Dataset) -> tuple[Dataset, Dataset | None]:
    """Split the pairs into those to train on and those to score, which share no text."""
    size = min(config.heldout_pairs, len(full) // 10)
    if size < 2:
        if config.heldout_pairs:
            print("warning: no pairs held out; 20 are needed", file=sys.stderr)
        return full.shuffle(config.seed), None
    parts = full.train_test_split(size, seed=config.seed)
    heldout = parts["test"]
    texts = {*heldout["anchor"], *heldout["positive"]}
    train = parts["train"].filter(lambda row: not {row["anchor"], row["positive"]} & texts)
    if len(train) < 0.8 * len(full) or len({*heldout["positive"]}) < 2:
        print("warning: no pairs held out; texts repeat in too many of them", file=sys.stderr)
        return full.shuffle(config.seed), None
    if left_out := len(parts["train"]) - len(train):
        print(f"{left_out:,} examples share a text with held-out ones, left out", file=sys.stderr)
    return train, heldout


def _check_batches(config: FinetuneConfig, dataset: Dataset) -> None:
    """Reject too few distinct texts: the sampler would make smaller batches, down to one pair."""
    size = config.batch_size
    for name in dataset.column_names:
        batches = dataset.select_columns(name).iter(1000)  # all texts might not fit into memory
        distinct = len({hash(text) for batch in batches for text in batch[name]})
        if distinct < size:
            remedy = f"lower batch_size to {distinct} or add texts" if distinct > 1 else "add texts"
            raise InputError(
                f"column {name} has {distinct} distinct texts, and a batch of {size} needs {size}: "
                f"{remedy}"
            )
        if distinct < len(dataset) / 2:
            counts = f"{distinct:,} distinct texts in {len(dataset):,} pairs"
            print(f"warning: column {name} has {counts}; rare ones repeat more", file=sys.stderr)


def _open_work(output: Path, settings: dict[str, Any], resume: bool) -> tuple[Path, Path | None]:
    """Return the folder for checkpoints and metrics, and the checkpoint to resume from, if any."""
    output = output.absolute()  # "." has no name
    work = output.with_name(f"{output.name}.training")
    # The trainer writes this file last; a checkpoint without it was interrupted.
    complete = [file.parent for file in work.glob("checkpoint-*/trainer_state.json")]
    newest = max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    if resume and newest is None:
        raise InputError(f"{work} holds no checkpoint: start again without resuming")
    if newest and not resume:
        raise InputError(f"{work} holds an interrupted run: resume or delete it")
    if resume:
        saved = read_json(work / "settings.json")
        changed = [name for name, value in settings.items() if saved.get(name) != value]
        if changed:
            found = ", ".join(f"{name} {saved.get(name)}" for name in changed)
            raise InputError(f"{work} was started with {found}: resume with the same")
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "settings.json", settings)
    return work, newest


class HeldoutRetrieval(BaseEvaluator):
    """nDCG@10 of retrieving each query's documents among all held-out ones."""

    def __init__(self, config: FinetuneConfig, pairs: Dataset) -> None:
        super().__init__()
        self.prompts = {"query": config.query_prompt, "document": config.document_prompt}
        texts = zip(pairs["anchor"], pairs["positive"], strict=True)
        self.task = retrieval_of_pairs("held out", texts)

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score a model."""

        def embed(texts: list[str], role: str) -> np.ndarray:
            return model.encode(texts, prompt=self.prompts[role])

        return {"ndcg@10": self.task.measure(embed)["ndcg@10"]}


class _Watch(TrainerCallback):
    """Write metrics.jsonl, print progress, stop training if a value is not finite, and save the
    projection to a teacher's width, which checkpoints lack.
    """

    def __init__(self, projection: nn.Module | None = None) -> None:
        self.projection = projection

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.projection is not None and control.should_save:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            folder.mkdir(exist_ok=True)  # the trainer's files follow, trainer_state.json last
            save_file(self.projection.state_dict(), folder / PROJECTION)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        lines = [json.dumps(line) + "\n" for line in state.log_history]
        Path(args.output_dir, "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        shown = {name: float(logs[name]) for name in ("loss", "grad_norm", SCORE) if name in logs}
        for name, value in shown.items():
            if not math.isfinite(value):
                raise InputError(
                    f"{name} is {value} at step {state.global_step}: lower lr "
                    f"(now {args.learning_rate:g}) or check the training texts"
                )
        if shown:
            facts = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            print(f"step {state.global_step:,} of {args.max_steps:,}: {facts}", file=sys.stderr)


def _train(
    config: FinetuneConfig,
    model: SentenceTransformer,
    dataset: Dataset,
    heldout: Dataset | None,
    work: Path,
    checkpoint: Path | None,
) -> list[dict[str, Any]]:
    """Train with fp32 weights and return the trainer's log."""
    model.float()
    model.max_seq_length = min(config.max_length, model.max_seq_length or config.max_length)
    every = config.eval_every or max(1, config.steps // 4)
    prompts = dict.fromkeys(dataset.column_names, config.document_prompt or "")
    prompts["anchor"] = config.query_prompt or ""
    prompts.pop("label", None)
    set_seed(config.seed)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(work),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        batch_sampler="no_duplicates",
        prompts=prompts if any(prompts.values()) else None,
        learning_rate=config.lr or 0.0,
        weight_decay=config.weight_decay,
        warmup_steps=config.steps // 10,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        seed=config.seed,
        logging_steps=max(1, config.steps // 10),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=config.gradient_checkpointing,
        eval_strategy="steps" if heldout else "no",
        eval_steps=every,
        eval_on_start=bool(heldout) and not checkpoint,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        metric_for_best_model=SCORE,  # its checkpoint is never deleted
    )
    # As it does for a model on several GPUs itself: DataParallel would train on a batch for each.
    arguments._n_gpu = 1
    loss = _loss(config, model, dataset)
    projection = getattr(getattr(loss, "loss", loss), "projection", None)
    if checkpoint and projection is not None:
        projection.load_state_dict(load_file(checkpoint / PROJECTION))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        loss=loss,
        evaluator=HeldoutRetrieval(config, heldout) if heldout else None,
        callbacks=[_Watch(projection)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step != config.steps:
        made = f"training ended at step {trainer.state.global_step} of {config.steps}"
        raise InputError(f"{made}: too few pairs with distinct texts; lower batch_size")
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"weight {name} is not finite after training: lower lr")
    return trainer.state.log_history


def read_examples(config: FinetuneConfig) -> Dataset:
    """Read all examples of the config's inputs, without those that lack a text.

    Raises InputError if an input cannot be read, or has no such text column.
    """
    parts = []
    for name in config.inputs:
        if name != "package-docs":
            parts.append(_read(name, config.columns))
        elif len(config.columns) == 2:
            parts.append(_dataset(summary_pairs("train")))
        else:
            raise InputError("package-docs has pairs: list two columns, or remove it from inputs")
    return concatenate_datasets(parts)


def _read(name: str, columns: list[str]) -> Dataset:
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    kind = kinds.get(Path(name).suffix.lower())
    if kind is None and Path(name).is_file():
        raise InputError(f"input {name} must be one of {', '.join(kinds)}")
    hub_id, _, subset = name.partition(":")
    try:
        if kind:
            options: dict[str, Any] = {}
            if kind == "csv":  # every cell is text, also 007 and NA
                converters = dict.fromkeys(columns, str)
                options = {"converters": converters, "keep_default_na": False}
            part = load_dataset(kind, data_files=name, split="train", **options)
        else:
            part = load_dataset(hub_id, subset or None, split="train")
        part = part.select_columns(columns)
        for column, feature in part.features.items():
            # `datasets` would write the JSON of each cell, also of the texts.
            if not isinstance(feature, Value):
                raise ValueError(f"column {column} has lists or values of several types, not texts")
        part = part.cast(Features(dict.fromkeys(columns, Value("string"))))
    except StopIteration:  # of `datasets`
        raise InputError(f"input {name} has no rows") from None
    except (DatasetsError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"input {name} cannot be read: {reason}") from None
    part = _complete(f"input {name}", part)
    return part.rename_columns(dict(zip(columns, _names(len(columns)), strict=True)))


def _complete(name: str, full: Dataset) -> Dataset:
    """Leave out the examples that lack a text, and say how many."""
    part = full.filter(lambda row: all(text and not text.isspace() for text in row.values()))
    if left_out := len(full) - len(part):
        print(f"{name}: {left_out:,} examples lack a text, left out", file=sys.stderr)
    return part


def _names(columns: int) -> list[str]:
    return ["anchor", "positive", *(f"negative_{i}" for i in range(1, columns - 1))]


def _dataset(examples: Sequence[tuple[str, ...]]) -> Dataset:
    if not examples:
        raise InputError("there are no examples to train on")
    with input_errors("examples must be tuples of two or more texts, all of one length"):
        columns = [list(column) for column in zip(*examples, strict=True)]
        names = _names(len(columns))
        texts = Features(dict.fromkeys(names, Value("string")))
        named = dict(zip(names, columns, strict=True))
        return Dataset.from_dict(named, features=texts)


def _load(folder: str | Path) -> SentenceTransformer:
    if not (Path(folder) / "modules.json").is_file():
        raise InputError(
            f"{folder} is not a sentence-transformers folder; make one with: qwen3-encdec extract"
        )
    with input_errors(f"{folder} cannot be loaded"):
        model = SentenceTransformer(str(folder), local_files_only=True)
    model.truncate_dim = None  # train whole embeddings; the written folder keeps the base's
    # Otherwise the trainer embeds examples for every checkpoint's model card.
    model.model_card_data.generate_widget_examples = False
    model.model_card_data.widget = [{}]
    return model


def _add_labels(dataset: Dataset, teacher: SentenceTransformer, file: Path) -> Dataset:
    """Add the teacher's embeddings of every text, [columns, dimensions] fp32, as labels.

    They are written to `file`: those of a million texts would not fit into memory.
    """

    def embed(rows: dict[str, list[str]]) -> dict[str, np.ndarray]:
        columns = []
        for name, texts in rows.items():
            encode = teacher.encode_query if name == "anchor" else teacher.encode_document
            columns.append(encode(texts, normalize_embeddings=True))
        return {"label": np.stack(columns, axis=1)}

    # A fingerprint of our own: the library's would read the teacher's weights.
    options: Any = {"cache_file_name": str(file), "new_fingerprint": "labels"}
    return dataset.map(embed, batched=True, load_from_cache_file=False, **options)


class _Contrastive(losses.CachedMultipleNegativesRankingLoss):
    """Contrastive loss plus the spread-out regularizer on the same cached embeddings."""

    spread: losses.GlobalOrthogonalRegularizationLoss | None

    def calculate_loss(self, reps: list[list[Tensor]], *args: Any, with_backward: bool = False):
        loss = super().calculate_loss(reps, *args, with_backward=with_backward)
        if self.spread is None:
            return loss
        embeddings = [torch.cat(column) for column in reps]
        (spread,) = self.spread.compute_loss_from_embeddings(embeddings).values()
        if with_backward:
            spread.backward()
        return loss + (spread.detach() if with_backward else spread)


def _loss(config: FinetuneConfig, model: SentenceTransformer, dataset: Dataset) -> nn.Module:
    width = model.get_embedding_dimension() or 0
    loss: Any
    options: dict[str, Any] = {
        "scale": 1 / config.temperature,
        "directions": ("query_to_doc", "doc_to_query")[: 1 + config.symmetric],
        "partition_mode": "per_direction",
    }
    if config.teacher is not None:
        labels = len(dataset[0]["label"][0])
        loss = losses.EmbedDistillLoss(model, projection_dim=None if labels == width else labels)
    elif config.mini_batch_size or config.spread_weight:
        size = config.mini_batch_size or config.batch_size
        loss = _Contrastive(model, mini_batch_size=size, **options)
        weights: Any = {"mean_weight": None, "second_moment_weight": config.spread_weight}
        spread = losses.GlobalOrthogonalRegularizationLoss
        loss.spread = spread(model, aggregation="sum", **weights) if config.spread_weight else None
    else:
        loss = losses.MultipleNegativesRankingLoss(model, **options)
    if config.matryoshka_dims:
        dims = sorted({*map(int, config.matryoshka_dims), width}, reverse=True)
        loss = losses.MatryoshkaLoss(model, loss, dims)
    return loss
