"""UL2 corruption: exact inverse, budgets, rates, unbiased placement, sentinels; each with a control that fails."""

import numpy as np
import pytest
from scipy.stats import chisquare

from qwen3_encdec.data.ul2 import (
    PRESETS,
    Denoiser,
    Example,
    check_capacity,
    corrupt,
    draw_denoiser,
    example_rng,
    mask_spans,
    raw_length,
    render,
    required_sentinels,
    resolve_preset,
    uncorrupt,
)
from qwen3_encdec.files import InputError
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

FIRST, EOS = 10_000, 9_999
SENTINELS = range(FIRST, FIRST + 400)
IDS = {"sentinel_ids": SENTINELS, "eos_id": EOS}
GOLDEN = {
    "R1": [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 90, 20, 21, 22, 23, 99], [90, 17, 18, 19, 99]],
    "R2": [[0, 1, 2, 3, 4, 5, 6, 7, 90, 20, 21, 22, 23, 99], [90, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 99]],
    "X1": [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 90, 20, 21, 22, 23, 99], [90, 17, 18, 19, 99]],
    "X2": [[0, 1, 2, 3, 4, 5, 6, 7, 90, 20, 21, 22, 23, 99], [90, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 99]],
    "S": [[0, 1, 2, 3, 4, 5, 99], [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 99]],
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


@pytest.mark.parametrize("denoiser", DENOISERS, ids=lambda d: f"{d.name}-{d.mean_span}-{d.corruption}-{d.placement}")
def test_corruption_is_inverted_exactly_within_its_bounds(denoiser):
    lengths = np.random.default_rng(0).integers(2, 700, 150).tolist()
    for case, length in enumerate([*range(2, 60), *lengths]):
        rng = example_rng(7, 0, case, 0)
        tokens = rng.integers(0, 50, length)  # a small alphabet: repeated tokens must not confuse the inverse
        source, target = corrupt(tokens, denoiser, rng, **IDS)
        np.testing.assert_array_equal(uncorrupt(source, target, **IDS), tokens)

        assert source[-1] == target[-1] == EOS
        assert source.dtype == target.dtype == np.int32
        marks, spans = source[source >= FIRST], target[target >= FIRST]
        np.testing.assert_array_equal(marks, SENTINELS[: len(marks)])  # in order, each once
        np.testing.assert_array_equal(spans, marks)
        assert len(marks) <= required_sentinels(denoiser, length)
        noise = len(target) - 1 - len(spans)
        assert abs(noise / length - denoiser.corruption) < 1 / length
        if denoiser.mean_span is None:
            assert not len(marks)
        else:
            is_mark = source >= FIRST
            assert len(marks) >= 1
            assert not (is_mark[1:] & is_mark[:-1]).any()  # neighbouring spans would be one span


def test_uncorrupt_refuses_what_corrupt_cannot_make():
    source, target = corrupt(np.arange(50), PRESETS["t5gemma2"][0], example_rng(0, 0, 0, 0), **IDS)
    assert (target >= FIRST).sum() >= 2
    swapped = target.copy()
    swapped[np.flatnonzero(target >= FIRST)[:2]] = [FIRST + 1, FIRST]
    for bad in [(source, swapped), (source[:-1], target), (source, target[1:]), (source, source)]:
        with pytest.raises(ValueError, match=r"EOS|sentinel"):
            uncorrupt(*bad, **IDS)


@pytest.mark.parametrize("denoiser", PRESETS["t5gemma2"], ids=lambda d: d.name)
def test_rates_and_span_lengths_are_unbiased(denoiser):
    length, draws = 101, 4000  # no rate times 101 is whole: rounding always to one side would show
    noise, spans = np.array(
        [
            (len(target) - 1 - (target >= FIRST).sum(), (target >= FIRST).sum())
            for i in range(draws)
            for _, target in [corrupt(np.arange(length), denoiser, example_rng(1, 0, i, 0), **IDS)]
        ]
    ).T
    assert abs(noise.mean() - length * denoiser.corruption) < 4 * 0.5 / np.sqrt(draws)
    if denoiser.name == "R1":
        # Before the turn the mean is 101 * .15 / 3; the turn cuts a span with probability (noise - spans) / length.
        expected = 5.05 + (15.15 - 5.05) / length
        assert abs(spans.mean() - expected) < 4 * spans.std() / np.sqrt(draws)


def position_p_value(denoiser: Denoiser, length: int = 60, draws: int = 6000) -> float:
    """Chi-square test that noise falls on every position equally often."""
    counts = np.zeros(length)
    for i in range(draws):
        source, _ = corrupt(np.arange(length), denoiser, example_rng(3, 0, i, 0), **IDS)
        noise = np.setdiff1d(np.arange(length), source)
        # One position a draw: the positions of a draw depend on each other.
        counts[noise[example_rng(4, 0, i, 0).integers(len(noise))]] += 1
    return chisquare(counts).pvalue


@pytest.mark.parametrize("denoiser", PRESETS["t5gemma2"][:4], ids=lambda d: d.name)
def test_every_position_is_equally_likely_to_be_noise(denoiser):
    assert position_p_value(denoiser) > 1e-3
    control = Denoiser("control", denoiser.mean_span, denoiser.corruption, placement="t5")
    assert position_p_value(control) < 1e-12


def test_t5_placement_starts_kept_and_ends_in_noise():
    t5 = PRESETS["t5"][0]
    for i in range(200):
        source, target = corrupt(np.arange(100), t5, example_rng(0, 0, i, 0), **IDS)
        assert source[0] == 0
        assert target[-2] == 99
        assert (target >= FIRST).sum() == 5  # round(round(100 * .15) / 3)


def test_t5_examples():
    """The masks and ids of `noise_span_to_unique_sentinel` in T5's preprocessors_test, sentinels ascending."""
    tokens = np.arange(10, 20)
    mask = np.array([0, 0, 0, 1, 1, 0, 1, 0, 0, 1], dtype=bool)
    source, target = mask_spans(tokens, mask, sentinel_ids=range(100, 110), eos_id=1)
    assert source.tolist() == [10, 11, 12, 100, 15, 101, 17, 18, 102, 1]
    assert target.tolist() == [100, 13, 14, 101, 16, 102, 19, 1]
    source, target = mask_spans(tokens[:6], ~mask[3:9], sentinel_ids=range(100, 110), eos_id=1)
    assert source.tolist() == [10, 11, 100, 13, 101, 1]
    assert target.tolist() == [100, 12, 101, 14, 15, 1]


def test_golden_examples():
    """Pinned: a change of the draws makes every earlier run irreproducible and must be deliberate."""
    made = {
        d.name: [
            x.tolist() for x in corrupt(np.arange(24), d, example_rng(5, 1, 2, 3), sentinel_ids=[90, 91, 92], eos_id=99)
        ]
        for d in PRESETS["t5gemma2"]
    }
    assert made == GOLDEN


@pytest.mark.parametrize("denoiser", DENOISERS, ids=lambda d: f"{d.name}-{d.mean_span}-{d.corruption}-{d.placement}")
@pytest.mark.parametrize("budget", [(512, 256), (97, 64), (64, 200), (16, 16)])
def test_raw_length_is_the_longest_that_always_fits(denoiser, budget):
    longest = raw_length(denoiser, *budget)
    overflows = 0
    for length in (longest, longest - 1, longest + 1):
        for i in range(150):
            source, target = corrupt(np.arange(max(length, 2)), denoiser, example_rng(0, 0, i, length), **IDS)
            over = len(source) > budget[0] or len(target) > budget[1]
            overflows += over
            assert not over or length > longest
    if denoiser.placement == "t5" or denoiser.mean_span is None:
        assert overflows  # one token more does not fit; elsewhere the worst draw is too rare to wait for


def test_too_few_sentinels_are_refused_before_anything_runs():
    r1, r2, _, x2, _ = PRESETS["t5gemma2"]
    for denoiser, limit in [(r1, 2010), (r2, 2414), (x2, 6434)]:
        as_t5 = Denoiser("t5", denoiser.mean_span, denoiser.corruption, placement="t5")
        assert required_sentinels(as_t5, limit - 1) == 100
        assert required_sentinels(as_t5, limit) == 101
        assert required_sentinels(denoiser, limit) == 102  # and the turn may cut a span
    with pytest.raises(InputError, match=r"R1 needs up to \d+ sentinels.*has 100"):
        check_capacity(PRESETS["t5gemma2"], 4096, 4096, 100)
    check_capacity(PRESETS["t5gemma2"], 512, 256, 100)
    check_capacity((PRESETS["t5gemma2"][4],), 4096, 4096, 0)  # S needs none
    with pytest.raises(ValueError, match="as many sentinels"):
        corrupt(np.arange(500), r1, example_rng(0, 0, 0, 0), sentinel_ids=range(FIRST, FIRST + 3), eos_id=EOS)


def test_denoisers_are_drawn_by_weight_from_the_examples_own_generator():
    preset = PRESETS["t5gemma2"]
    drawn = [draw_denoiser(preset, example_rng(0, 0, document, 0)) for document in range(20_000)]
    assert chisquare(np.bincount(drawn), 20_000 * np.array([1, 1, 1, 1, 4]) / 8).pvalue > 1e-3
    assert chisquare(np.bincount(drawn), 20_000 * np.array([1, 1, 1, 1, 3]) / 7).pvalue < 1e-12


def test_each_chunk_has_a_generator_of_its_own():
    base = (1, 2, 3, 4)
    first = example_rng(*base).integers(2**60, size=8)
    np.testing.assert_array_equal(example_rng(*base).integers(2**60, size=8), first)
    for word in range(4):
        other = list(base)
        other[word] += 1
        assert not np.isin(example_rng(*other).integers(2**60, size=8), first).any()


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("ul3", "'ul3' is not one of t5gemma2"),
        ([], "at least one"),
        ([{"name": "a", "mean_span": 3, "corruption": 0.15}] * 2, "distinct"),
        ([{"name": "a", "mean_span": 3, "corruption": 1.5}], "a: corruption=1.5"),
        ([{"name": "a", "mean_span": 0, "corruption": 0.5}], "a: mean_span=0"),
        ([{"name": "a", "mean_span": "3", "corruption": 0.5}], "a: mean_span='3' is not a number"),
        ([{"name": "a", "mean_span": None, "corruption": 0.5, "weight": 0}], "a: weight=0"),
        ([{"name": "a", "span": 3, "corruption": 0.5}], "span"),
    ],
)
def test_bad_presets(preset, message):
    with pytest.raises(InputError, match=message):
        resolve_preset(preset)


def test_preset_from_yaml():
    (denoiser,) = resolve_preset([{"name": "a", "mean_span": 3, "corruption": 0.15, "weight": 2}])
    assert denoiser == Denoiser("a", 3, 0.15, 2)


@pytest.mark.parametrize("tokens", [[], [1]])
def test_texts_too_short_to_corrupt(tokens):
    with pytest.raises(ValueError, match="too few"):
        corrupt(np.array(tokens), PRESETS["t5"][0], example_rng(0, 0, 0, 0), **IDS)


def test_a_sentinel_in_the_text_is_an_error():
    with pytest.raises(ValueError, match="contain a sentinel"):
        corrupt(np.array([1, FIRST, 2]), PRESETS["t5"][0], example_rng(0, 0, 0, 0), **IDS)


def test_render():
    tokenizer = build_tokenizer(num_ranks=512)
    ids = tokenizer("the quick brown fox")["input_ids"]
    mask = np.zeros(len(ids), dtype=bool)
    mask[1:3] = True
    pair = mask_spans(np.array(ids), mask, sentinel_ids=tokenizer.sentinel_token_ids, eos_id=tokenizer.eos_token_id)
    text = render(Example(*pair, 0), tokenizer, PRESETS["t5"])
    assert "[R]" in text
    assert text.count("<extra_id_0>") == 2
    assert text.count("<|im_end|>") == 2
