"""Score held-out denoising: loss by denoiser, and the spans that a model fills into the gaps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn.utils.rnn import pad_sequence

from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.data.ul2 import Example
from qwen3_encdec.folders import InputError


def denoising_losses(
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    denoiser_names: Sequence[str],
    batch_size: int = 16,
) -> dict[str, float]:
    """Compute mean loss by denoiser over fixed examples, in nats per target token (EOS included).

    Arguments are those of `example_losses`. A denoiser without examples is left out.
    """
    losses = example_losses(model, examples, batch_size)
    return mean_losses(losses, examples, [e.denoiser for e in examples], denoiser_names)


@torch.no_grad()
def example_losses(
    model: torch.nn.Module, examples: Sequence[Example], batch_size: int = 16
) -> torch.Tensor:
    """Sum the token losses of each example: [examples] fp64, in nats.

    The sums do not depend on `batch_size`, the examples per forward pass. With sharded parameters,
    every rank must pass the same examples. The model, wrapped or not, keeps its training mode.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(len(examples), dtype=torch.float64)
    by_length = sorted(range(len(examples)), key=lambda number: len(examples[number].source))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(by_length), batch_size):
            numbers = by_length[start : start + batch_size]
            part = [examples[number] for number in numbers]
            batch = collate_packed([e.source for e in part], [e.target for e in part])
            inputs = send_to_device(batch, device)
            losses = model(**inputs, return_logits=False).token_losses[0].cpu().double()
            lengths = torch.tensor([len(example.target) for example in part])
            sums.index_add_(0, torch.tensor(numbers).repeat_interleave(lengths), losses)
    finally:
        model.train(training)
    return sums


def mean_losses(
    losses: torch.Tensor,
    examples: Sequence[Example],
    groups: Sequence[int],
    names: Sequence[str],
) -> dict[str, float]:
    """Average `example_losses` per target token by group; `groups` are indices into `names`."""
    totals, counts = torch.zeros(2, len(names), dtype=torch.float64)
    index = torch.tensor(groups, dtype=torch.long)
    totals.index_add_(0, index, losses)
    lengths = [len(example.target) for example in examples]
    counts.index_add_(0, index, torch.tensor(lengths, dtype=torch.float64))
    means = (totals / counts).tolist()
    return {name: means[i] for i, name in enumerate(names) if counts[i]}


@torch.no_grad()
def infill_examples(
    model: Any, tokenizer: Any, examples: Sequence[Example], n: int = 32
) -> dict[str, Any]:
    """Fill the gaps of the first `n` span-corrupted examples by greedy decoding.

    Returns `exact_rate`, the share of gaps filled exactly as in the document, and `examples`: dicts
    of `source`, `expected`, `generated` (with sentinels), and the counts `exact` and `spans`.
    Raises InputError if no example has a gap; prefix-to-suffix ones have none.
    """
    chosen = [e for e in examples if e.target[0] in tokenizer.sentinel_token_ids][:n]
    if not chosen:
        raise InputError("infilling needs at least one span-corrupted example")
    sources = [torch.from_numpy(example.source.astype(np.int64)) for example in chosen]
    input_ids = pad_sequence(sources, batch_first=True, padding_value=tokenizer.pad_token_id)
    training = model.training
    model.eval()
    outputs = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=(input_ids != tokenizer.pad_token_id).long().to(model.device),
        max_new_tokens=max(len(example.target) for example in chosen),
        do_sample=False,
        num_beams=1,
    )[:, 1:].tolist()  # without the start token
    model.train(training)
    rows = []
    for example, output in zip(chosen, outputs, strict=True):
        found = tokenizer.split_spans(output)
        expected = tokenizer.split_spans(example.target.tolist())
        row = {
            "source": tokenizer.decode(example.source[:-1]),
            "expected": tokenizer.decode(example.target[:-1]),
            "generated": tokenizer.decode(output).partition(tokenizer.eos_token)[0],
        }
        exact = sum(found.get(number) == span for number, span in expected.items())
        rows.append(row | {"exact": exact, "spans": len(expected)})
    rate = sum(row["exact"] for row in rows) / sum(row["spans"] for row in rows)
    return {"exact_rate": rate, "examples": rows}
