"""Rows of examples to a padded batch."""

from collections.abc import Sequence

import numpy as np
import torch

from qwen3_encdec.data.packing import Row

IGNORED = -100


def collate(
    rows: Sequence[Row], *, pad_id: int, source_length: int | None = None, target_length: int | None = None
) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of the batch, or to the given lengths.

    Returns (all int64; B rows, S source and T target tokens):
        input_ids `[B, S]`: sources of a row one after another.
        attention_mask `[B, S]`: k for the tokens of the row's k-th example, from 1 on; 0 is padding.
        labels `[B, T]`: targets; -100 is padding.
        decoder_attention_mask `[B, T]`: as attention_mask, for the targets.
        denoiser `[B, T]`: index of the denoiser a target token comes from; -1 is padding.
    """
    examples = [example for row in rows for example in row]
    counts = np.array([len(row) for row in rows])
    segments = np.arange(len(examples)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    denoisers = np.array([example.denoiser for example in examples])

    def pad(parts: list[np.ndarray], length: int | None, fill: int, *labels: tuple[np.ndarray, int]) -> list:
        sizes = np.array([len(part) for part in parts])
        of_rows = np.add.reduceat(sizes, np.cumsum(counts) - counts)
        real = np.arange(length or of_rows.max()) < of_rows[:, None]
        ragged = [(np.concatenate(parts), fill), *((np.repeat(values, sizes), value) for values, value in labels)]
        padded = []
        for values, value in ragged:
            padded.append(np.full(real.shape, value, dtype=np.int64))
            padded[-1][real] = values
        return [torch.from_numpy(array) for array in padded]

    input_ids, attention_mask = pad([e.source for e in examples], source_length, pad_id, (segments, 0))
    labels, decoder_attention_mask, denoiser = pad(
        [e.target for e in examples], target_length, IGNORED, (segments, 0), (denoisers, -1)
    )
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "decoder_attention_mask": decoder_attention_mask,
        "denoiser": denoiser,
    }
