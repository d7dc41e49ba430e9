"""Train under DeepSpeed's ZeRO-2 and ZeRO-3, whose optimizers hold flat pieces of parameters.

Whole tensors are gathered and written to the files that every other launch writes and reads.
"""

import importlib.util
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
from qwen3_encdec.training.checkpoint import read_tensors_into
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.distributed import TrainingState

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedState(TrainingState):
    """`TrainingState` over DeepSpeed's engine."""

    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Accelerator) -> None:
        super().__init__(model, optimizer, accelerator)
        self._inner = optimizer.optimizer  # torch's own
        self._rank = accelerator.process_index
        self._zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        if self._zero3:
            self._pieces = optimizer.fp32_partitioned_groups_flat
        else:
            self._pieces = optimizer.single_partition_of_fp32_groups
        for piece in self._pieces:
            zeros = {key: torch.zeros_like(piece) for key in _MOMENTS}
            self._inner.state[piece] = {"step": torch.zeros((), device=piece.device), **zeros}
        if not self._zero3:
            # It notes where moments are when it has stepped the first group, and misses the others.
            optimizer._lazy_init_hp_params_optimizer_state()

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Tell the engine when to reduce."""
        self.model.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a micro-batch's gradients."""
        self.model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]

    def discard(self) -> None:
        """Drop the gradients, by the engine's own way out: a step of gradients that are not finite
        drops them and changes nothing else.
        """
        for gradient in self._gradients(self.parameters.values()):
            gradient.fill_(float("nan"))
        self._apply()

    def weights(self) -> dict[str, torch.Tensor]:
        """Gather whole weights; each rank keeps the share that it writes."""
        from deepspeed.utils import safe_get_full_fp32_param

        saved = set(self.module.state_dict())
        buffers = {n: b for n, b in self.module.named_buffers() if n in saved}
        gathered = ((n, safe_get_full_fp32_param(p)) for n, p in self.parameters.items())
        return self._share(gathered) | buffers

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Gather whole moments under the keys of torch's AdamW, as `weights` does."""
        return self._share(self._whole_state())

    def read(self, folder: Path) -> None:
        """Fill the optimizer's pieces from the checkpoint that the weights were loaded from.

        One rank reads each tensor and sends it to the others.
        """
        if folder != self.loaded:
            raise InputError(f"the weights were loaded from {self.loaded}; rename that folder")
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_full_optimizer_state

        step = torch.zeros(())
        for name, parameter in self.parameters.items():
            whole = torch.empty(getattr(parameter, "ds_shape", parameter.shape))
            for key in _MOMENTS:
                value = self._read_and_send(whole, f"{name}.{key}", folder).to(parameter.device)
                if not self._zero3:
                    safe_set_full_optimizer_state(parameter, value, key)
                    continue
                # DeepSpeed's own setter fails where the last rank's piece is shorter.
                piece = safe_get_local_optimizer_state(parameter, key)
                mine = value.flatten()[self._rank * piece.numel() :][: piece.numel()]
                piece[: mine.numel()] = mine
            self._read_and_send(step, f"{name}.step", folder)
        for piece in self._pieces:
            self._inner.state[piece]["step"].copy_(step)

    def synchronize(self) -> None:
        """Do nothing: `read` has sent everything."""

    def _whole_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in self.parameters.items():
            for key in _MOMENTS:
                yield f"{name}.{key}", safe_get_full_optimizer_state(parameter, key)
            yield f"{name}.step", self._inner.state[self._pieces[0]]["step"]

    def _share(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Copy every n-th of the whole tensors, one at a time, to the CPU."""
        kept = {}
        for number, (name, tensor) in enumerate(tensors):
            if number % self.world_size == self._rank:
                kept[name] = tensor.detach().to("cpu", copy=True)
        return kept

    def _read_and_send(self, tensor: torch.Tensor, name: str, folder: Path) -> torch.Tensor:
        error = None
        if self._rank == 0:
            try:
                read_tensors_into({name: tensor}, folder, "state")
            except InputError as found:
                error = str(found)
        errors = [error]
        dist.broadcast_object_list(errors)
        if errors[0]:
            raise InputError(errors[0])
        device = next(iter(self._pieces)).device
        sent = tensor.to(device)
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)
        return tensor

    def _apply(self) -> None:
        self.model.step()  # type: ignore[operator]

    def _gradients(self, parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
        found = []
        for parameter in parameters:
            if self._zero3:
                gradient = self.optimizer.get_local_fp32_grad_for_param(parameter)
            else:
                piece: Any = parameter._hp_mapping  # type: ignore[attr-defined]
                gradient = None
                if piece is not None:
                    index = parameter._index_in_param_group  # type: ignore[attr-defined]
                    gradient = piece.get_lp_grad_fragment(index)
            if gradient is not None:
                found.append(gradient)
        return found

    def _copies(self) -> int:
        return 1


def make_plugin(config: TrainingConfig, mixed_precision: str) -> DeepSpeedPlugin:
    """Make ZeRO-2 or ZeRO-3 as the accelerate YAML says, told what the loop does itself.

    Raises InputError for what DeepSpeed cannot do here.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "DeepSpeed is not installed: pip install qwen3-encdec[deepspeed], or launch with FSDP2"
        )
    plugin = DeepSpeedPlugin()
    refusal = None
    if plugin.zero_stage not in (2, 3):
        refusal = f"the training loop runs ZeRO stages 2 and 3, not {plugin.zero_stage}"
    elif config.ema_decay:
        refusal = "ema_decay needs named weights, and DeepSpeed's optimizer has flat pieces"
    elif mixed_precision != "no":
        refusal = "under DeepSpeed the loop trains with mixed_precision: no"
    if refusal:
        raise InputError(f"{refusal}; launch it with configs/accelerate_fsdp2.yaml")
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    if plugin.zero_stage == 3:
        # Ranks must gather alike, whatever batches they have seen.
        plugin.deepspeed_config["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
        }
    return plugin


def prepare_deepspeed(
    model: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> DeepSpeedState:
    """Hand a model and its optimizer to DeepSpeed's engine."""
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        import deepspeed

        deepspeed.utils.set_z3_leaf_modules(model, [GradientCheckpointingLayer])
    model, wrapped = accelerator.prepare(model, optimizer)
    return DeepSpeedState(model, wrapped.optimizer, accelerator)
