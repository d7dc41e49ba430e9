"""The training loop, by hand around accelerate: UL2 denoising of a Qwen3 encoder-decoder.

The loss of an optimizer step is the sum over its target tokens, in all micro-batches and on all
ranks, divided by their number. The data loader stays outside ``accelerator.prepare``: each rank
reads its own share of the stream and saves its own place in it.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm
from transformers.utils import logging

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.data.collate import collate, collate_masked, mask_token_id
from qwen3_encdec.data.stream import build_stream, heldout_examples, reader_states, resume
from qwen3_encdec.data.ul2 import check_capacity
from qwen3_encdec.evaluation.denoising import denoising_losses
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
from qwen3_encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from qwen3_encdec.training import checkpoint as checkpoints
from qwen3_encdec.training import plan as budget
from qwen3_encdec.training.config import TrainingConfig, config_to_dict, flatten
from qwen3_encdec.training.distributed import (
    STACKS,
    TrainingState,
    describe,
    make_accelerator,
    prepare,
    prepare_layers,
    release,
)
from qwen3_encdec.training.monitor import (
    Meter,
    SpikeGuard,
    StopRequest,
    Watchdog,
    check_finite,
    ignore_sigterm,
    metrics_logger,
    stop_requests,
)
from qwen3_encdec.training.optimization import build_optimizer, learning_rate

Batch = dict[str, Any]


def run_training(
    config: TrainingConfig,
    dry_run: bool = False,
    devices: str | None = None,
    memory_gib: float | None = None,
    mfu: float = 0.4,
    find_batch_size: bool = False,
) -> Path:
    """Train to ``config.max_steps``, or until asked to stop, and return the last checkpoint's
    folder.

    SIGTERM, or a file STOP in ``output_dir``, saves and ends; the file is taken away. ``dry_run``
    prints the resolved config and the plan, for ``devices`` ("8xH100") of ``memory_gib`` at ``mfu``
    of their peak or else for those at hand; ``find_batch_size`` prints the largest that fits. Both
    write nothing and return ``output_dir``. Raises InputError for whatever the caller can mend,
    including a loss or gradient that is not finite.
    """
    run_dir = Path(config.output_dir)
    accelerator = make_accelerator(config, str(run_dir / "trackers"))
    try:
        if dry_run:
            model_config, data = load_config(config.model), config.data
            check_capacity(
                data.denoisers,
                data.source_length,
                data.target_length,
                model_config.num_sentinel_tokens,
            )
            accelerator.print(yaml.safe_dump(config_to_dict(config), sort_keys=False).rstrip())
            machines = budget.machines(accelerator, devices, memory_gib, mfu)
            budget.dry_run(model_config, config, machines, accelerator.print)
            return run_dir
        config = dataclasses.replace(config, mixed_precision=accelerator.mixed_precision)
        with stop_requests(run_dir) as stop:
            return _train(
                config, accelerator, *_read_model_folder(config), run_dir, stop, find_batch_size
            )
    finally:
        release(accelerator)


def train_to_the_end(config: TrainingConfig) -> Path:
    """`run_training` for a caller that goes on with the result:

    if asked to stop, the process ends with 143.
    """
    checkpoint = run_training(config)
    if checkpoint.name != checkpoints.folder_name(
        config.max_steps
    ):  # saved all the same, to go on from
        raise SystemExit(143)
    return checkpoint


def _train(
    config: TrainingConfig,
    accelerator: Accelerator,
    model_config: Qwen3EncoderDecoderConfig,
    tokenizer: Qwen3EncoderDecoderTokenizer,
    run_dir: Path,
    stop: StopRequest,
    find_batch_size: bool,
) -> Path:
    """Everything between the checks and the last checkpoint."""
    denoisers = [denoiser.name for denoiser in config.data.denoisers]
    settings = config_to_dict(config)
    checkpoint, resumed, damages = _find_start(config, settings, accelerator, run_dir)
    start = resumed["step"] if resumed else 0
    if checkpoint and start >= config.max_steps:
        accelerator.print(f"{checkpoint} is already at step {start} of {config.max_steps}")
        return checkpoint

    set_seed(config.seed)
    logging.disable_progress_bar()  # of loading and saving, which would break into ours
    model: torch.nn.Module = load_model(checkpoint or config.model)
    sizes = budget.count_parameters(model_config)
    prepare_layers(model, config)
    state = prepare(model, build_optimizer(model, config), accelerator)
    model = state.model
    if find_batch_size:
        machines = budget.machines(accelerator)
        size = budget.find_batch_size(
            config, model_config, machines, model, state.optimizer, accelerator
        )
        accelerator.print(
            f"batch_size={size} fits, by a training step on full rows; nothing was written"
        )
        return run_dir

    stream = build_stream(
        config.data, tokenizer, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    pad_id = tokenizer.pad_token_id
    loss_options: dict[str, Any] = {
        "z_loss": config.z_loss,
        "smoothing": config.label_smoothing,
    }
    make_batch: Callable = collate
    if config.mntp_weight:
        loss_options["encoder_loss_weight"] = config.mntp_weight
        make_batch = functools.partial(
            collate_masked, mask_id=mask_token_id(tokenizer), probability=config.mntp_probability,
            kept_ids=np.array([tokenizer.eos_token_id, *tokenizer.sentinel_token_ids]),
        )  # fmt: skip
    loader = StatefulDataLoader(
        stream,
        batch_size=config.batch_size,
        collate_fn=functools.partial(_arrays, make_batch),
        num_workers=config.num_workers,
        worker_init_fn=ignore_sigterm if config.num_workers else None,
    )
    if checkpoint and resumed:
        checkpoints.load_optimizer_state(checkpoint, state, ema=config.ema_decay > 0)
        if note := resume(stream, loader, [rank["data"] for rank in resumed["ranks"]]):
            accelerator.print(note)
    batches = iter(loader)

    heldout = (
        heldout_examples(config.data, tokenizer, config.eval_examples_per_denoiser)
        if config.eval_every
        else []
    )

    def evaluate(step: int) -> None:
        losses = denoising_losses(
            model,
            heldout,
            denoiser_names=denoisers,
            pad_token_id=pad_id,
            batch_size=config.batch_size,
        )
        log(step, {f"eval_loss/{name}": loss for name, loss in losses.items()})

    def save(step: int) -> None:
        saver.save(step, place, {"totals": meter.totals, "guard": guard.state})

    _open_run(run_dir, settings, resumed, damages, accelerator)
    if config.trackers:
        flat = {
            k: v if isinstance(v, int | float) else str(v) for k, v in flatten(settings).items()
        }
        accelerator.init_trackers("qwen3-encdec", config=flat)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    accelerator.print(
        f"{describe(accelerator)}, {sizes.total:,} parameters in {dtype}, "
        f"steps {start + 1} to {config.max_steps}, output {run_dir}"
    )
    progress = tqdm(
        total=config.max_steps,
        initial=start,
        disable=not (accelerator.is_main_process and sys.stderr.isatty()),
    )
    saver = checkpoints.Checkpointer(
        run_dir / "checkpoints",
        checkpoint,
        accelerator=accelerator,
        state=state,
        tokenizer=tokenizer,
        config=config,
    )
    log = metrics_logger(accelerator, run_dir / "metrics.jsonl", progress, saver.fail)
    if config.eval_every and start == 0:
        evaluate(0)
    if resumed:  # last, so that nothing above moves the generators
        checkpoints.load_random_state(resumed, accelerator.process_index)

    model.train()
    flops = functools.partial(budget.flops, model_config, sizes)
    peak = budget.peak_flops(accelerator.device, accelerator.num_processes)
    meter = Meter(denoisers, resumed["totals"] if resumed else {})
    guard = SpikeGuard(
        config.spike_sigma, config.spike_window, resumed["guard"] if resumed else None
    )
    watchdog = Watchdog(config.stall_seconds, start)
    place = checkpoints.place_of(loader, accelerator.device)
    try:
        for step in range(start + 1, config.max_steps + 1):
            began = time.perf_counter()
            lr = learning_rate(step, config)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            micro_batches = [
                _tensors(next(batches)) for _ in range(config.gradient_accumulation_steps)
            ]
            waited = time.perf_counter() - began
            *counts, written, failed, stops = _agree(
                micro_batches, [*saver.flags(), int(bool(stop))], accelerator
            )
            saver.settle(written, failed)
            if stops:
                save(step - 1)
                accelerator.print(
                    f"asked to stop: ending after step {step - 1} of {config.max_steps}"
                )
                break
            losses, squares = _backward(
                micro_batches, counts[0], len(denoisers), state, accelerator, loss_options
            )
            # The norm is measured, and everything checked, before the step can spoil the weights.
            norm = math.sqrt(sum(squares))
            loss = float(losses[0].sum() / counts[0])
            try:
                check_finite(step, loss, norm)
                skipped = guard.skips(step, loss, norm)
            except InputError as error:
                if step - 1 > start:
                    save(step - 1)
                    saver.finish()
                raise InputError(
                    f"{error}; the last checkpoint is {saver.last or 'none'}"
                ) from None
            if skipped:
                state.discard()
                accelerator.print(
                    f"step {step} is skipped: loss {loss:.4g}, gradient norm {norm:.4g}"
                )
            else:
                state.step(norm, config.max_grad_norm)

            place = checkpoints.place_of(loader, accelerator.device)
            meter.add(counts, losses, time.perf_counter() - began, waited, skipped)
            progress.update()
            if step % config.log_every == 0 or step == config.max_steps:
                norms = {
                    f"grad_norm/{stack}": math.sqrt(square)
                    for stack, square in zip(STACKS, squares, strict=True)
                }
                epoch = _epoch(place["data"])
                log(
                    step,
                    {
                        **meter.read(flops, peak),
                        "lr": lr,
                        "grad_norm": norm,
                        **norms,
                        "epoch": epoch,
                    },
                )
            if config.eval_every and (step % config.eval_every == 0 or step == config.max_steps):
                evaluate(step)
            if step == config.max_steps or (config.save_every and step % config.save_every == 0):
                save(step)
            watchdog.beat(step)
        saver.finish()
    finally:
        watchdog.ended.set()
        saver.close()
        progress.close()
    if accelerator.is_main_process:
        stop.file.unlink(missing_ok=True)
    return saver.last or run_dir


def _arrays(make_batch: Callable, rows: list[Any]) -> dict[str, np.ndarray]:
    """A batch on its way out of a worker.

    Tensors would go by shared memory, which costs a millisecond or two each.
    """
    batch = make_batch(rows).items()
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in batch}


def _tensors(arrays: dict[str, Any]) -> Batch:
    items = arrays.items()
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in items}


def _agree(micro_batches: list[Batch], flags: list[int], accelerator: Accelerator) -> list[int]:
    """Target tokens, source tokens and examples of an optimizer step, and ``flags``:

    sums over all ranks.
    """
    target = source = examples = 0
    for batch in micro_batches:
        target += batch["labels"].numel()
        source += batch["input_ids"].numel()
        examples += len(batch["cu_seqlens"]) - 1
    mine = torch.tensor([target, source, examples, *flags], device=accelerator.device)
    return accelerator.reduce(mine, "sum").tolist()


def _backward(
    micro_batches: list[Batch],
    tokens: int,
    num_denoisers: int,
    state: TrainingState,
    accelerator: Accelerator,
    loss_options: dict[str, Any],
) -> tuple[torch.Tensor, list[float]]:
    """Accumulate the gradient of the step's loss. Returns what all ranks have, on the CPU:

    Loss sums and token counts, (2, num_denoisers) fp64, and the squared gradient norms of `STACKS`.
    ``tokens`` are the step's target tokens on all ranks; gradients are averaged over the ranks, so
    the loss is multiplied by their number.
    """
    totals = torch.zeros(2, num_denoisers, dtype=torch.float64, device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        denoiser = batch.pop("denoiser").flatten()
        last = index == len(micro_batches) - 1
        with state.accumulating(last):
            outputs = state.model(**batch, num_items_in_batch=tokens, **loss_options)
            state.backward(outputs.loss * accelerator.num_processes, last)
        token_losses = outputs.token_losses.flatten().double()
        totals[0].index_add_(0, denoiser, token_losses)
        totals[1].index_add_(0, denoiser, torch.ones_like(token_losses))
    together = accelerator.reduce(torch.cat([totals.flatten(), state.squared_norms()]), "sum").cpu()
    return together[:-3].view_as(totals), together[-3:].tolist()


def _epoch(data_state: dict[str, Any]) -> int:
    """Passes over the data that this rank has finished, out of its loader's state."""
    return min(
        source["place"][0] for reader in reader_states(data_state) for source in reader["sources"]
    )


def _find_start(
    config: TrainingConfig, settings: dict[str, Any], accelerator: Accelerator, run_dir: Path
) -> tuple[Path | None, dict[str, Any] | None, dict[Path, str]]:
    """The checkpoint to continue from and its training state, or Nones to begin anew;

    damaged ones. Writes nothing.
    """
    check_output(run_dir, "training run")
    folder, damages = checkpoints.find_checkpoint(run_dir / "checkpoints", accelerator)
    if folder is None:
        if config.resume is True:
            raise InputError(
                f"resume is true but {run_dir} holds no checkpoint; use resume=auto to begin a run"
            )
        return None, None, {}
    if config.resume is False:
        raise InputError(
            f"{run_dir} already holds {folder.name}; use resume=true, or another output_dir"
        )
    state, notes = checkpoints.read_training_state(folder, settings, accelerator.num_processes)
    for sentence in damages.values():
        accelerator.print(sentence)
    accelerator.print(f"resuming from {folder}" + "".join(f"; {note}" for note in notes))
    return folder, state, damages


def _open_run(
    run_dir: Path,
    settings: dict[str, Any],
    state: dict[str, Any] | None,
    damages: dict[Path, str],
    accelerator: Accelerator,
) -> None:
    """Make the run folder, or tidy it:

    lines and half-written checkpoints from after the point of resumption go.
    """
    accelerator.wait_for_everyone()  # all ranks have looked before rank 0 writes
    if not accelerator.is_main_process:
        return
    for partial in run_dir.glob("checkpoints/.step-*"):
        shutil.rmtree(partial)
    checkpoints.set_aside(damages)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / PROVENANCE_FILE, {"kind": "training run", "versions": package_versions()})
    (run_dir / "config.yaml").write_text(
        yaml.safe_dump(settings, sort_keys=False), encoding="utf-8"
    )
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() and state else []
    kept = [line + "\n" for line in lines if state and json.loads(line)["step"] <= state["step"]]
    metrics.write_text("".join(kept), encoding="utf-8")


def _read_model_folder(
    config: TrainingConfig,
) -> tuple[Qwen3EncoderDecoderConfig, Qwen3EncoderDecoderTokenizer]:
    """The model's configuration and tokenizer, checked against each other and against the data
    settings.
    """
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.model, model_config)
    data = config.data
    check_capacity(
        data.denoisers, data.source_length, data.target_length, tokenizer.num_sentinel_tokens
    )
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise InputError(
                f"tracker {tracker} is not installed: pip install {tracker}, or take it out of trackers"
            )
    return model_config, tokenizer
