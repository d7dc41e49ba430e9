"""Build the optimizer with its parameter groups and compute the learning rate of each step."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qwen3_encdec.training.config import TrainingConfig

_GATE = ".self_attn.source_gate"


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (fused) over three groups: projection matrices, the rest, and the source gates.

    Only projections have weight decay: of the embedding only rows that occur receive a gradient,
    and the rare ones would fade. Gates take ``source_gate_lr_multiplier`` times the learning rate.
    ``ema_decay`` keeps an average as the state ``ema``, sharded, saved and resumed like moments.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, others, gates = [], [], []
    for name, parameter in model.named_parameters():
        # DeepSpeed's ZeRO-3 leaves an empty parameter and its true shape beside it.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        if name.endswith(_GATE):
            gates.append(parameter)
        elif dimensions < 2 or id(parameter) in embeddings:
            others.append(parameter)
        else:
            matrices.append(parameter)
    settings = [
        (matrices, config.weight_decay, 1.0),
        (others, 0.0, 1.0),
        (gates, 0.0, config.source_gate_lr_multiplier),
    ]
    groups: Any = [
        {"params": parameters, "weight_decay": decay, "lr_multiplier": multiplier}
        for parameters, decay, multiplier in settings
        if parameters
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    if config.ema_decay:
        average = get_ema_multi_avg_fn(config.ema_decay)
        optimizer.register_step_post_hook(partial(_move_average, average))
    return optimizer


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group its multiple of the step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step ``step``, counted from 1; lowest at ``max_steps``, the last.

    At step 1 of a warm-up of W steps it is 1 / W of the peak, at step W the peak.
    """
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


def _move_average(average: Any, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter, state in optimizer.state.items():
        if "ema" not in state:
            state["ema"] = parameter.detach().clone()
    averages = [state["ema"] for state in optimizer.state.values()]
    average(averages, list(optimizer.state), None)
