"""Start a training run: check what is given, build or resume everything that its steps need."""

import importlib.util
import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    find_executable_batch_size,
    send_to_device,
    set_seed,
)
from transformers import initialization
from transformers.utils import logging

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.data import collate, stream
from qwen3_encdec.data.ul2 import check_capacity
from qwen3_encdec.folders import (
    PROVENANCE_FILE,
    InputError,
    check_output,
    load_config,
    load_model,
    load_tokenizer,
    package_versions,
    write_json,
)
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.training import checkpoint, distributed, flops, layers, monitor
from qwen3_encdec.training.config import TrainingConfig, config_to_dict, flatten
from qwen3_encdec.training.distributed import TrainingState, together
from qwen3_encdec.training.optimization import build_optimizer, learning_rate
from qwen3_encdec.training.steps import Run


def start_run(
    config: TrainingConfig, accelerator: Accelerator, stop: monitor.StopRequest, stack: ExitStack
) -> Run:
    """Build a run, or resume it from its newest undamaged checkpoint.

    ``stack`` locks the run's folder. Until all is checked, nothing is written.
    """
    run_dir, show = Path(config.output_dir), accelerator.print
    check_output(run_dir, "training run")
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.model, model_config)
    check_data(config, tokenizer.num_sentinel_tokens, accelerator)
    data = stream.UL2Data(config.data, tokenizer)
    with together():  # all ranks have looked before rank 0 writes
        if accelerator.is_main_process:
            stack.enter_context(monitor.locked(run_dir))
            made_by = {"kind": "training run", "versions": package_versions()}
            write_json(run_dir / PROVENANCE_FILE, made_by)

    set_seed(config.seed)
    logging.disable_progress_bar()
    sizes = flops.count_parameters(model_config)
    state = build_state(config, model_config, accelerator)
    resumed = _resume(config, accelerator, state)
    layers.compile_layers(state.module, config)
    start = resumed["step"] if resumed else 0

    heldout = _heldout(config, data, accelerator)
    position = None
    if resumed:
        position, note = data.adopt(stream.merge_states(resumed["positions"]))
        if note:
            show(note)
    make_batch, loss_options = _objective(config, tokenizer, data.kept_ids)
    loader = stream.RowLoader(
        data,
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        num_workers=config.num_workers,
        collate=make_batch,
        state=position,
        worker_init_fn=monitor.ignore_sigterm,
    )
    _open_folder(config, accelerator, start)
    for line in data.report():
        show(line)
    launch, left = distributed.describe(accelerator), f"step {start:,} of {config.max_steps:,} done"
    show(f"{launch}, {sizes.total:,} parameters, {left}, output {run_dir}")
    saver = checkpoint.Checkpointer(
        run_dir / "checkpoints",
        resumed["folder"] if resumed else None,
        accelerator=accelerator,
        state=state,
        tokenizer=tokenizer,
        config=config,
    )
    before = resumed or {"totals": {}, "guard": None}
    return Run(
        config,
        accelerator,
        stop,
        state,
        loader,
        saver,
        heldout,
        loss_options,
        start,
        monitor.SpikeGuard(config.spike_sigma, config.spike_window, before["guard"]),
        monitor.Meter(
            [denoiser.name for denoiser in config.data.denoisers],
            flops.flops_per_sum(model_config, sizes),
            before["totals"],
        ),
    )


def check_data(config: TrainingConfig, sentinels: int, accelerator: Accelerator) -> None:
    """Raise InputError for settings that cannot work together or a tracker that is missing."""
    data = config.data
    check_capacity(data.denoisers, data.source_length, data.target_length, sentinels)
    stream.check_readers(data, accelerator.num_processes, config.num_workers)
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise InputError(f"tracker {tracker} is not installed: pip install {tracker}")


def build_state(
    config: TrainingConfig, model_config: Qwen3EncoderDecoderConfig, accelerator: Accelerator
) -> TrainingState:
    """Build the prepared model and its optimizer, without weights if a checkpoint follows."""
    newest = checkpoint.newest(Path(config.output_dir) / "checkpoints")
    if newest and accelerator.distributed_type != DistributedType.DEEPSPEED:
        with initialization.no_init_weights():
            model = Qwen3ForSeq2SeqLM(load_config(newest))
    else:
        model = load_model(newest or config.model)
    device, show = accelerator.device, accelerator.print
    attention = layers.choose_attention(config.attention, model_config, device, show)
    model.set_attn_implementation(attention)
    layers.recompute_layers(model, config)
    state = distributed.prepare(model, build_optimizer(model, config), accelerator)
    state.loaded = newest
    return state


def find_batch_size(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Print the largest batch_size that takes a whole step on full rows, by accelerate's search.

    Ranks try the same sizes, so that memory runs out on all of them at once.
    """
    model_config, data = load_config(config.model), config.data
    state = build_state(replace(config, output_dir="/nowhere"), model_config, accelerator)
    layers.compile_layers(state.module, config)
    ids = np.random.default_rng(0)

    @find_executable_batch_size(starting_batch_size=max(config.batch_size, 256))
    def largest(rows: int) -> int:
        sides = []
        for length in (data.source_length, data.target_length):
            halves = [length // 2, length - length // 2] * rows
            sides.append([ids.integers(model_config.vocab_size, size=n) for n in halves])
        batch = send_to_device(collate.collate_packed(*sides), accelerator.device)
        with state.accumulating(True):
            state.backward(state.model(**batch).loss, True)
        state.step(0.0, 0.0)
        return rows

    try:
        found = largest()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        row = f"{data.source_length} + {data.target_length}"
        raise InputError(f"not even one row of {row} tokens fits into memory") from None
    accelerator.print(f"batch_size={found} fits a step on full rows; nothing was written")


def _resume(
    config: TrainingConfig, accelerator: Accelerator, state: TrainingState
) -> dict[str, Any] | None:
    """Read the newest undamaged checkpoint into ``state`` and return its training state.

    Returns None where a run begins. Raises InputError if ``config.resume`` says otherwise.
    """
    run_dir = Path(config.output_dir)
    newest = checkpoint.newest(run_dir / "checkpoints")
    if newest is None and config.resume is True:
        raise InputError(f"resume is true but {run_dir} holds no checkpoint; use resume=auto")
    if newest and config.resume is False:
        raise InputError(
            f"{run_dir} already holds {newest.name}; use resume=true, or another output_dir"
        )
    folder, damages = checkpoint.restore(run_dir / "checkpoints", state.read, accelerator)
    if folder is None:
        return None
    state.synchronize()
    resumed = checkpoint.read_training_state(folder)
    notes = checkpoint.changes_since(resumed, config_to_dict(config), accelerator.num_processes)
    for sentence in damages:
        accelerator.print(sentence)
    accelerator.print("; ".join([f"resuming from {folder}", *notes]))
    step, before = resumed["step"], resumed.get("lr", float("inf"))
    after = learning_rate(step + 1, config)
    if step >= config.warmup_steps and after > before * 1.0001:
        accelerator.print(
            f"warning: the learning rate rises from {before:.2e} to {after:.2e}: {folder.name} is "
            "from the decay of a shorter schedule; resume from one before it to avoid that"
        )
    return resumed | {"folder": folder}


def _heldout(config: TrainingConfig, data: Any, accelerator: Accelerator) -> list[Any]:
    """Choose the held-out texts once, keep them with the run, and corrupt them."""
    if not (config.eval_every or config.data.heldout_inputs):
        return []
    path = Path(config.output_dir) / "heldout.json"
    with together():
        if accelerator.is_main_process and not path.exists():
            stream.write_heldout(path, data.choose_heldout(config.eval_examples_per_denoiser))
    texts = stream.read_heldout(path)
    data.exclude(texts)
    return data.heldout_examples(texts) if config.eval_every else []


def _objective(
    config: TrainingConfig, tokenizer: Any, kept_ids: np.ndarray
) -> tuple[Any, dict[str, Any]]:
    """Return what makes a batch of rows, and the model's options for the loss."""
    options: dict[str, Any] = {"z_loss": config.z_loss, "smoothing": config.label_smoothing}
    if not config.mntp_weight:
        return collate.collate_rows, options
    masks: Any = {
        "mask_id": collate.mask_token_id(tokenizer),
        "probability": config.mntp_probability,
    }
    make_batch = partial(collate.collate_masked_rows, kept_ids=kept_ids, **masks)
    return make_batch, options | {"encoder_loss_weight": config.mntp_weight}


def _open_folder(config: TrainingConfig, accelerator: Accelerator, start: int) -> None:
    """Make the run's folder or tidy it: what is from after the point of resumption goes."""
    run_dir, settings = Path(config.output_dir), config_to_dict(config)
    if accelerator.is_main_process:
        for partial_folder in run_dir.glob("checkpoints/.step-*"):
            shutil.rmtree(partial_folder)
        text = yaml.safe_dump(settings, sort_keys=False)
        (run_dir / "config.yaml").write_text(text, encoding="utf-8")
        monitor.keep_lines(run_dir / "metrics.jsonl", start)
    if config.trackers:
        flat = {}
        for name, value in flatten(settings).items():
            flat[name] = value if isinstance(value, int | float) else str(value)
        # Steps that a crash has made a run repeat are shown once.
        options = {"tensorboard": {"purge_step": start + 1}}
        accelerator.init_trackers("qwen3-encdec", config=flat, init_kwargs=options)
