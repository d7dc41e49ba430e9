"""Train under DeepSpeed's ZeRO-2 and ZeRO-3, whose optimizers hold flat pieces of parameters.

Whole tensors are gathered and written to the files that every other launch writes and reads.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen3_encdec.folders import InputError
from qwen3_encdec.training import distributed
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.distributed import Tensors, TrainingState

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedState(TrainingState):
    """`TrainingState` over DeepSpeed's engine, which clips by itself."""

    def __init__(self, engine: Any, optimizer: Any, accelerator: Accelerator) -> None:
        super().__init__(engine, optimizer, accelerator)
        self.engine = engine
        self._inner = optimizer.optimizer  # torch's own
        self._zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        own = "fp32_partitioned_groups_flat" if self._zero3 else "single_partition_of_fp32_groups"
        self._pieces: list[torch.Tensor] = getattr(optimizer, own)
        for piece in self._pieces:
            zeros = {key: torch.zeros_like(piece) for key in _MOMENTS}
            self._inner.state[piece] = {"step": torch.zeros((), device=piece.device), **zeros}
        if not self._zero3:
            # It notes where moments are when it has stepped the first group, and misses the others.
            optimizer._lazy_init_hp_params_optimizer_state()

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Tell the engine when to reduce."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def gradients(self) -> Tensors:
        """Gather the gradients."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p) for name, p in self.parameters.items()}

    def step(self, norm: float, max_norm: float) -> None:
        """Apply the gradients."""
        self.engine.step()

    def discard(self) -> None:
        """Drop the gradients by the engine's own way out: it applies none that are not finite."""
        from deepspeed.utils import safe_set_full_grad

        for name, gradient in self.gradients().items():
            safe_set_full_grad(self.parameters[name], gradient.fill_(float("nan")))
        self.engine.step()

    def weights(self) -> Tensors:
        """Gather whole weights; each rank keeps the share that it writes."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._share(
            (name, safe_get_full_fp32_param(tensor) if name in self.parameters else tensor)
            for name, tensor in self.saved.items()
        )

    def optimizer_state(self) -> Tensors:
        """Gather whole moments under the keys of torch's AdamW, as `weights` does."""
        return self._share(self._whole_state())

    def first_held(self, tensors: Tensors) -> Tensors:
        """Return all: no tensor is on two ranks."""
        return tensors

    def read(self, folder: Path) -> None:
        """Fill the optimizer's pieces; the weights must have been loaded from the same checkpoint.

        Rank 0 reads each tensor and sends it to the others.
        """
        loaded = Path(self.module.name_or_path)
        if folder != loaded:
            raise InputError(f"the weights were loaded from {loaded}; rename that folder")
        sums: dict[str, int] = {}
        for name, parameter in self.parameters.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = {f"{name}.{key}": torch.empty(shape) for key in _MOMENTS}
            whole[f"{name}.step"] = torch.zeros(())
            with distributed.together():
                if dist.get_rank() == 0:
                    distributed.read_tensors(whole, folder / "state")
                    sums |= distributed.checksums(whole)
            for key, tensor in whole.items():
                sent = tensor.to(parameter.device)
                dist.broadcast(sent, src=0)
                self._set(parameter, key.rpartition(".")[2], sent)
        distributed.verify(sums, folder)

    def _set(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_full_optimizer_state

        if key == "step":
            for piece in self._pieces:
                self._inner.state[piece]["step"].copy_(value)
        elif self._zero3:
            # DeepSpeed's own setter fails where the last rank's piece is shorter.
            piece = safe_get_local_optimizer_state(parameter, key)
            mine = value.flatten()[dist.get_rank() * piece.numel() :][: piece.numel()]
            piece[: mine.numel()] = mine
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _whole_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in self.parameters.items():
            for key in _MOMENTS:
                yield f"{name}.{key}", safe_get_full_optimizer_state(parameter, key)
            yield f"{name}.step", self._inner.state[self._pieces[0]]["step"]

    def _share(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
        """Copy every n-th of the whole tensors, one at a time, to the CPU."""
        kept = {}
        for number, (name, tensor) in enumerate(tensors):
            if number % dist.get_world_size() == dist.get_rank():
                kept[name] = tensor.detach().to("cpu", copy=True)
        return kept


def make_plugin(config: TrainingConfig, mixed_precision: str) -> DeepSpeedPlugin:
    """Make ZeRO-2 or ZeRO-3 as the accelerate YAML says, told what the loop does itself.

    Raises InputError for what DeepSpeed cannot do here.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage not in (2, 3) or config.ema_decay or mixed_precision != "no":
        raise InputError(
            "under DeepSpeed the loop runs ZeRO stages 2 and 3 with mixed_precision=no and "
            "ema_decay=0; launch it with configs/accelerate_fsdp2.yaml"
        )
    settings = plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.batch_size
    settings["gradient_accumulation_steps"] = 1
    settings["gradient_clipping"] = config.max_grad_norm
    settings["zero_allow_untested_optimizer"] = True
    # Ranks must gather alike, whatever batches they have seen.
    for name in ("prefetch_bucket_size", "max_reuse_distance", "param_persistence_threshold"):
        settings["zero_optimization"][f"stage3_{name}"] = 0
    return plugin


def prepare_deepspeed(
    model: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> DeepSpeedState:
    """Hand a model and its optimizer to DeepSpeed's engine."""
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        import deepspeed

        deepspeed.utils.set_z3_leaf_modules(model, [GradientCheckpointingLayer])
    engine, wrapped = accelerator.prepare(model, optimizer)
    return DeepSpeedState(engine, wrapped.optimizer, accelerator)
