"""A short contrastive stage for an extracted encoder, by sentence-transformers' own trainer and loss."""

import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import PrinterCallback, set_seed

from qwen3_encdec.files import PROVENANCE_FILE, InputError, check_output, new_folder


def finetune(
    encoder_dir: str | Path,
    output_dir: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    steps: int = 200,
    batch_size: int = 64,
    lr: float = 5e-4,
    max_length: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """Train an encoder so that the two texts of a pair lie closer than any two of different pairs in a batch.

    MultipleNegativesRankingLoss in both directions at its usual temperature 1/20; AdamW with a tenth of linear
    warm-up and linear decay. The output is `encoder_dir` with other weights: every small file, and with them the
    bidirectional configuration and the layout that serving tools read, is the input's.

    Args:
        encoder_dir: A sentence-transformers folder, such as `extract_encoder` writes.
        output_dir: Where the trained copy goes.
        pairs: (query, document) texts; they are shuffled and repeated as often as `steps` needs.
        steps: Optimizer steps.
        batch_size: Pairs per step; each is a negative for the others.
        lr: Peak learning rate.
        max_length: Tokens per text while training; the folder keeps its own limit for use.
        seed: Of the order of the pairs.

    Returns:
        `loss` (mean of the last tenth of the steps, nats) and the number of `pairs` drawn.

    Raises:
        InputError: fewer pairs than one batch, or `encoder_dir` is no sentence-transformers folder.
    """
    encoder_dir = Path(encoder_dir)
    check_output(output_dir, "encoder")
    if not (encoder_dir / "modules.json").is_file():
        raise InputError(f"{encoder_dir} is no sentence-transformers folder; make one with scripts/extract_encoder.py")
    if len(pairs) < batch_size:
        raise InputError(f"{len(pairs)} pairs are less than one batch of {batch_size}")
    set_seed(seed)
    model = SentenceTransformer(str(encoder_dir), local_files_only=True)
    model.model_card_data.widget = [{}]  # else the trainer embeds examples for a card that is never written
    saved_dtype = model.dtype
    model.float()
    model.max_seq_length = min(max_length, model.max_seq_length or max_length)
    drawn = random.Random(seed).sample(list(pairs), min(len(pairs), steps * batch_size))
    queries, documents = zip(*drawn, strict=True)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                batch_sampler=BatchSamplers.NO_DUPLICATES,
                learning_rate=lr,
                warmup_steps=steps // 10,
                lr_scheduler_type="linear",
                bf16=torch.accelerator.is_available(),
                use_cpu=not torch.accelerator.is_available(),
                seed=seed,
                save_strategy="no",
                logging_steps=max(1, steps // 10),
                report_to="none",
                disable_tqdm=not sys.stderr.isatty(),
            ),
            train_dataset=Dataset.from_dict({"anchor": queries, "positive": documents}),
            loss=MultipleNegativesRankingLoss(
                model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        model.to(saved_dtype).save_pretrained(scratch, create_model_card=False)
        with new_folder(output_dir, "encoder", finetuned_from=str(encoder_dir), steps=steps, seed=seed) as folder:
            weights = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", PROVENANCE_FILE)
            shutil.copytree(encoder_dir, folder, ignore=weights, dirs_exist_ok=True)
            for file in Path(scratch).rglob("*.safetensors*"):
                shutil.copy(file, folder / file.relative_to(scratch))
    return {"loss": losses[-1], "pairs": len(drawn)}
