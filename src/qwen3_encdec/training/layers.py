"""What is done to every layer before training: recomputation, for memory, and compilation, for speed."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen3_encdec.training.config import TrainingConfig

_MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def prepare_layers(model: nn.Module, config: TrainingConfig) -> None:
    """Recompute and compile the layers of ``model`` as ``config`` says; call it before the model is sharded.

    A layer is compiled for every length at once. On a CPU, attention over a packed row walks through its documents
    and stays outside: norms, projections, rotation and MLP are compiled there, or nothing
    in layers that are recomputed.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if config.gradient_checkpointing:
        recompute = partial(checkpoint, use_reentrant=False)
        if config.gradient_checkpointing == "selective":
            recompute = partial(recompute, context_fn=partial(create_selective_checkpoint_contexts, _policy))
        for layer in layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, recompute
    if config.compile:
        for layer in layers:
            layer.compile(dynamic=True)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute: matrix products and attention, by whichever kernel."""
    if operator in _MATRIX_PRODUCTS or "attention" in str(operator) or "varlen_attn" in str(operator):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
