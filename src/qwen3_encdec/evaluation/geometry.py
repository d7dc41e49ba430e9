"""The shape of an embedding space: does it tell texts apart before anyone trains it to?

Sources: alignment and uniformity, Wang & Isola 2020; effective rank, Roy & Vetterli 2007.
"""

import numpy as np
from scipy.special import logsumexp

from qwen3_encdec.evaluation.retrieval import normalize


def geometry(
    queries: np.ndarray, documents: np.ndarray, *, seed: int = 0, sample: int = 1000
) -> dict[str, float]:
    """`alignment` of the pairs (queries[i], documents[i]), and the spread of at most `sample`
    documents.

    Args:
        queries: [N, d].
        documents: [N, d], row i belonging to query i.
        seed: Of the sample.
        sample: Bounds the [sample, sample] similarities.
    """
    rows = np.random.default_rng(seed).permutation(len(documents))[:sample]
    return {
        "alignment": alignment(queries, documents),
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
