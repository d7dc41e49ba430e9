"""Compare the server under 1, 8 and 64 clients with a plain sentence-transformers loop.

    python bench/serve.py    # about ten minutes on 2 idle cores

Texts are short queries (8 tokens) and passages (200). Each client has its own connection and asks
for one text at a time. The other side is what tutorials show: Starlette, one route, `model.encode`.
Both serve the same random weights in fp32, each in its own process. Then come 10,000 requests, a
tenth of them malformed, slow, abandoned or too large: every valid one must be answered correctly
with constant memory.
"""

import http.client
import json
import logging
import os
import resource
import socket
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import uvicorn
from embed import make_encoder
from measure import command_line, target, write
from sentence_transformers import SentenceTransformer
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers.utils.logging import disable_progress_bar

from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.embedding.serve import listen, make_server, open_encoder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = {"hidden_size": 384, "intermediate_size": 1152, "head_dim": 64}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 6}
TEXTS = {"query": "the quick fox " * 2, "passage": "the quick fox " * 66}


def main() -> None:
    """Measure, print the table, then the targets."""
    arguments = command_line(__doc__).parse_args()
    disable_progress_bar()
    layers, requests, faults = (1, 16, 160) if arguments.quick else (6, 400, 10_000)
    clients = (1, 2) if arguments.quick else (1, 8, 64)
    texts = {kind: [f"{i} {text}" for i in range(99)] for kind, text in TEXTS.items()}
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_encoder(Path(scratch), layers=layers, **SIZES)
        encoder = TextEncoder(folder, dtype=torch.float32, device="cpu")
        alone = {kind: time_alone(encoder, texts[kind][0]) for kind in texts}
        print(f"{'':30}{'texts/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}")
        for side, serve in {"ours": serve_ours, "plain loop": serve_plain}.items():
            with running(serve, folder) as address:
                for number in clients:
                    for kind in texts:
                        name = f"{side}, {number} clients, {kind}"
                        rows[name] = load(address, texts[kind], number, max(requests, 2 * number))
                        figures = "{texts/s:9.1f}{p50:9.1f}{p99:9.1f}{errors:8}"
                        print(f"{name:30}{figures.format(**rows[name])}", flush=True)
        storm(encoder, faults)
    report(rows, alone, max(clients))
    write(arguments.output, rows=rows, alone=alone)


def time_alone(encoder: TextEncoder, text: str) -> float:
    """Measure the median milliseconds of `encode` for one text, without a server."""
    seconds = timeit.repeat(lambda: encoder.encode([text]), number=1, repeat=50)
    return 1000 * float(np.median(seconds))


def serve_ours(folder: Path, port: int) -> None:
    """Serve as `qwen3-encdec serve` does."""
    logging.basicConfig(level=logging.INFO, filename=os.devnull)
    encoder = open_encoder(folder, dtype=torch.float32, device="cpu")
    make_server(encoder, listen(port=port)).run()


def serve_plain(folder: Path, port: int) -> None:
    """Serve with the loop that tutorials show."""
    model = SentenceTransformer(str(folder), device="cpu")

    async def route(request: Request) -> JSONResponse:
        texts = [(await request.json())["input"]]
        rows = await run_in_threadpool(model.encode, texts, show_progress_bar=False)
        return JSONResponse({"data": [{"index": 0, "embedding": rows[0].tolist()}]})

    app = Starlette(routes=[Route("/v1/embeddings", route, methods=["POST"])])
    uvicorn.run(app, port=port, log_level="warning")


@contextmanager
def running(serve: Callable[[Path, int], None], folder: Path) -> Iterator[str]:
    """Run a server in another process; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = get_context("spawn").Process(target=serve, args=(folder, port))
    process.start()
    while process.is_alive():
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:  # not yet listening
            time.sleep(0.05)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.join()


def load(address: str, texts: list[str], clients: int, requests: int) -> dict:
    """Measure texts per second, latencies in milliseconds and errors with `clients` clients."""

    def client(number: int) -> list[tuple[float, bool]]:
        connection = http.client.HTTPConnection(address, timeout=120)
        answers = []
        for i in range(requests // clients):
            body = json.dumps({"input": texts[(number * 7 + i) % len(texts)]})
            began = time.perf_counter()
            try:
                connection.request("POST", "/v1/embeddings", body)
                answer = connection.getresponse()
                failed = answer.read() == b"" or answer.status != 200
            except (OSError, http.client.HTTPException):
                failed = True
                connection.close()
            answers.append((1000 * (time.perf_counter() - began), failed))
        return answers

    with ThreadPoolExecutor(clients) as crowd:
        began = time.perf_counter()
        answers = list(chain.from_iterable(crowd.map(client, range(clients))))
        taken = time.perf_counter() - began
    milliseconds, failed = zip(*answers, strict=True)
    p50, p99 = np.percentile(milliseconds, (50, 99)).tolist()
    return {"texts/s": len(answers) / taken, "p50": p50, "p99": p99, "errors": sum(failed)}


def storm(encoder: TextEncoder, requests: int) -> None:
    """Mix faulty requests with valid ones; raise on a wrong answer."""
    from tests import test_serving

    with test_serving.running(encoder, test_serving.Limits(read_seconds=5.0)) as url:
        test_serving.storm(url, encoder, requests // 5)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = test_serving.storm(url, encoder, requests - requests // 5, seed=1)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    target("memory growth in the last four fifths", grown, "< 20 MB", "{:.1f} MB")
    print(f"storm: {done:,} requests in them, every valid one answered correctly")


def report(rows: dict[str, dict], alone: dict[str, float], most: int) -> None:
    """Print the targets."""
    errors = sum(row["errors"] for name, row in rows.items() if name.startswith("ours"))
    target("our errors", errors, "== 0", "{}")
    for kind in alone:
        ours, plain = (rows[f"{side}, {most} clients, {kind}"] for side in ("ours", "plain loop"))
        ratio = ours["texts/s"] / plain["texts/s"]
        target(f"texts/s at {most} clients, {kind}", ratio, ">= 2 x", "{:.2f} x")
        ratio = rows[f"ours, 1 clients, {kind}"]["p50"] / alone[kind]
        target(f"p50 of one client, {kind}", ratio, "<= 1.3 x", "{:.2f} x encode")


if __name__ == "__main__":
    main()
