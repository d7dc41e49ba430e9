"""Score retrieval by cosine similarity, with ties counted against the model: ranks, scores with
intervals, and the tasks that need no hub.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwen3_encdec.data.corpus import without_surrogates
from qwen3_encdec.data.package_docs import summary_pairs
from qwen3_encdec.folders import InputError, input_errors

MAX_TOKENS = 128
"""Length in tokens that MiniLM was trained on, and the default `max_length` of `finetune`."""
PACKAGE_DOCS = "package-docs"


Embed = Callable[..., np.ndarray]
"""Maps texts, their role ("query", "document" or None) and `max_tokens`, at which each is cut, to
[N, d] fp32; the role selects which of the model's prompts precedes them.
"""
Task = Any
"""An object with `name`, `metric`, `max_tokens` at which texts are cut, `documents` (texts that
TF-IDF may be fitted on, never the queries), `size` (number of scored answers), and
`measure(embed)`, which returns `score` and, if there is an interval, `low` and `high`.
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
    def size(self) -> int:
        """Number of queries."""
        return len(self.queries)

    def measure(self, embed: Embed) -> dict[str, float]:
        """Compute R@1 as `score` with its interval, and `rank_scores`."""
        numbers = {query: number for number, query in enumerate(dict.fromkeys(self.queries))}
        groups = np.array([numbers[query] for query in self.queries])
        queries = embed(list(numbers), "query")[groups]
        documents = embed(self.documents, "document")
        # A query's other relevant documents neither help nor hurt.
        in_groups = self.relevant[np.argsort(groups, kind="stable")]
        answers = np.split(in_groups, np.bincount(groups).cumsum()[:-1])
        also = [answers[number] for number in groups]
        ranks = relevant_ranks(queries, documents, self.relevant, also=also)
        return mean_interval(ranks == 1, groups) | rank_scores(ranks)


def package_retrieval(most: int, seed: int, documents: int | None = None) -> Retrieval:
    """Build the task of finding a docstring's body by its summary line in held-out packages.

    `most` queries search among all bodies, or among a sample of `documents`.
    """
    pairs = summary_pairs("heldout")
    if not pairs:
        raise InputError("no held-out package has usable docstrings; install more packages")
    if documents is not None:
        pairs = random.Random(seed).sample(pairs, min(documents, len(pairs)))
    return retrieval_of_pairs(PACKAGE_DOCS, pairs, most, seed)


def retrieval_of_pairs(
    name: str,
    pairs: Iterable[tuple[str, str]],
    most: int | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
) -> Retrieval:
    """Build the task of finding each query's documents among those of all pairs.

    At most `most` queries are drawn, each with all its documents. Equal documents and equal pairs
    count once.
    """
    pairs = list(dict.fromkeys(pairs))
    documents = {text: row for row, text in enumerate(dict.fromkeys(text for _, text in pairs))}
    queries = list(dict.fromkeys(query for query, _ in pairs))
    drawn = np.random.default_rng(seed).permutation(len(queries))[:most]
    chosen = {queries[row] for row in drawn}
    asked = [(query, documents[text]) for query, text in pairs if query in chosen]
    relevant = np.array([row for _, row in asked])
    return Retrieval(name, [query for query, _ in asked], list(documents), relevant, max_tokens)


def pairs_retrieval(file: str | Path, most: int, seed: int, max_tokens: int = 512) -> Retrieval:
    """Build the task of finding each query's document among all documents of a .jsonl file.

    A line holds `query` and `document`, or `anchor` and `positive`, which are relevant to each
    other. Raises InputError naming a line that is not such an object or has a grade, or if there
    are under two documents.
    """
    name = Path(file).stem
    if name == PACKAGE_DOCS:
        raise InputError(f"pairs {file} has the name of the built-in task; rename the file")
    with input_errors(f"pairs {file} cannot be read"):
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    pairs = [_read_pair(line, f"{file}:{number}") for number, line in numbered]
    distinct = len({document for _, document in pairs})
    if distinct < 2:
        raise InputError(f"pairs {file} has {distinct} distinct document(s); two are needed")
    return retrieval_of_pairs(name, pairs, most, seed, max_tokens)


def _read_pair(line: str, place: str) -> tuple[str, str]:
    with input_errors(f"{place} is not valid JSON"):
        row: Any = json.loads(line)
    if not isinstance(row, dict):
        row = {}
    if graded := {"score", "label", "relevance"} & row.keys():
        raise InputError(f"{place} has a {min(graded)}; list relevant pairs only, without it")
    for names in (("query", "document"), ("anchor", "positive")):
        query, document = map(row.get, names)
        if all(isinstance(text, str) and text.strip() for text in (query, document)):
            return without_surrogates(query), without_surrogates(document)
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
    also: Sequence[np.ndarray] = (),
    chunk: int = 256,
) -> np.ndarray:
    """Rank each query's relevant document, from 1: [Q] integers.

    The rank is 1 plus the number of *other* documents that are at least as similar. Counting only
    strictly better ones would give a perfect score to a model that embeds every text alike.

    Args:
        queries, documents: [Q, d] and [N, d] floats, normalized here; a zero row is similar to
            nothing (cosine 0).
        relevant: [Q] integers, index of each query's document.
        also: Indices of all relevant documents of each query; the others are not ranked.
        chunk: Queries per block of similarities, [chunk, N] fp32.

    Raises:
        InputError: an embedding is not finite.
    """
    queries, documents = normalize(queries), normalize(documents)
    ranks = []
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        similarity = queries[part] @ documents.T  # (chunk, N)
        right = np.take_along_axis(similarity, relevant[part, None], axis=1)
        for row, others in zip(similarity, also[part], strict=False):
            row[others] = -np.inf
        similarity[np.arange(len(right)), relevant[part]] = right[:, 0]
        # The relevant document counts itself, so ranks start at 1.
        ranks.append((similarity >= right).sum(axis=1))
    return np.concatenate(ranks)


def normalize(embeddings: np.ndarray) -> np.ndarray:
    """Scale rows to length 1, fp32; zero rows stay zero. Raises InputError for NaN or infinity."""
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if not np.isfinite(embeddings).all():
        raise InputError("embeddings contain NaN or infinity: train again with a lower lr")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(norms > 0, norms, 1)


def interval(statistic: Callable[[np.ndarray], float], units: int) -> dict[str, float]:
    """Return `score`, `low` and `high`: a statistic of how often each unit was drawn, [units], and
    its 95 % percentile bootstrap interval; a single unit has none.
    """
    score = statistic(np.ones(units))
    if units < 2:
        return {"score": score}
    draws = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=1000)
    low, high = np.percentile([statistic(counts) for counts in draws], (2.5, 97.5))
    return {"score": score, "low": float(low), "high": float(high)}


def mean_interval(values: np.ndarray, groups: np.ndarray | None = None) -> dict[str, float]:
    """Return the `interval` of a mean over values, [N], independent or by `groups`, [N] from 0."""
    groups = np.arange(len(values)) if groups is None else groups
    sums, sizes = np.bincount(groups, values), np.bincount(groups)
    return interval(lambda counts: float(counts @ sums / (counts @ sizes)), len(sizes))
