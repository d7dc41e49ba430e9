"""Tasks of the experiment that need no hub: classes of packages, WordNet's definitions, the Lee
corpus, and needles in long texts, each scored with its 95 % interval.

The interval is a percentile bootstrap over what was sampled: queries, test texts, or the documents
of a set of pairs.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from experiments.objective.wordnet import Synset, synsets, wordnet_folder

from qwen3_encdec.data.package_docs import Docstring, package_docs, summary_pairs
from qwen3_encdec.evaluation.baselines import NotRun, package_folder
from qwen3_encdec.evaluation.retrieval import (
    MAX_TOKENS,
    PACKAGE_DOCS,
    Embed,
    Retrieval,
    Task,
    interval,
    mean_interval,
    normalize,
    package_retrieval,
)
from qwen3_encdec.evaluation.suite import evaluate_retrieval
from qwen3_encdec.folders import InputError


@dataclass(frozen=True)
class Classification:
    """Logistic regression on frozen embeddings."""

    name: str
    train_texts: list[str]
    train_labels: np.ndarray
    texts: list[str]
    labels: np.ndarray
    max_tokens: int = MAX_TOKENS
    metric: ClassVar[str] = "accuracy"

    @property
    def documents(self) -> list[str]:
        """The texts of the train split."""
        return self.train_texts

    @property
    def size(self) -> int:
        """Number of texts in the test split."""
        return len(self.texts)

    def measure(self, embed: Embed) -> dict[str, float]:
        """Measure accuracy on the test split.

        Embeddings are normalized and scaled to unit variance on average.
        """
        from sklearn.linear_model import LogisticRegression

        train, test = normalize(embed(self.train_texts)), normalize(embed(self.texts))
        center, scale = train.mean(axis=0), max(float(train.std(axis=0).mean()), 1e-6)
        probe = LogisticRegression(C=PROBE_C, max_iter=1000).fit(
            (train - center) / scale, self.train_labels
        )
        return mean_interval(probe.predict((test - center) / scale) == self.labels)


@dataclass(frozen=True)
class Similarity:
    """Agreement with human judgements of how similar two documents are."""

    name: str
    texts: list[str]
    judgements: np.ndarray
    """[N, N] symmetric; the diagonal is not read."""
    max_tokens: int = MAX_TOKENS
    metric: ClassVar[str] = "Pearson"

    @property
    def documents(self) -> list[str]:
        """The documents."""
        return self.texts

    @property
    def size(self) -> int:
        """Number of pairs."""
        return len(self.texts) * (len(self.texts) - 1) // 2

    def measure(self, embed: Embed) -> dict[str, float]:
        """Correlate the cosines with the judgements; the score is 0 if either is constant.

        The interval resamples documents, not pairs, because pairs that share a document are not
        independent.
        """
        embeddings = normalize(embed(self.texts))
        first, second = np.triu_indices(len(self.texts), k=1)
        found = (embeddings @ embeddings.T)[first, second].astype(np.float64)
        wanted = self.judgements[first, second]

        def pearson(counts: np.ndarray) -> float:
            weights = counts[first] * counts[second]
            x, y = (values - np.average(values, weights=weights) for values in (found, wanted))
            spread = np.sqrt((weights * x * x).sum() * (weights * y * y).sum())
            return float((weights * x * y).sum() / spread) if spread > 1e-9 else 0.0

        return interval(pearson, len(self.texts))


# The tasks. Each maker takes (maximum queries or test texts, seed) and raises NotRun if its data
# are not installed.

PROBE_C = 0.01
CLASSES, TEXTS_PER_CLASS = 12, 60
NEEDLES, NEEDLE_WORDS, NEEDLE_LENGTHS = 100, 60, (128, 512, 1024)
NEEDLE_PLACES = {"start": 0.0, "middle": 0.5, "end": 1.0}
WORDNET_TRAIN = 4000


def documents_by_package(packages: int, texts: int, seed: int) -> list[Docstring]:
    """Draw at most `texts` documents from each of the `packages` largest held-out packages, shuffled."""
    documents = package_docs("heldout")
    counts = Counter(document.package for document in documents)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    largest = {package for package, _ in ranked[:packages]}
    taken: Counter[str] = Counter()
    chosen = []
    for i in np.random.default_rng(seed).permutation(len(documents)):
        package = documents[i].package
        if package in largest and taken[package] < texts:
            taken[package] += 1
            chosen.append(documents[i])
    return chosen


def package_classes(most: int, seed: int) -> list[Task]:
    """Classify docstrings by package."""
    documents = documents_by_package(CLASSES, TEXTS_PER_CLASS, seed)
    texts = [document.text for document in documents]
    labels = np.unique([document.package for document in documents], return_inverse=True)[1]
    train = np.arange(len(texts)) % 2 == 0
    test = np.flatnonzero(~train)[:most]
    train_texts = [text for text, kept in zip(texts, train, strict=True) if kept]
    return [
        Classification(
            "package", train_texts, labels[train], [texts[i] for i in test], labels[test]
        )
    ]


def needles(most: int, seed: int) -> list[Task]:
    """Find the long text that contains a passage at its start, middle or end, by the summary of the
    passage.

    Lengths are in words. A model that truncates misses late passages; one whose mean dilutes them
    gets worse with length.
    """
    pairs, rng = _heldout_pairs(), np.random.default_rng(seed)
    order = rng.permutation(len(pairs))
    asked, rest = order[: min(most, NEEDLES)], order[min(most, NEEDLES) :]
    hay = " ".join(pairs[i][1] for i in rest).split()
    if len(hay) < 2 * max(NEEDLE_LENGTHS):
        raise NotRun("too little held-out text; install more packages")
    tasks: list[Task] = []
    for length in NEEDLE_LENGTHS:
        for place, share in NEEDLE_PLACES.items():
            texts = []
            for i in asked:
                needle = pairs[i][1].split()[:NEEDLE_WORDS]
                start = int(rng.integers(len(hay) - length))
                filler = hay[start : start + length - len(needle)]
                cut = round(share * len(filler))
                texts.append(" ".join([*filler[:cut], *needle, *filler[cut:]]))
            queries = [pairs[i][0] for i in asked]
            tasks.append(
                Retrieval(
                    f"needle {length} {place}",
                    queries,
                    texts,
                    np.arange(len(asked)),
                    max_tokens=4 * length,
                )
            )
    return tasks


def wordnet_examples(most: int, seed: int) -> list[Task]:
    """Find a word's definition by a phrase that uses the word."""
    chosen = _meanings(most, seed)
    return [_definitions("wordnet-example", [meaning.examples[0] for meaning in chosen], chosen)]


def wordnet_lemmas(most: int, seed: int) -> list[Task]:
    """Find a word's definition, among those of the same meanings, by the word."""
    chosen = _meanings(most, seed)
    return [_definitions("wordnet-lemma", [meaning.lemmas[0] for meaning in chosen], chosen)]


def wordnet_classes(most: int, seed: int) -> list[Task]:
    """Classify definitions by lexicographer file, of which there are 45."""
    found = synsets(wordnet_folder())
    order = np.random.default_rng(seed).permutation(len(found))[: WORDNET_TRAIN + most]
    texts, labels = (
        [found[i].definition for i in order],
        np.array([found[i].lexicographer for i in order]),
    )
    cut = WORDNET_TRAIN
    return [Classification("wordnet-class", texts[:cut], labels[:cut], texts[cut:], labels[cut:])]


def lee(most: int, seed: int) -> list[Task]:
    """Compare fifty news items with human judgements of the similarity of each pair (Lee, Pincombe &
    Welsh 2005), from gensim.
    """
    folder = package_folder("gensim", "gensim") / "test" / "test_data"
    texts = (folder / "lee.cor").read_text(encoding="latin-1").splitlines()
    judgements = np.loadtxt(folder / "similarities0-1.txt")
    return [Similarity("lee", texts, judgements)]


TASKS: dict[str, Callable[[int, int], list[Task]]] = {
    PACKAGE_DOCS: lambda most, seed: [package_retrieval(most, seed)],
    "package": package_classes,
    "wordnet-example": wordnet_examples,
    "wordnet-lemma": wordnet_lemmas,
    "wordnet-class": wordnet_classes,
    "lee": lee,
    "needle": needles,
}


def evaluate(
    encoders: dict, *, tasks: Sequence[str], num_queries: int, seed: int = 0, **options
) -> dict:
    """Run `evaluate_retrieval` on tasks of this file by name; those that cannot run say why."""
    chosen: list[Task] = []
    not_run = {}
    for name in tasks:
        if name not in TASKS:
            raise InputError(f"task {name!r} is not one of {', '.join(TASKS)}")
        try:
            chosen += TASKS[name](num_queries, seed)
        except NotRun as reason:
            not_run[name] = str(reason)
    metrics = evaluate_retrieval(encoders, tasks=chosen, **options)
    metrics["tasks_not_run"] |= not_run
    return metrics


def _meanings(most: int, seed: int) -> list[Synset]:
    """Draw `most` meanings with an example; of those with the same definition the first is kept."""
    found = {
        meaning.definition: meaning
        for meaning in reversed(synsets(wordnet_folder()))
        if meaning.examples
    }
    usable = list(found.values())
    return [usable[i] for i in np.random.default_rng(seed).permutation(len(usable))[:most]]


def _definitions(name: str, queries: list[str], meanings: list[Synset]) -> Task:
    return Retrieval(
        name, queries, [meaning.definition for meaning in meanings], np.arange(len(meanings))
    )


def _heldout_pairs() -> list[tuple[str, str]]:
    pairs = summary_pairs("heldout")
    if not pairs:
        raise InputError(
            "no held-out package has a docstring with a summary and a body; install more packages"
        )
    return pairs
