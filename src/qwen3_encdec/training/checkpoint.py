"""Write and read checkpoints: model folders that are also exact points to resume from.

docs/formats.md lists their files. Tensors are written and read by torch.distributed.checkpoint in
its Hugging Face format, by a thread while training continues. Ranks learn in the step's own
reduction when all have written, then rank 0 renames the folder from ``.step-000100.partial``. On
several machines the run's folder must be on a file system that they share.
"""

import copy
import json
import math
import os
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.futures import Future
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.folders import (
    PROVENANCE_FILE,
    InputError,
    describe_source,
    package_versions,
    read_json,
    write_json,
)
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.training.config import TrainingConfig, config_to_dict, flatten

BLOCK = 2**15
_FILE_BYTES = 5e9
_ONE_FILE = "model.safetensors"

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")


class Checkpointer:
    """Write a run's checkpoints. Every rank has one and calls the same methods in the same order.

    ``last`` is the newest complete checkpoint. A failure to write, on any rank, raises InputError
    on all of them at the next step or at ``finish``. ``state`` is a `TrainingState`.
    """

    def __init__(
        self,
        folder: Path,
        last: Path | None,
        *,
        accelerator: Accelerator,
        state: Any,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainingConfig,
    ) -> None:
        self.folder, self.last = folder, last
        self.accelerator, self.state = accelerator, state
        self.tokenizer, self.config = tokenizer, config
        # The writing thread must not mix its collectives with training's.
        self._group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._made_by = {"versions": package_versions(), "commit": describe_source("--abbrev=40")}
        self._step = 0
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._number = f"{accelerator.process_index + 1:05d}-of-{accelerator.num_processes:05d}"

    @property
    def _partial(self) -> Path:
        return self.folder / f".{folder_name(self._step)}.partial"

    def save(self, step: int, position: dict[str, Any], progress: dict[str, Any]) -> None:
        """Copy the state after ``step`` and begin to write it.

        ``position`` is this rank's in the data. Returns when training may continue: with
        ``async_checkpoints`` after the copy. Does nothing if ``step`` is saved.
        """
        self.finish()
        if self.last is not None and self.last.name == folder_name(step):
            return
        self._step = step
        stager = DefaultStager(StagingOptions(False, False, False, False))
        tensors = stager.stage(
            {"model": self.state.weights(), "state": self.state.optimizer_state()}
        )
        stager.close()
        training = {
            "step": step,
            "world_size": self.accelerator.num_processes,
            "config": config_to_dict(self.config),
            **copy.deepcopy(progress),
            **self._made_by,
        }
        work = (tensors, {"data": copy.deepcopy(position)}, training)
        self._writer = threading.Thread(target=self._write, args=work, daemon=True)
        self._writer.start()
        if not self.config.async_checkpoints:
            self.finish()

    def flags(self) -> list[int]:
        """Return [this rank has written, this rank has failed]; `settle` takes the sums."""
        ended = self._writer is not None and not self._writer.is_alive()
        return [int(ended and self._error is None), int(self._error is not None)]

    def settle(self, written: int, failed: int) -> None:
        """Publish a checkpoint that all ranks have written. Raises InputError if one has failed."""
        if failed:
            if self._writer is not None:
                self._writer.join()
            reasons = gather_object([self._error and _reason(self._error)])
            reason = next(reason for reason in reasons if reason)
            raise InputError(
                f"{self.folder.parent} could not be written to: {reason}; training stopped, the "
                f"last checkpoint is {self.last or 'none'}"
            ) from self._error
        if self._writer is None or written < self.accelerator.num_processes:
            return
        folder = self.folder / folder_name(self._step)
        if self.accelerator.is_main_process:
            try:
                self._publish(folder)
            except OSError as error:
                self._error = error  # the next flags tell the others
        self.last = self.last if self._error else folder
        self._writer = None

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any."""
        if self._writer is None:
            return
        self._writer.join()
        for _ in ("written", "published"):
            flags = torch.tensor(self.flags(), device=self.accelerator.device)
            self.settle(*self.accelerator.reduce(flags, "sum").tolist())

    def close(self) -> None:
        """Leave nothing half-written after an exception anywhere."""
        if self._writer is not None:
            self._writer.join()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _write(self, tensors: Any, position: dict[str, Any], training: dict[str, Any]) -> None:
        """Write this rank's files and their checks, on a thread of its own."""
        folder, state = self._partial, self._partial / "state"
        try:
            state.mkdir(parents=True, exist_ok=True)
            if self.accelerator.is_main_process:
                self._write_model_files(folder, training)
            options: dict[str, Any] = {"process_group": self._group, "no_dist": not self._group}
            files = _files_of_weights(self.state.parameters, tensors["model"])
            writer = dcp.HuggingFaceStorageWriter(
                str(folder), files, save_distributed=True, enable_consolidation=True
            )
            dcp.save(tensors["model"], storage_writer=writer, **options)
            writer = dcp.HuggingFaceStorageWriter(str(state), save_distributed=True)
            dcp.save(tensors["state"], storage_writer=writer, **options)
            mine = [state / f"rank-{self._number}.json"]
            write_json(mine[0], position)
            mine += state.glob(f"shard-{self._number[:5]}-*.safetensors")
            if self.accelerator.is_main_process:
                shutil.rmtree(folder / "sharded")
                (folder / _ONE_FILE).unlink(missing_ok=True)  # the empty one of save_pretrained
                if len(set(files.values())) == 1:
                    os.replace(folder / "model-00001-of-00001.safetensors", folder / _ONE_FILE)
                    (folder / f"{_ONE_FILE}.index.json").unlink()
                mine += [state / "training.json"]
                mine += [path for path in folder.iterdir() if path.is_file()]
            checks = {str(path.relative_to(folder)): checks_of(path, BLOCK) for path in mine}
            write_json(state / f"checks-{self._number}.json", {"block": BLOCK, "files": checks})
        except BaseException as error:  # of whatever kind, all ranks must hear of it
            self._error = error

    def _write_model_files(self, folder: Path, training: dict[str, Any]) -> None:
        """Write what is not sharded: configurations, tokenizer, the model's code and progress."""
        module = self.state.module
        with torch.device("meta"):
            plain = Qwen3ForSeq2SeqLM(module.config)  # a sharded one would save FSDP's code
        plain.generation_config = module.generation_config
        plain.save_pretrained(folder, state_dict={})
        self.tokenizer.save_pretrained(folder)
        provenance = {"kind": "encoder-decoder", "step": training["step"]}
        provenance |= {"model": self.config.model, "versions": self._made_by["versions"]}
        write_json(folder / PROVENANCE_FILE, provenance)
        write_json(folder / "state/training.json", training)

    def _publish(self, folder: Path) -> None:
        """Rename a complete checkpoint into place, move the links, delete what is not kept."""
        if folder.exists():  # a damaged one, or it would have been resumed from
            shutil.rmtree(folder)
        os.rename(self._partial, folder)
        _link(self.folder / "latest", folder.name)
        config, folders = self.config, _step_folders(self.folder)
        kept = set(folders[-config.keep_last :])
        kept |= {old for old in folders if config.keep_every and not _step(old) % config.keep_every}
        best = min(folders, key=_heldout_loss)
        if config.keep_best and math.isfinite(_heldout_loss(best)):
            kept.add(best)
            _link(self.folder / "best", best.name)
        for old in folders:
            if old not in kept:
                # One that cannot be deleted costs room and must not cost the run.
                shutil.rmtree(old, ignore_errors=True)
                if old.exists():
                    self.accelerator.print(f"{old} could not be deleted; delete it by hand")


class VerifiedReader(dcp.HuggingFaceStorageReader):
    """Read what this rank needs, once, in blocks that are checked against their CRC-32.

    Folders without checks are read unchecked. Raises InputError for a block that has changed.
    """

    bytes_read = 0

    def __init__(self, folder: Path, checks: dict[str, Any]) -> None:
        super().__init__(str(folder))
        self._checks = checks
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}
        self._last: tuple[str, int, bytes] = ("", -1, b"")

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        """Fill the planner's tensors, in the order of the files."""
        requests = []
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            path = str(stored.relative_path)
            start, shape = self._extent(path, item.storage_index.fqn)
            first = item.storage_offsets[0] if shape else 0
            row = stored.dtype.itemsize * math.prod(shape[1:])
            if list(item.lengths[1:]) != shape[1:]:
                raise InputError(f"{path}: only shards of whole rows are read")
            size = stored.dtype.itemsize * math.prod(item.lengths)
            requests.append((path, start + first * row, size, stored.dtype, item))
        for path, start, size, dtype, item in sorted(requests, key=lambda request: request[:2]):
            target = planner.resolve_tensor(item).detach()
            if size:
                content = torch.frombuffer(self._read(path, start, size), dtype=dtype)
                target.copy_(content.view(tuple(item.lengths)))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _extent(self, path: str, name: str) -> tuple[int, list[int]]:
        """Return a tensor's offset in its file and its shape, from the file's header."""
        if path not in self._headers:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._headers[path] = 8 + length, json.loads(file.read(length))
        begin, header = self._headers[path]
        return begin + header[name]["data_offsets"][0], header[name]["shape"]

    def _read(self, path: str, start: int, size: int) -> bytearray:
        """Read bytes of a file, block by block."""
        length, checks = self._checks.get(path, (BLOCK, None))
        content, begin = bytearray(), start % length
        with open(path, "rb", buffering=0) as file:
            for number in range(start // length, (start + size - 1) // length + 1):
                if self._last[:2] != (path, number):
                    file.seek(number * length)
                    block = file.read(length)
                    VerifiedReader.bytes_read += len(block)
                    if checks and zlib.crc32(block) != checks[number]:
                        raise InputError(f"{Path(path).name} does not have its checksum")
                    self._last = path, number, block
                content += self._last[2]
        return content[begin : begin + size]


def read_tensors_into(tensors: dict[str, torch.Tensor], folder: Path, below: str = "") -> None:
    """Fill tensors, sharded or not, from the safetensors files in ``folder / below``.

    Raises InputError if one is missing, has another shape or is damaged.
    """
    checks = {}
    for file in sorted((folder / "state").glob("checks-*.json")):
        written = read_json(file)
        for name, check in written["files"].items():
            sums = [int(crc, 16) for crc in check["crc32"].split()]
            checks[str(folder / name)] = written["block"], sums
    reader = VerifiedReader(folder / below, checks)
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # safetensors and torch raise many types
        raise InputError(_reason(error)) from None


def _files_of_weights(parameters: dict[str, Any], own: dict[str, torch.Tensor]) -> dict[str, int]:
    """Deal whole tensors out to files of about 5 GB, numbered from 1; the same on every rank."""
    files, size, number = {}, 0.0, 1
    for name, tensor in (parameters | own).items():
        # Under ZeRO-3 a parameter is empty and has its true shape beside it.
        nbytes = 4 * math.prod(getattr(tensor, "ds_shape", tensor.shape))
        if size and size + nbytes > _FILE_BYTES:
            size, number = 0.0, number + 1
        size += nbytes
        files[name] = number
    return files


def checks_of(path: Path, block: int) -> dict[str, Any]:
    """Return a file's size and the CRC-32 of each block, once it is on the disk: a rename must not
    survive a crash that the data does not.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        sums = [zlib.crc32(part) for part in iter(lambda: file.read(block), b"")]
    return {"bytes": path.stat().st_size, "crc32": " ".join(f"{crc:08x}" for crc in sums)}


def damage(folder: Path) -> str | None:
    """Say what is missing, cut or altered in a checkpoint, or None.

    Tensors are only looked at for their size: their content is checked while it is read.
    """
    try:
        writers = read_json(folder / "state/training.json")["world_size"]
        if list((folder / "state").glob("sha256-*.txt")):
            return None  # written before there were checks
        for number in range(1, writers + 1):
            checks = read_json(folder / f"state/checks-{number:05d}-of-{writers:05d}.json")
            for name, check in checks["files"].items():
                path = folder / name
                if not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != check["bytes"]:
                    return f"{name} has {path.stat().st_size:,} bytes instead of {check['bytes']:,}"
                if path.suffix != ".safetensors" and checks_of(path, checks["block"]) != check:
                    return f"{name} does not have its checksum"
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def restore(
    checkpoints: Path, load: Callable[[Path], None], accelerator: Accelerator
) -> tuple[Path | None, list[str]]:
    """Load the newest undamaged checkpoint; every rank calls it.

    ``load`` reads the tensors and raises InputError for a damaged one. Returns the checkpoint, None
    without any, and a sentence about each newer one: damaged, and renamed lest a later step count
    or replace it. Raises InputError with those sentences if all are damaged.
    """
    damages: dict[Path, str] = {}
    for folder in reversed(_step_folders(checkpoints)):
        found = damage(folder) if accelerator.is_main_process else None
        found = next((text for text in gather_object([found]) if text), None)
        if not found:
            try:
                load(folder)
            except InputError as error:
                found = str(error)
            found = next((text for text in gather_object([found]) if text), None)
        if not found:
            for damaged in damages if accelerator.is_main_process else ():
                aside = damaged.with_name(f"damaged-{damaged.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(damaged, aside)
            return folder, list(damages.values())
        damages[folder] = f"checkpoint {folder} is damaged: {found}"
    if damages:
        raise InputError("; ".join([*damages.values(), "no older checkpoint is left"]))
    return None, []


def newest(checkpoints: Path) -> Path | None:
    """Return the newest finished checkpoint, damaged or not."""
    return next(reversed(_step_folders(checkpoints)), None)


def read_training_state(folder: Path) -> dict[str, Any]:
    """Return ``state/training.json`` of a checkpoint, and the ranks' ``positions`` in the data."""
    ranks = [read_json(file)["data"] for file in sorted((folder / "state").glob("rank-*.json"))]
    return read_json(folder / "state/training.json") | {"positions": ranks}


def changes_since(state: dict[str, Any], config: dict[str, Any], world_size: int) -> list[str]:
    """Return a phrase about each setting that is not as it was at the checkpoint."""
    before, notes = flatten(state["config"]), []
    if state["world_size"] != world_size:
        notes.append(f"{state['world_size']} processes -> {world_size}")
    for name, value in flatten(config).items():
        # A setting that did not exist yet is no change.
        if name not in ("output_dir", "resume") and value != before.get(name, value):
            notes.append(f"{name} {before[name]!r} -> {value!r}")
    return notes


def folder_name(step: int) -> str:
    """Name the folder of the checkpoint after ``step``."""
    return f"step-{step:06d}"


def _reason(error: BaseException) -> str:
    """One line on an error, out of what torch.distributed.checkpoint wraps it in."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split()) or type(error).__name__


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _step_folders(checkpoints: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = checkpoints.glob("step-*")
    return sorted((path for path in found if path.name[5:].isdigit()), key=_step)


def _heldout_loss(folder: Path) -> float:
    """Mean held-out loss of a checkpoint, infinite where it was not evaluated."""
    try:
        loss = read_json(folder / "state/training.json").get("heldout_loss")
    except InputError:
        loss = None
    return math.inf if loss is None else loss


def _link(link: Path, name: str) -> None:
    """Point a symbolic link at a name, without a moment in which there is none."""
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, link)
