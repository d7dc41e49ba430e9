"""What a run will cost, from its sizes alone: parameters, tokens, memory per process and floating-point operations."""

from dataclasses import dataclass

import torch

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.modeling_qwen3_encdec import LOSS_CHUNK, Qwen3ForSeq2SeqLM
from qwen3_encdec.training.config import TrainingConfig

# Dense bf16 peaks in FLOP/s by a word of the device's name, from the makers' data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a model: ``encoder`` and ``decoder`` without the shared ``embedding``."""

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
    embedding = model_config.vocab_size * model_config.hidden_size
    counts = {"encoder": 0, "decoder": 0}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or parameter.numel() != embedding:
            counts["decoder" if ".decoder." in name else "encoder"] += parameter.numel()
    return Sizes(counts["encoder"], counts["decoder"], embedding)


def flops(
    model_config: Qwen3EncoderDecoderConfig, sizes: Sizes, source: float, target: float, examples: float = 1
) -> float:
    """FLOPs of a forward and backward pass over ``examples`` pairs of mean lengths ``source`` and ``target``.

    6 S N_enc + 6 T (N_dec + V h) + 6 S (2 h Hkv D L_dec) + 12 Hq D (L_enc S^2 + L_dec (T S + T^2 / 2)): the third
    term is the decoder's key and value projections of the source, the last one attention.
    """
    c, s, t = model_config, source, target
    keys_values = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim * c.num_decoder_layers
    attention = c.num_hidden_layers * s * s + c.num_decoder_layers * (t * s + t * t / 2)
    linear = 6 * s * (sizes.encoder + keys_values) + 6 * t * (sizes.decoder + sizes.embedding)
    return examples * (linear + 12 * c.num_attention_heads * c.head_dim * attention)


def peak_flops(device: torch.device, processes: int) -> float | None:
    """The dense bf16 peak of all processes' devices together, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((processes * peak for word, peak in PEAK_FLOPS.items() if word in name), None)


def memory(
    model_config: Qwen3EncoderDecoderConfig, sizes: Sizes, config: TrainingConfig, shards: int
) -> dict[str, float]:
    """Rough bytes per process by purpose. States are exact; activations count the saved tensors of each layer."""
    c, bf16 = model_config, config.mixed_precision == "bf16"
    width = 2 if bf16 else 4
    # one count for each time a token passes a layer
    source, target = config.data.source_length, config.data.target_length
    passes = config.batch_size * (source * c.num_hidden_layers + target * c.num_decoder_layers)
    heads = (2 * c.num_attention_heads + 4 * c.num_key_value_heads) * c.head_dim
    saved = c.hidden_size if config.gradient_checkpointing else 4 * (c.hidden_size + c.intermediate_size) + heads
    return {
        "weights (fp32)": 4 * sizes.total / shards,
        "gradients (fp32)": 4 * sizes.total / shards,
        "AdamW moments (fp32)": 8 * sizes.total / shards,
        "gathered embedding and its gradient": (width + 4) * sizes.embedding if shards > 1 or bf16 else 0,
        "activations": width * passes * saved,
        f"loss chunk ({LOSS_CHUNK} tokens, fp32)": 2 * 4 * LOSS_CHUNK * c.vocab_size,
    }


def plan(
    model_config: Qwen3EncoderDecoderConfig, sizes: Sizes, config: TrainingConfig, processes: int, shards: int
) -> list[str]:
    """Lines for ``--dry-run``: full rows are assumed, so tokens and FLOPs are upper bounds."""
    rows = config.batch_size * config.gradient_accumulation_steps * processes
    source, target = config.data.source_length, config.data.target_length
    tokens = rows * (source + target)
    per_step = flops(model_config, sizes, source, target, rows)
    parts = memory(model_config, sizes, config, shards)
    lines = [
        f"parameters        {sizes.total:,} (encoder {sizes.encoder:,}, decoder {sizes.decoder:,}, "
        f"shared embedding {sizes.embedding:,})",
        f"tokens per step   {tokens:,} ({rows} rows of {source} + {target}, {processes} processes)",
        f"steps             {config.max_steps:,}",
        f"total tokens      {tokens * config.max_steps:,}",
        f"FLOPs             {per_step:.3e} a step, {per_step * config.max_steps:.3e} in all",
        f"memory            {sum(parts.values()) / 2**30:.2f} GiB per process, roughly:",
    ]
    return lines + [f"  {size / 2**30:8.2f} GiB  {name}" for name, size in parts.items()]
