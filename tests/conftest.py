"""Tiny real models: odd sizes everywhere, head_dim != hidden / heads, a vocabulary cut from Qwen3's own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.initialization import initialize
from qwen3_encdec.tokenization_qwen3_encdec import qwen3_backend

logging.disable_progress_bar()


def tiny_config(**changes) -> Qwen3EncoderDecoderConfig:
    sizes = {
        "vocab_size": 331, "num_sentinel_tokens": 11, "hidden_size": 40, "intermediate_size": 56,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14,
        "pad_token_id": 300, "eos_token_id": 302, "initializer_range": 0.2,
    }  # fmt: skip
    return Qwen3EncoderDecoderConfig(**{**sizes, **changes})


@pytest.fixture
def config() -> Qwen3EncoderDecoderConfig:
    return tiny_config()


@pytest.fixture
def model(config) -> Qwen3ForSeq2SeqLM:
    torch.manual_seed(0)
    return Qwen3ForSeq2SeqLM(config).eval()


@pytest.fixture(scope="session")
def parent_folder(tmp_path_factory) -> Path:
    """An ordinary Qwen3 checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("parent")
    torch.manual_seed(0)
    sizes = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "head_dim": 14}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    parent = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=640, **sizes, **heads, tie_word_embeddings=True, initializer_range=0.2)
    )
    parent.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=qwen3_backend(512), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def init_folder(parent_folder, tmp_path_factory) -> Path:
    """The encoder-decoder initialized from `parent_folder`."""
    folder = tmp_path_factory.mktemp("init") / "encdec"
    initialize(parent_folder, folder, num_sentinel_tokens=11)
    return folder
