"""Parse the docstrings of Python files; as a program, needs only the standard library."""

import ast
import gc
import json
import sys
import warnings
from itertools import chain
from pathlib import Path
from typing import NamedTuple

MIN_CHARACTERS = 40


class Docstring(NamedTuple):
    """One document."""

    package: str
    """Top-level import package; it decides the split."""
    name: str
    """Module, class or function, dotted."""
    text: str
    """The docstring without its indentation."""


def docstrings(path: tuple[str, str]) -> list[Docstring]:
    """Return the docstrings of a file, given as (path in site-packages, absolute path)."""
    relative, absolute = path
    try:
        source = Path(absolute).read_text(encoding="utf-8")
        has_docstring = '"""' in source or "'''" in source
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source if has_docstring else "")
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    documents = []
    nodes: list[tuple[str, ast.AST]] = [(module, tree)]
    while nodes:
        name, node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= MIN_CHARACTERS and (text.isprintable() or "\n" in text):
                documents.append(Docstring(module.partition(".")[0], name, text))
        for statements in (getattr(node, field, []) for field in ("body", "orelse", "handlers")):
            for child in statements if isinstance(statements, list) else ():
                inner = getattr(child, "name", None)
                nodes.append((f"{name}.{inner}" if isinstance(inner, str) else name, child))
    return documents


if __name__ == "__main__":
    # Syntax trees have no cycles, and garbage collection would take two thirds of the time.
    gc.disable()
    json.dump(list(chain.from_iterable(map(docstrings, json.load(sys.stdin)))), sys.stdout)
