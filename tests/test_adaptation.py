"""The adaptation experiment on a toy pair: what the arms compute, and runs that are continued."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from experiments.adaptation import report, retrieval, run
from experiments.adaptation.arms import Arm
from transformers import AutoModel

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.folders import load_model, load_tokenizer

PLAN = yaml.safe_load((Path(run.__file__).parent / "settings.yaml").read_text())
TEXTS = [f"Text number {i} says that {i * i} is the square of {i}." * 3 for i in range(60)]


@pytest.fixture
def settings(tmp_path):
    for name, word in (("train", "Text"), ("heldout", "Piece")):
        (tmp_path / f"{name}.txt").write_text("\n".join(TEXTS).replace("Text", word))
    data = {"source_length": 48, "target_length": 48, "streams": 4}
    data |= {"inputs": [str(tmp_path / "train.txt")]}
    data |= {"heldout_inputs": [str(tmp_path / "heldout.txt")]}
    toy = {"precision": "no", "heldout": 2, "infilled": 1, "first_point": 256, "save_minutes": 0.0}
    return {**PLAN["cpu"], **toy, "arms": dict(PLAN["arms"]), "device": "cpu", "data": data}


def start(settings, init_folder, name="arm", **arm):
    if arm:
        settings["arms"][name] = arm
    training = run.Training(run.Run(name, 1e-3, 0), settings, init_folder)
    training.measure()
    return training


def losses(training):
    training.measure()
    return torch.tensor(list(training.points[-1]["losses"].values()))


def close(a, b):
    return torch.allclose(losses(a), losses(b), atol=2e-4)  # records have four places


@pytest.mark.parametrize("name", PLAN["arms"])
def test_every_arm_trains_and_only_gated_ones_have_a_gate(name, settings, init_folder):
    training = start(settings, init_folder, name)
    before = {n: p.clone() for n, p in training.model.named_parameters()}
    training.advance()
    training.advance()
    moved = {n for n, p in training.model.named_parameters() if not torch.equal(p, before[n])}
    gates = {n for n in before if n.endswith("source_gate")}
    gated = training.arm.gate != "none" or training.arm.merge != "softmax"
    assert moved >= gates if gated else not moved & gates
    frozen = "model.decoder.layers.0.mlp.up_proj.weight" not in moved
    assert frozen == (training.arm.frozen_tokens > 0)
    assert "model.encoder.layers.0.mlp.up_proj.weight" in moved


def test_arms_agree_where_their_definitions_do(settings, init_folder):
    scaled = start(settings, init_folder, "scaled values")
    for same in ({"merge": "bias"}, {"merge": "blend", "start": 1.0}, {"gate": "head", "start": 1}):
        assert close(scaled, start(settings, init_folder, **same)), same
    others: list[dict] = [{"merge": "add", "start": 1.0}, {"merge": "bias", "start": 1}]
    for other in (*others, {"values": "raw"}, {"rotated": True}):
        assert not close(scaled, start(settings, init_folder, **other)), other
    own = start(settings, init_folder, keys="raw", gate="head")
    reference = start(settings, init_folder, keys="raw", gate="head")
    reference.model = load_model(init_folder)
    assert close(own, reference)


@pytest.mark.parametrize(
    ("name", "exact"), [("blend", True), ("add", True), ("scaled values, gate", False)]
)
def test_an_exact_start_does_not_see_the_source(name, exact, settings, init_folder):
    training = start(settings, init_folder, name)
    before = losses(training)
    training.model.model.encoder.norm.weight.data.copy_(torch.arange(40) - 20.0)
    assert torch.equal(before, losses(training)) == exact


def test_a_stopped_run_continues_as_if_it_had_not(settings, init_folder, tmp_path):
    def walk(folder, deadlines, tokens=2100):
        arguments = SimpleNamespace(results=tmp_path / folder, runs=tmp_path / folder / "runs")
        arguments.runs.mkdir(parents=True, exist_ok=True)
        if not (arguments.runs / "init").exists():
            (arguments.runs / "init").symlink_to(init_folder)
        stages = {"arms": ["scaled values, gate", "blend"], "lr": [1e-3], "seeds": [0]}
        settings["queue"] = [{**stages, "tokens": 1000}, {**stages, "tokens": tokens}]
        for arguments.deadline in deadlines:
            run.walk(settings, arguments)
        return arguments

    class Soon(float):
        """A deadline that comes after a few questions."""

        left = 5

        def __gt__(self, now):
            self.left -= 1
            return self.left > 0

        def __le__(self, now):
            return self.left <= 0

    straight = walk("straight", [math.inf])
    stopped = walk("stopped", [*(Soon() for _ in range(12)), math.inf])
    for file in sorted(straight.results.glob("*.json")):
        pair = [json.loads((a.results / file.name).read_text()) for a in (straight, stopped)]
        points = [
            [{k: v for k, v in point.items() if "seconds" not in k} for point in record["points"]]
            for record in pair
        ]
        assert points[0] == points[1]
        assert [run.power(p["tokens"]) for p in points[0]] == [0, 256, 512, 1024, 2048]
        assert not (stopped.runs / file.stem).exists()
        assert ("infilled" in pair[0]) == ("gate" in file.stem)
    times = {file: file.stat().st_mtime_ns for file in straight.results.glob("*.json")}
    walk("straight", [math.inf])
    assert times == {file: file.stat().st_mtime_ns for file in times}
    text = report.tables(report.read_runs(straight.results))
    assert "scaled values, gate" in text
    assert "not run" in text
    assert report.plot(report.read_runs(straight.results)).startswith("<?xml")


def test_the_tokens_ratio_is_read_off_the_curve():
    curve = {0: {"R": 9.0}, 2048: {"R": 8.0}, 4096: {"R": 6.0}, 8192: {"R": 5.0}}
    assert report.crossing(curve, 7.0) == pytest.approx(2048 * 2**0.5)
    assert report.crossing(curve, 8.5) == 2048
    assert report.crossing(curve, 4.0) is None
    assert report.crossing(curve, 9.5) == 0

    def runs(*losses):
        return {seed: {"curve": {0: {"R": 20.0}, 8192: {"R": x}}} for seed, x in enumerate(losses)}

    fast = {seed: {"curve": curve} for seed in range(2)}
    assert report.ratio(runs(9.5, 6.0), fast).startswith("there before its first step")
    assert report.ratio(runs(7.0, 6.0), fast).startswith("2.4 (")
    assert report.ratio(runs(8.5, 6.0), fast) == "at least 2.8, ends at 8,192 tokens"
    assert report.ratio(runs(4.0), fast) == "not reached by every seed"
    assert report.ratio(runs(), fast) == "not run"


def test_the_settings_are_consistent():
    for arm in PLAN["arms"].values():
        assert dataclasses.asdict(Arm(**arm)).items() >= arm.items()
    for device in ("cpu", "cuda"):
        runs = list(run.queue(PLAN[device]))
        assert {r.arm for r, _, _ in runs} <= set(PLAN["arms"])
        assert {r for r, _, last in runs if last} == {r for r, _, _ in runs}
    assert set(report.HEADLINE) <= set(PLAN["arms"])


def test_a_beginning_is_repeated_from_its_committed_examples(
    settings, init_folder, tmp_path, monkeypatch
):
    settings["check"] = {"arm": "raw values", "lr": 1e-3, "seed": 0, "points": 2, "tolerance": 1e-3}
    training = start(settings, init_folder, "raw values")
    training.run = run.Run("raw values", 1e-3, 0)
    for _ in range(2):
        training.advance()
    training.measure()
    file = tmp_path / f"{training.run.name}.json"
    file.write_text(json.dumps(training.record()))
    monkeypatch.setattr(run, "ROWS", tmp_path / "check.json")
    for _ in ("writes the examples", "reads them"):
        with pytest.raises(SystemExit) as ended:
            run.check(settings, init_folder, tmp_path)
        assert ended.value.code == 0
        settings["data"] |= {"inputs": [str(tmp_path / "heldout.txt")]}  # another corpus now
        settings["data"] |= {"heldout_inputs": [str(tmp_path / "train.txt")]}
    record = json.loads(file.read_text())
    record["points"][1]["losses"]["S"] += 0.01
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit) as ended:
        run.check(settings, init_folder, tmp_path)
    assert ended.value.code == 1


@pytest.fixture
def contest(settings, init_folder, parent_folder, tmp_path, monkeypatch):
    """Settings and arguments of a toy contest for which UL2's states exist."""
    words = [f"{'abcdefghij'[i % 10] * 3} {i * i}" for i in range(40)]
    pairs = [(f"The word {word} here", f"{word} is what this text is about") for word in words]
    documents = [SimpleNamespace(text=text) for text in TEXTS]
    monkeypatch.setattr(retrieval, "summary_pairs", lambda split: pairs)
    monkeypatch.setattr(retrieval, "package_docs", lambda split: documents)
    arguments = SimpleNamespace(results=tmp_path, runs=tmp_path / "runs", parent=parent_folder)
    arguments.runs.mkdir()
    (arguments.runs / "init").symlink_to(init_folder)
    toy = {"tokens": 900, "row_tokens": 40, "step_tokens": 100, "lr": 1e-3, "warmup_steps": 1}
    toy |= {"mask_token": "<extra_id_10>"}
    asked = {**PLAN["retrieval"], **toy}
    asked["contrastive"] = {**asked["contrastive"], "steps": 2, "batch_size": 4}
    asked["scoring"] = {**asked["scoring"], "documents": 30, "queries": 20}
    contestants = {n: {**c, "seeds": 1} for n, c in asked["contestants"].items()}
    asked["contestants"] = {n: c for n, c in contestants.items() if c["kind"] != "MiniLM"}
    for arm in ("raw values", "scaled values, gate"):
        training = start(settings, init_folder, arm)
        training.run = run.Run(arm, 1e-3, 0)
        if arm == "raw values":  # the other's encoder stays the parent's
            training.model.model.encoder.norm.weight.data[:20] = 0.0
        training.save(arguments.runs / training.run.name)
    return asked, arguments


def test_every_contestant_is_scored_once_from_its_own_weights(contest):
    asked, arguments = contest
    retrieval.walk(asked, arguments)
    files = sorted(arguments.results.glob("*.json"))
    found = {r["contestant"]: r for r in (json.loads(file.read_text()) for file in files)}
    assert found.keys() == asked["contestants"].keys()
    before = {name: record["before"]["ranks"] for name, record in found.items()}
    assert before["UL2, scaled values, gate"] == before["parent without mask"]
    unlike = ["UL2, raw values", "MNTP", "causal", "parent, mean"]
    assert all(before[name] != before["parent without mask"] for name in unlike)
    for record in found.values():
        assert ("after" in record) == (
            record["settings"]["contestant"].get("kind") in ("unmasked", "causal", "mntp", "UL2")
        )
    times = {file: file.stat().st_mtime_ns for file in files}
    asked["contestants"]["MNTP"]["seeds"] = 2
    retrieval.walk(asked, arguments)
    assert times == {file: file.stat().st_mtime_ns for file in times}
    assert len(list(arguments.results.glob("*.json"))) == len(files) + 1
    text = report.retrieval(list(found.values()))
    assert all(f"| {name} | 1 |" in text for name in found)


@pytest.mark.parametrize("mntp", [False, True])
def test_a_batch_asks_for_every_token_or_the_masked_ones(mntp, contest, init_folder):
    asked = contest[0]
    tokenizer = load_tokenizer(init_folder)
    rng = np.random.default_rng(0)
    rows = retrieval.read_rows(tokenizer, asked, rng)
    assert 900 <= sum(map(len, rows)) < 1100
    assert max(map(len, rows)) == 40
    groups = list(retrieval.steps(rows, 100))
    assert sum(map(len, groups)) == len(rows)
    assert all(100 <= sum(map(len, group)) < 140 for group in groups[:-1])
    batch = retrieval.collate(rows, tokenizer, asked, rng, mntp)
    real = batch["attention_mask"].bool()
    asked_for = batch["labels"] != -100
    mask = tokenizer.convert_tokens_to_ids("<extra_id_10>")
    ends = batch["labels"] == tokenizer.eos_token_id
    if mntp:
        assert torch.equal(asked_for, batch["input_ids"] == mask)
        assert not ends.any()
        assert 0.15 < asked_for.sum() / real.sum() < 0.25
    else:
        assert torch.equal(asked_for, real)
        assert torch.equal(batch["labels"][real], batch["input_ids"][real])
        assert ends.sum() == len(rows)


def test_only_the_causal_encoder_cannot_look_ahead(contest, init_folder, tmp_path):
    asked, _ = contest
    extract_encoder(init_folder, tmp_path / "start")
    for kind, causal in (("causal", True), ("mntp", False)):
        weights, facts = retrieval.train(tmp_path / "start", kind, 0, asked)
        assert facts["losses"][-1] < facts["losses"][0]
        retrieval.write_encoder(tmp_path / "start", tmp_path / kind, weights, causal)
        model = AutoModel.from_pretrained(tmp_path / kind)
        ids = torch.tensor([[40, 50, 60], [40, 50, 70]])
        first, second = model(ids).last_hidden_state[:, :2]
        assert torch.equal(first, second) == causal


def test_differences_are_paired_by_query():
    def piece(name, seed, *ranks):
        score = {"ranks": ranks, "mrr": 0.0, "r@1": 0.0, "ndcg@10": 0.0}
        facts = {"seconds": 1.0, "commit": "c", "hardware": "h"}
        return {
            "contestant": name,
            "seed": seed,
            "before": score,
            "after": score,
            "provenance": facts,
        }

    pieces = [piece(report.UNMASKED, 0, 1, 2, 4, 100)]
    pieces += [piece("other", 0, 1, 4, 4, 100), piece("other", 1, 1, 1, 4, 100)]
    lines = report.retrieval(pieces).splitlines()
    difference = lines[3].split("|")[-2].strip()
    assert lines[3].startswith("| other | 2 ")
    assert difference.startswith("+0.031 (+0.000 to ")  # (1/4 + 1)/2 - 1/2 of one query in four
