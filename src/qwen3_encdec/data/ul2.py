"""UL2: a mixture of denoising objectives, as pure functions of (tokens, denoiser, generator).

A span denoiser replaces spans of the text with sentinels; the target spells the spans out. With
EOS written as `.`:

    tokens    the quick brown fox jumps over the lazy dog
    noise      0    1     1    0    0    1    1   0    0
    source    the <extra_id_0> fox jumps <extra_id_1> lazy dog .
    target    <extra_id_0> quick brown <extra_id_1> over the .

There is no closing sentinel: EOS ends the last span. The prefix-to-suffix denoiser S
(`mean_span=None`) has no sentinel: the source is the prefix, the target the suffix. `uncorrupt`
inverts both exactly.

Shapes: everything is a one-dimensional integer array. Source: Tay et al. 2022 (UL2), Raffel et al.
2020 (T5); the mixture of `t5gemma2` is Zhang et al. 2025 (T5Gemma 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import ceil, floor, inf
from typing import Any, NamedTuple

import numpy as np

from qwen3_encdec.folders import InputError

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Denoiser:
    """One objective of the mixture."""

    name: str
    """Name in logs and reports."""
    mean_span: float | None
    """Mean length of a noise span in tokens; None is prefix-to-suffix."""
    corruption: float
    """Share of the tokens that go into the target, above 0 and below 1."""
    weight: float = 1.0
    """Share of the examples, relative to the other denoisers."""

    def __post_init__(self) -> None:
        span = 1 if self.mean_span is None else self.mean_span
        for name, value, low, high in (
            ("mean_span", span, 1, inf),
            ("corruption", self.corruption, 1e-6, 1),
            ("weight", self.weight, 1e-6, inf),
        ):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not low <= value < high:
                wanted = f"a number in [{low}, {high})"
                raise InputError(f"denoiser {self.name}: {name}={value!r} is not {wanted}")


class Example(NamedTuple):
    """A source and its target, int32, both ending in EOS."""

    source: np.ndarray
    target: np.ndarray
    denoiser: int
    """Index into the preset."""


Preset = tuple[Denoiser, ...]

PRESETS: dict[str, Preset] = {
    "t5gemma2": (
        Denoiser("R1", 3, 0.15, 1),
        Denoiser("R2", 12, 0.50, 1),
        Denoiser("X1", 32, 0.15, 1),
        Denoiser("X2", 32, 0.50, 1),
        Denoiser("S", None, 0.75, 4),
    ),
    "ul2": (
        Denoiser("R1", 3, 0.15),
        Denoiser("R2", 8, 0.15),
        Denoiser("X1", 3, 0.50),
        Denoiser("X2", 8, 0.50),
        Denoiser("X3", 64, 0.15),
        Denoiser("X4", 64, 0.50),
        Denoiser("S", None, 0.25),
    ),
    "t5": (Denoiser("R", 3, 0.15),),
}


def corrupt(
    tokens: np.ndarray,
    denoiser: Denoiser,
    rng: np.random.Generator,
    *,
    sentinel_ids: Ids,
    eos_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt one text: at least two tokens, none of them a sentinel.

    `rng` is the only source of randomness. Returns source and target, int32, both ending in
    `eos_id`. Raises ValueError for any other text, or if there are more spans than `sentinel_ids`.
    """
    length = len(tokens)
    if length < 2:
        raise ValueError(f"{length} tokens are too few to corrupt; at least 2 are needed")
    first = sentinel_ids[0] if len(sentinel_ids) else inf
    if tokens.max() >= first and np.isin(tokens, sentinel_ids).any():
        raise ValueError("the text has a sentinel token; use split_special_tokens=True")
    noise_tokens = _round(length * denoiser.corruption, rng)
    noise_tokens = min(max(noise_tokens, 1), length - 1)
    if denoiser.mean_span is None:
        kept = length - noise_tokens
        return _join(tokens[:kept], [eos_id]), _join(tokens[kept:], [eos_id])

    spans = _round(noise_tokens / denoiser.mean_span, rng)
    spans = min(max(spans, 1), noise_tokens, length - noise_tokens)
    noise = place_spans(length, noise_tokens, spans, rng)

    begins = noise.copy()
    begins[1:] &= ~noise[:-1]
    spans = int(np.count_nonzero(begins))
    if spans > len(sentinel_ids):
        raise ValueError(f"{spans} spans need as many sentinels, got {len(sentinel_ids)}")
    # Every token with room for a sentinel before it. Both sides keep the sentinels.
    pairs = np.empty((length, 2), np.int32)
    pairs[begins, 0] = sentinel_ids[:spans]
    pairs[:, 1] = tokens
    source = pairs[np.stack([begins, ~noise], axis=1)]
    target = pairs[np.stack([begins, noise], axis=1)]
    return _join(source, [eos_id]), _join(target, [eos_id])


def place_spans(length: int, noise: int, spans: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask, bool `[length]`, of `noise` tokens in `spans` spans, uniform over positions.

    T5's segments never put noise on the first token and always put it on the last one. Rotating
    them by a uniform offset makes all positions equally likely; if the rotation splits a noise
    span, there is one more span.
    """
    circle = t5_segments(length, noise, spans, rng)
    turn = int(rng.integers(length))
    return np.concatenate([circle[turn:], circle[:turn]])


def t5_segments(length: int, noise: int, spans: int, rng: np.random.Generator) -> np.ndarray:
    """Alternate kept and noise segments, first kept, last noise; all splits are equally likely."""
    segments = np.empty(2 * spans, np.int64)
    segments[0::2] = _cut(length - noise, spans, rng)
    segments[1::2] = _cut(noise, spans, rng)
    is_noise = np.zeros(2 * spans, bool)
    is_noise[1::2] = True
    return is_noise.repeat(segments)


def _cut(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Split `total` into `parts` of at least one, all splits equally likely."""
    ends = np.full(parts + 1, total)
    ends[0] = 0
    ends[1:-1] = rng.choice(total - 1, parts - 1, replace=False, shuffle=False) + 1
    ends[1:-1].sort()
    return ends[1:] - ends[:-1]


def _round(value: float, rng: np.random.Generator) -> int:
    """Round stochastically, preserving the mean."""
    # A product such as 20 * 0.15 may differ from its exact integer by rounding error.
    return floor(round(value, 6) + rng.random())


def _join(*parts: Ids) -> np.ndarray:
    return np.concatenate(parts, dtype=np.int32, casting="unsafe")


def uncorrupt(
    source: np.ndarray, target: np.ndarray, *, sentinel_ids: Ids, eos_id: int
) -> np.ndarray:
    """Return the tokens, int32, that `corrupt` was given.

    Raises ValueError if the pair cannot come from `corrupt`.
    """
    if len(source) < 1 or len(target) < 1 or source[-1] != eos_id or target[-1] != eos_id:
        raise ValueError("source and target must end in EOS")
    source, target = _join(source[:-1]), _join(target[:-1])
    holes = np.flatnonzero(np.isin(source, sentinel_ids))
    marks = np.flatnonzero(np.isin(target, sentinel_ids))
    expected = sentinel_ids[: len(holes)]
    if not np.array_equal(source[holes], expected) or not np.array_equal(target[marks], expected):
        raise ValueError("source and target must have the same sentinels, each once and in order")
    first, *kept = np.split(source, holes)
    suffix, *spans = np.split(target, marks)
    if len(holes) and len(suffix):
        raise ValueError("the target does not start with a sentinel")
    parts = [first]
    for span, after in zip(spans, kept, strict=True):
        parts += [span[1:], after[1:]]
    return np.concatenate([*parts, suffix])


def sizes(denoiser: Denoiser, length: int) -> tuple[int, int, int]:
    """Return the fewest and the most noise tokens, and the most spans, of `length` tokens."""
    product = round(length * denoiser.corruption, 6)
    fewest = min(max(floor(product), 1), length - 1)
    most = min(max(ceil(product), 1), length - 1)
    if denoiser.mean_span is None:
        return fewest, most, 0
    spans = min(ceil(round(most / denoiser.mean_span, 6)), length - fewest)
    # The rotation can split one span of two or more tokens.
    return fewest, most, min(spans + 1, most)


@lru_cache
def raw_length(denoiser: Denoiser, source_length: int, target_length: int) -> int:
    """Return the longest text, in tokens, up to which every source and target fit.

    EOS and sentinels are counted. Raises InputError if that is below two tokens.
    """
    for length in count(2):
        fewest, most, spans = sizes(denoiser, length)
        if length - fewest + spans >= source_length or most + spans >= target_length:
            break
    if length == 2:
        raise InputError(
            f"denoiser {denoiser.name}: {source_length=}, {target_length=} cannot fit 2 tokens"
        )
    return length - 1


def check_capacity(preset: Preset, source_length: int, target_length: int, sentinels: int) -> None:
    """Raise InputError if a denoiser can need more sentinels than there are."""
    lengths = [raw_length(denoiser, source_length, target_length) for denoiser in preset]
    needs = [sizes(*pair)[2] for pair in zip(preset, lengths, strict=True)]
    if max(needs) > sentinels:
        worst = needs.index(max(needs))
        raise InputError(
            f"denoiser {preset[worst].name} needs up to {max(needs)} sentinels for texts of "
            f"{lengths[worst]} tokens ({source_length=}, {target_length=}) but the tokenizer has "
            f"{sentinels}; build it with --num-sentinel-tokens {max(needs)} or reduce the lengths"
        )


def render(example: Example, tokenizer: Any, preset: Preset) -> str:
    """Render an example as readable text, with its special tokens visible."""
    lines = [f"[{preset[example.denoiser].name}]"]
    for side, ids in (("source", example.source), ("target", example.target)):
        lines.append(f"  {side} ({len(ids)}): {tokenizer.decode(ids)!r}")
    return "\n".join(lines)
