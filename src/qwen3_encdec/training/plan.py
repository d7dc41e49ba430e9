"""Estimate a run's cost from its sizes alone, with the formulas of docs/scaling.md."""

import json
import math
import re
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from accelerate import Accelerator

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.folders import InputError, load_config
from qwen3_encdec.training import flops
from qwen3_encdec.training.config import TrainingConfig, config_to_dict, flatten
from qwen3_encdec.training.distributed import launched
from qwen3_encdec.training.start import check_settings

MFU = 0.29  # share of an H100's peak, measured for the 0.6B pair
# Dense bf16 peak in FLOP/s and memory in bytes, from the vendors' data sheets.
DEVICES = {"H100": (989e12, 80e9), "H200": (989e12, 141e9), "A100": (312e12, 80e9)}


class Machines(NamedTuple):
    """Number of processes (one per device) and of shards (1 is DDP); figures of one device."""

    processes: int = 1
    shards: int = 1
    memory: float | None = None  # bytes
    peak: float | None = None  # FLOP/s


def machines(accelerator: Accelerator, devices: str | None = None) -> Machines:
    """Return this launch's machines, or parse ``8xH100``, or REPLICASxSHARDSxNAME."""
    if devices is None:
        processes, device = accelerator.num_processes, accelerator.device
        replicas = getattr(accelerator.parallelism_config, "dp_replicate_size", 1)
        shards = processes // replicas if accelerator.is_fsdp2 else 1
        if device.type != "cuda":
            return Machines(processes, shards)
        gpu = torch.cuda.get_device_properties(device)
        peak = next((DEVICES[name][0] for name in DEVICES if name in gpu.name), None)
        return Machines(processes, shards, gpu.total_memory, peak)
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x(\w+)", devices)
    if not match or match[3] not in DEVICES:
        known = ", ".join(DEVICES)
        raise InputError(f"devices {devices!r} is not as in 8xH100 or 8x1xH100; known: {known}")
    shards, (peak, size) = int(match[2]), DEVICES[match[3]]
    return Machines(shards * int(match[1] or 1), shards, size, peak)


def _width(config: TrainingConfig, machines: Machines) -> int:
    """Return the bytes of a computed value; "auto" is bf16 on a GPU."""
    bf16 = {"auto": machines.memory is not None, "bf16": True, "no": False}
    return 2 if bf16[config.mixed_precision] else 4


def memory(
    c: Qwen3EncoderDecoderConfig, sizes: flops.Sizes, config: TrainingConfig, machines: Machines
) -> dict[str, float]:
    """Estimate a process's peak bytes in a step by purpose, assuming full rows."""
    wide, states = _width(config, machines), sum(sizes) / machines.shards
    hidden, queries = c.hidden_size, c.num_attention_heads * c.head_dim
    keys = c.num_key_value_heads * c.head_dim
    products = 2 * (hidden + queries + keys) + 3 * c.intermediate_size
    norms = 2 * (hidden + queries + keys)  # saved inputs and outputs of norms and RoPE
    kept = {False: hidden + products + norms, "selective": hidden + products}
    per_token = kept.get(config.gradient_checkpointing, hidden)
    source = config.batch_size * config.data.source_length
    target = config.batch_size * config.data.target_length
    activations = (source * c.num_hidden_layers + target * c.num_decoder_layers) * per_token
    if not config.gradient_checkpointing:
        activations += source * c.num_decoder_layers * 3 * keys  # the source's keys and values
    gathered = wide * (2 * sizes.decoder / c.num_decoder_layers + sizes.embedding)
    cast = (4 - wide) * (sizes.encoder + sizes.decoder)
    return {
        "weights": 4 * states,
        "gradients": 4 * states,
        "optimizer_states": 8 * states,
        "gathered_or_cast_weights": gathered if machines.shards > 1 else cast,
        "activations": wide * activations,
        "logits": (4 + wide) * min(2048, target) * c.vocab_size + 4 * sizes.embedding,
    }


def communication(sizes: flops.Sizes, config: TrainingConfig, machines: Machines) -> float:
    """Estimate the bytes a process sends per optimizer step with ring collectives."""
    shards, replicas = machines.shards, machines.processes // machines.shards
    summed = 8 * sum(sizes) / shards * (replicas - 1) / replicas
    if shards == 1:
        return summed
    gathered = _width(config, machines) * (2 * sum(sizes) - sizes.embedding)
    inside = (gathered + 4 * sum(sizes)) * (shards - 1) / shards
    return config.gradient_accumulation_steps * (inside + summed)


def estimate(
    c: Qwen3EncoderDecoderConfig, config: TrainingConfig, machines: Machines, mfu: float
) -> dict[str, Any]:
    """Estimate a run's cost with full rows, an upper bound; the time needs a known device."""
    sizes, steps, data = flops.count_parameters(c), config.max_steps, config.data
    rows = config.batch_size * config.gradient_accumulation_steps * machines.processes
    lengths = np.array([[data.source_length], [data.target_length]])
    tokens = rows * int(lengths.sum())
    work = rows * flops.flops_per_sum(c, sizes) @ flops.length_sums(*lengths)
    parts = {name: size / 2**30 for name, size in memory(c, sizes, config, machines).items()}
    sent = communication(sizes, config, machines) / 2**30
    cost: dict[str, Any] = {
        "parameters": {"total": sum(sizes), **sizes._asdict()},
        "devices": machines.processes,
        "step": {"rows": rows, "tokens": tokens, "flops": work, "sent_gib_per_device": sent},
        "run": {"steps": steps, "tokens": steps * tokens, "flops": steps * work},
        "memory_gib": {"peak": sum(parts.values()), **parts},
    }
    if machines.peak:
        seconds = work / (machines.processes * machines.peak * mfu)
        cost["time"] = {"mfu": mfu, "seconds_per_step": seconds, "hours": seconds * steps / 3600}
    return cost


def dry_run(
    config: TrainingConfig,
    devices: str | None = None,
    model: str | None = None,
    mfu: float = MFU,
    as_json: bool = False,
) -> None:
    """Print a run's config and cost; raise InputError if it cannot fit."""
    c = flops.qwen3_sizes(model) if model else load_config(config.model)
    with launched(config) as accelerator:  # whose `print` starts a process group after the block
        show, there = accelerator.print, machines(accelerator, devices)
        check_settings(config, c.num_sentinel_tokens, there.processes)
        cost = estimate(c, config, there, mfu)
        if as_json:
            show(json.dumps({"config": config_to_dict(config), **cost}))
        else:
            show(yaml.safe_dump(config_to_dict(config), sort_keys=False))
            for name, value in flatten(cost).items():
                label = name.replace(".", ": ").replace("_", " ").replace("gib", "GiB")
                figure = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
                show(f"{label:40}{figure}")
    needed, present = cost["memory_gib"]["peak"], (there.memory or math.inf) / 2**30
    if needed > present:
        raise InputError(
            f"batch_size={config.batch_size} needs {needed:.1f} GiB per device, but only "
            f"{present:.1f} are available; lower batch_size, set gradient_checkpointing, or shard "
            "over more devices"
        )
