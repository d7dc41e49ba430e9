"""The experiment, end to end on a toy plan:

equal tokens, nothing done twice, tables that are what the JSON says.
"""

import hashlib
import json
import shutil
import sys
import threading
from contextlib import nullcontext

import pytest
from experiments.adaptation import report as adaptation
from experiments.objective import benchmarks, report, run

from qwen3_encdec.evaluation import retrieval
from qwen3_encdec.training import loop
from tests.test_demo import TEXTS

PLAN = """
sizes: {toy: {hidden_size: 64, num_hidden_layers: 2}}
seeds: [0]
corpus: {num_ranks: 512, man_pages: 0, man_characters: 0}
parent: {tokens: 2048, batch_size: 2, lr: 3.0e-3}
branch: {tokens: 3072, batch_size: 2, lr: 2.0e-3}
ul2: {batch_size: 1, source_length: 256, target_length: 128}
contrastive: {steps: 2, batch_size: 8, lr: 2.0e-3, max_length: 32, temperature: 0.05}
evaluation: {tasks: [package-docs], num_queries: 20, num_examples: 2}
contestants:
  causal: {branch: causal, causal: true}
  unmasked: {branch: causal}
  mntp: {branch: mntp}
  ul2: {branch: ul2}
  ul2+mntp: {branch: ul2, mntp_weight: 1.0}
ablate: {size: toy, seed: 0}
ablations:
  last pooling: {branch: ul2, pooling: last}
  everything else: {branch: ul2, s_weight: 1.0, decoder_share: 0.5, random_sentinels: true}
"""


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """All jobs of the toy plan, in this process."""
    root = tmp_path_factory.mktemp("objective")
    (root / "plan.yaml").write_text(PLAN)
    plan = run.read_plan(root / "plan.yaml", 1.0, [], [])
    pairs = retrieval.summary_pairs("heldout")[:30]
    texts = [f"{text} Number {i}." for i in range(8) for text in TEXTS]
    with pytest.MonkeyPatch.context() as patch:
        for module in (retrieval, run, benchmarks):
            patch.setattr(module, "summary_pairs", lambda split: pairs)
        patch.setattr(run, "corpus", lambda **_: texts)

        def walk():
            folders = root / "results", root / "runs"
            for job in run.pieces(plan, True, *folders):
                if job != "baselines":
                    run.walk(plan, job, *folders)

        walk()
        yield root, walk


def _read(root):
    return report.read(root / "results")


def test_every_piece_is_there_and_tokens_are_equal(walked):
    found = _read(walked[0])
    names = {"causal", "unmasked", "mntp", "ul2", "ul2+mntp", "last-pooling", "everything-else"}
    trained = names - {"unmasked", "last-pooling"}
    expected = (
        {"parent", "score-parent"} | {f"score-{n}" for n in names} | {f"train-{n}" for n in trained}
    )
    assert {name.removeprefix("toy-0/") for name in found} == expected
    tokens = {name: found[f"toy-0/train-{name}"]["text tokens"] for name in trained}
    assert max(tokens.values()) - min(tokens.values()) < 512, tokens  # a step
    assert tokens["causal"] == tokens["mntp"] > 2500
    for name in names:
        score = found[f"toy-0/score-{name}"]
        heldout = score["contrastive"]["heldout"]  # the best weights are kept, also the first
        changed = score["before"]["retrieval"] != score["after"]["retrieval"]
        assert changed == (heldout["best"] > heldout["before"])
    assert found["toy-0/train-ul2+mntp"]["flops"] > found["toy-0/train-ul2"]["flops"]
    assert found["toy-0/train-everything-else"]["flops"] < found["toy-0/train-ul2"]["flops"]
    texts = sorted(f"{text} Number {i}." for i in range(8) for text in TEXTS)  # in any order
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    assert found["toy-0/parent"]["corpus"]["sha256"] == digest
    provenance = found["toy-0/score-ul2"]["provenance"]
    assert {"command", "hardware", "seconds", "versions"} <= set(provenance)


def test_an_interrupted_experiment_does_what_is_missing(walked):
    root, walk = walked
    files = {file: file.read_bytes() for file in (root / "results").rglob("*.json")}
    written = {file: file.stat().st_mtime_ns for file in files}
    lost = root / "results" / "toy-0" / "score-ul2.json"
    lost.unlink()
    changed = root / "results" / "toy-0" / "score-mntp.json"  # of another plan
    record = json.loads(changed.read_text())
    record["settings"]["contrastive"]["steps"] = 3
    changed.write_text(json.dumps(record))
    plan = run.read_plan(root / "plan.yaml", 1.0, [], [])
    assert run.pieces(plan, True, root / "results", root / "runs") == {
        "toy-0 parent all": [],
        "toy-0 train mntp": ["toy-0 parent all"],
        "toy-0 train ul2": ["toy-0 parent all"],
        "toy-0 score mntp": ["toy-0 train mntp"],
        "toy-0 score ul2": ["toy-0 train ul2"],
        "baselines": [],
    }
    walk()
    again = {file for file in files if file.stat().st_mtime_ns != written[file]}
    assert again == {lost, changed}
    for file in again:
        old, new = json.loads(files[file]), json.loads(file.read_text())
        assert all(old[key] == new[key] for key in ("settings", "before", "after"))  # scores do not


def test_a_training_that_was_asked_to_stop_is_not_done(walked, monkeypatch):
    root, _ = walked
    file = root / "results" / "toy-0" / "train-ul2.json"
    whole = json.loads(file.read_text())
    file.unlink()
    shutil.rmtree(root / "runs" / "toy-0" / "train-ul2")
    plan = run.read_plan(root / "plan.yaml", 1.0, [], [])
    unit = run.Unit(plan, "toy", 0, root / "results", root / "runs")
    with monkeypatch.context() as patch:
        asked = threading.Event()
        asked.set()
        patch.setattr(loop, "hearing_signals", lambda: nullcontext(asked))
        with pytest.raises(SystemExit):
            unit.train("ul2")
    assert not file.exists()
    unit.train("ul2")
    again = json.loads(file.read_text())
    assert all(again[key] == whole[key] for key in ("steps", "loss", "source tokens", "denoising"))


def test_tables_are_what_the_files_say_and_a_changed_file_is_noticed(
    walked, tmp_path, monkeypatch, capsys
):
    root, _ = walked
    page = tmp_path / "results.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    results = tmp_path / "results"
    shutil.copytree(root / "results", results)
    options = ["report", "--plan", str(root / "plan.yaml"), "--results", str(results)]
    options += ["--docs", str(tmp_path)]

    def draw(*more):
        monkeypatch.setattr(sys, "argv", [*options, *more])
        report.main()

    with pytest.raises(SystemExit) as stopped:
        draw("--check")
    assert stopped.value.code == 1
    assert "old" in page.read_text()
    draw()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    score = json.loads((results / "toy-0" / "score-ul2.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| ul2 |"))
    assert f"{score['after']['retrieval']['ul2']['mrr']:.3f} (1 seed)" in row
    assert "| MiniLM-L6 | not run |" in text
    draw("--check")
    score["after"]["retrieval"]["ul2"]["mrr"] += 0.1
    (results / "toy-0" / "score-ul2.json").write_text(json.dumps(score))
    with pytest.raises(SystemExit):
        draw("--check")
    assert "results.md" in capsys.readouterr().err


def test_intervals_by_hand():
    assert report.interval([1.0]) is None
    assert report.interval([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / 3**0.5, rel=1e-4)
    assert report.spread([1.0, 2.0, 3.0]) == "+2.000 ± 2.484"
    assert report.spread([]) == "not run"


def test_the_committed_tables_are_what_the_committed_files_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    report.main()


def test_a_man_page_becomes_text():
    roff = ".TH X 1\n.de IX\nnot this\n..\n.SH NAME\nls \\- list \\fIfiles\\fR\n.if n .ad l\n.PP\nIt is \\(lqgood\\(rq.\n"
    assert run.plain(roff) == "NAME\nls - list files\nIt is good."


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (run, ["--size", "huge"], "size 'huge' is not one of small, base"),
        (run, ["--scale", "0"], "scale 0 must be above 0"),
        (run, ["--jobs", "0"], "--jobs 0 must be at least 1"),
        (run, ["--plan", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (report, ["--results", "nowhere"], "results folder nowhere does not exist"),
        (adaptation, ["--retrieval", "nowhere"], "results folder nowhere does not exist"),
        (report, ["--docs", "nowhere"], "results.md does not exist"),
    ],
)
def test_a_wrong_argument_is_one_sentence(module, arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
