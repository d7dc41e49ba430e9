"""Where a run happens: the accelerator, with a gloo route for machines without a GPU.

Accelerate chooses no backend when ``accelerate launch`` starts several processes for FSDP on a machine without
an accelerator: each process then believes it is alone, and N independent runs write over each other. Here such
a launch shards over gloo on the CPU, and a launch whose processes have not found each other stops.
"""

import importlib.util
import os
import time
import warnings
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen3_encdec.files import InputError
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.state import DeepSpeedState, TrainingState


def allow_distributed_cpu() -> None:
    """Let accelerate run FSDP, or else DDP, over gloo when a launcher started us and no accelerator is there.

    Extends ``PartialState._prepare_backend``, a private method: where it finds a backend its choice stands.
    """
    original = PartialState._prepare_backend
    if getattr(original, "allows_distributed_cpu", False):
        return

    def prepare_backend(
        self: PartialState, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
    ) -> tuple[str | None, DistributedType]:
        chosen, kind = original(self, cpu, sagemaker_dp, backend)
        launched = int(os.environ.get("LOCAL_RANK", -1)) != -1 and int(os.environ.get("WORLD_SIZE", 1)) > 1
        if kind != DistributedType.NO or not launched or torch.accelerator.is_available():
            return chosen, kind
        self.device = torch.device("cpu")
        # FSDP is a refinement of MULTI_GPU in accelerate; plain data parallelism on CPUs has a type of its own.
        return "gloo", DistributedType.MULTI_GPU if _uses_fsdp() or _uses_deepspeed() else DistributedType.MULTI_CPU

    prepare_backend.allows_distributed_cpu = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = prepare_backend


def make_accelerator(config: TrainingConfig, logging_dir: str) -> Accelerator:
    """The accelerator of this launch, in ``config.mixed_precision`` over fp32 master weights.

    Under FSDP2, gradients are reduced in fp32 and outputs keep their dtype, whatever the accelerate YAML says,
    since accelerate's own choice rounds both to bf16. Raises InputError when the launcher's processes have not
    found each other, or for a way of distributing that this loop does not know.
    """
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's, about torch's own call
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing writes into it
    allow_distributed_cpu()
    mixed_precision: str = config.mixed_precision
    if mixed_precision == "auto":
        mixed_precision = "bf16" if torch.accelerator.is_available() else "no"
    plugin = None
    if _uses_fsdp():
        compute = torch.bfloat16 if mixed_precision == "bf16" else None
        plugin = FullyShardedDataParallelPlugin(
            mixed_precision_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        )
        if plugin.fsdp_version != 2:
            raise InputError("the training loop needs FSDP version 2; set fsdp_version: 2 in the accelerate config")
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
    """End this launch, so that a later one in this process may choose another precision or launcher."""
    over_gloo = accelerator.num_processes > 1 and accelerator.device.type == "cpu"
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if over_gloo:
        # DTensor's caches keep the process group, and its threads let go of a last tensor a little later than we do;
        # one that does so while the interpreter ends aborts the process (pytorch/pytorch#190489).
        time.sleep(0.1)


def prepare(model: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> TrainingState:
    """Shard or replicate a model and its optimizer as this launch wants it."""
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        import deepspeed

        # By layer, since the order of projections within one depends on a rank's batch, and all must gather alike.
        deepspeed.utils.set_z3_leaf_modules(model, [GradientCheckpointingLayer])
        deepspeed.zero.register_external_parameter(model, model.get_input_embeddings().weight)  # the head
    model, wrapped = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedState(model, wrapped.optimizer, accelerator)
    if accelerator.is_fsdp2:
        # Without a head module to see, accelerate frees the matrix after each lookup, but the loss multiplies by it.
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
        DistributedType.DEEPSPEED: "DeepSpeed ZeRO-" + os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "?"),
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
        raise InputError("DeepSpeed is not installed: pip install qwen3-encdec[deepspeed], or launch with FSDP2")
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage not in (2, 3):
        raise InputError(f"the training loop runs DeepSpeed's ZeRO stages 2 and 3, not {plugin.zero_stage}")
    for wrong, setting in [
        (config.optimizer == "muon", "optimizer: muon needs whole matrices, and DeepSpeed gives it flat pieces"),
        (config.ema_decay > 0, "ema_decay needs named weights, and DeepSpeed's optimizer has flat pieces"),
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
        # What a rank gathers ahead or keeps depends on the batches it has seen, but all ranks must gather alike.
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
