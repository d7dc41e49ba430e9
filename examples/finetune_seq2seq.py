"""Finetune the encoder-decoder on a text-to-text task with transformers' Seq2SeqTrainer.

The task: write a docstring's summary line from its body, scored on packages not trained on.

    python examples/finetune_seq2seq.py --model runs/demo/init --output runs/summaries

Any encoder-decoder folder works; a checkpoint of UL2 training works best. `--lora` trains adapters
on both stacks instead of all weights (`pip install peft`). Training batches are packed, to avoid
padding; generation uses padded batches.
"""

import argparse
from collections import Counter
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import qwen3_encdec  # noqa: F401  registers the classes with transformers
from qwen3_encdec.data.collate import DataCollatorForPackedSeq2Seq
from qwen3_encdec.data.package_docs import summary_pairs

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PackedTrainer(Seq2SeqTrainer):
    """A Seq2SeqTrainer whose training batches are packed; `data_collator` pads the others."""

    data_collator: Any

    def get_train_dataloader(self) -> Any:
        """Build the loader with the packed collator."""
        padded, self.data_collator = self.data_collator, DataCollatorForPackedSeq2Seq()
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padded


def encode(
    pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[dict[str, list[int]]]:
    """Encode (summary, body) pairs as body ids and summary labels, each ending in EOS."""

    def ids(text: str) -> list[int]:
        # A docstring is text and never yields a control token.
        encoded = tokenizer(text, split_special_tokens=True, add_special_tokens=False)
        return [*encoded["input_ids"][: length - 1], tokenizer.eos_token_id]

    return [{"input_ids": ids(body), "labels": ids(summary)} for summary, body in pairs]


def overlap(candidate: str, reference: str) -> float:
    """Compute the F1 of the words of two texts, as ROUGE-1 counts them."""
    words, wanted = (Counter(text.lower().split()) for text in (candidate, reference))
    common = sum((words & wanted).values())
    return 2 * common / max(1, sum(words.values()) + sum(wanted.values()))


def main() -> None:
    """Finetune, and print loss and overlap on held-out packages before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of an encoder-decoder")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--lora", action="store_true", help="train adapters only")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--length", type=int, default=256, help="longest body in tokens")
    parser.add_argument("--eval-examples", type=int, default=200)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(options.model)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=16, target_modules=PROJECTIONS, task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(model, adapters)
        model.print_trainable_parameters()

    heldout = summary_pairs("heldout")[: options.eval_examples]
    summaries = [summary for summary, _ in heldout]

    def measure(prediction: EvalPrediction) -> dict[str, float]:
        tokens = np.where(
            prediction.predictions < 0, model.config.pad_token_id, prediction.predictions
        )
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        scores = [overlap(*pair) for pair in zip(texts, summaries, strict=True)]
        return {"overlap": float(np.mean(scores))}

    trainer = PackedTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            save_strategy="no",
            report_to=[],
            predict_with_generate=True,
        ),
        train_dataset=encode(summary_pairs("train"), tokenizer, options.length),
        eval_dataset=encode(heldout, tokenizer, options.length),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        compute_metrics=measure,
    )

    first_lines = [overlap(body.splitlines()[0], summary) for summary, body in heldout]
    print(f"first line of the body: overlap {np.mean(first_lines):.3f}")
    for when in ("before", "after"):
        if when == "after":
            trainer.train()
        scores = trainer.evaluate(max_new_tokens=32)
        print(f"{when}: loss {scores['eval_loss']:.3f}, overlap {scores['eval_overlap']:.3f}")
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
