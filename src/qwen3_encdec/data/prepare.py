"""Tokenize a corpus once, into parquet files that the stream reads without tokenizing again.

The corpus is split into parts of whole blocks, and any free process writes a part as one file. A
stopped run resumes with the missing parts: until all are written, they stay in `OUTPUT.partial`,
with a plan that records inputs and settings. An index beside the files makes opening the corpus
cheap.

Duplicates are found first, in one pass over the texts in corpus order; the first copy is kept. A
document keeps its key, so it is held out and corrupted as its text would be.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.corpus import (
    COUNTS_KEY,
    INDEX_FILE,
    TOKENIZER_KEY,
    TOKENS_SCHEMA,
    Corpus,
    open_corpus,
)
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.folders import (
    PROVENANCE_FILE,
    InputError,
    check_output,
    local_paths,
    move_into_place,
    package_versions,
    read_json,
    write_json,
    writing,
)

_GROUP_TOKENS = 2**16
_PERMUTATIONS, _SIMILARITY = 128, 0.8


class Preparation:
    """Corpus preparation in steps, for any executor on machines that share a file system.

    Call `begin` once, then `run` in every task or `write` for every part, then `finish` once.

    Args:
        config: Its first source is prepared. Documents below `min_tokens` are dropped.
        tokenizer: Tokenizer of the model to train.
        output: Folder to write.
        deduplicate: "exact" drops copies, "minhash" also texts that share four in five of their
            word triples; "no" drops neither.

    Raises InputError, here or in a step, for bad input, a full disk, or a corpus, tokenizer
    or settings that differ from the stopped run's.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        output: Path,
        deduplicate: str = "no",
    ) -> None:
        source = config.sources[0]
        output = check_output(output, "prepared corpus", source.inputs).resolve()  # a link stays
        self.output, self.min_tokens = output, config.min_tokens
        for path in local_paths(*source.inputs):
            if Path(path).resolve() in output.parents:
                raise InputError(f"output {output} is inside input {path}; choose another folder")
        self.corpus, self.encode = open_corpus(source, config), Encoder(tokenizer)
        for file in self.corpus.files:
            if file.tokenizer:
                raise InputError(f"{file.path} is already tokenized; train on it directly")
        blocks = self.corpus.num_blocks
        most = min(max(blocks // 256, 16), 1024)
        self.parts = [range(n, min(n + most, blocks)) for n in range(0, blocks, most)]
        self.plan = {
            "kind": "prepared corpus",
            "inputs": source.inputs,
            "text_column": source.text_column,
            "min_tokens": config.min_tokens,
            "deduplicate": deduplicate,
            "corpus": self.corpus.fingerprint(),
            "tokenizer": self.encode.fingerprint,
            "parts": len(self.parts),
        }
        self.building = output.with_name(output.name + ".partial")
        number = len(self.parts)
        names = [f"part-{part:05d}-of-{number:05d}.parquet" for part in range(number)]
        self.files = [self.building / "data" / name for name in names]
        self._copies = self.building / "copies.npy"

    def missing(self) -> list[int]:
        """Return the numbers of the parts still to be written."""
        return [part for part, file in enumerate(self.files) if not file.exists()]

    def begin(self) -> None:
        """Create the folder, or resume one with the same plan, and find the duplicates."""
        about = self.building / PROVENANCE_FILE
        with writing(self.building):
            (self.building / "data").mkdir(parents=True, exist_ok=True)
            same = about.exists() and self.plan.items() <= read_json(about).items()
            if not same and any(path.is_file() for path in self.building.rglob("*")):
                raise InputError(
                    f"{self.building} holds an unfinished preparation with another corpus, "
                    "tokenizer or other settings; delete it or choose another output"
                )
            for leftover in self.building.rglob("*.tmp*"):
                leftover.unlink()
            write_json(about, self.plan)
            if not self._copies.exists():
                copies = np.fromiter(_find_copies(self.corpus, self.plan["deduplicate"]), np.int64)
                np.save(self.building / "copies.tmp.npy", copies)
                os.replace(self.building / "copies.tmp.npy", self._copies)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Write one task's share of the missing parts, as a step of a datatrove pipeline."""
        for part in range(rank, len(self.parts), world_size):
            if not self.files[part].exists():
                self.write(part)

    def write(self, part: int) -> None:
        """Write the documents of a part's blocks to its file."""
        file = self.files[part]
        schema = TOKENS_SCHEMA.with_metadata({TOKENIZER_KEY: self.encode.fingerprint.encode()})
        counts = Counter(documents=0, used=0, short=0, duplicate=0, tokens=0)
        temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
        with writing(file):
            try:
                with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                    for group in self._groups(self.parts[part], counts):
                        keys, tokens = zip(*group, strict=True)
                        offsets = np.cumsum([0, *map(len, tokens)]).astype(np.int32)
                        lists = pa.ListArray.from_arrays(offsets, np.concatenate(tokens))
                        columns = [pa.array(keys, pa.int64()), lists]
                        writer.write_table(pa.table(columns, schema=schema))
                    writer.add_key_value_metadata({COUNTS_KEY: json.dumps(counts)})
                os.replace(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)

    def _groups(
        self, blocks: range, counts: Counter[str]
    ) -> Iterator[list[tuple[int, np.ndarray]]]:
        """Yield row groups of (key, tokens) pairs, and count document outcomes."""
        copies = np.load(self._copies, mmap_mode="r")  # sorted; all processes share its memory
        group: list[tuple[int, np.ndarray]] = []
        size = 0
        for number, document in self.corpus.numbered(blocks):
            tokens = self.encode(document.content)
            outcome = "short" if len(tokens) < self.min_tokens else "used"
            is_copy = copies.searchsorted(number) < copies.searchsorted(number, side="right")
            outcome = "duplicate" if is_copy else outcome
            counts.update(("documents", outcome))
            if outcome != "used":
                continue
            counts["tokens"] += len(tokens)
            size += len(tokens)
            group.append((document.key, tokens))
            if size >= _GROUP_TOKENS:
                yield group
                group, size = [], 0
        if group:
            yield group

    def finish(self, *task: Any) -> Counter[str]:
        """Index the files and move the folder into place; the last step, run by one task.

        Returns counts: `documents` = `used` + `short` + `duplicate`, and `tokens`.
        """
        if missing := self.missing():
            raise InputError(f"{self.building}: {len(missing):,} parts are not written yet")
        counts: Counter[str] = Counter()
        index = {}
        with writing(self.building):
            for file in self.files:
                metadata = pq.read_metadata(file)
                of_file = json.loads(metadata.metadata[COUNTS_KEY])
                counts.update(of_file)
                rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
                index[file.name] = rows, of_file["tokens"]
            if not counts["used"]:
                shutil.rmtree(self.building)
                raise InputError(
                    f"none of the {counts['documents']:,} documents has {self.min_tokens} tokens; "
                    "lower min_tokens"
                )
            facts = {"tokenizer": self.encode.fingerprint, "files": index}
            write_json(self.building / "data" / INDEX_FILE, facts)
            about = self.plan | {"counts": counts, "versions": package_versions()}
            write_json(self.building / PROVENANCE_FILE, about)
            move_into_place(self.building, self.output)
            (self.output / self._copies.name).unlink()  # a failed move needs it again
        return counts


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    deduplicate: str = "no",
    processes: int | None = None,
) -> Counter[str]:
    """Write the tokenized `config.inputs` to a folder, or resume a stopped run.

    Uses one process per granted CPU unless `processes` is given. Other arguments, result and errors
    are those of `Preparation`.
    """
    preparation = Preparation(config, tokenizer, output, deduplicate)
    preparation.begin()
    todo, total = preparation.missing(), len(preparation.parts)
    # A cluster's scheduler may grant few of the machine's CPUs; macOS does not say.
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = min(processes or granted or 1, len(todo))
    workers = processes if processes > 1 else 0
    # Unlike the processes of a pool, workers end with their parent.
    options: Any = {"collate_fn": preparation.write, "num_workers": workers, "in_order": False}
    written: Any = DataLoader(todo, batch_size=None, **options)  # type: ignore[arg-type]
    try:
        for _ in tqdm(written, total=total, initial=total - len(todo), unit="part", disable=None):
            pass
    except RuntimeError as error:  # a worker was killed
        raise InputError(f"{output}: {error}; run again to resume") from error
    return preparation.finish()


def _find_copies(corpus: Corpus, deduplicate: Any) -> Iterator[int]:
    """Yield the numbers of documents whose text, or a similar one, occurred before."""
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
    documents = corpus.numbered(range(corpus.num_blocks))
    for number, document in tqdm(documents, "finding copies", unit=" documents", disable=None):
        if not len(document.content):  # empty ones are too short, not copies
            continue
        is_copy = document.key in seen
        if near and not is_copy:
            words = str(document.content).casefold().split()
            triples = [" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))]
            is_copy = not near.add_pairs([(str(number), triples)])[0]
        if is_copy:
            yield number
        seen.add(document.key)
