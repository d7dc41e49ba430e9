"""Choose how layers compute: attention implementation, recomputation and torch.compile."""

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.utils import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.folders import InputError, first_line
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.training.config import TrainingConfig

FASTEST_FIRST = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "flex_attention")
_EXPENSIVE = ("aten.mm.", "aten.addmm.", "aten.bmm.", "attention", "attn")


def layers_of(model: nn.Module) -> list[Any]:
    """Return the encoder's and decoder's layers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(model: nn.Module, config: TrainingConfig) -> None:
    """Recompute the layers' activations in the backward pass as ``config`` says."""
    recompute = partial(checkpoint.checkpoint, use_reentrant=False)
    if config.gradient_checkpointing == "selective":
        contexts = partial(checkpoint.create_selective_checkpoint_contexts, _keep_products)
        recompute = partial(recompute, context_fn=contexts)
    for layer in layers_of(model):
        layer.gradient_checkpointing = bool(config.gradient_checkpointing)
        layer._gradient_checkpointing_func = recompute


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Save the outputs of matrix products and attention kernels; recompute the rest."""
    expensive = any(word in str(operator) for word in _EXPENSIVE)
    policy = checkpoint.CheckpointPolicy
    return policy.MUST_SAVE if expensive else policy.PREFER_RECOMPUTE


def compile_layers(model: nn.Module, config: TrainingConfig, **options: Any) -> None:
    """Compile each layer's forward with dynamic shapes; ``options`` are torch.compile's.

    Shard the model first: otherwise a layer silently loses its recomputation under FSDP2.
    """
    wanted = config.compile
    if wanted == "auto":
        wanted = next(model.parameters()).device.type != "cpu"
    if not wanted:
        return
    # By default DDP's buckets also split the graph of a layer, which older torch cannot do.
    torch._dynamo.config.optimize_ddp = False
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward, dynamic=True, **options)


def choose_attention(
    wanted: str, model_config: Qwen3EncoderDecoderConfig, accelerator: Accelerator
) -> str:
    """Return the attention implementation to train with; print it and why others were refused.

    On CUDA, "auto" is the first of `FASTEST_FIRST` that agrees with sdpa (torch's varlen kernel),
    or else sdpa. Raises InputError if a requested implementation does not agree.
    """
    device, precision = accelerator.device, accelerator.mixed_precision
    if wanted == "auto" and device.type != "cuda":
        return "sdpa"
    refused: list[str] = []
    for name in FASTEST_FIRST if wanted == "auto" else (wanted,):
        reason = disagreement(name, model_config, device, precision)
        if reason is None:
            break
        refused.append(f"cannot use {name} ({reason})")
    else:
        if wanted != "auto":
            raise InputError(f"attention: {refused[0]}; use attention=auto")
        name = "sdpa"
    accelerator.print("; ".join([f"attention: {name}", *refused]))
    return name


def disagreement(
    name: str, model_config: Qwen3EncoderDecoderConfig, device: torch.device, precision: str
) -> str | None:
    """Return why an implementation is unfit for a ``precision``, "bf16" or "no" (fp32).

    None means that its gradient is sdpa's up to rounding. Loss and gradient norm would not tell: a
    query that also sees its neighbor's key hardly changes them.
    """
    sizes: dict[str, Any] = {"vocab_size": 256, "num_hidden_layers": 1, "num_decoder_layers": 1}
    sizes |= {"num_sentinel_tokens": 10, "eos_token_id": 1, "pad_token_id": 0}
    sizes |= {"decoder_start_token_id": 0, "attention_dropout": 0.0}
    settings = model_config.to_dict() | sizes
    ids = torch.arange(2, 200).numpy()
    sides = [ids[:37], ids[:5], ids[:64]], [ids[:13], ids[:21], ids[:9]]
    batch = send_to_device(collate_packed(*sides), device)
    gradients: list[list[Any]] = []
    try:
        for implementation in ("sdpa", name):
            torch.manual_seed(0)
            model = Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig.from_dict(settings)).to(device)
            model.set_attn_implementation(implementation)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss: Any = model(**batch).loss
            loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        expected, found = gradients
        difference = nn.utils.get_total_norm(torch._foreach_sub(found, expected))
        distance = float(difference / nn.utils.get_total_norm(expected))
    except Exception as error:  # whatever a missing or unfit package raises
        return f"{type(error).__name__}: {first_line(error)}"[:120]
    return None if distance < 0.05 else f"its gradient differs from sdpa's by {distance:.1%}"
