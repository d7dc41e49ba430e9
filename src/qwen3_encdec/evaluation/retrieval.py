"""Retrieval by cosine similarity, where a tie never helps the model."""

import numpy as np

CHUNK = 256


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
    queries: np.ndarray, documents: np.ndarray, relevant: np.ndarray, *, chunk: int = CHUNK
) -> np.ndarray:
    """The rank of each query's right document, from 1: [Q] integers.

    It is 1 plus the number of *other* documents whose similarity is at least its own. Counting only
    the strictly better ones would call a model perfect that gives every text the same embedding.

    Args:
        queries: [Q, d] floats; they need not be normalized, and a zero row is similar to nothing
            (cosine 0).
        documents: [N, d] floats.
        relevant: [Q] integers, index of each query's document.
        chunk: queries whose similarities, [chunk, N] fp32, exist at a time.

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
        ranks[part] = (similarity >= right).sum(
            axis=1
        )  # the right one counts itself: the 1 of the rank
    return ranks


def normalize(embeddings: np.ndarray) -> np.ndarray:
    """Rows at length 1, fp32; a zero row stays zero. Raises ValueError if a value is not finite."""
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if not np.isfinite(embeddings).all():
        raise ValueError("an embedding holds NaN or infinity")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(norms > 0, norms, 1)
