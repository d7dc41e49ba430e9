"""Tell from an embedding server's answers whether it runs its model bidirectionally.

With the encoder's folder the answers are compared with every way in which a server can misread it:
causal or not, each pooling, with and without EOS. Without it, one word of a text is replaced, near
its end or near its beginning: causal attention hardly notices a word near the end. That holds for
mean pooling alone, since any function of a text is the last state of some causal model.
"""

import http.client
import itertools
import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from qwen3_encdec.conversion.extract import pool
from qwen3_encdec.embedding.encoder import encoder_folder, read_layout
from qwen3_encdec.embedding.export import cosine, sample_texts
from qwen3_encdec.folders import InputError

Embed = Callable[[list[str]], np.ndarray]
_WORDS = """
river window bread teacher market silver garden yellow engine letter winter bridge
doctor music paper summer stone kitchen island captain forest mirror pocket number
village carpet hammer finger dinner shadow button monkey castle farmer ticket ladder
""".split()  # noqa: SIM905


class Verdict(NamedTuple):
    """`kind` is bidirectional, causal, misread (another pooling, no EOS) or unknown."""

    kind: str
    evidence: str

    def __str__(self) -> str:
        return f"{'cannot tell' if self.kind == 'unknown' else self.kind}: {self.evidence}"


def check_endpoint(url: str, model: str | Path | None = None, name: str | None = None) -> Verdict:
    """Judge whether the OpenAI-compatible server at `url` runs its model bidirectionally.

    Args:
        url: Its root, `/v1` or `/v1/embeddings`.
        model: The encoder folder that it is meant to serve; None judges by its answers alone.
        name: Of the model in requests; None takes the first that the server lists.

    Raises:
        InputError: the server does not answer, or not with embeddings, or with wider ones than the
            encoder's; `model` is no encoder folder.
    """
    url = url.rstrip("/").removesuffix("/embeddings").removesuffix("/v1") + "/v1/"
    try:
        name = name or _request(url + "models")["data"][0]["id"]
    except (InputError, LookupError, TypeError):
        name = "default"  # many servers hold one model and do not read the name

    def embed(texts: list[str]) -> np.ndarray:
        rows: list[dict] = []
        try:
            for start in range(0, len(texts), 32):
                body = {"model": name, "input": texts[start : start + 32]}
                data = _request(url + "embeddings", body | {"encoding_format": "float"})["data"]
                rows += sorted(data, key=lambda row: row["index"])
            found = np.array([row["embedding"] for row in rows], dtype=np.float32)
            if len(found) == len(texts) and np.linalg.norm(found, axis=1).min() > 0:
                return found
        except (LookupError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
        raise InputError(f"{url} does not answer {len(texts)} texts with embeddings")

    if model is None:
        return judge(embed)
    with encoder_folder(model) as folder:
        return compare(embed, folder)


def _request(url: str, body: dict | None = None) -> Any:
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except (http.client.HTTPException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{url} does not answer as an HTTP server does: {reason}") from None


def judge(embed: Embed) -> Verdict:
    """Judge by the answers alone: how far replaced words move the embedding."""
    rng, texts = np.random.default_rng(0), []
    for _ in range(48):
        first, *words, word, other = rng.choice(_WORDS, 26, replace=False)
        # One word stays at either end: the first token of a text is often a special one.
        for replaced in (word, other):
            texts += [" ".join([first, *words[:-2], replaced, words[-1]])]
            texts += [" ".join([first, replaced, *words[1:]])]
    vectors = embed(texts)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = vectors.reshape(48, 2, 2, -1)  # text, replaced by, late or early, E
    late, early = np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=-1).T
    with np.errstate(all="ignore"):  # where nothing moves, no comparison below holds
        logs = np.log((late + 1e-9) / early)
        error = 2 * logs.std() / np.sqrt(len(logs))
        low, high = np.exp([logs.mean() - error, logs.mean() + error])
    evidence = (
        f"a word near the end moves the embedding {low:.2f} to {high:.2f} times as far as one near "
        "the beginning; by mean pooling"
    )
    if high < 0.6:
        return Verdict("causal", evidence)
    if low > 0.7 and high < 1.4:
        return Verdict("bidirectional", evidence)
    return Verdict("unknown", f"{evidence}; name the encoder's folder with --model")


@torch.inference_mode()
def compare(embed: Embed, folder: Path) -> Verdict:
    """Compare with the encoder in `folder`, read correctly and in every known wrong way."""
    tokenizer, layout = AutoTokenizer.from_pretrained(folder), read_layout(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    texts = sample_texts(tokenizer, 12, min(64, layout.max_tokens))
    found = embed(texts)
    width = found.shape[1]  # the server may cut the embeddings
    if width > layout.width:
        raise InputError(
            f"the server answers with {width} dimensions, {folder} has {layout.width}: "
            "it serves another model"
        )
    prompted = [layout.prompt() + text for text in texts]
    ids = [tokenizer(text, truncation=True)["input_ids"] for text in prompted]
    cosines: dict[str, float] = {}
    for attention, ending in itertools.product(("bidirectional", "causal"), ("with", "without")):
        model.config.is_causal = attention == "causal"
        cut = None if ending == "with" else -1
        states = [model(torch.tensor([row[:cut]])).last_hidden_state[..., :width] for row in ids]
        for mode in ("mean", "lasttoken", "cls"):
            rows = [pool(row, torch.ones(row.shape[:2], dtype=torch.long), mode) for row in states]
            reading = f"{attention}, {mode}, {ending} EOS"
            cosines[reading] = float(cosine(torch.cat(rows).numpy(), found).mean())
    best = max(cosines, key=cosines.__getitem__)
    attention = best.partition(",")[0]
    other = max(value for reading, value in cosines.items() if not reading.startswith(attention))
    right = f"bidirectional, {layout.pooling}, with EOS"
    evidence = (
        f"{folder} read as {best!r} gives cosine {cosines[best]:.4f} to the answers, "
        f"read correctly {cosines[right]:.4f}; the other attention {other:.4f}"
    )
    # 8-bit weights leave .999; a chance match closer than this is another model.
    if cosines[best] < 0.98 or 1 - other < 3 * (1 - cosines[best]):
        return Verdict("unknown", evidence)
    return Verdict(attention if attention == "causal" or best == right else "misread", evidence)
