"""Where a run happens: the accelerator, with a gloo route for machines without a GPU.

Accelerate chooses no backend when ``accelerate launch`` starts several processes for FSDP on a machine without
an accelerator: each process then believes it is alone, and N independent runs write over each other. Here such
a launch shards over gloo on the CPU, and a launch whose processes have not found each other stops.
"""

import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from qwen3_encdec.files import InputError


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
        return "gloo", DistributedType.MULTI_GPU if _uses_fsdp() else DistributedType.MULTI_CPU

    prepare_backend.allows_distributed_cpu = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = prepare_backend


def make_accelerator(mixed_precision: str, trackers: list[str], logging_dir: str) -> Accelerator:
    """The accelerator of this launch. ``mixed_precision``: "auto", "no" or "bf16" over fp32 master weights.

    Under FSDP2, gradients are reduced in fp32 and outputs keep their dtype, whatever the accelerate YAML says,
    since accelerate's own choice rounds both to bf16. Raises InputError when the launcher's processes have not
    found each other, or for a way of distributing that this loop does not know.
    """
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's, about torch's own call
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing writes into it
    allow_distributed_cpu()
    if mixed_precision == "auto":
        mixed_precision = "bf16" if torch.accelerator.is_available() else "no"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError("the training loop does not run under DeepSpeed; launch it with configs/accelerate_fsdp2.yaml")
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
        fsdp_plugin=plugin,
        log_with=list(trackers) or None,
        project_dir=logging_dir,
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise InputError(
            f"the launcher started {launched} processes but accelerate sees {accelerator.num_processes}: each would "
            "train a model of its own; launch with configs/accelerate_fsdp2.yaml, or with --num_processes 1"
        )
    return accelerator


def describe(accelerator: Accelerator) -> str:
    """One phrase for the log, such as ``world size 2, FSDP2, cpu/gloo, compute fp32``."""
    kinds: dict[Any, str] = {
        DistributedType.NO: "one process",
        DistributedType.FSDP: "FSDP2",
        DistributedType.MULTI_GPU: "DDP",
        DistributedType.MULTI_CPU: "DDP",
    }
    kind = kinds.get(accelerator.distributed_type, str(accelerator.distributed_type))
    backend = f"/{torch.distributed.get_backend()}" if torch.distributed.is_initialized() else ""
    compute = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    return f"world size {accelerator.num_processes}, {kind}, {accelerator.device.type}{backend}, compute {compute}"


def _uses_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
