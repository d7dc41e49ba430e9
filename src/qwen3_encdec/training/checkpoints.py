"""Checkpoints that are both an ordinary model folder and an exact point to resume from, without pickle.

RUN/checkpoints/step-000100/     config.json, model.safetensors (fp32), tokenizer files: ``from_pretrained`` loads it
    state/optimizer.safetensors  AdamW's state, gathered from all shards, under the parameters' names
    state/random.safetensors     torch's generator states of each rank
    state/training.json          step, world size, config, optimizer groups, and each rank's place in the data
    state/files.json             size of every file, to notice a damaged checkpoint before it is used
RUN/checkpoints/latest           symbolic link to the newest
"""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.files import InputError, new_folder, read_json, write_json
from qwen3_encdec.training.config import flatten

# What decides the order and content of the examples; a resumed run must agree on all of it.
_FIXED = ("data", "batch_size", "seed")


def save_checkpoint(
    checkpoints: Path,
    *,
    step: int,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    data_state: dict[str, Any],
    totals: dict[str, int],
    config: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write ``checkpoints/step-NNNNNN`` from all ranks' state, point ``latest`` at it and delete old ones.

    Every rank calls it. Parameters and optimizer states are gathered in fp32 to the memory of rank 0, which
    writes; the folder appears under its name only when complete.
    """
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=gather)
    optimizer_state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=gather)
    ranks = gather_object([{"data": data_state, "random": _random_state(accelerator.device)}])
    folder = checkpoints / f"step-{step:06d}"
    if accelerator.is_main_process:
        with new_folder(folder, "encoder-decoder", step=step, model=config["model"]) as building:
            unwrapped = accelerator.unwrap_model(model)
            for name in unwrapped.all_tied_weights_keys:  # gathering made them tensors of their own
                weights.pop(name, None)
            unwrapped.save_pretrained(building, state_dict=weights)
            tokenizer.save_pretrained(building)
            state = building / "state"
            state.mkdir()
            tensors = {
                f"{name}.{key}": value.contiguous()
                for name, values in optimizer_state["state"].items()
                for key, value in values.items()
            }
            save_file(tensors, state / "optimizer.safetensors")
            generators = {
                f"{rank}.{device}": value
                for rank, item in enumerate(ranks)
                for device, value in item["random"].pop("torch").items()
            }
            save_file(generators, state / "random.safetensors")
            training = {
                "step": step,
                "world_size": accelerator.num_processes,
                "config": config,
                "totals": totals,
                "param_groups": optimizer_state["param_groups"],
                "ranks": ranks,
            }
            write_json(state / "training.json", training)
            files = sorted(path for path in building.rglob("*") if path.is_file())
            write_json(state / "files.json", {str(path.relative_to(building)): path.stat().st_size for path in files})
        pointer = checkpoints / ".latest"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(folder.name)
        os.replace(pointer, checkpoints / "latest")
        for old in _step_folders(checkpoints)[:-keep_last] if keep_last else ():
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def find_checkpoint(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a sentence about each newer one that is damaged.

    Raises InputError with those sentences when there are checkpoints and all are damaged.
    """
    damages: list[str] = []
    for folder in reversed(_step_folders(checkpoints)):
        damage = _damage(folder)
        if damage is None:
            return folder, damages
        damages.append(f"checkpoint {folder} is damaged: {damage}")
    if damages:
        raise InputError("; ".join(damages) + "; no older checkpoint is left to resume from")
    return None, []


def read_training_state(folder: Path, config: dict[str, Any], world_size: int) -> tuple[dict[str, Any], list[str]]:
    """``state/training.json`` of a checkpoint, and a phrase about each setting that differs but may.

    Another number of processes is such a setting: what is left of the data is dealt out anew.

    Raises InputError if the run to resume would see other data, unless `data.accept_changes` says that it may.
    """
    state = read_json(folder / "state/training.json")
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


def load_optimizer_state(
    folder: Path, state: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Fill the optimizer, sharded or not, from a checkpoint; only rank 0 reads the tensors."""
    distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    full: dict[str, Any] = {}
    if not distributed or torch.distributed.get_rank() == 0:
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        with safe_open(folder / "state/optimizer.safetensors", framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                name, _, entry = key.rpartition(".")
                tensors.setdefault(name, {})[entry] = file.get_tensor(key)
        full = {"state": tensors, "param_groups": state["param_groups"]}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed)
    set_optimizer_state_dict(model, optimizer, full, options=options)


def load_random_state(folder: Path, state: dict[str, Any], rank: int) -> None:
    """Put back this rank's generators: Python's, numpy's and torch's. A rank that is new takes an old one's."""
    rank = rank % len(state["ranks"])
    saved = state["ranks"][rank]["random"]
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    with safe_open(folder / "state/random.safetensors", framework="pt") as file:
        torch.set_rng_state(file.get_tensor(f"{rank}.cpu"))
        if f"{rank}.cuda" in file.keys() and torch.cuda.is_available():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor(f"{rank}.cuda"))


def _random_state(device: torch.device) -> dict[str, Any]:
    """This process's generator states: JSON values, and torch's as uint8 tensors by device type."""
    name, keys, *rest = np.random.get_state()
    generators = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(device)
    return {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest], "torch": generators}


def _step_folders(checkpoints: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in checkpoints.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = read_json(folder / "state/files.json")
    except InputError as error:
        return str(error)
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None
