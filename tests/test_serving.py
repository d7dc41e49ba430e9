"""The embedding server under real sockets: answers, refusals, crowds, and clients that misbehave."""

import base64
import concurrent.futures
import json
import random
import resource
import socket
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from qwen3_encdec.embedding import serve
from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.embedding.serve import Limits, listen, make_server
from qwen3_encdec.folders import InputError

TEXTS = ["", "One.", "A few more words to read.", "naïve text", "word " * 700, "x" * 90]


@pytest.fixture(scope="module")
def encoder(prompted_encoder):
    return TextEncoder(prompted_encoder, dtype=torch.float32, device="cpu")


@contextmanager
def running(encoder, limits=None):
    server = make_server(encoder, listen(port=0), limits)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield server.url
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(encoder):
    with running(encoder, Limits(read_seconds=1.0)) as address:
        yield address


def test_no_thread_that_loaded_the_encoder_keeps_its_openmp_threads(prompted_encoder, monkeypatch):
    """Beside them the model thread's stop spinning, and batches take a third longer on a CPU."""
    threads = []
    monkeypatch.setattr(serve, "TextEncoder", lambda *_: threads.append(threading.current_thread()))
    serve.open_encoder(prompted_encoder)
    assert [thread.is_alive() for thread in threads] == [False]


def post(url, body, path="/v1/embeddings", method="POST", **headers):
    """Status and parsed answer, with the response's headers."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error) | {"headers": error.headers}


def get(url, path):
    with urllib.request.urlopen(url + path) as answer:
        return answer.read().decode()


def metrics(url):
    """The counters by name."""
    lines = [line.rpartition(" ") for line in get(url, "/metrics").splitlines()]
    return {name: float(value) for name, _, value in lines}


def vectors(answer):
    return np.array([row["embedding"] for row in answer["data"]], dtype=np.float32)


def test_answers_are_openais(url, encoder):
    status, answer = post(url, {"model": "any", "input": TEXTS}, "/v1/embeddings?api-version=1")
    assert status == 200
    assert np.allclose(vectors(answer), encoder.encode(TEXTS), atol=1e-6)
    assert [row["index"] for row in answer["data"]] == list(range(len(TEXTS)))
    tokens = encoder.tokenize(TEXTS)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens.ids))
    assert answer["truncated"] == [4]
    body = {"input": "One.", "encoding_format": "base64", "dimensions": 8, "prompt_name": "query"}
    _, packed = post(url, body)
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), dtype="<f4")
    expected = encoder.encode(["One."], dimensions=8, prompt_name="query")[0]
    assert np.allclose(vector, expected, atol=1e-6)
    assert packed["truncated"] == []


def test_models_health_and_metrics(url, encoder):
    assert json.loads(get(url, "/health")) == {"status": "ok"}
    (card,) = json.loads(get(url, "/v1/models?limit=1"))["data"]
    assert (card["id"], card["max_tokens"], card["dimensions"]) == ("mean", 200, 40)
    assert json.loads(get(url, "/v1/models/mean")) == card
    post(url, {"input": TEXTS})
    before = metrics(url)
    post(url, {"input": TEXTS})
    after = metrics(url)
    assert after["qwen3_encdec_texts_total"] - before["qwen3_encdec_texts_total"] == 6
    assert after["qwen3_encdec_queue_tokens"] == 0
    assert after['qwen3_encdec_requests_total{path="/v1/embeddings",status="200"}'] >= 2


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON: recursion limit"),
        ({"texts": []}, "input: Field required"),
        ({"input": []}, "List should have at least 1 item"),
        ({"input": [1, 2]}, "token ids"),
        ({"input": [[1, 2]]}, "token ids"),
        ({"input": ["a", None]}, "1: Input should be a valid string"),
        (b'{"input": ["a", "b\\ud800"]}', "hex escape"),
        ({"input": ["a"] * 2049}, "at most 2048 items"),
        ({"input": "a", "dimensions": "8"}, "dimensions: Input should be a valid integer"),
        ({"input": "a", "dimensions": 999}, "must be between 1 and 40"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format: Input should be 'float' or"),
        ({"input": "a", "prompt_name": "no"}, "'no' is unknown; the model has"),
    ],
)
def test_a_bad_request_is_refused_with_a_sentence(url, body, sentence):
    status, answer = post(url, body)
    assert status == 400
    assert sentence in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert post(url, {"input": "still there"})[0] == 200


def test_every_failure_has_the_same_shape(encoder, url, monkeypatch):
    for method, path, expected in (
        ("GET", "/nowhere", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
    ):
        status, answer = post(url, {}, path, method)
        assert status == expected
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    status, answer = post(url, b" " * (16 * 2**20 + 1))
    assert (status, answer["error"]["code"]) == (413, 413)

    def broken(ids):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(encoder, "forward", broken)
    status, answer = post(url, {"input": ["a", "b"]})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "RuntimeError" in answer["error"]["message"]
    monkeypatch.undo()
    assert post(url, {"input": "a"})[0] == 200


def test_the_key_guards_v1_alone(encoder, monkeypatch):
    monkeypatch.setenv(serve.API_KEY, "schlüssel")
    with running(encoder) as address:
        given = "schlüssel".encode().decode("latin-1")  # curl sends UTF-8
        for key in ("", "Bearer wrong", given):
            status, answer = post(address, {"input": "a"}, Authorization=key, Host="x?")
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
        for scheme in ("Bearer ", "bearer "):
            assert post(address, {"input": "a"}, Authorization=scheme + given)[0] == 200
        assert get(address, "/health")


def test_a_crowd_is_answered_right_and_shares_batches(encoder):
    texts = [f"client {i} asks for {'more ' * (i % 9)}" for i in range(64)]
    expected = encoder.encode(texts)
    with running(encoder) as address, concurrent.futures.ThreadPoolExecutor(64) as crowd:
        ready = threading.Barrier(64)

        def ask(i):
            ready.wait()
            answers = [post(address, {"input": texts[i]}) for _ in range(4)]
            assert [status for status, _ in answers] == [200] * 4
            return vectors(answers[-1][1])[0]

        assert np.allclose(list(crowd.map(ask, range(64))), expected, atol=1e-6)
        assert metrics(address)["qwen3_encdec_batches_total"] < 256


def test_an_accepted_connection_answers_without_delay():
    """Nagle's algorithm against a delayed acknowledgement would cost 40 ms a request."""
    listening = listen(port=0)
    with listening, socket.create_connection(listening.getsockname()), listening.accept()[0] as one:
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_half_sent_requests_are_closed_and_hold_no_thread(url):
    host, port = url.removeprefix("http://").split(":")
    threads = threading.active_count()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n"
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    parts = [head, head + b"Content-Length: 50\r\n\r\n{", b"", head]
    held = []
    for i in range(200):
        held.append(socket.create_connection((host, int(port))))
        if i % 4 == 3:  # the half-sent request is its second
            held[-1].sendall(whole)
            assert b"200 OK" in held[-1].recv(4096)
        held[-1].sendall(parts[i % 4])
    assert post(url, {"input": "between them"})[0] == 200
    assert threading.active_count() <= threads + 3  # the server has three of its own
    answers = []
    for connection in held:
        connection.settimeout(10)
        with connection, connection.makefile("rb") as file:
            answers.append(file.read())  # until the server closes it
    assert all(b"408" in answer.split(b"\r\n")[0] for answer in answers[1::4])
    assert not any(answers[::2])


def test_a_shutdown_waits_for_every_accepted_request(encoder):
    with listen(port=0) as listening:
        server = make_server(encoder, listening, Limits(read_seconds=3.0, answer_seconds=40.0))
    assert server.config.timeout_graceful_shutdown == 43


@contextmanager
def busy(encoder, monkeypatch, body, limits=None):
    """A server whose model computes a first request until `release` is set."""
    entered, release = threading.Event(), threading.Event()
    computed = []
    whole = encoder.forward

    def slow(ids):
        entered.set()
        release.wait(20)
        computed.extend(ids)
        return whole(ids)

    monkeypatch.setattr(encoder, "forward", slow)
    with running(encoder, limits) as address, concurrent.futures.ThreadPoolExecutor(8) as crowd:
        first = crowd.submit(post, address, body)
        assert entered.wait(30)
        yield address, crowd, first, release, computed


def test_a_full_queue_says_when_to_come_again(encoder, monkeypatch):
    limits = Limits(queue_tokens=40, answer_seconds=30)
    with busy(encoder, monkeypatch, {"input": "first"}, limits) as (url, crowd, first, release, _):
        second = crowd.submit(post, url, {"input": "waits " * 8})
        time.sleep(0.3)
        status, answer = post(url, {"input": "w " * 30})
        assert status == 429
        assert int(answer["headers"]["Retry-After"]) >= 1
        release.set()
        assert first.result()[0] == second.result()[0] == 200


def test_a_waiting_request_holds_its_tokens_and_not_its_text(encoder, monkeypatch):
    body = json.dumps({"input": "x " * 2**19}).encode()
    tracemalloc.start()
    with busy(encoder, monkeypatch, body) as (*_, first, release, _):
        time.sleep(0.3)  # the thread that parsed lets go of it
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        release.set()
        assert first.result()[0] == 200
    assert held < 0.5 * len(body)


def test_what_takes_too_long_ends_and_is_not_computed(encoder, monkeypatch):
    limits = Limits(answer_seconds=0.3)
    with busy(encoder, monkeypatch, {"input": "first"}, limits) as (
        url,
        crowd,
        first,
        release,
        done,
    ):
        others = list(crowd.map(lambda i: post(url, {"input": f"{i}"}), range(3)))
        assert [status for status, _ in (first.result(), *others)] == [503] * 4
        release.set()
        monkeypatch.undo()
        assert post(url, {"input": "after"})[0] == 200
    assert len(done) == 1  # what waited behind the first batch was dropped


def test_more_requests_than_the_limit_are_refused_as_json(encoder, monkeypatch):
    monkeypatch.setattr(serve, "MOST_REQUESTS", 1)
    with busy(encoder, monkeypatch, {"input": "one"}) as (url, _, first, release, _):
        status, answer = post(url, {"input": "one too many"})
        assert (status, answer["error"]["code"]) == (503, 503)
        release.set()
        assert first.result()[0] == 200
        assert post(url, {"input": "after"})[0] == 200


def test_a_long_request_does_not_hold_up_a_short_one(encoder):
    with running(encoder) as address, concurrent.futures.ThreadPoolExecutor(1) as other:
        long = other.submit(post, address, {"input": ["word " * 199] * 300})
        time.sleep(0.2)
        assert post(address, {"input": "short"})[0] == 200
        assert not long.done()
        assert long.result()[0] == 200


def storm(address, encoder, requests, seed=0, clients=16):
    """Send requests of which a tenth is malformed, slow, abandoned or too large; check the rest."""
    texts = [f"text {i} {'of some words ' * (i % 7)}" for i in range(50)]
    expected = encoder.encode(texts)
    host, port = address.removeprefix("http://").split(":")

    def misbehave(rng):
        kind = rng.choice(["malformed", "slow", "abandoned", "large"])
        with socket.create_connection((host, int(port))) as raw:
            raw.settimeout(30)
            head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n"
            if kind == "malformed":
                raw.sendall(
                    rng.choice([b"\x00\x01garbage\r\n\r\n", head.format(3).encode() + b"{{{"])
                )
                return b" 400 " in raw.recv(4096)
            if kind == "slow":
                raw.sendall(head.format(20).encode() + b'{"in')
                time.sleep(0.02)
                raw.sendall(b'put": "abcdefg"}')
                return b" 200 " in raw.recv(100)
            if kind == "abandoned":
                body = json.dumps({"input": texts[:20]}).encode()
                raw.sendall(head.format(len(body)).encode() + body)
                return True
        return post(address, {"input": ["x"] * 3000})[0] == 400

    def client(number):
        rng = random.Random(seed * 1000 + number)
        for _ in range(requests // clients):
            if rng.random() < 0.1:
                assert misbehave(rng)
                continue
            chosen = rng.sample(range(50), rng.randint(1, 4))
            status, answer = post(address, {"input": [texts[i] for i in chosen]})
            assert status == 200, answer
            assert np.allclose(vectors(answer), expected[chosen], atol=1e-5)
        return requests // clients

    with concurrent.futures.ThreadPoolExecutor(clients) as crowd:
        return sum(crowd.map(client, range(clients)))


def test_faults_do_not_reach_good_clients(encoder):
    with running(encoder, Limits(read_seconds=5.0)) as address:
        assert storm(address, encoder, 160) == 160
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert storm(address, encoder, 640, seed=1) == 640
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 20_000  # kB
        assert 'status="500"' not in get(address, "/metrics")


def test_a_port_out_of_range_is_named():
    with pytest.raises(InputError, match=r"cannot listen on 127\.0\.0\.1:70000: "):
        listen(port=70000)


def test_a_taken_port_is_named_before_the_model_is_loaded(url, command):
    port = url.rpartition(":")[2]
    code, _, message = command("serve", "--model", "nothing-here", "--port", port)
    assert code == 2
    assert message.startswith(f"error: cannot listen on 127.0.0.1:{port}: ")
