"""Plan a run from its sizes alone: parameters, operations, memory, bytes sent and hours.

The formulas are those of docs/scaling.md.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig, Qwen3Config

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.folders import InputError, resolve_checkpoint
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.flops import (
    DEVICES,
    MFU,
    Sizes,
    count_parameters,
    flops_per_sum,
    length_sums,
    peak_flops,
)

# Hidden and intermediate sizes, layers, query heads of the dense Qwen3 with 8 KV heads of 128.
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12288, 36, 32),
    "14B": (5120, 17408, 40, 40),
    "32B": (5120, 25600, 64, 64),
}
_CHUNK = 2048  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Machines:
    """Processes of a run, one a device, and the ``shards`` that divide the states among them.

    1 shard is DDP or one process. ``memory`` (bytes) and ``peak`` (FLOP/s) are of a device.
    """

    processes: int = 1
    shards: int = 1
    memory: float | None = None
    peak: float | None = None
    accelerator: bool = False

    def width(self, config: TrainingConfig) -> int:
        """Bytes of a number that is computed with."""
        bf16 = {"auto": self.accelerator, "bf16": True, "no": False}
        return 2 if bf16[config.mixed_precision] else 4


def qwen3_sizes(name: str) -> Qwen3EncoderDecoderConfig:
    """Return the pair's configuration of a Qwen3 by size (0.6B to 32B), folder or hub id."""
    size = re.fullmatch(r"(?:Qwen/)?(?:Qwen3-)?([\d.]+B)(?:-Base)?", name)
    if not size or size[1] not in QWEN3:
        source = AutoConfig.from_pretrained(resolve_checkpoint(name))
    else:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = dict(zip(names, QWEN3[size[1]], strict=True))
        source = Qwen3Config(num_key_value_heads=8, head_dim=128, vocab_size=151936, **sizes)
    try:
        return Qwen3EncoderDecoderConfig.from_qwen3_config(source)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def machines(accelerator: Accelerator, devices: str | None = None) -> Machines:
    """Return the machines of this launch, or ``8xH100`` (8 shards), ``4x8xH100`` (8 of 32, HSDP).

    Raises InputError for a count or a device that is not known.
    """
    if devices is not None:
        match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x(\w+)", devices)
        if not match or match[3] not in DEVICES:
            known = ", ".join(DEVICES)
            raise InputError(f"devices {devices!r} is not COUNTxNAME as in 8xH100; known: {known}")
        peak, memory = DEVICES[match[3]]
        return Machines(int(match[2]) * int(match[1] or 1), int(match[2]), memory, peak, True)
    processes, device = accelerator.num_processes, accelerator.device
    replicas = getattr(accelerator.parallelism_config, "dp_replicate_size", 1)
    shards = processes // replicas if accelerator.is_fsdp2 else 1
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return Machines(processes, shards, memory, peak_flops(device, 1), True)
    return Machines(processes, shards)


def memory(
    c: Qwen3EncoderDecoderConfig, sizes: Sizes, config: TrainingConfig, machines: Machines
) -> dict[str, float]:
    """Estimate a process's bytes by purpose at the peak of a step, with rows taken as full."""
    width, shards = machines.width(config), machines.shards
    hidden, queries = c.hidden_size, c.num_attention_heads * c.head_dim
    keys = c.num_key_value_heads * c.head_dim
    products = 2 * hidden + 2 * queries + 2 * keys + 3 * c.intermediate_size
    norms = 2 * (queries + keys) + 2 * hidden  # inputs and outputs that norms and rotation keep
    kept = {"full": hidden, True: hidden, "selective": hidden + products}
    per_token = kept.get(config.gradient_checkpointing, hidden + products + norms)
    source = config.batch_size * config.data.source_length
    target = config.batch_size * config.data.target_length
    encoder = source * c.num_hidden_layers * per_token
    decoder = target * c.num_decoder_layers * per_token
    if not config.gradient_checkpointing:
        decoder += source * c.num_decoder_layers * 3 * keys  # the source's keys and values
    layer = sizes.decoder / c.num_decoder_layers
    gathered = width * (2 * layer + sizes.embedding)
    cast = 2 * (sizes.encoder + sizes.decoder) if width == 2 else 0
    return {
        "weights": 4 * sizes.total / shards,
        "gradients": 4 * sizes.total / shards,
        "optimizer states": 8 * sizes.total / shards,
        "average of the weights": 4 * sizes.total / shards if config.ema_decay else 0.0,
        "gathered or cast weights": gathered if shards > 1 else cast,
        "activations": width * (encoder + decoder),
        "logits": (4 + width) * min(_CHUNK, target) * c.vocab_size + 4 * sizes.embedding,
    }


def communication(sizes: Sizes, config: TrainingConfig, machines: Machines) -> float:
    """Bytes that a process sends in an optimizer step, with rings.

    FSDP2 gathers layers twice and the matrix once and reduces in fp32, for every micro-batch; HSDP
    sums the shards of replicas too; DDP sums once a step.
    """
    shards, replicas = machines.shards, machines.processes // machines.shards
    if shards == 1:
        return 8 * sizes.total * (replicas - 1) / replicas
    gathered = machines.width(config) * (2 * (sizes.encoder + sizes.decoder) + sizes.embedding)
    inside = (gathered + 4 * sizes.total) * (shards - 1) / shards
    across = 8 * sizes.total / shards * (replicas - 1) / replicas
    return config.gradient_accumulation_steps * (inside + across)


def dry_run(
    c: Qwen3EncoderDecoderConfig,
    config: TrainingConfig,
    machines: Machines,
    show: Callable[[str], object],
    mfu: float = MFU,
) -> None:
    """Show what the run will cost on these machines, for full rows: figures are upper bounds.

    Raises InputError if a device's memory cannot hold it, or for an ``mfu`` that cannot be.
    """
    if not 0 < mfu <= 1:
        raise InputError(f"mfu {mfu} is not above 0 and at most 1")
    sizes, processes, steps = count_parameters(c), machines.processes, config.max_steps
    rows = config.batch_size * config.gradient_accumulation_steps * processes
    source, target = config.data.source_length, config.data.target_length
    tokens = rows * (source + target)
    work = rows * flops_per_sum(c, sizes) @ length_sums(np.array([source]), np.array([target]))
    parts = memory(c, sizes, config, machines)
    needed, sent = sum(parts.values()), communication(sizes, config, machines)
    stacks = f"encoder {sizes.encoder:,}, decoder {sizes.decoder:,}"
    shape = f"{rows:,} rows of {source} + {target}, {processes:,} devices"
    show(f"parameters        {sizes.total:,} ({stacks}, shared embedding {sizes.embedding:,})")
    show(f"tokens per step   {tokens:,} ({shape})")
    show(f"steps             {steps:,}, {tokens * steps:,} tokens")
    show(f"FLOPs             {work:.3e} a step, {work * steps:.3e} in all")
    show(f"memory            {needed / 2**30:.2f} GiB a device at its peak:")
    for name, size in parts.items():
        show(f"  {size / 2**30:12.3f} GiB  {name}")
    show(f"communication     {sent / 2**30:.2f} GiB sent a step and device")
    if machines.peak:
        seconds = work / (processes * machines.peak * mfu)
        hours = seconds * steps / 3600
        show(f"time              {hours:,.1f} hours, {seconds:.3f} s a step, at {mfu:.0%} MFU")
    if machines.memory and needed > machines.memory:
        raise InputError(
            f"batch_size={config.batch_size} needs {needed / 2**30:.1f} GiB a device and there are "
            f"{machines.memory / 2**30:.1f}; lower batch_size, set gradient_checkpointing, or "
            "shard over more devices"
        )
