"""Exported files embed as our encoder does, in their own runtimes (`make interop` installs them)."""

import importlib.util
import json
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from qwen3_encdec import cli
from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.embedding import export
from qwen3_encdec.embedding import export_pair as export_pair_module
from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.embedding.export import (
    FORMS,
    Form,
    causal_embeddings,
    export_encoder,
    sample_texts,
)
from qwen3_encdec.embedding.export_pair import decode, export_pair
from qwen3_encdec.folders import InputError, load_config, load_tokenizer, read_json, write_json

FILES = {
    "onnx": "onnx/model.onnx",
    "onnx-int8": "onnx/model_quantized.onnx",
    "gguf": "model-f32.gguf",
    "gguf-f16": "model-f16.gguf",
    "gguf-q8_0": "model-q8_0.gguf",
}


@pytest.fixture(scope="module")
def encoder(init_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "out"
    extract_encoder(init_folder, folder)
    return folder


@pytest.fixture(scope="module")
def texts(encoder) -> list[str]:
    return sample_texts(AutoTokenizer.from_pretrained(encoder), 9, 100, seed=1)


def runtime(form: str) -> None:
    for package in FORMS[form].packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("form", FORMS)
def test_a_form_embeds_as_our_encoder_does(encoder, texts, tmp_path, form):
    runtime(form)
    # weights this wide put the bytes' error beyond the limit: what is tested is that nothing else
    # is wrong
    limit = 0.98 if FORMS[form].cosine < 0.9999 else FORMS[form].cosine
    report = export_encoder_with(limit, encoder, form, tmp_path / "out")
    assert report.cosine >= limit > report.causal
    assert (tmp_path / "out" / FILES[form]).is_file()
    # ONNX folders carry the tokenizer, which normalizes; GGUF readers do not.
    assert (tmp_path / "out" / "tokenizer.json").is_file() is form.startswith("onnx")
    assert (report.decomposed >= limit) is form.startswith("onnx")
    assert ("convert texts to NFC" in str(report)) is not form.startswith("onnx")
    expected = TextEncoder(encoder, dtype=torch.float32, device="cpu").encode(texts)
    found = FORMS[form].read(tmp_path / "out")(texts)
    assert (found * expected).sum(-1).min() >= limit
    assert (causal_embeddings(encoder, texts) * expected).sum(-1).min() < 0.9
    # eight bits are eight bits: not another copy in 32
    if form in ("onnx-int8", "gguf-q8_0"):
        assert not np.allclose(found, expected, atol=1e-4)


def export_encoder_with(limit, encoder, form, output):
    whole = FORMS[form]
    try:
        FORMS[form] = whole._replace(cosine=limit)
        return export_encoder(encoder, form, output)
    finally:
        FORMS[form] = whole


@pytest.mark.parametrize(("form", "pooling"), [("onnx", "last"), ("gguf", "cls")])
def test_the_folders_own_pooling_goes_with_it(init_folder, tmp_path, form, pooling):
    runtime(form)
    extract_encoder(init_folder, tmp_path / "encoder", pooling=pooling)
    assert export_encoder(tmp_path / "encoder", form, tmp_path / "out").cosine >= FORMS[form].cosine


def stock_form(reader=None) -> Form:
    """The folder itself, read by sentence-transformers."""

    def read(folder):
        return SentenceTransformer(str(folder), device="cpu").encode

    def write(encoder, output):
        shutil.copytree(encoder, output, dirs_exist_ok=True)

    return Form(write, reader or read, 0.99999, (), "export")


def test_wrong_readers_are_caught_and_nothing_is_written(encoder, tmp_path, monkeypatch):
    """The controls: a causal reader, one that is a little off, and texts that could not tell."""
    right = stock_form()

    def causal(folder):
        return lambda texts: causal_embeddings(folder, texts)

    def noisy(folder):
        rng = np.random.default_rng(0)
        embed = right.read(folder)
        return lambda texts: embed(texts) + 0.01 * rng.standard_normal((len(texts), 40))

    monkeypatch.setitem(FORMS, "stock", right)
    export_encoder(encoder, "stock", tmp_path / "right")
    for reader in (causal, noisy):
        monkeypatch.setitem(FORMS, "stock", stock_form(reader))
        with pytest.raises(InputError, match="exported as stock failed verification"):
            export_encoder(encoder, "stock", tmp_path / "out")
    monkeypatch.setitem(FORMS, "stock", right)
    monkeypatch.setattr(
        export, "causal_embeddings", lambda folder, texts: right.read(folder)(texts)
    )
    with pytest.raises(InputError, match="failed verification"):
        export_encoder(encoder, "stock", tmp_path / "out")
    assert [folder.name for folder in tmp_path.iterdir()] == ["right"]


@pytest.mark.parametrize("form", ["onnx", "gguf"])
def test_prompts_width_and_limit_travel(encoder, tmp_path, form):
    runtime(form)
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    file = folder / "config_sentence_transformers.json"
    changes = {"prompts": {"query": "q: "}, "default_prompt_name": "query", "truncate_dim": 24}
    write_json(file, read_json(file) | changes)
    report = export_encoder(folder, form, tmp_path / "out")
    assert report.cosine >= FORMS[form].cosine
    if form == "onnx":
        assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 512
        return
    from gguf import GGUFReader

    reader = GGUFReader(tmp_path / "out" / "model-f32.gguf")
    assert reader.get_field("qwen3.context_length").contents() == 512


def test_the_pair_decodes_as_ours_token_by_token(init_folder, encoder, tmp_path):
    runtime("onnx")
    report = export_pair(init_folder, tmp_path / "pair")
    assert report.equal == report.tokens == 32 * 24
    assert report.blind < 0.5 * report.tokens
    # Rows of one batch do not depend on each other, nor on padding on the left.
    tokenizer = load_tokenizer(tmp_path / "pair")
    config = load_config(tmp_path / "pair")
    texts = sample_texts(tokenizer, 5, 30, seed=3)
    alone = []
    for text in texts:
        ids = np.array([tokenizer(text)["input_ids"]])
        alone.append(decode(tmp_path / "pair", ids, np.ones_like(ids), config, steps=9)[0])
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, padding=True, return_tensors="np")
    arguments = batch["input_ids"], batch["attention_mask"]
    together = decode(tmp_path / "pair", *arguments, config, steps=9)
    assert np.array_equal(together, np.array(alone))
    with pytest.raises(InputError, match="not an encoder-decoder"):
        export_pair(encoder, tmp_path / "out")


def test_a_pair_that_decodes_otherwise_is_not_written(init_folder, tmp_path, monkeypatch):
    runtime("onnx")
    monkeypatch.setattr(export_pair_module, "_write", lambda model, folder: None)
    monkeypatch.setattr(export_pair_module, "decode", lambda *_, **options: np.ones((32, 24)))
    with pytest.raises(InputError, match="exported as ONNX failed verification"):
        export_pair(init_folder, tmp_path / "pair")
    assert not list(tmp_path.iterdir())


def test_sample_texts_reach_from_one_token_to_the_longest(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    texts = sample_texts(tokenizer, 32, 400)
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert min(lengths) <= 4
    assert 300 <= max(lengths) <= 400
    assert texts == sample_texts(tokenizer, 32, 400) != sample_texts(tokenizer, 32, 400, seed=1)
    assert lengths != sorted(lengths)  # so that batches are padded


@pytest.mark.parametrize("form", FORMS)
def test_the_extra_that_is_named_installs_what_is_missing(form):
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())[
        "project"
    ]
    extra = {
        re.split("[>=]", entry)[0].replace("-", "_")
        for entry in project["optional-dependencies"][FORMS[form].extra]
    }
    assert set(FORMS[form].packages) <= extra


def test_bad_input_is_named(encoder, parent_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="form 'tflite' is not one of onnx, onnx-int8, gguf"):
        export_encoder(encoder, "tflite", out)
    monkeypatch.setitem(FORMS, "stock", stock_form())
    for folder in (parent_folder, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="is not an encoder folder; make one with"):
            export_encoder(folder, "stock", out)
    damaged = shutil.copytree(encoder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(InputError, match=r"damaged/model.safetensors is truncated"):
        export_encoder(damaged, "stock", out)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    with pytest.raises(InputError, match="theirs"):
        export_encoder(encoder, "stock", tmp_path / "theirs")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for form in ("onnx", "gguf"):
        message = rf"{form} needs the package {form}: pip install -e '\.\[{form}\]'"
        with pytest.raises(InputError, match=message):
            export_encoder(encoder, form, out)
    command = ["qwen3-encdec", "export", "--model", encoder, "--to", "gguf", "--output", out]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    expected = "error: gguf needs the package gguf: pip install -e '.[gguf]'\n"
    assert capsys.readouterr().err == expected
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "has attention biases"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}, "linear"),
    ],
)
def test_an_encoder_that_llama_cpp_cannot_run_is_refused(encoder, tmp_path, change, message):
    pytest.importorskip("gguf")
    folder = shutil.copytree(encoder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        FORMS["gguf"].write(folder, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))
