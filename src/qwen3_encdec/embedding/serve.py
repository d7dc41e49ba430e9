"""Serve OpenAI's /v1/embeddings for a crowd of clients: Starlette on uvicorn around `TextEncoder`.

    event loop   reads and checks requests, bounds the queue, watches for time-outs and clients
                 that leave
    edge threads parse, tokenize and write JSON
    model thread takes one text of each waiting request in turn until a batch is full, computes it

So a short query never waits for somebody's thousand passages, and texts of all clients share
batches. Every failure is a JSON answer of OpenAI's shape.
"""

import asyncio
import binascii
import hmac
import json
import logging
import os
import socket
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from qwen3_encdec.embedding.encoder import TextEncoder, Tokens
from qwen3_encdec.folders import InputError

API_KEY = "QWEN3_ENCDEC_API_KEY"
log = logging.getLogger("qwen3_encdec.serve")


@dataclass(frozen=True)
class Limits:
    """Bounds of the server."""

    texts: int = 2048
    """Texts of one request (OpenAI's own limit)."""
    body_bytes: int = 16 * 2**20
    """Size of one request."""
    queue_tokens: int = 262_144
    """Tokens that may wait for the model; beyond them the answer is 429."""
    read_seconds: float = 10.0
    """For a request to arrive whole."""
    answer_seconds: float = 60.0
    """For its embeddings to be computed."""
    requests: int = 4096
    """Requests at a time; beyond them the answer is 503."""


class Job:
    """The texts of one request on their way through the model."""

    def __init__(self, ids: list[np.ndarray], width: int) -> None:
        self.ids = ids
        self.rows = np.empty((len(ids), width), dtype=np.float32)
        self.result: Future[np.ndarray] = Future()
        self.next = self.done = 0

    def put(self, index: int, row: np.ndarray) -> None:
        """Store one embedding; the last one resolves `result`."""
        self.rows[index] = row
        self.done += 1
        if self.done == len(self.ids) and self.result.set_running_or_notify_cancel():
            self.result.set_result(self.rows)

    def fail(self, error: Exception) -> None:
        """Resolve `result` with an error."""
        if not self.result.done() and self.result.set_running_or_notify_cancel():
            self.result.set_exception(error)


class Batcher:
    """Form batches of the texts of all requests and compute them in one thread."""

    def __init__(self, encoder: TextEncoder, batch_tokens: int, queue_tokens: int) -> None:
        self.encoder, self.batch_tokens, self.queue_tokens = encoder, batch_tokens, queue_tokens
        self.waiting = self.batches = self.tokens = 0
        self.seconds = 0.0
        self._jobs: deque[Job] = deque()
        self._ready = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, ids: list[np.ndarray]) -> "Future[np.ndarray]":
        """Queue the texts of a request; the future holds [texts, E] float32.

        Raises HTTPException 429 if too many tokens wait already.
        """
        tokens = sum(map(len, ids))
        with self._ready:
            if self.waiting and self.waiting + tokens > self.queue_tokens:
                speed = self.tokens / self.seconds if self.seconds else 1000.0
                after = min(60, 1 + int(self.waiting / speed))
                sentence = f"{self.waiting:,} tokens are waiting already; try again in {after} s"
                raise HTTPException(429, sentence, {"Retry-After": str(after)})
            self.waiting += tokens
            job = Job(ids, self.encoder.layout.width)
            self._jobs.append(job)
            self._ready.notify()
        return job.result

    def stop(self) -> None:
        """End the thread after the batch that it computes."""
        with self._ready:
            self._stopping = True
            self._ready.notify()
        self._thread.join()

    def _take(self) -> list[tuple[Job, int]]:
        """One text of each job in turn, as many as a batch holds; empty once stopping."""
        batch: list[tuple[Job, int]] = []
        tokens = 0
        with self._ready:
            self._ready.wait_for(lambda: self._jobs or self._stopping)
            while self._jobs and not self._stopping:
                job = self._jobs.popleft()
                if job.result.done():  # its client left, or a text of it failed
                    self.waiting -= sum(map(len, job.ids[job.next :]))
                    continue
                length = len(job.ids[job.next])
                if batch and tokens + length > self.batch_tokens:
                    self._jobs.appendleft(job)
                    break
                batch.append((job, job.next))
                tokens += length
                job.next += 1
                if job.next < len(job.ids):
                    self._jobs.append(job)
            self.waiting -= tokens
        return batch

    def _run(self) -> None:
        while not self._stopping:
            if batch := self._take():
                self._compute(batch)

    def _compute(self, batch: list[tuple[Job, int]]) -> None:
        # Equal lengths beside each other, as in offline batches.
        batch.sort(key=lambda item: -len(item[0].ids[item[1]]))
        ids = [job.ids[index] for job, index in batch]
        began = time.perf_counter()
        try:
            rows = self.encoder.forward(ids).cpu().numpy()
        except Exception as error:
            log.exception("a batch of %d texts failed", len(batch))
            for job in {job for job, _ in batch}:
                job.fail(error)
            return
        self.seconds += time.perf_counter() - began
        self.tokens += sum(map(len, ids))
        self.batches += 1
        for (job, index), row in zip(batch, rows, strict=True):
            if not job.result.done():
                job.put(index, row)


class Ask(NamedTuple):
    """A request that was understood."""

    tokens: Tokens
    dimensions: int | None
    base64: bool


def read_ask(encoder: TextEncoder, body: bytes, most: int) -> Ask:
    """Parse and tokenize the body of a request. Raises InputError naming what is wrong with it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("the body is not valid JSON") from None
    if not isinstance(request, dict) or "input" not in request:
        raise InputError("the body must be a JSON object with an input")
    texts = [request["input"]] if isinstance(request["input"], str) else request["input"]
    if not isinstance(texts, list) or not texts:
        raise InputError("input must be a text or a list of texts")
    if any(isinstance(text, int | list) for text in texts):
        raise InputError(
            "input holds token ids, which are taken as texts only: another model's ids would embed "
            "wrongly (LangChain: check_embedding_ctx_length=False)"
        )
    if len(texts) > most:
        raise InputError(f"input holds {len(texts):,} texts; at most {most:,} go in one request")
    dimensions = request.get("dimensions")
    if dimensions is not None and type(dimensions) is not int:
        raise InputError(f"dimensions must be an integer, got {dimensions!r}")
    encoder.check_dimensions(dimensions)
    coding = request.get("encoding_format") or "float"
    if coding not in ("float", "base64"):
        raise InputError(f"encoding_format must be float or base64, got {coding!r}")
    name = request.get("prompt_name")
    if not isinstance(name, str | None):
        raise InputError(f"prompt_name must be a text, got {name!r}")
    return Ask(encoder.tokenize(texts, encoder.layout.prompt(name)), dimensions, coding == "base64")


def write_answer(encoder: TextEncoder, ask: Ask, rows: np.ndarray) -> bytes:
    """Write the JSON answer; `truncated` lists the indices of texts that were cut, if any."""
    rows = encoder.cut_to(rows, ask.dimensions).astype("<f4")
    data = []
    for index, row in enumerate(rows):
        packed = binascii.b2a_base64(row.tobytes(), newline=False).decode() if ask.base64 else None
        embedding = row.tolist() if packed is None else packed
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    used = sum(map(len, ask.tokens.ids))
    answer: dict[str, Any] = {"object": "list", "data": data, "model": encoder.name}
    answer["usage"] = {"prompt_tokens": used, "total_tokens": used}
    if any(ask.tokens.cut):
        answer["truncated"] = [index for index, cut in enumerate(ask.tokens.cut) if cut]
    return json.dumps(answer).encode()


class Service:
    """The routes and their state.

    Args:
        encoder: Its model is loaded at once, so that a damaged folder is refused at start.
        limits: Of requests and of the queue.
        api_key: Bearer token that every /v1 request must carry; None asks for none.
    """

    def __init__(self, encoder: TextEncoder, limits: Limits, api_key: str | None) -> None:
        encoder.model  # noqa: B018
        self.encoder, self.limits, self.api_key = encoder, limits, api_key
        self.batcher = Batcher(encoder, encoder.batch_tokens, limits.queue_tokens)
        self.edge = ThreadPoolExecutor(2, thread_name_prefix="edge")
        self.counts: defaultdict[str, float] = defaultdict(int, texts_total=0, texts_cut_total=0)
        self.active = 0

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/embeddings", self.embeddings, methods=["POST"]),
        ]

        @asynccontextmanager
        async def lifespan(app: Starlette):
            yield
            self.batcher.stop()
            self.edge.shutdown(wait=False, cancel_futures=True)

        async def refuse(request: Request, error: Exception) -> Response:
            return _refusal(error)

        return Starlette(
            routes=routes,
            lifespan=lifespan,
            exception_handlers={HTTPException: refuse},
            middleware=[Middleware(_Guarded, service=self)],
        )

    async def health(self, request: Request) -> Response:
        """Answer that the server lives."""
        return _json({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """List the one model."""
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """Describe the one model by its name."""
        name = request.path_params["name"]
        if name != self.encoder.name:
            raise HTTPException(404, f"there is no model {name!r}; this is {self.encoder.name!r}")
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.encoder.name,
            "object": "model",
            "created": 0,
            "owned_by": "local",
            "max_tokens": self.encoder.max_tokens,
            "dimensions": self.encoder.dimensions,
        }

    async def embeddings(self, request: Request) -> Response:
        """Embed the texts of a request."""
        body = await self._read(request)
        loop = asyncio.get_running_loop()
        ask = await loop.run_in_executor(self.edge, read_ask, self.encoder, body, self.limits.texts)
        self.counts["texts_total"] += len(ask.tokens.ids)
        self.counts["texts_cut_total"] += sum(ask.tokens.cut)
        request.state.said = f"{len(ask.tokens.ids)} texts {sum(map(len, ask.tokens.ids))} tokens"
        rows = await self._wait(request, asyncio.wrap_future(self.batcher.submit(ask.tokens.ids)))
        answer = await loop.run_in_executor(self.edge, write_answer, self.encoder, ask, rows)
        return Response(answer, media_type="application/json")

    async def _read(self, request: Request) -> bytes:
        """The body; what goes beyond the limit is read and dropped, so that the client gets its
        answer instead of a reset connection.
        """
        most, size = self.limits.body_bytes, 0
        parts = []
        async with asyncio.timeout(self.limits.read_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
        if size > most:
            raise HTTPException(413, f"a request holds at most {most:,} bytes, got {size:,}")
        return b"".join(parts)

    async def _wait(self, request: Request, result: "asyncio.Future[np.ndarray]") -> np.ndarray:
        """The result, unless the client leaves (the work is dropped) or the time is up."""
        gone = asyncio.ensure_future(request.receive())  # behind the body only a disconnect comes
        try:
            seconds = self.limits.answer_seconds
            first = asyncio.FIRST_COMPLETED
            both: set[asyncio.Future[Any]] = {gone, result}
            await asyncio.wait(both, timeout=seconds, return_when=first)
            if result.done():
                return result.result()
            if gone.done():
                raise ClientDisconnect
            raise HTTPException(503, f"not computed within {seconds:g} s", {"Retry-After": "5"})
        finally:
            gone.cancel()
            result.cancel()

    async def metrics(self, request: Request) -> Response:
        """Counters in Prometheus' text format."""
        counts: dict[str, float] = self.counts | {
            "batches_total": self.batcher.batches,
            "tokens_total": self.batcher.tokens,
            "model_seconds_total": round(self.batcher.seconds, 6),
            "queue_tokens": self.batcher.waiting,
        }
        lines = [f"qwen3_encdec_{name} {value}\n" for name, value in counts.items()]
        return PlainTextResponse("".join(lines))

    def record(self, path: str, status: int, seconds: float) -> None:
        """Count one answer; paths that are not ours go under one name."""
        known = path if path in ("/health", "/metrics", "/v1/embeddings", "/v1/models") else "other"
        self.counts[f'requests_total{{path="{known}",status="{status}"}}'] += 1
        self.counts[f'request_seconds_total{{path="{known}"}}'] += seconds


class _Guarded:
    """Check the key, turn every exception into a JSON answer, count and log each request."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499
        self.service.active += 1

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(Request(scope))
            await self.app(scope, receive, sending)
        except ClientDisconnect:
            pass
        except Exception as error:
            if status == 499:  # nothing was sent yet
                await _refusal(error)(scope, receive, sending)
        finally:
            self.service.active -= 1
        seconds = time.perf_counter() - began
        path = scope["path"]
        self.service.record(path, status, seconds)
        client = (scope.get("client") or ["-"])[0]
        said = scope.get("state", {}).get("said", "")
        milliseconds = f"{1000 * seconds:.1f} ms"
        log.info("%s %s %s %d %s %s", client, scope["method"], path, status, milliseconds, said)

    def _check(self, request: Request) -> None:
        if self.service.active > self.service.limits.requests:
            raise HTTPException(503, "too many requests at a time", {"Retry-After": "1"})
        key = self.service.api_key
        if key is None or not request.url.path.startswith(("/v1", "/embeddings")):
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(
                401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"}
            )


def _refusal(error: Exception) -> Response:
    """The JSON answer to an exception."""
    if isinstance(error, InputError):
        return _error(400, str(error))
    if isinstance(error, HTTPException):
        return _error(error.status_code, str(error.detail), error.headers)
    if isinstance(error, TimeoutError):
        sentence = "the request did not arrive in time"
        return _error(408, sentence, {"Connection": "close"})
    log.error("unexpected error", exc_info=error)
    return _error(500, f"unexpected {type(error).__name__}; the server's log has more")


def _error(status: int, message: str, headers: Any = None) -> Response:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return _json(body, status, headers)


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(json.dumps(value), status, headers, media_type="application/json")


class Server(uvicorn.Server):
    """A bound server: `run()` serves until a signal or until `should_exit` is set."""

    def __init__(self, config: uvicorn.Config, listening: socket.socket) -> None:
        super().__init__(config)
        self.socket = listening

    @property
    def url(self) -> str:
        """Address of the server."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve."""
        super().run(sockets or [self.socket])


def make_server(
    encoder: TextEncoder,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
) -> Server:
    """Bind a server that does not run yet; port 0 takes a free one.

    Raises:
        InputError: the port is taken or out of range, or the encoder is damaged.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port {port} must lie in 0 ... 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
        # asyncio sets it on sockets made with proto=IPPROTO_TCP only; accepted ones inherit it.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    bounds = limits or Limits()

    class Punctual(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """Close a connection whose first request has no whole head in time."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(bounds.read_seconds, self._close_idle)

        def _close_idle(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    service = Service(encoder, bounds, os.environ.get(API_KEY) or None)
    config = uvicorn.Config(
        service.app(),
        http=Punctual,
        lifespan="on",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=int(max(5, bounds.read_seconds)),
        timeout_graceful_shutdown=10,
    )
    return Server(config, listening)
