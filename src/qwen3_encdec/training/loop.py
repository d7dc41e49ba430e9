"""Train an encoder-decoder on UL2 denoising, with a plain loop on top of accelerate.

The loss of an optimizer step is the mean over its target tokens in all micro-batches and on all
ranks. While the device computes a step, the host fetches the next one. The host waits for the
device once per step, when it reads the results reduced over all ranks.
"""

import gc
import math
import time
from dataclasses import replace
from pathlib import Path

from qwen3_encdec.folders import InputError, first_line
from qwen3_encdec.training.checkpoint import folder_name
from qwen3_encdec.training.config import TrainingConfig, config_to_dict, read_dataclass
from qwen3_encdec.training.distributed import launched, shared_errors
from qwen3_encdec.training.monitor import hearing_signals
from qwen3_encdec.training.optimization import learning_rate, set_learning_rate
from qwen3_encdec.training.steps import Run


def run_training(config: TrainingConfig) -> Path:
    """Train to ``config.max_steps``, or until asked to stop; return the last checkpoint's folder.

    SIGTERM, Ctrl-C, or a file STOP in ``output_dir`` saves a checkpoint and stops. Raises
    InputError for errors that the caller can fix, including a non-finite loss or gradient.
    """
    config = read_dataclass(TrainingConfig, config_to_dict(config), "TrainingConfig")
    with launched(config) as accelerator, hearing_signals() as asked:
        config = replace(config, mixed_precision=accelerator.mixed_precision)
        run = Run(config, accelerator, asked)
        gc.collect()
        gc.freeze()
        try:
            return _train(run)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                f"{first_line(error).rstrip('.')}; lower num_workers if memory ran out, and run "
                "the same command to resume from the last checkpoint"
            ) from None
        finally:
            run.batches.close()  # ends the data workers, which ignore signals
            run.saver.close()
            run.stall_guard.close()
            gc.unfreeze()


def train_to_the_end(config: TrainingConfig) -> Path:
    """Train to max_steps; exit with 143 if interrupted, leaving a checkpoint to resume from."""
    last = run_training(config)
    if last.name != folder_name(config.max_steps):
        raise SystemExit(143)
    return last


def _train(run: Run) -> Path:
    """Run the optimizer steps and return the last checkpoint's folder."""
    config, state, saver, show = run.config, run.state, run.saver, run.accelerator.print
    step = run.start
    if step == 0 and config.eval_every:
        run.evaluate(0)
    state.model.train()
    run.stall_guard.step_ended()
    run.fetch()
    goes_on = run.agree()
    while step < config.max_steps and goes_on:
        step, began, counts = step + 1, time.perf_counter(), run.counts
        rate = learning_rate(step, config)
        set_learning_rate(state.optimizer, rate)

        totals = run.backward(step, counts[0])
        position = run.loader.state_dict()
        waited = run.fetch() if step < config.max_steps else 0.0
        goes_on = run.agree(totals)

        # Check loss and norm before the update can corrupt the weights.
        if not math.isfinite(run.loss + run.norm):
            if step - 1 > run.start:
                run.save(step - 1)
                saver.finish()
            raise InputError(
                f"step {step}: loss {run.loss} or gradient norm {run.norm} is not finite, so "
                "training stopped before the update; try a lower lr or a longer warmup "
                f"(last checkpoint: {saver.last or 'none'})"
            )
        if run.guard.skips(run.loss, run.norm):
            state.discard()
            run.meter.totals["skipped_steps"] += 1
            show(f"step {step} skipped: loss {run.loss:.4g}, norm {run.norm:.4g}")
        else:
            state.step(run.norm, config.max_grad_norm)

        run.position = position
        run.meter.add(counts, run.losses, time.perf_counter() - began, waited)
        last = step == config.max_steps
        if step % config.log_every == 0 or last or not goes_on:
            run.log_step(step, rate)
        if config.eval_every and (step % config.eval_every == 0 or last):
            run.evaluate(step)
        if config.save_every and step % config.save_every == 0:
            run.save(step)
        run.stall_guard.step_ended()
    if step > run.start:
        run.save(step)
    saver.finish()
    with shared_errors():
        if run.data_error:
            raise InputError(run.data_error)
    if run.stopped:
        show(f"stop requested: stopped after step {step:,} of {config.max_steps:,}")
        if run.accelerator.is_main_process:
            (run.run_dir / "STOP").unlink(missing_ok=True)
    show(f"last checkpoint: {saver.last or 'none'}")
    if step < config.max_steps:
        show("next: run the same command to continue")
    else:
        show(f"next: qwen3-encdec extract --model {saver.last} --output ENCODER")
    return saver.last or run.run_dir
