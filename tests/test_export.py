"""Exported files embed as our encoder does, in their own runtimes (`make interop` installs them)."""

import importlib.util
import json
import logging
import re
import shutil
import tomllib
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from qwen3_encdec.cli import Format
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
from qwen3_encdec.embedding.export_pair import PAIR, decode, export_pair
from qwen3_encdec.folders import InputError, load_config, load_tokenizer, read_json, write_json

FILES = {
    "onnx": "onnx/model.onnx",
    "onnx-int8": "onnx/model_quantized.onnx",
    "gguf": "model-f32.gguf",
    "gguf-f16": "model-f16.gguf",
    "gguf-q8_0": "model-q8_0.gguf",
}


def runtime(form: str) -> None:
    for package in FORMS[form].packages:
        pytest.importorskip(package)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_embeds_as_our_encoder_does(encoder_folder, tmp_path, monkeypatch, form):
    runtime(form)
    # Weights this wide put the error of 8 bits beyond the limit; nothing else may be wrong.
    limit = 0.98 if FORMS[form].cosine < 0.9999 else FORMS[form].cosine
    monkeypatch.setitem(FORMS, form, FORMS[form]._replace(cosine=limit))
    report = export_encoder(encoder_folder, form, tmp_path / "out")
    assert report.cosine >= limit > report.causal
    assert (tmp_path / "out" / FILES[form]).is_file()
    # ONNX folders carry the tokenizer, which normalizes; GGUF readers do not.
    assert (tmp_path / "out" / "tokenizer.json").is_file() is form.startswith("onnx")
    assert (report.decomposed >= limit) is form.startswith("onnx")
    assert ("convert texts to NFC" in str(report)) is not form.startswith("onnx")
    texts = sample_texts(AutoTokenizer.from_pretrained(encoder_folder), 9, 100, seed=1)
    expected = TextEncoder(encoder_folder, dtype=torch.float32, device="cpu").encode(texts)
    found = FORMS[form].read(tmp_path / "out")(texts)
    assert (found * expected).sum(-1).min() >= limit
    assert (causal_embeddings(encoder_folder, texts) * expected).sum(-1).min() < 0.9
    # Eight bits must not be another copy in 32.
    if form in ("onnx-int8", "gguf-q8_0"):
        assert not np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("form", "pooling"), [("onnx", "last"), ("gguf", "cls")])
def test_the_folders_own_pooling_goes_with_it(init_folder, tmp_path, form, pooling):
    runtime(form)
    extract_encoder(init_folder, tmp_path / "encoder", pooling=pooling)
    assert export_encoder(tmp_path / "encoder", form, tmp_path / "out").cosine >= FORMS[form].cosine


STOCK = Form(
    write=partial(shutil.copytree, dirs_exist_ok=True),
    read=lambda folder: SentenceTransformer(str(folder), device="cpu").encode,
    cosine=0.99999,
    packages=(),
)
"""The folder itself, read by sentence-transformers."""


def test_wrong_readers_are_caught_and_nothing_is_written(encoder_folder, tmp_path, monkeypatch):
    """The controls: a causal reader, one that is a little off, and texts that could not tell."""

    def causal(folder):
        return lambda texts: causal_embeddings(folder, texts)

    def noisy(folder):
        rng, embed = np.random.default_rng(0), STOCK.read(folder)
        return lambda texts: embed(texts) + 0.01 * rng.standard_normal((len(texts), 40))

    def refused(reader):
        monkeypatch.setitem(FORMS, "stock", STOCK._replace(read=reader))
        with pytest.raises(InputError, match="exported as stock failed verification"):
            export_encoder(encoder_folder, "stock", tmp_path / "out")

    refused(causal)
    refused(noisy)
    monkeypatch.setattr(export, "causal_embeddings", lambda *given: STOCK.read(given[0])(given[1]))
    refused(STOCK.read)
    monkeypatch.undo()
    monkeypatch.setitem(FORMS, "stock", STOCK)
    export_encoder(encoder_folder, "stock", tmp_path / "right")
    assert [folder.name for folder in tmp_path.iterdir()] == ["right"]


@pytest.mark.parametrize("form", ["onnx", "gguf"])
def test_prompts_width_and_limit_travel(encoder_folder, tmp_path, form):
    runtime(form)
    folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    file = folder / "config_sentence_transformers.json"
    changes = {"prompts": {"query": "q: "}, "default_prompt_name": "query", "truncate_dim": 24}
    write_json(file, read_json(file) | changes)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 50})
    write_json(
        folder / "modules.json", read_json(folder / "modules.json", list)[:2]
    )  # not normalized
    report = export_encoder(folder, form, tmp_path / "out")
    assert report.cosine >= FORMS[form].cosine
    assert report.difference < 1e-5
    if form == "onnx":
        assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 50
        return
    from gguf import GGUFReader

    reader = GGUFReader(tmp_path / "out" / "model-f32.gguf")
    assert reader.get_field("qwen3.context_length").contents() == 50


def test_the_pair_decodes_as_ours_token_by_token(init_folder, encoder_folder, tmp_path):
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
        export_pair(encoder_folder, tmp_path / "out")


def test_a_pair_that_decodes_otherwise_is_not_written(init_folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    state = shutil.copytree(init_folder, run / "checkpoints" / "step-000001") / "state"
    state.mkdir()

    def write(model, folder):
        assert (folder / "tokenizer.json").exists()
        assert not (folder / "state").exists()

    monkeypatch.setattr(export_pair_module, "check_packages", lambda *_: None)
    monkeypatch.setattr(export_pair_module, "_write", write)
    monkeypatch.setattr(export_pair_module, "decode", lambda *_, **options: np.ones((32, 24)))
    with pytest.raises(InputError, match="exported as ONNX failed verification"):
        export_pair(run, tmp_path / "pair")
    assert list(tmp_path.iterdir()) == [run]


def test_the_command_prints_figures_as_json(encoder_folder, tmp_path, monkeypatch, command):
    monkeypatch.setitem(FORMS, "onnx", STOCK)
    arguments = ("--model", encoder_folder, "--to", "onnx", "--output", tmp_path / "out")
    code, out, err = command("export", *arguments, "--json")
    assert (code, json.loads(out)["form"]) == (0, "onnx"), err


def test_sample_texts_reach_from_one_token_to_the_longest(encoder_folder):
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    texts = sample_texts(tokenizer, 32, 400)
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert min(lengths) <= 4
    assert 300 <= max(lengths) <= 400
    assert texts == sample_texts(tokenizer, 32, 400) != sample_texts(tokenizer, 32, 400, seed=1)
    assert lengths != sorted(lengths)  # so that batches are padded
    assert all(sample_texts(tokenizer, 4, longest=2))


def test_the_command_offers_every_form():
    assert get_args(Format) == (*FORMS, PAIR)


def test_logging_stays_as_quiet_as_it_was():
    logging.disable(logging.INFO)
    with export.quiet():
        assert logging.root.manager.disable == logging.WARNING
    assert logging.root.manager.disable == logging.INFO
    logging.disable(logging.NOTSET)


def test_extras_install_what_their_commands_import():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    needed = {form.packages[0]: set(form.packages) for form in FORMS.values()}
    # Of `embedding/encoder.py`; `datasets` brings pyarrow.
    needed |= {name: {"accelerate", "datasets"} for name in ("serve", "evaluation", "export")}
    for extra, entries in tomllib.loads(text)["project"]["optional-dependencies"].items():
        names = {re.split("[>=]", entry)[0] for entry in entries}
        assert needed.get(extra, set()) <= names, extra


def test_bad_input_is_named(encoder_folder, parent_folder, tmp_path, monkeypatch, command):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="form 'tflite' is not one of onnx, onnx-int8, gguf"):
        export_encoder(encoder_folder, "tflite", out)
    monkeypatch.setitem(FORMS, "stock", STOCK)
    with pytest.raises(InputError, match="is not an encoder folder; make one with"):
        export_encoder(parent_folder, "stock", out)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for form in ("onnx", "gguf"):
        arguments = ("--model", encoder_folder, "--to", form, "--output", out)
        code, _, err = command("export", *arguments)
        expected = f"error: {form} needs the package {form}: pip install -e '.[{form}]'\n"
        assert (code, err) == (2, expected)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "has attention biases"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}, "linear"),
    ],
)
def test_an_encoder_that_llama_cpp_cannot_run_is_refused(encoder_folder, tmp_path, change, message):
    pytest.importorskip("gguf")
    folder = shutil.copytree(encoder_folder, tmp_path / "other")
    write_json(folder / "config.json", read_json(folder / "config.json") | change)
    with pytest.raises(InputError, match=message):
        FORMS["gguf"].write(folder, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))
