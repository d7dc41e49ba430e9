"""Launch a run on whatever devices there are and hold its model and optimizer.

Accelerate chooses no backend for several processes on a machine without an accelerator: each then
believes it is alone. Here they use gloo, and processes that have not found each other stop.
"""

import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    gather_object,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qwen3_encdec.folders import InputError, read_json
from qwen3_encdec.training.checkpoint import read_tensors_into
from qwen3_encdec.training.config import TrainingConfig

STACKS = ("encoder", "decoder", "embedding")


class TrainingState:
    """Hold a prepared model and its optimizer; every rank calls the same methods."""

    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Accelerator) -> None:
        self.model, self.optimizer = model, optimizer
        self.module: Any = accelerator.unwrap_model(model)
        self.world_size = accelerator.num_processes
        self.loaded: Path | None = None
        self.parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        embedding = self.module.get_input_embeddings().weight
        self._stacks: dict[str, list[nn.Parameter]] = {stack: [] for stack in STACKS}
        for name, parameter in self.parameters.items():
            stack = "decoder" if ".decoder." in name else "encoder"
            self._stacks["embedding" if parameter is embedding else stack].append(parameter)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Return the context of a micro-batch: DDP reduces at the last one only, FSDP2 at each."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a micro-batch's gradients; their mean over the ranks is taken by the ``last`` one."""
        loss.backward()

    def squared_norms(self) -> torch.Tensor:
        """Return this rank's summand of each of the `STACKS`' squared gradient norms, (3,) fp64."""
        squares = []
        for parameters in self._stacks.values():
            norm = torch.nn.utils.get_total_norm(self._gradients(parameters))
            squares.append(norm.double() ** 2)
        return torch.stack(squares) / self._copies()

    def step(self, norm: float, max_norm: float) -> None:
        """Apply gradients of this norm, clipped to ``max_norm``; 0 does not clip."""
        if max_norm and norm > max_norm:
            own = self._gradients(self.parameters.values())
            torch._foreach_mul_(own, max_norm / (norm + 1e-6))
        self._apply()

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return parameters and persistent buffers by name, the tied matrix once."""
        saved = set(self.module.state_dict())
        buffers = {n: b for n, b in self.module.named_buffers() if n in saved}
        return {name: p.detach() for name, p in self.parameters.items()} | buffers

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's own tensors as PARAMETER.KEY, made if there are none yet."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        flat: Any = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return {k.removeprefix("state."): v for k, v in flat.items() if k.startswith("state.")}

    def read(self, folder: Path) -> None:
        """Fill weights and optimizer from a checkpoint; `synchronize` must follow.

        A shard is read by one rank. Raises InputError if the checkpoint is damaged.
        """
        read_tensors_into(self._read_here(self.weights()), folder)
        state = self.optimizer_state()
        if not read_json(folder / "state/training.json")["config"]["ema_decay"]:
            state = {name: t for name, t in state.items() if not name.endswith(".ema")}
        read_tensors_into(self._read_here(state), folder, "state")

    def synchronize(self) -> None:
        """Send what one rank has read to those that hold the same shard."""
        for tensor in (self.weights() | self.optimizer_state()).values():
            for group in _replicas(tensor):
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                dist.broadcast(local, group=group, group_src=0)

    def _read_here(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of the tensors that this rank is the first to hold."""
        first = {}
        for name, tensor in tensors.items():
            if all(dist.get_rank(group) == 0 for group in _replicas(tensor)):
                first[name] = tensor
        return first

    def _apply(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _gradients(self, parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
        """This rank's parts of gradients, such that writing into them changes the gradients."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]

    def _copies(self) -> int:
        """Number of ranks that hold the same part of a gradient."""
        copies = 1
        for group in _replicas(next(iter(self.parameters.values()))):
            copies *= dist.get_world_size(group)
        return copies


def _replicas(tensor: torch.Tensor) -> list[Any]:
    """The process groups whose members hold the same values of a tensor."""
    if not dist.is_initialized():
        return []
    if not isinstance(tensor, DTensor):
        return [dist.group.WORLD]
    placements = enumerate(tensor.placements)
    return [tensor.device_mesh.get_group(i) for i, place in placements if place.is_replicate()]


def make_accelerator(config: TrainingConfig, logging_dir: str) -> Accelerator:
    """Make the accelerator of this launch, in ``config.mixed_precision`` over fp32 weights.

    Under FSDP2, gradients are reduced in fp32 and outputs keep their dtype: accelerate's own choice
    rounds both to bf16. Raises InputError for a launch that this loop cannot run.
    """
    # Nothing writes into the view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    # Read when CUDA starts: batches of ever new lengths would leave holes.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    allow_distributed_cpu()
    precision: str = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if torch.accelerator.is_available() else "no"
    plugins: dict[str, Any] = {}
    if _uses("FSDP"):
        compute = torch.bfloat16 if precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
        if plugins["fsdp_plugin"].fsdp_version != 2:
            raise InputError("training needs fsdp_version: 2 in the accelerate config")
    if _uses("DEEPSPEED"):
        from qwen3_encdec.training.deepspeed import make_plugin

        plugins["deepspeed_plugin"] = make_plugin(config, precision)
    accelerator = Accelerator(
        mixed_precision=precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
        log_with=list(config.trackers) or None,
        project_dir=logging_dir,
        **plugins,
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise InputError(
            f"the launcher started {launched} processes but accelerate sees "
            f"{accelerator.num_processes}: each would train a model of its own; launch with "
            "configs/accelerate_fsdp2.yaml, or with --num_processes 1"
        )
    return accelerator


def prepare(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> TrainingState:
    """Shard or replicate a model and its optimizer as this launch wants it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from qwen3_encdec.training.deepspeed import prepare_deepspeed

        return prepare_deepspeed(model, optimizer, accelerator)
    model, wrapped = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        # Lookups and loss use the matrix three times in a pass: keep it gathered meanwhile.
        model.get_input_embeddings().set_reshard_after_forward(False)  # type: ignore[operator]
    # accelerate's wrapper would only hide the real optimizer's state
    return TrainingState(model, wrapped.optimizer, accelerator)


def release(accelerator: Accelerator) -> None:
    """End this launch, so that a later one in this process may choose another launcher."""
    over_gloo = accelerator.num_processes > 1 and accelerator.device.type == "cpu"
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if over_gloo:
        # A thread of gloo's that lets go of a tensor while the interpreter ends aborts the process
        # (pytorch/pytorch#190489).
        time.sleep(0.1)


@contextmanager
def together() -> Iterator[None]:
    """Raise an InputError of any rank within the block on all of them."""
    error = None
    try:
        yield
    except InputError as found:
        error = str(found)
    errors = [text for text in gather_object([error]) if text]
    if errors:
        raise InputError(errors[0])


def describe(accelerator: Accelerator) -> str:
    """Describe the launch, such as ``world size 2, FSDP2, cpu/gloo, compute fp32``."""
    kinds = {
        "NO": "one process",
        "FSDP": "FSDP2",
        "DEEPSPEED": f"DeepSpeed ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE')}",
    }
    kind = kinds.get(accelerator.distributed_type.value, "DDP")
    device = accelerator.device.type
    if dist.is_initialized():
        device += f"/{dist.get_backend()}"
    compute = accelerator.mixed_precision.replace("no", "fp32")
    return f"world size {accelerator.num_processes}, {kind}, {device}, compute {compute}"


def allow_distributed_cpu() -> None:
    """Let accelerate run FSDP, or else DDP, over gloo when a launcher started us without a GPU.

    Extends ``PartialState._prepare_backend``, a private method, where it finds no backend.
    """
    original = PartialState._prepare_backend
    if getattr(original, "allows_distributed_cpu", False):
        return

    def prepare_backend(
        self: PartialState,
        cpu: bool = False,
        sagemaker_dp: bool = False,
        backend: str | None = None,
    ) -> tuple[str | None, DistributedType]:
        chosen, kind = original(self, cpu, sagemaker_dp, backend)
        launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
        if kind != DistributedType.NO or not launched or torch.accelerator.is_available():
            return chosen, kind
        self.device = torch.device("cpu")
        # To accelerate FSDP is a refinement of MULTI_GPU.
        refined = _uses("FSDP") or _uses("DEEPSPEED")
        return "gloo", DistributedType.MULTI_GPU if refined else DistributedType.MULTI_CPU

    prepare_backend.allows_distributed_cpu = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = prepare_backend


def _uses(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
