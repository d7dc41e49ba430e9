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
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from qwen3_encdec.data.package_docs import Split, cache_folder, package_docs
from qwen3_encdec.folders import PROVENANCE_FILE, InputError, read_json

BLOCK_BYTES = 2**18
BLOCK_ROWS = 2048
INDEX_FILE = "_index.json"
TOKENIZER_KEY = b"qwen3_encdec.tokenizer"
TOKENS_SCHEMA = pa.schema({"key": pa.int64(), "tokens": pa.list_(pa.int32())})
_LINES = (".jsonl", ".ndjson", ".json", ".txt")
_PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_KNOWN = ".jsonl, .json, .txt, .csv (also .gz, .zst, .bz2, .xz) or .parquet"
_BLOCKS_PER_STREAM = 8
_ATTEMPTS = 6
_OVERLOADED = (408, 429, 500, 502, 503, 504)
T = TypeVar("T")


class Document(NamedTuple):
    """A text, or the token ids (int32) of one, and the key that equal texts share."""

    key: int
    content: str | np.ndarray


def _document(text: str) -> Document:
    return Document(text_key(text), text)


class Place(NamedTuple):
    """A text not yet parsed, and where it stands."""

    where: str
    raw: Any


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
        with retrying(lambda: open(self.path, "rb"), self.path) as file:
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
    unpacked: str = ""
    """The copy in the cache that is read in its place."""

    @property
    def num_blocks(self) -> int:
        """Number of slices."""
        return len(self.blocks)

    def places(self, block: int = 0) -> Iterator[Place]:
        """Yield the rows of a slice."""
        group, first, rows = self.blocks[block]
        table = _read_group(self.unpacked or self.path, group, [self.column])
        texts = table.column(0).slice(first, rows)
        if pa.types.is_dictionary(texts.type):
            texts = texts.cast(texts.type.value_type)
        for row, text in enumerate(texts, first + 1):
            yield Place(f"row group {group} row {row}", text)

    def parse(self, place: Place) -> Document:
        """Decode a row."""
        try:
            return _document(place.raw.as_py() or "")
        except UnicodeDecodeError as error:
            message = f"{self.path} {place.where}: not valid UTF-8 ({error.reason})"
            raise InputError(message) from None


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
    column: str | None
    """As `LinesFile.column`."""
    num_blocks: None = None

    def places(self, block: int = 0) -> Iterator[Place]:
        """Yield all texts; a connection that breaks is taken up again."""
        given = 0
        places: Iterator[Place] | None = None

        def advance() -> Place | None:
            nonlocal places
            try:
                places = places or islice(self._places(), given, None)
                return next(places, None)
            except Exception:
                places = None
                raise

        while (place := retrying(advance, f"{self.path} after line {given}")) is not None:
            given += 1
            yield place

    def _places(self) -> Iterator[Place]:
        suffix, packing = _kind(self.path)
        with open_binary(self.path) as raw, _unpack(raw, packing) as file:
            if suffix == ".csv":
                rows = csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))
                for number, row in enumerate(rows, 1):
                    yield Place(f"row {number}", row)
            elif suffix == ".json" and not packing:
                for number, row in enumerate(json.load(file), 1):
                    yield Place(f"item {number}", row)
            else:
                for number, line in enumerate(iter(file.readline, b""), 1):
                    yield Place(f"line {number}", line)

    def parse(self, place: Place) -> Document:
        """Parse a line, a row or an item."""
        of = _text_of_line if isinstance(place.raw, bytes) else _text_of_record
        try:
            return _document(of(place.raw, self.column))
        except ValueError as error:
            raise InputError(f"{self.path} {place.where}: {error}") from None


File = LinesFile | TableFile | TokensFile | MemoryFile | StreamFile
"""Has a `path` to show, a `size` in bytes, `num_blocks`, `places(block)` and `parse(place)`."""


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

    def places(self, number: int) -> Iterator[tuple[File, Place]]:
        """Yield the texts of a block, or of a file of a streamed corpus, unparsed."""
        if self.streamed:
            file = self.files[number]
            places = all_places(file)
        else:
            file, block = self.block(number)
            places = file.places(block)
        for place in places:
            yield file, place

    def documents(self) -> Iterator[Document]:
        """Yield all documents in order."""
        for number in range(self.num_blocks):
            for file, place in self.places(number):
                yield file.parse(place)

    def fingerprint(self) -> int:
        """Hash names and sizes of the files, and both ends of 64 local ones.

        Folders do not count: a corpus may be moved.
        """
        seen = 0
        for number, file in enumerate(self.files):
            path = file.path
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
    """Open the files of all inputs (see `DataConfig`) in an order that names decide.

    What is up to `cache_bytes` is unpacked or downloaded, more is streamed; a small corpus is cut
    into several blocks for each of the `streams`. Raises InputError if an input is not there, is of
    no known kind, or lacks the text column.
    """
    found, passed_over = _expand(inputs)
    files: list[File] = []
    sizes = {path: os.stat(path).st_size for path in found if os.path.exists(path)}
    block_bytes = min(BLOCK_BYTES, sum(sizes.values()) // (_BLOCKS_PER_STREAM * streams) + 1)
    block_bytes = max(block_bytes, 512)
    for path in found:
        if path == "package-docs":
            files.append(_package_file(package_split))
        elif path in sizes:
            files.append(_open_file(path, sizes[path], text_column, block_bytes))
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
        except InputError:
            raise
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


def _text_of_line(line: bytes, column: str | None) -> str:
    """Return the text of a line, which is JSON if there is a column."""
    try:
        text = line.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start} of the line"
        raise ValueError(f"not valid UTF-8 ({where})") from None
    if column is None or not text or text.isspace():
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


def _kind(path: str) -> tuple[str, str]:
    """Return suffix and packing of a file, such as .jsonl and gzip."""
    stem, suffix = os.path.splitext(path.lower())
    packing = _PACKED.get(suffix, "")
    return (os.path.splitext(stem)[1] if packing else suffix), packing


def _unpack(raw: Any, packing: str) -> Any:
    if not packing:
        return raw
    if packing == "xz":
        import lzma

        return lzma.open(raw)
    stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), packing)
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
    suffix, packing = _kind(path)
    return suffix in _LINES or suffix == ".csv" or (suffix == ".parquet" and not packing)


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


def _open_file(path: str, size: int, column: str, block_bytes: int) -> File:
    suffix, packing = _kind(path)
    if suffix == ".parquet":
        return _open_parquet(path, size, column, block_bytes)
    field = None if suffix == ".txt" else column
    whole = packing or suffix == ".csv" or path.startswith("hf://")
    if whole or (suffix == ".json" and _is_array(path)):
        return StreamFile(path, size, field)
    return LinesFile(path, size, field, block_bytes)


def _is_array(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _open_parquet(path: str, size: int, column: str, block_bytes: int) -> File:
    folder, name = os.path.split(path)
    index = _index_of(folder)
    if name in index.get("files", {}):
        rows, tokens = index["files"][name]
        return TokensFile(path, size, tuple(rows), index["tokenizer"], tokens)
    metadata = retrying(partial(_read_metadata, path), path)
    schema = metadata.schema.to_arrow_schema()
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
    return TableFile(path, size, column, tuple(blocks))


@lru_cache
def _index_of(folder: str) -> dict[str, Any]:
    """Return what `prepare` says of the files that it wrote."""
    index = Path(folder, INDEX_FILE)
    return read_json(index) if index.exists() else {}


def _read_metadata(path: str) -> pq.FileMetaData:
    with open_binary(path) as file:
        return pq.read_metadata(file)


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
    from huggingface_hub import HfFileSystem

    name, _, config = item.partition(":")
    builder = retrying(
        lambda: load_dataset_builder(name, config or None),
        f"input {item!r}: no such file, and no hub dataset could be opened",
    )
    data_files = builder.config.data_files or {}
    if split not in data_files:
        raise InputError(f"input {item!r}: no split {split!r}; there is {', '.join(data_files)}")
    paths = sorted(map(str, data_files[split]))
    unknown = [path for path in paths if not _is_known(path)]
    if unknown:
        raise InputError(f"input {item!r}: {unknown[0]} is not {_KNOWN}")
    system = HfFileSystem()
    sizes = [retrying(partial(system.size, path), item) for path in paths]
    if sum(sizes) <= cache_bytes:
        paths = [retrying(partial(_download, path), path) for path in paths]
    pairs = zip(paths, sizes, strict=True)
    return [_open_file(path, size, column, block_bytes) for path, size in pairs]


def _download(path: str) -> str:
    from huggingface_hub import hf_hub_download

    repository, _, rest = path.removeprefix("hf://datasets/").partition("@")
    revision, _, inner = rest.partition("/")
    return hf_hub_download(repository, inner, revision=revision, repo_type="dataset")


def _unpacked(file: StreamFile, block_bytes: int) -> File:
    """Write a file's texts as parquet into the cache, unless it is there, and open that."""
    path = os.path.realpath(file.path)
    changed = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
    identity = f"{path} {file.size} {changed} {file.column}"
    folder = cache_folder() / "texts"
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
    table = _open_parquet(str(target), file.size, "text", block_bytes)
    assert isinstance(table, TableFile)
    return replace(table, path=file.path, unpacked=str(target))


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
