"""Two-rank FSDP2 trainings that faults happen to, and what came of them; `make chaos` uses it.

Ranks are forked from a server that has everything imported, so that a life takes seconds.
"""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import time
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3EncoderLayer,Qwen3MergedDecoderLayer", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip

DDP: dict[str, str] = {}
ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu",
}  # fmt: skip
ZERO3 = ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}


def rank_process(
    rank: int, world: int, port: int, overrides: list[str], faults: dict[str, Any]
) -> None:
    """One rank. ``faults``: step at which a kind of fault happens, and

    slow: seconds that writing a file takes; full: no file can grow beyond 100 kB; launch:
    environment that distributes;
    dealt: deal one process' rows out in turn, so that a step has the same ones whatever the number
    of ranks;
    means: weigh every micro-batch the same, which is the common mistake.
    """
    log = Path(overrides[-1].partition("=")[2]).with_suffix(f".rank{rank}.log")
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {
        **({} if world == 1 else faults.get("launch", FSDP2)),
        **places,
        "OMP_NUM_THREADS": "1",
    }
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    import torch

    from qwen3_encdec.folders import InputError
    from qwen3_encdec.training import checkpoint as checkpoints
    from qwen3_encdec.training import loop, state
    from qwen3_encdec.training.config import load_config

    if faults.get("full"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    config, now = load_config(None, overrides), {"step": 0, "weights": iter(())}
    whole_backward = loop._backward
    learning_rate, agree, save_file = loop.learning_rate, loop._agree, checkpoints.save_file

    def at_step(step, config):
        now["step"] = step
        if step == faults.get("hang") and rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return learning_rate(step, config)

    def recorded(micro_batches, *arguments):
        rows = (row for batch in micro_batches for row in batch["input_ids"].numpy())
        seen = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in rows]
        with log.with_suffix(".consumed").open("a") as file:
            file.write(json.dumps([now["step"], rank, seen]) + "\n")
        return agree(micro_batches, *arguments)

    def slowly(*arguments, **options):
        time.sleep(faults.get("slow", 0))
        save_file(*arguments, **options)
        time.sleep(faults.get("slow", 0))

    def means(micro_batches, tokens, *arguments):
        targets = [int((batch["labels"] != -100).sum()) for batch in micro_batches]
        now["weights"] = iter([tokens / (own * len(targets) * world) for own in targets])
        return whole_backward(micro_batches, tokens, *arguments)

    def faulty(self, loss, last):
        loss = loss * next(now["weights"], 1.0)
        if now["step"] == faults.get("nan") and rank == 1:
            loss = loss * float("nan")
        backward(self, loss * 100 if now["step"] == faults.get("spike") else loss, last)

    loop.learning_rate, loop._agree, checkpoints.save_file = at_step, recorded, slowly
    kind = state.DeepSpeedState if faults.get("launch") in (ZERO2, ZERO3) else state.TrainingState
    backward = kind.backward
    kind.backward = faulty
    if faults.get("means"):
        loop._backward = means
    if faults.get("dealt"):
        build_stream = loop.build_stream
        loop.build_stream = lambda data, tokenizer, **_: Dealt(
            build_stream(data, tokenizer), rank, world, config.batch_size
        )
        loop.resume = Dealt.resume
        loop._epoch = lambda state: 0
    try:
        loop.run_training(config)
    except InputError as error:
        print(f"error: {error}", flush=True)
        os._exit(2)
    os._exit(0)


class Dealt(IterableDataset):
    """The rows of one process' stream, dealt out to ranks by the batch."""

    def __init__(self, rows: Any, rank: int, world: int, batch: int) -> None:
        self.rows, self.rank, self.world, self.batch, self.given = rows, rank, world, batch, 0

    def __iter__(self) -> Any:
        skip = self.given * self.world
        for number, row in enumerate(self.rows):
            if number >= skip and number // self.batch % self.world == self.rank:
                self.given += 1
                yield row

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]

    @staticmethod
    def resume(stream: Any, loader: Any, states: list[dict[str, Any]]) -> None:
        stream.given = sum(state["dataset_state"]["given"] for state in states) // stream.world


class Life:
    """A run's processes."""

    def __init__(self, overrides: list[str], world: int = 2, **faults: Any) -> None:
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

    def end(self, seconds: float = 120) -> list[int | None]:
        """Wait for all ranks; their exit codes."""
        for process in self.ranks:
            process.join(seconds)
        return [process.exitcode for process in self.ranks]


def settings(model: Path, corpus: Path, run: Path, **changes: Any) -> list[str]:
    """Overrides of a small run; the run's folder comes last."""
    values = {
        "model": model, "max_steps": 12, "warmup_steps": 1, "lr": 3e-3, "batch_size": 2, "log_every": 1,
        "save_every": 2, "keep_last": 3, "eval_every": 0, "trackers": "[]", "data.inputs": f"[{corpus}]",
        "data.heldout_every": 10, "data.source_length": 64, "data.target_length": 64, "stall_seconds": 60,
    } | changes  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()] + [f"output_dir={run}"]


def last_step(run: Path) -> int:
    """The newest step that a run has reported."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError, KeyError):
        return 0


def outcome(run: Path) -> dict[str, Any]:
    """Whatever must not depend on interruptions:

    trace, parameters, optimizer, and the examples of each step.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    consumed: dict[str, list[str]] = {}
    for log in sorted(run.parent.glob(f"{run.name}.rank*.consumed")):
        for line in log.read_text().splitlines():
            step, rank, seen = json.loads(line)
            consumed[f"{step}/{rank}"] = seen  # of a step that was repeated, the last time counts
    latest = run / "checkpoints/latest"
    files = sorted(latest.rglob("*.safetensors"))
    return {
        "trace": [[line["step"], line["loss"], line["grad_norm"]] for line in lines],
        "files": {
            str(f.relative_to(latest)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
        },
        "consumed": consumed,
    }


def kill_test(
    folder: Path, model: Path, corpus: Path, kills: int, seed: int = 0
) -> tuple[dict, dict, int]:
    """Outcomes of a run left alone and of one killed so often, and how many kills hit a checkpoint
    being written.
    """
    steps, rng, inside = 4 * (kills + 1), random.Random(seed), 0
    changes = {"max_steps": steps, "spike_window": 8}
    assert Life(settings(model, corpus, folder / "alone", **changes)).end(600) == [0, 0]
    run = folder / "killed"
    for number in range(1, kills + 1):
        life = Life(settings(model, corpus, run, **changes), slow=0.15)
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
        print(
            f"kill {number} of {kills}: at step {last_step(run)}{'' if alive else ', had ended'}",
            flush=True,
        )
        if not alive:
            raise SystemExit((run.with_suffix(".rank0.log")).read_text()[-3000:])
    assert Life(settings(model, corpus, run, **changes)).end(600) == [0, 0]
    return outcome(folder / "alone"), outcome(run), inside
