"""Count a model's parameters and the FLOPs of its steps, with the formula of docs/scaling.md."""

import re
from collections import namedtuple
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, Qwen3Config

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.folders import resolve_checkpoint
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM

# Hidden and intermediate size, layers, query heads of each dense Qwen3 (8 KV heads of 128).
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12288, 36, 32),
    "14B": (5120, 17408, 40, 40),
    "32B": (5120, 25600, 64, 64),
}
# Parameter counts; the stacks exclude the shared embedding.
Sizes = namedtuple("Sizes", ("encoder", "decoder", "embedding"))


def qwen3_sizes(name: str) -> Qwen3EncoderDecoderConfig:
    """Return the pair's configuration for a Qwen3 size (0.6B to 32B), folder or hub id."""
    size = re.fullmatch(r"(?:Qwen/)?(?:Qwen3-)?([\d.]+B)(?:-Base)?", name)
    if size and size[1] in QWEN3:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = dict(zip(names, QWEN3[size[1]], strict=True))
        source = Qwen3Config(num_key_value_heads=8, head_dim=128, vocab_size=151936, **sizes)
    else:
        source = AutoConfig.from_pretrained(resolve_checkpoint(name))
    return Qwen3EncoderDecoderConfig.from_qwen3_config(source)


def count_parameters(model_config: Qwen3EncoderDecoderConfig) -> Sizes:
    """Count parameters on the meta device, without allocating weights."""
    with torch.device("meta"):
        model: Any = Qwen3ForSeq2SeqLM(model_config).model
    embedding, encoder = model.shared.weight.numel(), model.encoder.num_parameters()
    return Sizes(encoder, model.num_parameters() - encoder - embedding, embedding)


def length_sums(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Sum S, T, S^2 and T S + T^2 / 2 over examples of these lengths, (4,) fp64."""
    s, t = source.astype(np.float64), target.astype(np.float64)
    return np.array([s.sum(), t.sum(), s @ s, t @ s + t @ t / 2])


def flops_per_sum(c: Qwen3EncoderDecoderConfig, sizes: Sizes) -> np.ndarray:
    """Return FLOPs of a forward and backward pass per unit of each `length_sums`, (4,) fp64."""
    keys_values = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    source = sizes.encoder + keys_values * c.num_decoder_layers
    target = sizes.decoder + sizes.embedding
    attention = 2 * c.num_attention_heads * c.head_dim
    layers = c.num_hidden_layers, c.num_decoder_layers
    return 6.0 * np.array([source, target, attention * layers[0], attention * layers[1]])
