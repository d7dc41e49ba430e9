"""Compare the server under 1, 8 and 64 clients with the same model in a plain sentence-transformers loop.

    python bench/serve.py            # about ten minutes on 2 idle cores
    python bench/serve.py --quick    # toy size: tests this script, measures nothing

Texts are short queries (8 tokens) and passages (200). Each client has its own connection and asks
for one text at a time. The other side is what tutorials show: Starlette, one route, `model.encode`.
Both have the same random weights and dtype, each in its own process. Then come 10,000 requests, a
tenth of them malformed, slow, abandoned or too large: every valid one must be answered correctly
with constant memory.
"""

import argparse
import http.client
import json
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import uvicorn
from embed import make_encoder, target
from sentence_transformers import SentenceTransformer
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers.utils import logging

from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.evaluation.suite import provenance
from qwen3_encdec.folders import write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SIZES = {"hidden_size": 384, "intermediate_size": 1152, "head_dim": 64}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 6}
LENGTHS = {"query": 8, "passage": 200}
SERVE = "from qwen3_encdec.cli import main; main()"


def main() -> None:
    """Measure, print the table, then the targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument("--clients", default="1,8,64", help="comma-separated numbers of clients")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        serve_plain(arguments.plain)
        return

    logging.disable_progress_bar()
    layers, requests, faults = (1, 16, 160) if arguments.quick else (6, 400, 10_000)
    clients = [int(number) for number in arguments.clients.split(",")]
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_encoder(Path(scratch), layers=layers, **SIZES)
        encoder = TextEncoder(folder, dtype=torch.float32, device="cpu")
        words = "the quick brown fox jumps over a lazy dog and finds nothing".split()  # noqa: SIM905
        texts = {
            kind: [f"{i} {' '.join(np.resize(words, length - 3))}" for i in range(99)]
            for kind, length in LENGTHS.items()
        }
        alone = {kind: time_alone(encoder, texts[kind]) for kind in texts}
        print(f"{'':30}{'texts/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}")
        options = ["serve", "--model", folder, "--port", "0", "--dtype", "float32"]
        sides = {"ours": ["-c", SERVE, *options], "plain loop": [__file__, "--plain", folder]}
        for side, command in sides.items():
            with running([sys.executable, *command]) as address:
                for number in clients:
                    for kind in texts:
                        name = f"{side}, {number} clients, {kind}"
                        rows[name] = load(address, texts[kind], number, max(requests, 2 * number))
                        figures = "{texts/s:9.1f}{p50:9.1f}{p99:9.1f}{errors:8}"
                        print(f"{name:30}{figures.format(**rows[name])}", flush=True)
        storm(encoder, faults)
    report(rows, alone, clients)
    if arguments.output:
        facts = provenance(layers=layers, requests=requests, threads=torch.get_num_threads())
        write_json(arguments.output, {"rows": rows, "alone": alone, "provenance": facts})


def time_alone(encoder: TextEncoder, texts: list[str]) -> float:
    """Measure the median milliseconds of `encode` for one text, without a server."""
    encoder.encode(texts[:4])
    milliseconds = []
    for text in texts[:50]:
        began = time.perf_counter()
        encoder.encode([text])
        milliseconds.append(1000 * (time.perf_counter() - began))
    return float(np.median(milliseconds))


def serve_plain(folder: Path) -> None:
    """Serve with the loop that tutorials show."""
    model = SentenceTransformer(str(folder), device="cpu")

    async def route(request: Request) -> JSONResponse:
        texts = [(await request.json())["input"]]
        rows = await run_in_threadpool(model.encode, texts, show_progress_bar=False)
        return JSONResponse({"data": [{"index": 0, "embedding": rows[0].tolist()}]})

    app = Starlette(routes=[Route("/v1/embeddings", route, methods=["POST"])])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    print(f"http://127.0.0.1:{port}", flush=True)
    uvicorn.run(app, port=port, log_level="warning")


@contextmanager
def running(command: list) -> Iterator[str]:
    """Run a server in another process; yield its address, the first line that it prints."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(list(map(str, command)), **output) as process:
        address = process.stdout.readline().strip().removeprefix("http://").partition("/")[0]
        host, port = address.split(":")
        while process.poll() is None:  # bound, but perhaps not yet listening
            try:
                socket.create_connection((host, int(port))).close()
                break
            except OSError:
                time.sleep(0.05)
        yield address
        process.terminate()


def load(address: str, texts: list[str], clients: int, requests: int) -> dict:
    """Measure texts per second, latencies in milliseconds and errors with `clients` clients."""
    ready = threading.Barrier(clients + 1)

    def client(number: int) -> list[tuple[float, bool]]:
        connection = http.client.HTTPConnection(address, timeout=120)
        answers = []
        ready.wait()
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
        done = [crowd.submit(client, number) for number in range(clients)]
        ready.wait()
        began = time.perf_counter()
        answers = [answer for each in done for answer in each.result()]
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
    target("memory growth in the last four fifths", f"{grown:.1f} MB", "< 20 MB", grown < 20)
    print(f"storm: {done:,} requests in them, every valid one answered correctly")


def report(rows: dict[str, dict], alone: dict[str, float], clients: list[int]) -> None:
    """Print the targets."""
    errors = sum(row["errors"] for name, row in rows.items() if name.startswith("ours"))
    target("our errors", f"{errors}", "0", errors == 0)
    most = max(clients)
    for kind in alone:
        ours, plain = (rows[f"{side}, {most} clients, {kind}"] for side in ("ours", "plain loop"))
        ratio = ours["texts/s"] / plain["texts/s"]
        target(f"texts/s at {most} clients, {kind}", f"{ratio:.2f} x", ">= 2 x", ratio >= 2)
        if 1 in clients:
            ratio = rows[f"ours, 1 clients, {kind}"]["p50"] / alone[kind]
            target(f"p50 of one client, {kind}", f"{ratio:.2f} x encode", "<= 1.3 x", ratio <= 1.3)


if __name__ == "__main__":
    main()
