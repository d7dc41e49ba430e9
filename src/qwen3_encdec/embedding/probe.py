"""Tell from an embedding server's answers whether it runs its model bidirectionally.

With the encoder's folder at hand the question is exact: the answers are compared with every way in
which a server can misread the folder, causal or not, each pooling, with and without the EOS that
its tokenizer appends.

Without it there is only the server. Replace one word of a text, near its end or near its beginning,
and see how far the embedding moves. With bidirectional attention both places matter alike; with
causal attention a word near the end changes hardly any state but its own. That holds for mean
pooling alone: any function of a text is the last state of some causal model, so a server that
answers with the last token's state cannot be judged from its answers.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from qwen3_encdec.conversion.extract import pool
from qwen3_encdec.embedding.encoder import (
    encoder_folder,
    load_encoder,
    read_layout,
    states_under,
)
from qwen3_encdec.embedding.export import sample_texts
from qwen3_encdec.folders import InputError

Embed = Callable[[list[str]], np.ndarray]

_WORDS = """
river window bread teacher market silver garden yellow engine letter winter bridge
doctor music paper summer stone kitchen island captain forest mirror pocket number
village carpet hammer finger dinner shadow button monkey castle farmer ticket ladder
butter camera planet rabbit desert pencil cotton valley needle orange copper circle
""".split()  # noqa: SIM905
_TEXTS, _LENGTH, _AT_ONCE = 48, 24, 32


@dataclass(frozen=True)
class Verdict:
    """A judgement of the answers.

    `kind` is `"bidirectional"`, `"causal"`, `"misread"` (bidirectional, but not as the folder says)
    or `"unknown"`.
    """

    kind: str
    evidence: str

    def __str__(self) -> str:
        return f"{'cannot tell' if self.kind == 'unknown' else self.kind}: {self.evidence}"


def check_endpoint(url: str, model: str | Path | None = None, name: str | None = None) -> Verdict:
    """Judge whether the embedding server at `url` runs its model bidirectionally.

    Args:
        url: Of an OpenAI-compatible server (its root, `/v1` or `/v1/embeddings`), or of Text
            Embeddings Inference's `/embed`.
        model: The encoder folder that it is meant to serve; None judges by its answers alone.
        name: Of the model in requests; None takes the first that the server lists.

    Raises:
        InputError: the server does not answer, or not with embeddings; `model` is no encoder
            folder.
    """
    embed = connect(url, name)
    if model is None:
        return judge(embed)
    with encoder_folder(model) as folder:
        return compare(embed, folder)


def connect(url: str, name: str | None = None) -> Embed:
    """A function of texts to the server's vectors, [N, d] float32.

    Raises InputError as `check_endpoint`.
    """
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url} is not an http address")
    if not url.endswith(("/embed", "/embeddings")):
        url += "/embeddings" if url.endswith("/v1") else "/v1/embeddings"
    if url.endswith("/embeddings") and name is None:
        try:
            name = _request(url.removesuffix("embeddings") + "models")["data"][0]["id"]
        except (InputError, LookupError, TypeError):
            name = "default"  # many servers hold one model and do not read the name

    def vectors(texts: list[str]) -> list[list[float]]:
        if url.endswith("/embed"):
            return _request(url, {"inputs": texts, "truncate": True})
        answer = _request(url, {"model": name, "input": texts, "encoding_format": "float"})["data"]
        return [row["embedding"] for row in sorted(answer, key=lambda row: row["index"])]

    def embed(texts: list[str]) -> np.ndarray:
        rows: list[list[float]] = []
        try:
            for start in range(0, len(texts), _AT_ONCE):
                rows += vectors(texts[start : start + _AT_ONCE])
            found = np.array(rows, dtype=np.float32)
        except InputError:
            raise
        except (LookupError, TypeError, ValueError):
            raise InputError(f"{url} does not answer with embeddings") from None
        whole = found.ndim == 2 and len(found) == len(texts)
        if not whole or not np.isfinite(found).all() or not found.any(axis=1).all():
            shape = f"an array of shape {found.shape} or empty vectors"
            raise InputError(f"{url} answers {len(texts)} texts with {shape}")
        return found

    return embed


def _request(url: str, body: dict | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        reason = error.read(200).decode(errors="replace").strip()
        raise InputError(f"{url} answers {error.code}: {reason}") from None
    except (http.client.HTTPException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise InputError(f"{url} does not answer as an HTTP server does: {reason}") from None


def judge(embed: Embed, seed: int = 0) -> Verdict:
    """Judge by the answers alone: how far a replaced word moves the embedding, near the end against
    near the beginning.
    """
    rng = np.random.default_rng(seed)
    late, early = [], []
    for _ in range(_TEXTS):
        words = list(rng.choice(_WORDS, _LENGTH + 2, replace=False))
        for word in words[:2]:
            # One word stays at either end: the first token of a text is often a special one.
            late.append(" ".join([*words[2:-1], word, words[-1]]))
            early.append(" ".join([words[2], word, *words[3:]]))
    vectors = embed(late + early)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    moved = np.linalg.norm(vectors[0::2] - vectors[1::2], axis=1).reshape(2, _TEXTS)
    if not moved.all():
        where = "beginning" if moved[0].all() else "end"
        return Verdict(
            "unknown" if where == "beginning" else "causal",
            f"words near the {where} change nothing",
        )
    logs = np.log(moved[0] / moved[1])
    ratio, error = float(np.exp(logs.mean())), 2 * float(logs.std() / np.sqrt(_TEXTS))
    low, high = np.exp(logs.mean() - error), np.exp(logs.mean() + error)
    evidence = (
        f"a word near the end moves the embedding {ratio:.2f} times as far as one near the "
        f"beginning ({low:.2f} to {high:.2f}); by mean pooling"
    )
    if logs.mean() + error < np.log(0.6):
        return Verdict("causal", evidence)
    if np.log(0.7) < logs.mean() - error and logs.mean() + error < np.log(1.4):
        return Verdict("bidirectional", evidence)
    return Verdict("unknown", f"{evidence}; name the encoder's folder with --model")


@torch.inference_mode()
def compare(embed: Embed, folder: Path) -> Verdict:
    """Compare with our own encoder's weights in `folder`, read correctly and in every known wrong
    way.

    Raises:
        InputError: the answers are wider than the encoder, so they are another model's.
    """
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), load_encoder(folder)
    layout = read_layout(folder)
    prompt = layout.prompt()
    texts = sample_texts(tokenizer, 12, min(64, layout.max_tokens))
    found = torch.from_numpy(embed(texts))
    width = found.shape[1]  # the server may cut the embeddings
    if width > layout.width:
        raise InputError(
            f"the server answers with {width} dimensions, {folder} has {layout.width}: "
            "it serves another model"
        )
    right = f"bidirectional, {layout.pooling}, with EOS"
    readings: dict[str, list[torch.Tensor]] = {}
    for text in texts:
        whole = tokenizer(prompt + text, truncation=True, return_tensors="pt")["input_ids"]
        for ending, ids in (("with EOS", whole), ("without EOS", whole[:, :-1])):
            for attention in ("bidirectional", "causal"):
                states = states_under(encoder, ids, causal=attention == "causal")[..., :width]
                for mode in ("mean", "lasttoken", "cls"):
                    row = pool(states, torch.ones_like(ids), mode)
                    readings.setdefault(f"{attention}, {mode}, {ending}", []).append(row)
    cosines = {
        reading: float(torch.cosine_similarity(torch.cat(rows), found).mean())
        for reading, rows in readings.items()
    }
    best = max(cosines, key=cosines.__getitem__)
    attention = best.partition(",")[0]
    other = max(value for reading, value in cosines.items() if not reading.startswith(attention))
    evidence = (
        f"{folder} read as {best!r} gives cosine {cosines[best]:.4f} to the answers; "
        f"the other attention {other:.4f}"
    )
    if best != right:
        evidence += f"; read correctly {cosines[right]:.4f}"
    # 8-bit weights leave .999; a chance match closer than this is another model.
    if cosines[best] < 0.98 or 1 - other < 3 * (1 - cosines[best]):
        return Verdict("unknown", evidence)
    return Verdict(attention if attention == "causal" or best == right else "misread", evidence)
