"""Trainings of several processes that faults happen to, and what came of them.

`make chaos` uses it. Ranks are forked from a server that has everything imported, so that a life
takes seconds.
"""

import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3EncoderLayer,Qwen3MergedDecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip
HSDP = FSDP2 | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
DDP: dict[str, str] = {}
ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "DS_ACCELERATOR": "cpu",
}
ZERO3 = ZERO2 | {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}


def rank_process(
    rank: int, world: int, port: int, overrides: list[str], faults: dict[str, Any]
) -> None:
    """One rank. ``faults`` are the step at which `nan`, `spike` or `hang` happens, and

    launch: environment that distributes;
    late: seconds until rank 1 looks at the run's folder;
    slow: seconds that writing tensors takes;
    full: bytes beyond which no file can grow;
    means: weigh every micro-batch the same, which is the common mistake.
    """
    log = Path(overrides[-1].partition("=")[2]).with_suffix(f".rank{rank}.log")
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if world > 1:
        os.environ |= faults.get("launch", FSDP2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    import torch

    from qwen3_encdec import folders
    from qwen3_encdec.folders import InputError
    from qwen3_encdec.training import checkpoint, loop
    from qwen3_encdec.training.config import load_config
    from qwen3_encdec.training.distributed import TrainingState
    from qwen3_encdec.training.steps import Run

    if limit := faults.get("full"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    now: dict[str, Any] = {"step": 0, "weights": iter(())}
    rate, save, backward = loop.learning_rate, checkpoint.dcp.save, Run.backward
    check_output = folders.check_output
    reader = checkpoint.dcp.HuggingFaceStorageReader
    read_data, read = reader.read_data, Counter()
    kind = TrainingState
    if faults.get("launch") in (ZERO2, ZERO3):
        from qwen3_encdec.training.deepspeed import DeepSpeedState as kind
    micro_backward = kind.backward

    def at_step(step, config):
        now["step"] = step
        if step == faults.get("hang") and rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return rate(step, config)

    def late(*arguments):
        time.sleep(rank * faults.get("late", 0))
        return check_output(*arguments)

    def slowly(*arguments, **options):
        time.sleep(faults.get("slow", 0))
        save(*arguments, **options)
        time.sleep(faults.get("slow", 0))

    def recorded(run, step, tokens):
        seen = []
        for batch in run.upcoming:
            documents = batch["input_ids"][0].split(batch["cu_seqlens"].diff().tolist())
            seen += [hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16] for ids in documents]
        with log.with_suffix(".consumed").open("a") as file:
            file.write(json.dumps([now["step"], rank, seen]) + "\n")
        if faults.get("means"):
            targets = [batch["labels"].numel() for batch in run.upcoming]
            now["weights"] = iter([tokens / (own * len(targets) * world) for own in targets])
        return backward(run, step, tokens)

    def counted(reader, plan, planner):
        for item in plan.items:
            stored = reader.storage_data[item.storage_index]
            read["bytes"] += stored.dtype.itemsize * math.prod(item.lengths)
        return read_data(reader, plan, planner)

    def faulty(state, loss):
        loss = loss * next(now["weights"], 1.0)
        if now["step"] == faults.get("nan") and rank == 1:
            loss = loss * float("nan")
        micro_backward(state, loss * 100 if now["step"] == faults.get("spike") else loss)

    loop.learning_rate, checkpoint.dcp.save, folders.check_output = at_step, slowly, late
    Run.backward, kind.backward, reader.read_data = recorded, faulty, counted
    try:
        loop.run_training(load_config(None, overrides))
    except InputError as error:
        print(f"error: {error}", flush=True)
        os._exit(2)
    print(f"READ {read['bytes']}", flush=True)
    os._exit(0)


FAULTS = {"full", "hang", "late", "launch", "means", "nan", "slow", "spike"}


class Life:
    """The processes of a small run; ``options`` are settings or faults."""

    def __init__(
        self, model: Path, corpus: Path, run: Path, world: int = 2, **options: Any
    ) -> None:
        faults = {name: options.pop(name) for name in FAULTS & options.keys()}
        overrides = settings(model, corpus, run, **options)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["qwen3_encdec.training.loop"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks = [
            context.Process(target=rank_process, args=(rank, world, port, overrides, faults))
            for rank in range(world)
        ]
        for process in self.ranks:
            process.start()

    def kill(self) -> None:
        """SIGKILL all ranks."""
        for process in self.ranks:
            process.kill()
        self.end()

    def end(self, seconds: float = 240) -> list[int | None]:
        """Wait for all ranks; their exit codes."""
        for process in self.ranks:
            process.join(seconds)
        return [process.exitcode for process in self.ranks]


def settings(model: Path, corpus: Path, run: Path, **changes: Any) -> list[str]:
    """Overrides of a small run; the run's folder comes last."""
    values = {
        "model": model, "max_steps": 12, "warmup_steps": 1, "lr": 3e-3, "batch_size": 2,
        "log_every": 1, "save_every": 2, "keep_last": 3, "eval_every": 0, "trackers": "[]",
        "num_workers": 0, "data.inputs": f"[{corpus}]", "data.heldout_every": 10,
        "data.source_length": 64, "data.target_length": 64, "data.streams": 60,
        "stall_seconds": 60,
    } | changes  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()] + [f"output_dir={run}"]


def last_step(run: Path) -> int:
    """The newest step that a run has reported."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError, KeyError):
        return 0


def consumed(run: Path) -> dict[int, list[str]]:
    """Documents of each step, whichever ranks had them; of a repeated step, the last time."""
    by_rank: dict[tuple[int, int], list[str]] = {}
    for log in sorted(run.parent.glob(f"{run.name}.rank*.consumed")):
        for line in log.read_text().splitlines():
            step, rank, seen = json.loads(line)
            by_rank[step, rank] = seen
    together: dict[int, list[str]] = {}
    for (step, _), seen in by_rank.items():
        together[step] = sorted(together.get(step, []) + seen)
    return together


def outcome(run: Path) -> dict[str, Any]:
    """Whatever must not depend on interruptions: trace, tensors, and the documents of each step."""
    from safetensors.torch import load_file

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    latest, tensors = (run / "checkpoints/latest").resolve(), {}
    for file in sorted(latest.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            tensors[f"{file.name}/{name}"] = digest
    return {
        "trace": [[line["step"], line["loss"], line["grad_norm"]] for line in lines],
        "tensors": tensors,
        "consumed": consumed(run),
    }


def kill_test(
    folder: Path, model: Path, corpus: Path, kills: int, seed: int = 0
) -> tuple[dict, dict, int]:
    """Outcomes of a run left alone and of one killed so often, and how many kills hit a checkpoint
    being written.
    """
    steps, rng, inside = 4 * (kills + 1), random.Random(seed), 0
    changes = {"max_steps": steps, "spike_window": 8}
    assert Life(model, corpus, folder / "alone", **changes).end(600) == [0, 0]
    run = folder / "killed"
    for number in range(1, kills + 1):
        life = Life(model, corpus, run, **changes, slow=0.15)
        target = steps * number // (kills + 1)
        deadline = time.monotonic() + 120
        while last_step(run) < target and time.monotonic() < deadline and life.ranks[0].is_alive():
            time.sleep(0.01)
        if number % 2:  # every second one waits for a checkpoint to be on its way
            while not list(run.glob("checkpoints/.step-*")) and life.ranks[0].is_alive():
                time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        inside += bool(list(run.glob("checkpoints/.step-*")))
        alive = all(process.is_alive() for process in life.ranks)
        life.kill()
        ended = "" if alive else ", had ended"
        print(f"kill {number} of {kills}: at step {last_step(run)}{ended}", flush=True)
        if not alive:
            raise SystemExit(run.with_suffix(".rank0.log").read_text()[-3000:])
    assert Life(model, corpus, run, **changes).end(600) == [0, 0]
    return outcome(folder / "alone"), outcome(run), inside
