"""Serve OpenAI's /v1/embeddings to many clients: Starlette on uvicorn around `TextEncoder`.

    event loop     reads requests, bounds the queue, forms batches of the texts of all clients
    edge threads   parse, tokenize and write JSON
    model thread   computes one batch after another

Waiting requests take turns, one text each, so that a short query never waits for another client's
thousand passages. Every failure is a JSON response in OpenAI's format.
"""

import asyncio
import base64
import hmac
import logging
import math
import os
import socket
import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import uvicorn
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from qwen3_encdec.embedding.encoder import TextEncoder, Tokens
from qwen3_encdec.folders import InputError

API_KEY = "QWEN3_ENCDEC_API_KEY"
BODY_BYTES = 16 * 2**20
MOST_REQUESTS = 4096
log = logging.getLogger("qwen3_encdec.serve")


class Limits(NamedTuple):
    """Maximum number of queued tokens, and seconds to receive a request and to answer it."""

    queue_tokens: int = 262_144
    read_seconds: float = 10.0
    answer_seconds: float = 60.0


class EmbeddingRequest(BaseModel, strict=True):
    """Body of a request; other OpenAI fields, such as `model`, are ignored."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)]  # OpenAI's limit
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    prompt_name: str | None = None


def parse_request(encoder: TextEncoder, body: bytes) -> tuple[EmbeddingRequest, Tokens]:
    """Parse and tokenize the body of a request; the parsed one comes back without its texts.

    Raises InputError that names the problem.
    """
    try:
        wanted = EmbeddingRequest.model_validate_json(body)
    except ValidationError as error:
        last = error.errors(include_context=False)[-1]
        message = ": ".join([*map(str, last["loc"]), last["msg"]])
        if len(last["loc"]) > 2 and isinstance(last["input"], int | list):
            message = (
                "input must be a text or a list of texts, not token ids, which depend on the "
                "tokenizer (LangChain: check_embedding_ctx_length=False)"
            )
        raise InputError(message) from None
    encoder.check_dimensions(wanted.dimensions)
    texts = [wanted.input] if isinstance(wanted.input, str) else wanted.input
    wanted.input = ""  # long texts of waiting requests would fill the memory
    return wanted, encoder.tokenize(texts, encoder.layout.prompt(wanted.prompt_name))


def write_response(
    encoder: TextEncoder, wanted: EmbeddingRequest, tokens: Tokens, rows: np.ndarray
) -> bytes:
    """Write the JSON answer; `truncated` lists the indices of the texts that were cut."""
    rows = encoder.cut_to(rows, wanted.dimensions).astype("<f4")
    vectors: list[Any] = rows.tolist()
    if wanted.encoding_format == "base64":
        vectors = [base64.b64encode(row).decode() for row in rows]
    used = sum(map(len, tokens.ids))
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)
        ],
        "model": encoder.name,
        "usage": {"prompt_tokens": used, "total_tokens": used},
        "truncated": np.flatnonzero(tokens.cut).tolist(),
    }
    return to_json(answer)  # `json` would hold the GIL, and so the event loop, 8 times as long


class QueuedText(NamedTuple):
    """One text of a request, and its embedding to come."""

    ids: np.ndarray
    row: asyncio.Future


class Batcher:
    """Batch the texts of all requests and compute the batches in one thread."""

    def __init__(self, encoder: TextEncoder, queue_tokens: int, counts: dict[str, float]) -> None:
        self.encoder, self.queue_tokens, self.counts = encoder, queue_tokens, counts
        self._waiting: deque[deque[QueuedText]] = deque()  # the texts of each request
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._computing: asyncio.Task | None = None

    async def embed(self, ids: list[np.ndarray]) -> np.ndarray:
        """Embed a request: [texts, E] float32. Raises HTTPException 429 if too many tokens wait."""
        tokens = sum(map(len, ids))
        waiting = self.counts["queue_tokens"]
        if waiting and waiting + tokens > self.queue_tokens:
            raise HTTPException(429, f"queue full, {waiting:,.0f} tokens", {"Retry-After": "2"})
        self.counts["queue_tokens"] += tokens
        texts = deque(QueuedText(text, asyncio.Future()) for text in ids)
        rows = [text.row for text in texts]
        self._waiting.append(texts)
        if self._computing is None or self._computing.done():
            self._computing = asyncio.create_task(self._compute())
        return np.stack(await asyncio.gather(*rows))

    async def _compute(self) -> None:
        """Compute batch after batch until no text waits."""
        loop = asyncio.get_running_loop()
        while batch := self._take():
            ids = [text.ids for text in batch]
            began = time.perf_counter()
            try:
                rows = await loop.run_in_executor(self._thread, self._forward, ids)
            except Exception as error:
                rows = [error] * len(ids)
            self.counts["model_seconds_total"] += time.perf_counter() - began
            self.counts["tokens_total"] += sum(map(len, ids))
            self.counts["batches_total"] += 1
            for text, row in zip(batch, rows, strict=True):
                if text.row.done():
                    continue
                if isinstance(row, Exception):
                    text.row.set_exception(row)
                else:
                    text.row.set_result(row)

    def _forward(self, ids: list[np.ndarray]) -> Any:
        return self.encoder.forward(ids).cpu().numpy()

    def _take(self) -> list[QueuedText]:
        """Fill a batch with a text of each request in turn; drop those of requests that ended."""
        batch: list[QueuedText] = []
        room = self.encoder.batch_tokens
        while self._waiting and (not batch or len(self._waiting[0][0].ids) <= room):
            request = self._waiting.popleft()
            text = request.popleft()
            if request:
                self._waiting.append(request)
            self.counts["queue_tokens"] -= len(text.ids)
            if not text.row.done():
                batch.append(text)
                room -= len(text.ids)
        return sorted(batch, key=lambda text: -len(text.ids))  # as in offline batches


class Service:
    """The routes and their state; `api_key` is the bearer token that /v1 requires, if any."""

    def __init__(self, encoder: TextEncoder, limits: Limits, api_key: str | None) -> None:
        self.encoder, self.limits, self.api_key = encoder, limits, api_key
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.running = 0
        self.batcher = Batcher(encoder, limits.queue_tokens, self.counts)
        self.edge = ThreadPoolExecutor(2, thread_name_prefix="edge")
        card = {"id": encoder.name, "object": "model", "created": 0, "owned_by": "local"}
        card |= {"max_tokens": encoder.max_tokens, "dimensions": encoder.layout.dimensions}
        fixed = {
            "/health": {"status": "ok"},
            "/v1/models": {"object": "list", "data": [card]},
            f"/v1/models/{encoder.name}": card,
        }
        routes = [Route(path, JSONResponse(body), methods=["GET"]) for path, body in fixed.items()]
        routes.append(Route("/metrics", self.metrics))
        routes.append(Route("/v1/embeddings", self.embeddings, methods=["POST"]))
        guard = Middleware(BaseHTTPMiddleware, dispatch=self.guard)
        handlers: Any = {HTTPException: error_response}
        self.app = Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)

    async def guard(self, request: Request, call_next: Any) -> Response:
        """Check the key, turn every exception into a JSON response, count the request."""
        # `request.url` depends on the Host header.
        began, path = time.perf_counter(), request.scope["path"]
        self.running += 1
        key = self.api_key if path.startswith("/v1") else None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        try:
            if self.running > MOST_REQUESTS:
                raise HTTPException(503, f"{MOST_REQUESTS:,} requests open", {"Retry-After": "2"})
            # Starlette decodes the bytes of a header as Latin-1.
            if key and not hmac.compare_digest(given.encode("latin-1"), key.encode()):
                raise HTTPException(401, "the API key is missing or wrong")
            response = await call_next(request)
        except Exception as error:
            response = await error_response(request, error)
        finally:
            self.running -= 1
        path = path if path == "/v1/embeddings" else "other"
        self.counts[f'requests_total{{path="{path}",status="{response.status_code}"}}'] += 1
        self.counts[f'request_seconds_total{{path="{path}"}}'] += time.perf_counter() - began
        return response

    async def metrics(self, request: Request) -> Response:
        """Return the counters in Prometheus' text format."""
        lines = [f"qwen3_encdec_{name} {value:.15g}\n" for name, value in self.counts.items()]
        return PlainTextResponse("".join(lines))

    async def embeddings(self, request: Request) -> Response:
        """Embed the texts of a request."""
        loop = asyncio.get_running_loop()
        parsed = loop.run_in_executor(
            self.edge, parse_request, self.encoder, await self._read(request)
        )
        wanted, tokens = await parsed
        self.counts["texts_total"] += len(tokens.ids)
        self.counts["texts_cut_total"] += sum(tokens.cut)
        rows = await self._compute(request, tokens.ids)
        answer = loop.run_in_executor(self.edge, write_response, self.encoder, wanted, tokens, rows)
        return Response(await answer, media_type="application/json")

    async def _read(self, request: Request) -> bytes:
        """Read the body; discard what exceeds the limit, so that the client gets an answer."""
        size, body = 0, bytearray()
        async with asyncio.timeout(self.limits.read_seconds):
            async for part in request.stream():
                size += len(part)
                body += part if size <= BODY_BYTES else b""
        if size > BODY_BYTES:
            raise HTTPException(413, f"body of {size:,} bytes exceeds the limit of {BODY_BYTES:,}")
        return bytes(body)

    async def _compute(self, request: Request, ids: list[np.ndarray]) -> np.ndarray:
        """Compute embeddings; drop the work if the client leaves or the time is up."""
        gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())  # a disconnect
        work: asyncio.Future[Any] = asyncio.ensure_future(self.batcher.embed(ids))
        seconds = self.limits.answer_seconds
        try:
            await asyncio.wait([gone, work], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if gone.done():
                raise ClientDisconnect
            raise HTTPException(503, f"timed out after {seconds:g} s", {"Retry-After": "5"})
        finally:
            gone.cancel()
            work.cancel()


async def error_response(request: Request, error: Exception) -> Response:
    """Convert an exception into a JSON response."""
    status, message, headers = 500, f"unexpected {type(error).__name__}; see the server log", None
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), error.headers
    elif isinstance(error, InputError):
        status, message = 400, str(error)
    elif isinstance(error, TimeoutError):
        status, message, headers = 408, "request body timed out", {"Connection": "close"}
    elif isinstance(error, ClientDisconnect):
        status, message = 499, "client disconnected"
    else:
        log.error("unexpected error", exc_info=error)
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": body}, status, headers)


class Server(uvicorn.Server):
    """A bound server: `run()` serves at `url` until a signal or until `should_exit` is set."""

    def __init__(self, config: uvicorn.Config, listening: socket.socket) -> None:
        super().__init__(config)
        self.listening = listening
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped."""
        super().run(sockets or [self.listening])


def open_encoder(model: str | Path, **options: Any) -> TextEncoder:
    """Open an encoder to be served, with `TextEncoder`'s options.

    Loading computes. OpenMP's threads stay with the thread that computed, and beside those of the
    main thread the batches of passages took a third longer on a CPU. This thread ends at once.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(TextEncoder, model, **options).result()


def listen(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """Listen on an address, of which port 0 takes a free one; clients wait until a server runs.

    Raises:
        InputError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from None
    # asyncio sets it only on sockets made with proto=IPPROTO_TCP; accepted ones inherit it.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def make_server(
    encoder: TextEncoder, listening: socket.socket, limits: Limits | None = None
) -> Server:
    """Return a server on a listening socket that does not run yet."""
    bounds = limits or Limits()

    class TimedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        # Close a connection that is open but sends no complete request headers in time.
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(bounds.read_seconds, self.watch, None)

        def watch(self, previous: Any) -> None:
            waits = self.cycle is None or self.cycle.response_complete
            if self.transport.is_closing() or (waits and self.cycle is previous):
                self.transport.close()
            else:
                last = self.cycle if waits else self
                self.loop.call_later(bounds.read_seconds, self.watch, last)

    app = Service(encoder, bounds, os.environ.get(API_KEY)).app
    # Every accepted request gets its answer before a shutdown.
    grace = math.ceil(bounds.read_seconds + bounds.answer_seconds)
    options: Any = {"log_config": None, "timeout_graceful_shutdown": grace}
    return Server(uvicorn.Config(app, http=TimedProtocol, **options), listening)
