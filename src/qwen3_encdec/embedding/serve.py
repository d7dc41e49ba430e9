"""An OpenAI-compatible /v1/embeddings around `TextEncoder`, on the standard library's HTTP server.

For one machine and a few clients: requests are computed one after another. What serves many is
named in docs/serving.md; none of it that installs from PyPI on a CPU reads a Qwen3 folder
bidirectionally.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.folders import InputError

_MOST_BYTES = 16 * 2**20


def make_server(
    encoder: TextEncoder, host: str = "127.0.0.1", port: int = 8000
) -> ThreadingHTTPServer:
    """A server that is bound and not yet running;

    port 0 takes a free one. Raises InputError if the port is taken.
    """
    lock = threading.Lock()
    encoder.model  # noqa: B018  (loaded, or refused, before the first request)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/health":
                self._answer(200, {"status": "ok"})
            elif self.path == "/v1/models":
                self._answer(
                    200, {"object": "list", "data": [{"id": encoder.name, "object": "model"}]}
                )
            else:
                self._answer(404, _error(f"no such path {self.path}"))

        def do_POST(self) -> None:
            try:
                size = int(self.headers.get("Content-Length") or -1)
                if not 0 <= size <= _MOST_BYTES:
                    self.close_connection = True  # the body is left unread
                    raise InputError(
                        f"a body needs a Content-Length of at most {_MOST_BYTES:,} bytes"
                    )
                body = self.rfile.read(size)
                if self.path not in ("/v1/embeddings", "/embeddings"):
                    self._answer(404, _error(f"no such path {self.path}"))
                    return
                with lock:
                    answer = answer_request(encoder, body)
                self._answer(200, answer)
            except InputError as error:
                self._answer(400, _error(str(error)))

        def _answer(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}") from None


def answer_request(encoder: TextEncoder, body: bytes) -> dict[str, Any]:
    """The answer to the body of a request. Raises InputError naming what is wrong with it."""
    try:
        request = json.loads(body)
        texts = request["input"]
    except (ValueError, RecursionError):
        raise InputError("the body is not valid JSON") from None
    except (KeyError, TypeError):
        raise InputError("the request has no input") from None
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError("input must be a text or a list of texts; token ids are not taken")
    dimensions, coding = request.get("dimensions"), request.get("encoding_format") or "float"
    if dimensions is not None and type(dimensions) is not int:
        raise InputError(f"dimensions must be an integer, got {dimensions!r}")
    if coding not in ("float", "base64"):
        raise InputError(f"encoding_format must be float or base64, got {coding!r}")
    prompt_name = request.get("prompt_name")
    if not isinstance(prompt_name, str | None):
        raise InputError(f"prompt_name must be a text, got {prompt_name!r}")
    ids = encoder.tokenize(texts, prompt_name)
    embeddings = encoder.embed(ids, dimensions=dimensions).astype("<f4")
    tokens = sum(map(len, ids))
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.tobytes()).decode()
            if coding == "base64"
            else row.tolist(),
        }
        for index, row in enumerate(embeddings)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": encoder.name, "usage": usage}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}
