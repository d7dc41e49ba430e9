"""Finetune an encoder into an embedding model, by sentence-transformers' own trainer and losses.

A held-out part of the pairs is scored before, during and after; the best weights are kept. A batch
that cannot be filled with distinct texts, a loss or weight that is not finite, and steps that were
not made end it with a sentence and without a folder. Needs sentence-transformers 6.2 or newer.
"""

import itertools
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    EmbedDistillLoss,
    GlobalOrthogonalRegularizationLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from sentence_transformers.util import mine_hard_negatives
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from qwen3_encdec.conversion.card import (
    LANGUAGE,
    LICENSE,
    read_card,
    without_path,
    write_card,
)
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

SCORE = "eval_ndcg@10"
LOGGED = ("loss", "grad_norm", "learning_rate")
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides a finetuning but the encoder it starts from."""

    inputs: list[str] = field(default_factory=lambda: ["package-docs"])
    """package-docs (summary line and body of docstrings), .jsonl or .parquet files, hub datasets
    (ORG/NAME:CONFIG).
    """
    columns: list[str] = field(default_factory=lambda: ["anchor", "positive"])
    """Text columns of files and hub datasets: a query, its document, then hard negatives."""
    query_prompt: str = ""
    """Put before every query, here and, through the written folder, wherever the model is used."""
    document_prompt: str = ""
    """The same for documents and negatives."""
    max_length: int = 128
    """Tokens per text while training; the folder keeps its own limit for use."""

    objective: Literal["contrastive", "embed_distill"] = "contrastive"
    """contrastive learns from the pairs, embed_distill from a teacher's embeddings of the texts."""
    teacher: str | None = None
    """sentence-transformers folder to distill from."""
    temperature: float = 0.05
    """Of the softmax over cosines, in contrastive."""
    symmetric: bool = True
    """Tell a document from the other queries too, not only a query from the other documents."""
    matryoshka_dims: list[float] = field(default_factory=list)
    """Leading dimensions that must serve alone, as numbers or as shares of the width (0.5); the
    full width is always trained too.
    """
    spread_weight: float = 0.0
    """Weight of the spread-out regulariser on each side's embeddings, beside contrastive."""

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
    """Pairs per step; each is a negative for the others, so all their texts are distinct."""
    mini_batch_size: int = 0
    """Pairs in memory at once (GradCache: the loss of the whole batch for one more forward pass); 0
    is all.
    """
    lr: float | None = None
    """Peak learning rate after a tenth of linear warm-up, then linear decay; by default 2e-5 from
    width 1024 on, and more for narrower encoders: 2e-5 x (1024 / width)^2, at most 1e-3.
    """
    weight_decay: float = 0.0
    """Of AdamW."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Compute precision over fp32 weights; auto is bf16 on an accelerator and no on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    lora_rank: int = 0
    """Train low-rank adapters and merge them at the end; 0 trains every weight."""
    heldout_pairs: int = 256
    """Pairs kept out of training for the score, at most a tenth of all; 0 scores nothing."""
    eval_every: int = 0
    """Steps between scores; 0 is a quarter of the steps. The best weights are kept."""
    save_every: int = 0
    """Steps between checkpoints, in OUTPUT.training until the end, for `resume`; 0 is none."""
    log_every: int = 0
    """Steps between lines of progress and of metrics.jsonl; 0 is a tenth of the steps."""
    seed: int = 0
    """Of the choice and order of the pairs and of the adapters."""

    def __post_init__(self) -> None:
        """Refuse values outside their range and settings that do not go together.

        Raises InputError naming them.
        """
        numbers = (name for name, value in vars(self).items() if type(value) in (int, float))
        for name in numbers:
            least = {"max_length": 1, "steps": 1, "batch_size": 2}.get(name, 0)
            if not getattr(self, name) >= least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        for name in ("lr", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} must be above 0 and finite, got {value!r}")
        if len(self.columns) < 2:
            raise InputError(f"columns must name a query and its document, got {self.columns!r}")
        if (self.teacher is None) != (self.objective == "contrastive"):
            raise InputError(
                f"objective {self.objective} {'has no' if self.teacher else 'needs a'} teacher"
            )
        if self.objective != "contrastive" and (self.mini_batch_size or self.spread_weight):
            raise InputError("mini_batch_size and spread_weight go with objective contrastive only")


def finetune(
    encoder_dir: str | Path,
    output_dir: str | Path,
    examples: Sequence[tuple[str, ...]] | None = None,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Train an encoder so that the texts that belong together lie closer than those that do not.

    The output is `encoder_dir` with other weights, prompts where the config has them, a model card
    and metrics.jsonl; the bidirectional configuration and the layout that serving tools read stay.

    Args:
        encoder_dir: A sentence-transformers folder, such as `extract_encoder` writes.
        output_dir: Where the trained copy goes.
        examples: (query, document) or (query, document, negative, ...) texts, instead of the
            config's `inputs`. They are shuffled and repeated as often as the steps need.
        config: By default `FinetuneConfig()`.
        resume: Continue from the newest checkpoint of an interrupted call with the same settings.
        changes: Fields of the config to replace.

    Returns:
        `loss` (mean of the last tenth of the steps), `pairs` trained on, and where some are held
        out `heldout`: their nDCG@10 `before`, `after` and at the `best` step, which is kept.

    Raises:
        InputError: batches cannot be filled with distinct texts, the loss or a weight is not
            finite, an input cannot be read, settings do not go together, or `encoder_dir` or a
            teacher is not a sentence-transformers folder.
    """
    config = replace(config or FinetuneConfig(), **changes)
    encoder_dir = Path(encoder_dir)
    output_dir = check_output(output_dir, "encoder")
    model = _load(encoder_dir)
    config = _fitted(config, model.get_embedding_dimension() or 0)
    teachers = {name: _load(name) for name in (config.teacher, config.miner) if name is not None}
    full = (
        read_examples(config) if examples is None else _dataset(list(zip(*examples, strict=True)))
    )
    set_seed(config.seed)
    saved_dtype = model.dtype
    model.float()
    model.max_seq_length = min(config.max_length, model.max_seq_length or config.max_length)
    _check_distinct(config, full)
    dataset, heldout = _split(config, full)
    if config.mine_negatives:
        dataset = _mine(config, dataset, teachers[config.miner] if config.miner else model)
    _check_batches(config, dataset)
    if config.teacher is not None:
        dataset = _add_labels(dataset, teachers[config.teacher])
    if config.lora_rank:
        _add_lora(model, config.lora_rank)
    work = _work_folder(output_dir, config, resume)
    try:
        history = _train(config, model, dataset, heldout, work, resume)
        if config.lora_rank:
            model[0].model = cast(Any, model[0].model).merge_and_unload()
        _check_weights(model)
        model.to(saved_dtype).save_pretrained(str(work / "trained"), create_model_card=False)
        _write(encoder_dir, output_dir, config, work, history)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        if not (interrupted and config.save_every):
            shutil.rmtree(work)
        raise
    shutil.rmtree(work)
    losses = [line["loss"] for line in history if "loss" in line]
    result: dict[str, Any] = {"loss": losses[-1], "pairs": len(dataset)}
    if scores := _scores(history):
        last, best = max(scores), _best_step(scores)
        steps = {"before": 0, "after": last, "best": best}
        result["heldout"] = {name: scores[step] for name, step in steps.items()}
    return result


def _fitted(config: FinetuneConfig, width: int) -> FinetuneConfig:
    """The config with what depends on the encoder filled in."""
    lr = config.lr or min(1e-3, 2e-5 * max(1.0, 1024 / width) ** 2)
    dims = [round(size * width) if 0 < size < 1 else size for size in config.matryoshka_dims]
    if dims and not all(1 <= size <= width and size == int(size) for size in dims):
        raise InputError(f"matryoshka_dims {dims} must lie in 1 ... {width}, the encoder's width")
    return replace(config, lr=lr, matryoshka_dims=[int(size) for size in dims])


def _split(config: FinetuneConfig, full: Dataset) -> tuple[Dataset, Dataset | None]:
    """Draw the pairs to train on and those to score, no text of which is trained on."""
    order = random.Random(config.seed).sample(range(len(full)), len(full))
    queries, documents = full["anchor"], full["positive"]
    wanted = min(config.heldout_pairs, len(full) // 10)
    heldout: list[int] = []
    texts: set[str] = set()
    for i in order:
        if len(heldout) == wanted:
            break
        if not {queries[i], documents[i]} & texts:
            texts |= {queries[i], documents[i]}
            heldout.append(i)
    kept_out = set(heldout)
    # Mining and teachers embed all that is drawn; else more pairs make it easier to fill batches.
    costly = config.mine_negatives or config.teacher
    needed = config.steps * config.batch_size if costly else len(full)
    train = [
        i
        for i in order
        if i not in kept_out and queries[i] not in texts and documents[i] not in texts
    ]
    if len(train) < 0.8 * len(full):
        print("warning: nothing is held out, texts repeat in too many pairs", file=sys.stderr)
        heldout = []
    if len(heldout) < 2:
        return full.select(order[:needed]), None
    return full.select(train[:needed]), full.select(heldout)


def _check_distinct(config: FinetuneConfig, dataset: Dataset) -> None:
    size = config.batch_size
    if len(dataset) < size:
        raise InputError(f"{len(dataset)} pairs are less than one batch of {size}")
    for name in dataset.column_names:
        distinct = len(set(dataset[name]))
        if distinct < size:
            raise InputError(
                f"column {name} has {distinct} distinct texts, and a batch of {size} needs as "
                f"many: use batch_size={distinct} or more texts"
            )


def _check_batches(config: FinetuneConfig, dataset: Dataset) -> None:
    """Refuse pairs of which no full batch of distinct texts can be drawn; say how many go unused.

    The sampler would make smaller batches instead, down to one pair, whose loss is 0.
    """
    _check_distinct(config, dataset)
    size = config.batch_size
    generator = torch.Generator().manual_seed(config.seed)
    sampler = NoDuplicatesBatchSampler(
        dataset, batch_size=size, drop_last=True, generator=generator, seed=config.seed
    )
    used = size * sum(1 for _ in itertools.islice(sampler, config.steps))
    if not used:
        raise InputError(
            f"no batch of {size} distinct texts can be drawn from {len(dataset)} pairs: texts "
            "repeat too often; lower batch_size"
        )
    for name in dataset.column_names:
        distinct = len(set(dataset[name]))
        if distinct < len(dataset) / 2:
            print(
                f"warning: column {name} has {distinct:,} distinct texts in {len(dataset):,} "
                "pairs; batches of distinct texts repeat the pairs of rare ones",
                file=sys.stderr,
            )


def _work_folder(output: Path, config: FinetuneConfig, resume: bool) -> Path:
    """The folder beside the output that holds checkpoints and metrics while training runs."""
    work = output.with_name(f"{output.name}.training")
    settings = json.loads(json.dumps(asdict(config)))
    interrupted = any(work.glob("checkpoint-*"))
    if resume:
        if not interrupted:
            raise InputError(f"{work} holds no checkpoint to resume from; they need save_every")
        if read_json(work / "settings.json") != settings:
            raise InputError(f"{work} was made with other settings; resume with the same ones")
        return work
    if interrupted:
        raise InputError(
            f"{work} holds an interrupted finetuning: continue it with resume, or delete it"
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(work / "settings.json", settings)
    return work


class HeldoutRetrieval(BaseEvaluator):
    """nDCG@10 of finding each query's document among all held-out ones; ties count against it."""

    def __init__(self, config: FinetuneConfig, pairs: Dataset) -> None:
        super().__init__()
        self.config, self.pairs = config, pairs

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score a model. Raises InputError if an embedding is not finite."""
        options: dict[str, Any] = {"show_progress_bar": False, "normalize_embeddings": True}
        queries, documents = list(self.pairs["anchor"]), list(self.pairs["positive"])
        queries = model.encode(queries, prompt=self.config.query_prompt, **options)
        documents = model.encode(documents, prompt=self.config.document_prompt, **options)
        scores = queries @ documents.T
        if not np.isfinite(scores).all():
            raise InputError("an embedding is not finite: lower lr")
        ranks = (scores >= np.diag(scores)[:, None]).sum(1)
        return {"ndcg@10": float(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0).mean())}


def _scores(history: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Held-out scores by step."""
    return {line["step"]: line[SCORE] for line in history if SCORE in line}


def _best_step(scores: dict[int, float]) -> int:
    """The last of the steps with the best score."""
    return max(scores, key=lambda step: (scores[step], step))


class _Watch(TrainerCallback):
    """Keep metrics.jsonl and the best weights, print progress, refuse values that are not finite.

    The trainer keeps best weights in whole checkpoints only, and never those before the first step.
    """

    def __init__(self, model: SentenceTransformer, work: Path) -> None:
        self.model, self.work = model, work
        self.began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record and print what the trainer logs."""
        seconds = time.monotonic() - self.began
        state.log_history[-1]["seconds"] = round(seconds, 1)
        lines = [json.dumps(line) + "\n" for line in state.log_history]
        (self.work / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        shown = {name: float(logs[name]) for name in (*LOGGED, SCORE) if name in logs}
        for name, value in shown.items():
            if not math.isfinite(value):
                raise InputError(
                    f"{name} is {value} at step {state.global_step}: lower lr "
                    f"(now {args.learning_rate:g}) or look for texts that break the objective"
                )
        if shown:
            facts = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            line = f"step {state.global_step:,} of {args.max_steps:,}: {facts}, {seconds:.0f} s"
            print(line, file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the last step as well, whatever `eval_every` is."""
        if state.global_step == args.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights if they are the best so far."""
        if _best_step(_scores(state.log_history)) == state.global_step:
            weights = {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in self.model.named_parameters()
            }
            save_file(weights, self.work / "best.safetensors")


class _Trainer(SentenceTransformerTrainer):
    """The library's trainer, which averages a loss that is not finite away."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        found = super().compute_loss(*arguments, **options)
        loss = found[0] if isinstance(found, tuple) else found
        if not torch.isfinite(loss.detach()).all():
            step = self.state.global_step + 1
            raise InputError(f"the loss is {float(loss.detach())} at step {step}: lower lr")
        return found


def _train(
    config: FinetuneConfig,
    model: SentenceTransformer,
    dataset: Dataset,
    heldout: Dataset | None,
    work: Path,
    resume: bool,
) -> list[dict[str, Any]]:
    """Train, put the best weights back, and return what the trainer logged."""
    trainer = _Trainer(
        model=model,
        args=_arguments(config, work, scored=heldout is not None, resume=resume),
        train_dataset=dataset,
        loss=_loss(config, model, dataset),
        evaluator=HeldoutRetrieval(config, heldout) if heldout else None,
        callbacks=[_Watch(model, work)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume or None)
    if trainer.state.global_step != config.steps:
        raise InputError(
            f"only {trainer.state.global_step} of {config.steps} steps could be made: too few "
            "pairs with distinct texts"
        )
    if heldout:
        model.load_state_dict(load_file(work / "best.safetensors"), strict=False)
    return trainer.state.log_history


def _check_weights(model: SentenceTransformer) -> None:
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"weight {name} is not finite after training: lower lr")


def _write(
    encoder_dir: Path,
    output: Path,
    config: FinetuneConfig,
    work: Path,
    history: Sequence[dict[str, Any]],
) -> None:
    facts = {"finetuned_from": str(encoder_dir), "steps": config.steps, "seed": config.seed}
    with new_folder(output, "encoder", **facts, config=asdict(config)) as folder:
        copy_without_weights(encoder_dir, folder)
        for file in (work / "trained").rglob("*.safetensors*"):
            shutil.copy(file, folder / file.relative_to(work / "trained"))
        shutil.copy(work / "metrics.jsonl", folder)
        file = folder / "config_sentence_transformers.json"
        if config.query_prompt or config.document_prompt:
            prompts = {"query": config.query_prompt, "document": config.document_prompt}
            write_json(file, {**read_json(file), "prompts": prompts})
        card, scores = read_card(encoder_dir), _scores(history)
        held = {f"nDCG@10 at step {step}": f"{value:.4f}" for step, value in scores.items()}
        if scores:
            held["kept"] = f"the weights of step {_best_step(scores)}"
        write_card(
            folder,
            name=output.resolve().name,
            base_model=card.get("base_model") or without_path(encoder_dir),
            license=card.get("license", LICENSE),
            language=card.get("language", LANGUAGE),
            sections=[
                ("Held-out pairs", held or {"scored": "no"}),
                ("Finetuning", {"encoder": without_path(encoder_dir)} | asdict(config)),
            ],
        )


def read_examples(config: FinetuneConfig) -> Dataset:
    """All examples of the config's inputs; one that lacks a text is left out.

    Raises:
        InputError: an input cannot be read, or has no such text column.
    """
    parts, names = [], _names(len(config.columns))
    for name in config.inputs:
        if name == "package-docs":
            if len(config.columns) != 2:
                raise InputError(
                    "package-docs has pairs: columns must be two; hard negatives come by "
                    "mine_negatives"
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
        part = part.select_columns(config.columns).filter(
            lambda row: all(text and not text.isspace() for text in row.values())
        )
        renamed = part.rename_columns(dict(zip(config.columns, names, strict=True)))
        parts.append(renamed.cast(Features(dict.fromkeys(names, Value("string")))))
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


def _names(columns: int) -> list[str]:
    return ["anchor", "positive", *(f"negative_{i}" for i in range(1, columns - 1))]


def _dataset(columns: Sequence[Sequence[str]]) -> Dataset:
    names = _names(len(columns))
    return Dataset.from_dict(dict(zip(names, map(list, columns), strict=bool(columns))))


def _load(folder: str | Path) -> SentenceTransformer:
    if not (Path(folder) / "modules.json").is_file():
        raise InputError(
            f"{folder} is not a sentence-transformers folder; make one with: qwen3-encdec extract"
        )
    try:
        model = SentenceTransformer(str(folder), local_files_only=True)
    except Exception as error:  # damaged weights, configs and tokenizers each raise their own
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder} cannot be loaded: {reason}") from None
    # Else the trainer embeds examples for a card that is never written.
    model.model_card_data.widget = [{}]
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
    print(f"{len(mined):,} of {len(dataset):,} pairs have negatives", file=sys.stderr)
    return _dataset([mined[name] for name in mined.column_names])


def _add_labels(dataset: Dataset, teacher: SentenceTransformer) -> Dataset:
    """Add the teacher's embeddings of every text, [columns, dimensions], as labels."""
    options: dict[str, Any] = {
        "normalize_embeddings": True,
        "convert_to_tensor": True,
        "show_progress_bar": False,
    }
    encoded = []
    for name in dataset.column_names:
        encode = teacher.encode_query if name == "anchor" else teacher.encode_document
        encoded.append(encode(list(dataset[name]), **options))
    return dataset.add_column("label", torch.stack(encoded, dim=1).float().cpu().tolist())


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
        projection = None if teacher_width == width else teacher_width
        loss = EmbedDistillLoss(model, projection_dim=projection)
    else:
        directions = ("query_to_doc", "doc_to_query") if config.symmetric else ("query_to_doc",)
        options: dict[str, Any] = {
            "scale": 1 / config.temperature,
            "directions": directions,
            "partition_mode": "per_direction",
        }
        if config.mini_batch_size or config.spread_weight:
            size = config.mini_batch_size or config.batch_size
            loss = _SpreadContrastive(model, config.spread_weight, mini_batch_size=size, **options)
        else:
            loss = MultipleNegativesRankingLoss(model, **options)
    if config.matryoshka_dims:
        loss = MatryoshkaLoss(
            model, loss, sorted({*map(int, config.matryoshka_dims), width}, reverse=True)
        )
    return loss


def _arguments(
    config: FinetuneConfig, work: Path, scored: bool, resume: bool
) -> SentenceTransformerTrainingArguments:
    accelerated = default_device().type != "cpu"
    names = _names(max(config.mine_negatives + 2, len(config.columns)))
    prompts = dict.fromkeys(names, config.document_prompt) | {"anchor": config.query_prompt}
    return SentenceTransformerTrainingArguments(
        output_dir=str(work),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        dataloader_drop_last=True,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        prompts=prompts if any(prompts.values()) else None,
        learning_rate=config.lr or 0.0,
        weight_decay=config.weight_decay,
        warmup_steps=config.steps // 10,
        lr_scheduler_type="linear",
        bf16=config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and accelerated),
        use_cpu=not accelerated,
        seed=config.seed,
        logging_steps=config.log_every or max(1, config.steps // 10),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=config.gradient_checkpointing,
        eval_strategy="steps" if scored else "no",
        eval_steps=config.eval_every or max(1, config.steps // 4),
        eval_on_start=scored and not resume,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        save_total_limit=2,
    )
