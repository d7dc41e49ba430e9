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
    first = np.cumsum(counts) - counts
    segments = np.arange(len(examples)) - np.repeat(first, counts) + 1
    denoisers = np.array([example.denoiser for example in examples])

    sides = []
    for parts, length in (([e.source for e in examples], source_length), ([e.target for e in examples], target_length)):
        sizes = np.array([len(part) for part in parts])
        of_rows = np.add.reduceat(sizes, first)
        sides.append((np.concatenate(parts), sizes, np.arange(length or of_rows.max()) < of_rows[:, None]))
    (source, source_sizes, in_source), (target, target_sizes, in_target) = sides
    columns = {
        "input_ids": (source, in_source, pad_id),
        "attention_mask": (np.repeat(segments, source_sizes), in_source, 0),
        "labels": (target, in_target, IGNORED),
        "decoder_attention_mask": (np.repeat(segments, target_sizes), in_target, 0),
        "denoiser": (np.repeat(denoisers, target_sizes), in_target, -1),
    }
    # One storage for all: a worker hands it over in one piece.
    storage = torch.empty(2 * in_source.size + 3 * in_target.size, dtype=torch.int64)
    pieces = storage.split([real.size for _, real, _ in columns.values()])
    batch = {}
    for (name, (values, real, fill)), piece in zip(columns.items(), pieces, strict=True):
        batch[name] = piece.view(real.shape)
        padded = batch[name].numpy()
        padded.fill(fill)
        padded[real] = values
    return batch
