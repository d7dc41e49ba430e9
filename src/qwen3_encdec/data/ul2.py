"""UL2: a mixture of denoising objectives, as pure functions of (tokens, denoiser, generator).

A span denoiser replaces spans of the text by sentinels; the target spells the spans out. With EOS
written `.`:

    tokens    the quick brown fox jumps over the lazy dog
    source    the <extra_id_0> fox jumps <extra_id_1> lazy dog .
    target    <extra_id_0> quick brown <extra_id_1> over the .

There is no closing sentinel: EOS ends the last span. The prefix-to-suffix denoiser S
(`mean_span=None`) has no
sentinel: the source is the prefix, the target the suffix. `uncorrupt` inverts both exactly.

Placement. T5 alternates kept and noise segments, always starting with a kept one and ending in
noise, so the first token is never predicted and the last one always is. Here that circle of
segments is turned by a uniform angle, which makes every position equally likely to be noise; when
the turn cuts a noise span in two, there is one span (and one sentinel) more. `placement="t5"` is
T5's own rule, rounding included.

Texts are corrupted many at a time, laid out one after another, so that NumPy's cost per call is
shared by a block of documents. Every text has a key of its own, made of (seed, epoch, document,
chunk), and all its random numbers are SplitMix64 of that key. Only rounding looks at the texts
before it, so that over a block corruption rates are exact to a token.

Shapes: everything is a one-dimensional integer array. Source: Tay et al. 2022 (UL2), Raffel et al.
2020 (T5); the mixture of `t5gemma2` is Zhang et al. 2025 (T5Gemma 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from qwen3_encdec.folders import InputError

Ids = Sequence[int] | np.ndarray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Which number of a text's stream decides what; the cuts take all from the last one on.
_DENOISER, _NOISE, _SPANS, _TURN, _CUTS = range(5)


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
            raise InputError(
                f"denoiser {self.name}: corruption={self.corruption} is not between 0 and 1"
            )
        if self.mean_span is not None and not 1 <= self.mean_span < np.inf:
            raise InputError(f"denoiser {self.name}: mean_span={self.mean_span} is below 1")
        if not 0 < self.weight < np.inf:
            raise InputError(f"denoiser {self.name}: weight={self.weight} is not positive")
        if self.placement not in ("uniform", "t5"):
            raise InputError(
                f"denoiser {self.name}: placement={self.placement!r} is not 'uniform' or 't5'"
            )


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
    """A preset by name, or from the list of denoisers of a YAML file.

    Raises InputError for anything else.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise InputError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
        return PRESETS[preset]
    try:
        denoisers = tuple(d if isinstance(d, Denoiser) else Denoiser(**d) for d in preset)
    except TypeError as error:
        raise InputError(
            f"preset: {error} (a denoiser has name, mean_span, corruption, weight)"
        ) from None
    names = [denoiser.name for denoiser in denoisers]
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"preset: the names of its denoisers are not distinct and at least one: {names}"
        )
    return denoisers


class Examples(NamedTuple):
    """Many examples, one after another.

    The k-th's source is `sources[source_ends[k-1] : source_ends[k]]`.
    """

    sources: np.ndarray
    """int32."""
    source_ends: np.ndarray
    """int64, one an example."""
    targets: np.ndarray
    """int32."""
    target_ends: np.ndarray
    """int64, one an example."""
    denoisers: np.ndarray
    """Indices into the preset, int64, one an example."""

    def split(self) -> list[Example]:
        """As single examples, whose arrays are views."""
        examples, source_start, target_start = [], 0, 0
        for source_end, target_end, denoiser in zip(
            self.source_ends.tolist(),
            self.target_ends.tolist(),
            self.denoisers.tolist(),
            strict=True,
        ):
            pair = self.sources[source_start:source_end], self.targets[target_start:target_end]
            examples.append(Example(*pair, denoiser))
            source_start, target_start = source_end, target_end
        return examples


def example_keys(seed: int, epoch: int, documents: Ids | int, chunks: Ids | int) -> np.ndarray:
    """A key (uint64) for every chunk, to draw from;

    the words are taken modulo 2**64 and broadcast.
    """
    key = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    for word in (epoch % 2**64, documents, chunks):
        key = _mix((key ^ np.asarray(word).astype(np.uint64)) + _GOLDEN)
    return key


def draw_denoisers(preset: Preset, keys: np.ndarray) -> np.ndarray:
    """Index of a denoiser (int64) for every key, with probability proportional to its weight."""
    shares = np.cumsum([denoiser.weight for denoiser in preset])
    return np.searchsorted(shares, _uniform(keys, _DENOISER) * shares[-1], side="right")


def corrupt(
    tokens: np.ndarray,
    denoiser: Denoiser,
    rng: np.random.Generator,
    *,
    sentinel_ids: Ids,
    eos_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt one text: `corrupt_batch` with a key from `rng`. Returns source and target, int32."""
    key = rng.integers(2**64, size=1, dtype=np.uint64)
    ids: dict[str, Any] = {"sentinel_ids": sentinel_ids, "eos_id": eos_id}
    examples = corrupt_batch(
        np.asarray(tokens), np.array([len(tokens)]), np.array([0]), (denoiser,), key, **ids
    )
    return examples.sources, examples.targets


def corrupt_batch(
    tokens: np.ndarray,
    lengths: np.ndarray,
    denoisers: np.ndarray,
    preset: Preset,
    keys: np.ndarray,
    *,
    sentinel_ids: Ids,
    eos_id: int,
    prefix_ids: Ids = (),
) -> Examples:
    """Corrupt texts of at least two tokens each.

    The number of noise tokens of a text is `corruption * length` rounded up or down, at random but
    such that a denoiser's total over all texts is rounded up or down just once. So is the number of
    spans. In texts so short that this leaves no noise token, or nothing but noise, there is one.

    Args:
        tokens: Token ids of all texts one after another, none of them a sentinel.
        lengths: Tokens of each text.
        denoisers: What to do with each text, as an index into `preset`.
        preset: The mixture.
        keys: The only source of randomness, uint64, one a text.
        sentinel_ids: Consecutive ascending ids; the first marks the first span.
        eos_id: Ends source and target.
        prefix_ids: A token to begin a source with, by denoiser; empty is none.

    Raises:
        ValueError: Fewer than two tokens, a sentinel among the tokens, or more spans than
            sentinels.
    """
    lengths = lengths.astype(np.int64)
    if len(lengths) and lengths.min() < 2:
        raise ValueError(f"{lengths.min()} tokens are too few to corrupt; the least is 2")
    spanned = np.array([denoiser.mean_span is not None for denoiser in preset])[denoisers]
    turned = np.array(
        [denoiser.mean_span is not None and denoiser.placement == "uniform" for denoiser in preset]
    )
    noise, spans = _sizes(lengths, denoisers, preset, keys)
    lead = int(len(prefix_ids) > 0)
    ends = np.cumsum(lengths + 1 + lead) - 1  # slots: [prefix] token ... token EOS, text after text
    first = ends - lengths
    turn = np.where(turned[denoisers], (_uniform(keys, _TURN) * lengths).astype(np.int64), 0)

    # A text's slots are candidates for the ends of its noise segments, then for those of its kept
    # ones.
    kept = lengths - noise
    base, size = (
        np.stack([first, first + noise], axis=1).ravel(),
        np.stack([noise, kept], axis=1).ravel(),
    )
    cut_keys = np.stack([keys, _mix(keys + _GOLDEN)], axis=1).ravel()
    chosen = _choose(
        base, size - 1, np.repeat(spans - 1, 2), cut_keys, int(ends[-1]) + 1 if len(ends) else 0
    )
    chosen[base + size - 1] = True
    cuts = np.flatnonzero(chosen)
    owner = np.repeat(np.arange(len(lengths)), spans)
    place = np.arange(len(owner)) + (np.cumsum(spans) - spans)[owner]
    noise_ends = cuts[place] - first[owner] + 1
    kept_ends = cuts[place + spans[owner]] - (first + noise)[owner] + 1
    opening = np.diff(owner, prepend=-1) != 0
    begins = kept_ends + np.where(opening, 0, np.roll(noise_ends, 1)) + turn[owner]
    stops = kept_ends + noise_ends + turn[owner]

    # Spans beyond the end come back at the start; one that runs over the end is cut in two.
    length = lengths[owner]
    begins, stops = (
        np.where(begins >= length, begins - length, begins),
        np.where(stops > length, stops - length, stops),
    )
    wrapped = owner[stops <= begins]
    edges = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.int8)
    edges[np.append(first[owner] + begins, first[wrapped])] = 1
    edges[np.append(first[owner] + stops, ends[wrapped])] = -1
    spans = spans + np.bincount(wrapped, minlength=len(spans))
    return _write(
        tokens, edges, ends, spans, spanned, denoisers, lead, sentinel_ids, eos_id, prefix_ids
    )


def uncorrupt(
    source: np.ndarray, target: np.ndarray, *, sentinel_ids: Ids, eos_id: int, mode_ids: Ids = ()
) -> np.ndarray:
    """The tokens (int32) that `corrupt` was given. Raises ValueError if the pair cannot come from
    it.

    With `mode_ids` the source must begin with one of them.
    """
    if len(mode_ids):
        if not np.isin(source[:1], mode_ids).any():
            raise ValueError("the source does not begin with a mode token")
        source = source[1:]
    if len(source) < 1 or len(target) < 1 or source[-1] != eos_id or target[-1] != eos_id:
        raise ValueError("source and target must end in EOS")
    source, target = np.asarray(source[:-1], np.int32), np.asarray(target[:-1], np.int32)
    if not len(sentinel_ids):
        return np.concatenate([source, target])
    holes, marks = (
        np.flatnonzero((x >= sentinel_ids[0]) & (x <= sentinel_ids[-1])) for x in (source, target)
    )
    expected = np.asarray(sentinel_ids[: len(holes)], np.int32)
    if not np.array_equal(source[holes], expected) or not np.array_equal(target[marks], expected):
        raise ValueError(
            "the sentinels of source and target are not the same, each once and in order"
        )
    if not len(holes):
        return np.concatenate([source, target])
    if marks[0] != 0:
        raise ValueError("the target does not start with a sentinel")
    kept, spans = np.split(source, holes), np.split(target, marks)[1:]
    return np.concatenate(
        [kept[0], *(p for k, s in zip(kept[1:], spans, strict=True) for p in (s[1:], k[1:]))]
    )


def _write(
    tokens: np.ndarray,
    edges: np.ndarray,
    ends: np.ndarray,
    spans: np.ndarray,
    spanned: np.ndarray,
    denoisers: np.ndarray,
    lead: int,
    sentinel_ids: Ids,
    eos_id: int,
    prefix_ids: Ids,
) -> Examples:
    """Sources and targets, given where noise begins (1) and stops (-1) in `edges` and where the
    texts end in it.

    `spans` counts each text's noise spans; `spanned` says whether they get sentinels.
    """
    tokens = tokens.astype(np.int32, copy=False)
    if len(sentinel_ids) and ((tokens >= sentinel_ids[0]) & (tokens <= sentinel_ids[-1])).any():
        raise ValueError(
            "the tokens contain a sentinel: tokenize corpus text with split_special_tokens=True"
        )
    marks = np.where(spanned, spans, 0)
    if len(marks) and marks.max() > len(sentinel_ids):
        raise ValueError(
            f"{marks.max()} spans need as many sentinels; there are {len(sentinel_ids)}"
        )
    laid = np.empty(len(edges), dtype=np.int32)
    in_text = np.ones(len(edges), dtype=bool)
    in_text[ends] = False
    if lead:
        starts = np.append(0, ends[:-1] + 1)
        in_text[starts] = False
        laid[starts] = np.asarray(prefix_ids, dtype=np.int32)[denoisers]
    laid[in_text] = tokens
    laid[ends] = eos_id

    noise = np.cumsum(edges, dtype=np.int8).view(bool)
    begins, stops = np.flatnonzero(edges > 0), np.flatnonzero(edges < 0)
    sizes, owner = stops - begins, np.repeat(np.arange(len(spans)), spans)
    marked = spanned[owner]
    before = (
        np.cumsum(sizes) - sizes + owner
    )  # noise tokens and EOS of the targets in front of each span
    begins, before, owner = begins[marked], before[marked], owner[marked]
    sentinels = np.arange(len(begins)) - (np.cumsum(marks) - marks)[owner]
    if len(sentinel_ids):
        sentinels += int(sentinel_ids[0])

    kept = ~noise
    noise[ends] = True
    spoken = laid[noise]
    targets = np.empty(len(spoken) + len(begins), dtype=np.int32)
    is_token = np.ones(len(targets), dtype=bool)
    at = before + np.arange(len(begins))
    is_token[at] = False
    targets[is_token] = spoken
    targets[at] = sentinels
    laid[begins] = sentinels
    kept[begins] = True
    noise_tokens = np.bincount(
        np.repeat(np.arange(len(spans)), spans), weights=sizes, minlength=len(spans)
    )
    target_ends = np.cumsum(noise_tokens.astype(np.int64) + marks + 1)
    source_ends = np.cumsum(np.diff(ends, prepend=-1) - noise_tokens.astype(np.int64) + marks)
    return Examples(laid[kept], source_ends, targets, target_ends, denoisers)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(keys: np.ndarray, number: int | np.ndarray) -> np.ndarray:
    """The `number`-th number of each key's stream, float64, at least 0 and below 1."""
    return (
        _mix(keys + _GOLDEN * (np.atleast_1d(number) + 1).astype(np.uint64)) >> np.uint64(11)
    ) * 2.0**-53


def _sizes(
    lengths: np.ndarray, denoisers: np.ndarray, preset: Preset, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Noise tokens and noise spans of each text."""
    noise, spans = np.ones((2, len(lengths)), dtype=np.int64)
    for index, denoiser in enumerate(preset):
        mine = np.flatnonzero(denoisers == index)
        nearest = denoiser.placement == "t5"
        length, first = lengths[mine], keys[mine[:1]]
        noise[mine] = _share(length, _ratio(denoiser.corruption), first, _NOISE, nearest).clip(
            1, length - 1
        )
        if denoiser.mean_span is not None:
            most = np.minimum(noise, lengths - noise)[mine]
            spans[mine] = _share(
                noise[mine], 1 / _ratio(denoiser.mean_span), first, _SPANS, nearest
            ).clip(1, most)
    return noise, spans


def _share(
    of: np.ndarray, ratio: Fraction, key: np.ndarray, number: int, nearest: bool
) -> np.ndarray:
    """Whole numbers that are `ratio * of` rounded: to the nearest, or such that their sum is
    rounded once.

    What rounding leaves of one is carried to the next, from a remainder on that is drawn by `key`.
    """
    if nearest:
        return np.rint(of * ratio.numerator / ratio.denominator).astype(np.int64)
    remainder = (_uniform(key, number) * ratio.denominator).astype(np.int64)
    return np.diff((np.cumsum(of * ratio.numerator) + remainder) // ratio.denominator, prepend=0)


def _ratio(value: float) -> Fraction:
    """A setting as the decimal that was written, so that 15 % of 20 is 3 and not a little more."""
    return Fraction(value).limit_denominator(10**6) if value < np.inf else Fraction(10**6)


def _choose(
    base: np.ndarray, size: np.ndarray, number: np.ndarray, keys: np.ndarray, slots: int
) -> np.ndarray:
    """A mask of `slots` in which, of `size` slots from `base` on, `number` are chosen, every choice
    equally likely.

    Slots are drawn until enough distinct ones are there; where more than half are wanted, the
    others are drawn.
    """
    chosen = np.zeros(slots, dtype=bool)
    others = 2 * number > size
    number = np.where(others, size - number, number)
    group = np.repeat(np.arange(len(number)), number)
    turn = np.arange(len(group)) - (np.cumsum(number) - number)[group] + _CUTS
    last = np.empty(slots, dtype=np.int32)
    while len(group):
        at = base[group] + (_uniform(keys[group], turn) * size[group]).astype(np.int64)
        order = np.arange(len(at), dtype=np.int32)
        last[at] = order
        again = chosen[at] | (last[at] != order)
        chosen[at] = True
        group, turn = group[again], (turn + number[group])[again]
    if others.any():
        turned = np.zeros(slots + 1, dtype=np.int8)
        turned[base[others]] = 1
        turned[(base + size)[others]] = -1
        chosen ^= np.cumsum(turned[:-1], dtype=np.int8).view(bool)
    return chosen


def _most(denoiser: Denoiser, length: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fewest and most noise tokens and most spans that `corrupt_batch` can draw, for every raw
    length.
    """
    corruption, spans = _ratio(denoiser.corruption), 1 / _ratio(denoiser.mean_span or np.inf)
    product = length * corruption.numerator
    if denoiser.placement == "t5":
        fewest = most = np.clip(
            np.rint(product / corruption.denominator).astype(np.int64), 1, length - 1
        )
        most_spans = np.rint(most * spans.numerator / spans.denominator).astype(np.int64)
    else:
        fewest = np.clip(product // corruption.denominator, 1, length - 1)
        most = np.clip(-(-product // corruption.denominator), 1, length - 1)
        most_spans = -(-most * spans.numerator // spans.denominator)
    if denoiser.mean_span is None:
        return fewest, most, np.zeros_like(most)
    most_spans = np.clip(most_spans, 1, np.minimum(most, length - fewest))
    # The turn can cut a span of two tokens or more in two.
    return (
        fewest,
        most,
        most_spans if denoiser.placement == "t5" else np.minimum(most_spans + 1, most),
    )


def required_sentinels(denoiser: Denoiser, raw_length: int) -> int:
    """The most sentinels that a text of `raw_length` tokens can need.

    With T5's rounding and placement 100 sentinels are too few from raw length 2010 (R1), 2414 (R2)
    and 6434 (X2). The uniform placement may round up and cut one span in two, so that it needs up
    to 102 there; it is refused from 1981 (R1), 2377 (R2) and 6337 (X2).
    """
    return int(_most(denoiser, np.array([raw_length]))[2][0])


@lru_cache
def raw_length(denoiser: Denoiser, source_length: int, target_length: int) -> int:
    """The longest text whose source and target always fit (EOS and sentinels counted), as does any
    shorter one.

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


def sentinels_needed(preset: Preset, source_length: int, target_length: int) -> int:
    """How many sentinels a mixture can need in rows of these lengths."""
    return max(required_sentinels(d, raw_length(d, source_length, target_length)) for d in preset)


def check_capacity(
    preset: Preset, source_length: int, target_length: int, num_sentinels: int
) -> None:
    """Raise InputError, before anything runs, if a denoiser can need more sentinels than there are."""
    need = sentinels_needed(preset, source_length, target_length)
    for denoiser in preset:
        length = raw_length(denoiser, source_length, target_length)
        if (own := required_sentinels(denoiser, length)) > num_sentinels:
            raise InputError(
                f"denoiser {denoiser.name} needs up to {own} sentinels for texts of {length} tokens "
                f"(source_length={source_length}, target_length={target_length}), but the tokenizer has "
                f"{num_sentinels}; build it with --num-sentinel-tokens {need} or shorten the lengths"
            )


def render(example: Example, tokenizer: Any, preset: Preset | None = None) -> str:
    """An example as text for a human, with its special tokens visible."""
    name = preset[example.denoiser].name if preset else example.denoiser
    source, target = tokenizer.decode(example.source), tokenizer.decode(example.target)
    return f"[{name}]\n  source ({len(example.source)}): {source!r}\n  target ({len(example.target)}): {target!r}"
