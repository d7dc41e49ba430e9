"""Measure speed, memory, resumption and opening of the data engine against targets.

    python bench/data.py    # 10 minutes

Every part is measured in CPU time in its own process with one thread, so that other load on the
machine does not count.
"""

import json
import os
import tempfile
import time
from collections import namedtuple
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from measure import alone, command_line, target, write

from qwen3_encdec.data.collate import count_tokens
from qwen3_encdec.data.config import DataConfig, Source
from qwen3_encdec.data.corpus import INDEX_FILE, open_corpus
from qwen3_encdec.data.package_docs import package_docs_file
from qwen3_encdec.data.stream import BEGINNING, WINDOW_ROWS, RowLoader, UL2Data, rows
from qwen3_encdec.tokenization_qwen3_encdec import CONTROL_TOKENS, build_tokenizer

Size = namedtuple("Size", ("documents", "memory", "links", "shards", "longest", "batches"))
FULL = Size(10**9, memory=10**8, links=400, shards=10**5, longest=2**23, batches=200)
QUICK = Size(4_000, memory=10**6, links=40, shards=5_000, longest=2**20, batches=10)


def main() -> None:
    """Run all parts and print their figures beside the targets."""
    arguments = command_line(__doc__).parse_args()
    size = QUICK if arguments.quick else FULL
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    lines = package_docs_file("train").read_text(encoding="utf-8").splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = (folder / "corpus.jsonl").write_text("".join(lines[: size.documents]))
        print(f"text: docstrings of the installed packages, {text:,} characters")
        for part, wanted in (
            (packaged_speed, ">= 1.0 M tokens/s per worker"),
            (checkpoint_speed, ">= 1.0 M tokens/s per worker"),
            (memory, "<= 1.1 x from 10^5 tokens on"),
            (resume, "<= 1.0 s to the first row"),
            (opening, "<= 2.0 s to open all shards"),
            (length, "<= 1.5 x per token, longest to shortest documents"),
        ):
            target(part.__name__, alone(part, folder, size), wanted)
    write(arguments.output)


def open_data(*inputs: Path, tokenizer: Any = None) -> UL2Data:
    """Open corpora at 1024/512 with Qwen3's whole vocabulary."""
    config = DataConfig(inputs=list(map(str, inputs)), source_length=1024, target_length=512)
    return UL2Data(config, tokenizer or build_tokenizer())


def packaged_speed(folder: Path, size: Size, tokenizer: Any = None) -> float:
    """Measure millions of source and target tokens a second, from text to packed batches."""
    loader = RowLoader(open_data(folder / "corpus.jsonl", tokenizer=tokenizer), batch_size=16)
    batches = iter(loader)
    # Each stream first makes a window of rows ahead; after that, cost and output are steady.
    for _ in islice(batches, 64 * WINDOW_ROWS // 16):
        pass
    tokens, began = 0, time.process_time()
    for batch in islice(batches, size.batches):
        tokens += batch["input_ids"].numel() + batch["labels"].numel()
    return tokens / (time.process_time() - began) / 1e6


def checkpoint_speed(folder: Path, size: Size) -> float:
    """Measure the same with a checkpoint's tokenizer, of whose added tokens only 3 are special."""
    spec = json.loads(build_tokenizer(num_sentinel_tokens=0).backend_tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in CONTROL_TOKENS]
    for token in spec["added_tokens"][3:]:
        token["special"] = False
    Path(folder, "base").mkdir()
    Path(folder, "base/tokenizer.json").write_text(json.dumps(spec))
    named = {"tokenizer_class": "PreTrainedTokenizerFast"}
    Path(folder, "base/tokenizer_config.json").write_text(json.dumps(named))
    return packaged_speed(folder, size, build_tokenizer(folder / "base"))


def memory(folder: Path, size: Size) -> float:
    """Measure the growth of resident memory from 10^5 tokens to the end, as a ratio."""
    process, tokens, first = psutil.Process(), 0, 0
    for row in rows(open_data(folder / "corpus.jsonl")):
        tokens += count_tokens(row.examples)
        if not first and tokens >= 10**5:
            first = process.memory_info().rss
        if tokens >= size.memory:
            break
    return process.memory_info().rss / first


def resume(folder: Path, size: Size) -> float:
    """Measure seconds to a row in the middle of 10^9 tokens (one file, linked many times)."""
    Path(folder, "links").mkdir()
    for number in range(size.links):
        os.link(folder / "corpus.jsonl", folder / f"links/{number}.jsonl")
    data = open_data(folder / "links")
    position = [BEGINNING | {"turn": data.opened[0].num_blocks // 64 // 2, "document": 3}]
    state = {"rows": 0, "streams": {str(stream): position for stream in range(64)}}
    began = time.process_time()
    next(iter(RowLoader(data, batch_size=1, state=state)))
    return time.process_time() - began


def opening(folder: Path, size: Size) -> float:
    """Measure the seconds a rank takes to open many prepared shards."""
    shards = folder / "shards"
    shards.mkdir()
    names = [f"part-{number:06}.parquet" for number in range(size.shards)]
    for name in names:
        Path(shards, name).touch()
    index = {"tokenizer": "x", "files": {name: [[100] * 16, 10**6] for name in names}}
    Path(shards, INDEX_FILE).write_text(json.dumps(index))
    began = time.process_time()
    open_corpus(Source([str(shards)]), DataConfig())
    return time.process_time() - began


def length(folder: Path, size: Size) -> float:
    """Measure how time per token, from text to examples, varies with the length of documents."""
    data = open_data(folder / "corpus.jsonl")
    lines = Path(folder, "corpus.jsonl").read_text().splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)[: size.longest]
    text *= size.longest // len(text) + 1
    found = []
    for exponent in range(13, size.longest.bit_length(), 2):
        long = 2**exponent
        documents = [text[i * long : (i + 1) * long] for i in range(2**20 // long or 1)]
        began, tokens = time.process_time(), 0
        for number, document in enumerate(documents):
            ids = data.encode(document)
            data.examples(ids, number, 0)
            tokens += len(ids)
        found.append((time.process_time() - began) / tokens)
    return float(np.max(found) / np.min(found))


if __name__ == "__main__":
    main()
