"""UL2: a mixture of denoising objectives, as pure functions of (tokens, denoiser, generator).

A span denoiser replaces spans of the text by sentinels; the target spells the spans out. With EOS written `.`:

    tokens    the quick brown fox jumps over the lazy dog
    source    the <extra_id_0> fox jumps <extra_id_1> lazy dog .
    target    <extra_id_0> quick brown <extra_id_1> over the .

There is no closing sentinel: EOS ends the last span. The prefix-to-suffix denoiser S (`mean_span=None`) has no
sentinel: the source is the prefix, the target the suffix. `uncorrupt` inverts both exactly.

Placement. T5 alternates kept and noise segments, always starting with a kept one and ending in noise, so the first
token is never predicted and the last one always is. Here that circle of segments is turned by a uniform angle, which
makes every position equally likely to be noise; when the turn cuts a noise span in two, there is one span (and one
sentinel) more. `placement="t5"` is T5's own rule, rounding included.

Shapes: everything is a one-dimensional integer array. Source: Tay et al. 2022 (UL2), Raffel et al. 2020 (T5); the
mixture of `t5gemma2` is Zhang et al. 2025 (T5Gemma 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from qwen3_encdec.files import InputError

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Denoiser:
    """One objective of the mixture."""

    name: str
    """How logs and reports call it."""
    mean_span: float | None
    """Mean length of a noise span in tokens; None is prefix-to-suffix."""
    corruption: float
    """Share of the tokens that the target holds, above 0 and below 1."""
    weight: float = 1.0
    """Share of the examples, relative to the other denoisers."""
    placement: Literal["uniform", "t5"] = "uniform"
    """Where spans may lie: `uniform` over all positions, or as T5 does."""

    def __post_init__(self) -> None:
        for name in ("mean_span", "corruption", "weight"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) or (name == "mean_span" and value is None)):
                raise InputError(f"denoiser {self.name}: {name}={value!r} is not a number")
        if not 0 < self.corruption < 1:
            raise InputError(f"denoiser {self.name}: corruption={self.corruption} is not between 0 and 1")
        if self.mean_span is not None and not 1 <= self.mean_span < np.inf:
            raise InputError(f"denoiser {self.name}: mean_span={self.mean_span} is below 1")
        if not 0 < self.weight < np.inf:
            raise InputError(f"denoiser {self.name}: weight={self.weight} is not positive")
        if self.placement not in ("uniform", "t5"):
            raise InputError(f"denoiser {self.name}: placement={self.placement!r} is not 'uniform' or 't5'")


class Example(NamedTuple):
    """What the model learns from: both arrays are int32 and end in EOS."""

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
    "t5": (Denoiser("R", 3, 0.15, placement="t5"),),
}


def resolve_preset(preset: str | Sequence[dict[str, Any] | Denoiser]) -> Preset:
    """A preset by name, or from the list of denoisers of a YAML file. Raises InputError for anything else."""
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise InputError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
        return PRESETS[preset]
    try:
        denoisers = tuple(d if isinstance(d, Denoiser) else Denoiser(**d) for d in preset)
    except TypeError as error:
        raise InputError(f"preset: {error} (a denoiser has name, mean_span, corruption, weight)") from None
    names = [denoiser.name for denoiser in denoisers]
    if not names or len(set(names)) < len(names):
        raise InputError(f"preset: the names of its denoisers are not distinct and at least one: {names}")
    return denoisers


def example_rng(seed: int, epoch: int, document: int, chunk: int) -> np.random.Generator:
    """A generator of its own for every chunk: the counter of Philox starts at (epoch, document, chunk).

    The four words never overlap, so streams of different chunks are disjoint and none needs another's history.
    """
    counter = chunk + (document << 64) + (epoch << 128)
    return np.random.Generator(np.random.Philox(key=seed, counter=counter << 64))


def draw_denoiser(preset: Preset, rng: np.random.Generator) -> int:
    """Index of a denoiser, with probability proportional to its weight."""
    shares = np.cumsum([denoiser.weight for denoiser in preset])
    return int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))


def corrupt(
    tokens: np.ndarray, denoiser: Denoiser, rng: np.random.Generator, *, sentinel_ids: Ids, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt a text of at least two tokens.

    The number of noise tokens is `corruption * len(tokens)` rounded up or down at random such that its mean is
    exact, but at least one and at most all but one.

    Args:
        tokens: Token ids, none of them a sentinel.
        denoiser: What to do.
        rng: The only source of randomness.
        sentinel_ids: Consecutive ascending ids; the first marks the first span.
        eos_id: Ends source and target.

    Returns:
        Source and target, int32.

    Raises:
        ValueError: Fewer than two tokens, a sentinel among the tokens, or more spans than sentinels.
    """
    tokens = np.asarray(tokens, dtype=np.int32)
    length = len(tokens)
    if length < 2:
        raise ValueError(f"{length} tokens are too few to corrupt; the least is 2")
    if len(sentinel_ids) and ((tokens >= sentinel_ids[0]) & (tokens <= sentinel_ids[-1])).any():
        raise ValueError("the tokens contain a sentinel: tokenize corpus text with split_special_tokens=True")
    noise = _draw(length * denoiser.corruption, denoiser, rng, length - 1)
    if denoiser.mean_span is None:
        prefix, suffix = tokens[: length - noise], tokens[length - noise :]
        return np.append(prefix, np.int32(eos_id)), np.append(suffix, np.int32(eos_id))
    spans = _draw(noise / denoiser.mean_span, denoiser, rng, min(noise, length - noise))
    mask = _alternate(length, noise, spans, rng)
    if denoiser.placement == "uniform":
        mask = np.roll(mask, rng.integers(length))
    return mask_spans(tokens, mask, sentinel_ids=sentinel_ids, eos_id=eos_id)


def mask_spans(
    tokens: np.ndarray, mask: np.ndarray, *, sentinel_ids: Ids, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Source and target (int32) for a given noise mask (bool, as long as the tokens)."""
    starts = mask.copy()
    starts[1:] &= ~mask[:-1]
    spans = int(starts.sum())
    if spans > len(sentinel_ids):
        raise ValueError(f"{spans} spans need as many sentinels; there are {len(sentinel_ids)}")
    sentinels = np.asarray(sentinel_ids[:spans], dtype=np.int32)

    source = tokens.astype(np.int32)
    source[starts] = sentinels
    source = np.append(source[~mask | starts], np.int32(eos_id))

    noise_starts = np.flatnonzero(starts[mask])
    target = np.empty(int(mask.sum()) + spans + 1, dtype=np.int32)
    is_token = np.ones(len(target), dtype=bool)
    is_token[noise_starts + np.arange(spans)] = False
    target[~is_token] = sentinels
    is_token[-1] = False
    target[is_token] = tokens[mask]
    target[-1] = eos_id
    return source, target


def uncorrupt(source: np.ndarray, target: np.ndarray, *, sentinel_ids: Ids, eos_id: int) -> np.ndarray:
    """The tokens (int32) that `corrupt` was given. Raises ValueError if the pair cannot come from it."""
    if len(source) < 1 or len(target) < 1 or source[-1] != eos_id or target[-1] != eos_id:
        raise ValueError("source and target must end in EOS")
    source, target = np.asarray(source[:-1], np.int32), np.asarray(target[:-1], np.int32)
    if not len(sentinel_ids):
        return np.concatenate([source, target])
    holes, marks = (np.flatnonzero((x >= sentinel_ids[0]) & (x <= sentinel_ids[-1])) for x in (source, target))
    expected = np.asarray(sentinel_ids[: len(holes)], np.int32)
    if not np.array_equal(source[holes], expected) or not np.array_equal(target[marks], expected):
        raise ValueError("the sentinels of source and target are not the same, each once and in order")
    if not len(holes):
        return np.concatenate([source, target])
    if marks[0] != 0:
        raise ValueError("the target does not start with a sentinel")
    kept, spans = np.split(source, holes), np.split(target, marks)[1:]
    return np.concatenate([kept[0], *(p for k, s in zip(kept[1:], spans, strict=True) for p in (s[1:], k[1:]))])


def _draw(mean: float, denoiser: Denoiser, rng: np.random.Generator, most: int) -> int:
    """An integer next to `mean`, between 1 and `most`: at random with that mean, or to the nearest as T5 does."""
    whole = int(mean)
    rounded = round(mean) if denoiser.placement == "t5" else whole + (rng.random() < mean - whole)
    return min(max(int(rounded), 1), most)


def _alternate(length: int, noise: int, spans: int, rng: np.random.Generator) -> np.ndarray:
    """A mask of `spans` kept segments and `spans` noise segments in turn, all cuts equally likely."""
    starts = np.empty(2 * spans, dtype=np.int64)
    kept_ends = _cuts(length - noise, spans, rng)
    noise_ends = _cuts(noise, spans, rng)
    starts[0] = 0
    starts[1::2] = kept_ends + np.append(0, noise_ends[:-1])
    starts[2::2] = (kept_ends + noise_ends)[:-1]
    mask = np.zeros(length, dtype=bool)
    mask[starts] = True
    return np.logical_xor.accumulate(mask) ^ True


def _cuts(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """Where `segments` segments of at least one item end, for a division of `items` drawn uniformly."""
    ends = np.full(segments, items, dtype=np.int64)
    if segments > 1:
        ends[:-1] = np.sort(rng.choice(items - 1, segments - 1, replace=False, shuffle=False)) + 1
    return ends


def _most(denoiser: Denoiser, length: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fewest and most noise tokens and most spans that `corrupt` can draw, for every raw length."""
    mean = length * denoiser.corruption
    if denoiser.placement == "t5":
        fewest = most = np.clip(np.rint(mean), 1, length - 1)
    else:
        fewest, most = (np.clip(nearest(mean), 1, length - 1) for nearest in (np.floor, np.ceil))
    if denoiser.mean_span is None:
        return fewest, most, np.zeros_like(most)
    if denoiser.placement == "t5":
        return fewest, most, np.clip(np.rint(most / denoiser.mean_span), 1, np.minimum(most, length - most))
    spans = np.clip(np.ceil(most / denoiser.mean_span), 1, np.minimum(most, length - fewest))
    # The turn can cut a span of two tokens or more in two.
    return fewest, most, np.minimum(spans + 1, most)


def required_sentinels(denoiser: Denoiser, raw_length: int) -> int:
    """The most sentinels that a text of `raw_length` tokens can need.

    With T5's rounding and placement 100 sentinels are too few from raw length 2010 (R1), 2414 (R2) and 6434 (X2).
    The uniform placement may round up and cut one span in two, so that it needs up to 102 there; it is refused from
    1981 (R1), 2377 (R2) and 6337 (X2).
    """
    return int(_most(denoiser, np.array([raw_length]))[2][0])


@lru_cache
def raw_length(denoiser: Denoiser, source_length: int, target_length: int) -> int:
    """The longest text whose source and target always fit (EOS and sentinels counted), as does any shorter one.

    Raises InputError if that is fewer than two tokens.
    """
    length = np.arange(2, source_length + target_length + 2)
    fewest, most, spans = _most(denoiser, length)
    fits = (length - fewest + spans + 1 <= source_length) & (most + spans + 1 <= target_length)
    longest = int(np.argmin(fits)) + 1
    if longest < 2:
        raise InputError(
            f"denoiser {denoiser.name}: not even two tokens fit source_length={source_length} and "
            f"target_length={target_length}"
        )
    return longest


def check_capacity(preset: Preset, source_length: int, target_length: int, num_sentinels: int) -> None:
    """Raise InputError, before anything runs, if a denoiser can need more sentinels than there are."""
    for denoiser in preset:
        length = raw_length(denoiser, source_length, target_length)
        need = required_sentinels(denoiser, length)
        if need > num_sentinels:
            raise InputError(
                f"denoiser {denoiser.name} needs up to {need} sentinels for texts of {length} tokens "
                f"(source_length={source_length}, target_length={target_length}), but the tokenizer has "
                f"{num_sentinels}; build it with more sentinels or shorten the lengths"
            )


def render(example: Example, tokenizer: Any, preset: Preset | None = None) -> str:
    """An example as text for a human, with its special tokens visible."""
    name = preset[example.denoiser].name if preset else example.denoiser
    source, target = tokenizer.decode(example.source), tokenizer.decode(example.target)
    return f"[{name}]\n  source ({len(example.source)}): {source!r}\n  target ({len(example.target)}): {target!r}"
