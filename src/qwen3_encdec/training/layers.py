"""Choose how layers compute: attention implementation, recomputation and torch.compile."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.folders import InputError
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.training.config import TrainingConfig

FASTEST_FIRST = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "flex_attention")
_LENGTHS = ((37, 13), (5, 21), (64, 9))  # source and target of the documents of the start-up check
_MATRIX_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
)


def layers_of(model: nn.Module) -> list[Any]:
    """Return the encoder's and decoder's layers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(model: nn.Module, config: TrainingConfig) -> None:
    """Recompute the layers' activations in the backward pass as ``config`` says."""
    if not config.gradient_checkpointing:
        return
    recompute = partial(checkpoint, use_reentrant=False)
    if config.gradient_checkpointing == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
        recompute = partial(recompute, context_fn=contexts)
    for layer in layers_of(model):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = recompute


def compile_layers(model: nn.Module, config: TrainingConfig, **options: Any) -> None:
    """Compile each layer's forward, for every length at once; ``options`` are torch.compile's.

    The model is sharded before: otherwise a layer silently loses its recomputation to FSDP2.
    """
    wanted = config.compile
    if wanted == "auto":
        wanted = torch.accelerator.is_available()
    for layer in layers_of(model) if wanted else ():
        layer.forward = torch.compile(layer.forward, dynamic=True, **options)


def choose_attention(
    wanted: str,
    model_config: Qwen3EncoderDecoderConfig,
    device: torch.device,
    show: Callable[[str], object],
) -> str:
    """Return the attention implementation to train with, and ``show`` why not a faster one.

    "auto" is the first of `FASTEST_FIRST` that computes what sdpa computes on a small packed batch,
    or else sdpa, torch's varlen kernel. Raises InputError if the one that is asked for fails.
    """
    if wanted == "auto" and device.type != "cuda":
        return "sdpa"
    refused: list[str] = []
    for name in FASTEST_FIRST if wanted == "auto" else (wanted,):
        reason = None if name in ("sdpa", "eager") else disagreement(name, model_config, device)
        if reason is None:
            show(f"attention: {name}" + "".join(f"; not {why}" for why in refused))
            return name
        if wanted != "auto":
            raise InputError(f"attention: {name} cannot be used: {reason}; use attention=auto")
        refused.append(f"{name} ({reason})")
    show(f"attention: sdpa; not {'; not '.join(refused)}")
    return "sdpa"


def disagreement(
    name: str, model_config: Qwen3EncoderDecoderConfig, device: torch.device
) -> str | None:
    """Return why an implementation is unfit, or None if a small model's loss and gradient agree."""
    small = Qwen3EncoderDecoderConfig.from_dict(model_config.to_dict())
    small.vocab_size, small.eos_token_id = 256, 1
    small.pad_token_id = small.decoder_start_token_id = 0
    small.num_hidden_layers = small.num_decoder_layers = 1
    small.num_sentinel_tokens = 10
    generator = torch.Generator().manual_seed(0)
    sides = [
        [torch.randint(2, 200, (pair[side],), generator=generator).numpy() for pair in _LENGTHS]
        for side in (0, 1)
    ]
    batch = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in collate_packed(*sides).items()
    }
    found = []
    try:
        for implementation in ("sdpa", name):
            torch.manual_seed(0)
            model = Qwen3ForSeq2SeqLM(small).to(device)
            model.set_attn_implementation(implementation)
            with torch.autocast(device.type, torch.bfloat16):
                loss: Any = model(**batch).loss
            loss.backward()
            total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            found.append((loss.item(), total.item()))
    except Exception as error:  # whatever a missing or unfit package raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:120]
    (reference, norm), (other, other_norm) = found
    if abs(other / reference - 1) > 0.01 or abs(other_norm / norm - 1) > 0.05:
        return f"loss {other:.4f} and norm {other_norm:.4f}, sdpa {reference:.4f} and {norm:.4f}"
    return None


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute: matrix products and attention, by whichever kernel."""
    if operator in _MATRIX_PRODUCTS or "attention" in str(operator) or "attn" in str(operator):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
