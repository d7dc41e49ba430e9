"""Count a model's parameters and the operations of its steps."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM

MFU = 0.29
"""Share of an H100's peak that was measured for the 0.6B pair."""
# Dense bf16 peak in FLOP/s and memory in bytes, from the makers' data sheets.
DEVICES = {"H100": (989e12, 80e9), "H200": (989e12, 141e9), "A100": (312e12, 80e9)}


@dataclass(frozen=True)
class Sizes:
    """Parameter counts: ``encoder`` and ``decoder`` without the shared ``embedding``."""

    encoder: int
    decoder: int
    embedding: int

    @property
    def total(self) -> int:
        """All parameters, the shared matrix once."""
        return self.encoder + self.decoder + self.embedding


def count_parameters(model_config: Qwen3EncoderDecoderConfig) -> Sizes:
    """Count on the meta device, without allocating a weight."""
    with torch.device("meta"):
        model = Qwen3ForSeq2SeqLM(model_config)
    embedding: Any = model.get_input_embeddings().weight
    counts = {"encoder": 0, "decoder": 0}
    for name, parameter in model.named_parameters():
        if parameter is not embedding:
            counts["decoder" if ".decoder." in name else "encoder"] += parameter.numel()
    return Sizes(counts["encoder"], counts["decoder"], embedding.numel())


def length_sums(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Sum S, T, S^2 and T S + T^2 / 2 over examples of these lengths, (4,) fp64."""
    s, t = source.astype(np.float64), target.astype(np.float64)
    return np.array([s.sum(), t.sum(), s @ s, t @ s + t @ t / 2])


def flops_per_sum(c: Qwen3EncoderDecoderConfig, sizes: Sizes) -> np.ndarray:
    """FLOPs of a forward and backward pass for each of `length_sums`, (4,) fp64.

    6 S N_enc + 6 T (N_dec + V h) + 6 S (2 h Hkv D L_dec) + 12 Hq D (L_enc S^2 + L_dec (T S + T^2 /
    2)): the third term is the decoder's key and value projections of the source, the last one
    attention.
    """
    keys_values = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim * c.num_decoder_layers
    attention = 12 * c.num_attention_heads * c.head_dim
    return np.array(
        [
            6 * (sizes.encoder + keys_values),
            6 * (sizes.decoder + sizes.embedding),
            attention * c.num_hidden_layers,
            attention * c.num_decoder_layers,
        ],
        dtype=np.float64,
    )


def peak_flops(device: torch.device, processes: int) -> float | None:
    """Return the dense bf16 peak of all processes' devices together, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((processes * peak for word, (peak, _) in DEVICES.items() if word in name), None)
