"""Score held-out denoising: loss by denoiser, and the spans that a model writes into the gaps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn.utils.rnn import pad_sequence

from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.data.ul2 import Example
from qwen3_encdec.folders import InputError


@torch.no_grad()
def denoising_losses(
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    denoiser_names: Sequence[str],
    batch_size: int = 16,
) -> dict[str, float]:
    """Mean loss by denoiser over a fixed list of examples, each target token (EOS included)
    weighing the same.

    The value does not depend on `batch_size`. With sharded parameters every rank must call this
    with the same examples. The model's training mode is restored.

    Args:
        model: An encoder-decoder, wrapped or not.
        examples: Sources and targets; `denoiser` indexes `denoiser_names`.
        denoiser_names: The preset's names.
        batch_size: Examples per call.

    Returns:
        Nats per target token by denoiser; a denoiser without examples is left out.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, len(denoiser_names), dtype=torch.float64)
    by_length = sorted(examples, key=lambda example: len(example.source))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(by_length), batch_size):
            part = by_length[start : start + batch_size]
            batch = collate_packed([e.source for e in part], [e.target for e in part])
            inputs = send_to_device(batch, device)
            losses = model(**inputs, return_logits=False).token_losses[0].double().cpu()
            lengths = torch.tensor([len(example.target) for example in part])
            denoiser = torch.tensor([example.denoiser for example in part])
            denoiser = denoiser.repeat_interleave(lengths)
            sums[0].index_add_(0, denoiser, losses)
            sums[1].index_add_(0, denoiser, torch.ones_like(losses))
    finally:
        model.train(training)
    return {
        name: total / count
        for name, total, count in zip(denoiser_names, *sums.tolist(), strict=True)
        if count
    }


@torch.no_grad()
def infill_examples(
    model: Any, tokenizer: Any, examples: Sequence[Example], n: int = 32
) -> dict[str, Any]:
    """Let the model fill the gaps of the first `n` span-corrupted examples, greedily.

    Prefix-to-suffix examples are passed over: a free continuation has no single right answer.

    Returns:
        `exact_rate`, the share of the gaps whose tokens all are as in the text, and `examples`,
        dicts of `source`, `expected`, `generated` (text with its sentinels) and `exact` of `spans`
        (counts).

    Raises:
        InputError: no example has a gap.
    """
    first, last = tokenizer.sentinel_token_ids[0], tokenizer.sentinel_token_ids[-1]
    chosen = [example for example in examples if first <= example.target[0] <= last][:n]
    if not chosen:
        raise InputError("there is no span-corrupted example to fill in")
    sources = [torch.from_numpy(example.source.astype(np.int64)) for example in chosen]
    input_ids = pad_sequence(sources, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(source) for source in sources], batch_first=True)
    training = model.training
    model.eval()
    generated = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(len(example.target) for example in chosen),
        do_sample=False,
        num_beams=1,
    )
    model.train(training)
    rows = []
    outputs = generated[:, 1:].cpu().numpy()  # without the start token
    for example, output in zip(chosen, outputs, strict=True):
        ends = np.flatnonzero(output == tokenizer.eos_token_id)
        answer = output[: ends[0]] if len(ends) else output
        expected, found = _spans(example.target[:-1], first, last), _spans(answer, first, last)
        rows.append(
            {
                "source": tokenizer.decode(example.source[:-1]),
                "expected": tokenizer.decode(example.target[:-1]),
                "generated": tokenizer.decode(answer),
                "exact": sum(found.get(sentinel) == span for sentinel, span in expected.items()),
                "spans": len(expected),
            }
        )
    return {
        "exact_rate": sum(r["exact"] for r in rows) / sum(r["spans"] for r in rows),
        "examples": rows,
    }


def _spans(target: np.ndarray, first: int, last: int) -> dict[int, list[int]]:
    """Tokens after each sentinel; of a sentinel written twice the first counts."""
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in target.tolist():
        if first <= token <= last:
            current = []
            spans.setdefault(token, current)
        else:
            current.append(token)
    return spans
