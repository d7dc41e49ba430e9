"""Packing of examples into rows, and collation of rows into packed batches."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.ul2 import Example
from qwen3_encdec.folders import InputError

Position = dict[str, int]


class Row(NamedTuple):
    """Examples that fit the length budgets together, and the stream's position after them."""

    examples: list[Example]
    stream: int
    corpus: int
    position: Position


def count_tokens(examples: Sequence[Example]) -> int:
    """Count source and target tokens."""
    return sum(len(example.source) + len(example.target) for example in examples)


def collate_packed(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> dict[str, Any]:
    """Concatenate D documents into one packed batch without padding.

    Args:
        sources: Token ids of each document's source, int64.
        targets: Labels of each document's target, int64, not shifted; -100 is ignored.

    Returns:
        The packed form that `Qwen3ForSeq2SeqLM` takes, with M source and N target tokens:

        - `input_ids` [1, M] and `labels` [1, N], int64, the concatenated documents;
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


def collate_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Collate all examples of some rows into a packed batch.

    In addition to `collate_packed`'s entries it has `denoiser` [1, N] int64, the index of each
    target token's denoiser.
    """
    examples = [example for row in rows for example in row.examples]
    batch = collate_packed([e.source for e in examples], [e.target for e in examples])
    lengths = [len(example.target) for example in examples]
    denoiser = np.repeat([example.denoiser for example in examples], lengths)
    return batch | {"denoiser": torch.from_numpy(denoiser)[None]}


def collate_micro_batches(
    rows: Sequence[Row], *, number: int, collate: Callable[[list[Row]], Any]
) -> list[Any]:
    """Collate rows into `number` micro-batches of similar token counts and at least one row."""
    tokens, chosen = np.zeros(number, np.int64), np.zeros(len(rows), np.int64)
    sizes = [count_tokens(row.examples) for row in rows]
    for index in np.argsort(sizes)[::-1]:  # largest first, to the smallest micro-batch
        chosen[index] = tokens.argmin()
        tokens[chosen[index]] += sizes[index]
    return [collate([rows[i] for i in np.flatnonzero(chosen == n).tolist()]) for n in range(number)]


def collate_masked_rows(
    rows: Sequence[Row], *, mask_id: int, kept_ids: np.ndarray, probability: float
) -> dict[str, Any]:
    """Collate rows with source tokens masked at random.

    The mask depends on the source alone, so it is the same in any worker, rank or resumed run.

    Args:
        rows: As `collate_rows` takes them.
        mask_id: Id that replaces a masked token.
        kept_ids: Ids that are never masked: EOS and sentinels.
        probability: Probability of masking any other token.

    Returns:
        The batch of `collate_rows`, and `encoder_targets` [1, M] int64: the masked tokens' ids,
        -100 elsewhere.
    """
    batch = collate_rows(rows)
    ids = batch["input_ids"].numpy()
    sources = [example.source for row in rows for example in row.examples]
    draws = [np.random.default_rng(zlib.crc32(s.tobytes())).random(len(s)) for s in sources]
    masked = (np.concatenate(draws)[None] < probability) & ~np.isin(ids, kept_ids)
    return batch | {
        "input_ids": torch.from_numpy(np.where(masked, mask_id, ids)),
        "encoder_targets": torch.from_numpy(np.where(masked, ids, -100)),
    }


def mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the reserved token used for masking: Qwen3 has no mask token.

    Raises InputError if the tokenizer lacks it.
    """
    token = "<|reserved_3|>"
    vocabulary, name = tokenizer.get_vocab(), tokenizer.name_or_path
    if token not in vocabulary:
        raise InputError(f"tokenizer {name!r} has no {token}; mntp_weight needs it as a mask")
    return vocabulary[token]


class DataCollatorForPackedSeq2Seq:
    """Collate features for transformers' Trainer as the packed batch of `collate_packed`.

    A feature is a dict with `input_ids` and `labels` as lists, arrays or tensors. Other entries,
    such as an attention mask, are ignored: there is no padding.
    """

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the packed batch."""
        sources = [np.asarray(feature["input_ids"], dtype=np.int64) for feature in features]
        targets = [np.asarray(feature["labels"], dtype=np.int64) for feature in features]
        return collate_packed(sources, targets)


def pack(
    examples: Sequence[Example], source_length: int, target_length: int
) -> list[list[Example]]:
    """Pack examples into rows: best fit, largest first.

    An example goes to the row where it leaves the least room in the tighter budget. Deterministic;
    every example is in exactly one row. Raises ValueError if one exceeds a budget by itself.
    """
    # As shares of the budgets, scaled to integers so that sums are exact.
    sizes = np.array([(len(e.source), len(e.target)) for e in examples]).reshape(-1, 2)
    needs = sizes * (target_length, source_length)
    budget = source_length * target_length
    if needs.max(initial=0) > budget:
        raise ValueError(f"an example exceeds {source_length=} or {target_length=}")
    rows: list[list[Example]] = [[] for _ in examples]
    rooms = np.full((len(examples), 2), budget)
    opened = 0
    for i in np.lexsort((-needs.sum(axis=1), -needs.max(axis=1))):
        left = (rooms[: opened + 1] - needs[i]).min(axis=1)
        left[left < 0] = budget
        best = int(left.argmin())
        opened = max(opened, best + 1)
        rows[best].append(examples[i])
        rooms[best] -= needs[i]
    return rows[:opened]
