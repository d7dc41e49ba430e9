"""Speed, packing, resumption and memory of the data engine, side by side with its peers on the same
text.

    python bench/data.py --t5 .venv-t5/bin/python

Peers: the same pipeline on `tokenizers`, and T5's own span corruption (packages t5 and
tensorflow-cpu), which runs under an interpreter of its own that `--t5` names. Everything is
measured in processes of its own, one thread each, the sides in turn, and the median of the runs
counts. The last lines say for each target whether it is met.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LENGTHS = (256, 1024, 2048, 4096, 16_384)
SHORTENED = {"epochs": 1, "memory": [10**5, 10**6, 10**7], "documents": 20_000}
WHOLE = {"epochs": 1, "memory": [10**5, 10**6, 10**7, 10**8], "documents": 10**9}


def main() -> None:
    """Run all sides, print figures, then targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--t5",
        metavar="PYTHON",
        help="interpreter that has t5 and tensorflow-cpu; left out without",
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of each side")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the text and of the memory run"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)  # a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = SHORTENED if arguments.quick else WHOLE
    if arguments.side:
        name, _, option = arguments.side.partition(":")
        print(json.dumps(SIDES[name](arguments.folder, size, option)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = write_corpus(folder / "corpus.jsonl", size["documents"])
        written = (folder / "corpus.jsonl").stat().st_size
        print(f"text: {documents:,} docstrings of the installed packages, {written:,} bytes")

        def side(what: str, python: str = sys.executable) -> dict:
            command = [
                python,
                __file__,
                "--side",
                what,
                "--folder",
                folder,
                *(["--quick"] if arguments.quick else []),
            ]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
            return json.loads(done.stdout.splitlines()[-1])

        libraries = ("gigatoken", "tiktoken", "tokenizers")
        runs = [
            {library: side(f"pipeline:{library}") for library in libraries}
            for _ in range(arguments.runs)
        ]
        speed = {
            library: statistics.median(run[library]["tokens_per_second"] for run in runs)
            for library in libraries
        }
        print("text to packed batches at 1024/512 through one worker, tokens of text per second:")
        for library in libraries:
            each = ", ".join(f"{run[library]['tokens_per_second'] / 1e6:.2f}" for run in runs)
            print(f"  {library:10} {speed[library] / 1e6:6.2f} M   ({each})")

        kinds = {"ours": sys.executable, "ours, R1": sys.executable} | (
            {"t5": arguments.t5} if arguments.t5 else {}
        )
        runs = [
            {kind: side(f"corruption:{kind}", python) for kind, python in kinds.items()}
            for _ in range(arguments.runs)
        ]
        corruption = {
            kind: {
                length: statistics.median(run[kind][str(length)] for run in runs)
                for length in LENGTHS
            }
            for kind in kinds
        }
        print(
            "corruption alone, tokens per second and core, by length of text (ours: R1, R2, X1, X2; R1 is t5's own):"
        )
        for kind, of_lengths in corruption.items():
            print(
                f"  {kind:10}"
                + "".join(f"{length:>8}: {v / 1e6:6.2f} M" for length, v in of_lengths.items())
            )
        if not arguments.t5:
            print("  t5         not run: no --t5 interpreter")

        resume = side("resume")
        print(
            f"resuming at {resume['position']:,} tokens of {resume['shards']:,} shards: first row after "
            f"{resume['seconds']:.3f} s, dealt out from 8 readers to 3 {resume['dealt_seconds']:.3f} s; "
            f"opening the stream {resume['opening_seconds']:.2f} s"
        )
        memory = side("memory")
        print(
            "resident memory: "
            + ", ".join(f"{m / 2**20:.0f} MiB at {int(n):,} tokens" for n, m in memory.items())
        )
        packing = side("packing")
        print(
            f"packing package-docs at 1024/512, {packing['rows']:,} rows of {packing['examples']:,} examples: "
            f"{packing['source']:.2%} of the source, {packing['target']:.2%} of the target and "
            f"{(2 * packing['source'] + packing['target']) / 3:.2%} of both budgets filled, as the mixture fixes their "
            f"ratio; the fuller budget of a row is filled {packing['fuller']:.2%} on average; "
            f"no packing could do with fewer than {packing['bound']:.2%} of these rows"
        )

    ours = corruption["ours"]
    flat = max(ours.values()) / min(ours.values())
    grown = list(memory.values())[-1] / next(iter(memory.values()))
    ratio = speed["gigatoken"] / speed["tokenizers"]
    target(
        "pipeline",
        f"{speed['gigatoken'] / 1e6:.2f} M tokens/s",
        ">= 2.4 M",
        speed["gigatoken"] >= 2.4e6,
    )
    target("pipeline over tokenizers", f"{ratio:.1f} x", ">= 4 x", ratio >= 4)
    target(
        "corruption at 2048", f"{ours[2048] / 1e6:.1f} M tokens/s", ">= 25 M", ours[2048] >= 25e6
    )
    target(
        "corruption flat from 256 to 16,384",
        f"{flat:.2f} x",
        "<= 1.5 x between lengths",
        flat <= 1.5,
    )
    if arguments.t5:
        over = corruption["ours, R1"][2048] / corruption["t5"][2048]
        target("corruption of R1 over t5 at 2048", f"{over:.0f} x", "> 1 x", over > 1)
    target("resume at 10^9 tokens", f"{resume['seconds']:.3f} s", "<= 1 s", resume["seconds"] <= 1)
    target("memory from 10^5 tokens on", f"{grown:.2f} x", "<= 1.1 x", grown <= 1.1)
    target(
        "packing, the fuller budget of a row",
        f"{packing['fuller']:.2%}",
        ">= 98 %",
        packing["fuller"] >= 0.98,
    )
    target(
        "packing, unavoidable rows", f"{packing['bound']:.2%}", ">= 98 %", packing["bound"] >= 0.98
    )


def target(name: str, figure: str, wanted: str, met: bool) -> None:
    """One line that says whether a figure is as wanted."""
    print(f"target {name}: {figure} (wanted {wanted}) {'met' if met else 'missed'}")


def write_corpus(file: Path, most: int) -> int:
    """Docstrings in an order that mixes packages, as JSON lines."""
    import numpy as np

    from qwen3_encdec.data.package_docs import package_docs

    documents = package_docs("train")
    order = np.random.default_rng(0).permutation(len(documents))[:most]
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": documents[i].text}) + "\n" for i in order)
    return len(order)


def open_stream(folder: Path, epochs: int | None = 1, inputs: list[str] | None = None):
    """A stream at 1024/512 with Qwen3's whole vocabulary."""
    from qwen3_encdec.data.config import DataConfig
    from qwen3_encdec.data.stream import UL2Stream
    from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

    config = DataConfig(
        inputs=inputs or [str(folder / "corpus.jsonl")], source_length=1024, target_length=512
    )
    return UL2Stream(config, build_tokenizer(), epochs=epochs)


def pipeline(folder: Path, size: dict, library: str) -> dict:
    """One epoch through a worker process, with one library to encode."""
    from functools import partial

    from torchdata.stateful_dataloader import StatefulDataLoader

    from qwen3_encdec.data.collate import collate
    from qwen3_encdec.data.stream import reader_states

    if library == "tokenizers":
        sys.modules["tiktoken"] = None  # type: ignore[assignment]
    if library != "gigatoken":
        sys.modules["gigatoken"] = None  # type: ignore[assignment]
    stream = open_stream(folder)
    assert stream.encode.name == library, stream.encode.fallback_reason
    loader = StatefulDataLoader(
        stream, batch_size=16, num_workers=1, collate_fn=partial(collate, pad_id=151_643)
    )
    began = time.perf_counter()
    for _ in loader:
        pass
    seconds = time.perf_counter() - began
    (state,) = reader_states(loader.state_dict())
    return {"tokens_per_second": state["sources"][0]["counts"]["tokens"] / seconds}


def corruption(folder: Path, size: dict, side: str) -> dict:
    """A quarter of a million tokens at a time, in texts of each length."""
    return corruption_of_t5() if side == "t5" else corruption_of_ours(side)


def corruption_of_ours(side: str) -> dict:
    """The four span denoisers of the default mixture, or R1 alone, which has the most spans."""
    import numpy as np

    from qwen3_encdec.data.ul2 import PRESETS, corrupt_batch, draw_denoisers, example_keys

    preset = PRESETS["t5gemma2"][: 1 if side.endswith("R1") else 4]
    ids = {"sentinel_ids": range(200_000, 202_000), "eos_id": 151_645}
    figures = {}
    for length in LENGTHS:
        texts = 2**18 // length
        tokens = np.random.default_rng(0).integers(0, 150_000, texts * length).astype(np.int32)
        best = float("inf")
        for repetition in range(30):
            began = time.perf_counter()
            keys = example_keys(0, repetition, np.arange(texts), 0)
            denoisers = draw_denoisers(preset, keys)
            corrupt_batch(tokens, np.full(texts, length), denoisers, preset, keys, **ids)
            best = min(best, time.perf_counter() - began)
        figures[length] = len(tokens) / best
    return figures


def corruption_of_t5() -> dict:
    """`denoise` of T5's preprocessors as tf.data runs it, with one thread;

    its own density and mean span.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import functools

    import numpy as np
    import seqio
    import tensorflow as tf
    from t5.data import preprocessors

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    features = {
        name: seqio.Feature(seqio.PassThroughVocabulary(size=152_036), add_eos=True)
        for name in ("inputs", "targets")
    }
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.autotune.enabled = False
    figures = {}
    for length in LENGTHS:
        texts = 2**18 // length
        tokens = np.random.default_rng(0).integers(0, 150_000, (texts, length)).astype(np.int32)
        seqio.map_seed_manager(0)
        data = tf.data.Dataset.from_tensor_slices({"targets": tokens})
        with seqio.map_seed_manager(0):
            data = preprocessors.denoise(
                data,
                features,
                noise_density=0.15,
                noise_mask_fn=functools.partial(
                    preprocessors.random_spans_noise_mask, mean_noise_span_length=3.0
                ),
                inputs_fn=preprocessors.noise_span_to_unique_sentinel,
                targets_fn=preprocessors.nonnoise_span_to_unique_sentinel,
            ).with_options(options)
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            for _ in data.as_numpy_iterator():
                pass
            best = min(best, time.perf_counter() - began)
        figures[length] = tokens.size / best
    return figures


def resume(folder: Path, size: dict, option: str) -> dict:
    """From a place a thousand million tokens in, in a list of shards that repeats the corpus as
    often as it takes.
    """
    import dataclasses

    from qwen3_encdec.data.stream import redeal

    began = time.perf_counter()
    stream = open_stream(folder, epochs=None)
    opening = time.perf_counter() - began
    (real,) = stream.sources
    per_shard = sum(len(stream.encode(document.text)) for document in next(real[0].blocks()))
    shards = 2 * 10**9 // per_shard
    stream.sources = [
        [dataclasses.replace(real[i % len(real)], first=i << 30) for i in range(shards)]
    ]
    state = stream.state_at_epoch(0)
    state["sources"][0]["place"] = [0, shards // 2, 0, 100]
    began = time.perf_counter()
    stream.load_state_dict(json.loads(json.dumps(state)))
    next(iter(stream))
    seconds = time.perf_counter() - began

    states = [json.loads(json.dumps(state)) for _ in range(8)]
    for reader, saved in enumerate(states):
        saved["reader"] = [reader, 8]
        saved["sources"][0]["place"][1] += 3 * reader
    stream.rank, stream.world_size = 2, 3
    began = time.perf_counter()
    stream.load_state_dict(redeal(states))
    next(iter(stream))
    dealt = time.perf_counter() - began
    position = shards // 2 * per_shard
    return {
        "position": position, "shards": shards, "seconds": seconds, "dealt_seconds": dealt, "opening_seconds": opening,
    }  # fmt: skip


def memory(folder: Path, size: dict, option: str) -> dict:
    """Resident memory after so many tokens of text."""
    import psutil

    stream, process = open_stream(folder, epochs=None), psutil.Process()
    figures, rows = {}, iter(stream)
    for wanted in size["memory"]:
        while stream.counts["tokens"] < wanted:
            for _ in range(100):
                next(rows)
        figures[wanted] = process.memory_info().rss
    return figures


def packing(folder: Path, size: dict, option: str) -> dict:
    """How full the rows of one epoch of package-docs are, block by block as they are packed."""
    import numpy as np

    from qwen3_encdec.data.collate import fewest_rows

    stream = open_stream(folder, inputs=["package-docs"])
    sizes = []
    bound, rows, make = 0.0, 0, stream._rows

    def measured(*arguments):
        nonlocal bound, rows
        made = make(*arguments)
        bound += np.ceil(fewest_rows([example for row in made for example in row], 1024, 512))
        rows += len(made)
        return made

    stream._rows = measured
    for row in stream:
        sizes.append((sum(len(e.source) for e in row), sum(len(e.target) for e in row), len(row)))
    source, target_, examples = np.array(sizes).T
    filled = np.array([source / 1024, target_ / 512])
    return {
        "rows": rows, "examples": int(examples.sum()), "source": filled[0].mean(), "target": filled[1].mean(),
        "fuller": filled.max(axis=0).mean(), "bound": bound / rows,
    }  # fmt: skip


SIDES = {
    "pipeline": pipeline,
    "corruption": corruption,
    "resume": resume,
    "memory": memory,
    "packing": packing,
}

if __name__ == "__main__":
    main()
