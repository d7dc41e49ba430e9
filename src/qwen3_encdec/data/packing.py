"""Packing several (source, target) pairs into a row that has a budget of tokens for each."""

from collections.abc import Sequence

import numpy as np

from qwen3_encdec.data.ul2 import Example

Row = list[Example]
_BUCKET = 64


def pack(examples: Sequence[Example], source_length: int, target_length: int) -> list[Row]:
    """Best fit, largest first: each example goes to the row in which it leaves the least room of either budget.

    Deterministic; every example is in exactly one row. Raises ValueError if one exceeds a budget by itself.
    """
    # Whole numbers: a token of the one side counts as much as its share of that side's budget.
    source, target = _sizes(examples) * np.array([[target_length], [source_length]])
    budget = source_length * target_length
    larger = np.maximum(source, target)
    if len(examples) and larger.max() > budget:
        raise ValueError(f"an example exceeds source_length={source_length} or target_length={target_length}")
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
    order = np.lexsort((source, np.ceil(2 * np.log2(target))))  # targets alike within a factor of 1.4
    groups = [order[start : start + _BUCKET].tolist() for start in range(0, len(order), _BUCKET)]
    return [[examples[i]] for group in rng.permutation(len(groups)) for i in groups[group]]


def fewest_rows(examples: Sequence[Example], source_length: int, target_length: int) -> float:
    """No packing can do with fewer rows than this; over the rows there are it says how good a packing is.

    How full rows are says less: the mixture fixes the ratio of source to target tokens, so that only one budget can be
    filled; and where a chunk fills the other one by itself, not even that.

    Either all tokens of one side fill rows to the brim; or, better, examples that take more than half of one side
    have a row each, which the most favourable of the other examples then fill up on the other side.
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
    return np.array([(len(e.source), len(e.target)) for e in examples], dtype=np.int64).reshape(-1, 2).T
