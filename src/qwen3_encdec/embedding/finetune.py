"""Encoder -> embedding model, by sentence-transformers' own trainer and losses: glue, checks and
good defaults.

Needs sentence-transformers 6.2 or newer.
"""

import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    DistillKLDivLoss,
    EmbedDistillLoss,
    GlobalOrthogonalRegularizationLoss,
    MarginMSELoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from sentence_transformers.util import mine_hard_negatives
from torch import Tensor, nn
from transformers import PrinterCallback, set_seed

from qwen3_encdec.data.package_docs import summary_pairs
from qwen3_encdec.folders import (
    InputError,
    check_output,
    copy_without_weights,
    default_device,
    new_folder,
    read_json,
    write_json,
)

Direction = Literal["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"]
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides a finetuning but the encoder it starts from."""

    inputs: list[str] = field(default_factory=lambda: ["package-docs"])
    """package-docs (summary line and body of docstrings), .jsonl or .parquet files, hub datasets
    (ORG/NAME:CONFIG).
    """
    columns: list[str] = field(default_factory=lambda: ["anchor", "positive"])
    """Text columns of files and hub datasets:

    a query, its document, then any number of hard negatives.
    """
    query_prompt: str = ""
    """Put before every query, here and, through the written folder, wherever the model is used."""
    document_prompt: str = ""
    """The same for documents and negatives."""
    max_length: int = 128
    """Tokens per text while training; the folder keeps its own limit for use."""

    objective: Literal["contrastive", "embed_distill", "margin_mse", "distill_kl"] = "contrastive"
    """contrastive learns from the pairs;

    the others match a teacher's embeddings, score margins or score shares.
    """
    teacher: str | None = None
    """sentence-transformers folder that the three distillations learn from."""
    temperature: float = 0.05
    """Of the softmax over cosines, in contrastive and distill_kl."""
    directions: list[Direction] = field(default_factory=lambda: ["query_to_doc", "doc_to_query"])
    """What each text is told apart from:

    a query from documents, a document from queries, each from its own kind.
    """
    partition_mode: Literal["joint", "per_direction"] = "per_direction"
    """One softmax over all directions, or one each (for the first two directions only)."""
    hardness: Literal["none", "in_batch_negatives", "hard_negatives", "all_negatives"] = "none"
    """Which negatives weigh more the closer they are to the query."""
    hardness_strength: float = 5.0
    """How much more: what is added to a negative's logit, times its cosine."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Leading dimensions that must serve alone; the full width is always trained too."""
    spread_weight: float = 0.0
    """Weight of the spread-out regulariser on each side's embeddings, beside contrastive;

    0 is none.
    """

    mine_negatives: int = 0
    """Hard negatives to find for each pair among all documents drawn, before training."""
    miner: str | None = None
    """sentence-transformers folder that finds them; by default the encoder as it is."""
    mining_skip: int = 0
    """Leave out this many nearest documents, which may be right answers too."""
    mining_margin: float = 0.05
    """A negative is at least this share of the positive's cosine less similar than the positive."""

    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 64
    """Pairs per step; each is a negative for the others."""
    mini_batch_size: int = 0
    """Pairs in memory at once (GradCache:

    the loss of the whole batch for one more forward pass); 0 is all.
    """
    lr: float = 5e-4
    """Peak learning rate after a tenth of linear warm-up;

    then linear decay. 2e-5 suits a real checkpoint.
    """
    weight_decay: float = 0.0
    """Of AdamW."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Compute precision over fp32 weights; auto is bf16 on an accelerator and no on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    lora_rank: int = 0
    """Train low-rank adapters of all projections and merge them at the end;

    0 trains every weight.
    """
    seed: int = 0
    """Of the choice and order of the pairs and of the adapters."""

    def __post_init__(self) -> None:
        """Refuse values outside their range and settings that do not go together.

        Raises InputError naming them.
        """
        at_least = {"max_length": 1, "steps": 1, "batch_size": 2, "mini_batch_size": 0, "lora_rank": 0, "seed": 0,
                    "mine_negatives": 0, "mining_skip": 0, "spread_weight": 0, "hardness_strength": 0,
                    "weight_decay": 0}  # fmt: skip
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be above 0 and finite, got {getattr(self, name)!r}")
        if len(self.columns) < 2:
            raise InputError(f"columns must name a query and its document, got {self.columns!r}")
        if (self.teacher is None) != (self.objective == "contrastive"):
            raise InputError(
                f"objective {self.objective} {'has no' if self.teacher else 'needs a'} teacher"
            )
        if (
            self.objective in ("margin_mse", "distill_kl")
            and len(self.columns) < 3
            and not self.mine_negatives
        ):
            raise InputError(
                f"objective {self.objective} compares documents: name more columns, or mine_negatives"
            )
        if "query_to_doc" not in self.directions:
            raise InputError(f"directions must hold query_to_doc, got {self.directions!r}")
        if self.partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(
            self.directions
        ):
            raise InputError("directions query_to_query and doc_to_doc need partition_mode joint")
        if self.objective != "contrastive" and (self.mini_batch_size or self.spread_weight):
            raise InputError("mini_batch_size and spread_weight go with objective contrastive only")


def finetune(
    encoder_dir: str | Path,
    output_dir: str | Path,
    examples: Sequence[tuple[str, ...]] | None = None,
    config: FinetuneConfig | None = None,
    **changes: Any,
) -> dict[str, float]:
    """Train an encoder so that the texts that belong together lie closer than those that do not.

    The output is `encoder_dir` with other weights: every small file, and with them the
    bidirectional configuration and the layout that serving tools read, is the input's; prompts are
    added where the config has them.

    Args:
        encoder_dir: A sentence-transformers folder, such as `extract_encoder` writes.
        output_dir: Where the trained copy goes.
        examples: (query, document) or (query, document, negative, ...) texts, instead of the
            config's `inputs`. They are shuffled and repeated as often as the steps need.
        config: By default `FinetuneConfig()`.
        changes: Fields of the config to replace.

    Returns:
        `loss` (mean of the last tenth of the steps) and the number of `pairs` trained on.

    Raises:
        InputError: fewer examples than one batch, an input that cannot be read, settings that do
            not go together, or `encoder_dir` or a teacher is no sentence-transformers folder.
    """
    config = replace(config or FinetuneConfig(), **changes)
    encoder_dir = Path(encoder_dir)
    check_output(output_dir, "encoder")
    model = _load(encoder_dir)
    teachers = {name: _load(name) for name in (config.teacher, config.miner) if name is not None}
    full = (
        read_examples(config) if examples is None else _dataset(list(zip(*examples, strict=True)))
    )
    if len(full) < config.batch_size:
        raise InputError(f"{len(full)} pairs are less than one batch of {config.batch_size}")
    set_seed(config.seed)
    saved_dtype = model.dtype
    model.float()
    model.max_seq_length = min(config.max_length, model.max_seq_length or config.max_length)
    width = model.get_embedding_dimension() or 0
    if (
        config.matryoshka_dims
        and not 0 < min(config.matryoshka_dims) <= max(config.matryoshka_dims) <= width
    ):
        raise InputError(
            f"matryoshka_dims {config.matryoshka_dims} must lie in 1 ... {width}, the encoder's width"
        )
    drawn = random.Random(config.seed).sample(
        range(len(full)), min(len(full), config.steps * config.batch_size)
    )
    dataset = full.select(drawn)
    if config.mine_negatives:
        dataset = _mine(config, dataset, teachers[config.miner] if config.miner else model)
    if config.teacher is not None:
        dataset = _add_labels(config, dataset, teachers[config.teacher])
    if config.lora_rank:
        _add_lora(model, config.lora_rank)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=_arguments(config, scratch),
            train_dataset=dataset,
            loss=_loss(config, model, dataset),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if config.lora_rank:
            model[0].model = cast(Any, model[0].model).merge_and_unload()
        model.to(saved_dtype).save_pretrained(scratch, create_model_card=False)
        facts = {"finetuned_from": str(encoder_dir), "steps": config.steps, "seed": config.seed}
        with new_folder(output_dir, "encoder", **facts, config=asdict(config)) as folder:
            copy_without_weights(encoder_dir, folder)
            for file in Path(scratch).rglob("*.safetensors*"):
                shutil.copy(file, folder / file.relative_to(scratch))
            if config.query_prompt or config.document_prompt:
                settings = read_json(folder / "config_sentence_transformers.json")
                prompts = {"query": config.query_prompt, "document": config.document_prompt}
                write_json(
                    folder / "config_sentence_transformers.json", {**settings, "prompts": prompts}
                )
    return {"loss": losses[-1], "pairs": len(dataset)}


def read_examples(config: FinetuneConfig) -> Dataset:
    """All examples of the config's inputs; one that lacks a text is left out.

    Raises:
        InputError: an input cannot be read, or has no such text column.
    """
    parts = []
    for name in config.inputs:
        if name == "package-docs":
            if len(config.columns) != 2:
                raise InputError(
                    "package-docs has pairs: columns must be two; hard negatives come by mine_negatives"
                )
            parts.append(_dataset(list(zip(*summary_pairs("train"), strict=True))))
            continue
        part = _open(name)
        for column in config.columns:
            if column not in part.column_names:
                raise InputError(
                    f"input {name}: no column {column!r}; there is {', '.join(part.column_names)}"
                )
            if getattr(part.features[column], "dtype", None) not in ("string", "large_string"):
                raise InputError(
                    f"input {name}: column {column!r} is {part.features[column]}, not a text"
                )
        columns = [part.with_format("numpy")[column] for column in config.columns]
        rows = [
            row
            for row in zip(*columns, strict=True)
            if all(text and not text.isspace() for text in row)
        ]
        parts.append(_dataset(list(zip(*rows, strict=True))))
    return concatenate_datasets(parts)


def _open(name: str) -> Dataset:
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    path, config = Path(name), None
    try:
        if path.is_file() and path.suffix in kinds:
            return load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        if path.exists() or path.suffix in kinds:
            reason = f"is none of {', '.join(kinds)}" if path.exists() else "does not exist"
            raise InputError(f"input {name} {reason}")
        name, _, config = name.partition(":")
        return load_dataset(name, config or None, split="train")
    except (DatasetsError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise InputError(f"input {name} cannot be read: {reason}") from None


def _dataset(columns: Sequence[Sequence[str]]) -> Dataset:
    names = ["anchor", "positive", *(f"negative_{i}" for i in range(1, len(columns) - 1))]
    return Dataset.from_dict(dict(zip(names, map(list, columns), strict=bool(columns))))


def _load(folder: str | Path) -> SentenceTransformer:
    if not (Path(folder) / "modules.json").is_file():
        raise InputError(
            f"{folder} is no sentence-transformers folder; make one with scripts/extract_encoder.py"
        )
    try:
        model = SentenceTransformer(str(folder), local_files_only=True)
    except Exception as error:  # damaged weights, configs and tokenizers each raise their own
        raise InputError(
            f"{folder} cannot be loaded: {str(error).strip().partition(chr(10))[0]}"
        ) from None
    model.model_card_data.widget = [
        {}
    ]  # else the trainer embeds examples for a card that is never written
    return model


def _mine(config: FinetuneConfig, dataset: Dataset, model: SentenceTransformer) -> Dataset:
    mined = mine_hard_negatives(
        dataset.select_columns(["anchor", "positive"]),
        model,
        num_negatives=config.mine_negatives,
        range_min=config.mining_skip,
        relative_margin=config.mining_margin,
        query_prompt=config.query_prompt or None,
        corpus_prompt=config.document_prompt or None,
        output_format="n-tuple",
        verbose=False,
    )
    if len(mined) < config.batch_size:
        raise InputError(
            f"only {len(mined)} of {len(dataset)} pairs have {config.mine_negatives} negatives under mining_margin "
            f"{config.mining_margin}: less than one batch of {config.batch_size}"
        )
    return _dataset([mined[name] for name in mined.column_names])


def _add_labels(config: FinetuneConfig, dataset: Dataset, teacher: SentenceTransformer) -> Dataset:
    """What the teacher says:

    [columns, dimensions] embeddings of every text, or [documents] cosines with the query.
    """
    encoded = [
        (teacher.encode_query if name == "anchor" else teacher.encode_document)(
            list(dataset[name]),
            normalize_embeddings=True,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        for name in dataset.column_names
    ]
    texts = torch.stack(encoded, dim=1).float().cpu()  # (N, columns, d)
    labels = texts if config.objective == "embed_distill" else (texts[:, 1:] * texts[:, :1]).sum(-1)
    return dataset.add_column("label", labels.tolist())


def _add_lora(model: SentenceTransformer, rank: int) -> None:
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise InputError(
            "lora_rank needs the package peft: pip install 'qwen3-encdec[lora]'"
        ) from None
    adapters = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=_PROJECTIONS, task_type="FEATURE_EXTRACTION"
    )
    model[0].model = get_peft_model(cast(Any, model[0].model), adapters)


class _SpreadContrastive(CachedMultipleNegativesRankingLoss):
    """The library's contrastive loss and, on the same cached embeddings, its spread-out
    regulariser.
    """

    def __init__(self, model: SentenceTransformer, spread_weight: float, **options: Any) -> None:
        super().__init__(model, **options)
        self.spread = None
        if spread_weight:
            self.spread = GlobalOrthogonalRegularizationLoss(
                model, mean_weight=None, second_moment_weight=spread_weight, aggregation="sum"
            )

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ):
        loss = super().calculate_loss(reps, labels, with_backward=with_backward)
        if self.spread is None:
            return loss
        (spread,) = self.spread.compute_loss_from_embeddings(
            [torch.cat(column) for column in reps]
        ).values()
        if with_backward:
            spread.backward()
            spread = spread.detach()
        return loss + spread


def _loss(config: FinetuneConfig, model: SentenceTransformer, dataset: Dataset) -> nn.Module:
    loss: nn.Module
    width = model.get_embedding_dimension() or 0
    if config.objective == "embed_distill":
        teacher_width = len(dataset[0]["label"][0])
        loss = EmbedDistillLoss(
            model, projection_dim=None if teacher_width == width else teacher_width
        )
    elif config.objective == "margin_mse":
        loss = MarginMSELoss(model)
    elif config.objective == "distill_kl":
        loss = DistillKLDivLoss(model, temperature=config.temperature)
    else:
        options: dict[str, Any] = {
            "scale": 1 / config.temperature,
            "directions": tuple(config.directions),
            "partition_mode": config.partition_mode,
            "hardness_mode": None if config.hardness == "none" else config.hardness,
            "hardness_strength": config.hardness_strength,
        }
        if config.mini_batch_size or config.spread_weight:
            size = config.mini_batch_size or config.batch_size
            loss = _SpreadContrastive(model, config.spread_weight, mini_batch_size=size, **options)
        else:
            loss = MultipleNegativesRankingLoss(model, **options)
    if config.matryoshka_dims:
        loss = MatryoshkaLoss(model, loss, sorted({*config.matryoshka_dims, width}, reverse=True))
    return loss


def _arguments(config: FinetuneConfig, scratch: str) -> SentenceTransformerTrainingArguments:
    accelerated = default_device().type != "cpu"
    prompts = {"anchor": config.query_prompt, "positive": config.document_prompt}
    negatives = max(config.mine_negatives, len(config.columns) - 2)
    prompts |= {f"negative_{i}": config.document_prompt for i in range(1, negatives + 1)}
    fields = SentenceTransformerTrainingArguments.__dataclass_fields__
    # transformers 5.24 calls it activation_checkpointing and warns of the old name.
    name = next(
        name for name in ("activation_checkpointing", "gradient_checkpointing") if name in fields
    )
    checkpointing: dict[str, Any] = {name: config.gradient_checkpointing}
    return SentenceTransformerTrainingArguments(
        output_dir=scratch,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        prompts=prompts if any(prompts.values()) else None,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=config.steps // 10,
        lr_scheduler_type="linear",
        bf16=config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and accelerated),
        use_cpu=not accelerated,
        seed=config.seed,
        save_strategy="no",
        logging_steps=max(1, config.steps // 10),
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        **checkpointing,
    )
