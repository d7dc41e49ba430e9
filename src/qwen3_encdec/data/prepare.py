"""Tokenize a corpus once, into parquet files that the stream reads without tokenizing again.

The corpus is cut into parts of whole blocks, each written as one file by whichever process is free.
A run that was stopped goes on with the parts that are missing: until the last one is there, all of
it lies in `OUTPUT.partial`, with a plan of what is made of what. An index of the files lies beside
them, so that opening costs nothing.

Duplicates are found beforehand, in one pass over the texts in the order of the corpus: the first
copy stays. A document keeps its key, so that it is held out, and corrupted, as its text would be.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.corpus import INDEX_FILE, TOKENIZER_KEY, TOKENS_SCHEMA, Corpus, open_corpus
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.folders import (
    PROVENANCE_FILE,
    InputError,
    check_output,
    package_versions,
    read_json,
    write_json,
)

_COUNTS_KEY = b"qwen3_encdec.counts"
_GROUP_TOKENS = 2**16
_PERMUTATIONS, _SIMILARITY = 128, 0.8
_COUNTED = ("documents", "used", "short", "duplicate", "tokens")


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    deduplicate: str = "no",
    processes: int | None = None,
) -> Counter[str]:
    """Write the tokenized `config.inputs` to a folder, or go on where a stopped run was.

    Documents below `config.min_tokens` are left out, and copies: "exact" ones, or by "minhash" also
    texts that share four in five of their word triples. One process for each processor works unless
    `processes` says otherwise. Returns counts: `documents` = `used` + `short` + `duplicate`, and
    `tokens`. Raises InputError for bad input, a full disk, or another corpus, tokenizer or settings
    than the stopped run had.
    """
    check_output(output, "prepared corpus")
    corpus, encode = open_corpus(config.sources[0], config), Encoder(tokenizer)
    most = min(max(corpus.num_blocks // 256, 16), 1024)
    parts = [range(n, min(n + most, corpus.num_blocks)) for n in range(0, corpus.num_blocks, most)]
    plan = {
        "kind": "prepared corpus",
        "inputs": config.inputs,
        "text_column": config.text_column,
        "min_tokens": config.min_tokens,
        "deduplicate": deduplicate,
        "corpus": corpus.fingerprint(),
        "tokenizer": encode.fingerprint,
        "parts": len(parts),
    }
    building = output.with_name(output.name + ".partial")
    files = [building / f"data/part-{n:05d}-of-{len(parts):05d}.parquet" for n in range(len(parts))]
    try:
        _begin(building, plan)
        duplicates = building / "duplicates.npy"
        if not duplicates.exists():
            copies = np.array(list(_copies(corpus, deduplicate)), np.int64)
            np.save(building / "duplicates.tmp.npy", copies)
            os.replace(building / "duplicates.tmp.npy", duplicates)
        todo = [pair for pair in zip(parts, files, strict=True) if not pair[1].exists()]
        job = encode, corpus, config.min_tokens, set(np.load(duplicates).tolist())
        done = len(parts) - len(todo)
        with tqdm(total=len(parts), initial=done, unit="part", disable=None) as progress:
            for _ in _in_processes(todo, job, processes):
                progress.update()
        counts = _write_index(files, encode.fingerprint)
        duplicates.unlink()
        plan |= {"counts": counts, "versions": package_versions()}
        write_json(building / PROVENANCE_FILE, plan)
        if output.exists():
            shutil.rmtree(output)
        os.rename(building, output)
    except (OSError, BrokenProcessPool) as error:
        raise InputError(f"cannot write {building}: {error}; run again to go on") from None
    return counts


def _begin(building: Path, plan: dict[str, Any]) -> None:
    """Make the folder of an unfinished preparation, or take up one that has the same plan."""
    (building / "data").mkdir(parents=True, exist_ok=True)
    about = building / PROVENANCE_FILE
    same = about.exists() and plan.items() <= read_json(about).items()
    if not same and any(path.is_file() for path in building.rglob("*")):
        raise InputError(
            f"{building} holds an unfinished preparation of another corpus, with another "
            "tokenizer or other settings; delete it or name another output"
        )
    for leftover in building.rglob("*.tmp*"):
        leftover.unlink()
    write_json(about, plan)


def _in_processes(todo: list[tuple[range, Path]], job: Any, processes: int | None) -> Iterator[Any]:
    """Write all parts, in this process if there is one part or process only."""
    processes = min(processes or os.cpu_count() or 1, len(todo))
    if processes <= 1:
        _start_process(*job)
        yield from map(_write_part, todo)
        return
    with ProcessPoolExecutor(processes, initializer=_start_process, initargs=job) as pool:
        yield from pool.map(_write_part, todo)


_job: tuple[Encoder, Corpus, int, set[int]]


def _start_process(*job: Any) -> None:
    global _job
    _job = job


def _write_part(part: tuple[range, Path]) -> None:
    """Write the documents of some blocks."""
    blocks, file = part
    schema = TOKENS_SCHEMA.with_metadata({TOKENIZER_KEY: _job[0].fingerprint.encode()})
    counts = Counter(dict.fromkeys(_COUNTED, 0))
    temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for keys, tokens in _groups(blocks, counts):
                offsets = np.cumsum([0, *map(len, tokens)]).astype(np.int32)
                lists = pa.ListArray.from_arrays(offsets, np.concatenate(tokens))
                writer.write_table(pa.table([pa.array(keys, pa.int64()), lists], schema=schema))
            writer.add_key_value_metadata({_COUNTS_KEY: json.dumps(counts)})
        os.replace(temporary, file)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error}; run again to go on") from None
    finally:
        temporary.unlink(missing_ok=True)


def _groups(blocks: range, counts: Counter[str]) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Yield keys and tokens of row groups, and count what becomes of documents."""
    encode, corpus, min_tokens, duplicates = _job
    keys: list[int] = []
    texts: list[np.ndarray] = []
    for number, document in corpus.numbered(blocks):
        if not isinstance(document.content, str):
            raise InputError(f"{corpus.name} is tokenized already")
        tokens = encode(document.content)
        outcome = "short" if len(tokens) < min_tokens else "used"
        outcome = "duplicate" if number in duplicates else outcome
        counts.update(("documents", outcome))
        if outcome != "used":
            continue
        counts["tokens"] += len(tokens)
        keys.append(document.key)
        texts.append(tokens)
        if counts["tokens"] // _GROUP_TOKENS > (counts["tokens"] - len(tokens)) // _GROUP_TOKENS:
            yield keys, texts
            keys, texts = [], []
    if keys:
        yield keys, texts


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


def _copies(corpus: Corpus, deduplicate: str) -> Iterator[int]:
    """Yield the numbers of documents whose text, or one like it, was there before."""
    if deduplicate == "no":
        return
    near = None
    if deduplicate == "minhash":
        try:
            from rensa import RMinHashDeduplicator
        except ImportError:
            message = "deduplicating by minhash needs the package rensa: pip install rensa"
            raise InputError(message) from None
        near = RMinHashDeduplicator(_SIMILARITY, _PERMUTATIONS, use_lsh=True)
    seen: set[int] = set()
    for number, document in corpus.numbered(range(corpus.num_blocks)):
        if not len(document.content):  # empty ones are too short, not copies
            continue
        words = str(document.content).casefold().split()
        triples = [" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))]
        is_copy = document.key in seen
        if near and not is_copy:
            is_copy = not near.add_pairs([(str(number), triples)])[0]
        if is_copy:
            yield number
        seen.add(document.key)
