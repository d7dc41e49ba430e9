"""The optimizer, its parameter groups, the running average of weights, and the learning rate of
each step.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qwen3_encdec.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (fused), or Muon over the projection matrices, which alone have weight decay, and AdamW
    over the rest.

    Decay shrinks a row of the embedding at every step, but only rows that occur receive a gradient:
    the vocabulary of a large tokenizer would fade with its rarity. With ``ema_decay``, every step
    also moves the state ``ema`` of each parameter, so that the average is sharded, saved and
    resumed as the optimizer's moments are.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(
                parameter, "ds_shape", parameter.shape
            )  # under ZeRO-3 a parameter is empty
            small = len(shape) < 2 or id(parameter) in embeddings
            (others if small else matrices).append(parameter)
    decayed = {"params": matrices, "weight_decay": config.weight_decay}
    undecayed = {"params": others, "weight_decay": 0.0}
    adamw = partial(torch.optim.AdamW, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "muon":
        # Updates as large as AdamW's (Moonlight, arXiv 2502.16982), so that one learning rate
        # serves both.
        muon = Muon([decayed], lr=config.lr, adjust_lr_fn="match_rms_adamw")
        optimizer = Chained(muon, adamw([undecayed]))
    else:
        optimizer = adamw([decayed, undecayed])
    if config.ema_decay:
        optimizer.register_step_post_hook(
            partial(_move_average, get_ema_multi_avg_fn(config.ema_decay))
        )
    return optimizer


class Muon(torch.optim.Muon):
    """torch's Muon, also of matrices that FSDP2 has sharded: each is orthogonalized whole.

    torch's own step would take products of DTensors, whose partial sums are rounded to bf16 before
    they are added.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; of a sharded matrix, all ranks compute the same update, and each applies its
        rows of it.
        """
        for group in self.param_groups:
            options = {
                "ns_coefficients": group["ns_coefficients"],
                "ns_steps": group["ns_steps"],
                "eps": group["eps"],
            }
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = (
                    parameter.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                )
                if isinstance(update, DTensor):
                    whole = _zeropower_via_newtonschulz(update.full_tensor(), **options)
                    update = distribute_tensor(
                        whole, update.device_mesh, update.placements, src_data_rank=None
                    )
                else:
                    update = _zeropower_via_newtonschulz(update, **options)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(
                    update, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
                )


class Chained(torch.optim.Optimizer):
    """Two optimizers of different parameters as one, to the loop, to sharding and to checkpoints."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of each part."""
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            # Sharding replaces the parameters, loading a state replaces everything: hand on what is
            # there now.
            part.param_groups, part.state = self.param_groups[begin:end], self.state
            part.step()
            begin = end


def _move_average(average: Any, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter, state in optimizer.state.items():
        if "ema" not in state:
            state["ema"] = parameter.detach().clone()
    average([state["ema"] for state in optimizer.state.values()], list(optimizer.state), None)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step ``step``, counted from 1;

    ``max_steps`` is the last and the lowest.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, config.max_steps - round(config.decay_fraction * config.max_steps))
    if step <= start:
        return config.lr
    progress = min(1.0, (step - start) / (config.max_steps - start))
    shape = (
        0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    )
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
