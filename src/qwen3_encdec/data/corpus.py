"""Corpora: documents out of files, hub datasets and installed packages.

A corpus is a list of files, and a file is read in blocks that need nothing before them: a range of
bytes of a .jsonl or .txt file, a slice of a row group of a .parquet file. Compressed files, .csv
and JSON arrays can only be read from their start. They are unpacked into a cache first, as parquet,
where they fit `cache_bytes`, and so are hub datasets downloaded; what is larger is streamed.
"""

import csv
import glob
import hashlib
import io
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from qwen3_encdec.data.package_docs import Split, package_docs
from qwen3_encdec.folders import PROVENANCE_FILE, InputError, read_json

BLOCK_BYTES = 2**18
BLOCK_ROWS = 2048
INDEX_FILE = "_index.json"
TOKENIZER_KEY = b"qwen3_encdec.tokenizer"
TOKENS_SCHEMA = pa.schema({"key": pa.int64(), "tokens": pa.list_(pa.int32())})
_LINES, _TABLES = (".jsonl", ".ndjson", ".json", ".txt"), (".csv", ".tsv")
_PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_KNOWN = ".jsonl, .json, .txt, .csv, .tsv (also .gz, .zst, .bz2, .xz) or .parquet"
_BLOCKS_PER_STREAM = 8
_ATTEMPTS = 6
_OVERLOADED = (408, 429, 500, 502, 503, 504)
T = TypeVar("T")


class Document(NamedTuple):
    """A text, or the token ids (int32) of one, and the key that equal texts share."""

    key: int
    content: str | np.ndarray


class Place(NamedTuple):
    """A text not yet parsed, and where it stands."""

    where: str
    raw: Any


class File(Protocol):
    """A file of a corpus."""

    @property
    def path(self) -> str:
        """Where it is, or what it is called."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def num_blocks(self) -> int | None:
        """How many blocks it has; None if it can only be read from its start."""

    def places(self, block: int = 0) -> Iterator[Place]:
        """All texts of a block, or of the file if it has none, unparsed."""

    def parse(self, place: Place) -> Document:
        """Parse one of them. Raises InputError naming file and line or row."""


def text_key(text: str) -> int:
    """Hash a text to 63 bits."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@dataclass(frozen=True)
class LinesFile:
    """A plain .jsonl or .txt file; a block is the lines that begin in a range of bytes."""

    path: str
    size: int
    column: str | None
    """Field of a JSON line; None for .txt."""
    block_bytes: int

    @property
    def num_blocks(self) -> int:
        """Number of ranges."""
        return -(-self.size // self.block_bytes)

    def places(self, block: int = 0) -> Iterator[Place]:
        """Yield the lines of a range."""
        start = block * self.block_bytes
        end = min(start + self.block_bytes, self.size)
        with _reading(self.path), open(self.path, "rb") as file:
            if start:  # a line that runs over the start belongs to the range before
                file.seek(start - 1)
                start += len(file.readline(end - start + 1)) - 1
            while start < end:
                line = file.readline()
                if not line:
                    raise InputError(f"{self.path} has become shorter since it was opened")
                yield Place(str(start), line)
                start += len(line)

    def parse(self, place: Place) -> Document:
        """Parse a line."""
        try:
            return _document(_text_of_line(place.raw, self.column))
        except ValueError as error:
            with open(self.path, "rb") as file:
                line = 1 + file.read(int(place.where)).count(b"\n")
            raise InputError(f"{self.path} line {line}: {error}") from None


@dataclass(frozen=True)
class TableFile:
    """A parquet file; a block is a slice of a row group."""

    path: str
    size: int
    column: str
    blocks: tuple[tuple[int, int, int], ...]
    """Row group, first row and number of rows in it."""
    label: str = ""
    """The file that this one was unpacked from."""

    @property
    def num_blocks(self) -> int:
        """Number of slices."""
        return len(self.blocks)

    def places(self, block: int = 0) -> Iterator[Place]:
        """Yield the rows of a slice."""
        group, first, rows = self.blocks[block]
        texts = _read_group(self.path, group, [self.column]).column(0).slice(first, rows)
        if pa.types.is_dictionary(texts.type):
            texts = texts.cast(texts.type.value_type)
        for row, text in enumerate(texts, first + 1):
            yield Place(f"row group {group} row {row}", text)

    def parse(self, place: Place) -> Document:
        """Decode a row."""
        try:
            return _document(place.raw.as_py() or "")
        except UnicodeDecodeError as error:
            path = self.label or self.path
            raise InputError(f"{path} {place.where}: not valid UTF-8 ({error.reason})") from None


@dataclass(frozen=True)
class TokensFile:
    """A parquet file that `prepare` wrote; a block is a row group."""

    path: str
    size: int
    rows: tuple[int, ...]
    tokenizer: str
    tokens: int = 0

    @property
    def num_blocks(self) -> int:
        """Number of row groups."""
        return len(self.rows)

    def places(self, block: int = 0) -> Iterator[Place]:
        """Yield the documents of a row group."""
        table = _read_group(self.path, block, list(TOKENS_SCHEMA.names))
        keys, lists = (column.combine_chunks() for column in table.columns)
        # Not to_numpy, which imports pandas.
        offsets, tokens = np.from_dlpack(lists.offsets), np.from_dlpack(lists.values)
        for key, start, end in zip(keys.to_pylist(), offsets[:-1], offsets[1:], strict=True):
            yield Place("", Document(key, tokens[start:end]))

    def parse(self, place: Place) -> Document:
        """Return the document."""
        return place.raw


@dataclass(frozen=True)
class MemoryFile:
    """Texts in memory."""

    path: str
    size: int
    texts: Sequence[str]
    num_blocks: int = 64

    def places(self, block: int = 0) -> Iterator[Place]:
        """Yield every so manyth text."""
        for text in self.texts[block :: self.num_blocks]:
            yield Place("", text)

    def parse(self, place: Place) -> Document:
        """Return the text."""
        return _document(place.raw)


@dataclass(frozen=True)
class StreamFile:
    """A file that can only be read from its start."""

    path: str
    size: int
    column: str
    num_blocks: None = None

    def places(self, block: int = 0) -> Iterator[Place]:
        """Yield all texts; a connection that breaks is taken up again."""
        given = attempts = 0
        while True:
            try:
                for number, place in enumerate(self._places()):
                    if number >= given:
                        yield place
                        given, attempts = number + 1, 0
                return
            except (ValueError, OSError, EOFError, csv.Error, pa.ArrowException) as error:
                attempts += 1
                if attempts == _ATTEMPTS or not _is_transient(error):
                    message = f"{self.path} after line {given}: {first_line(error)}"
                    raise InputError(message) from None
                time.sleep(0.25 * 2**attempts)

    def _places(self) -> Iterator[Place]:
        name, packing = os.path.splitext(self.path.lower())
        packed = _PACKED.get(packing)
        suffix = os.path.splitext(name if packed else self.path.lower())[1]
        with open_binary(self.path) as raw, _unpack(raw, packed) as file:
            if suffix in _TABLES:
                lines = io.TextIOWrapper(file, "utf-8", newline="")
                rows = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
                for number, row in enumerate(rows, 1):
                    yield Place(f"row {number}", row)
            elif suffix == ".json" and not packed:
                for number, row in enumerate(json.load(file), 1):
                    yield Place(f"item {number}", row)
            else:
                for number, line in enumerate(iter(file.readline, b""), 1):
                    yield Place(f"line {number}", line)

    def parse(self, place: Place) -> Document:
        """Parse a line, a row or an item."""
        name = self.path.lower().removesuffix(os.path.splitext(self.path.lower())[1])
        try:
            if isinstance(place.raw, bytes):
                return _document(_text_of_line(place.raw, self.column, name.endswith(".txt")))
            return _document(_text_of_record(place.raw, self.column))
        except ValueError as error:
            raise InputError(f"{self.path} {place.where}: {error}") from None


@dataclass
class Corpus:
    """The files of one source of a mixture."""

    name: str
    files: Sequence[File]
    passed_over: list[str] = field(default_factory=list)
    """What was found and not read, and why."""

    def __post_init__(self) -> None:
        self.streamed = any(file.num_blocks is None for file in self.files)
        counts = [file.num_blocks or 0 for file in self.files]
        self._ends = np.cumsum(counts)
        self.num_blocks = len(self.files) if self.streamed else int(self._ends[-1])

    def block(self, number: int) -> tuple[File, int]:
        """Return the file and the block in it of a block of the corpus."""
        index = int(np.searchsorted(self._ends, number, side="right"))
        file = self.files[index]
        return file, number - int(self._ends[index] - (file.num_blocks or 0))

    def documents(self) -> Iterator[Document]:
        """Yield all documents in order."""
        for file in self.files:
            yield from map(file.parse, all_places(file))

    def fingerprint(self) -> int:
        """Hash names and sizes of the files, and both ends of 64 local ones.

        Folders do not count: a corpus may be moved.
        """
        seen = 0
        for number, file in enumerate(self.files):
            path = getattr(file, "label", "") or file.path
            seen = zlib.crc32(f"{os.path.basename(path)} {file.size}".encode(), seen)
            if isinstance(file, MemoryFile):
                seen = zlib.crc32("".join(file.texts).encode("utf-8", "replace"), seen)
            elif number % -(-len(self.files) // 64) == 0 and os.path.isfile(path):
                with open(path, "rb") as data:
                    seen = zlib.crc32(data.read(2**16), seen)
                    data.seek(max(0, os.path.getsize(path) - 2**16))
                    seen = zlib.crc32(data.read(), seen)
        return seen


def all_places(file: File) -> Iterator[Place]:
    """Yield all texts of a file, unparsed."""
    for block in range(1 if file.num_blocks is None else file.num_blocks):
        yield from file.places(block)


def open_corpus(
    inputs: Sequence[str],
    *,
    name: str = "",
    text_column: str = "text",
    hub_split: str = "train",
    package_split: Split = "train",
    cache_bytes: float = 2**35,
    streams: int = 64,
) -> Corpus:
    """Open the files of all inputs (see `DataConfig.inputs`) in an order that names decide.

    Args:
        inputs: Files, folders, globs, hub datasets or package-docs.
        name: Of the corpus in logs.
        text_column: Field or column that holds the text.
        hub_split: Split of a hub dataset.
        package_split: Split of package-docs.
        cache_bytes: Unpack or download up to so much, stream what is larger.
        streams: A small corpus is cut into several blocks for each.

    Raises:
        InputError: an input is not there, is of no known kind, or lacks the text column.
    """
    found, passed_over = _expand(inputs)
    files: list[File] = []
    sizes: dict[str, int] = {}
    for path in found:
        with suppress(OSError):
            sizes[path] = os.stat(path).st_size
    block_bytes = min(BLOCK_BYTES, sum(sizes.values()) // (_BLOCKS_PER_STREAM * streams) + 1)
    block_bytes = max(block_bytes, 512)
    for path in found:
        if path == "package-docs":
            files.append(_package_file(package_split))
        elif path in sizes:
            files += _open_file(path, sizes[path], text_column, block_bytes)
        else:
            files += _hub_files(path, text_column, hub_split, cache_bytes, block_bytes)
    packed = [file for file in files if isinstance(file, StreamFile)]
    if packed and sum(file.size for file in packed) <= cache_bytes:
        unpacked = {file.path: _unpacked(file, block_bytes) for file in packed}
        files = [unpacked.get(file.path, file) for file in files]
    files = [file for file in files if file.num_blocks != 0]
    if not files:
        raise InputError(f"the corpus is empty: no documents in {', '.join(inputs)}")
    return Corpus(name or ", ".join(inputs), files, passed_over)


def open_binary(path: str) -> Any:
    """Open a local file or one of the hub (`hf://`) for reading bytes."""
    if not path.startswith("hf://"):
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    return retrying(lambda: HfFileSystem().open(path, "rb"), path)


def retrying(call: Callable[[], T], what: str) -> T:
    """Call, again and again if a hub or the way to it fails for the moment.

    Raises InputError naming `what` and the reason.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        _be_patient()
        try:
            return call()
        except Exception as error:  # every way in which a hub can fail
            if attempt == _ATTEMPTS or not _is_transient(error):
                raise InputError(f"{what}: {first_line(error)}") from None
        time.sleep(0.25 * 2**attempt)
    raise AssertionError


def _be_patient() -> None:
    """Let `huggingface_hub`'s session ask again where a hub is overloaded.

    It does so itself for downloads, not for what is asked before them.
    """
    hub = sys.modules.get("huggingface_hub")
    session = hub.get_session() if hub else None
    if session is None or hasattr(session, "asks_once"):
        return
    session.asks_once = session.send

    def send(*arguments: Any, **options: Any) -> Any:
        for attempt in range(1, _ATTEMPTS):
            response = session.asks_once(*arguments, **options)
            if response.status_code not in _OVERLOADED:
                return response
            response.close()
            time.sleep(0.25 * 2**attempt)
        return session.asks_once(*arguments, **options)

    session.send = send


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _is_transient(error: BaseException | None) -> bool:
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code in _OVERLOADED
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        if type(error).__module__.startswith(("httpx", "httpcore")):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn what the system says about a file into an InputError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: {first_line(error)}") from None


def _document(text: str) -> Document:
    return Document(text_key(text), text)


def _text_of_line(line: bytes, column: str | None, plain: bool = False) -> str:
    """Return the text of a line, which is JSON unless it is `plain` or there is no column."""
    try:
        text = line.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not valid UTF-8 ({error.reason} at byte {error.start} of the line)"
        ) from None
    if column is None or plain or not text or text.isspace():
        return text
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    text = _text_of_record(record, column)
    if "\\u" in line.decode("latin-1"):  # JSON can spell half a surrogate pair: no character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text_of_record(record: Any, column: str | None) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"no column {column!r}; there is a {type(record).__name__}")
    if column not in record:
        raise ValueError(f"no column {column!r}; there is {', '.join(map(str, record))}")
    text = record[column]
    if not isinstance(text, str | None):
        raise ValueError(f"column {column!r} is a {type(text).__name__}, not a text")
    return text or ""


def _read_group(path: str, group: int, columns: list[str]) -> pa.Table:
    def read() -> pa.Table:
        with open_binary(path) as file, pq.ParquetFile(file) as table:
            return table.read_row_group(group, columns=columns).select(columns)

    return retrying(read, f"{path} row group {group}")


def _unpack(raw: Any, packed: str | None) -> Any:
    if packed is None:
        return io.BufferedReader(raw) if isinstance(raw, io.RawIOBase) else raw
    if packed == "xz":
        import lzma

        return lzma.open(raw)
    stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), packed)
    return io.BufferedReader(stream, 2**17)


def _expand(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return files, hub datasets and package-docs, each once; and what is passed over."""
    found: dict[str, None] = {}
    passed_over: list[str] = []
    for item in inputs:
        matches = [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
        if item == "package-docs":
            found[item] = None
        elif matches:
            for match in matches:
                is_folder = os.path.isdir(match)
                if not is_folder and not _is_known(match):
                    raise InputError(f"input {match} is not {_KNOWN}")
                files = _walk(match, passed_over) if is_folder else [match]
                if not files and len(matches) == 1:
                    raise InputError(f"input {match!r}: no file in it is {_KNOWN}")
                found |= dict.fromkeys(files)
        elif _is_hub_id(item):
            found[item] = None
        else:
            raise InputError(f"input {item!r}: no such file, folder or hub dataset")
    return list(found), passed_over


def _is_known(path: str) -> bool:
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _PACKED:
        return os.path.splitext(stem)[1] in _LINES + _TABLES
    return suffix in (*_LINES, *_TABLES, ".parquet")


def _is_hub_id(item: str) -> bool:
    name = item.partition(":")[0]
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and "*" not in name


def _walk(folder: str, passed_over: list[str]) -> list[str]:
    """Return the files below a folder, links followed, but hidden ones and unknown kinds."""
    files: list[str] = []
    seen = {os.path.realpath(folder)}
    for top, folders, names in os.walk(folder, followlinks=True):
        for name in list(folders):
            path = os.path.join(top, name)
            if name.startswith(".") or os.path.realpath(path) in seen:
                folders.remove(name)
                passed_over.append(f"{path} (hidden, or a link to a folder that is read)")
            seen.add(os.path.realpath(path))
        for name in names:
            path = os.path.join(top, name)
            if name in (PROVENANCE_FILE, INDEX_FILE):
                continue
            if name.startswith((".", "_")) or not _is_known(name):
                passed_over.append(f"{path} ({'hidden' if name[0] in '._' else 'no known kind'})")
            else:
                files.append(path)
    return sorted(files)


def _open_file(path: str, size: int, column: str, block_bytes: int) -> list[File]:
    suffix = os.path.splitext(path.lower())[1]
    if suffix == ".parquet":
        return [_open_parquet(path, size, column, block_bytes)]
    if suffix in _PACKED or suffix in _TABLES or (suffix == ".json" and _is_array(path)):
        return [StreamFile(path, size, column)]
    return [LinesFile(path, size, None if suffix == ".txt" else column, block_bytes)]


def _is_array(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


_INDEXES: dict[str, dict[str, Any]] = {}


def _open_parquet(path: str, size: int, column: str, block_bytes: int, label: str = "") -> File:
    indexed = _indexed(path)
    if indexed is not None:
        return TokensFile(path, size, *indexed)
    with _reading(path), open_binary(path) as file, pq.ParquetFile(file) as table:
        schema, metadata = table.schema_arrow, table.metadata
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    tokenizer = (schema.metadata or {}).get(TOKENIZER_KEY)
    if tokenizer is not None:
        return TokensFile(path, size, tuple(g.num_rows for g in groups), tokenizer.decode())
    if schema.names.count(column) != 1:
        count = "no" if column not in schema.names else "more than one"
        raise InputError(f"{path}: {count} column {column!r}; there is {', '.join(schema.names)}")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise InputError(f"{path}: column {column!r} is {kind}, not a text")
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    leaf = names.index(column)
    blocks: list[tuple[int, int, int]] = []
    for number, group in enumerate(groups):
        whole = group.column(leaf).total_uncompressed_size
        # Every slice decodes, or downloads, its whole row group.
        pieces = 1 if path.startswith("hf://") else min(-(-whole // block_bytes), 64)
        rows = max(1, min(-(-group.num_rows // max(pieces, 1)), BLOCK_ROWS))
        for first in range(0, group.num_rows, rows):
            blocks.append((number, first, min(rows, group.num_rows - first)))
    return TableFile(path, size, column, tuple(blocks), label)


def _indexed(path: str) -> tuple[tuple[int, ...], str, int] | None:
    """Return row groups, tokenizer and tokens of a prepared file, out of its folder's index."""
    folder, name = os.path.split(path)
    if folder not in _INDEXES:
        index = Path(folder, INDEX_FILE)
        _INDEXES[folder] = read_json(index) if index.exists() else {}
    index_of = _INDEXES[folder]
    if name not in index_of.get("files", {}):
        return None
    rows, tokens = index_of["files"][name]
    return tuple(rows), index_of["tokenizer"], tokens


def _package_file(split: Split) -> File:
    texts = [document.text for document in package_docs(split)]
    if not texts:
        raise InputError("package-docs: no installed package has docstrings")
    # Neighbours come from one package: spread them, the same way always.
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    size = sum(map(len, texts))
    return MemoryFile("package-docs", size, [texts[i] for i in order], max(size // BLOCK_BYTES, 64))


def _hub_files(
    item: str, column: str, split: str, cache_bytes: float, block_bytes: int
) -> list[File]:
    """Open the files of a hub dataset: downloaded where they fit the cache, else where they are."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem, hf_hub_download

    name, _, config = item.partition(":")
    builder = retrying(
        lambda: load_dataset_builder(name, config or None),
        f"input {item!r}: no such file, and no hub dataset could be opened",
    )
    data_files = builder.config.data_files or {}
    if split not in data_files:
        raise InputError(f"input {item!r}: no split {split!r}; there is {', '.join(data_files)}")
    paths = sorted(map(str, data_files[split]))
    system = HfFileSystem()
    sizes = [retrying(lambda path=path: system.info(path)["size"], item) for path in paths]  # type: ignore[misc]
    unknown = [path for path in paths if not _is_known(path)]
    if unknown:
        raise InputError(f"input {item!r}: {unknown[0]} is not {_KNOWN}")
    files: list[File] = []
    if sum(sizes) > cache_bytes:
        for path, size in zip(paths, sizes, strict=True):
            is_table = path.lower().endswith(".parquet")
            streamed = StreamFile(path, size, column)
            files.append(_open_parquet(path, size, column, block_bytes) if is_table else streamed)
        return files
    for path, size in zip(paths, sizes, strict=True):
        repository, _, rest = path.removeprefix("hf://datasets/").partition("@")
        revision, _, inner = rest.partition("/")
        local = retrying(
            lambda where=(repository, inner), revision=revision: hf_hub_download(  # type: ignore[misc]
                *where, revision=revision, repo_type="dataset"
            ),
            path,
        )
        files += _open_file(local, size, column, block_bytes)
    return files


def cache_folder() -> Path:
    """Return the folder for what is unpacked."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "qwen3-encdec", "texts")


def _unpacked(file: StreamFile, block_bytes: int) -> File:
    """Write a file's texts as parquet into the cache, unless it is there, and open that."""
    path = os.path.realpath(file.path)
    changed = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
    identity = f"{path} {file.size} {changed} {file.column}"
    folder = cache_folder()
    target = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            building = target.with_suffix(".partial")
            schema = pa.schema({"text": pa.large_string()})
            with pq.ParquetWriter(building, schema, compression="zstd") as writer:
                for texts in _batches(map(file.parse, file.places())):
                    writer.write_table(pa.table({"text": texts}, schema))
            os.replace(building, target)
    return _open_parquet(str(target), file.size, "text", block_bytes, file.path)


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(str(document.content))
        size += len(document.content)
        if size >= BLOCK_BYTES or len(texts) >= BLOCK_ROWS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
