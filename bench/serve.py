"""The server under 1, 8 and 64 clients beside the same model in a plain sentence-transformers loop.

    python bench/serve.py            # about ten minutes on 2 cores with nothing beside it
    python bench/serve.py --quick    # toy size: tests this script, measures nothing

Short queries (8 tokens) and passages (200), each client with a connection of its own that asks for
one text at a time, over HTTP. The other side is what tutorials show: Starlette, one `def` route, `model.encode`. Both have the same
random weights and dtype, each in a process of its own. Then 10,000 requests, a tenth of them malformed, slow,
abandoned or too large: every good one must be answered right with memory flat.
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
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 6}
FULL = {"model": {"layers": 6, **SIZES, **HEADS}, "requests": 400, "faults": 10_000}
QUICK = {"model": {"layers": 1, **SIZES, **HEADS}, "requests": 16, "faults": 160}
LENGTHS = {"query": 8, "passage": 200}


def main() -> None:
    """Measure, print the table, then the targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument("--clients", default="1,8,64", help="numbers of clients, by commas")
    parser.add_argument("--requests", type=int, help="per kind and number of clients")
    parser.add_argument("--faults", type=int, help="requests of the storm; 0 is none")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        serve_plain(arguments.plain)
        return

    logging.disable_progress_bar()
    plan = QUICK if arguments.quick else FULL
    requests = arguments.requests or plan["requests"]
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_encoder(Path(scratch), **plan["model"])
        encoder = TextEncoder(folder, dtype=torch.float32, device="cpu")
        texts = {kind: make_texts(encoder, length) for kind, length in LENGTHS.items()}
        alone = {kind: time_alone(encoder, texts[kind]) for kind in texts}
        for kind, seconds in alone.items():
            print(f"encode alone, {kind}: p50 {1000 * seconds:.1f} ms")
        print(f"{'':30}{'texts/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}")
        served = ["serve", "--model", folder, "--port", "0", "--dtype", "float32"]
        start = "from qwen3_encdec.cli import main; main()"
        sides = {
            "ours": [sys.executable, "-c", start, *served],
            "plain loop": [sys.executable, __file__, "--plain", folder],
        }
        for side, command in sides.items():
            with running(command) as url:
                for clients in map(int, arguments.clients.split(",")):
                    for kind in texts:
                        name = f"{side}, {clients} clients, {kind}"
                        rows[name] = load(url, texts[kind], clients, max(requests, 2 * clients))
                        show(name, rows[name])
        faults = plan["faults"] if arguments.faults is None else arguments.faults
        if faults:
            storm(encoder, faults)
    report(rows, alone, arguments.clients.split(","))
    if arguments.output:
        facts = provenance(plan=plan, threads=torch.get_num_threads())
        write_json(arguments.output, {"rows": rows, "alone": alone, "provenance": facts})


def make_texts(encoder, length: int) -> list[str]:
    """Texts of about `length` tokens, all different."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "finds",
        "nothing",
    ]
    texts = [" ".join(words[(i + j) % len(words)] for j in range(length - 3)) for i in range(11)]
    return [f"{i} {text}" for i in range(9) for text in texts]


def time_alone(encoder, texts: list[str]) -> float:
    """Median seconds of `encode` of one text, without a server."""
    encoder.encode(texts[:4])
    seconds = []
    for text in texts[:50]:
        began = time.perf_counter()
        encoder.encode([text])
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]


def serve_plain(folder: Path) -> None:
    """The loop that tutorials show."""
    model = SentenceTransformer(str(folder), device="cpu")

    def answer(body: dict) -> dict:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        rows = model.encode(texts, show_progress_bar=False).tolist()
        return {"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]}

    async def route(request: Request) -> JSONResponse:
        return JSONResponse(await run_in_threadpool(answer, await request.json()))

    app = Starlette(routes=[Route("/v1/embeddings", route, methods=["POST"])])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    print(f"http://127.0.0.1:{port}", flush=True)
    uvicorn.run(app, port=port, log_level="warning")


@contextmanager
def running(command: list) -> Iterator[str]:
    """A server in another process, by its command; its address is the first line that it prints."""
    process = subprocess.Popen(
        map(str, command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    try:
        url = process.stdout.readline().strip().removesuffix("/v1/embeddings")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        host, port = url.removeprefix("http://").split(":")
        while process.poll() is None:  # bound is not yet listening
            try:
                socket.create_connection((host, int(port))).close()
                break
            except OSError:
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def load(url: str, texts: list[str], clients: int, requests: int) -> dict:
    """Texts a second, latencies and errors of so many clients."""
    address = url.removeprefix("http://")
    ready = threading.Barrier(clients + 1)

    def client(number: int) -> tuple[list[float], int]:
        connection = http.client.HTTPConnection(address, timeout=120)
        seconds, errors = [], 0
        ready.wait()
        for i in range(requests // clients):
            body = json.dumps({"input": texts[(number * 7 + i) % len(texts)]}).encode()
            began = time.perf_counter()
            try:
                connection.request(
                    "POST", "/v1/embeddings", body, {"Content-Type": "application/json"}
                )
                answer = connection.getresponse()
                errors += answer.read() == b"" or answer.status != 200
            except (OSError, http.client.HTTPException):
                errors += 1
                connection.close()
            seconds.append(time.perf_counter() - began)
        return seconds, errors

    with ThreadPoolExecutor(clients) as crowd:
        done = [crowd.submit(client, number) for number in range(clients)]
        ready.wait()
        began = time.perf_counter()
        found = [each.result() for each in done]
        taken = time.perf_counter() - began
    seconds = sorted(value for own, _ in found for value in own)
    return {
        "texts/s": len(seconds) / taken,
        "p50": seconds[len(seconds) // 2],
        "p99": seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        "errors": sum(errors for _, errors in found),
    }


def show(name: str, row: dict) -> None:
    """Print one line of the table."""
    milliseconds = f"{1000 * row['p50']:9.1f}{1000 * row['p99']:9.1f}"
    print(f"{name:30}{row['texts/s']:9.1f}{milliseconds}{row['errors']:8}", flush=True)


def storm(encoder, requests: int) -> None:
    """Faults among good requests; wrong answers raise."""
    from tests import test_serving

    with test_serving.running(encoder, test_serving.Limits(read_seconds=5.0)) as url:
        test_serving.storm(url, encoder, requests // 5)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = test_serving.storm(url, encoder, requests - requests // 5, seed=1)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    target("memory grown in the last four fifths", f"{grown:.1f} MB", "< 20 MB", grown < 20)
    print(f"storm: {done + requests // 5 // 16 * 16:,} requests, every good one answered right")


def report(rows: dict[str, dict], alone: dict[str, float], clients: list[str]) -> None:
    """The targets."""
    errors = sum(row["errors"] for name, row in rows.items() if name.startswith("ours"))
    target("errors of ours", f"{errors}", "0", errors == 0)
    most = clients[-1]
    for kind in alone:
        ours, plain = (rows[f"{side}, {most} clients, {kind}"] for side in ("ours", "plain loop"))
        ratio = ours["texts/s"] / plain["texts/s"]
        target(f"texts/s at {most} clients, {kind}", f"{ratio:.2f} x", ">= 2 x", ratio >= 2)
        if "1" in clients:
            ratio = rows[f"ours, 1 clients, {kind}"]["p50"] / alone[kind]
            target(f"p50 of one client, {kind}", f"{ratio:.2f} x encode", "<= 1.3 x", ratio <= 1.3)


if __name__ == "__main__":
    main()
