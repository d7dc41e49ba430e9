"""Count a model's parameters and the FLOPs of its steps, with the formula of docs/scaling.md."""

from collections import namedtuple
from typing import Any

import numpy as np
import torch

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM

# Parameter counts; the stacks exclude the shared embedding.
Sizes = namedtuple("Sizes", ("encoder", "decoder", "embedding"))


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
