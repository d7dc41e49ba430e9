"""Docstrings of the installed Python packages: a real English corpus that needs no download.

Files are parsed, never imported or run. A tenth of the packages is held out by a hash of the
package's name, so that training never sees what evaluation asks.
"""

import ast
import csv
import gc
import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution, distributions
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

_MIN_CHARACTERS = 40
_HELDOUT_ONE_IN = 10
_SPLIT_SALT = 1
# Tests say little; vendored copies of other packages would carry train texts into the held-out
# split.
_SKIPPED_FOLDERS = {
    *("test", "tests", "_test", "_tests", "testing"),
    *("vendor", "vendored", "_vendor", "_vendored"),
}
_EXCLUDED = {"qwen3_encdec"}
_CACHE_VERSION = 2

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
    """All documents of a split: distinct, at least 40 characters, in an order that only the
    packages decide.

    The first call reads every source file (seconds to a minute) and keeps the result in
    `$XDG_CACHE_HOME/qwen3-encdec`, under a key made of the installed distributions and their
    versions.
    """
    wanted = split == "heldout"
    return [document for document in _all_docs() if is_heldout(document.package) == wanted]


def is_heldout(package: str) -> bool:
    """Tell if a package is held out; depends on its name alone."""
    digest = hashlib.sha256(f"{_SPLIT_SALT} {package}".encode()).digest()
    return int.from_bytes(digest[:4]) % _HELDOUT_ONE_IN == 0


def summary_pairs(split: Split) -> list[tuple[str, str]]:
    """Pairs of a docstring's summary line and its body, for retrieval and contrastive training.

    A summary has at least three words and a body 40 characters. A summary or body that occurs
    twice, in either split, has no single right answer, so that all its pairs are left out.
    """
    pairs = []
    for document in _all_docs():
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
    """Return the folder for what is made once a machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qwen3-encdec")


def _all_docs() -> list[Docstring]:
    installed = sorted(distributions(), key=lambda d: (str(d.name), str(d.version)))
    versions = sorted({f"{d.name}=={d.version}" for d in installed})
    key = hashlib.sha256("\n".join([str(_CACHE_VERSION), *versions]).encode()).hexdigest()[:16]
    folder = cache_folder()
    cache = folder / f"package-docs-{key}.jsonl"
    if cache.exists():
        with cache.open(encoding="utf-8") as lines:
            return [Docstring(*json.loads(line)) for line in lines]
    documents = _scan(installed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        building = folder / f".{cache.name}.{os.getpid()}"
        with building.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(document) + "\n" for document in documents)
        os.replace(building, cache)
    except OSError:
        warnings.warn(f"cannot write {cache}; package-docs is scanned anew each time", stacklevel=2)
    return documents


def _scan(installed: list[Distribution]) -> list[Docstring]:
    """Parse all source files in parallel; of equal texts the first by name stays."""
    paths = sorted({path for distribution in installed for path in _source_files(distribution)})
    processes = os.cpu_count() or 1
    parts = [paths[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        found = list(chain.from_iterable(pool.map(_scan_in_a_process, parts)))
    distinct: dict[str, Docstring] = {}
    for document in sorted(found):
        distinct.setdefault(document.text, document)
    return list(distinct.values())


def _scan_in_a_process(paths: list[tuple[str, str]]) -> list[Docstring]:
    # This file run as a program needs the standard library only. A process pool would import, or
    # fork, the caller.
    command = [sys.executable, "-I", __file__]
    result = subprocess.run(
        command, input=json.dumps(paths), stdout=subprocess.PIPE, text=True, check=True
    )
    return [Docstring(*document) for document in json.loads(result.stdout)]


def _source_files(distribution: Distribution) -> list[tuple[str, str]]:
    """(path in site-packages, absolute path) of a distribution's modules, its tests and vendored
    copies left out.
    """
    record = distribution.read_text("RECORD") or ""
    names = [row[0] for row in csv.reader(io.StringIO(record)) if row and row[0].endswith(".py")]
    parts = {name: name.split("/") for name in names}
    return [
        (name, str(distribution.locate_file(name)))
        for name in names
        if parts[name][0] not in {"..", "bin", *_EXCLUDED}
        and not _SKIPPED_FOLDERS & set(parts[name][:-1])
    ]


def _docstrings(path: tuple[str, str]) -> list[Docstring]:
    relative, absolute = path
    try:
        source = Path(absolute).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    if '"""' not in source and "'''" not in source:
        return []
    # A syntax tree has no cycles, and collecting while it grows takes two thirds of the time.
    gc.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package = module.partition(".")[0]
    documents = []
    nodes: list[tuple[str, ast.AST]] = [(module, tree)]
    while nodes:
        name, node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= _MIN_CHARACTERS and text.isprintable() | ("\n" in text):
                documents.append(Docstring(package, name, text))
        for statements in (getattr(node, field, []) for field in ("body", "orelse", "handlers")):
            for child in statements if isinstance(statements, list) else ():
                inner = getattr(child, "name", None)
                nodes.append((f"{name}.{inner}" if isinstance(inner, str) else name, child))
    return documents


if __name__ == "__main__":
    json.dump(list(chain.from_iterable(map(_docstrings, json.load(sys.stdin)))), sys.stdout)
