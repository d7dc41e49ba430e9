"""The training state, whole: parameters, optimizer and gradients of a plain, DDP, FSDP2 or DeepSpeed run.

Everything outside sees whole tensors under the parameters' own names, so that a checkpoint says nothing about the
number or kind of processes that wrote it. ``torch.distributed.checkpoint`` is not used for the files: its format has
a pickled index, and cannot be read by ``from_pretrained``.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

STACKS = ("encoder", "decoder", "embedding")


class TrainingState:
    """A prepared model and its optimizer. Methods that gather or reduce are called by every rank, in the same order."""

    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Accelerator) -> None:
        self.model, self.optimizer = model, optimizer
        self.module: Any = accelerator.unwrap_model(model)
        self.world_size = accelerator.num_processes
        self.parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        embedding = self.module.get_input_embeddings().weight
        self._stacks = [
            STACKS.index("embedding" if p is embedding else "decoder" if ".decoder." in name else "encoder")
            for name, p in self.parameters.items()
        ]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a micro-batch's gradients, whose mean over the ranks is taken at the ``last`` one at the latest."""
        loss.backward()

    def accumulating(self, last: bool) -> Any:
        """The context of a micro-batch: DDP reduces at the last one only. FSDP2 at each, to keep gradients sharded."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else nullcontext()

    def squared_norms(self) -> torch.Tensor:
        """This rank's share of the squared gradient norms of the encoder, the decoder and the embedding, (3,) fp64.

        The shares' sum over all ranks is the square of the norm, the same bits everywhere.
        """
        squares = []
        gradients = [self._gradient(p) for p in self.parameters.values()]
        for stack in range(len(STACKS)):
            own = [g for g, of in zip(gradients, self._stacks, strict=True) if of == stack and g is not None]
            squares.append(torch.nn.utils.get_total_norm(own).double() ** 2)
        return torch.stack(squares) / self._copies()

    def step(self, norm: float, max_norm: float) -> None:
        """Apply the gradients, whose norm is ``norm``, after clipping them to ``max_norm``; 0 does not clip."""
        if max_norm and norm > max_norm:
            own = [g for g in map(self._gradient, self.parameters.values()) if g is not None]
            torch._foreach_mul_(own, max_norm / (norm + 1e-6))
        self._apply()

    def _apply(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of each parameter, whole and fp32, the tied matrix once. Memory: one tensor at a time."""
        for name, parameter in self.parameters.items():
            yield name, _whole(parameter)

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """("PARAMETER.KEY", tensor) of whatever tensors the optimizer remembers, whole."""
        for name, parameter in self.parameters.items():
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):  # however it was filled
                yield f"{name}.{key}", _whole(value)

    def load_optimizer_state(self, keys: list[str], read: Callable[[str], torch.Tensor]) -> None:
        """Fill the optimizer: ``read`` gives the whole tensor of one of the ``keys``, "PARAMETER.KEY".

        Each rank reads all tensors, one at a time, and keeps its shards: no rank has to send any.
        """
        for full_key in keys:
            name, _, key = full_key.rpartition(".")
            parameter, value = self.parameters[name], read(full_key).to(self.parameters[name].device)
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            self.optimizer.state[parameter][key] = value

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """This rank's part of a gradient, such that writing into it changes the gradient."""
        gradient = parameter.grad
        return gradient.to_local() if isinstance(gradient, DTensor) else gradient

    def _copies(self) -> int:
        """How many ranks hold the same part of a gradient."""
        first = next(iter(self.parameters.values()))
        if not isinstance(first, DTensor):
            return self.world_size
        mesh, copies = first.device_mesh, 1
        for size, placement in zip(mesh.shape, first.placements, strict=True):
            copies *= size if isinstance(placement, Replicate) else 1
        return copies


class DeepSpeedState(TrainingState):
    """The same under ZeRO-2 and ZeRO-3, whose optimizers hold flat pieces of parameters and gradients."""

    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Accelerator) -> None:
        super().__init__(model, optimizer, accelerator)
        self._inner, self._rank = optimizer.optimizer, accelerator.process_index  # torch's own optimizer
        self._zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self._pieces = (
            optimizer.fp32_partitioned_groups_flat if self._zero3 else optimizer.single_partition_of_fp32_groups
        )
        for piece in self._pieces:
            zeros = {key: torch.zeros_like(piece) for key in ("exp_avg", "exp_avg_sq")}
            self._inner.state[piece] = {"step": torch.zeros((), device=piece.device), **zeros}
        if self._zero3:
            # Batches without padding call this module, ragged ones its parts; with hooks, ranks' orders would differ.
            for hooks in (self.module.model._forward_hooks, self.module.model._forward_pre_hooks):
                hooks.clear()
        else:  # it notes where moments are when it has stepped the first group, and misses the others
            optimizer._lazy_init_hp_params_optimizer_state()

    def accumulating(self, last: bool) -> Any:
        """Tell the engine when to reduce."""
        self.model.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """As there."""
        self.model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]

    def _apply(self) -> None:
        self.model.step()  # type: ignore[operator]

    def discard(self) -> None:
        """Drop the gradients."""
        # Its own way out: a step whose gradients are not finite drops them and changes nothing else.
        for gradient in map(self._gradient, self.parameters.values()):
            if gradient is not None:
                gradient.fill_(float("nan"))
        self.model.step()  # type: ignore[operator]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As there."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.parameters.items():
            yield name, safe_get_full_fp32_param(parameter)

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As there, under the keys of torch's AdamW."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                yield f"{name}.{key}", safe_get_full_optimizer_state(parameter, key)
            yield f"{name}.step", self._inner.state[self._pieces[0]]["step"]

    def load_optimizer_state(self, keys: list[str], read: Callable[[str], torch.Tensor]) -> None:
        """As there."""
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_full_optimizer_state

        for full_key in keys:
            name, _, key = full_key.rpartition(".")
            parameter = self.parameters[name]
            if key == "step":
                continue
            whole = read(full_key).to(parameter.device)
            if self._zero3:  # DeepSpeed's own setter fails where the last rank's piece is shorter
                piece = safe_get_local_optimizer_state(parameter, key)
                mine = whole.flatten()[self._rank * piece.numel() :][: piece.numel()]
                piece[: mine.numel()] = mine
            else:
                safe_set_full_optimizer_state(parameter, whole, key)
        step = read(next(key for key in keys if key.endswith(".step")))
        for piece in self._pieces:
            self._inner.state[piece]["step"].copy_(step)

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor | None:
        if self._zero3:
            return self.optimizer.get_local_fp32_grad_for_param(parameter)
        piece = parameter._hp_mapping  # type: ignore[attr-defined]
        return None if piece is None else piece.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]

    def _copies(self) -> int:
        return 1


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
