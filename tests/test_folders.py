"""Folders that are written, facts that are recorded, and model folders that are damaged."""

import errno
import json
import os
import shutil
import subprocess
from functools import partial

import pytest
from safetensors import SafetensorError

from qwen3_encdec import folders
from qwen3_encdec.folders import (
    InputError,
    describe_source,
    load_config,
    new_folder,
    read_json,
    read_yaml,
)


def test_the_commit_is_that_of_this_package(tmp_path, monkeypatch):
    """Not that of another project, inside whose checkout the package is installed."""
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@here", "-C", str(tmp_path)]
    (tmp_path / "folders.py").write_text("")
    monkeypatch.setattr(folders, "__file__", str(tmp_path / "folders.py"))
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another project"], check=True)
    assert describe_source() is None
    subprocess.run([*git, "add", "folders.py"], check=True)
    assert describe_source().endswith("-dirty")


def test_a_folder_that_cannot_be_moved_into_place_leaves_the_one_before(tmp_path, monkeypatch):
    def write(text: str) -> None:
        with new_folder(tmp_path / "out", "encoder") as folder:
            (folder / "file").write_text(text)

    write("first")
    rename = os.rename

    def interrupted(old, new) -> None:
        if old.suffix == ".partial":
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write("second")
    assert (tmp_path / "out/file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_told_in_a_sentence(tmp_path, error):
    message = r"output .*out cannot be written: .*No space left on device"
    with pytest.raises(InputError, match=message), new_folder(tmp_path / "out", "encoder"):
        raise error
    assert not list(tmp_path.iterdir())
    # Errors of inputs keep their own sentence.
    with pytest.raises(PermissionError), new_folder(tmp_path / "out", "encoder"):
        raise PermissionError(errno.EACCES, "Permission denied", "input")


def test_files_nested_too_deeply_are_named(tmp_path):
    (tmp_path / "file").write_text("[" * 10**5)
    for read in (read_json, partial(read_yaml, what="config")):
        with pytest.raises(InputError, match=r"file is not valid .*recursion"):
            read(tmp_path / "file")


@pytest.mark.parametrize("change", [{"dtype": "float99"}, {"layer_types": 3}, {"hidden_size": "a"}])
def test_a_config_that_does_not_load_is_named(init_folder, tmp_path, change):
    shutil.copy(init_folder / "config.json", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(InputError, match=r"config.json: "):
        load_config(tmp_path)
