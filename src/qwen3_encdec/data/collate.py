"""Rows of examples to a padded batch."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.ul2 import Example
from qwen3_encdec.folders import InputError

Row = list[Example]
IGNORED = -100
_BUCKET = 64


def collate_packed(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> dict[str, Any]:
    """Lay D documents out as one packed batch without padding.

    Args:
        sources: Token ids of each document's source, int64.
        targets: Labels of each document's target, int64, not shifted; -100 is ignored.

    Returns:
        The packed form that `Qwen3ForSeq2SeqLM` takes, with M source and N target tokens:

        - `input_ids` [1, M] and `labels` [1, N], int64, documents one after another;
        - `position_ids` [1, M] and `decoder_position_ids` [1, N], int64, from 0 in every document;
        - `cu_seqlens` and `decoder_cu_seqlens`, [D + 1] int32, cumulative lengths;
        - `max_seqlen` and `decoder_max_seqlen`, int, longest lengths;
        - `key_order` [M + N] int64: sorts [all sources ; all targets] document by document, the
          source before the target.
    """
    documents = np.arange(len(sources))
    batch: dict[str, Any] = {}
    owners = []
    for side, ids, prefix in ((sources, "input_ids", ""), (targets, "labels", "decoder_")):
        lengths = np.array([len(part) for part in side], dtype=np.int64)
        ends = np.cumsum(lengths)
        owner = np.repeat(documents, lengths)
        batch[ids] = torch.from_numpy(np.concatenate(side).astype(np.int64))[None]
        positions = np.arange(len(owner)) - (ends - lengths)[owner]
        batch[f"{prefix}position_ids"] = torch.from_numpy(positions)[None]
        batch[f"{prefix}cu_seqlens"] = torch.from_numpy(np.append(0, ends).astype(np.int32))
        batch[f"{prefix}max_seqlen"] = int(lengths.max())
        owners.append(owner)
    order = np.argsort(np.concatenate(owners), kind="stable")
    return batch | {"key_order": torch.from_numpy(order)}


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """Lay the examples of all rows out as one packed batch.

    Returns:
        The batch of `collate_packed`, and `denoiser` [1, N] int64: the index of the denoiser that
        each target token comes from.
    """
    examples = [example for row in rows for example in row]
    sources = [example.source for example in examples]
    targets = [example.target for example in examples]
    denoisers = np.array([example.denoiser for example in examples], dtype=np.int64)
    of_tokens = np.repeat(denoisers, [len(target) for target in targets])
    return collate_packed(sources, targets) | {"denoiser": torch.from_numpy(of_tokens)[None]}


_MASK_TOKEN = "<|reserved_3|>"  # 0 to 2 are the mode tokens


def mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The reserved token that stands for a masked one;

    Qwen3 has no mask token. Raises InputError without one.
    """
    index = tokenizer.get_vocab().get(_MASK_TOKEN)
    if index is None:
        raise InputError(
            f"mntp_weight: tokenizer {tokenizer.name_or_path!r} has no {_MASK_TOKEN} to mask with"
        )
    return index


def collate_masked(
    rows: Sequence[Row], *, mask_id: int, kept_ids: np.ndarray, probability: float
) -> dict[str, Any]:
    """`collate`, with source tokens masked at random.

    Which ones is a function of an example's tokens alone: the same in every worker, rank and
    continued run.

    Args:
        kept_ids: Ids that are never masked: EOS and sentinels.
        probability: Of masking any other token.

    Returns:
        The batch of `collate`, and `encoder_targets` [1, M] int64: the masked tokens' ids, -100
        elsewhere.
    """
    batch = collate(rows)
    sources = [np.asarray(e.source, dtype=np.int64) for row in rows for e in row]
    seeds = [zlib.crc32(source.tobytes()) for source in sources]
    draws = [
        np.random.default_rng(seed).random(len(source))
        for seed, source in zip(seeds, sources, strict=True)
    ]
    ids = batch["input_ids"].numpy()
    masked = (np.concatenate(draws) < probability) & ~np.isin(ids, kept_ids)
    return batch | {
        "input_ids": torch.from_numpy(np.where(masked, mask_id, ids)),
        "encoder_targets": torch.from_numpy(np.where(masked, ids, IGNORED)),
    }


def pack(examples: Sequence[Example], source_length: int, target_length: int) -> list[Row]:
    """Best fit, largest first: each example goes to the row in which it leaves the least room of
    either budget.

    Deterministic; every example is in exactly one row. Raises ValueError if one exceeds a budget by
    itself.
    """
    # Whole numbers: a token of the one side counts as much as its share of that side's budget.
    source, target = _sizes(examples) * np.array([[target_length], [source_length]])
    budget = source_length * target_length
    larger = np.maximum(source, target)
    if len(examples) and larger.max() > budget:
        raise ValueError(
            f"an example exceeds source_length={source_length} or target_length={target_length}"
        )
    order = np.lexsort((-(source + target), -larger)).tolist()
    sources, targets = source.tolist(), target.tolist()
    rows: list[Row] = []
    source_room, target_room = np.empty((2, len(examples)), dtype=np.int64)
    for i in order:
        n = len(rows)
        left = np.minimum(source_room[:n] - sources[i], target_room[:n] - targets[i])
        # Read as unsigned, rows without room are the last choice.
        best = int(left.view(np.uint64).argmin()) if n else 0
        if n and left[best] >= 0:
            rows[best].append(examples[i])
        else:
            best = n
            rows.append([examples[i]])
            source_room[n] = target_room[n] = budget
        source_room[best] -= sources[i]
        target_room[best] -= targets[i]
    return rows


def bucket(examples: Sequence[Example], rng: np.random.Generator) -> list[Row]:
    """One example a row, rows of like length after each other, so that batches need little padding."""
    source, target = _sizes(examples)
    order = np.lexsort(
        (source, np.ceil(2 * np.log2(target)))
    )  # targets alike within a factor of 1.4
    groups = [order[start : start + _BUCKET].tolist() for start in range(0, len(order), _BUCKET)]
    return [[examples[i]] for group in rng.permutation(len(groups)) for i in groups[group]]


def fewest_rows(examples: Sequence[Example], source_length: int, target_length: int) -> float:
    """No packing can do with fewer rows than this; over the rows there are it says how good a
    packing is.

    How full rows are says less: the mixture fixes the ratio of source to target tokens, so that
    only one budget can be filled; and where a chunk fills the other one by itself, not even that.

    Either all tokens of one side fill rows to the brim; or, better, examples that take more than
    half of one side have a row each, which the most favourable of the other examples then fill up
    on the other side.
    """
    source, target = _sizes(examples) / np.array([[source_length], [target_length]])
    bounds = [1.0]
    for one, other in ((source, target), (target, source)):
        large = one > 0.5
        slope = (other[~large] / one[~large]).max(initial=0)
        filled = np.minimum(1, other[large] + slope * (1 - one[large]))
        bounds += [other.sum(), large.sum() + other.sum() - filled.sum()]
    return float(max(bounds))


def _sizes(examples: Sequence[Example]) -> np.ndarray:
    """Source and target lengths, int64 (2, examples)."""
    return (
        np.array([(len(e.source), len(e.target)) for e in examples], dtype=np.int64)
        .reshape(-1, 2)
        .T
    )
