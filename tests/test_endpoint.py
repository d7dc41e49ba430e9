"""`check-endpoint` asks real HTTP servers:

ours and sentence-transformers', of one encoder read rightly and wrongly.
"""

import json
import shutil
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.embedding.export import export_encoder, llama_cpp_server
from qwen3_encdec.embedding.probe import check_endpoint
from qwen3_encdec.folders import InputError, read_json, write_json
from tests.test_serving import running as embedding_server


@contextmanager
def running(server):
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def serve(answer):
    """A server whose POST answers are `answer(path, request)`; it has no list of models."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(answer(self.path, request)).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return running(ThreadingHTTPServer(("127.0.0.1", 0), Handler))


def stock(folder, **options):
    """OpenAI's route around sentence-transformers."""
    model = SentenceTransformer(str(folder), device="cpu", **options)
    return serve(lambda path, request: answer_with(model.encode(request["input"])))


def answer_with(vectors):
    """OpenAI's answer, its rows in another order."""
    rows = enumerate(np.asarray(vectors).tolist())
    return {"data": [{"index": index, "embedding": row} for index, row in rows][::-1]}


CAUSAL = {"config_kwargs": {"is_causal": True}}


def test_our_server_is_bidirectional(encoder_folder, monkeypatch, command):
    monkeypatch.setenv("QWEN3_ENCDEC_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with embedding_server(TextEncoder(encoder_folder)) as url:
        code, out, _ = command("check-endpoint", url, "--model", encoder_folder, "--json")
    assert (code, json.loads(out)["kind"]) == (0, "bidirectional")


@pytest.mark.parametrize(
    ("pooling", "path"), [("mean", ""), ("last", "/v1"), ("cls", "/v1/embeddings")]
)
def test_a_causal_server_is_told_from_a_bidirectional_one(
    init_folder, tmp_path, command, pooling, path
):
    extract_encoder(init_folder, tmp_path / "encoder", pooling=pooling)
    for options, expected in (({}, (0, "bidirectional")), (CAUSAL, (1, "causal"))):
        with stock(tmp_path / "encoder", **options) as url:
            code, out, _ = command("check-endpoint", url + path, "--model", tmp_path / "encoder")
        assert (code, out.partition(":")[0]) == expected


def test_a_tokenizer_that_appends_no_eos(encoder_folder, tmp_path):
    folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    changed = read_json(folder / "tokenizer.json") | {"post_processor": None}
    write_json(folder / "tokenizer.json", changed)
    with stock(folder) as url:
        assert check_endpoint(url, folder).kind == "bidirectional"


def test_a_wrong_pooling_and_another_model_are_not_called_right(
    encoder_folder, tmp_path, init_folder
):
    extract_encoder(init_folder, tmp_path / "last", pooling="last")
    with stock(tmp_path / "last") as url:
        verdict = check_endpoint(url, encoder_folder)
    assert verdict.kind == "misread"
    assert "read as 'bidirectional, lasttoken, with EOS'" in verdict.evidence
    generator = np.random.default_rng(0)
    with serve(
        lambda path, request: answer_with(generator.standard_normal((len(request["input"]), 40)))
    ) as url:
        assert check_endpoint(url, encoder_folder).kind == "unknown"


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:1",
        "ftp://127.0.0.1",
        "http://127.0.0.1:9",
        "http://[::1",
        "http://127.0.0.1:http",
        "http://127.0.0.1:99999",
    ],
)
def test_a_server_that_cannot_be_reached_is_named(encoder_folder, url):
    with pytest.raises(InputError, match="request to .* failed: "):
        check_endpoint(url, encoder_folder)


@pytest.mark.parametrize(
    "answer",
    [
        {"data": []},
        {"error": "no"},
        [],
        {"data": [{"index": 0, "embedding": "text"}]},
        answer_with(np.full((12, 40), np.inf)),
        answer_with(np.full((12, 40), np.nan)),
        answer_with(np.zeros((12, 40))),
        answer_with(np.ones((12, 1, 40))),
    ],
)
def test_what_is_not_an_embedding_is_named(encoder_folder, answer):
    with serve(lambda path, request: answer) as url:
        with pytest.raises(InputError, match="did not return embeddings for 12 texts"):
            check_endpoint(url, encoder_folder)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
        b'HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{"data": [',
    ],
)
def test_a_port_that_is_no_http_and_a_cut_answer_are_named(said, encoder_folder):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            for _ in range(2):  # the list of models, then the texts
                connection, _ = listening.accept()
                connection.recv(65536)
                connection.sendall(said)
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(InputError, match="request to .* failed: "):
            check_endpoint(url, encoder_folder)


def test_another_models_width_is_named_and_a_shorter_one_is_judged(encoder_folder):
    rng = np.random.default_rng(0)
    with serve(lambda path, request: answer_with(rng.random((len(request["input"]), 768)))) as url:
        with pytest.raises(InputError, match="returns 768 dimensions, but .* has 40: it serves"):
            check_endpoint(url, encoder_folder)
    with stock(encoder_folder, truncate_dim=20) as url:
        assert check_endpoint(url, encoder_folder).kind == "bidirectional"


def test_llama_cpps_own_server(encoder_folder, tmp_path):
    """The exported file as it is, and without the key of its header that says it is not causal."""
    pytest.importorskip("xllamacpp")
    export_encoder(encoder_folder, "gguf", tmp_path / "out")
    file = tmp_path / "out" / "model-f32.gguf"
    whole = file.read_bytes()
    key = b"qwen3.attention.causal"
    assert whole.count(key) == 1
    for content, kind in (
        (whole, "bidirectional"),
        (whole.replace(key, b"qwen3.attention.casual"), "causal"),
    ):
        file.write_bytes(content)
        server = llama_cpp_server(file.parent)
        assert check_endpoint(server.listening_address, encoder_folder).kind == kind
