"""Write and read checkpoints: model folders from which training resumes exactly.

docs/formats.md lists their files. torch.distributed.checkpoint writes the tensors in its Hugging
Face format from a background thread. After all ranks have written, rank 0 renames the folder. All
machines must share its file system.
"""

import math
import os
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from qwen3_encdec import folders
from qwen3_encdec.folders import InputError, read_json, write_json
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.training.config import TrainingConfig, config_to_dict, flatten
from qwen3_encdec.training.distributed import TrainingState, assigned, checksums, shared_errors

_FILE_BYTES = 5e9
_ONE_FILE = "model.safetensors"
_OF_HELDOUT_TEXTS = ("eval_examples_per_denoiser", "data.heldout_inputs")


class Checkpointer:
    """Write a run's checkpoints; ``last`` is the newest. All ranks must call the same methods."""

    def __init__(
        self, config: TrainingConfig, state: TrainingState, tokenizer: Any, last: Path | None
    ) -> None:
        self.config, self.state, self.tokenizer, self.last = config, state, tokenizer, last
        self.folder = Path(config.output_dir) / "checkpoints"
        self._ranks = state.accelerator.num_processes
        self._is_main = state.accelerator.is_main_process
        # The writer thread needs its own group to keep its collectives apart from training's.
        self._group = dist.new_group(backend="gloo") if self._ranks > 1 else None
        self._writing: Future[Path] | None = None
        commit = folders.describe_source("--abbrev=40")
        self._made_by = {"versions": folders.package_versions(), "commit": commit}

    def save(self, step: int, position: dict[str, Any], progress: dict[str, Any]) -> None:
        """Copy the state after ``step`` and start writing it, unless it is already written."""
        self.finish()
        if self.last is not None and self.last.name == folder_name(step):
            return
        parts = {"model": self.state.weights(), "state": self.state.optimizer_state()}
        files = {part: _file_numbers(tensors) for part, tensors in parts.items()}
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copied = stager.stage({part: assigned(tensors) for part, tensors in parts.items()})
        stager.close()
        settings = {"config": config_to_dict(self.config), "world_size": self._ranks}
        training = {"step": step, **settings, **progress, **self._made_by}
        # Not one thread for all: as long as it lives, so do its OpenMP threads, and beside them
        # those of the main thread stop spinning. CPU steps then took a third longer.
        thread = ThreadPoolExecutor(1)
        self._writing = thread.submit(self._write, copied, files, position, training)
        thread.shutdown(wait=False)

    @property
    def failed(self) -> bool:
        """Return True if the checkpoint could not be written; `finish` then raises on all ranks."""
        return bool(self._writing and self._writing.done() and self._writing.exception())

    def finish(self) -> None:
        """Wait for the checkpoint being written; raise InputError if that fails."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            self.last = writing.result()
        except InputError as error:
            raise InputError(
                f"cannot write to {self.folder.parent}: {error}; training stopped, the last "
                f"checkpoint is {self.last or 'none'}"
            ) from None

    def close(self) -> None:
        """Wait for the checkpoint being written and ignore its errors."""
        if self._writing:
            self._writing.exception()

    def _write(self, tensors: Any, files: Any, position: Any, training: dict[str, Any]) -> Path:
        folder = self.folder / folder_name(training["step"])
        partial = self.folder / f".{folder.name}.partial"
        device = self.state.accelerator.device.index  # None on a CPU
        try:
            # A rank that fails alone must not leave the others waiting in torch's collectives.
            with shared_errors(self._group, BaseException):
                self._write_small_files(partial, tensors, position, training)
            # A new thread's device is the first one, on which torch would make a context.
            with shared_errors(self._group, BaseException), torch.accelerator.device_index(device):
                self._write_tensors(partial, tensors, files)
            with shared_errors(self._group, BaseException):
                if self._is_main:
                    self._publish(partial, folder, training["heldout_loss"])
        except InputError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return folder

    def _write_small_files(self, partial: Path, tensors: Any, position: Any, training: Any) -> None:
        """Write this rank's position and checksums; rank 0 also writes the rest of the folder."""
        state = partial / "state"
        state.mkdir(parents=True, exist_ok=True)
        if self._is_main:
            module = self.state.module
            with torch.device("meta"):
                plain = Qwen3ForSeq2SeqLM(module.config)  # a sharded model would save FSDP's code
            plain.generation_config = module.generation_config
            plain.save_pretrained(partial, state_dict={})
            (partial / _ONE_FILE).unlink(missing_ok=True)
            self.tokenizer.save_pretrained(partial)
            model = os.path.abspath(self.config.model)  # it may be read from another folder
            made_by = {"kind": "encoder-decoder", "model": model, "step": training["step"]}
            write_json(partial / folders.PROVENANCE_FILE, made_by | self._made_by)
            write_json(state / "training.json", training)
        sums = checksums(tensors["model"] | tensors["state"])
        rank = self.state.accelerator.process_index + 1
        name = f"rank-{rank:05d}-of-{self._ranks:05d}.json"
        write_json(state / name, {"data": position, "checksums": sums})

    def _write_tensors(self, partial: Path, tensors: Any, files: Any) -> None:
        """Write this rank's shards; of several ranks, rank 0 then joins those of the weights."""
        options: dict[str, Any] = {"process_group": self._group, "no_dist": not self._group}
        several, state = self._ranks > 1, str(partial / "state")
        writer = dcp.HuggingFaceStorageWriter(
            str(partial), files["model"], save_distributed=several, enable_consolidation=several
        )
        dcp.save(tensors["model"], storage_writer=writer, **options)
        writer = dcp.HuggingFaceStorageWriter(state, files["state"], save_distributed=True)
        dcp.save(tensors["state"], storage_writer=writer, **options)

    def _publish(self, partial: Path, folder: Path, loss: float | None) -> None:
        """Rename the finished checkpoint into place, update the links, delete old checkpoints."""
        shutil.rmtree(partial / "sharded", ignore_errors=True)
        only = partial / "model-00001-of-00001.safetensors"
        if only.exists():
            os.replace(only, partial / _ONE_FILE)
            (partial / f"{_ONE_FILE}.index.json").unlink()
        files = [path for path in partial.rglob("*") if path.is_file()]
        checks = {str(path.relative_to(partial)): _size_and_crc(path) for path in files}
        write_json(partial / "state/checks.json", checks)
        for path in (*files, partial / "state/checks.json"):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a crash must not keep the rename but lose the data
        os.rename(partial, folder)

        _link(self.folder / "latest", folder)
        best, every = self.folder / "best", self.config.keep_every
        if loss is not None and loss < _heldout_loss(best):
            _link(best, folder)
        for old in step_folders(self.folder)[: -self.config.keep_last]:
            kept = every and int(old.name[5:]) % every == 0
            if not kept and old.name != best.resolve().name:
                shutil.rmtree(old, ignore_errors=True)
                if old.exists():
                    print(f"{old} could not be deleted; delete it manually", flush=True)


def restore(candidates: list[Path], state: TrainingState) -> dict[str, Any]:
    """Load the last undamaged candidate and return its training state, on all ranks.

    Damaged ones after it are renamed, so that later steps neither count nor replace them. Raises
    InputError if all are damaged.
    """
    damages: dict[Path, str] = {}
    for folder in reversed(candidates):
        try:
            with shared_errors():
                _check_files(folder)
            state.read(folder)
        except InputError as error:
            damages[folder] = f"checkpoint {folder} is damaged: {error}"
            continue
        with shared_errors(), folders.writing(folder.parent):
            if state.accelerator.is_main_process:
                _set_aside(damages)
        training = read_json(folder / "state/training.json")
        ranks = [read_json(file)["data"] for file in sorted(folder.glob("state/rank-*.json"))]
        if before := training.get("guard"):  # written by an earlier version
            training["recent"] = before.get("recent", before.get("applied"))
        if not all("streams" in position for position in ranks):  # data had another order then
            ranks = [{"data": "", "rows": 0, "streams": {}}]
        return training | {"folder": folder, "positions": ranks}
    if damages:
        raise InputError("; ".join([*damages.values(), "no older checkpoint is left"]))
    return {"folder": None, "step": 0, "totals": {}, "recent": [], "positions": []}


def _set_aside(damages: dict[Path, str]) -> None:
    """Print what is wrong with each damaged checkpoint and rename it."""
    for damaged, sentence in damages.items():
        print(sentence, flush=True)
        aside = damaged.with_name(f"damaged-{damaged.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(damaged, aside)


def changes_since(state: dict[str, Any], config: TrainingConfig, ranks: int) -> list[str]:
    """Describe each setting that differs from the checkpoint's; one that it lacks does not."""
    before = flatten(state["config"]) | {"processes": state["world_size"]}
    now = flatten(config_to_dict(config)) | {"processes": ranks}
    changes = []
    for name, value in now.items():
        if name != "output_dir" and value != before.get(name, value):
            # The texts were chosen when the run began.
            note = " (heldout.json decides)" if name in _OF_HELDOUT_TEXTS else ""
            changes.append(f"{name} {before[name]!r} -> {value!r}{note}")
    return changes


def folder_name(step: int) -> str:
    """Return the folder name of the checkpoint after ``step``."""
    return f"step-{step:06d}"


def _file_numbers(tensors: dict[str, Any]) -> dict[str, int]:
    """Assign tensors to files of about 5 GB, all shards together, numbered from 1.

    torch needs twice a file's size in memory to write it.
    """
    sizes = [4 * tensor.numel() for tensor in tensors.values()]
    numbers = [1 + int(end // _FILE_BYTES) for end in accumulate(sizes)]
    return dict(zip(tensors, numbers, strict=True))


def _size_and_crc(path: Path) -> list[int]:
    """Return a file's bytes and CRC-32, which is 0 for safetensors: tensors have checksums."""
    content = b"" if path.suffix == ".safetensors" else path.read_bytes()
    return [path.stat().st_size, zlib.crc32(content)]


def _check_files(folder: Path) -> None:
    """Raise InputError if a file is missing, cut or altered; tensor content is not checked."""
    state = folder / "state"
    if [*state.glob("checks-*.json"), *state.glob("sha256-*.txt")]:
        return  # from an earlier version; files that cannot be loaded are detected later
    checks = read_json(state / "checks.json")
    for name, check in checks.items():
        if not (folder / name).is_file():
            raise InputError(f"{name} is missing")
        if _size_and_crc(folder / name) != check:
            raise InputError(f"{name} has changed since it was written")
    for path in (*folder.glob("*.safetensors"), *state.glob("*.safetensors")):
        if str(path.relative_to(folder)) not in checks:  # torch would read it too
            raise InputError(f"{path.name} does not belong to it; remove that file")


def step_folders(checkpoints: Path) -> list[Path]:
    """Return finished checkpoints, oldest first."""
    found = [path for path in checkpoints.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _heldout_loss(folder: Path) -> float:
    """Return a checkpoint's held-out loss; infinity if there is none or it cannot be read."""
    with suppress(InputError):
        loss = read_json(folder / "state/training.json").get("heldout_loss")
        return math.inf if loss is None else loss
    return math.inf


def _link(link: Path, folder: Path) -> None:
    """Point a symbolic link at a folder atomically; a failure is only printed.

    A copied run may have a folder in place of the link, and some file systems have no links.
    """
    temporary = link.with_name(f".{link.name}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        os.replace(temporary, link)
    except OSError as error:
        print(f"{link} could not be linked to {folder.name}: {error.strerror}", flush=True)
