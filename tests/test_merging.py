"""Soups against longhand averages, and what may not be merged."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from qwen3_encdec.conversion.merge import soup
from qwen3_encdec.demo.parent import causal_embedder
from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.embedding.finetune import finetune
from qwen3_encdec.folders import PROVENANCE_FILE, InputError, read_json, write_json

PAIRS = [(f"Add {n} to x.", f"The result is x + {n}, as a number.") for n in range(40)]


@pytest.fixture(scope="module")
def encoders(encoder_folder, tmp_path_factory):
    """An encoder and two finetunes of it."""
    root = tmp_path_factory.mktemp("encoders")
    tuned = [root / "tuned0", root / "tuned1"]
    for seed, folder in enumerate(tuned):
        finetune(encoder_folder, folder, PAIRS, steps=2, batch_size=8, lr=1e-2, seed=seed)
    return [encoder_folder, *tuned]


def weights(folder):
    return load_file(folder / "model.safetensors")


def small_files(folder):
    written = (PROVENANCE_FILE, "README.md", "model.safetensors")
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in written]
    return {file.relative_to(folder): file.read_bytes() for file in files}


def test_linear_is_the_weighted_mean(encoders, tmp_path):
    soup(encoders, tmp_path / "soup", weights=[1, 3, 4])
    soup(encoders, tmp_path / "equal")
    merged, equal = weights(tmp_path / "soup"), weights(tmp_path / "equal")
    a, b, c = map(weights, encoders)
    for name in merged:
        expected = a[name] / 8 + b[name] * 3 / 8 + c[name] / 2
        assert torch.allclose(merged[name], expected, atol=1e-6), name
        assert torch.allclose(equal[name], (a[name] + b[name] + c[name]) / 3, atol=1e-6), name
    assert not torch.allclose(merged["embed_tokens.weight"], equal["embed_tokens.weight"])
    assert small_files(tmp_path / "soup") == small_files(encoders[0])
    assert read_json(tmp_path / "soup" / PROVENANCE_FILE)["weights"] == [1 / 8, 3 / 8, 1 / 2]
    assert np.isfinite(TextEncoder(tmp_path / "soup").encode(["It loads."])).all()


def test_causal_parent_is_merged_but_for_the_sentinels(encoders, parent_folder, tmp_path):
    soup([encoders[1], parent_folder], tmp_path / "soup", weights=[1, 1])
    merged, tuned, parent = weights(tmp_path / "soup"), weights(encoders[1]), weights(parent_folder)
    name = "layers.1.mlp.up_proj.weight"
    assert torch.allclose(merged[name], (tuned[name] + parent[f"model.{name}"]) / 2, atol=1e-6)
    assert "Held-out" in (encoders[1] / "README.md").read_text()  # not the soup's scores
    assert "Held-out" not in (tmp_path / "soup/README.md").read_text()
    assert not (tmp_path / "soup/metrics.jsonl").exists()
    rows = len(parent["model.embed_tokens.weight"])
    mean = (tuned["embed_tokens.weight"][:rows] + parent["model.embed_tokens.weight"]) / 2
    assert torch.allclose(merged["embed_tokens.weight"][:rows], mean, atol=1e-6)
    assert torch.equal(merged["embed_tokens.weight"][rows:], tuned["embed_tokens.weight"][rows:])
    assert AutoModel.from_pretrained(tmp_path / "soup").config.is_causal is False
    # The same weights under an encoder's names.
    causal_embedder(parent_folder, tmp_path / "embedder")
    soup([encoders[1], tmp_path / "embedder"], tmp_path / "same", weights=[1, 1])
    same = weights(tmp_path / "same")
    assert all(torch.equal(value, merged[name]) for name, value in same.items())


def test_dtype_is_the_first_models_and_layouts_may_differ(encoders, tmp_path):
    half = shutil.copytree(encoders[1], tmp_path / "half")
    tensors = {name: tensor.bfloat16() for name, tensor in weights(half).items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    # Present versions of sentence-transformers write no flags for the pooling.
    write_json(half / "1_Pooling/config.json", {"embedding_dimension": 40, "pooling_mode": "mean"})
    soup([half, encoders[2]], tmp_path / "soup")
    assert {tensor.dtype for tensor in weights(tmp_path / "soup").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weights": [1, 2]}, "must be 3 non-negative numbers"),
        ({"weights": [1, -1, 1]}, "must be 3 non-negative numbers"),
        ({"weights": [0, 0, 0]}, "with a positive, finite sum"),
        ({"weights": [1e308, 1e308, 1]}, "with a positive, finite sum"),
    ],
)
def test_bad_settings(encoders, tmp_path, options, sentence):
    with pytest.raises(InputError, match=sentence):
        soup(encoders, tmp_path / "soup", **options)
    assert not list(tmp_path.iterdir())


def test_models_that_differ_are_refused(encoders, init_folder, parent_folder, tmp_path):
    def refused(*models) -> str:
        with pytest.raises(InputError) as error:
            soup(models, tmp_path / "soup")
        assert not (tmp_path / "soup").exists()
        return str(error.value)

    def changed(file, **changes):
        folder = shutil.copytree(encoders[1], tmp_path / file.replace("/", "-"), dirs_exist_ok=True)
        write_json(folder / file, {**read_json(folder / file), **changes})
        return folder

    first = encoders[0]
    with pytest.raises(InputError, match="would replace .*; choose another folder"):
        soup(encoders, encoders[1])
    assert "at least two" in refused(first)
    assert "the first model must be one" in refused(parent_folder, first)
    assert "must both have model_type qwen3" in refused(first, init_folder)
    assert "does not exist" in refused(first, tmp_path / "nowhere")
    differs = "in more than its weights: "
    assert f"{differs}rms_norm_eps" in refused(first, changed("config.json", rms_norm_eps=0.1))
    pooling = changed("1_Pooling/config.json", pooling_mode="cls")
    assert f"{differs}pooling" in refused(first, pooling)
    tokenizer = read_json(encoders[1] / "tokenizer.json")["model"]
    vocabulary = {**tokenizer["vocab"], "!": 999}
    other = changed("tokenizer.json", model={**tokenizer, "vocab": vocabulary})
    assert f"{differs}vocabulary" in refused(first, other)
    cut = shutil.copytree(encoders[1], tmp_path / "cut")
    tensors = weights(cut)
    name = "embed_tokens.weight"
    tensors[name] = tensors[name][:-3].contiguous()
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    assert f"{differs}{name}" in refused(first, cut)
    tensors[name] = weights(first)[name].log()
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    assert f"{cut}: tensor {name} contains NaN" in refused(first, cut)
    (cut / "3_Dense").mkdir()
    shutil.copy(cut / "model.safetensors", cut / "3_Dense")  # would be left out of the copy
    assert f"{cut} has modules with weights of their own: 3_Dense" in refused(cut, first)


def test_command_evaluates_every_input_and_the_result(
    encoders, parent_folder, tmp_path, monkeypatch, command
):
    from qwen3_encdec.reports import evaluation as suite

    seen, output = {}, tmp_path / "soup"

    def scores(folders, parent, tasks):
        seen.update(folders=folders, parent=parent)
        ndcg = {str(encoders[0]): 0.3, str(output): 0.4}
        return {"retrieval": {name: {"ndcg@10": ndcg[name]} for name in folders}}

    monkeypatch.setattr(suite, "evaluate_retrieval", scores)
    monkeypatch.setattr(suite, "score_text", lambda metrics: "a table")
    models = ("--model", encoders[0], "--model", parent_folder, "--output", output)
    _, out, _ = command("soup", *models, "--weights", "0.9,0.1", "--evaluate")
    assert "a table" in out
    assert f"is better than its best input {encoders[0]}: nDCG@10 0.400 vs. 0.300" in out
    assert seen["parent"] == parent_folder
    monkeypatch.setattr(suite, "evaluate_retrieval", lambda folders, parent, tasks: (
        {"retrieval": {name: {"ndcg@10": 0.3} for name in folders}}))  # fmt: skip
    assert "not better than" in suite.compare_soup(encoders[:2], tmp_path / "soup")
