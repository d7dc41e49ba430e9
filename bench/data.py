"""Speed, memory, resumption and opening of the data engine; the last lines say what is met.

    python bench/data.py [--quick]

Everything is measured in processes of its own, one thread each, in CPU time, so that neighbours on
the machine do not count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

SIZES = ("documents", "memory", "links", "shards", "longest", "batches")
QUICK = dict(zip(SIZES, (4_000, 10**6, 40, 5_000, 2**20, 10), strict=True))
WHOLE = dict(zip(SIZES, (10**9, 10**8, 400, 10**5, 2**23, 200), strict=True))


def main() -> None:
    """Run all parts and print figures, then targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else WHOLE
    if arguments.part:
        name, _, option = arguments.part.partition(":")
        print(json.dumps(PARTS[name](arguments.folder, size, option)))
        return
    with tempfile.TemporaryDirectory() as folder:
        text = write_corpus(Path(folder, "corpus.jsonl"), size["documents"])
        print(f"text: docstrings of the installed packages, {text:,} bytes")
        found = {}
        for part in ("speed:packaged", "speed:checkpoint", "memory", "resume", "opening", "length"):
            found[part] = run_part(part, folder, arguments.quick)
            print(f"{part}: {found[part]}", flush=True)
    for part in ("speed:packaged", "speed:checkpoint"):
        speed = found[part]["tokens_per_second"]
        target(part, f"{speed / 1e6:.2f} M tokens/s a worker", ">= 1.0 M", speed >= 1e6)
    grown = found["memory"]["last_mib"] / found["memory"]["first_mib"]
    target("memory from 10^5 tokens on", f"{grown:.2f} x", "<= 1.1 x", grown <= 1.1)
    seconds = found["resume"]["seconds"]
    target("first row after a resume", f"{seconds:.2f} s", "<= 1 s", seconds <= 1)
    seconds = found["opening"]["seconds"]
    target(f"opening {size['shards']:,} shards", f"{seconds:.2f} s", "<= 2 s", seconds <= 2)
    per_token = list(found["length"].values())
    flat = max(per_token) / min(per_token)
    target("time per token by length of document", f"{flat:.2f} x", "<= 1.5 x", flat <= 1.5)


def target(name: str, figure: str, wanted: str, met: bool) -> None:
    """Print a line that says whether a figure is as wanted."""
    print(f"target {name}: {figure} (wanted {wanted}) {'met' if met else 'missed'}")


def run_part(part: str, folder: str, quick: bool) -> dict[str, float]:
    """Measure a part in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--folder", folder]
    command += ["--quick"] if quick else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_corpus(file: Path, most: int) -> int:
    """Write docstrings in an order that mixes packages, as JSON lines; returns bytes."""
    import numpy as np

    from qwen3_encdec.data.package_docs import package_docs

    documents = package_docs("train")
    order = np.random.default_rng(0).permutation(len(documents))[:most]
    lines = (json.dumps({"text": documents[i].text}) + "\n" for i in order)
    return file.write_text("".join(lines))


def open_data(*inputs: Path, tokenizer: Any = None) -> Any:
    """Open corpora at 1024/512 with Qwen3's whole vocabulary."""
    from qwen3_encdec.data.config import DataConfig
    from qwen3_encdec.data.stream import UL2Data
    from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

    config = DataConfig(inputs=list(map(str, inputs)), source_length=1024, target_length=512)
    return UL2Data(config, tokenizer or build_tokenizer())


def measure_speed(folder: Path, size: dict[str, int], option: str) -> dict[str, float]:
    """Measure source and target tokens a second, from text to packed batches."""
    from qwen3_encdec.data.stream import WINDOW_ROWS, RowLoader
    from qwen3_encdec.tokenization_qwen3_encdec import CONTROL_TOKENS, build_tokenizer

    tokenizer = None
    if option == "checkpoint":
        # A checkpoint has Qwen's own flags: twelve of its added tokens are not special.
        packaged = build_tokenizer(num_sentinel_tokens=0)
        spec = json.loads(packaged.backend_tokenizer.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in CONTROL_TOKENS]
        for token in spec["added_tokens"][3:]:
            token["special"] = False
        Path(folder, "base").mkdir(exist_ok=True)
        Path(folder, "base/tokenizer.json").write_text(json.dumps(spec))
        named = {"tokenizer_class": "PreTrainedTokenizerFast"}
        Path(folder, "base/tokenizer_config.json").write_text(json.dumps(named))
        tokenizer = build_tokenizer(folder / "base")
    data = open_data(folder / "corpus.jsonl", tokenizer=tokenizer)
    loader = RowLoader(data, batch_size=16)
    batches = iter(loader)
    # Every stream makes a window of rows ahead: past the first one, cost and yield keep step.
    for _ in islice(batches, 64 * WINDOW_ROWS // 16):
        pass
    before, began = loader.counts()["tokens/corpus.jsonl"], time.process_time()
    for _ in islice(batches, size["batches"]):
        pass
    seconds = time.process_time() - began
    tokens = loader.counts()["tokens/corpus.jsonl"] - before
    return {"tokens_per_second": tokens / seconds, "fast": data.encode.name == "tiktoken"}


def measure_memory(folder: Path, size: dict[str, int], _: str) -> dict[str, float]:
    """Measure resident memory after 10^5 tokens of every stream, and at the end."""
    import psutil

    from qwen3_encdec.data.stream import rows

    process, made = psutil.Process(), rows(open_data(folder / "corpus.jsonl"))
    tokens = 0
    first = 0.0
    for row in made:
        tokens += sum(len(e.source) + len(e.target) for e in row.examples)
        if not first and tokens >= 10**5:
            first = process.memory_info().rss / 2**20
        if tokens >= size["memory"]:
            break
    return {"first_mib": first, "last_mib": process.memory_info().rss / 2**20, "tokens": tokens}


def measure_resume(folder: Path, size: dict[str, int], _: str) -> dict[str, float]:
    """Measure the first row in the middle of a corpus of 10^9 tokens: one file, linked often."""
    from qwen3_encdec.data.stream import BEGINNING, RowLoader

    Path(folder, "links").mkdir(exist_ok=True)
    for number in range(size["links"]):
        os.link(folder / "corpus.jsonl", folder / f"links/{number}.jsonl")
    data = open_data(folder / "links")
    turn = data.opened[0].num_blocks // 64 // 2
    position = [BEGINNING | {"turn": turn, "document": 3}]
    state = {"rows": 0, "streams": {str(stream): position for stream in range(64)}}
    began = time.process_time()
    next(iter(RowLoader(data, batch_size=1, state=state)))
    return {"seconds": time.process_time() - began, "blocks": data.opened[0].num_blocks}


def measure_opening(folder: Path, size: dict[str, int], _: str) -> dict[str, float]:
    """Measure what a rank needs to open many prepared shards."""
    from qwen3_encdec.data.corpus import INDEX_FILE, open_corpus

    shards = folder / "shards"
    shards.mkdir()
    names = [f"part-{number:06}.parquet" for number in range(size["shards"])]
    for name in names:
        Path(shards, name).touch()
    index = {"tokenizer": "x", "files": {name: [[100] * 16, 10**6] for name in names}}
    Path(shards, INDEX_FILE).write_text(json.dumps(index))
    began = time.process_time()
    corpus = open_corpus([str(shards)])
    corpus.block(corpus.num_blocks // 2)
    return {"seconds": time.process_time() - began, "blocks": corpus.num_blocks}


def measure_length(folder: Path, size: dict[str, int], _: str) -> dict[str, float]:
    """Measure microseconds per token, from text to examples, by length of document."""
    data = open_data(folder / "corpus.jsonl")
    lines = Path(folder, "corpus.jsonl").read_text().splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)[: size["longest"]]
    text *= size["longest"] // len(text) + 1
    found = {}
    length = 2**13
    while length <= size["longest"]:
        documents = [text[i * length : (i + 1) * length] for i in range(2**20 // length or 1)]
        began, tokens = time.process_time(), 0
        for number, document in enumerate(documents):
            ids = data.encode(document)
            data.examples(ids, number, 0, 0)
            tokens += len(ids)
        found[str(length)] = (time.process_time() - began) / tokens * 1e6
        length *= 4
    return found


PARTS: dict[str, Callable[[Path, dict[str, int], str], dict[str, float]]] = {
    "speed": measure_speed,
    "memory": measure_memory,
    "resume": measure_resume,
    "opening": measure_opening,
    "length": measure_length,
}


if __name__ == "__main__":
    main()
