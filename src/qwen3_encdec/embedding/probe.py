"""Check from an embedding server's answers whether it runs an encoder bidirectionally.

The answers are compared with each way in which a server can read the encoder's folder: causal or
not, each pooling, with and without EOS.
"""

import itertools
import json
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from qwen3_encdec.conversion.extract import pool
from qwen3_encdec.embedding.encoder import encoder_folder, read_layout
from qwen3_encdec.embedding.export import Embed, cosine, sample_texts
from qwen3_encdec.folders import InputError, input_errors


@dataclass(frozen=True)
class Verdict:
    """`kind` is bidirectional, causal, misread (another pooling, no EOS) or unknown."""

    kind: str
    evidence: str

    def __str__(self) -> str:
        return f"{'cannot tell' if self.kind == 'unknown' else self.kind}: {self.evidence}"


def check_endpoint(url: str, model: str | Path, name: str | None = None) -> Verdict:
    """Check whether the OpenAI-compatible server at `url` runs its model bidirectionally.

    Args:
        url: The server's root, `/v1` or `/v1/embeddings`.
        model: The encoder folder that it is meant to serve.
        name: Model name in requests; None takes the first that the server lists.

    Raises:
        InputError: the server does not answer, does not return embeddings, or returns wider ones
            than the encoder's; or `model` is not an encoder folder.
    """
    url = url.rstrip("/").removesuffix("/embeddings").removesuffix("/v1") + "/v1/"
    try:
        name = name or _request(url + "models")["data"][0]["id"]
    except (InputError, LookupError, TypeError):
        name = "default"  # many servers hold one model and ignore the name

    def embed(texts: list[str]) -> np.ndarray:
        rows: list[dict] = []
        with input_errors(f"{url} did not return embeddings for {len(texts)} texts"):
            for start in range(0, len(texts), 32):
                body = {"model": name, "input": texts[start : start + 32]}
                data = _request(url + "embeddings", body | {"encoding_format": "float"})["data"]
                rows += sorted(data, key=lambda row: row["index"])
            found = np.array([row["embedding"] for row in rows], dtype=np.float32)
            norms = np.linalg.norm(found, axis=1)
            usable = 0 < norms.min() <= norms.max() < np.inf
            if found.shape[:-1] != (len(texts),) or not usable:
                raise ValueError("some are missing, zero or not finite")
        return found

    with encoder_folder(model) as folder:
        return compare(embed, folder)


def _request(url: str, body: dict | None = None) -> Any:
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    with input_errors(f"request to {url} failed"):
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)


@torch.inference_mode()
def compare(embed: Embed, folder: Path) -> Verdict:
    """Compare with the encoder in `folder`, read correctly and in each known wrong way."""
    tokenizer, layout = AutoTokenizer.from_pretrained(folder), read_layout(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    texts = sample_texts(tokenizer, 12, min(64, layout.max_tokens))
    found = embed(texts)
    width = found.shape[1]  # the server may cut the embeddings
    if width > layout.width:
        raise InputError(
            f"the server returns {width} dimensions, but {folder} has {layout.width}: "
            "it serves another model"
        )
    prompted = [layout.prompt() + text for text in texts]
    cut: Any = {"truncation": True, "max_length": layout.max_tokens}
    cosines: dict[str, float] = {}
    for attention, ending in itertools.product(("bidirectional", "causal"), ("with", "without")):
        model.config.is_causal = attention == "causal"
        ids = tokenizer(prompted, add_special_tokens=ending == "with", **cut)["input_ids"]
        states = [model(torch.tensor([row])).last_hidden_state[..., :width] for row in ids]
        for mode in ("mean", "lasttoken", "cls"):
            rows = [pool(row, torch.ones(row.shape[:2], dtype=torch.long), mode) for row in states]
            reading = f"{attention}, {mode}, {ending} EOS"
            cosines[reading] = float(cosine(torch.cat(rows).numpy(), found).mean())
    best = max(cosines, key=cosines.__getitem__)
    attention = best.partition(",")[0]
    other = max(value for reading, value in cosines.items() if not reading.startswith(attention))
    right = f"bidirectional, {layout.pooling}, with EOS"
    evidence = (
        f"the answers best match {folder} read as {best!r}, cosine {cosines[best]:.4f}; "
        f"read correctly {cosines[right]:.4f}, with the other attention {other:.4f}"
    )
    # 8-bit weights still reach 0.999; a best cosine below 0.98 means another model.
    if cosines[best] < 0.98 or 1 - other < 3 * (1 - cosines[best]):
        return Verdict("unknown", evidence)
    return Verdict(attention if attention == "causal" or best == right else "misread", evidence)
