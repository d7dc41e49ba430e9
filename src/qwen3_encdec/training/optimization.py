"""Build the optimizer with its parameter groups and compute the learning rate of each step."""

import math
from typing import Any

import torch
from torch import nn

from qwen3_encdec.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Build AdamW over projection matrices, the rest, and the source gates.

    Only projections have weight decay: it would shrink embedding rows that rarely get gradients.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, others, gates = [], [], []
    for name, parameter in model.named_parameters():
        # Under ZeRO-3 a parameter is empty and `ds_shape` holds its true shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if name.endswith(".source_gate"):
            gates.append(parameter)
        elif len(shape) < 2 or id(parameter) in embeddings:
            others.append(parameter)
        else:
            matrices.append(parameter)
    gate_lr = config.source_gate_lr_multiplier
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr_multiplier": 1.0, "weight_decay": config.weight_decay},
        {"params": others, "lr_multiplier": 1.0, "weight_decay": 0.0},
        {"params": gates, "lr_multiplier": gate_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set each group's learning rate to its multiple of ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of optimizer step ``step``, from 1; it peaks at ``warmup_steps``."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, config.max_steps - round(config.decay_fraction * config.max_steps))
    if step <= start:
        return config.lr
    progress = min(1.0, (step - start) / (config.max_steps - start))
    shape = 1 - progress
    if config.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
