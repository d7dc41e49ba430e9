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
    sources = [_join([example.source for example in row]) for row in rows]
    targets = [_join([example.target for example in row]) for row in rows]
    denoisers = [np.repeat([e.denoiser for e in row], [len(e.target) for e in row]) for row in rows]
    return {
        "input_ids": _pad([ids for ids, _ in sources], pad_id, source_length),
        "attention_mask": _pad([segments for _, segments in sources], 0, source_length),
        "labels": _pad([ids for ids, _ in targets], IGNORED, target_length),
        "decoder_attention_mask": _pad([segments for _, segments in targets], 0, target_length),
        "denoiser": _pad(denoisers, -1, target_length),
    }


def _join(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(parts), np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts])


def _pad(rows: list[np.ndarray], value: int, length: int | None) -> torch.Tensor:
    padded = torch.full((len(rows), length or max(map(len, rows))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return padded
