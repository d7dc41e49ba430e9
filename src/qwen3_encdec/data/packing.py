"""Packing several (source, target) pairs into a row that has a budget of tokens for each."""

from collections.abc import Sequence

import numpy as np

from qwen3_encdec.data.ul2 import Example

Row = list[Example]


def pack(examples: Sequence[Example], source_length: int, target_length: int) -> list[Row]:
    """Best fit, largest first: each example goes to the row in which it leaves the least room of either budget.

    Deterministic; every example is in exactly one row. Raises ValueError if one exceeds a budget by itself.
    """
    sizes = np.array([(len(e.source), len(e.target)) for e in examples], dtype=np.float64).reshape(-1, 2)
    budget = np.array([source_length, target_length], dtype=np.float64)
    sizes /= budget
    if (sizes > 1).any():
        raise ValueError(f"an example exceeds source_length={source_length} or target_length={target_length}")
    order = np.lexsort((-sizes.sum(axis=1), -sizes.max(axis=1)))
    rows: list[Row] = []
    room = np.empty((len(examples), 2))
    for i in order:
        left = room[: len(rows)] - sizes[i]
        fits = np.flatnonzero((left >= -1e-9).all(axis=1))
        if len(fits):
            best = fits[np.argmin(left[fits].min(axis=1))]
            rows[best].append(examples[i])
            room[best] = left[best]
        else:
            room[len(rows)] = 1 - sizes[i]
            rows.append([examples[i]])
    return rows


def packing_efficiency(rows: Sequence[Row], source_length: int, target_length: int) -> tuple[float, float, float]:
    """How full rows are: of the source budget, of the target budget, and of what no packing could beat.

    The mixture fixes the ratio of source to target tokens, so that only one budget can be filled. The third number
    is the fewest rows that could hold that budget's tokens, over the rows there are.
    """
    source = sum(len(e.source) for row in rows for e in row) / (len(rows) * source_length)
    target = sum(len(e.target) for row in rows for e in row) / (len(rows) * target_length)
    return source, target, max(source, target)
