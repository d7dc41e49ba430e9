"""Corpora: documents from files, hub datasets and installed packages.

Every input becomes files, and a file is read in independent blocks: a byte range of a .jsonl or
.txt file, or a part of a row group of a .parquet file. Compressed files, .csv and .json can only be
read from the start. If they fit `cache_gib`, they are unpacked into a cache as JSON lines, and hub
datasets are downloaded; larger inputs are streamed.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from qwen3_encdec.data.config import DataConfig, Source
from qwen3_encdec.data.package_docs import Split, cache_folder, package_docs_file
from qwen3_encdec.folders import (
    PROVENANCE_FILE,
    InputError,
    input_errors,
    local_paths,
    read_optional,
)

BLOCK_BYTES = 2**18
BLOCK_ROWS = 2048
BATCH_ROWS = 256
INDEX_FILE = "_index.json"
PACKAGE_DOCS = "package-docs"
TOKENIZER_KEY = b"qwen3_encdec.tokenizer"
COUNTS_KEY = b"qwen3_encdec.counts"
TOKENS_SCHEMA = pa.schema({"key": pa.int64(), "tokens": pa.list_(pa.int32())})
_KIND = re.compile(r"\.(parquet$|jsonl|ndjson|json|txt|csv)(\.gz|\.zst|\.bz2|\.xz)?$")
_KNOWN = ".jsonl, .json, .txt, .csv (also .gz, .zst, .bz2, .xz) or .parquet"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:.+)?")
_UNPACKERS: dict[str | None, Callable[[Any], Any]] = {
    None: nullcontext,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda raw: io.BufferedReader(
        pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"), 2**17
    ),
}


class Document(NamedTuple):
    """A text or its token ids (int32), and the key that equal texts share."""

    path: str
    key: int
    content: str | np.ndarray


@dataclass(frozen=True)
class File:
    """A file of documents."""

    path: str
    """Name in messages."""
    copy: str
    """The file that is read: downloaded, unpacked, or `path` itself."""
    size: int
    num_blocks: int
    column: str = ""
    """Field of a JSON line or column of a table; empty for plain lines."""
    streamed: bool = False
    """Unpacked while it is read; a block is then every `num_blocks`-th line."""
    rows: tuple[int, ...] = ()
    """Row counts of the row groups of a table."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer that prepared a table, if it was prepared."""
    tokens: int = 0

    def read(self, blocks: range) -> Iterator[tuple[int, Document]]:
        """Yield the documents of some blocks, each with its offset, line or row.

        A block is the lines that begin in a byte range, or a part of a row group.
        """
        return self._rows(blocks) if self.rows else self._texts(blocks)

    def _texts(self, blocks: range) -> Iterator[tuple[int, Document]]:
        lines = self._lines(blocks)
        if self.streamed:
            unpacked = enumerate(_unpacked(self.path, self.copy))
            lines = ((at, line) for at, line in unpacked if at % self.num_blocks in blocks)
        for at, line in lines:
            try:
                text = _text(line, self.column)
            except ValueError as error:
                number = at + 1
                if not self.streamed:
                    every = self._lines(range(self.num_blocks))
                    number = next(n for n, (start, _) in enumerate(every, 1) if start == at)
                raise InputError(f"{self.path} line {number}: {error}") from None
            yield at, Document(self.path, text_key(text), text)

    def _lines(self, blocks: range) -> Iterator[tuple[int, bytes]]:
        """Yield the byte offset and content of each line that begins in some blocks."""
        start, end = (self.size * at // self.num_blocks for at in (blocks.start, blocks.stop))
        with input_errors(self.path), open(self.copy, "rb") as file:
            if start:  # a line that crosses the start belongs to the previous block
                file.seek(start - 1)
                start += len(file.readline(end - start + 1)) - 1
            while start < end:
                line = file.readline()
                if not line:
                    raise InputError(f"{self.path} was truncated after it was opened")
                yield start, line
                start += len(line)

    def _rows(self, blocks: range) -> Iterator[tuple[int, Document]]:
        """Decode row groups a few rows at a time: every open stream holds what it decoded."""
        parts = self.num_blocks // len(self.rows)
        columns = TOKENS_SCHEMA.names if self.tokenizer else [self.column]
        with input_errors(self.path), _open(self.copy) as file:
            table = pq.ParquetFile(file, buffer_size=2**16, pre_buffer=False)
            for group in range(blocks.start // parts, -(-blocks.stop // parts)):
                rows = self.rows[group]
                own = (min(max(at - group * parts, 0), parts) for at in (blocks.start, blocks.stop))
                first, end = (rows * part // parts for part in own)
                at, size = 0, max(min(rows // parts, BATCH_ROWS), 1)
                with input_errors(f"{self.path} row group {group}"):
                    for batch in table.iter_batches(size, [group], columns, use_threads=False):
                        wanted = batch[max(first - at, 0) : max(end - at, 0)]
                        number = (group << 32) + max(first, at)
                        yield from enumerate(self._documents(wanted), number)
                        at += len(batch)
                        if at >= end:
                            break

    def _documents(self, batch: pa.RecordBatch) -> Iterator[Document]:
        if not self.tokenizer:
            for text in batch[self.column].to_pylist():
                yield Document(self.path, text_key(text or ""), text or "")
            return
        keys, lists = (batch[name] for name in TOKENS_SCHEMA.names)
        # Not to_numpy, which imports pandas.
        offsets, tokens = np.from_dlpack(lists.offsets), np.from_dlpack(lists.values)
        for row, key in enumerate(keys.to_pylist()):
            yield Document(self.path, key, tokens[offsets[row] : offsets[row + 1]])


@dataclass
class Corpus:
    """The files of one source of a mixture."""

    name: str
    files: Sequence[File]
    passed_over: list[str]
    """Inputs that were found but skipped, with the reason."""

    def __post_init__(self) -> None:
        self._ends = np.cumsum([file.num_blocks for file in self.files])
        self.num_blocks = int(self._ends[-1])

    def read(self, block: int) -> Iterator[Document]:
        """Yield the documents of a block."""
        return (document for _, document in self.numbered(range(block, block + 1)))

    def documents(self) -> Iterator[Document]:
        """Yield all documents."""
        return (document for _, document in self.numbered(range(self.num_blocks)))

    def numbered(self, blocks: range) -> Iterator[tuple[int, Document]]:
        """Yield the documents of some blocks, each with a number that is unique in the corpus.

        A file is read once, however many of its blocks are wanted; numbers increase.
        """
        start = blocks.start
        while start < blocks.stop:
            index = int(np.searchsorted(self._ends, start, side="right"))
            file, end = self.files[index], int(self._ends[index])
            first, stop = end - file.num_blocks, min(end, blocks.stop)
            for at, document in file.read(range(start - first, stop - first)):
                yield (first << 32) + at, document
            start = stop

    def fingerprint(self) -> int:
        """Hash the names and sizes of the files, and both ends of up to 64 local ones.

        Folders are not hashed, so a corpus may be moved.
        """
        seen = 0
        for number, file in enumerate(self.files):
            name = file.path if file.path.startswith("hf://") else os.path.basename(file.path)
            seen = zlib.crc32(os.fsencode(f"{name} {file.size} {file.num_blocks}"), seen)
            if number % -(-len(self.files) // 64) == 0 and not file.copy.startswith("hf://"):
                with open(file.copy, "rb") as data:
                    seen = zlib.crc32(data.read(2**16), seen)
                    data.seek(max(0, file.size - 2**16))
                    seen = zlib.crc32(data.read(), seen)
        return seen


def open_corpus(source: Source, config: DataConfig, split: Split = "train") -> Corpus:
    """Open the files of all inputs of a source, sorted by name within an input.

    Inputs of up to `config.cache_gib` are unpacked or downloaded, larger ones are streamed; `split`
    selects the package-docs split. Raises InputError if an input is missing, of an unknown kind, or
    lacks the text column.
    """
    cache_bytes = config.cache_gib * 2**30
    passed_over: list[str] = []
    copies: dict[str, str] = {}
    first: dict[str, str] = {}  # path of each local file, whatever links and inputs lead to it
    for item in source.inputs:
        if item == PACKAGE_DOCS:
            copies[item] = str(package_docs_file(split))
        elif targets := _local_files(item, passed_over):
            for path, target in targets.items():
                if path == first.setdefault(target, path):
                    copies[path] = path
                else:
                    passed_over.append(f"{path} (the same file as {first[target]})")
        elif _HUB_ID.fullmatch(item):
            copies |= _hub_files(item, config.hub_split, cache_bytes)
        else:
            raise InputError(f"input {item!r}: no such file, folder or hub dataset")
    packed = {path for path, copy in copies.items() if _is_packed(path, copy)}
    if sum(_size(copies[path]) for path in packed) <= cache_bytes:
        copies |= {path: _unpack(path, copies[path]) for path in packed}
        packed = set()
    sizes = {path: _size(copy) for path, copy in copies.items()}
    # Cut a small corpus into several blocks per stream, a streamed one into few.
    total = sum(sizes.values())
    block_bytes = min(max(total // (8 * config.streams), 512), BLOCK_BYTES)
    streamed_bytes = max(total // (2 * config.streams), 1)
    files: list[File] = []
    indexes: dict[str, dict[str, Any]] = {}
    for path, copy in copies.items():
        if _kind(path)[0] == "parquet":
            folder, name = os.path.split(copy)
            if folder not in indexes:
                indexes[folder] = _read_index(folder)
            if facts := indexes[folder].get(name):
                files.append(File(path, copy, sizes[path], len(facts["rows"]), **facts))
            else:
                file = _open_parquet(path, copy, sizes[path], source.text_column, block_bytes)
                files.append(file)
        else:
            # Package-docs, which has no suffix, has its own column.
            column = {"txt": "", "": "text"}.get(_kind(path)[0], source.text_column)
            blocks = -(-sizes[path] // (streamed_bytes if path in packed else block_bytes))
            files.append(File(path, copy, sizes[path], blocks, column, path in packed))
    files = [file for file in files if file.num_blocks]
    if not files:
        raise InputError(f"the corpus is empty: no documents in {', '.join(source.inputs)}")
    return Corpus(source.name, files, passed_over)


def text_key(text: str) -> int:
    """Hash a text to 63 bits."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _text(line: bytes, column: str) -> str:
    """Return the text of a line, parsed as JSON if there is a column."""
    text = line.decode("utf-8-sig").strip("\r\n")
    if not column or not text or text.isspace():
        return text
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}); each line must be one object") from None
    if not isinstance(record, dict) or column not in record:
        there = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(f"no column {column!r}; found {there}")
    text = "" if record[column] is None else record[column]
    if not isinstance(text, str):
        raise ValueError(f"column {column!r} is {type(text).__name__}, not a string")
    return without_surrogates(text)


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON can contain but no tokenizer takes."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unpacked(path: str, copy: str) -> Iterator[bytes]:
    """Yield the text or JSON lines of a file that can only be read from its start."""
    kind, packing = _kind(path)
    with input_errors(path), _open(copy) as raw, _UNPACKERS[packing](raw) as file:
        if kind == "csv":
            yield from map(_json_line, _csv_records(file))
            return
        lines = [file.readline()]
        while lines[-1].isspace():
            lines.append(file.readline())
        if kind == "json" and lines[-1].lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            yield from map(_json_line, json.loads(b"".join(lines) + file.read()))
        else:
            yield from lines
            yield from file


def _json_line(record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _csv_records(file: Iterable[bytes]) -> Iterator[dict[str, str]]:
    """Yield the records of a CSV file, which must all have the cells that the header has."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 128 KiB
    rows = csv.reader((line.decode("utf-8-sig") for line in file), strict=True)
    try:
        header = next(rows, [])
        if repeated := {name for name in header if name and header.count(name) > 1}:
            raise csv.Error(f"more than one column {min(repeated)!r}")
        for row in filter(None, rows):
            if len(row) != len(header):
                raise csv.Error(f"{len(row)} cells, but the header has {len(header)}")
            yield dict(zip(header, row, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        # A line that fails to decode is not counted yet.
        number = rows.line_num + isinstance(error, UnicodeDecodeError)
        raise ValueError(f"line {number}: {error}") from None


def _is_packed(path: str, copy: str) -> bool:
    kind, packing = _kind(path)
    on_the_hub = copy.startswith("hf://") and kind != "parquet"
    return bool(packing) or kind in ("csv", "json") or on_the_hub


def _kind(path: str) -> tuple[str, str | None]:
    """Return kind and compression of a file, such as jsonl and .gz; empty if unknown."""
    found = _KIND.search(path.lower())
    return (found[1], found[2]) if found else ("", None)


def _unpack(path: str, copy: str) -> str:
    """Unpack a file into the cache, unless it is there already, and return the cached file."""
    about = os.stat(copy)
    identity = f"{os.path.realpath(copy)} {about.st_size} {about.st_mtime_ns}"
    target = cache_folder() / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:24]}.jsonl"
    if target.exists():
        return str(target)
    building = target.with_suffix(".partial")
    with input_errors(f"cannot unpack {path} into {target.parent}"), FileLock(f"{target}.lock"):
        try:
            if not target.exists():
                lines = tqdm(
                    _unpacked(path, copy), f"unpacking {path}", unit=" lines", disable=None
                )
                with building.open("wb") as file:
                    file.writelines(lines)
                os.replace(building, target)
        finally:
            building.unlink(missing_ok=True)
    return str(target)


def _local_files(item: str, passed_over: list[str]) -> dict[str, str]:
    """Return the files that a path or a glob matches, also in folders, and their real paths."""
    files: list[str] = []
    matches = local_paths(item)
    for match in matches:
        if os.path.isdir(match):
            files += _walk(match, passed_over)
        elif _kind(match)[0]:
            files.append(match)
        else:
            raise InputError(f"input {match} is not {_KNOWN}")
    if matches and not files:
        raise InputError(f"input {item!r} has no file of type {_KNOWN}")
    # Resolving every path from the root would take seconds for 10^5 files.
    folders = {folder: os.path.realpath(folder) for folder in set(map(os.path.dirname, files))}
    targets: dict[str, str] = {}
    for path in files:
        folder, name = os.path.split(path)
        is_link = os.path.islink(path)
        targets[path] = os.path.realpath(path) if is_link else os.path.join(folders[folder], name)
    return targets


def _walk(folder: str, passed_over: list[str]) -> list[str]:
    """Return the known, visible files below a folder, following links."""
    files: list[str] = []
    errors: list[OSError] = []
    seen = {os.path.realpath(folder)}
    for top, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        folders.sort()
        for name in list(folders):
            path = os.path.join(top, name)
            if name.startswith(".") or os.path.realpath(path) in seen:
                folders.remove(name)
                passed_over.append(f"{path} (hidden, or a link to a folder already read)")
            seen.add(os.path.realpath(path))
        for name in sorted(set(names) - {PROVENANCE_FILE, INDEX_FILE}):
            path = os.path.join(top, name)
            if name.startswith((".", "_")) or not _kind(name)[0]:
                passed_over.append(f"{path} ({'hidden' if name[0] in '._' else 'unknown type'})")
            else:
                files.append(path)
    if errors:
        raise InputError(f"folder {errors[0].filename} cannot be read: {errors[0].strerror}")
    return sorted(files)


def _open_parquet(path: str, copy: str, size: int, column: str, block_bytes: int) -> File:
    with input_errors(path), _open(copy) as file:
        metadata = pq.read_metadata(file)
    schema = metadata.schema.to_arrow_schema()
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    rows = tuple(group.num_rows for group in groups)
    about = metadata.metadata or {}
    if TOKENIZER_KEY in about:
        tokens = json.loads(about[COUNTS_KEY])["tokens"]
        name = about[TOKENIZER_KEY].decode()
        return File(path, copy, size, len(rows), rows=rows, tokenizer=name, tokens=tokens)
    if schema.names.count(column) != 1:
        count = "no" if column not in schema.names else "more than one"
        raise InputError(f"{path}: {count} column {column!r}; found {', '.join(schema.names)}")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise InputError(f"{path}: column {column!r} is {kind}, not a string")
    leaf = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
    whole = max((group.column(leaf).total_uncompressed_size for group in groups), default=0)
    # Every part decodes its whole row group.
    parts = max(min(-(-whole // block_bytes), 64), -(-max(rows, default=0) // BLOCK_ROWS), 1)
    parts = 1 if copy.startswith("hf://") else parts
    return File(path, copy, size, len(rows) * parts, column, False, rows)


def _read_index(folder: str) -> dict[str, dict[str, Any]]:
    """Return the facts of the files that `prepare` wrote into a folder, if it did.

    Raises InputError if a file that its index lists is missing.
    """
    file = Path(folder, INDEX_FILE)
    index = read_optional(file)
    if index.keys() != {"tokenizer", "files"}:
        return {}
    if missing := index["files"].keys() - set(os.listdir(folder)):
        raise InputError(
            f"prepared corpus {folder} lacks {len(missing):,} of its files, such as "
            f"{min(missing)}; restore them, or delete {file} to use the others"
        )
    return {
        name: {"rows": tuple(rows), "tokenizer": index["tokenizer"], "tokens": tokens}
        for name, (rows, tokens) in index["files"].items()
    }


def _size(path: str) -> int:
    with input_errors(path):
        return _hub().size(path) if path.startswith("hf://") else os.stat(path).st_size


def _open(path: str) -> Any:
    return _hub().open(path, "rb") if path.startswith("hf://") else open(path, "rb")


def _hub() -> Any:
    """Return the hub as a file system whose client retries when the hub is overloaded.

    `huggingface_hub` retries downloads, but not the requests before them.
    """
    from huggingface_hub import HfFileSystem, get_session

    session: Any = get_session()
    if not hasattr(session, "send_once"):
        session.send_once = session.send

        def send(*arguments: Any, **options: Any) -> Any:
            for wait in (0.5, 1, 2, 4, 8, 0):
                response = session.send_once(*arguments, **options)
                if response.status_code not in (408, 429, 500, 502, 503, 504):
                    break
                time.sleep(wait)
            return response

        session.send = send
    return HfFileSystem()


def _hub_files(item: str, split: str, cache_bytes: float) -> dict[str, str]:
    """Return the files of a hub dataset and their copies, downloaded if they fit the cache."""
    from datasets import load_dataset_builder
    from huggingface_hub import snapshot_download

    name, _, config = item.partition(":")
    forms = "ORG/NAME or ORG/NAME:CONFIG"
    failure = f"input {item!r}: no such file, and no hub dataset could be opened as {forms}"
    with input_errors(failure):
        hub = _hub()
        data_files = load_dataset_builder(name, config or None).config.data_files or {}
        if split not in data_files:
            raise InputError(f"input {item!r}: no split {split!r}; found {', '.join(data_files)}")
        paths = sorted(map(str, data_files[split]))
        for path in paths:
            if not _kind(path)[0]:
                raise InputError(f"input {item!r}: {path} is not {_KNOWN}")
        if sum(map(_size, paths)) > cache_bytes:
            return dict(zip(paths, paths, strict=True))
        files = {path: hub.resolve_path(path) for path in paths}
        revision = files[paths[0]].revision
        names = [file.path_in_repo for file in files.values()]
        options = {"repo_type": "dataset", "revision": revision, "allow_patterns": names}
        folder = snapshot_download(files[paths[0]].repo_id, **options)
        return {path: os.path.join(folder, file.path_in_repo) for path, file in files.items()}
