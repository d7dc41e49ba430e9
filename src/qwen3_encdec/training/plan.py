"""What a run will cost, from its sizes alone:

parameters, operations, memory of a process, bytes sent, hours.
"""

import bisect
import dataclasses
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.folders import InputError
from qwen3_encdec.modeling_qwen3_decoder import MergedSegments
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM, loss_chunk
from qwen3_encdec.modeling_qwen3_encoder import Segments
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.distributed import prepare_layers

# Dense bf16 peak in FLOP/s and memory in bytes by a word of the device's name, from the makers'
# data sheets.
DEVICES = {"H100": (989e12, 80e9), "H200": (989e12, 141e9), "A100": (312e12, 80e9)}
# Bytes a logit while the only chunk's gradient is formed, and while a chunk is made beside the one
# before it.
_CHUNK, _CHUNKS = 8, 12
_CHUNK_IN_PLACE, _CHUNKS_IN_PLACE = 4, 8  # on a CPU in fp32
_COUNTED = 128  # source tokens that the layers' activations are counted on


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a model: ``encoder`` and ``decoder`` without the shared ``embedding``."""

    encoder: int
    decoder: int
    embedding: int

    @property
    def total(self) -> int:
        """All parameters, the shared matrix once."""
        return self.encoder + self.decoder + self.embedding


def count_parameters(model_config: Qwen3EncoderDecoderConfig) -> Sizes:
    """Count on the meta device, without allocating a weight."""
    with torch.device("meta"):
        model = Qwen3ForSeq2SeqLM(model_config)
    embedding = model_config.vocab_size * model_config.hidden_size
    counts = {"encoder": 0, "decoder": 0}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or parameter.numel() != embedding:
            counts["decoder" if ".decoder." in name else "encoder"] += parameter.numel()
    return Sizes(counts["encoder"], counts["decoder"], embedding)


def flops(
    model_config: Qwen3EncoderDecoderConfig,
    sizes: Sizes,
    source: float,
    target: float,
    examples: float = 1,
) -> float:
    """FLOPs of a forward and backward pass over ``examples`` pairs of mean lengths ``source`` and
    ``target``.

    6 S N_enc + 6 T (N_dec + V h) + 6 S (2 h Hkv D L_dec) + 12 Hq D (L_enc S^2 + L_dec (T S + T^2 /
    2)): the third term is the decoder's key and value projections of the source, the last one
    attention.
    """
    c, s, t = model_config, source, target
    keys_values = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim * c.num_decoder_layers
    attention = c.num_hidden_layers * s * s + c.num_decoder_layers * (t * s + t * t / 2)
    linear = 6 * s * (sizes.encoder + keys_values) + 6 * t * (sizes.decoder + sizes.embedding)
    return examples * (linear + 12 * c.num_attention_heads * c.head_dim * attention)


def peak_flops(device: torch.device, processes: int) -> float | None:
    """The dense bf16 peak of all processes' devices together, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((processes * peak for word, (peak, _) in DEVICES.items() if word in name), None)


@dataclass(frozen=True)
class Machines:
    """Where a run happens.

    Attributes:
        processes: one per device.
        shards: processes that divide parameters, gradients and optimizer states among them; 1 is
            DDP or one process.
        memory: bytes of a device, None if they are not known.
        peak: FLOP/s of a device, None if they are not known.
        mfu: share of the peak to expect.
        accelerator: whether "auto" precision is bf16.
    """

    processes: int = 1
    shards: int = 1
    memory: float | None = None
    peak: float | None = None
    mfu: float = 0.4
    accelerator: bool = False


def machines(
    accelerator: Accelerator,
    devices: str | None = None,
    memory_gib: float | None = None,
    mfu: float = 0.4,
) -> Machines:
    """The machines of this launch, or others: ``8xH100`` shards over 8, ``4x8xH100`` over 8 of 32
    (HSDP).

    Raises InputError for a count, a device, a memory or an MFU that cannot be.
    """
    if not 0 < mfu <= 1:
        raise InputError(f"mfu {mfu} is not above 0 and at most 1")
    if memory_gib is not None and memory_gib <= 0:
        raise InputError(f"memory-gib {memory_gib} is not above 0")
    memory = None if memory_gib is None else memory_gib * 2**30
    if devices is not None:
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\w+)", devices)
        if not match or match[3] not in DEVICES or "0" in match.groups()[:2]:
            raise InputError(
                f"devices {devices!r} is not COUNTxNAME such as 8xH100; known: {', '.join(DEVICES)}"
            )
        peak, size = DEVICES[match[3]]
        shards = int(match[2])
        return Machines(shards * int(match[1] or 1), shards, memory or size, peak, mfu, True)
    processes, kind = accelerator.num_processes, accelerator.device.type
    if memory is None and kind == "cuda":
        memory = torch.cuda.get_device_properties(accelerator.device).total_memory
    elif memory is None and kind == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / local
    parallelism = accelerator.parallelism_config
    replicas = parallelism.dp_replicate_size if parallelism else 1
    shards = processes // replicas if accelerator.is_fsdp2 else 1
    return Machines(
        processes, shards, memory, peak_flops(accelerator.device, 1), mfu, kind != "cpu"
    )


def memory(
    model_config: Qwen3EncoderDecoderConfig,
    sizes: Sizes,
    config: TrainingConfig,
    machines: Machines,
    saved: tuple[list[int], list[int]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes a process by purpose, and in all at each moment that can be the peak.

    Rows are taken as full. ``config.mixed_precision`` is "no" or "bf16"; ``saved`` is from
    ``saved_by_layers``.
    """
    c, shards, sharded = model_config, machines.shards, machines.shards > 1
    bf16 = config.mixed_precision == "bf16"
    cast = bf16 and not sharded  # autocast; FSDP2 computes with bf16 parameters instead
    width = 2 if bf16 else 4
    embedding, layers = 4 * sizes.embedding, sizes.encoder + sizes.decoder
    layer = sizes.decoder / c.num_decoder_layers
    targets = config.batch_size * config.data.target_length
    chunk = loss_chunk("cuda" if machines.accelerator else "cpu")
    rows = config.batch_size * config.data.source_length / _COUNTED
    one, several = (
        (_CHUNK, _CHUNKS) if bf16 or machines.accelerator else (_CHUNK_IN_PLACE, _CHUNKS_IN_PLACE)
    )
    looked_up = (
        embedding if sharded or machines.accelerator else 0
    )  # elsewhere added to the head's gradient by rows
    kept, whole = saved
    encoder, decoder = rows * kept[0] * c.num_hidden_layers, rows * kept[1] * c.num_decoder_layers
    states = 8 * sizes.total if config.optimizer == "adamw" else 4 * layers + 8 * sizes.embedding
    parts = {
        "weights": 4 * sizes.total / shards,
        "gradients": 4 * sizes.total / shards,
        f"{config.optimizer} states": states / shards,
        "average of the weights": 4 * sizes.total / shards if config.ema_decay else 0.0,
        # the layer at work and the next one, and the matrix, which stays
        "gathered or cast weights": width * (2 * layer + sizes.embedding)
        if sharded
        else 2 * layers
        if cast
        else 0.0,
        "activations": encoder + decoder,
        # of the last chunk while the next one is made; the gradients of the matrix and of the
        # states
        "logits": min(chunk, targets) * c.vocab_size * (several if targets > chunk else one)
        + embedding
        + (2 * sizes.embedding if bf16 else 0)
        + 2 * targets * c.hidden_size * width,
    }
    held = sum(
        size for name, size in parts.items() if name not in ("gradients", "activations", "logits")
    )
    before = parts["gradients"] if config.gradient_accumulation_steps > 1 else 0.0
    unsharded = (width * sizes.embedding + width * 2 * layer) if sharded else 0.0
    of_decoder = 4 * (sizes.decoder + (0 if sharded else sizes.embedding)) / shards
    moments = {
        "in the loss": held + before + parts["activations"] + parts["logits"],
        "in the last layer's backward pass": held
        + before
        + parts["activations"]
        + looked_up
        + 2 * rows * whole[1],
        "between the stacks": held + max(before, of_decoder) + encoder + unsharded + looked_up,
        "after the backward pass": held + parts["gradients"] + unsharded + looked_up,
    }
    return parts, moments


def communication(sizes: Sizes, config: TrainingConfig, machines: Machines) -> float:
    """Bytes that a process sends in an optimizer step, with rings.

    FSDP2 gathers the layers in the forward and again in the backward pass, the shared matrix once,
    and reduces gradients in fp32, all for every micro-batch; HSDP sums the shards of replicas too.
    DDP sums once a step. Muon gathers the update of every matrix.
    """
    shards, replicas = machines.shards, machines.processes // machines.shards
    if shards == 1:
        return 8 * sizes.total * (replicas - 1) / replicas
    width = 2 if config.mixed_precision == "bf16" else 4
    gathered = width * (2 * (sizes.encoder + sizes.decoder) + sizes.embedding)
    inside = (gathered + 4 * sizes.total) * (shards - 1) / shards
    across = 8 * sizes.total / shards * (replicas - 1) / replicas
    muon = (
        4 * (sizes.encoder + sizes.decoder) * (shards - 1) / shards
        if config.optimizer == "muon"
        else 0.0
    )
    return config.gradient_accumulation_steps * (inside + across) + muon


def dry_run(
    model_config: Qwen3EncoderDecoderConfig,
    config: TrainingConfig,
    machines: Machines,
    show: Callable[[str], object],
) -> None:
    """Show what the run will cost on these machines. Full rows are assumed: tokens and FLOPs are
    upper bounds.

    Raises InputError if a device's memory cannot hold it.
    """
    config = _settled(config, machines)
    sizes, processes = count_parameters(model_config), machines.processes
    rows = config.batch_size * config.gradient_accumulation_steps * processes
    source, target = config.data.source_length, config.data.target_length
    tokens, per_step = rows * (source + target), flops(model_config, sizes, source, target, rows)
    parts, moments = memory(
        model_config, sizes, config, machines, saved_by_layers(model_config, config, machines)
    )
    moment = max(moments, key=lambda name: moments[name])
    show(
        f"parameters        {sizes.total:,} (encoder {sizes.encoder:,}, decoder {sizes.decoder:,}, "
        f"shared embedding {sizes.embedding:,})"
    )
    show(
        f"tokens per step   {tokens:,} ({rows:,} rows of {source} + {target}, {processes:,} processes)"
    )
    show(f"steps             {config.max_steps:,}, {tokens * config.max_steps:,} tokens")
    show(f"FLOPs             {per_step:.3e} a step, {per_step * config.max_steps:.3e} in all")
    show(
        f"memory            {moments[moment] / 2**30:.2f} GiB a process at its peak, {moment}; its parts:"
    )
    for name, size in parts.items():
        show(f"  {size / 2**30:12.3f} GiB  {name}")
    show(
        f"communication     {communication(sizes, config, machines) / 2**30:.2f} GiB sent a step and process"
    )
    if machines.peak:
        seconds = per_step / (processes * machines.peak * machines.mfu)
        hours = seconds * config.max_steps / 3600
        show(
            f"time              {hours:,.1f} hours, {seconds:.3f} s a step, at {machines.mfu:.0%} of the peak"
        )
    if machines.memory and moments[moment] > machines.memory:
        fits = rows_that_fit(model_config, config, machines)
        advice = (
            f"batch_size={fits} would fit"
            if fits
            else "no batch_size fits: shard over more processes"
        )
        raise InputError(
            f"batch_size={config.batch_size} needs {moments[moment] / 2**30:.1f} GiB a process and there are "
            f"{machines.memory / 2**30:.1f}; {advice}"
        )


def rows_that_fit(
    model_config: Qwen3EncoderDecoderConfig, config: TrainingConfig, machines: Machines
) -> int:
    """The largest batch_size up to 4,096 whose estimate fits into a device's memory;

    0 if none does.
    """
    config, sizes = _settled(config, machines), count_parameters(model_config)
    saved = saved_by_layers(model_config, config, machines)

    def fits(rows: int) -> bool:
        _, moments = memory(
            model_config, sizes, dataclasses.replace(config, batch_size=rows), machines, saved
        )
        return max(moments.values()) <= (machines.memory or math.inf)

    return bisect.bisect_left(range(1, 4097), True, key=lambda rows: not fits(rows))


def find_batch_size(
    config: TrainingConfig,
    model_config: Qwen3EncoderDecoderConfig,
    machines: Machines,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> int:
    """The rows of a micro-batch that fit, by whole training steps on full rows of random ids, from
    the estimate down.

    An accelerator begins a quarter above the estimate; a CPU at it, since there the system would
    end the process. Ranks try the same rows, so that memory runs out on all of them at once. The
    weights are spoiled afterwards.

    Raises InputError if not even one row fits.
    """
    estimate = rows_that_fit(model_config, config, machines)

    @find_executable_batch_size(
        starting_batch_size=max(1, estimate * 5 // 4 if machines.accelerator else estimate)
    )
    def largest(rows: int) -> int:
        optimizer.zero_grad()
        batch = full_rows(model_config, config, rows)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        accelerator.backward(model(**batch, loss_implementation=config.loss_implementation).loss)
        optimizer.step()
        return rows

    try:
        return largest()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        row = f"{config.data.source_length} + {config.data.target_length}"
        raise InputError(f"not even one row of {row} tokens fits into memory") from None


def full_rows(
    model_config: Qwen3EncoderDecoderConfig, config: TrainingConfig, rows: int
) -> dict[str, torch.Tensor]:
    """A batch of random ids without padding, two documents a row."""
    generator, batch = torch.Generator().manual_seed(0), {}
    for ids, mask, length in (
        ("input_ids", "attention_mask", config.data.source_length),
        ("labels", "decoder_attention_mask", config.data.target_length),
    ):
        batch[ids] = torch.randint(model_config.vocab_size, (rows, length), generator=generator)
        batch[mask] = (1 + (torch.arange(length) >= length // 2).long()).expand(rows, -1)
    return batch


class _Living(TorchDispatchMode):
    """Counts the bytes, of those that operations made, that something still holds."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def count(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def saved_by_layers(
    model_config: Qwen3EncoderDecoderConfig, config: TrainingConfig, machines: Machines
) -> tuple[list[int], list[int]]:
    """Bytes that [one encoder, one decoder] layer keeps until its backward pass, and those without
    recomputation.

    Counted, not derived: both layers run on a row of 128 source tokens in 8 documents, with target
    tokens in the config's proportion, and on half of it; twice the difference leaves out what does
    not grow, such as cast weights.
    """
    bf16, sharded = config.mixed_precision == "bf16", machines.shards > 1
    dtype = torch.bfloat16 if bf16 and sharded else torch.float32
    with torch.device("meta"):
        model = Qwen3ForSeq2SeqLM(model_config).model
    layers = (
        nn.ModuleList([model.encoder.layers[0], model.decoder.layers[0]])
        .to(dtype)
        .to_empty(device="cpu")
        .train()
    )

    def count(documents: int, *lengths: int) -> list[int]:
        source, target = (
            Segments.from_mask(1 + torch.arange(n)[None] * documents // n) for n in lengths
        )
        states = [
            torch.zeros(1, n, model_config.hidden_size, dtype=dtype, requires_grad=True)
            for n in lengths
        ]
        found = []
        for layer, arguments, segments in zip(
            layers,
            (states[:1], states[::-1]),
            (source, MergedSegments(source, target)),
            strict=True,
        ):
            turn = torch.zeros(1, arguments[0].shape[1], model_config.head_dim, dtype=dtype)
            living = _Living([*layers.parameters(), *states])
            with living, torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not sharded):
                kept = layer(*arguments, position_embeddings=(turn, turn), segments=segments)
                found.append(living.count())
            del kept
        return found

    def per_row() -> list[int]:
        target = 4 * max(
            1, round(_COUNTED / 8 * config.data.target_length / config.data.source_length)
        )
        halves, wholes = count(4, _COUNTED // 2, target), count(8, _COUNTED, 2 * target)
        return [2 * (whole - half) for whole, half in zip(wholes, halves, strict=True)]

    without = per_row()
    prepare_layers(layers, dataclasses.replace(config, compile=False))
    return per_row(), without


def _settled(config: TrainingConfig, machines: Machines) -> TrainingConfig:
    """With "auto" precision resolved for the machines."""
    if config.mixed_precision != "auto":
        return config
    return dataclasses.replace(config, mixed_precision="bf16" if machines.accelerator else "no")
