"""Train under DeepSpeed's ZeRO-2 and ZeRO-3, whose optimizers hold flat pieces of parameters.

Checkpoints gather whole tensors into the same files that every other launch writes and reads.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from deepspeed import utils
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen3_encdec.folders import InputError
from qwen3_encdec.training import distributed
from qwen3_encdec.training.config import TrainingConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedState(distributed.TrainingState):
    """`TrainingState` over DeepSpeed's engine, which clips gradients itself."""

    def __init__(self, engine: Any, optimizer: Any, accelerator: Accelerator) -> None:
        super().__init__(engine, optimizer, accelerator)
        self.engine = engine
        self._zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        own = "fp32_partitioned_groups_flat" if self._zero3 else "single_partition_of_fp32_groups"
        self._moments: list[dict[str, torch.Tensor]] = []
        for piece in getattr(optimizer, own):
            moments = {key: torch.zeros_like(piece) for key in _MOMENTS}
            moments["step"] = torch.zeros((), device=piece.device)
            optimizer.optimizer.state[piece] = moments  # torch's own optimizer
            self._moments.append(moments)
        if not self._zero3:
            # DeepSpeed links moments after stepping the first group and misses the other groups.
            optimizer._lazy_init_hp_params_optimizer_state()

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Tell the engine whether to reduce after this micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def gradients(self, prefix: str = "") -> list[Any]:
        """Gather the gradients of parameters whose names start with ``prefix``."""
        found = [p for name, p in self.parameters.items() if name.startswith(prefix)]
        return [utils.safe_get_full_grad(parameter) for parameter in found]

    def step(self, norm: float, max_norm: float) -> None:
        """Apply the gradients."""
        self.engine.step()

    def discard(self) -> None:
        """Drop the gradients by setting them to NaN, since the engine skips steps with NaN."""
        for parameter, gradient in zip(self.parameters.values(), self.gradients(), strict=True):
            utils.safe_set_full_grad(parameter, gradient.fill_(float("nan")))
        self.engine.step()

    def weights(self) -> distributed.Tensors:
        """Gather whole weights to the CPU of every rank."""
        whole = super().weights()
        for name, parameter in self.parameters.items():
            whole[name] = utils.safe_get_full_fp32_param(parameter).cpu()
        return whole

    def optimizer_state(self) -> distributed.Tensors:
        """Gather whole moments, as `weights` does, under the keys of torch's AdamW."""
        whole = {}
        for name, parameter in self.parameters.items():
            for key in _MOMENTS:
                moment = utils.safe_get_full_optimizer_state(parameter, key)
                whole[f"{name}.{key}"] = moment.cpu()
            whole[f"{name}.step"] = self._moments[0]["step"].clone()
        return whole

    def receive(self, name: str, tensor: torch.Tensor, group: Any, sender: int) -> None:
        """Put what the sender has read where DeepSpeed keeps it."""
        value = tensor.to(self.accelerator.device)
        dist.broadcast(value, group=group, group_src=sender)
        owner, _, key = name.rpartition(".")
        if key == "step":
            for moments in self._moments:
                moments["step"].copy_(value)
        elif key in _MOMENTS:
            self._fill(self.parameters[owner], value, key)
        elif name in self.parameters:  # else a buffer, which has received it
            self._fill(self.parameters[name], value)

    def _fill(self, parameter: Any, value: torch.Tensor, moment: str | None = None) -> None:
        if self._zero3:
            # DeepSpeed's own setters fail if the last rank's piece is shorter.
            pieces = [utils.safe_get_local_fp32_param(parameter), parameter.ds_tensor]
            if moment:
                pieces = [utils.safe_get_local_optimizer_state(parameter, moment)]
            for piece in pieces:
                mine = value.flatten()[dist.get_rank() * piece.numel() :][: piece.numel()]
                piece.data[: mine.numel()] = mine
        elif moment:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            utils.safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)


def make_plugin(config: TrainingConfig, mixed_precision: str) -> DeepSpeedPlugin:
    """Build ZeRO-2 or ZeRO-3 from the accelerate YAML, adjusted to what the loop does itself."""
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage not in (2, 3) or mixed_precision != "no":
        raise InputError(
            "DeepSpeed is supported only as ZeRO stages 2 and 3 with mixed_precision=no; "
            "otherwise, launch with configs/accelerate_fsdp2.yaml"
        )
    settings = plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.batch_size
    settings["gradient_accumulation_steps"] = 1
    settings["gradient_clipping"] = config.max_grad_norm
    settings["zero_allow_untested_optimizer"] = True
    # Ranks must issue the same gathers, whatever batches they have seen.
    for name in ("prefetch_bucket_size", "max_reuse_distance", "param_persistence_threshold"):
        settings["zero_optimization"][f"stage3_{name}"] = 0
    return plugin


def prepare_deepspeed(
    model: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> DeepSpeedState:
    """Hand a model and its optimizer to DeepSpeed's engine."""
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        utils.set_z3_leaf_modules(model, [GradientCheckpointingLayer])
    engine, wrapped = accelerator.prepare(model, optimizer)
    return DeepSpeedState(engine, wrapped.optimizer, accelerator)
