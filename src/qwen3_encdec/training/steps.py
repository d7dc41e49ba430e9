"""Implement the steps of a training run and hold their shared state."""

import json
import math
import shutil
import sys
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from qwen3_encdec import folders
from qwen3_encdec.data import collate, stream
from qwen3_encdec.evaluation.denoising import example_losses, mean_losses
from qwen3_encdec.training import flops, monitor, plan, start
from qwen3_encdec.training.checkpoint import Checkpointer
from qwen3_encdec.training.config import TrainingConfig, config_to_dict
from qwen3_encdec.training.distributed import STACKS, shared_errors
from qwen3_encdec.training.optimization import learning_rate


class Run:
    """Shared state of a run; each method is one step of `loop.run_training`."""

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, asked: threading.Event
    ) -> None:
        """Build or resume a run; a folder made for it is removed again if that fails."""
        self.config, self.accelerator, self.asked = config, accelerator, asked
        processes, self.device = accelerator.num_processes, accelerator.device
        with shared_errors():  # all ranks look before rank 0 writes
            self.run_dir = folders.check_output(config.output_dir, "training run")
        model_config = folders.load_config(config.model)
        tokenizer = folders.load_tokenizer(config.model, model_config)
        start.check_settings(config, tokenizer.num_sentinel_tokens, processes)
        data = stream.UL2Data(config.data, tokenizer)
        self.is_new = not self.run_dir.exists() or not any(self.run_dir.iterdir())
        with shared_errors(), folders.writing(self.run_dir):  # rank 0's errors stop all ranks
            if accelerator.is_main_process:
                self.lock = monitor.lock(self.run_dir)
        try:
            self._build(data, tokenizer, model_config)
        except BaseException:
            if accelerator.is_main_process and self.is_new:
                shutil.rmtree(self.run_dir, ignore_errors=True)
            raise

    def _build(self, data: stream.UL2Data, tokenizer: Any, model_config: Any) -> None:
        config, accelerator = self.config, self.accelerator
        processes = accelerator.num_processes
        with shared_errors(), folders.writing(self.run_dir):
            if accelerator.is_main_process and self.is_new:
                made_by = {"kind": "training run", "versions": folders.package_versions()}
                folders.write_json(self.run_dir / folders.PROVENANCE_FILE, made_by)
        self.heldout = self._heldout(data)  # an error comes before the model is loaded
        set_seed(config.seed)
        self.state, resumed = start.resume(config, accelerator)
        self.start: int = resumed["step"]
        self.saver = Checkpointer(config, self.state, tokenizer, resumed["folder"])
        self.guard = monitor.SpikeGuard(config.spike_sigma, config.spike_window, resumed["recent"])
        self.stall_guard = monitor.StallGuard(config.stall_seconds)
        self.denoisers = [denoiser.name for denoiser in config.data.denoisers]
        self.corpora = data.corpora
        sizes = flops.count_parameters(model_config)
        peak = processes * (plan.machines(accelerator).peak or 0)
        per_sum = flops.flops_per_sum(model_config, sizes)
        self.meter = monitor.Meter(self.denoisers, per_sum, peak, resumed["totals"])
        self.loader = self._loader(data, tokenizer, resumed["positions"])
        self.batches = iter(self.loader)
        self.upcoming: list[dict[str, Any]] = []  # micro-batches of the next step
        self.position = self.loader.state_dict()  # after the last finished step
        self.data_error: str | None = None
        self.heldout_losses: dict[int, float] = {}
        self.began = time.monotonic()
        self._open_folder()
        kinds = {"NO": "one process", "FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed"}
        kind = kinds.get(accelerator.distributed_type.value, "DDP")
        compute = config.mixed_precision.replace("no", "fp32")
        with shared_errors():
            if accelerator.is_main_process:
                print(*data.report(), sep="\n", flush=True)
        accelerator.print(f"{processes} x {self.device.type}, {kind}, compute {compute}")
        accelerator.print(f"{sum(sizes):,} parameters, output {self.run_dir}")
        accelerator.print(f"step {self.start:,} of {config.max_steps:,} done")

    def _heldout(self, data: stream.UL2Data) -> list[Any]:
        """Choose the held-out texts once, save them with the run, and corrupt them."""
        config, path = self.config, self.run_dir / "heldout.json"
        if not (config.eval_every or config.data.heldout_inputs or path.exists()):
            return []
        with shared_errors(), folders.writing(self.run_dir):
            if self.accelerator.is_main_process and not path.exists():
                texts = data.choose_heldout(config.eval_examples_per_denoiser)
                folders.write_json(path, [text._asdict() for text in texts])
        texts = stream.read_heldout(path)
        data.exclude(texts)
        # Their names stay right when the mixture changes.
        self.heldout_corpora = [text.corpus for text in texts for _ in config.data.denoisers]
        return data.heldout_examples(texts) if config.eval_every else []

    def _loader(self, data: stream.UL2Data, tokenizer: Any, positions: list) -> stream.RowLoader:
        config, accelerator = self.config, self.accelerator
        self.loss_options = {"z_loss": config.z_loss}
        state = None
        collate_rows: Any = collate.collate_rows
        if config.mntp_weight:
            self.loss_options["encoder_loss_weight"] = config.mntp_weight
            collate_rows = partial(
                collate.collate_masked_rows,
                kept_ids=data.kept_ids,
                mask_id=collate.mask_token_id(tokenizer),
                probability=config.mntp_probability,
            )
        if positions:
            state, note = data.adopt(stream.merge_states(positions))
            if note:
                accelerator.print(note)
        number = config.gradient_accumulation_steps
        return stream.RowLoader(
            data,
            batch_size=config.batch_size * number,
            collate=partial(collate.collate_micro_batches, number=number, collate=collate_rows),
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            num_workers=config.num_workers,
            state=state,
            worker_init_fn=monitor.ignore_signals,
        )

    def _open_folder(self) -> None:
        """Write the config, drop records after the step to resume from, and open the trackers."""
        settings = yaml.safe_dump(config_to_dict(self.config), sort_keys=False)
        first = self.start + 1 if self.start else 0  # a new run is evaluated at step 0
        with shared_errors(), folders.writing(self.run_dir):
            if self.accelerator.is_main_process:
                for unfinished in self.run_dir.glob("checkpoints/.step-*"):
                    shutil.rmtree(unfinished)
                folders.write_text(self.run_dir / "config.yaml", settings)
                monitor.keep_lines(self.run_dir / "metrics.jsonl", first - 1)
        if self.config.trackers:
            # Show steps that a run repeats after a crash only once.
            options = {"tensorboard": {"purge_step": first}}
            try:
                self.accelerator.init_trackers("qwen3-encdec", {"config": settings}, options)
            except Exception as error:  # trackers raise any type and must not stop training
                self.accelerator.print(f"warning: trackers could not be started: {error}")

    def fetch(self) -> float:
        """Fetch the micro-batches of the next step to the device. Returns the seconds it took."""
        began = time.perf_counter()
        try:
            self.upcoming = [_send(batch, self.device) for batch in next(self.batches)]
        except folders.InputError as error:
            self.data_error = str(error)  # the other ranks learn of it in `agree`
        return time.perf_counter() - began

    def backward(self, step: int, tokens: float) -> torch.Tensor:
        """Accumulate the gradient of the step's loss over the micro-batches.

        ``tokens`` are all ranks' target tokens. Gradients are averaged over ranks, so the loss is
        multiplied by their number. Dropout is seeded by seed, step and rank; no RNG state is saved.
        Returns loss sums and token counts by denoiser, (2, denoisers) fp64, on the device.
        """
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        torch.manual_seed(self.config.seed + step * processes + rank)
        options = {"num_items_in_batch": int(tokens), **self.loss_options}
        totals = torch.zeros(2, len(self.denoisers), dtype=torch.float64, device=self.device)
        while self.upcoming:
            batch = self.upcoming.pop(0)
            denoiser = batch.pop("denoiser").flatten()
            batch.pop("counts")
            with self.state.accumulating(last=not self.upcoming):
                output = self.state.model(**batch, **options)
                self.state.backward(output.loss * processes)
            token_losses = output.token_losses.detach().flatten().double()
            totals[0].index_add_(0, denoiser, token_losses)
            totals[1].index_add_(0, denoiser, torch.ones_like(token_losses))
        return totals

    def agree(self, totals: torch.Tensor | None = None) -> bool:
        """Sum flags, counts, losses and norms over ranks: the host's only device wait in a step.

        Sets the next step's counts, and this one's losses and norms. Returns False to end the run.
        """
        stop = self.asked.is_set() or (self.run_dir / "STOP").exists()
        flags = [self.saver.failed, stop, self.data_error is not None]
        counts = sum((batch["counts"] for batch in self.upcoming), np.zeros(7))
        parts = [_copy(torch.tensor([*flags, *counts], dtype=torch.float64), self.device)]
        if totals is not None:
            norms = self.state.squared_norms() / self.accelerator.num_processes
            parts += [totals.flatten(), norms]
        summed = self.accelerator.reduce(torch.cat(parts), "sum").cpu().numpy()
        failed, self.stopped, data_failed = summed[:3].astype(bool).tolist()
        if failed:
            self.saver.finish()
        self.counts, stacks = summed[3:10], len(STACKS)
        if totals is not None:
            self.losses = summed[10:-stacks].reshape(2, -1)
            self.loss = float(self.losses[0].sum() / self.losses[1].sum())
            self.norms = dict(zip(STACKS, np.sqrt(summed[-stacks:]).tolist(), strict=True))
            self.norm = math.hypot(*self.norms.values())
        return not self.stopped and not data_failed

    def log_step(self, step: int, rate: float) -> None:
        """Log the meter's metrics since the last call."""
        metrics = self.meter.read()
        metrics |= {"lr": rate, "grad_norm": self.norm}
        metrics |= {f"grad_norm/{stack}": norm for stack, norm in self.norms.items()}
        # Not the loader's own state, which includes the next step's rows.
        state = stream.merge_states(gather_object([self.position]))
        self.log(step, metrics | stream.progress(state, self.corpora))

    def evaluate(self, step: int) -> None:
        """Log the held-out loss of each denoiser and, for a mixture, of each corpus."""
        heldout = self.heldout
        losses = example_losses(self.state.model, heldout, self.config.batch_size)
        by_denoiser = mean_losses(losses, heldout, [e.denoiser for e in heldout], self.denoisers)
        self.heldout_losses[step] = sum(by_denoiser.values()) / len(by_denoiser)
        metrics = {f"eval_loss/{name}": loss for name, loss in by_denoiser.items()}
        names = list(dict.fromkeys(self.heldout_corpora))
        if len(names) > 1:
            groups = [names.index(name) for name in self.heldout_corpora]
            by_corpus = mean_losses(losses, heldout, groups, names)
            metrics |= {f"eval_loss_on/{name}": loss for name, loss in by_corpus.items()}
        self.log(step, metrics)

    def save(self, step: int) -> None:
        """Start writing a checkpoint after ``step``."""
        progress = {
            "totals": dict(self.meter.totals),
            "recent": list(self.guard.recent),
            "lr": learning_rate(max(step, 1), self.config),
            "heldout_loss": self.heldout_losses.get(step),
        }
        self.saver.save(step, self.position, progress)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write metrics to metrics.jsonl, trackers and terminal; failures only print a warning."""
        if not self.accelerator.is_main_process:
            return
        try:
            with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.accelerator.log(metrics, step=step)
        except Exception as error:
            print(f"warning: step {step} could not be logged: {error}", file=sys.stderr)
        elapsed, done = time.monotonic() - self.began, step - self.start
        line = monitor.progress_line(step, self.config.max_steps, metrics, done, elapsed)
        print(line, flush=True)


def _send(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Send a packed batch to the device and add its ``counts``.

    They are (7,): target tokens, source tokens, examples, and the four `flops.length_sums`.
    """
    source = np.diff(batch["cu_seqlens"].numpy())
    target = np.diff(batch["decoder_cu_seqlens"].numpy())
    targets = int((batch["labels"] != -100).sum())
    counts = [targets, source.sum(), len(source), *flops.length_sums(source, target)]
    sent = {k: _copy(v, device) if torch.is_tensor(v) else v for k, v in batch.items()}
    return sent | {"counts": np.array(counts)}


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device without waiting for it, which needs pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
