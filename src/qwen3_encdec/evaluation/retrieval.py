"""Retrieval by cosine similarity, where a tie never helps the model: ranks, scores with their
intervals, the geometry of the space, and the tasks that need no hub.

Sources: alignment and uniformity, Wang & Isola 2020; effective rank, Roy & Vetterli 2007.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from scipy.special import logsumexp

from qwen3_encdec.data.package_docs import summary_pairs
from qwen3_encdec.folders import InputError

CHUNK = 256
DRAWS = 1000
MAX_TOKENS = 128
"""The length that both MiniLM and the demo's contrastive stage are trained on."""
PACKAGE_DOCS = "package-docs"
PAIR_FIELDS = (("query", "document"), ("anchor", "positive"))


class Embed(Protocol):
    """Texts to [N, d] fp32; the role decides which of the model's prompts stands before them."""

    def __call__(self, texts: list[str], role: str | None = None) -> np.ndarray: ...  # noqa: D102


class Task(Protocol):
    """The suite's view of a task."""

    @property
    def name(self) -> str:
        """Its row in the table."""

    @property
    def metric(self) -> str:
        """Name of its score."""

    @property
    def max_tokens(self) -> int:
        """Length at which texts are cut."""

    @property
    def corpus(self) -> list[str]:
        """Texts that TF-IDF may be fitted on, never the queries; empty if there are none."""

    @property
    def size(self) -> int:
        """Number of answers that the score is made of."""

    def measure(self, embed: Embed) -> dict[str, float]:
        """`score` in the task's metric, the ends `low` and `high` of its interval, and more."""


@dataclass(frozen=True)
class Retrieval:
    """Find the right document of each query; ties count against the model."""

    name: str
    queries: list[str]
    documents: list[str]
    relevant: np.ndarray
    """[Q], index of the document."""
    max_tokens: int = MAX_TOKENS
    with_geometry: bool = False
    """Measure the space as well."""
    metric: ClassVar[str] = "R@1"

    @property
    def corpus(self) -> list[str]:
        """The documents."""
        return self.documents

    @property
    def size(self) -> int:
        """Queries."""
        return len(self.queries)

    def measure(self, embed: Embed) -> dict[str, float]:
        """R@1 as `score`, its interval, `mrr`, `ndcg@10`, `r@1`, and the geometry if asked for."""
        queries = embed(self.queries, "query")
        documents = embed(self.documents, "document")
        ranks = relevant_ranks(queries, documents, self.relevant, also=self._also_right())
        scores = mean_interval(ranks == 1) | rank_scores(ranks)
        return scores | (geometry(queries, documents[self.relevant]) if self.with_geometry else {})

    def _also_right(self) -> list[list[int]]:
        """Other right documents of the same query: they neither help nor hurt."""
        right: dict[str, list[int]] = {}
        for query, document in zip(self.queries, self.relevant.tolist(), strict=True):
            right.setdefault(query, []).append(document)
        return [
            [other for other in right[query] if other != document]
            for query, document in zip(self.queries, self.relevant.tolist(), strict=True)
        ]


def package_retrieval(most: int, seed: int) -> Retrieval:
    """Find a docstring's body by its summary line, among those of all held-out packages."""
    pairs = summary_pairs("heldout")
    if not pairs:
        raise InputError(
            "no held-out package has a docstring with a summary and a body; install more packages"
        )
    relevant = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:most])
    queries, documents = [pairs[i][0] for i in relevant], [body for _, body in pairs]
    return Retrieval(PACKAGE_DOCS, queries, documents, relevant, with_geometry=True)


def pairs_retrieval(file: str | Path, most: int, seed: int, max_tokens: int = 512) -> Retrieval:
    """Find the document of each query of a .jsonl file, among all its documents.

    A line holds `query` and `document`, or `anchor` and `positive`. Documents that are equal are
    one document.

    Raises:
        InputError: a line is not such an object (named by its number), or there are fewer than two
            documents.
    """
    queries: list[str] = []
    relevant: list[int] = []
    documents: dict[str, int] = {}
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"pairs {file} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        query, document = _read_pair(line, f"{file}:{number}")
        queries.append(query)
        relevant.append(documents.setdefault(document, len(documents)))
    if len(documents) < 2:
        raise InputError(f"pairs {file}: {len(documents)} documents; retrieval needs at least two")
    rows = np.sort(np.random.default_rng(seed).permutation(len(queries))[:most])
    return Retrieval(
        Path(file).stem,
        [queries[i] for i in rows],
        list(documents),
        np.array(relevant)[rows],
        max_tokens,
    )


def _read_pair(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error}") from None
    for first, second in PAIR_FIELDS if isinstance(row, dict) else ():
        query, document = row.get(first), row.get(second)
        if not isinstance(query, str) or not isinstance(document, str):
            continue
        if query.strip() and document.strip():
            return query, document
    raise InputError(f"{where} holds neither query and document nor anchor and positive, as texts")


def retrieval_scores(
    queries: np.ndarray, documents: np.ndarray, relevant: np.ndarray, *, chunk: int = CHUNK
) -> dict[str, float]:
    """Scores of a task where each query has one right document; arguments and errors as in
    `relevant_ranks`.

    Returns:
        `mrr` (mean reciprocal rank over all documents), `ndcg@10` and `r@1` (recall at 1), each
            from 0 to 1.
    """
    return rank_scores(relevant_ranks(queries, documents, relevant, chunk=chunk))


def rank_scores(ranks: np.ndarray) -> dict[str, float]:
    """The same from the ranks, [Q] integers from 1."""
    gain = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)
    return {
        "mrr": float((1 / ranks).mean()),
        "ndcg@10": float(gain.mean()),
        "r@1": float((ranks == 1).mean()),
    }


def relevant_ranks(
    queries: np.ndarray,
    documents: np.ndarray,
    relevant: np.ndarray,
    *,
    also: Sequence[Sequence[int]] = (),
    chunk: int = CHUNK,
) -> np.ndarray:
    """The rank of each query's right document, from 1: [Q] integers.

    It is 1 plus the number of *other* documents whose similarity is at least its own. Counting only
    the strictly better ones would call a model perfect that gives every text the same embedding.

    Args:
        queries: [Q, d] floats; they need not be normalized, and a zero row is similar to nothing
            (cosine 0).
        documents: [N, d] floats.
        relevant: [Q] integers, index of each query's document.
        also: Other right documents of each query, left out of its ranking.
        chunk: Queries whose similarities, [chunk, N] fp32, exist at a time.

    Raises:
        ValueError: shapes do not fit, an index is out of range, or an embedding is not finite.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries {queries.shape} and documents {documents.shape} are not of one dimension"
        )
    if relevant.shape != (len(queries),) or not len(queries):
        raise ValueError(
            f"relevant {relevant.shape} does not name a document for each of {len(queries)} queries"
        )
    if relevant.min() < 0 or relevant.max() >= len(documents):
        raise ValueError(f"relevant holds an index outside 0 ... {len(documents) - 1}")
    queries, documents = normalize(queries), normalize(documents)
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        similarity = queries[part] @ documents.T  # (chunk, N)
        right = np.take_along_axis(similarity, relevant[part, None], axis=1)
        for row, others in zip(similarity, also[part], strict=False):
            row[list(others)] = -np.inf
        # The right one counts itself: the 1 of the rank.
        ranks[part] = (similarity >= right).sum(axis=1)
    return ranks


def normalize(embeddings: np.ndarray) -> np.ndarray:
    """Rows at length 1, fp32; a zero row stays zero. Raises ValueError if a value is not finite."""
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if not np.isfinite(embeddings).all():
        raise ValueError("an embedding holds NaN or infinity")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(norms > 0, norms, 1)


def interval(
    statistic: Callable[[np.ndarray], float], units: int, *, seed: int = 0
) -> dict[str, float]:
    """A statistic and its 95 % percentile bootstrap: `score`, `low`, `high`.

    Args:
        statistic: Of how often each unit was drawn, [units].
        units: Number of units, drawn with replacement.
        seed: Of the draws.
    """
    draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=DRAWS)
    low, high = np.percentile([statistic(counts) for counts in draws], (2.5, 97.5))
    return {"score": statistic(np.ones(units)), "low": float(low), "high": float(high)}


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """`interval` of a mean over independent values, [N]."""
    return interval(lambda counts: float(counts @ values / counts.sum()), len(values))


def geometry(
    queries: np.ndarray, documents: np.ndarray, *, seed: int = 0, sample: int = 1000
) -> dict[str, float]:
    """`alignment` of the pairs (queries[i], documents[i]), both [N, d], and the spread of at most
    `sample` documents: nothing of it where there are fewer than two.
    """
    rows = np.random.default_rng(seed).permutation(len(documents))[:sample]
    found = {"alignment": alignment(queries, documents)}
    if len(rows) < 2:
        return found
    return found | {
        "uniformity": uniformity(documents[rows]),
        "mean_cosine": mean_cosine(documents[rows]),
        "effective_rank": effective_rank(documents[rows]),
    }


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared distance of the normalized pairs (x[i], y[i]) of [N, d]:

    0 identical, 2 orthogonal, 4 opposite.
    """
    return float(np.square(normalize(x) - normalize(y)).sum(axis=1).mean())


def uniformity(x: np.ndarray) -> float:
    """Log of the mean of exp(-2 |x_i - x_j|^2) over pairs i < j of normalized rows [N, d].

    0 if all are the same; lower is more spread out, about -4 in many dimensions.
    """
    return float(logsumexp(4 * _cosines(x) - 4) - np.log(len(x) * (len(x) - 1) / 2))


def mean_cosine(x: np.ndarray) -> float:
    """Mean cosine similarity over pairs i < j of rows [N, d]; near 1 the space is a narrow cone."""
    return float(_cosines(x).mean())


def effective_rank(x: np.ndarray) -> float:
    """Exponential of the entropy of the singular values of the normalized rows [N, d], as shares of
    their sum.

    Not centred: between 1 (all rows on a line) and min(N, d).
    """
    singular = np.linalg.svd(normalize(x).astype(np.float64), compute_uv=False)
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _cosines(x: np.ndarray) -> np.ndarray:
    """Cosines of the pairs i < j, fp64, flat."""
    x = normalize(x).astype(np.float64)
    return (x @ x.T)[np.triu_indices(len(x), k=1)]
