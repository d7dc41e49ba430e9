"""The optimizer's parameter groups and the learning rate as a function of the optimizer step."""

import math

import torch
from torch import nn

from qwen3_encdec.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW, fused, over two groups: projection matrices with weight decay; norms and the embedding without.

    Decay shrinks a row of the embedding at every step, but only rows that occur receive a gradient: the
    vocabulary of a large tokenizer would fade with its rarity.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            small = parameter.ndim < 2 or id(parameter) in embeddings
            (undecayed if small else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step ``step``, counted from 1; ``max_steps`` is the last and the lowest."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, config.max_steps - round(config.decay_fraction * config.max_steps))
    if step <= start:
        return config.lr
    progress = min(1.0, (step - start) / (config.max_steps - start))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
