"""Docstrings of the installed Python packages: a real English corpus that needs no download.

Files are parsed, never imported or run. A tenth of the packages is held out by a hash of the
package's name, so training never sees evaluation texts.
"""

import ast
import gc
import hashlib
import json
import os
import random
import warnings
from collections import Counter
from importlib.metadata import Distribution, distributions
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from qwen3_encdec.folders import InputError, write_text, writing

# Vendored copies of other packages would leak train texts into the held-out split.
_SKIPPED_FOLDERS = {"test", "tests", "_test", "_tests", "testing"}
_SKIPPED_FOLDERS |= {"vendor", "vendored", "_vendor", "_vendored"}
_EXCLUDED = {"..", "bin", "qwen3_encdec"}
_CACHE_VERSION = "3"
_MIN_CHARACTERS = 40

Split = Literal["train", "heldout"]


class Docstring(NamedTuple):
    """One document."""

    package: str
    """Top-level import package; it decides the split."""
    name: str
    """Module, class or function, dotted."""
    text: str
    """The docstring without its indentation."""


def package_docs(split: Split) -> list[Docstring]:
    """Return all documents of a split: distinct, at least 40 characters, sorted."""
    lines = package_docs_file(split).read_text(encoding="utf-8").splitlines()
    return sorted(Docstring(**json.loads(line)) for line in lines)


def package_docs_file(split: Split) -> Path:
    """Return a .jsonl file of a split's documents, shuffled across packages.

    The first call reads every source file (a minute) and caches the result in
    `$XDG_CACHE_HOME/qwen3-encdec`, under a key derived from the installed distributions.
    """
    installed = list(distributions())
    versions = sorted({f"{d.name}=={d.version}" for d in installed})
    key = hashlib.sha256("\n".join([_CACHE_VERSION, *versions]).encode()).hexdigest()[:16]
    files = {name: cache_folder() / f"package-docs-{key}-{name}.jsonl" for name in get_args(Split)}
    if not all(file.exists() for file in files.values()):
        documents = _scan(installed)
        random.Random(0).shuffle(documents)
        for name, file in files.items():
            own = [doc for doc in documents if is_heldout(doc.package) == (name == "heldout")]
            lines = [json.dumps(document._asdict()) + "\n" for document in own]
            with writing(file):
                write_text(file, "".join(lines))
    return files[split]


def is_heldout(package: str) -> bool:
    """Return True if a package is held out; depends on its name alone."""
    digest = hashlib.sha256(f"1 {package}".encode()).digest()
    return int.from_bytes(digest[:4]) % 10 == 0


def summary_pairs(split: Split) -> list[tuple[str, str]]:
    """Return pairs of docstring summary and body, for retrieval and contrastive training.

    A summary has at least three words, a body at least 40 characters. A summary or body that occurs
    twice, in either split, has no single right answer, so all its pairs are dropped.
    """
    pairs = []
    for document in [*package_docs("train"), *package_docs("heldout")]:
        summary, _, body = document.text.partition("\n\n")
        summary, body = " ".join(summary.split()), body.strip()
        if len(summary.split()) >= 3 and len(summary) <= 200 and len(body) >= _MIN_CHARACTERS:
            pairs.append((document.package, summary, body))
    summaries = Counter(summary.casefold() for _, summary, _ in pairs)
    bodies = Counter(body for *_, body in pairs)
    return [
        (summary, body)
        for package, summary, body in pairs
        if summaries[summary.casefold()] == bodies[body] == 1
        and is_heldout(package) == (split == "heldout")
    ]


def cache_folder() -> Path:
    """Return the cache folder of this machine, created if needed.

    Raises InputError if it cannot be created.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home, "qwen3-encdec")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "set XDG_CACHE_HOME to a folder that can be written"
        raise InputError(f"cache folder {folder}: {error.strerror}; {hint}") from None
    return folder


def _scan(installed: list[Distribution]) -> list[Docstring]:
    """Parse all source files; of equal texts, keep the first by name."""
    paths = sorted({path for distribution in installed for path in _source_files(distribution)})
    distinct: dict[str, Docstring] = {}
    # Syntax trees have no cycles, and garbage collection would take two thirds of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for document in sorted(chain.from_iterable(map(_docstrings, paths))):
            distinct.setdefault(document.text, document)
    finally:
        if was_enabled:
            gc.enable()
    return list(distinct.values())


def _docstrings(path: tuple[str, str]) -> list[Docstring]:
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
            if len(text) >= _MIN_CHARACTERS and (text.isprintable() or "\n" in text):
                documents.append(Docstring(module.partition(".")[0], name, text))
        for field in ("body", "orelse", "handlers"):
            for child in getattr(node, field, ()):
                inner = getattr(child, "name", None)
                nodes.append((f"{name}.{inner}" if isinstance(inner, str) else name, child))
    return documents


def _source_files(distribution: Distribution) -> list[tuple[str, str]]:
    """List (path in site-packages, absolute path) of a distribution's modules, without tests."""
    return [
        (str(path), str(path.locate()))
        for path in distribution.files or ()
        if path.suffix == ".py"
        and path.parts[0] not in _EXCLUDED
        and not _SKIPPED_FOLDERS & set(path.parts[:-1])
    ]
