"""Tokenize a corpus once, into parquet files that the stream reads without tokenizing again.

The corpus is cut into parts of whole blocks. Each part becomes one file, written beside its place
and renamed into it, by whichever process is free; a run that was stopped goes on with the parts
that are not there yet. Until the last one is, all lies in `OUTPUT.partial`, with a plan of what is
to be made out of what. An index of all files lies beside them, so that opening costs nothing.

Duplicates are found beforehand, in one pass over the texts in the order of the corpus: the first
copy stays. A document keeps its key, so that it is held out, and corrupted, as its text would be.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.corpus import (
    INDEX_FILE,
    TOKENIZER_KEY,
    TOKENS_SCHEMA,
    Corpus,
    Document,
    open_corpus,
)
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.folders import (
    PROVENANCE_FILE,
    InputError,
    check_output,
    package_versions,
    read_json,
    write_json,
)

PARTS_FOLDER = "data"
_COUNTS_KEY = b"qwen3_encdec.counts"
_GROUP_TOKENS = 2**16
_PERMUTATIONS, _SIMILARITY = 128, 0.8
_COUNTED = ("documents", "used", "short", "long", "duplicate", "tokens")


@dataclass(frozen=True)
class Preparation:
    """Settings of a preparation."""

    inputs: list[str]
    """As `DataConfig.inputs`."""
    text_column: str = "text"
    """As `DataConfig.text_column`."""
    min_tokens: int = 8
    """Shorter documents are left out."""
    max_tokens: int | None = None
    """Longer documents are left out."""
    deduplicate: Literal["no", "exact", "minhash"] = "no"
    """Leave out copies: of the text to the letter, or also texts that share four in five of their
    word triples.
    """


def prepare(
    preparation: Preparation,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    processes: int | None = None,
) -> Counter[str]:
    """Write the tokenized corpus to a folder, or go on where a stopped run was.

    One process for each processor works unless `processes` says otherwise. Returns counts:
    `documents` = `used` + `short` + `long` + `duplicate`, and `tokens`. Raises InputError for bad
    input, a full disk, or another corpus, tokenizer or settings than the stopped run had.
    """
    check_output(output, "prepared corpus")
    corpus = open_corpus(preparation.inputs, text_column=preparation.text_column)
    parts = _parts(corpus)
    fingerprint = Encoder(tokenizer).fingerprint
    plan = {
        "preparation": asdict(preparation),
        "corpus": corpus.fingerprint(),
        "tokenizer": fingerprint,
        "parts": len(parts),
    }
    building = output.with_name(output.name + ".partial")
    try:
        _begin(building, plan)
        _find_duplicates(preparation, corpus, building / "duplicates.npy")
        folder = building / PARTS_FOLDER
        folder.mkdir(exist_ok=True)
        files = [folder / f"part-{n:05d}-of-{len(parts):05d}.parquet" for n in range(len(parts))]
        todo = [pair for pair in zip(parts, files, strict=True) if not pair[1].exists()]
        done = len(parts) - len(todo)
        with tqdm(total=len(parts), initial=done, unit="part", disable=None) as progress:
            for _ in _in_processes(todo, (preparation, tokenizer, corpus, building), processes):
                progress.update()
        counts = _write_index(files, fingerprint)
        (building / "plan.json").unlink()
        (building / "duplicates.npy").unlink()
        provenance = {"kind": "prepared corpus", **plan, "counts": counts}
        write_json(building / PROVENANCE_FILE, provenance | {"versions": package_versions()})
        if output.exists():
            shutil.rmtree(output)
        os.rename(building, output)
    except OSError as error:
        raise InputError(f"cannot write {building}: {error}; run again to go on") from None
    return counts


def _parts(corpus: Corpus) -> list[range]:
    """Return the blocks that go into one file each; of a streamed corpus one of its files."""
    most = 1 if corpus.streamed else min(max(corpus.num_blocks // 256, 16), 1024)
    starts = range(0, corpus.num_blocks, most)
    return [range(start, min(start + most, corpus.num_blocks)) for start in starts]


def _block(corpus: Corpus, number: int) -> Iterator[tuple[int, Document]]:
    """Yield the documents of a block, each with a number of its own."""
    for place, (file, raw) in enumerate(corpus.places(number), number << 32):
        yield place, file.parse(raw)


def _begin(building: Path, plan: dict[str, Any]) -> None:
    """Make the folder of an unfinished preparation, or take up one that has the same plan."""
    building.mkdir(parents=True, exist_ok=True)
    plan_file = building / "plan.json"
    if (building / PROVENANCE_FILE).exists():  # all but renamed
        (building / PROVENANCE_FILE).unlink()
    elif any(building.iterdir()):
        same = plan_file.exists() and read_json(plan_file) == json.loads(json.dumps(plan))
        if not same:
            raise InputError(
                f"{building} holds an unfinished preparation of another corpus, with another "
                "tokenizer or other settings; delete it or name another output"
            )
    for leftover in building.rglob("*.tmp*"):
        leftover.unlink()
    write_json(plan_file, plan)


def _in_processes(
    todo: list[tuple[range, Path]], arguments: tuple[Any, ...], processes: int | None
) -> Iterator[None]:
    """Write all parts, in this process if there is one part or process only."""
    processes = min(processes or os.cpu_count() or 1, len(todo))
    if processes <= 1:
        writer = _PartWriter(*arguments)
        for part in todo:
            writer.write(*part)
            yield
        return
    with ProcessPoolExecutor(processes, initializer=_start_process, initargs=arguments) as pool:
        try:
            for future in as_completed([pool.submit(_write_part, *part) for part in todo]):
                yield future.result()
        except BrokenProcessPool:
            message = "a process was killed, perhaps for its memory; run again to go on"
            raise InputError(message) from None
        finally:
            pool.shutdown(cancel_futures=True)


class _PartWriter:
    """Writes parts; made once a process."""

    def __init__(
        self,
        preparation: Preparation,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        building: Path,
    ) -> None:
        self.preparation, self.corpus, self.encode = preparation, corpus, Encoder(tokenizer)
        self.duplicates = set(np.load(building / "duplicates.npy").tolist())

    def write(self, blocks: range, file: Path) -> None:
        """Write the documents of some blocks, row groups of about as many tokens."""
        schema = TOKENS_SCHEMA.with_metadata({TOKENIZER_KEY: self.encode.fingerprint.encode()})
        counts = Counter(dict.fromkeys(_COUNTED, 0))
        temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
        try:
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for group in self._groups(blocks, counts):
                    keys, tokens = zip(*group, strict=True)
                    offsets = np.cumsum([0, *map(len, tokens)]).astype(np.int32)
                    lists = pa.ListArray.from_arrays(offsets, np.concatenate(tokens))
                    table = pa.table([pa.array(keys, pa.int64()), lists], schema=schema)
                    writer.write_table(table, row_group_size=2**31)
                writer.add_key_value_metadata({_COUNTS_KEY: json.dumps(counts)})
            os.replace(temporary, file)
        except OSError as error:
            raise InputError(f"cannot write {file}: {error}; run again to go on") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _groups(
        self, blocks: range, counts: Counter[str]
    ) -> Iterator[list[tuple[int, np.ndarray]]]:
        group: list[tuple[int, np.ndarray]] = []
        size = 0
        for block in blocks:
            for place, document in _block(self.corpus, block):
                tokens = self._tokens(document, place, counts)
                if tokens is None:
                    continue
                group.append((document.key, tokens))
                size += len(tokens)
                if size >= _GROUP_TOKENS:
                    yield group
                    group, size = [], 0
        if group:
            yield group

    def _tokens(self, document: Document, place: int, counts: Counter[str]) -> np.ndarray | None:
        """Return token ids of a document, None if it is left out, and count it."""
        counts["documents"] += 1
        if place in self.duplicates:
            counts["duplicate"] += 1
            return None
        if not isinstance(document.content, str):
            raise InputError(f"{self.corpus.name} is tokenized already")
        tokens = self.encode(document.content)
        if len(tokens) < self.preparation.min_tokens:
            counts["short"] += 1
            return None
        if len(tokens) > (self.preparation.max_tokens or inf):
            counts["long"] += 1
            return None
        counts["used"] += 1
        counts["tokens"] += len(tokens)
        return tokens


_writer: _PartWriter


def _start_process(*arguments: Any) -> None:
    global _writer
    _writer = _PartWriter(*arguments)


def _write_part(blocks: range, file: Path) -> None:
    _writer.write(blocks, file)


def _write_index(files: list[Path], tokenizer: str) -> Counter[str]:
    """Write row counts and tokens of all files into one, and add up what became of documents."""
    counts = Counter(dict.fromkeys(_COUNTED, 0))
    index = {}
    for file in files:
        metadata = pq.read_metadata(file)
        of_file = json.loads(metadata.metadata[_COUNTS_KEY])
        counts.update(of_file)
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        index[file.name] = rows, of_file["tokens"]
    write_json(files[0].with_name(INDEX_FILE), {"tokenizer": tokenizer, "files": index})
    return counts


def _find_duplicates(preparation: Preparation, corpus: Corpus, file: Path) -> None:
    """Write the numbers of the documents to leave out."""
    if not file.exists():
        copies = _copies(corpus, preparation) if preparation.deduplicate != "no" else ()
        temporary = file.with_suffix(".tmp.npy")
        np.save(temporary, np.array(list(copies), np.int64))
        os.replace(temporary, file)


def _copies(corpus: Corpus, preparation: Preparation) -> Iterator[int]:
    """Yield the numbers of documents whose text, or one like it, was there before."""
    near = None
    if preparation.deduplicate == "minhash":
        try:
            from rensa import RMinHashDeduplicator
        except ImportError:
            raise InputError(
                "deduplicating by minhash needs the package rensa: pip install rensa"
            ) from None
        near = RMinHashDeduplicator(_SIMILARITY, _PERMUTATIONS, use_lsh=True)
    seen: set[int] = set()
    for block in range(corpus.num_blocks):
        fresh = []
        for number, document in _block(corpus, block):
            if document.key in seen:
                yield number
            elif len(document.content):  # empty ones are too short, not copies
                seen.add(document.key)
                fresh.append((str(number), _triples(str(document.content))))
        if near is not None:
            for (name, _), keep in zip(fresh, near.add_pairs(fresh), strict=True):
                if not keep:
                    yield int(name)


def _triples(text: str) -> list[str]:
    words = text.casefold().split()
    return [" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))]
