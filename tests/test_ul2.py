"""UL2 corruption: exact inverse, budgets, rates, unbiased placement, sentinels."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from qwen3_encdec.data import ul2
from qwen3_encdec.data.config import resolve_preset
from qwen3_encdec.data.ul2 import (
    PRESETS,
    Denoiser,
    Example,
    check_capacity,
    corrupt,
    raw_length,
    render,
    sizes,
    t5_segments,
    uncorrupt,
)
from qwen3_encdec.folders import InputError
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

FIRST, EOS = 10_000, 9_999
SENTINELS = range(FIRST, FIRST + 400)
IDS = {"sentinel_ids": SENTINELS, "eos_id": EOS}
GOLDEN = {
    "R1": [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 90, 20, 21, 22, 23, 99],
        [90, 17, 18, 19, 99],
    ],
    "R2": [
        [90, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 91, 99],
        [90, 0, 1, 91, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 99],
    ],
    "X1": [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 90, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 99],
        [90, 9, 10, 11, 12, 99],
    ],
    "X2": [
        [90, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 91, 99],
        [90, 0, 1, 91, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 99],
    ],
    "S": [
        [0, 1, 2, 3, 4, 5, 99],
        [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 99],
    ],
}  # fmt: skip
DENOISERS = [*PRESETS["t5gemma2"], *PRESETS["ul2"], *PRESETS["t5"], Denoiser("dense", 1, 0.9)]


def test_the_mixture_is_the_papers():
    assert [(d.name, d.mean_span, d.corruption, d.weight) for d in PRESETS["t5gemma2"]] == [
        ("R1", 3, 0.15, 1),
        ("R2", 12, 0.50, 1),
        ("X1", 32, 0.15, 1),
        ("X2", 32, 0.50, 1),
        ("S", None, 0.75, 4),
    ]


def make(lengths, denoiser, seed: int = 7, **options) -> list[Example]:
    """Corrupt texts that count up from 0."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        pair = corrupt(np.arange(length), denoiser, rng, **{**IDS, **options})
        made.append(Example(*pair, 0))
    return made


def most_sentinels(denoiser, length: int) -> int:
    return sizes(denoiser, length)[2]


@pytest.mark.parametrize("denoiser", DENOISERS, ids=lambda d: f"{d.name}-{d.mean_span}")
def test_corruption_is_inverted_exactly_within_its_bounds(denoiser):
    rng = np.random.default_rng(0)
    for length in [*range(2, 40), *rng.integers(40, 700, 200)]:
        # a small alphabet: repeated tokens must not confuse the inverse
        text = rng.integers(0, 50, length).astype(np.int32)
        source, target = corrupt(text, denoiser, rng, **IDS)
        np.testing.assert_array_equal(uncorrupt(source, target, **IDS), text)

        assert source[-1] == target[-1] == EOS
        assert (source == EOS).sum() == (target == EOS).sum() == 1
        assert source.dtype == target.dtype == np.int32
        marks, spans = source[source >= FIRST], target[target >= FIRST]
        np.testing.assert_array_equal(marks, SENTINELS[: len(marks)])  # in order, each once
        np.testing.assert_array_equal(spans, marks)
        assert len(marks) <= most_sentinels(denoiser, len(text))
        noise = len(target) - 1 - len(spans)
        assert abs(noise / len(text) - denoiser.corruption) < 1 / len(text)
        if denoiser.mean_span is None:
            assert not len(marks)
        else:
            is_mark = source >= FIRST
            assert len(marks) >= 1
            assert not (is_mark[1:] & is_mark[:-1]).any()  # neighbouring spans would be one span


@pytest.mark.parametrize("denoiser", PRESETS["t5gemma2"], ids=lambda d: d.name)
def test_rates_over_a_corpus(denoiser):
    """Noise over 4,000 texts is within four deviations of its share; rounding down is not."""
    lengths = np.random.default_rng(0).integers(40, 300, 4000)
    examples = make(lengths, denoiser)
    noise = sum(int((e.target < EOS).sum()) for e in examples)
    tolerance = 4 * 0.5 * np.sqrt(len(lengths))
    assert abs(noise - denoiser.corruption * lengths.sum()) < tolerance
    down = np.floor(denoiser.corruption * lengths).sum()
    assert abs(down - denoiser.corruption * lengths.sum()) > tolerance


def test_uncorrupt_refuses_what_corrupt_cannot_make():
    source, target = corrupt(np.arange(50), PRESETS["t5gemma2"][0], np.random.default_rng(3), **IDS)
    assert (target >= FIRST).sum() >= 2
    swapped = target.copy()
    swapped[np.flatnonzero(target >= FIRST)[:2]] = [FIRST + 1, FIRST]
    for bad in [(source, swapped), (source[:-1], target), (source, target[1:]), (source, source)]:
        with pytest.raises(ValueError, match=r"EOS|sentinel"):
            uncorrupt(*bad, **IDS)


def test_the_number_of_spans_is_unbiased():
    length, draws = 101, 4_000
    targets = [example.target for example in make(np.full(draws, length), PRESETS["t5"][0])]
    spans = np.array([(target >= FIRST).sum() for target in targets])
    # Before the rotation the mean is 101 * .15 / 3; the rotation splits a span with probability
    # (noise - spans) / length.
    expected = 5.05 + (15.15 - 5.05) / length
    assert abs(spans.mean() - expected) < 4 * spans.std() / np.sqrt(draws)


def test_divisions_into_segments_are_all_equally_likely():
    # 8 tokens, 3 of them noise in 2 spans: noise as 1+2 or 2+1, kept as 1+4, 2+3, 3+2 or 4+1
    rng = np.random.default_rng(7)
    counts = Counter(t5_segments(8, 3, 2, rng).tobytes() for _ in range(8_000))
    assert len(counts) == 8
    assert chisquare(list(counts.values())).pvalue > 1e-3


def position_p_value(denoiser: Denoiser, length: int = 60, draws: int = 6_000) -> float:
    """Chi-square test that noise falls on every position equally often."""
    counts = np.zeros(length)
    rng = np.random.default_rng(4)
    for example in make(np.full(draws, length), denoiser, 3):
        # One position a draw: the positions of a draw depend on each other.
        counts[rng.choice(example.target[example.target < length])] += 1
    return chisquare(counts).pvalue


@pytest.mark.parametrize("denoiser", PRESETS["t5gemma2"][:4], ids=lambda d: d.name)
def test_every_position_is_equally_likely_to_be_noise(denoiser, monkeypatch):
    assert position_p_value(denoiser) > 1e-3
    monkeypatch.setattr(ul2, "place_spans", t5_segments)  # the control: T5's placement
    assert position_p_value(denoiser) < 1e-12


def test_t5_examples(monkeypatch):
    """The masks and ids of `noise_span_to_unique_sentinel` in T5's preprocessors_test, sentinels
    ascending.
    """
    mask = np.array([1, 1, 0, 0, 1, 0], dtype=bool)
    monkeypatch.setattr(ul2, "place_spans", lambda *_: mask)
    denoiser, ids = Denoiser("t5", 1.5, 0.5), {"sentinel_ids": range(100, 110), "eos_id": 1}
    source, target = corrupt(np.arange(10, 16), denoiser, np.random.default_rng(0), **ids)
    assert source.tolist() == [100, 12, 13, 101, 15, 1]  # T5 counts 999, 998, ... downwards
    assert target.tolist() == [100, 10, 11, 101, 14, 1]


def test_golden_examples():
    """A change of the draws makes every earlier run irreproducible and must be deliberate."""
    made = {}
    for number, denoiser in enumerate(PRESETS["t5gemma2"]):
        rng = np.random.Generator(np.random.PCG64(number + 3))
        ids = {"sentinel_ids": [90, 91, 92], "eos_id": 99}
        pair = corrupt(np.arange(24), denoiser, rng, **ids)
        made[denoiser.name] = [side.tolist() for side in pair]
    assert made == GOLDEN


@pytest.mark.parametrize(
    "denoiser", DENOISERS, ids=lambda d: f"{d.name}-{d.mean_span}-{d.corruption}"
)
@pytest.mark.parametrize("budget", [(512, 256), (97, 64), (64, 200), (16, 16)])
def test_raw_length_is_the_longest_that_always_fits(denoiser, budget):
    longest = raw_length(denoiser, *budget)
    overflows = 0
    for length in (longest, longest - 1, longest + 1):
        for example in make(np.full(100, max(length, 2)), denoiser):
            over = len(example.source) > budget[0] or len(example.target) > budget[1]
            overflows += over
            assert not over or length > longest
    if denoiser.mean_span is None:  # elsewhere the worst draw is too rare to wait for
        assert overflows


def test_too_few_sentinels_are_refused_before_anything_runs():
    r1, r2, _, x2, _ = PRESETS["t5gemma2"]
    for denoiser, limit in [(r1, 2010), (r2, 2414), (x2, 6434)]:
        assert most_sentinels(denoiser, limit) == 102  # 101, and the turn may cut a span
    with pytest.raises(InputError, match=r"R2 needs up to \d+ sentinels.*has 100"):
        check_capacity(PRESETS["t5gemma2"], 4096, 4096, 100)
    check_capacity(PRESETS["t5gemma2"], 512, 256, 100)
    check_capacity((PRESETS["t5gemma2"][4],), 4096, 4096, 0)  # S needs none
    with pytest.raises(ValueError, match="as many sentinels"):
        make([500], r1, sentinel_ids=range(FIRST, FIRST + 3))


def test_the_documented_needs_are_the_true_ones():
    text = (Path(__file__).parent.parent / "docs/data.md").read_text(encoding="utf-8")
    header, *rows = re.findall(
        r"^\| (source / target|t5gemma2|ul2|t5) \|(.*)\|$", text, re.MULTILINE
    )
    lengths = [tuple(map(int, cell.split("/"))) for cell in header[1].split("|")]
    for name, cells in rows:
        written = [int(cell.replace(",", "")) for cell in cells.split("|")]
        needs = [
            max(most_sentinels(d, raw_length(d, *pair)) for d in PRESETS[name]) for pair in lengths
        ]
        assert written == needs, name
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("ul3", "'ul3' must be one of t5gemma2"),
        ([], "at least one"),
        ([3], r"preset: 3 must be a mapping of name, mean_span"),
        ([{"name": 3, "mean_span": 3, "corruption": 0.5}], r"names \[3\] must be distinct texts"),
        ([{"name": "a", "mean_span": 3, "corruption": 0.15}] * 2, "distinct"),
        ([{"name": "a", "mean_span": 3, "corruption": 1.5}], "a: corruption=1.5"),
        ([{"name": "a", "mean_span": 0, "corruption": 0.5}], "a: mean_span=0"),
        ([{"name": "a", "mean_span": "3", "corruption": 0.5}], "a: mean_span='3' is not a number"),
        ([{"name": "a", "mean_span": True, "corruption": 0.5}], "mean_span=True is not"),
        ([{"name": "a", "mean_span": None, "corruption": 0.5, "weight": 0}], "a: weight=0"),
        ([{"name": "a", "span": 3, "corruption": 0.5}], "span"),
    ],
)
def test_bad_presets(preset, message):
    with pytest.raises(InputError, match=message):
        resolve_preset(preset)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "too few"), ([1], "too few"), ([1, FIRST, 2], "has a sentinel token")],
)
def test_texts_that_cannot_be_corrupted(tokens, message):
    with pytest.raises(ValueError, match=message):
        corrupt(np.array(tokens), PRESETS["t5"][0], np.random.default_rng(0), **IDS)


def test_render():
    tokenizer = build_tokenizer(num_ranks=512)
    ids = np.array(tokenizer("the quick brown fox jumps")["input_ids"])
    marks = {"sentinel_ids": tokenizer.sentinel_token_ids, "eos_id": tokenizer.eos_token_id}
    pair = corrupt(ids, PRESETS["t5"][0], np.random.default_rng(0), **marks)
    text = render(Example(*pair, 0), tokenizer, PRESETS["t5"])
    assert text.startswith("[R]")
    assert text.count("<extra_id_0>") == text.count("<|im_end|>") == 2
