"""Tokenize a corpus once, into parquet files that the stream reads without tokenizing again.

The corpus is cut into parts of whole shards. Each part becomes one file, written beside its place
and renamed into it, by whichever process is free; a run that was stopped goes on with the parts
that are not there yet. Until the last one is, all lies in `OUTPUT.partial`, with a plan of what is
to be made out of what. Documents keep the number and the held-out fate that they have in the
corpus, so that the stream makes the same examples out of either.

Duplicates are found beforehand, in one pass over the texts in the order of the corpus: the first
copy stays.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.corpus import (
    TOKENIZED_SCHEMA,
    TOKENIZER_KEY,
    Block,
    Shard,
    Tokenized,
    corpus_fingerprint,
    open_corpus,
    tokenized,
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

_COUNTS_KEY = b"qwen3_encdec.counts"
_PERMUTATIONS, _SIMILARITY = 128, 0.8
_FEWEST_BLOCKS, _MOST_BLOCKS = 16, 1024


@dataclass(frozen=True)
class Preparation:
    """What to make of a corpus."""

    inputs: list[str]
    """As `DataConfig.inputs`."""
    text_column: str = "text"
    """As `DataConfig.text_column`."""
    hub_split: str = "train"
    """As `DataConfig.hub_split`."""
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

    Args:
        preparation: What to make of which corpus.
        tokenizer: Tokenizes.
        output: Folder to write; one that prepare-data wrote before is replaced.
        processes: How many work at a time; None is one for each processor.

    Returns:
        What became of the documents: `documents` = `used` + `short` + `long` + `duplicate`, and
            `tokens`.

    Raises:
        InputError: bad input, a full disk, or another corpus, tokenizer or settings than the
            stopped run had.
    """
    check_output(output, "prepared corpus")
    shards = open_corpus(
        preparation.inputs, text_column=preparation.text_column, hub_split=preparation.hub_split
    )
    parts = _parts(shards)
    plan = {
        "preparation": asdict(preparation),
        "corpus": corpus_fingerprint(shards),
        "tokenizer": Encoder(tokenizer).fingerprint,
        "parts": len(parts),
    }
    building = output.with_name(output.name + ".partial")
    try:
        _begin(building, plan)
        _find_duplicates(preparation, shards, building / "duplicates.npy")
        files = [
            building / f"part-{number:05d}-of-{len(parts):05d}.parquet"
            for number in range(len(parts))
        ]
        todo = [(part, file) for part, file in zip(parts, files, strict=True) if not file.exists()]
        with tqdm(
            total=len(parts), initial=len(parts) - len(todo), unit="part", disable=None
        ) as progress:
            for _ in _in_processes(todo, (preparation, tokenizer, building), processes):
                progress.update()
        counts = _add_up(
            Counter(json.loads(pq.read_metadata(file).metadata[_COUNTS_KEY])) for file in files
        )
        (building / "plan.json").unlink()
        (building / "duplicates.npy").unlink()
        provenance = {
            "kind": "prepared corpus",
            **plan,
            "counts": counts,
            "versions": package_versions(),
        }
        write_json(building / PROVENANCE_FILE, provenance)
        if output.exists():
            shutil.rmtree(output)
        os.rename(building, output)
    except OSError as error:
        raise InputError(
            f"cannot write {building}: {error}; run again to go on from there"
        ) from None
    return counts


def _parts(shards: list[Shard]) -> list[list[Shard]]:
    """Shards that go into one file each, at most about a thousand;

    a shard of unknown size is one by itself.
    """
    sizes = [shard.num_blocks or _FEWEST_BLOCKS for shard in shards]
    most = min(max(sum(sizes) // 256, _FEWEST_BLOCKS), _MOST_BLOCKS)
    ends = np.cumsum(sizes)
    # A shard belongs to the part in which it begins.
    starts = np.unique((ends - sizes) // most, return_index=True)[1].tolist()
    return [shards[start:end] for start, end in pairwise([*starts, len(shards)])]


def _begin(building: Path, plan: dict[str, Any]) -> None:
    """Make the folder of an unfinished preparation, or take up one that has the same plan."""
    building.mkdir(parents=True, exist_ok=True)
    if (building / PROVENANCE_FILE).exists():  # all but renamed
        (building / PROVENANCE_FILE).unlink()
    elif any(building.iterdir()) and (
        not (building / "plan.json").exists()
        or read_json(building / "plan.json") != json.loads(json.dumps(plan))
    ):
        raise InputError(
            f"{building} holds an unfinished preparation of another corpus, with another tokenizer or other settings; "
            "delete it or name another output"
        )
    for leftover in building.glob("*.tmp*"):
        leftover.unlink()
    write_json(building / "plan.json", plan)


def _in_processes(
    todo: list[tuple[list[Shard], Path]], arguments: tuple[Any, ...], processes: int | None
) -> Iterator[None]:
    """Write all parts, in this process if there is one part or process only."""
    processes = min(processes or os.cpu_count() or 1, len(todo))
    if processes <= 1:
        write = _PartWriter(*arguments)
        for part in todo:
            write(*part)
            yield
        return
    with ProcessPoolExecutor(processes, initializer=_start_process, initargs=arguments) as pool:
        try:
            for future in as_completed([pool.submit(_write_part, *part) for part in todo]):
                yield future.result()
        except BrokenProcessPool:
            raise InputError(
                "a process was killed, perhaps for its memory; run again to go on"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


class _PartWriter:
    """Writes parts; made once a process."""

    def __init__(
        self, preparation: Preparation, tokenizer: PreTrainedTokenizerBase, building: Path
    ) -> None:
        self.preparation, self.encode = preparation, Encoder(tokenizer)
        self.duplicates = np.load(building / "duplicates.npy", mmap_mode="r")

    def __call__(self, shards: list[Shard], file: Path) -> None:
        """Write the documents of some shards, a row group a block."""
        metadata = {TOKENIZER_KEY: self.encode.fingerprint.encode()}
        counts = _add_up([])
        temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
        try:
            with pq.ParquetWriter(
                temporary, TOKENIZED_SCHEMA.with_metadata(metadata), compression="zstd"
            ) as writer:
                for block in (block for shard in shards for block in shard.blocks()):
                    documents = self._tokenize(block, shards, counts)
                    offsets = np.append(0, np.cumsum(documents.lengths)).astype(np.int32)
                    columns = [
                        documents.ids,
                        documents.checksums,
                        pa.ListArray.from_arrays(offsets, documents.tokens),
                    ]
                    if len(documents.ids):
                        writer.write_table(
                            pa.table(columns, schema=TOKENIZED_SCHEMA), row_group_size=2**31
                        )
                writer.add_key_value_metadata({_COUNTS_KEY: json.dumps(counts)})
            os.replace(temporary, file)
        except OSError as error:
            raise InputError(
                f"cannot write {file}: {error}; run again to go on with this part"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _tokenize(self, block: Block, shards: list[Shard], counts: Counter[str]) -> Tokenized:
        if isinstance(block, Tokenized):
            raise InputError(f"{shards[0].path} is tokenized already")
        documents, twice = tokenized(
            block, self.encode.batch, lambda ids, _: np.isin(ids, self.duplicates)
        )
        short = documents.lengths < self.preparation.min_tokens
        long = documents.lengths > (self.preparation.max_tokens or np.inf)
        documents = documents.without(short | long)
        found = {"short": short, "long": long, "duplicate": twice}
        counts.update({name: int(those.sum()) for name, those in found.items()})
        counts.update(documents=len(block), used=len(documents.ids), tokens=len(documents.tokens))
        return documents


_writer: _PartWriter


def _start_process(*arguments: Any) -> None:
    global _writer
    _writer = _PartWriter(*arguments)


def _write_part(shards: list[Shard], file: Path) -> None:
    _writer(shards, file)


def _find_duplicates(preparation: Preparation, shards: list[Shard], file: Path) -> None:
    """Write the numbers of the documents to leave out, int64 ascending."""
    if file.exists():
        return
    duplicates: list[int] = []
    seen: set[bytes] = set()
    alike = None
    if preparation.deduplicate == "minhash":
        try:
            from rensa import RMinHashDeduplicator
        except ImportError:
            raise InputError(
                "deduplicating by minhash needs the package rensa: pip install rensa"
            ) from None
        alike = RMinHashDeduplicator(_SIMILARITY, _PERMUTATIONS, use_lsh=True)
    for block in (
        block for shard in shards for block in shard.blocks() if preparation.deduplicate != "no"
    ):
        fresh = []
        for document in block if isinstance(block, list) else ():
            digest = blake2b(document.text.encode("utf-8", "replace"), digest_size=16).digest()
            if digest in seen:
                duplicates.append(document.id)
            elif document.text:  # empty ones are too short, not copies
                seen.add(digest)
                fresh.append(document)
        if alike is not None:
            kept = alike.add_pairs(
                [(str(document.id), _triples(document.text)) for document in fresh]
            )
            duplicates += [
                document.id for document, keep in zip(fresh, kept, strict=True) if not keep
            ]
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as handle:
        np.save(handle, np.array(sorted(duplicates), dtype=np.int64))
    os.replace(temporary, file)


def _triples(text: str) -> list[str]:
    words = text.casefold().split()
    return [" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))]


def _add_up(parts: Iterable[Counter[str]]) -> Counter[str]:
    total = Counter(documents=0, used=0, short=0, long=0, duplicate=0, tokens=0)
    for part in parts:
        total.update(part)
    return total
