"""Where a run happens: the accelerator, with a gloo route for machines without a GPU.

Accelerate chooses no backend when ``accelerate launch`` starts several processes for FSDP on a
machine without
an accelerator: each process then believes it is alone, and N independent runs write over each
other. Here such a launch shards over gloo on the CPU, and a launch whose processes have not found
each other stops.
"""

import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen3_encdec.folders import InputError
from qwen3_encdec.training.config import TrainingConfig

STACKS = ("encoder", "decoder", "embedding")


class TrainingState:
    """A prepared model and its optimizer.

    Methods that gather or reduce are called by every rank, in the same order.
    """

    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Accelerator) -> None:
        self.model, self.optimizer = model, optimizer
        self.module: Any = accelerator.unwrap_model(model)
        self.world_size = accelerator.num_processes
        self.parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        embedding = self.module.get_input_embeddings().weight
        self._stacks = [
            STACKS.index(
                "embedding" if p is embedding else "decoder" if ".decoder." in name else "encoder"
            )
            for name, p in self.parameters.items()
        ]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a micro-batch's gradients, whose mean over the ranks is taken at the ``last`` one at
        the latest.
        """
        loss.backward()

    def accumulating(self, last: bool) -> Any:
        """The context of a micro-batch:

        DDP reduces at the last one only. FSDP2 at each, to keep gradients sharded.
        """
        return (
            self.model.no_sync()
            if isinstance(self.model, DistributedDataParallel) and not last
            else nullcontext()
        )

    def squared_norms(self) -> torch.Tensor:
        """This rank's share of the squared gradient norms of the encoder, the decoder and the
        embedding, (3,) fp64.

        The shares' sum over all ranks is the square of the norm, the same bits everywhere.
        """
        squares = []
        gradients = [self._gradient(p) for p in self.parameters.values()]
        for stack in range(len(STACKS)):
            own = [
                g
                for g, of in zip(gradients, self._stacks, strict=True)
                if of == stack and g is not None
            ]
            squares.append(torch.nn.utils.get_total_norm(own).double() ** 2)
        return torch.stack(squares) / self._copies()

    def step(self, norm: float, max_norm: float) -> None:
        """Apply the gradients, whose norm is ``norm``, after clipping them to ``max_norm``;

        0 does not clip.
        """
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
        """(name, tensor) of each parameter, whole and fp32, the tied matrix once.

        Memory: one tensor at a time.
        """
        for name, parameter in self.parameters.items():
            yield name, _whole(parameter)

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """("PARAMETER.KEY", tensor) of whatever tensors the optimizer remembers, whole."""
        for name, parameter in self.parameters.items():
            for key, value in sorted(
                self.optimizer.state.get(parameter, {}).items()
            ):  # however it was filled
                yield f"{name}.{key}", _whole(value)

    def load_optimizer_state(self, keys: list[str], read: Callable[[str], torch.Tensor]) -> None:
        """Fill the optimizer: ``read`` gives the whole tensor of one of the ``keys``,
        "PARAMETER.KEY".

        Each rank reads all tensors, one at a time, and keeps its shards: no rank has to send any.
        """
        for full_key in keys:
            name, _, key = full_key.rpartition(".")
            parameter, value = (
                self.parameters[name],
                read(full_key).to(self.parameters[name].device),
            )
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                value = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
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
    """The same under ZeRO-2 and ZeRO-3, whose optimizers hold flat pieces of parameters and
    gradients.
    """

    def __init__(self, model: nn.Module, optimizer: Any, accelerator: Accelerator) -> None:
        super().__init__(model, optimizer, accelerator)
        self._inner, self._rank = (
            optimizer.optimizer,
            accelerator.process_index,
        )  # torch's own optimizer
        self._zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self._pieces = (
            optimizer.fp32_partitioned_groups_flat
            if self._zero3
            else optimizer.single_partition_of_fp32_groups
        )
        for piece in self._pieces:
            zeros = {key: torch.zeros_like(piece) for key in ("exp_avg", "exp_avg_sq")}
            self._inner.state[piece] = {"step": torch.zeros((), device=piece.device), **zeros}
        if self._zero3:
            # Batches without padding call this module, ragged ones its parts; with hooks, ranks'
            # orders would differ.
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
        # Its own way out: a step whose gradients are not finite drops them and changes nothing
        # else.
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
        return (
            None if piece is None else piece.get_lp_grad_fragment(parameter._index_in_param_group)
        )  # type: ignore[attr-defined]

    def _copies(self) -> int:
        return 1


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def allow_distributed_cpu() -> None:
    """Let accelerate run FSDP, or else DDP, over gloo when a launcher started us and no accelerator
    is there.

    Extends ``PartialState._prepare_backend``, a private method: where it finds a backend its choice
    stands.
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
        launched = (
            int(os.environ.get("LOCAL_RANK", -1)) != -1 and int(os.environ.get("WORLD_SIZE", 1)) > 1
        )
        if kind != DistributedType.NO or not launched or torch.accelerator.is_available():
            return chosen, kind
        self.device = torch.device("cpu")
        # FSDP is a refinement of MULTI_GPU in accelerate; plain data parallelism on CPUs has a type
        # of its own.
        return (
            "gloo",
            DistributedType.MULTI_GPU
            if _uses_fsdp() or _uses_deepspeed()
            else DistributedType.MULTI_CPU,
        )

    prepare_backend.allows_distributed_cpu = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = prepare_backend


def make_accelerator(config: TrainingConfig, logging_dir: str) -> Accelerator:
    """The accelerator of this launch, in ``config.mixed_precision`` over fp32 master weights.

    Under FSDP2, gradients are reduced in fp32 and outputs keep their dtype, whatever the accelerate
    YAML says, since accelerate's own choice rounds both to bf16. Raises InputError when the
    launcher's processes have not found each other, or for a way of distributing that this loop does
    not know.
    """
    warnings.filterwarnings(
        "ignore", message="'set_vital' is deprecated"
    )  # torchdata's, about torch's own call
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view"
    )  # nothing writes into it
    allow_distributed_cpu()
    mixed_precision: str = config.mixed_precision
    if mixed_precision == "auto":
        mixed_precision = "bf16" if torch.accelerator.is_available() else "no"
    plugin = None
    if _uses_fsdp():
        compute = torch.bfloat16 if mixed_precision == "bf16" else None
        plugin = FullyShardedDataParallelPlugin(
            mixed_precision_policy=MixedPrecisionPolicy(
                param_dtype=compute, reduce_dtype=torch.float32
            )
        )
        if plugin.fsdp_version != 2:
            raise InputError(
                "the training loop needs FSDP version 2; set fsdp_version: 2 in the accelerate config"
            )
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        deepspeed_plugin=_deepspeed(config, mixed_precision) if _uses_deepspeed() else None,
        fsdp_plugin=plugin,
        log_with=list(config.trackers) or None,
        project_dir=logging_dir,
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise InputError(
            f"the launcher started {launched} processes but accelerate sees {accelerator.num_processes}: each would "
            "train a model of its own; launch with configs/accelerate_fsdp2.yaml, or with --num_processes 1"
        )
    return accelerator


def release(accelerator: Accelerator) -> None:
    """End this launch, so that a later one in this process may choose another precision or
    launcher.
    """
    over_gloo = accelerator.num_processes > 1 and accelerator.device.type == "cpu"
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if over_gloo:
        # DTensor's caches keep the process group, and its threads let go of a last tensor a little
        # later than we do; one that does so while the interpreter ends aborts the process
        # (pytorch/pytorch#190489).
        time.sleep(0.1)


def prepare(
    model: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> TrainingState:
    """Shard or replicate a model and its optimizer as this launch wants it."""
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        import deepspeed

        # By layer, since the order of projections within one depends on a rank's batch, and all
        # must gather alike.
        deepspeed.utils.set_z3_leaf_modules(model, [GradientCheckpointingLayer])
        deepspeed.zero.register_external_parameter(
            model, model.get_input_embeddings().weight
        )  # the head
    model, wrapped = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedState(model, wrapped.optimizer, accelerator)
    if accelerator.is_fsdp2:
        # Without a head module to see, accelerate frees the matrix after each lookup, but the loss
        # multiplies by it.
        model.get_input_embeddings().set_reshard_after_forward(False)
    # accelerate's wrapper would only hide the real optimizer's state
    return TrainingState(model, wrapped.optimizer, accelerator)


def describe(accelerator: Accelerator) -> str:
    """One phrase for the log, such as ``world size 2, FSDP2, cpu/gloo, compute fp32``."""
    kinds: dict[Any, str] = {
        DistributedType.NO: "one process",
        DistributedType.FSDP: "FSDP2",
        DistributedType.MULTI_GPU: "DDP",
        DistributedType.MULTI_CPU: "DDP",
        DistributedType.DEEPSPEED: "DeepSpeed ZeRO-"
        + os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "?"),
    }
    kind = kinds.get(accelerator.distributed_type, str(accelerator.distributed_type))
    backend = f"/{torch.distributed.get_backend()}" if torch.distributed.is_initialized() else ""
    compute = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    return f"world size {accelerator.num_processes}, {kind}, {accelerator.device.type}{backend}, compute {compute}"


def _deepspeed(config: TrainingConfig, mixed_precision: str) -> DeepSpeedPlugin:
    """ZeRO-2 or ZeRO-3 as the accelerate YAML says, told what the loop does itself."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "DeepSpeed is not installed: pip install qwen3-encdec[deepspeed], or launch with FSDP2"
        )
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage not in (2, 3):
        raise InputError(
            f"the training loop runs DeepSpeed's ZeRO stages 2 and 3, not {plugin.zero_stage}"
        )
    for wrong, setting in [
        (
            config.optimizer == "muon",
            "optimizer: muon needs whole matrices, and DeepSpeed gives it flat pieces",
        ),
        (
            config.ema_decay > 0,
            "ema_decay needs named weights, and DeepSpeed's optimizer has flat pieces",
        ),
        (mixed_precision != "no", "under DeepSpeed the loop trains with mixed_precision: no"),
    ]:
        if wrong:
            raise InputError(f"{setting}; launch it with configs/accelerate_fsdp2.yaml")
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    if plugin.zero_stage == 3:
        # What a rank gathers ahead or keeps depends on the batches it has seen, but all ranks must
        # gather alike.
        plugin.deepspeed_config["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
        }
    return plugin


def _uses_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _uses_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


_MATRIX_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
)


def prepare_layers(model: nn.Module, config: TrainingConfig) -> None:
    """Recompute and compile the layers of ``model`` as ``config`` says; call it before the model is
    sharded.

    A layer is compiled for every length at once. On a CPU, attention over a packed row walks
    through its documents
    and stays outside: norms, projections, rotation and MLP are compiled there, or nothing
    in layers that are recomputed.
    """
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if config.gradient_checkpointing:
        recompute = partial(checkpoint, use_reentrant=False)
        if config.gradient_checkpointing == "selective":
            recompute = partial(
                recompute, context_fn=partial(create_selective_checkpoint_contexts, _policy)
            )
        for layer in layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, recompute
    if config.compile:
        for layer in layers:
            layer.compile(dynamic=True)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute: matrix products and attention, by whichever kernel."""
    if (
        operator in _MATRIX_PRODUCTS
        or "attention" in str(operator)
        or "varlen_attn" in str(operator)
    ):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
