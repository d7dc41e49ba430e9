"""Checkpoints that are both an ordinary model folder and an exact point to resume from, without
pickle.

RUN/checkpoints/step-000100/     config.json, safetensors (fp32), tokenizer files: ``from_pretrained`` loads it
    model-00001-of-00002.safetensors            the tensors that rank 0 keeps; from one rank model.safetensors
    state/optimizer-00001-of-00002.safetensors  and what the optimizer remembers of them, as PARAMETER.KEY
    state/rank-00001-of-00002.json              a rank's place in the data and its random generators
    state/training.json                         step, world size, config, versions, commit, totals and guards
    state/sha256-00001-of-00002.txt             checksums of the files that rank 0 wrote, as `sha256sum -c` reads them
RUN/checkpoints/latest           symbolic link to the newest

Tensors are dealt out to the ranks by size; each copies its own to the CPU, whole, and a thread of
it writes them while training goes on. When all ranks have written, which they tell each other in
the step's own reduction, rank 0 renames the folder from ``.step-000100.partial``. Nothing depends
on the number of ranks but the names of files. On several machines, the run's folder must be on a
file system that they share.

SHA-256 because every system has a tool for it and processors an instruction: it is not slower than
a disk.
"""

import copy
import functools
import hashlib
import os
import random
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.folders import (
    PROVENANCE_FILE,
    InputError,
    describe_source,
    package_versions,
    read_json,
    write_json,
)
from qwen3_encdec.training.config import TrainingConfig, config_to_dict, flatten
from qwen3_encdec.training.distributed import TrainingState

# What decides the order and content of the examples, and what the optimizer's state means; a
# resumed run must agree.
_FIXED = ("data", "batch_size", "seed", "optimizer")


class Checkpointer:
    """Writes a run's checkpoints. Every rank has one and calls the same methods in the same order.

    ``last`` is the newest complete checkpoint. Any failure to write, on any rank, raises InputError
    on all of them at the next step (or at ``finish``); what was incomplete is removed and ``last``
    still holds.
    """

    def __init__(
        self,
        folder: Path,
        last: Path | None,
        *,
        accelerator: Accelerator,
        state: TrainingState,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainingConfig,
    ) -> None:
        self.folder, self.last = folder, last
        self.accelerator, self.state, self.tokenizer, self.config = (
            accelerator,
            state,
            tokenizer,
            config,
        )
        self._step: int | None = None  # of the checkpoint that is being written
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._file = f"{accelerator.process_index + 1:05d}-of-{accelerator.num_processes:05d}"

    def save(self, step: int, place: dict[str, Any], progress: dict[str, Any]) -> None:
        """Copy the state after ``step`` and begin to write it; ``place`` is of `place_of`.

        Returns when training may go on: with ``async_checkpoints`` after the copy. Done at once if
            ``step`` is saved.
        """
        self.finish()
        if self.last is not None and self.last.name == folder_name(step):
            return
        weights, owners = self._own(self.state.weights())
        optimizer, _ = self._own(self.state.optimizer_state())
        rank = {"data": place["data"], "random": _random_to_json(place["random"])}
        training = {
            "step": step,
            "world_size": self.accelerator.num_processes,
            "config": config_to_dict(self.config),
            **progress,
        }
        self._step = step
        work = functools.partial(
            self._write, weights, owners, optimizer, copy.deepcopy(rank), copy.deepcopy(training)
        )
        self._writer = threading.Thread(target=work, daemon=True, name="checkpoint")
        self._writer.start()
        if not self.config.async_checkpoints:
            self.finish()

    def flags(self) -> list[int]:
        """[this rank has written, this rank has failed], to be summed over the ranks and given to
        `settle`.
        """
        ended = self._writer is not None and not self._writer.is_alive()
        return [int(ended and self._error is None), int(self._error is not None)]

    def settle(self, written: int, failed: int) -> None:
        """Finish a checkpoint that all ranks have written.

        Raises InputError if a rank has failed.
        """
        if failed:
            self._abandon()
        if self._writer is None or written < self.accelerator.num_processes:
            return
        assert self._step is not None
        folder = self.folder / folder_name(self._step)
        if self.accelerator.is_main_process:
            try:
                self._publish(folder)
            except OSError as error:
                self._error = error  # the next flags tell the others
        self.last, self._writer = folder, None

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any."""
        if self._writer is not None:
            self._writer.join()
            flags = torch.tensor(self.flags(), device=self.accelerator.device)
            self.settle(*self.accelerator.reduce(flags, "sum").tolist())

    def fail(self, error: BaseException) -> None:
        """Let all ranks stop at the next step, for a file that this one could not write."""
        self._error = error

    def close(self) -> None:
        """After an exception anywhere: leave nothing half-written."""
        if self._writer is not None:
            self._writer.join()
            shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def _partial(self) -> Path:
        return self.folder / f".{folder_name(self._step or 0)}.partial"

    def _abandon(self) -> None:
        """All ranks stop. Raises InputError, the same on each."""
        if self._writer is not None:
            self._writer.join()
        reasons = gather_object([str(self._error) if self._error else None])
        if self.accelerator.is_main_process and self._step is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._writer = None
        reason = next(reason for reason in reasons if reason)
        raise InputError(
            f"{self.folder.parent} could not be written to: {reason}; training stopped, the last checkpoint is "
            f"{self.last or 'none'}"
        ) from self._error

    def _own(self, tensors: Any) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Those of the whole tensors that this rank keeps, copied to the CPU, and every tensor's
        rank by name.
        """
        loads, kept, owners = [0] * self.accelerator.num_processes, {}, {}
        for name, tensor in tensors:
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += tensor.nbytes
            if owners[name] == self.accelerator.process_index:
                kept[name] = tensor.to("cpu", copy=True).contiguous()
        return kept, owners

    def _write(
        self,
        weights: dict[str, torch.Tensor],
        owners: dict[str, int],
        optimizer: dict[str, torch.Tensor],
        rank: dict[str, Any],
        training: dict[str, Any],
    ) -> None:
        """This rank's files and their checksums, on a thread of its own."""
        try:
            folder, files = self._partial, []
            (folder / "state").mkdir(parents=True, exist_ok=True)

            def path(name: str) -> Path:
                files.append(folder / name)
                return folder / name

            shards = self.accelerator.num_processes
            weights_name = "model.safetensors" if shards == 1 else f"model-{self._file}.safetensors"
            save_file(weights, path(weights_name), metadata={"format": "pt"})
            save_file(optimizer, path(f"state/optimizer-{self._file}.safetensors"))
            write_json(path(f"state/rank-{self._file}.json"), rank)
            if self.accelerator.is_main_process:
                made_by = {"versions": package_versions(), "commit": _commit()}
                write_json(path("state/training.json"), training | made_by)
                if shards > 1:
                    index = {
                        n: f"model-{rank + 1:05d}-of-{shards:05d}.safetensors"
                        for n, rank in owners.items()
                    }
                    write_json(
                        path("model.safetensors.index.json"), {"metadata": {}, "weight_map": index}
                    )
                files += self._write_ordinary(folder, training["step"])
            sums = [f"{_seal(file)}  {file.relative_to(folder)}\n" for file in files]
            (folder / f"state/sha256-{self._file}.txt").write_text("".join(sums), encoding="utf-8")
        except Exception as error:  # of whatever kind, all ranks must hear of it
            self._error = error

    def _write_ordinary(self, folder: Path, step: int) -> list[Path]:
        """What makes it a model folder:

        configuration, generation defaults, tokenizer, the model's own code.
        """
        module = self.state.module
        scratch = folder / "ordinary"  # save_pretrained removes shards that it doesn't know
        module.save_pretrained(scratch, state_dict={})
        self.tokenizer.save_pretrained(scratch)
        provenance = {"kind": "encoder-decoder", "step": step, "model": self.config.model}
        write_json(scratch / PROVENANCE_FILE, {**provenance, "versions": package_versions()})
        files = [folder / file.name for file in scratch.iterdir() if file.suffix != ".safetensors"]
        for file in files:
            os.replace(scratch / file.name, file)
        shutil.rmtree(scratch)
        return files

    def _publish(self, folder: Path) -> None:
        """Rename a complete checkpoint into place, point ``latest`` at it, delete those that are
        not kept.
        """
        if folder.exists():  # a damaged one, or it would have been resumed from
            shutil.rmtree(folder)
        os.rename(self._partial, folder)
        pointer = self.folder / ".latest"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(folder.name)
        os.replace(pointer, self.folder / "latest")
        keep_last, keep_every = self.config.keep_last, self.config.keep_every
        for old in _step_folders(self.folder)[:-keep_last] if keep_last else ():
            if not keep_every or _step(old) % keep_every:
                shutil.rmtree(old)


def place_of(loader: StatefulDataLoader, device: torch.device) -> dict[str, Any]:
    """Where this rank is: its place in the data and its random generators."""
    random_state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(device)
    return {"data": loader.state_dict(), "random": random_state}


def find_checkpoint(
    checkpoints: Path, accelerator: Accelerator
) -> tuple[Path | None, dict[Path, str]]:
    """The newest undamaged checkpoint, and a sentence about each newer one that is damaged.

    Every rank calls it and checks a share of the files. Raises InputError with those sentences when
    there are checkpoints and all are damaged.
    """
    damages: dict[Path, str] = {}
    for folder in reversed(_step_folders(checkpoints)):
        found = gather_object(
            [_damage(folder, accelerator.process_index, accelerator.num_processes)]
        )
        damage = next((sentence for sentence in found if sentence), None)
        if damage is None:
            return folder, damages
        damages[folder] = f"checkpoint {folder} is damaged: {damage}"
    if damages:
        raise InputError(
            "; ".join(damages.values()) + "; no older checkpoint is left to resume from"
        )
    return None, {}


def set_aside(damages: dict[Path, str]) -> None:
    """Rename damaged checkpoints, for somebody to look at, so that no later step counts or replaces
    them.
    """
    for folder in damages:
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)


def read_training_state(
    folder: Path, config: dict[str, Any], world_size: int
) -> tuple[dict[str, Any], list[str]]:
    """``state/training.json`` of a checkpoint with its ``ranks``, and a phrase about each setting
    that differs.

    Another number of processes is such a setting: what is left of the data is dealt out anew.

    Raises InputError if the run to resume would see other data or has another optimizer; other data
    may be accepted with `data.accept_changes`.
    """
    state = read_json(folder / "state/training.json")
    state["ranks"] = [read_json(file) for file in sorted((folder / "state").glob("rank-*.json"))]
    before, notes = flatten(state["config"]), []
    if state["world_size"] != world_size:
        notes.append(f"{state['world_size']} processes -> {world_size}")
    for name, value in flatten(config).items():
        if name in ("output_dir", "resume", "data.accept_changes") or value == before.get(name):
            continue
        accepted = name.startswith("data.") and config["data"]["accept_changes"]
        if name.split(".")[0] in _FIXED and not accepted:
            raise InputError(
                f"cannot resume {folder} with {name}={value!r}, it was trained with {before.get(name)!r}; "
                "set it back, or begin anew in another output_dir"
            )
        notes.append(f"{name} {before.get(name)!r} -> {value!r}")
    return state, notes


def load_optimizer_state(folder: Path, state: TrainingState, ema: bool) -> None:
    """Fill the optimizer, sharded or not, from a checkpoint;

    ``ema``: with its average of the weights.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted((folder / "state").glob("optimizer-*.safetensors"))
        ]
        holders = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - a handle is not iterable
        keys = [key for key in holders if ema or not key.endswith(".ema")]
        state.load_optimizer_state(keys, lambda key: holders[key].get_tensor(key))


def load_random_state(state: dict[str, Any], rank: int) -> None:
    """Put back this rank's generators:

    Python's, numpy's and torch's. A rank that is new takes an old one's.
    """
    saved = state["ranks"][rank % len(state["ranks"])]["random"]
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(saved["cpu"]))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(saved["cuda"]))


def _random_to_json(state: dict[str, Any]) -> dict[str, Any]:
    name, keys, *rest = state["numpy"]
    tensors: dict[str, Any] = {
        device: bytes(state[device].tolist()).hex() for device in ("cpu", "cuda") if device in state
    }
    return {"python": state["python"], "numpy": [name, keys.tolist(), *rest], **tensors}


def _from_hex(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def folder_name(step: int) -> str:
    """Of the checkpoint after `step`."""
    return f"step-{step:06d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _step_folders(checkpoints: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [
        path for path in checkpoints.glob("step-*") if path.is_dir() and path.name[5:].isdigit()
    ]
    return sorted(found, key=_step)


def _seal(file: Path) -> str:
    """A file's checksum, after it has been brought to the disk:

    a rename must not survive a crash that data don't.
    """
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _damage(folder: Path, rank: int, world_size: int) -> str | None:
    """What is wrong with a checkpoint, or None:

    all ranks look whether files are there, each at a share's contents.
    """
    try:
        writers = read_json(folder / "state/training.json")["world_size"]
        lines = []
        for number in range(1, writers + 1):
            sums = f"state/sha256-{number:05d}-of-{writers:05d}.txt"
            lines += (folder / sums).read_text(encoding="utf-8").splitlines()
        files = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
        for name in files:
            if not (folder / name).is_file():
                return f"{name} is missing"
        for name, checksum in list(files.items())[rank::world_size]:
            if _seal(folder / name) != checksum:
                return f"{name} has {(folder / name).stat().st_size:,} bytes and not the checksum it was written with"
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


@functools.cache
def _commit() -> str | None:
    return describe_source("--abbrev=40")
