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


def collate(
    rows: Sequence[Row],
    *,
    pad_id: int,
    source_length: int | None = None,
    target_length: int | None = None,
) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of the batch, or to the given lengths.

    Returns (all int64; B rows, S source and T target tokens):
        input_ids `[B, S]`: sources of a row one after another.
        attention_mask `[B, S]`: k for the tokens of the row's k-th example, from 1 on; 0 is
        padding. labels `[B, T]`: targets; -100 is padding. decoder_attention_mask `[B, T]`: as
        attention_mask, for the targets. denoiser `[B, T]`: index of the denoiser a target token
        comes from; -1 is padding.
    """
    examples = [example for row in rows for example in row]
    counts = np.array([len(row) for row in rows])
    first = np.cumsum(counts) - counts
    segments = np.arange(len(examples)) - np.repeat(first, counts) + 1
    denoisers = np.array([example.denoiser for example in examples])

    sides = []
    for parts, length in (
        ([e.source for e in examples], source_length),
        ([e.target for e in examples], target_length),
    ):
        sizes = np.array([len(part) for part in parts])
        of_rows = np.add.reduceat(sizes, first)
        sides.append(
            (np.concatenate(parts), sizes, np.arange(length or of_rows.max()) < of_rows[:, None])
        )
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
    rows: Sequence[Row], *, pad_id: int, mask_id: int, kept_ids: np.ndarray, probability: float
) -> dict[str, torch.Tensor]:
    """`collate`, with source tokens masked at random.

    Which ones is a function of a row's tokens alone: the same in every worker, rank and continued
    run.

    Args:
        kept_ids: Ids that are never masked: EOS and sentinels.
        probability: Of masking any other token.

    Returns:
        The batch of `collate`, and `encoder_labels` `[B, S]` int64: the masked tokens' ids, -100
        elsewhere.
    """
    batch = collate(rows, pad_id=pad_id)
    ids, real = batch["input_ids"].numpy(), batch["attention_mask"].numpy() > 0
    seeds = [
        zlib.crc32(row[kept].tobytes()) for row, kept in zip(ids, real, strict=True)
    ]  # padding has no say
    draws = np.stack([np.random.default_rng(seed).random(ids.shape[1]) for seed in seeds])
    masked = (draws < probability) & real & ~np.isin(ids, kept_ids)
    return batch | {
        "input_ids": torch.from_numpy(np.where(masked, mask_id, ids)),
        "encoder_labels": torch.from_numpy(np.where(masked, ids, IGNORED)),
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
