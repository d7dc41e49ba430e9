"""The training loop, by hand around accelerate: UL2 denoising of a Qwen3 encoder-decoder.

The loss of an optimizer step is the sum over its target tokens, in all micro-batches and on all ranks, divided by
their number. The data loader stays outside ``accelerator.prepare``: each rank reads its own share of the stream
and saves its own place in it.
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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch.nn.parallel import DistributedDataParallel
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm
from transformers.utils import logging

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.data.collator import collate
from qwen3_encdec.data.masking import collate_masked, mask_token_id
from qwen3_encdec.data.stream import build_stream, heldout_examples, reader_states, resume
from qwen3_encdec.data.ul2 import check_capacity
from qwen3_encdec.evaluation.denoising import denoising_losses
from qwen3_encdec.files import PROVENANCE_FILE, InputError, check_output, package_versions, write_json
from qwen3_encdec.loading import load_config, load_model, load_tokenizer
from qwen3_encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from qwen3_encdec.training import budget, checkpoints
from qwen3_encdec.training.config import TrainingConfig, config_to_dict, flatten
from qwen3_encdec.training.launch import describe, make_accelerator
from qwen3_encdec.training.metrics import Meter, metrics_logger
from qwen3_encdec.training.optimization import build_optimizer, learning_rate

Batch = dict[str, torch.Tensor]


def run_training(config: TrainingConfig, dry_run: bool = False) -> Path:
    """Train to ``config.max_steps`` and return the last checkpoint's folder.

    ``dry_run`` prints the resolved config and the cost, writes nothing and returns ``output_dir``. Raises
    InputError for whatever the caller can mend, including a loss or gradient that is not finite.
    """
    run_dir = Path(config.output_dir)
    accelerator = make_accelerator(config.mixed_precision, config.trackers, str(run_dir / "trackers"))
    try:
        config = dataclasses.replace(config, mixed_precision=accelerator.mixed_precision)
        model_config, tokenizer = _read_model_folder(config)
        if dry_run:
            sizes = budget.count_parameters(model_config)
            shards = accelerator.num_processes if accelerator.is_fsdp2 else 1
            accelerator.print(yaml.safe_dump(config_to_dict(config), sort_keys=False).rstrip())
            accelerator.print("\n".join(budget.plan(model_config, sizes, config, accelerator.num_processes, shards)))
            return run_dir
        return _train(config, accelerator, model_config, tokenizer, run_dir)
    finally:
        accelerator.end_training()
        # A later run in this process may choose another precision or launcher.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _train(
    config: TrainingConfig,
    accelerator: Accelerator,
    model_config: Qwen3EncoderDecoderConfig,
    tokenizer: Qwen3EncoderDecoderTokenizer,
    run_dir: Path,
) -> Path:
    """Everything between the checks and the last checkpoint."""
    denoisers = [denoiser.name for denoiser in config.data.denoisers]
    settings = config_to_dict(config)
    checkpoint, state = _find_start(config, settings, accelerator, run_dir)
    start = state["step"] if state else 0
    if checkpoint and start >= config.max_steps:
        accelerator.print(f"{checkpoint} is already at step {start} of {config.max_steps}")
        return checkpoint

    set_seed(config.seed)
    logging.disable_progress_bar()  # of loading and saving, which would break into ours
    model = load_model(checkpoint or config.model)
    sizes = budget.count_parameters(model_config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    if accelerator.is_fsdp2:
        # Without a head module to see, accelerate frees the matrix after each lookup, but the loss multiplies by it.
        model.get_input_embeddings().set_reshard_after_forward(False)
    optimizer = optimizer.optimizer  # accelerate's wrapper would only hide the real one's state

    stream = build_stream(config.data, tokenizer, rank=accelerator.process_index, world_size=accelerator.num_processes)
    pad_id = tokenizer.pad_token_id
    loss_options: dict[str, Any] = {
        "z_loss": config.z_loss,
        "label_smoothing": config.label_smoothing,
        "loss_implementation": config.loss_implementation,
    }
    make_batch: Callable = functools.partial(collate, pad_id=pad_id)
    if config.mntp_weight:
        loss_options["encoder_loss_weight"] = config.mntp_weight
        make_batch = functools.partial(
            collate_masked, pad_id=pad_id, mask_id=mask_token_id(tokenizer), probability=config.mntp_probability,
            kept_ids=np.array([tokenizer.eos_token_id, *tokenizer.sentinel_token_ids]),
        )  # fmt: skip
    loader = StatefulDataLoader(
        stream, batch_size=config.batch_size, collate_fn=make_batch, num_workers=config.num_workers
    )
    if checkpoint and state:
        checkpoints.load_optimizer_state(checkpoint, state, model, optimizer)
        if note := resume(stream, loader, [rank["data"] for rank in state["ranks"]]):
            accelerator.print(note)
    batches = iter(loader)

    heldout = heldout_examples(config.data, tokenizer, config.eval_examples_per_denoiser) if config.eval_every else []

    def evaluate(step: int) -> None:
        losses = denoising_losses(
            model, heldout, denoiser_names=denoisers, pad_token_id=pad_id, batch_size=config.batch_size
        )
        log(step, {f"eval_loss/{name}": loss for name, loss in losses.items()})

    def save(step: int) -> Path:
        return checkpoints.save_checkpoint(
            run_dir / "checkpoints",
            step=step,
            accelerator=accelerator,
            model=model,
            optimizer=optimizer,
            tokenizer=tokenizer,
            data_state=loader.state_dict(),
            totals=meter.totals,
            config=settings,
            keep_last=config.keep_last,
        )

    _open_run(run_dir, settings, state, accelerator)
    if config.trackers:
        flat = {k: v if isinstance(v, int | float) else str(v) for k, v in flatten(settings).items()}
        accelerator.init_trackers("qwen3-encdec", config=flat)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    accelerator.print(
        f"{describe(accelerator)}, {sizes.total:,} parameters in {dtype}, "
        f"steps {start + 1} to {config.max_steps}, output {run_dir}"
    )
    progress = tqdm(
        total=config.max_steps, initial=start, disable=not (accelerator.is_main_process and sys.stderr.isatty())
    )
    log = metrics_logger(accelerator, run_dir / "metrics.jsonl", progress)
    if config.eval_every and start == 0:
        evaluate(0)
    if checkpoint and state:  # last, so that nothing above moves the generators
        checkpoints.load_random_state(checkpoint, state, accelerator.process_index)

    model.train()
    flops = functools.partial(budget.flops, model_config, sizes)
    peak = budget.peak_flops(accelerator.device, accelerator.num_processes)
    meter = Meter(denoisers, state["totals"] if state else {})
    saved = checkpoint
    for step in range(start + 1, config.max_steps + 1):
        began = time.perf_counter()
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches = [next(batches) for _ in range(config.gradient_accumulation_steps)]
        counts = _count(micro_batches, accelerator)
        losses = _backward(micro_batches, int(counts[0]), len(denoisers), model, accelerator, loss_options)
        # The norm is measured, and everything checked, before the step can spoil the weights.
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        loss = float(losses[0].sum() / counts[0])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"step {step}: loss {loss} and gradient norm {norm} are not both finite; stopped before the update, "
                f"the last checkpoint is {saved or 'none'}; try a lower lr or a longer warm-up"
            )
        optimizer.step()
        optimizer.zero_grad()

        meter.add(counts.tolist(), losses.cpu(), time.perf_counter() - began)
        progress.update()
        if step % config.log_every == 0 or step == config.max_steps:
            log(step, {**meter.read(flops, peak), "lr": lr, "grad_norm": norm, "epoch": _epoch(loader.state_dict())})
        if config.eval_every and (step % config.eval_every == 0 or step == config.max_steps):
            evaluate(step)
        if step == config.max_steps or (config.save_every and step % config.save_every == 0):
            saved = save(step)
    progress.close()
    assert saved is not None
    return saved


def _backward(
    micro_batches: list[Batch],
    tokens: int,
    num_denoisers: int,
    model: torch.nn.Module,
    accelerator: Accelerator,
    loss_options: dict[str, Any],
) -> torch.Tensor:
    """Accumulate the gradient of the step's loss; return (2, num_denoisers) fp64: loss sums and token counts.

    ``tokens`` are the step's target tokens on all ranks. DDP and FSDP average gradients over the ranks, so the
    loss is multiplied by their number. FSDP2 reduces every micro-batch, which keeps the gradients sharded.
    """
    totals = torch.zeros(2, num_denoisers, dtype=torch.float64, device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        denoiser = batch.pop("denoiser")
        last = index == len(micro_batches) - 1
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            outputs = model(**batch, num_items_in_batch=tokens, **loss_options)
            accelerator.backward(outputs.loss * accelerator.num_processes)
        real = denoiser >= 0
        token_losses = outputs.token_losses[real].double()
        totals[0].index_add_(0, denoiser[real], token_losses)
        totals[1].index_add_(0, denoiser[real], torch.ones_like(token_losses))
    return accelerator.reduce(totals, "sum")


def _count(micro_batches: list[Batch], accelerator: Accelerator) -> torch.Tensor:
    """Target tokens, source tokens and examples of an optimizer step over all ranks, int64 (3,)."""
    counts = torch.zeros(3, dtype=torch.int64)
    for batch in micro_batches:
        segments = batch["attention_mask"]
        counts[0] += (batch["labels"] != -100).sum()
        counts[1] += (segments > 0).sum()
        counts[2] += segments.amax(dim=1).sum()  # segments of a row are numbered from 1
    return accelerator.reduce(counts.to(accelerator.device), "sum")


def _epoch(data_state: dict[str, Any]) -> int:
    """Passes over the data that this rank has finished, out of its loader's state."""
    return min(source["place"][0] for reader in reader_states(data_state) for source in reader["sources"])


def _find_start(
    config: TrainingConfig, settings: dict[str, Any], accelerator: Accelerator, run_dir: Path
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to continue from and its training state, or Nones to begin anew. Writes nothing."""
    check_output(run_dir, "training run")
    folder, damages = checkpoints.find_checkpoint(run_dir / "checkpoints")
    if folder is None:
        if config.resume is True:
            raise InputError(f"resume is true but {run_dir} holds no checkpoint; use resume=auto to begin a run")
        return None, None
    if config.resume is False:
        raise InputError(f"{run_dir} already holds {folder.name}; use resume=true, or another output_dir")
    state, notes = checkpoints.read_training_state(folder, settings, accelerator.num_processes)
    for sentence in damages:
        accelerator.print(sentence)
    accelerator.print(f"resuming from {folder}" + "".join(f"; {note}" for note in notes))
    return folder, state


def _open_run(run_dir: Path, settings: dict[str, Any], state: dict[str, Any] | None, accelerator: Accelerator) -> None:
    """Make the run folder, or tidy it: lines and half-written checkpoints from after the point of resumption go."""
    accelerator.wait_for_everyone()  # all ranks have looked before rank 0 writes
    if not accelerator.is_main_process:
        return
    for partial in run_dir.glob("checkpoints/.step-*"):
        shutil.rmtree(partial)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / PROVENANCE_FILE, {"kind": "training run", "versions": package_versions()})
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() and state else []
    kept = [line + "\n" for line in lines if state and json.loads(line)["step"] <= state["step"]]
    metrics.write_text("".join(kept), encoding="utf-8")


def _read_model_folder(config: TrainingConfig) -> tuple[Qwen3EncoderDecoderConfig, Qwen3EncoderDecoderTokenizer]:
    """The model's configuration and tokenizer, checked against each other and against the data settings."""
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.model, model_config)
    data = config.data
    check_capacity(data.denoisers, data.source_length, data.target_length, tokenizer.num_sentinel_tokens)
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise InputError(f"tracker {tracker} is not installed: pip install {tracker}, or take it out of trackers")
    return model_config, tokenizer
