"""Documents out of files, hub datasets and installed packages.

A corpus is a list of shards, and a shard is what can be read on its own without reading anything
before it: a range of bytes of a plain .jsonl or .txt file, a row group of a .parquet file, a whole
compressed file, a file of a hub dataset. So a reader can go to any place of a plain or parquet
corpus of any size at once; inside a compressed file or a hub file it must read from that file's
start.

A shard is read in blocks of about a megabyte of text. How many it has is known beforehand but for
the last two kinds.
"""

import glob
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen3_encdec.data.package_docs import Split, package_docs
from qwen3_encdec.folders import PROVENANCE_FILE, InputError

SHARD_BYTES = 2**20
_LINE_SUFFIXES = (".jsonl", ".json", ".txt")
_SUFFIXES = (
    *(kind + packing for kind in _LINE_SUFFIXES for packing in ("", ".gz", ".zst")),
    ".parquet",
)
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?")
_ID_BITS = 40
_LOOKED_AT = 2**26
TOKENIZER_KEY = b"qwen3_encdec.tokenizer"
TOKENIZED_SCHEMA = pa.schema(
    {"id": pa.int64(), "checksum": pa.int64(), "tokens": pa.list_(pa.int32())}
)


class Document(NamedTuple):
    """A text and its number, unique in the corpus: file number and place in the file."""

    id: int
    text: str

    @property
    def checksum(self) -> int:
        """Of the text; equal texts have equal ones."""
        return zlib.crc32(self.text.encode("utf-8", "replace"))


class Tokenized(NamedTuple):
    """A block of documents that were tokenized beforehand."""

    ids: np.ndarray
    """As `Document.id`, int64."""
    checksums: np.ndarray
    """As `Document.checksum`, int64."""
    tokens: np.ndarray
    """Of all documents one after another, int32."""
    lengths: np.ndarray
    """Tokens of each, int64."""

    def without(self, out: np.ndarray) -> "Tokenized":
        """The same but for the documents that `out` (bool) marks."""
        if not out.any():
            return self
        tokens = self.tokens[np.repeat(~out, self.lengths)]
        return Tokenized(self.ids[~out], self.checksums[~out], tokens, self.lengths[~out])


Block = list[Document] | Tokenized


def tokenized(
    block: Block,
    encode: Callable[[list[str]], tuple[np.ndarray, np.ndarray]],
    leave_out: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[Tokenized, np.ndarray]:
    """A block as token ids, and which of its documents (bool) were left out.

    Args:
        block: As a shard gives it.
        encode: `Encoder.batch`.
        leave_out: From ids and checksums to what is to be left out, bool.
    """
    if isinstance(block, Tokenized):
        out = leave_out(block.ids, block.checksums)
        return block.without(out), out
    ids, checksums = (
        np.array([(document.id, document.checksum) for document in block], np.int64)
        .reshape(-1, 2)
        .T
    )
    out = leave_out(ids, checksums)
    texts = [document.text for document, left in zip(block, out.tolist(), strict=True) if not left]
    return Tokenized(ids[~out], checksums[~out], *encode(texts)), out


class Shard(Protocol):
    """A part of a corpus that can be read on its own."""

    @property
    def path(self) -> str:
        """The file."""

    @property
    def num_blocks(self) -> int | None:
        """How many blocks it has; None if only reading can tell."""

    def blocks(self) -> Iterator[Block]:
        """All documents in order, empty ones too. Raises InputError naming file and line."""


def open_corpus(
    inputs: Sequence[str],
    *,
    text_column: str = "text",
    hub_split: str = "train",
    package_split: Split = "train",
) -> list[Shard]:
    """The shards of all inputs (see `DataConfig.inputs`), in an order that only names and sizes
    decide.

    Raises InputError for an input that is not there, is of no known kind, or lacks the text column.
    """
    found = _expand(inputs)
    plain = [name for kind, name in found if kind == "file" and name.endswith(_LINE_SUFFIXES)]
    # A small corpus in smaller pieces, so that many readers share it.
    size = min(SHARD_BYTES, max(sum(Path(name).stat().st_size for name in plain) // 64, 2**14))
    shards: list[Shard] = []
    for number, (kind, name) in enumerate(found):
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
            end = Path(name).stat().st_size
            shards += [
                Lines(first, name, text_column, at, min(at + size, end))
                for at in range(0, end, size)
            ]
    if not shards:
        raise InputError(f"the corpus is empty: no documents in {', '.join(inputs)}")
    return shards


def corpus_fingerprint(shards: Sequence[Shard]) -> int:
    """Changes when files are added, taken away, resized, or edited where it looks.

    Looks at the name and size of every file, at all of a corpus up to 64 MiB and at both ends of 64
    files of a larger one, and at the revision of a hub dataset; the folder does not count.
    """
    paths = list(dict.fromkeys(shard.path for shard in shards))
    window = max(_LOOKED_AT // max(len(paths), 1) // 2, 4096)
    seen = zlib.crc32(repr(len(shards)).encode())
    for number, path in enumerate(paths):
        file = Path(path)
        size = file.stat().st_size if file.is_file() else 0
        seen = zlib.crc32(f"{file.name} {size}".encode(), seen)
        if size and number % -(-len(paths) // 64) == 0:
            with file.open("rb") as data:
                seen = zlib.crc32(data.read(window), seen)
                data.seek(max(size - window, 0))
                seen = zlib.crc32(data.read(), seen)
    for shard in shards:
        if isinstance(shard, Texts):
            seen = zlib.crc32(
                "".join(document.text for document in shard.documents).encode("utf-8", "replace"),
                seen,
            )
        elif isinstance(shard, HubFile):
            seen = zlib.crc32(shard.revision.encode(), seen)
    return seen


def _split_blocks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if size >= SHARD_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _expand(inputs: Sequence[str]) -> list[tuple[str, str]]:
    """Inputs as (kind, name), each file once."""
    found: dict[tuple[str, str], None] = {}
    for item in inputs:
        path = Path(item)
        if item == "package-docs":
            found["package-docs", item] = None
            continue
        if path.is_dir():
            names = (
                f
                for f in path.rglob("*")
                if f.name.endswith(_SUFFIXES) and f.name != PROVENANCE_FILE
            )
            files = sorted(str(file) for file in names if file.is_file())
        elif path.exists():
            files = [item]
        else:
            files = sorted(file for file in glob.glob(item, recursive=True) if Path(file).is_file())
        if (
            not files
            and _HUB_ID.fullmatch(item)
            and not item.endswith(_SUFFIXES)
            and not path.exists()
        ):
            found["hub", item] = None
        elif not files:
            raise InputError(
                f"input {item!r}: no such file, folder with {', '.join(_SUFFIXES)} files, or hub dataset"
            )
        for file in files:
            if not file.endswith(_SUFFIXES):
                raise InputError(f"input {file} is none of {', '.join(_SUFFIXES)}")
            found["file", file] = None
    return list(found)


@dataclass(frozen=True)
class Texts:
    """Documents in memory, one block."""

    documents: Sequence[Document]
    path: str = "package-docs"
    num_blocks: int | None = 1

    def blocks(self) -> Iterator[list[Document]]:
        """All documents in order."""
        yield list(self.documents)


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
    """The lines of a .jsonl or .txt file that begin in a range of bytes; a document's id is its
    first byte.

    The bytes are those of the text, not of its compressed form. A range of a plain file is one
    block.
    """

    first: int
    path: str
    column: str
    start: int = 0
    end: int = sys.maxsize

    @property
    def num_blocks(self) -> int | None:
        """One, or unknown for a compressed file."""
        return None if self.path.endswith((".gz", ".zst")) else 1

    def blocks(self) -> Iterator[list[Document]]:
        """All documents in order. Raises InputError naming file and line."""
        if self.num_blocks is None:
            yield from _split_blocks(self._documents())
        else:
            yield list(self._documents())

    def _documents(self) -> Iterator[Document]:
        offset, begin, lines = self.start, 0, 0
        try:
            with self._open() as file:
                if offset:  # a line that runs over the start belongs to the range before
                    file.seek(offset - 1)
                    offset += len(file.readline(self.end - offset + 1)) - 1
                begin = offset
                plain = self.path.removesuffix(".gz").removesuffix(".zst").endswith(".txt")
                while offset < self.end and (line := file.readline()):
                    yield Document(
                        self.first + offset, _parse(line, None if plain else self.column, offset)
                    )
                    offset, lines = offset + len(line), lines + 1
                if offset < self.end < sys.maxsize:
                    raise ValueError("the file has become shorter since it was opened")
        except (ValueError, OSError) as error:
            with suppress(OSError):
                lines += _count_lines(self.path, begin) if self.start else 0
            raise InputError(f"{self.path} line {lines + 1}: {error}") from None

    def _open(self) -> io.BufferedReader:
        return io.BufferedReader(pa.input_stream(self.path, compression="detect"), 2**17)


def _count_lines(path: str, end: int) -> int:
    lines = 0
    with open(path, "rb") as file:
        while end > 0 and (piece := file.read(min(end, SHARD_BYTES))):
            lines, end = lines + piece.count(b"\n"), end - len(piece)
    return lines


def _parse(line: bytes, column: str | None, position: int) -> str:
    """The text of a line, which is JSON if there is a column.

    Raises ValueError without the place.
    """
    if position == 0:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        text = line.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not valid UTF-8 ({error.reason} at byte {error.start} of the line)"
        ) from None
    if column is None or not text or text.isspace():
        return text
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict) or column not in record:
        there = (
            ", ".join(record)
            if isinstance(record, dict)
            else f"no columns but a {type(record).__name__}"
        )
        raise ValueError(f"no column {column!r}; there is {there}")
    text = record[column]
    if not isinstance(text, str) and text is not None:
        raise ValueError(f"column {column!r} is a {type(text).__name__}, not a text")
    if text and b"\\u" in line:  # JSON can spell half a surrogate pair, which is no character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text or ""


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file, held in memory while it is read;

    a document's id is its row.
    """

    first: int
    path: str
    column: str
    group: int
    num_blocks: int | None

    def blocks(self) -> Iterator[list[Document]]:
        """All documents in order, as many to a block. Raises InputError naming the file."""
        texts = _read_group(self.path, self.group, [self.column]).column(0)
        size = -(-len(texts) // (self.num_blocks or 1))
        for start in range(0, len(texts), size):
            try:
                found = texts.slice(start, size).to_pylist()
            except UnicodeDecodeError as error:
                bad = next(row for row in range(start, start + size) if not _is_utf8(texts[row]))
                where = f"{self.path} row group {self.group} row {bad + 1}"
                raise InputError(f"{where}: not valid UTF-8 ({error.reason})") from None
            yield [Document(row, text or "") for row, text in enumerate(found, self.first + start)]


def _is_utf8(value: pa.Scalar) -> bool:
    try:
        return value.as_py() is not value
    except UnicodeDecodeError:
        return False


@dataclass(frozen=True)
class TokenizedGroup:
    """A row group of a file that prepare-data wrote, one block."""

    path: str
    group: int
    tokenizer: str
    """Fingerprint of the tokenizer that made it (see `Encoder.fingerprint`)."""
    num_blocks: int | None = 1

    def blocks(self) -> Iterator[Tokenized]:
        """All documents in order. Raises InputError naming the file."""
        columns = [
            c.combine_chunks()
            for c in _read_group(self.path, self.group, list(TOKENIZED_SCHEMA.names)).columns
        ]
        # Not to_numpy, which imports pandas.
        ids, checksums, offsets, tokens = map(
            np.from_dlpack, (*columns[:2], columns[2].offsets, columns[2].flatten())
        )
        yield Tokenized(ids, checksums, tokens, np.diff(offsets).astype(np.int64))


def _read_group(path: str, group: int, columns: list[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read_row_group(group, columns=columns).select(columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise InputError(f"{path} row group {group}: {error}") from None


def _parquet_shards(first: int, path: str, column: str) -> list[Shard]:
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a parquet file: {error}") from None
    tokenizer = (schema.metadata or {}).get(TOKENIZER_KEY)
    if tokenizer is not None:
        return [
            TokenizedGroup(path, group, tokenizer.decode())
            for group in range(metadata.num_row_groups)
        ]
    if column not in schema.names:
        raise InputError(f"{path}: no column {column!r}; there is {', '.join(schema.names)}")
    if schema.field(column).type not in (pa.string(), pa.large_string(), pa.string_view()):
        raise InputError(f"{path}: column {column!r} is {schema.field(column).type}, not a text")
    shards: list[Shard] = []
    leaf = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column)
    for group in range(metadata.num_row_groups):
        rows, size = (
            metadata.row_group(group).num_rows,
            metadata.row_group(group).column(leaf).total_uncompressed_size,
        )
        if rows:
            per_block = -(-rows // min(rows, -(-size // SHARD_BYTES)))
            shards.append(RowGroup(first, path, column, group, -(-rows // per_block)))
        first += rows
    return shards


@dataclass(frozen=True)
class HubFile:
    """One of the files of a streamed `datasets` dataset; a document's id is its row."""

    first: int
    path: str
    column: str
    number: int
    dataset: Any
    revision: str
    """Changes with the dataset's files."""
    num_blocks: int | None = None

    def blocks(self) -> Iterator[list[Document]]:
        """All documents in order. Raises InputError naming the dataset and its columns."""
        return _split_blocks(self._documents())

    def _documents(self) -> Iterator[Document]:
        row = 0
        try:
            for record in self.dataset.shard(self.dataset.num_shards, self.number):
                text = record.get(self.column, 0)
                if not isinstance(text, str | None):
                    raise ValueError(
                        f"no text in column {self.column!r}; there is {', '.join(record)}"
                    )
                yield Document(self.first + (self.number << 28) + row, text or "")
                row += 1
        except Exception as error:  # every way in which a hub can fail
            raise InputError(
                f"{self.path} file {self.number} row {row + 1}: {_first_line(error)}"
            ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _hub_shards(first: int, item: str, column: str, split: str) -> list[Shard]:
    from datasets import load_dataset_builder

    name, _, config = item.partition(":")
    try:
        builder = load_dataset_builder(name, config or None)
        dataset = builder.as_streaming_dataset(split=split)
    except Exception as error:  # as above
        reason = _first_line(error)
        raise InputError(
            f"input {item!r}: no such file, and no hub dataset could be opened ({reason})"
        ) from None
    revision = Path(builder.cache_dir).name + str(builder.config_id)
    return [
        HubFile(first, item, column, number, dataset, revision)
        for number in range(dataset.num_shards)
    ]
