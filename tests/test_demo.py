"""The demo's pipeline at toy size with real components, and the contrastive stage that closes it."""

import json
import math

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, Qwen3ForCausalLM

from qwen3_encdec.demo.parent import (
    causal_embedder,
    nano_config,
    parent_tokenizer,
    train_causal_parent,
)
from qwen3_encdec.demo.pipeline import NANO, run_demo
from qwen3_encdec.embedding.finetune import finetune
from qwen3_encdec.evaluation import retrieval
from qwen3_encdec.folders import PROVENANCE_FILE, InputError
from tests.test_finetuning import differ, weights

TEXTS = [
    f"Return the {word} of {n} numbers.\n\nThe list must not be empty."
    for n in range(40)
    for word in ("sum", "mean")
]
PAIRS = [(f"Add {n} to x.", f"The result is x + {n}, as a number.") for n in range(40)]


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A nano parent after a few steps."""
    folder = tmp_path_factory.mktemp("nano") / "parent"
    result = _train(folder)
    return folder, result


def _train(folder, texts=TEXTS, **changes):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2}
    budget = {"steps": 12, "batch_size": 2, "block_size": 32, **changes}
    return train_causal_parent(
        folder, tokenizer=parent_tokenizer(512), texts=texts, **sizes, **budget
    )


def test_parent_is_an_ordinary_qwen3_folder_that_learned(nano):
    folder, result = nano
    model = Qwen3ForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert "<extra_id_0>" not in tokenizer.get_vocab()
    assert len(tokenizer) == 512 + 26
    assert config.vocab_size == 640  # spare rows, as in a real checkpoint
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer(TEXTS[3], return_tensors="pt")["input_ids"]
    trained = model(ids, labels=ids).loss.item()
    torch.manual_seed(0)
    untrained = Qwen3ForCausalLM(nano_config(tokenizer, 64, 2))(ids, labels=ids).loss.item()
    assert trained < untrained - 0.5
    assert result["loss"] < math.log(config.vocab_size)


def test_parent_depends_on_its_seed_alone(nano, tmp_path):
    folder, result = nano
    assert _train(tmp_path / "again") == result
    assert not differ(tmp_path / "again", folder)
    _train(tmp_path / "other", seed=1)
    assert differ(tmp_path / "other", folder)


def test_parent_refuses_a_corpus_of_less_than_a_block(tmp_path):
    with pytest.raises(InputError, match="fewer than one block of 32"):
        _train(tmp_path / "parent", ["short"])
    assert not (tmp_path / "parent").exists()


def _small_files(folder):
    others = {PROVENANCE_FILE, "README.md", "metrics.jsonl", "model.safetensors"}
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in others)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _sees_the_end(folder) -> bool:
    model = SentenceTransformer(str(folder), device="cpu")[0].auto_model.eval()
    ids = torch.arange(5, 13)[None]
    other = ids.clone()
    other[0, -1] = 99
    with torch.no_grad():
        first, changed = (model(x).last_hidden_state[0, 0] for x in (ids, other))
    return not torch.allclose(first, changed)


def test_finetune_changes_the_weights_and_no_other_file(encoder_folder, parent_folder, tmp_path):
    """So the encoder stays bidirectional, and the control causal."""
    causal_embedder(parent_folder, tmp_path / "control")
    for name, folder in (("encoder", encoder_folder), ("control", tmp_path / "control")):
        finetune(folder, tmp_path / f"{name}-tuned", PAIRS, steps=2, batch_size=8)
    tuned = tmp_path / "encoder-tuned"
    assert _sees_the_end(tuned)
    assert not _sees_the_end(tmp_path / "control-tuned")
    assert _small_files(tuned) == _small_files(encoder_folder)
    before, after = weights(encoder_folder), weights(tuned)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert differ(encoder_folder, tuned)
    # sentence-transformers' own way of saving is what would have gone wrong
    SentenceTransformer(str(encoder_folder)).save_pretrained(
        str(tmp_path / "saved"), create_model_card=False
    )
    assert _small_files(tmp_path / "saved") != _small_files(encoder_folder)


TOY = NANO | {
    "num_ranks": 512,
    "parent": {"hidden_size": 64, "num_hidden_layers": 2, "steps": 3},
    "ul2": {"max_steps": 3, "warmup_steps": 0, "batch_size": 2},
    "contrastive": {"steps": 2, "batch_size": 8},
    "heldout_texts": 4,
    "num_queries": 50,
}


@pytest.fixture
def small_corpus(monkeypatch):
    """Few held-out pairs: embedding thousands of bodies is what takes the demo's minutes."""
    some = retrieval.summary_pairs("heldout")[:30]
    monkeypatch.setattr(retrieval, "summary_pairs", lambda split: some)


def test_the_whole_pipeline_twice(small_corpus, tmp_path, capsys):
    output = tmp_path / "demo"
    first = run_demo(output, budget=TOY)
    out = capsys.readouterr().out
    assert "report:" in out
    assert "not run" not in out
    assert set(first["retrieval"]) == {"UL2 encoder", "UL2 encoder + contrastive"}
    second = run_demo(output, budget=TOY, full=True)
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics["denoising"]) == {"initialization", "trained"}
    for losses in metrics["denoising"].values():
        assert set(losses) == {"R1", "R2", "X1", "X2", "S"}
    expected = {
        "TF-IDF", "MiniLM-L6", "Causal parent (mean)", "Causal parent (last)", "Parent without mask (mean)",
        "UL2 encoder", "UL2 encoder + contrastive", "Causal parent + contrastive",
    }  # fmt: skip
    assert set(metrics["retrieval"]) == expected - set(metrics["not_run"])
    for scores in metrics["retrieval"].values():
        assert all(map(math.isfinite, scores.values()))
    stages = {"parent", "initialize", "ul2", "extract", "contrastive", "evaluate"}
    assert stages <= set(metrics["seconds"])
    assert metrics["provenance"]["budget"]["ul2"] == TOY["ul2"]
    assert "<svg" in (output / "report.html").read_text()
    assert second == metrics
    assert first["denoising"] == metrics["denoising"]  # same seed, same numbers
    assert first["retrieval"].items() <= metrics["retrieval"].items()


def test_the_pipeline_starts_from_a_given_checkpoint(small_corpus, parent_folder, tmp_path):
    metrics = run_demo(tmp_path / "demo", qwen3_model=parent_folder, budget=TOY)
    assert "parent" not in metrics["seconds"]
    assert metrics["provenance"]["qwen3_model"] == str(parent_folder)


def test_a_failed_demo_leaves_what_was_there(init_folder, tmp_path):
    output = tmp_path / "demo"
    output.mkdir()
    (output / PROVENANCE_FILE).write_text('{"kind": "demo"}')
    with pytest.raises(InputError, match="is not a dense Qwen3"):
        run_demo(output, qwen3_model=init_folder, budget=TOY)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == [PROVENANCE_FILE]
