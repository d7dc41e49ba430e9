"""Score retrieval by cosine similarity, with ties counted against the model: ranks, scores with
intervals, and the tasks that need no hub.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwen3_encdec.data.package_docs import summary_pairs
from qwen3_encdec.folders import InputError

MAX_TOKENS = 128
"""Length in tokens that MiniLM was trained on, and the default `max_length` of `finetune`."""
PACKAGE_DOCS = "package-docs"


Embed = Callable[..., np.ndarray]
"""Maps texts and their role ("query", "document" or None) to [N, d] fp32; the role selects which of
the model's prompts precedes them.
"""
Task = Any
"""An object with `name`, `metric`, `max_tokens` at which texts are cut, `corpus` (texts that TF-IDF
may be fitted on, never the queries), `size` (number of scored answers), and `measure(embed)`, which
returns `score` and, if there is an interval, `low` and `high`.
"""


@dataclass(frozen=True)
class Retrieval:
    """Find the relevant document of each query, `relevant` [Q]; ties count against the model."""

    name: str
    queries: list[str]
    documents: list[str]
    relevant: np.ndarray
    max_tokens: int = MAX_TOKENS
    metric: ClassVar[str] = "R@1"

    @property
    def corpus(self) -> list[str]:
        """The documents."""
        return self.documents

    @property
    def size(self) -> int:
        """Number of queries."""
        return len(self.queries)

    def measure(self, embed: Embed) -> dict[str, float]:
        """Compute R@1 as `score` with its interval, and `rank_scores`."""
        queries = embed(self.queries, "query")
        documents = embed(self.documents, "document")
        ranks = relevant_ranks(queries, documents, self.relevant, also=self._right())
        return mean_interval(ranks == 1) | rank_scores(ranks)

    def _right(self) -> list[list[int]]:
        """List all relevant documents of each query; those beyond its own neither help nor hurt."""
        right = defaultdict(list)
        for query, document in zip(self.queries, self.relevant.tolist(), strict=True):
            right[query].append(document)
        return [right[query] for query in self.queries]


def package_retrieval(most: int, seed: int, documents: int | None = None) -> Retrieval:
    """Build the task of finding a docstring's body by its summary line in held-out packages.

    `most` queries search among all bodies, or among a sample of `documents`.
    """
    pairs = summary_pairs("heldout")
    if not pairs:
        raise InputError("no held-out package has usable docstrings; install more packages")
    if documents is not None:
        pairs = random.Random(seed).sample(pairs, min(documents, len(pairs)))
    rows = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:most])
    queries, bodies = [pairs[i][0] for i in rows], [body for _, body in pairs]
    return Retrieval(PACKAGE_DOCS, queries, bodies, rows)


def pairs_retrieval(file: str | Path, most: int, seed: int, max_tokens: int = 512) -> Retrieval:
    """Build the task of finding each query's document among all documents of a .jsonl file.

    A line holds `query` and `document`, or `anchor` and `positive`. Equal documents count once.
    Raises InputError naming a line that is not such an object, or if there are under two documents.
    """
    pairs: list[tuple[str, int]] = []
    documents: dict[str, int] = {}
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"pairs {file} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            query, document = _read_pair(line, f"{file}:{number}")
            pairs.append((query, documents.setdefault(document, len(documents))))
    if len(documents) < 2:
        raise InputError(f"pairs {file} has {len(documents)} distinct document(s); two are needed")
    rows = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:most])
    queries, relevant = [pairs[i][0] for i in rows], np.array([pairs[i][1] for i in rows])
    return Retrieval(Path(file).stem, queries, list(documents), relevant, max_tokens)


def _read_pair(line: str, place: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not valid JSON: {error}") from None
    for names in (("query", "document"), ("anchor", "positive")):
        first, second = (row.get(name) if isinstance(row, dict) else None for name in names)
        if isinstance(first, str) and isinstance(second, str) and first.strip() and second.strip():
            return first, second
    raise InputError(f"{place} must have non-empty query and document, or anchor and positive")


def rank_scores(ranks: np.ndarray) -> dict[str, float]:
    """Compute `mrr` over all documents, `ndcg@10` and `r@1` from ranks, [Q] integers from 1."""
    gain = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)
    scores = {"mrr": 1 / ranks, "ndcg@10": gain, "r@1": ranks == 1}
    return {name: float(values.mean()) for name, values in scores.items()}


def relevant_ranks(
    queries: np.ndarray,
    documents: np.ndarray,
    relevant: np.ndarray,
    *,
    also: Sequence[Sequence[int]] = (),
    chunk: int = 256,
) -> np.ndarray:
    """Rank each query's relevant document, from 1: [Q] integers.

    The rank is 1 plus the number of *other* documents that are at least as similar. Counting only
    strictly better ones would give a perfect score to a model that embeds every text alike.

    Args:
        queries, documents: [Q, d] and [N, d] floats, normalized here; a zero row is similar to
            nothing (cosine 0).
        relevant: [Q] integers, index of each query's document.
        also: All relevant documents of each query; the others are left out of its ranking.
        chunk: Queries per block of similarities, [chunk, N] fp32.

    Raises:
        ValueError: an embedding is not finite.
    """
    queries, documents = normalize(queries), normalize(documents)
    ranks = []
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        similarity = queries[part] @ documents.T  # (chunk, N)
        right = np.take_along_axis(similarity, relevant[part, None], axis=1)
        for row, others in zip(similarity, also[part], strict=False):
            row[list(others)] = -np.inf
        similarity[np.arange(len(right)), relevant[part]] = right[:, 0]
        # The relevant document counts itself, so ranks start at 1.
        ranks.append((similarity >= right).sum(axis=1))
    return np.concatenate(ranks)


def normalize(embeddings: np.ndarray) -> np.ndarray:
    """Scale rows to length 1, fp32; zero rows stay zero. Raises ValueError for NaN or infinity."""
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if not np.isfinite(embeddings).all():
        raise ValueError("embeddings contain NaN or infinity")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(norms > 0, norms, 1)


def interval(statistic: Callable[[np.ndarray], float], units: int) -> dict[str, float]:
    """Return `score`, `low` and `high`: a statistic of how often each unit was drawn, [units], and
    its 95 % percentile bootstrap interval.
    """
    draws = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=1000)
    low, high = np.percentile([statistic(counts) for counts in draws], (2.5, 97.5))
    return {"score": statistic(np.ones(units)), "low": float(low), "high": float(high)}


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """Return the `interval` of a mean over independent values, [N]."""
    return interval(lambda counts: float(counts @ values / counts.sum()), len(values))
