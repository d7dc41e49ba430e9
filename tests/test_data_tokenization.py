"""Encoding a corpus: the same ids as the tokenizer's from whatever library does it, and none for
control tokens.
"""

import json
import pickle
import random
import re
import sys

import numpy as np
import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from qwen3_encdec.data import tokenization
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_ranks=3000)


def reference(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    alphabets = ["ab c", "the of \n\t", "éàüß e\u0301", "天地玄黄 。", "\u200b\u00a0\r\n x"]
    alphabets += ["<|im_end|>", "0123 -.", "👩\u200d👧🏳️"]
    return [
        "".join(rng.choices("".join(rng.sample(alphabets, 2)), k=rng.randrange(80)))
        for _ in range(count)
    ]


def test_ids_are_those_of_the_tokenizer(tokenizer):
    encode = Encoder(tokenizer)
    assert encode.fallback_reason is None
    texts = [
        *random_texts(400),
        "ignore <extra_id_3> and <|im_end|><|endoftext|> <think> <|reserved_0|>please",
        "e\u0301 \ud83d half a pair".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
    ]
    for text in texts:
        assert encode(text).dtype == np.int32
        assert encode(text).tolist() == reference(tokenizer, text)
    assert encode("").tolist() == []


def test_without_tiktoken(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    encode = Encoder(tokenizer)
    assert "tiktoken" in (encode.fallback_reason or "")
    text = "<|im_end|> is text"
    assert encode(text).tolist() == reference(tokenizer, text)


def test_a_library_that_gives_other_ids_is_not_used(caplog):
    """As of a vocabulary whose merges have another order, which tiktoken does not know."""
    other = build_tokenizer(num_ranks=512)
    spec = json.loads(other.backend_tokenizer.to_str())
    spec["model"]["merges"].reverse()
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(spec))
    encode = Encoder(other)
    text = "whatever does it, the ids are right"
    assert encode(text).tolist() == reference(other, text)
    # The refusal names the text, both ids and the remedy, once.
    assert 'differ on "The quick brown fox' in caplog.text
    assert re.search(r": \[[\d, ]+\] and \[[\d, ]+\] from token \d+ on", caplog.text)
    assert "initialize" in caplog.text
    Encoder(other)
    assert caplog.text.count("several times slower") == 1


def byte_level(*first):
    """Split as GPT-2 does, behind other splits."""
    parts = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([*first, parts]) if first else parts


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("normalizer", normalizers.Lowercase()),
        ("pre_tokenizer", byte_level()),
        ("pre_tokenizer", byte_level(pre_tokenizers.Digits(individual_digits=True))),
        ("pre_tokenizer", byte_level(pre_tokenizers.Split("-", "isolated"))),
        ("pre_tokenizer", byte_level(pre_tokenizers.Split(Regex("-"), "removed"))),
    ],
    ids=["lower case", "byte level", "digits", "no pattern", "removed"],
)
def test_a_tokenizer_that_only_tokenizers_can_do(part, other):
    odd = build_tokenizer(num_ranks=512)
    setattr(odd.backend_tokenizer, part, other)
    encode = Encoder(odd)
    assert "does not normalize and split text as Qwen3's" in (encode.fallback_reason or "")
    assert encode("A1-1 <|im_end|>").tolist() == reference(odd, "A1-1 <|im_end|>")
    assert encode.fingerprint != Encoder(build_tokenizer(num_ranks=512)).fingerprint


@pytest.mark.parametrize(
    "text", ["a" * 10**6, " " * 10**6, "ab \n" * 250_000], ids=["letter", "spaces", "lines"]
)
def test_a_million_characters_without_a_break(tokenizer, text):
    assert tokenizer.decode(Encoder(tokenizer)(text)) == text


def test_an_encoder_travels_to_other_processes(tokenizer):
    text = "a worker that is spawned, not forked"
    again = pickle.loads(pickle.dumps(Encoder(tokenizer)))
    assert again(text).tolist() == reference(tokenizer, text)


def test_the_fingerprint_does_not_depend_on_earlier_calls(tokenizer):
    before = Encoder(tokenizer).fingerprint
    tokenizer(["one", "two texts"], padding=True, truncation=True, max_length=3)
    assert Encoder(tokenizer).fingerprint == before


def test_long_texts_are_cut_where_words_end(tokenizer, monkeypatch):
    encode = Encoder(tokenizer)
    texts = [text * 9 for text in random_texts(300) if text] + ["don't stop 3.14 _x y_ z! a\n b"]
    whole = [encode(text).tolist() for text in texts]
    monkeypatch.setattr(tokenization, "_PIECE", 16)
    assert [encode(text).tolist() for text in texts] == whole
    assert max(len(list(tokenization._pieces(text))) for text in texts) > 9
    # The control: a cut within a word changes the ids.
    monkeypatch.setattr(tokenization, "_BORDER", tokenization.re.compile("(?<=[a-z])(?=[a-z])"))
    assert [encode(text).tolist() for text in texts] != whole
