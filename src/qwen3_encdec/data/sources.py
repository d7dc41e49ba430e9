"""Documents out of files, hub datasets and installed packages.

A corpus is a list of shards, and a shard is what can be read on its own without reading anything before it: a range
of bytes of a plain .jsonl or .txt file, a row group of a .parquet file, a whole compressed file, a file of a hub
dataset. So a reader can go to any place of a plain or parquet corpus of any size at once; inside a compressed file or
a hub file it must read from that file's start.
"""

import glob
import gzip
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen3_encdec.data.package_docs import Split, package_docs
from qwen3_encdec.files import InputError

SHARD_BYTES = 2**20
_LINE_SUFFIXES = (".jsonl", ".json", ".txt")
_SUFFIXES = (*(kind + packing for kind in _LINE_SUFFIXES for packing in ("", ".gz", ".zst")), ".parquet")
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?")
_ID_BITS = 40


class Document(NamedTuple):
    """A text and its number, unique in the corpus: file number and place in the file."""

    id: int
    text: str


class Shard(Protocol):
    """A part of a corpus that can be read on its own. Its `repr` identifies it."""

    def read(self) -> Iterator[Document]:
        """All documents in order, empty ones too. Raises InputError naming file and line."""


def open_corpus(
    inputs: Sequence[str], *, text_column: str = "text", hub_split: str = "train", package_split: Split = "train"
) -> list[Shard]:
    """The shards of all inputs (see `DataConfig.inputs`), in an order that only names and sizes decide.

    Raises InputError for an input that is not there, is of no known kind, or lacks the text column.
    """
    shards: list[Shard] = []
    for number, (kind, name) in enumerate(_expand(inputs)):
        first = number << _ID_BITS
        if kind == "package-docs":
            shards += _package_shards(first, package_split)
        elif kind == "hub":
            shards += _hub_shards(first, name, text_column, hub_split)
        elif name.endswith(".parquet"):
            shards += _parquet_shards(first, name, text_column)
        elif name.endswith((".gz", ".zst")):
            shards.append(Lines(first, name, text_column))
        else:
            size = Path(name).stat().st_size
            starts = range(0, size, SHARD_BYTES)
            shards += [Lines(first, name, text_column, start, min(start + SHARD_BYTES, size)) for start in starts]
    if not shards:
        raise InputError(f"the corpus is empty: no documents in {', '.join(inputs)}")
    return shards


def _expand(inputs: Sequence[str]) -> list[tuple[str, str]]:
    """Inputs as (kind, name), each file once."""
    found: dict[tuple[str, str], None] = {}
    for item in inputs:
        path = Path(item)
        if item == "package-docs":
            found["package-docs", item] = None
            continue
        if path.is_dir():
            files = sorted(str(file) for file in path.rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file())
        elif path.exists():
            files = [item]
        else:
            files = sorted(file for file in glob.glob(item, recursive=True) if Path(file).is_file())
        if not files and _HUB_ID.fullmatch(item) and not item.endswith(_SUFFIXES) and not path.exists():
            found["hub", item] = None
        elif not files:
            raise InputError(f"input {item!r}: no such file, folder with {', '.join(_SUFFIXES)} files, or hub dataset")
        for file in files:
            if not file.endswith(_SUFFIXES):
                raise InputError(f"input {file} is none of {', '.join(_SUFFIXES)}")
            found["file", file] = None
    return list(found)


@dataclass(frozen=True)
class Texts:
    """Documents in memory."""

    documents: Sequence[Document]

    def __repr__(self) -> str:
        return f"Texts({len(self.documents)}, {self.documents[0].id})"

    def read(self) -> Iterator[Document]:
        """All documents in order."""
        return iter(self.documents)


def _package_shards(first: int, split: Split) -> list[Shard]:
    documents = [Document(first + i, doc.text) for i, doc in enumerate(package_docs(split))]
    if not documents:
        raise InputError("package-docs: no installed package has docstrings")
    # Neighbours come from one package: spread them over all shards, the same way always.
    order = np.random.default_rng(0).permutation(len(documents))
    count = -(-sum(len(document.text) for document in documents) // SHARD_BYTES)
    return [Texts([documents[i] for i in order[start::count]]) for start in range(count)]


@dataclass(frozen=True)
class Lines:
    """The lines of a .jsonl or .txt file that begin in a range of bytes; a document's id is its first byte.

    The bytes are those of the text, not of its compressed form.
    """

    first: int
    path: str
    column: str
    start: int = 0
    end: int = sys.maxsize

    def read(self) -> Iterator[Document]:
        """All documents in order. Raises InputError naming file and line."""
        offset, begin, lines = self.start, 0, 0
        try:
            with self._open() as file:
                if offset:  # a line that runs over the start belongs to the range before
                    file.seek(offset - 1)
                    offset += len(file.readline()) - 1
                begin = offset
                while offset < self.end and (line := file.readline()):
                    yield Document(self.first + offset, _parse(line, self.column, self.path, offset))
                    offset, lines = offset + len(line), lines + 1
        except (ValueError, OSError, EOFError) as error:
            lines += _count_lines(self.path, begin) if self.start else 0
            raise InputError(f"{self.path} line {lines + 1}: {error}") from None

    def _open(self) -> IO[bytes]:
        if self.path.endswith(".gz"):
            return cast(IO[bytes], gzip.open(self.path, "rb"))
        if self.path.endswith(".zst"):
            return io.BufferedReader(pa.input_stream(self.path, compression="zstd"))
        return open(self.path, "rb")


def _count_lines(path: str, end: int) -> int:
    lines = 0
    with open(path, "rb") as file:
        while end > 0 and (piece := file.read(min(end, SHARD_BYTES))):
            lines, end = lines + piece.count(b"\n"), end - len(piece)
    return lines


def _parse(line: bytes, column: str, path: str, position: int) -> str:
    """The text of a line. Raises ValueError (UnicodeDecodeError and JSONDecodeError are) without the place."""
    if position == 0:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        text = line.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 ({error.reason} at byte {error.start} of the line)") from None
    if path.removesuffix(".gz").removesuffix(".zst").endswith(".txt") or not text.strip():
        return text
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict) or column not in record:
        there = ", ".join(record) if isinstance(record, dict) else f"no columns but a {type(record).__name__}"
        raise ValueError(f"no column {column!r}; there is {there}")
    text = record[column]
    if not isinstance(text, str) and text is not None:
        raise ValueError(f"column {column!r} is a {type(text).__name__}, not a text")
    if text and b"\\u" in line:  # JSON can spell half a surrogate pair, which is no character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text or ""


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file, held in memory while it is read; a document's id is its row."""

    first: int
    path: str
    column: str
    group: int

    def read(self) -> Iterator[Document]:
        """All documents in order. Raises InputError naming the file."""
        try:
            with pq.ParquetFile(self.path) as file:
                texts = file.read_row_group(self.group, columns=[self.column]).column(0)
                for row, text in enumerate(texts):
                    yield Document(self.first + row, text.as_py() or "")
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path} row group {self.group}: {error}") from None


def _parquet_shards(first: int, path: str, column: str) -> list[Shard]:
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a parquet file: {error}") from None
    if column not in schema.names:
        raise InputError(f"{path}: no column {column!r}; there is {', '.join(schema.names)}")
    if schema.field(column).type not in (pa.string(), pa.large_string(), pa.string_view()):
        raise InputError(f"{path}: column {column!r} is {schema.field(column).type}, not a text")
    shards: list[Shard] = []
    for group in range(metadata.num_row_groups):
        shards.append(RowGroup(first, path, column, group))
        first += metadata.row_group(group).num_rows
    return shards


@dataclass(frozen=True)
class HubFile:
    """One of the files of a streamed `datasets` dataset; a document's id is its row."""

    first: int
    name: str
    column: str
    number: int
    dataset: Any

    def __repr__(self) -> str:
        return f"HubFile({self.first}, {self.name!r}, {self.number})"

    def read(self) -> Iterator[Document]:
        """All documents in order. Raises InputError naming the dataset and its columns."""
        for row, record in enumerate(self.dataset.shard(self.dataset.num_shards, self.number)):
            text = record.get(self.column, 0)
            if not isinstance(text, str | None):
                raise InputError(f"{self.name}: no text in column {self.column!r}; there is {', '.join(record)}")
            yield Document(self.first + (self.number << 28) + row, text or "")


def _hub_shards(first: int, item: str, column: str, split: str) -> list[Shard]:
    from datasets import load_dataset

    name, _, config = item.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # every way in which a hub can fail
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"input {item!r}: no such file, and no hub dataset could be opened ({reason})") from None
    return [HubFile(first, item, column, number, dataset) for number in range(dataset.num_shards)]
