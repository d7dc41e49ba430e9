"""Masked sources for the encoder's auxiliary loss: masked next-token prediction (MNTP, arXiv 2404.05961)."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.collator import IGNORED, collate
from qwen3_encdec.data.packing import Row
from qwen3_encdec.files import InputError

_MASK_TOKEN = "<|reserved_3|>"  # 0 to 2 are the mode tokens


def mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The reserved token that stands for a masked one; Qwen3 has no mask token. Raises InputError without one."""
    index = tokenizer.get_vocab().get(_MASK_TOKEN)
    if index is None:
        raise InputError(f"mntp_weight: tokenizer {tokenizer.name_or_path!r} has no {_MASK_TOKEN} to mask with")
    return index


def collate_masked(
    rows: Sequence[Row], *, pad_id: int, mask_id: int, kept_ids: np.ndarray, probability: float
) -> dict[str, torch.Tensor]:
    """`collate`, with source tokens masked at random.

    Which ones is a function of a row's tokens alone: the same in every worker, rank and continued run.

    Args:
        kept_ids: Ids that are never masked: EOS and sentinels.
        probability: Of masking any other token.

    Returns:
        The batch of `collate`, and `encoder_labels` `[B, S]` int64: the masked tokens' ids, -100 elsewhere.
    """
    batch = collate(rows, pad_id=pad_id)
    ids, real = batch["input_ids"].numpy(), batch["attention_mask"].numpy() > 0
    seeds = [zlib.crc32(row[kept].tobytes()) for row, kept in zip(ids, real, strict=True)]  # padding has no say
    draws = np.stack([np.random.default_rng(seed).random(ids.shape[1]) for seed in seeds])
    masked = (draws < probability) & real & ~np.isin(ids, kept_ids)
    return batch | {
        "input_ids": torch.from_numpy(np.where(masked, mask_id, ids)),
        "encoder_labels": torch.from_numpy(np.where(masked, ids, IGNORED)),
    }
