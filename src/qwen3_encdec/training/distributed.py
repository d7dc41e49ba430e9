"""Launch a run on the available devices and hold its model and optimizer."""

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType, PartialState, utils
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qwen3_encdec.folders import InputError, read_json
from qwen3_encdec.training.config import TrainingConfig

STACKS = {"encoder": "model.encoder.", "decoder": "model.decoder.", "embedding": "model.shared."}
Tensors = dict[str, torch.Tensor]

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")
warnings.filterwarnings("ignore", message="`log_with=")  # `start.check_settings` says it
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # only read


class TrainingState:
    """Hold a prepared model and its optimizer; every rank calls the same methods."""

    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Accelerator) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.module: Any = accelerator.unwrap_model(model)
        self.parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        saved = self.module.state_dict()
        buffers = {name: b for name, b in self.module.named_buffers() if name in saved}
        self.saved: Tensors = {**self.parameters, **buffers}

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Return the context of a micro-batch: DDP reduces only at the last one, FSDP2 at each."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients; after the last one they are averaged over ranks."""
        loss.backward()

    def gradients(self, prefix: str = "") -> list[Any]:
        """Return gradients, sharded or not, of parameters whose names start with ``prefix``."""
        found = [p.grad for name, p in self.parameters.items() if name.startswith(prefix)]
        return [gradient for gradient in found if gradient is not None]

    def squared_norms(self) -> torch.Tensor:
        """Return the squared gradient norms of the `STACKS`, (3,) fp64, the same on all ranks."""
        norms: list[Any] = []
        for prefix in STACKS.values():
            norm = nn.utils.get_total_norm(self.gradients(prefix))
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return torch.stack(norms).double() ** 2

    def step(self, norm: float, max_norm: float) -> None:
        """Apply the gradients, whose norm is ``norm``, clipped to ``max_norm``; 0 does not clip."""
        if 0 < max_norm < norm:
            parameters = self.parameters.values()
            nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def weights(self) -> Tensors:
        """Return parameters and persistent buffers by name, the tied matrix once."""
        self.module.state_dict()  # reshards what an evaluation has left gathered
        return {name: tensor.detach() for name, tensor in self.saved.items()}

    def optimizer_state(self) -> Tensors:
        """Return the optimizer's own tensors as PARAMETER.KEY, creating them if there are none."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        flat: Any = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return {k.removeprefix("state."): v for k, v in flat.items() if k.startswith("state.")}

    def read(self, folder: Path) -> None:
        """Fill weights and optimizer from a checkpoint; one rank reads each shard and sends it.

        Raises InputError on all ranks if the checkpoint is damaged.
        """
        state = self.optimizer_state()
        for tensors, place in ((self.weights(), folder), (state, folder / "state")):
            own = assigned(tensors)
            with shared_errors():
                read_tensors(own, place)
            verify(checksums(own), folder)
            for number, (name, tensor) in enumerate(tensors.items()):
                for group in _replicas(tensor):
                    self.receive(name, tensor, group, _turn(number, group))

    def receive(self, name: str, tensor: torch.Tensor, group: Any, sender: int) -> None:
        """Fill a tensor, or this rank's shard, with what the sender of its group has read."""
        dist.broadcast(_local(tensor), group=group, group_src=sender)


def assigned(tensors: Tensors) -> Tensors:
    """Return the tensors, or shards, that this rank writes and reads for all that hold them.

    Ranks that hold the same values take turns, tensor by tensor.
    """
    own: Tensors = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        groups = _replicas(tensor)
        if all(_turn(number, group) == dist.get_rank(group) for group in groups):
            own[name] = tensor
    return own


def _turn(number: int, group: Any) -> int:
    """Return the rank of a group that writes and reads tensor ``number`` for the others."""
    return number % dist.get_world_size(group)


def read_tensors(tensors: Tensors, folder: Path) -> None:
    """Fill tensors, sharded or not, from safetensors. Raises InputError if that fails."""
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # safetensors and torch raise many types
        raise InputError(_reason(error)) from None


def checksums(tensors: Tensors) -> dict[str, int]:
    """Sum the 32-bit words of each tensor; sums of shards add up to that of the whole tensor."""
    words = {name: _local(t).detach().flatten().view(torch.int32) for name, t in tensors.items()}
    return {name: int(word.sum(dtype=torch.int64)) for name, word in words.items()}


def verify(own: dict[str, int], folder: Path) -> None:
    """Raise InputError on all ranks if the checksums of what they read are not those written."""
    written: Counter[str] = Counter()
    for file in (folder / "state").glob("rank-*.json"):
        written.update(read_json(file).get("checksums", {}))
    read: Counter[str] = Counter()
    for part in utils.gather_object([own]):
        read.update(part)
    for name in read if written else ():
        if read[name] != written[name]:
            raise InputError(f"{name} does not match its checksum")


@contextmanager
def shared_errors(group: Any = None, kind: type[BaseException] = InputError) -> Iterator[None]:
    """Raise any rank's error in the block as an InputError on all ranks."""
    error = None
    try:
        yield
    except kind as found:
        error = _reason(found)
    errors: list[Any] = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, error, group=group)
    for message in filter(None, errors):
        raise InputError(message)


@contextmanager
def launched(config: TrainingConfig) -> Iterator[Accelerator]:
    """Create this launch's accelerator and reset its state at the end, so another can follow.

    Under FSDP2, gradients are reduced in fp32; accelerate alone would round them. Raises InputError
    for a launch that the loop cannot run.
    """
    # Read when CUDA starts. Without it, batches of varying length fragment memory. torch reads only
    # one of these names, and which one first depends on its version.
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"
    allow_distributed_cpu()
    precision: str = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if _computes_bfloat16() else "no"
    ddp = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    # NCCL's own limit of ten minutes would end a run before the stall guard does. torch counts
    # milliseconds, in places with 32 bits: 20 days.
    limit = max(1800, min(2 * config.stall_seconds or math.inf, 20 * 86400))
    accelerator = Accelerator(
        cpu=torch.backends.mps.is_available(),  # Apple's GPUs have no float64
        mixed_precision=precision,
        kwargs_handlers=[
            utils.DistributedDataParallelKwargs(**ddp),
            utils.InitProcessGroupKwargs(timeout=timedelta(seconds=limit)),
        ],
        log_with=list(config.trackers) or None,
        project_dir=str(Path(config.output_dir) / "trackers"),
        **_plugins(config, precision),
    )
    started, seen = int(os.environ.get("WORLD_SIZE", 1)), accelerator.num_processes
    try:
        if started != seen:
            raise InputError(
                f"the launcher started {started} processes but accelerate sees {seen}, so each "
                "would train its own model; launch with configs/accelerate_fsdp2.yaml, or with "
                "--num_processes 1"
            )
        yield accelerator
    finally:
        with suppress(Exception):  # errors of trackers
            accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        # A gloo thread that frees a tensor while the interpreter exits aborts the process
        # (pytorch/pytorch#190489).
        time.sleep(0.1 if seen > 1 else 0)


def _plugins(config: TrainingConfig, precision: str) -> dict[str, Any]:
    """Build accelerate's plugins for FSDP2 or DeepSpeed from what its launcher has set."""
    plugins: dict[str, Any] = {}
    if _uses("FSDP"):
        compute = torch.bfloat16 if precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        plugin = utils.FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
        if plugin.fsdp_version != 2:
            raise InputError("training needs fsdp_version: 2 in the accelerate config")
        plugins["fsdp_plugin"] = plugin
    if _uses("PARALLELISM_CONFIG"):
        ranks, prefix = int(os.environ.get("WORLD_SIZE", 1)), "PARALLELISM_CONFIG_DP_"
        sizes = [int(os.environ.get(f"{prefix}{n}_SIZE", 1)) for n in ("REPLICATE", "SHARD")]
        if math.prod(sizes) != ranks:
            raise InputError(
                f"dp_replicate_size {sizes[0]} x dp_shard_size {sizes[1]} must be the number of "
                f"processes, {ranks}; pass --parallelism_config_dp_replicate_size and "
                "--parallelism_config_dp_shard_size"
            )
    if _uses("DEEPSPEED"):
        if not torch.accelerator.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read on import
        from qwen3_encdec.training.deepspeed import make_plugin

        plugins["deepspeed_plugin"] = make_plugin(config, precision)
    return plugins


def prepare(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> TrainingState:
    """Shard or replicate a model and its optimizer for this launch."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from qwen3_encdec.training.deepspeed import prepare_deepspeed

        return prepare_deepspeed(model, optimizer, accelerator)
    model, wrapped = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        # Two lookups and the loss use this matrix in each pass: keep it gathered in between.
        model.get_input_embeddings().set_reshard_after_forward(False)  # type: ignore[operator]
    # accelerate's wrapper would only hide the real optimizer's state
    return TrainingState(model, wrapped.optimizer, accelerator)


def allow_distributed_cpu() -> None:
    """Let accelerate use gloo when a launcher starts processes without a GPU.

    Otherwise it chooses no backend, and each process trains alone.
    """
    original = PartialState._prepare_backend
    if original.__module__ == __name__:
        return

    def prepare_backend(self: PartialState, *given: Any, **options: Any) -> tuple[Any, Any]:
        found = original(self, *given, **options)
        launched = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ
        if found[1] != DistributedType.NO or not launched or torch.accelerator.is_available():
            return found
        self.device = torch.device("cpu")
        # accelerate derives FSDP and DeepSpeed from MULTI_GPU.
        refined = _uses("FSDP") or _uses("DEEPSPEED")
        return "gloo", DistributedType.MULTI_GPU if refined else DistributedType.MULTI_CPU

    PartialState._prepare_backend = prepare_backend


def _computes_bfloat16() -> bool:
    """Return True if training takes a device that computes bfloat16 natively."""
    if _uses("CPU"):
        return False
    if torch.cuda.is_available():  # packed attention has no kernel for older ones
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.accelerator.is_available() and not torch.backends.mps.is_available()


def _uses(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _replicas(tensor: torch.Tensor) -> list[Any]:
    """Return the process groups whose members hold the same values of a tensor."""
    if not dist.is_initialized():
        return []
    if not isinstance(tensor, DTensor):
        return [dist.group.WORLD]
    placements = enumerate(tensor.placements)
    return [tensor.device_mesh.get_group(i) for i, place in placements if place.is_replicate()]


def _reason(error: BaseException) -> str:
    """Return an error's message in one line, unwrapped from a torch checkpoint exception."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
