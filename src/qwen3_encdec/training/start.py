"""Build a run's prepared model, restore its last state, and find its batch size."""

import gc
import importlib.util
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator, DistributedType
from accelerate.utils import find_executable_batch_size, send_to_device
from transformers import GenerationConfig, initialization
from transformers.utils import logging

from qwen3_encdec.data import collate, stream
from qwen3_encdec.data.ul2 import check_capacity
from qwen3_encdec.folders import InputError, load_config, load_model
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.training import checkpoint, layers
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.distributed import TrainingState, launched, prepare
from qwen3_encdec.training.optimization import build_optimizer, learning_rate


def check_settings(config: TrainingConfig, sentinels: int, processes: int) -> None:
    """Raise InputError for settings that conflict or a tracker that is not installed."""
    data = config.data
    check_capacity(data.denoisers, data.source_length, data.target_length, sentinels)
    stream.check_readers(data, processes, config.num_workers)
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise InputError(f"tracker {tracker} is not installed: pip install {tracker}")


def build_state(
    config: TrainingConfig, accelerator: Accelerator, unset: bool = False
) -> TrainingState:
    """Build the prepared model and its optimizer; if ``unset``, its weights need no values."""
    logging.disable_progress_bar()
    model_config = load_config(config.model)
    attention = layers.choose_attention(config.attention, model_config, accelerator)
    if unset and accelerator.distributed_type != DistributedType.DEEPSPEED:
        with initialization.no_init_weights():
            model = Qwen3ForSeq2SeqLM(model_config)
        with suppress(OSError):  # a folder may have none
            model.generation_config = GenerationConfig.from_pretrained(config.model)
    else:
        model = load_model(config.model)
    model.set_attn_implementation(attention)
    layers.recompute_layers(model, config)
    state = prepare(model, build_optimizer(model, config), accelerator)
    layers.compile_layers(state.module, config)
    return state


def resume(
    config: TrainingConfig, accelerator: Accelerator
) -> tuple[TrainingState, dict[str, Any]]:
    """Build the training state and load the newest undamaged checkpoint (`checkpoint.restore`)."""
    candidates = checkpoint.step_folders(Path(config.output_dir) / "checkpoints")
    state, show = build_state(config, accelerator, bool(candidates)), accelerator.print
    resumed = checkpoint.restore(candidates, state)
    if folder := resumed["folder"]:
        step = resumed["step"]
        if step > config.max_steps:
            raise InputError(
                f"{folder} is beyond max_steps={config.max_steps}; raise it or choose another "
                "output_dir"
            )
        changes = checkpoint.changes_since(resumed, config, accelerator.num_processes)
        show("; ".join([f"resuming from {folder}", *changes]))
        if config.warmup_steps <= step < config.max_steps:
            before, after = resumed.get("lr", math.inf), learning_rate(step + 1, config)
            if after > before * 1.0001:
                show(
                    f"warning: the learning rate rises from {before:.2e} to {after:.2e}: "
                    f"{folder.name} was saved in a shorter schedule's decay; resume from before it "
                    "to avoid this"
                )
    return state, resumed


def find_batch_size(config: TrainingConfig) -> None:
    """Print the largest batch_size that fits a whole step on full rows, by accelerate's search."""
    with launched(config) as accelerator:
        lengths = config.data.source_length, config.data.target_length

        # Ranks try the same sizes, so that memory runs out on all of them at once.
        @find_executable_batch_size(starting_batch_size=max(config.batch_size, 256))
        def largest(rows: int) -> int:
            accelerator.free_memory()  # DDP cannot continue after a failed backward pass
            gc.collect()
            state = build_state(config, accelerator, unset=True)
            state.model.train()  # as loaded, it would recompute nothing
            state.optimizer_state()  # every step but the first begins with it
            sides = [[np.zeros(length // 2)] * 2 * rows for length in lengths]
            batch = send_to_device(collate.collate_packed(*sides), accelerator.device)
            # Later micro-batches begin with the gradients of the first.
            for last in (False, True) if config.gradient_accumulation_steps > 1 else (True,):
                with state.accumulating(last):
                    state.backward(state.model(**batch).loss)
            state.step(0.0, 0.0)
            return rows

        try:
            found = largest()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            remedy = "set gradient_checkpointing or shard over more devices"
            raise InputError(f"not even batch_size=1 fits; {remedy}") from None
        accelerator.print(f"batch_size={found} fits a step on full rows; nothing was written")
