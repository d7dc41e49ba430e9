"""Every example but those with a test of their own runs, and says what it is there to say."""

import re
import shutil
from pathlib import Path

import pytest

from qwen3_encdec.data import package_docs
from qwen3_encdec.data.package_docs import Docstring

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "own_denoiser": ["[R-words]", "[X-halves]", "[S-late]", "<extra_id_0>"],
    "own_dataset": ["examples in 200 rows", "examples from held-out texts"],
    "own_backend": ["losses: ", "e-0", "generated: equal"],
    "pipeline": ["stock transformers differs by", "1.0000, "],
}


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(name, run_script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_script(EXAMPLES / f"{name}.py")
    assert code == 0, err
    for expected in SAYS[name]:
        assert expected in out
    assert list(tmp_path.iterdir()) == []


def test_semantic_search(encoder_folder, run_script, monkeypatch, tmp_path):
    pytest.importorskip("faiss", reason="needs the extra search: make test-extras")
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    documents = [
        Docstring("p", f"p.f{i}", f"Words {i} of document {i * i}, which is about {'x' * i}.")
        for i in range(9)
    ]
    monkeypatch.setattr(package_docs, "package_docs", lambda split: documents)

    def answers(query, number=2):
        arguments = "--model", tmp_path / "encoder", "--number", number, query
        code, out, _ = run_script(EXAMPLES / "semantic_search.py", *arguments)
        return code or [line.split()[1].rstrip(":") for line in out.splitlines()[1:]]

    assert all(answers(document.text)[0] == document.name for document in documents[:4])
    assert (tmp_path / "encoder" / "documentation.faiss").exists()
    assert sorted(answers("anything", 20)) == [document.name for document in documents]
    documents.reverse()  # control: an index of other documents answers wrongly
    assert answers(documents[0].text)[0] != documents[0].name
    documents.pop()
    assert "index of other packages" in answers("anything")


@pytest.mark.parametrize("lora", [False, True])
def test_finetune_seq2seq(lora, init_folder, run_script, monkeypatch, tmp_path):
    """On pairs whose summary stands in the body, so that a nano model learns in a few steps."""
    if lora:
        pytest.importorskip("peft", reason="needs the extra lora: make test-tools")

    def pairs(split):
        numbers = range(60) if split == "train" else range(60, 66)
        body = "The {} of {} numbers, a list that is not empty."
        return [
            (f"Return the {word} of {n} numbers.", body.format(word, n))
            for n in numbers
            for word in ("sum", "mean", "product")
        ]

    monkeypatch.setattr(package_docs, "summary_pairs", pairs)
    options = ["--steps", 12, "--batch-size", 6, "--lr", 5e-3, "--length", 24]
    options += ["--output", tmp_path / "tuned", *(["--lora"] if lora else [])]
    example = EXAMPLES / "finetune_seq2seq.py"
    code, out, err = run_script(example, "--model", init_folder, *options)
    assert code == 0, err
    assert "first line of the body: overlap 0.4" in out
    losses = [float(loss) for loss in re.findall(r"^(?:before|after): loss ([\d.]+)", out, re.M)]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.5
    saved = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "tuned" / saved).is_file()


def test_every_example_is_run_somewhere():
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert [file.stem for file in EXAMPLES.glob("*.py") if file.stem not in tests] == []
