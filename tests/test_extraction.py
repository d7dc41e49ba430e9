import os
import shutil

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, Qwen3Model

from qwen3_encdec import Qwen3EncoderDecoderTokenizer, Qwen3EncoderModel, Qwen3ForSeq2SeqLM
from qwen3_encdec.conversion.card import write_card
from qwen3_encdec.conversion.extract import checkpoints_to_average, extract_encoder
from qwen3_encdec.conversion.initialize import initialize
from qwen3_encdec.folders import PROVENANCE_FILE, InputError, read_json, write_json

TEXTS = ["One.", "A sentence of a few more words, to be padded against.", "def f(x): return x"]


def run_of(init_folder, tmp_path, scales=(1.0, 2.0, 6.0)):
    """A run folder whose checkpoints are scaled copies."""
    checkpoints = tmp_path / "run" / "checkpoints"
    original = load_file(init_folder / "model.safetensors")
    for step, scale in enumerate(scales, start=1):
        folder = shutil.copytree(init_folder, checkpoints / f"step-{step:06d}")
        tensors = {name: tensor * scale for name, tensor in original.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (checkpoints / "step-000009.partial").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize(("backend", "side"), [("eager", "left"), ("sdpa", "right")])
def test_stock_transformers_reads_our_encoder(init_folder, encoder_folder, backend, side):
    ours = Qwen3ForSeq2SeqLM.from_pretrained(init_folder).eval().get_encoder()
    stock = AutoModel.from_pretrained(encoder_folder, attn_implementation=backend).eval()
    assert type(stock) is Qwen3Model
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder, padding_side=side)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    kept = batch["attention_mask"].bool()
    reference = ours(**batch).last_hidden_state[kept]
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(stock(**batch).last_hidden_state[kept], reference, **close)
    # one text without a mask, where stock code is tempted to be causal
    one = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(stock(one).last_hidden_state, ours(one).last_hidden_state, **close)
    # the control: the same weights read causally
    options = {"attn_implementation": backend, "is_causal": True}
    causal = AutoModel.from_pretrained(encoder_folder, **options).eval()
    assert (causal(**batch).last_hidden_state[kept] - reference).abs().max() > 1e-2


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_sentence_transformers_pools_our_states(init_folder, tmp_path, pooling):
    extract_encoder(init_folder, tmp_path / "out", pooling=pooling)
    embeddings = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(
        TEXTS, convert_to_tensor=True
    )
    ours = Qwen3ForSeq2SeqLM.from_pretrained(init_folder).eval().get_encoder()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        states = ours(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
        expected = {"mean": states.mean(0), "last": states[-1], "cls": states[0]}[pooling]
        torch.testing.assert_close(
            embedding, torch.nn.functional.normalize(expected, dim=0), atol=1e-5, rtol=0
        )


def test_configuration_speaks_to_every_reader(encoder_folder):
    config = read_json(encoder_folder / "config.json")
    expected = {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        "is_causal": False,
        "use_bidirectional_attention": True,
        "use_cache": False,
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }
    assert expected.items() <= config.items()
    assert isinstance(config["eos_token_id"], int)
    assert "auto_map" not in config
    tensors = set(load_file(encoder_folder / "model.safetensors"))
    assert {"embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "norm.weight"} <= tensors
    assert not any(name.startswith("model.") for name in tensors)
    kinds = [module["type"] for module in read_json(encoder_folder / "modules.json", list)]
    legacy = "sentence_transformers.models."
    assert kinds == [f"{legacy}{kind}" for kind in ("Transformer", "Pooling", "Normalize")]
    pooling = read_json(encoder_folder / "1_Pooling/config.json")
    assert pooling["pooling_mode"] == "mean"
    flags = [mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on]
    assert flags == ["pooling_mode_mean_tokens"]
    assert not list(encoder_folder.glob("*.py"))


def test_sentence_transformers_honours_the_requirement(encoder_folder, tmp_path):
    folder = shutil.copytree(encoder_folder, tmp_path / "future")
    path = folder / "config_sentence_transformers.json"
    assert read_json(path)["requirements"] == {"transformers": ">=5.2.0"}
    write_json(path, read_json(path) | {"requirements": {"transformers": ">=999"}})
    with pytest.raises(ImportError, match="transformers"):
        SentenceTransformer(str(folder), device="cpu")


def test_tokenizer_ends_with_eos_as_in_training(init_folder, encoder_folder):
    ours = Qwen3EncoderDecoderTokenizer.from_pretrained(init_folder)
    stock = AutoTokenizer.from_pretrained(encoder_folder)
    assert type(stock).__module__.startswith("transformers")
    assert stock("Some text")["input_ids"] == [*ours("Some text")["input_ids"], ours.eos_token_id]


def test_averaging_the_last_checkpoints(init_folder, tmp_path):
    run = run_of(init_folder, tmp_path)
    checkpoints = run / "checkpoints"
    original = load_file(init_folder / "model.safetensors")["model.encoder.norm.weight"]
    cases = (run, 1, 6.0), (run, 2, 4.0), (checkpoints / "step-000002", 2, 1.5), (checkpoints, 3, 3)
    for checkpoint, last, scale in cases:
        report = extract_encoder(checkpoint, tmp_path / "out", average_last=last)
        assert len(report.averaged) == last
        extracted = load_file(tmp_path / "out" / "model.safetensors")["norm.weight"]
        torch.testing.assert_close(extracted, original * scale)
    with pytest.raises(InputError, match="average_last=4 is impossible with the 3 step-"):
        checkpoints_to_average(run, 4)


def test_no_weights_are_drawn_to_be_overwritten(init_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Qwen3EncoderModel, "_init_weights", None)
    extract_encoder(init_folder, tmp_path / "out")


def test_files_have_the_umasks_mode(init_folder, tmp_path):
    before = os.umask(0o027)
    try:
        extract_encoder(init_folder, tmp_path / "out")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    folders = [tmp_path / "out", tmp_path / "out" / "1_Pooling"]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o750}


def test_the_card_has_what_a_hub_reads_and_no_local_path(init_folder, encoder_folder, tmp_path):
    card = metadata_load(encoder_folder / "README.md")
    assert (card["license"], card["language"]) == ("apache-2.0", ["en"])
    assert card["library_name"] == "sentence-transformers"
    assert card["pipeline_tag"] == "sentence-similarity"
    source = read_json(init_folder / PROVENANCE_FILE)["source"]
    assert card["base_model"] == source.split("/")[-1]
    text = (encoder_folder / "README.md").read_text()
    assert str(init_folder.parent) not in text
    assert "/tmp" not in text
    # A checkpoint of a run leads to the hub id that the run's model came from.
    run = run_of(init_folder, tmp_path)
    init = shutil.copytree(init_folder, tmp_path / "init")
    write_json(init / PROVENANCE_FILE, {"kind": "encoder-decoder", "source": "Qwen/Qwen3-0.6B"})
    made = {"kind": "encoder-decoder", "model": str(init)}
    write_json(run / "checkpoints/step-000003" / PROVENANCE_FILE, made)
    extract_encoder(run, tmp_path / "out")
    assert metadata_load(tmp_path / "out/README.md")["base_model"] == "Qwen/Qwen3-0.6B"


def test_a_card_names_relative_paths_by_their_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret/corpus").mkdir(parents=True)
    (tmp_path / "secret/corpus/a.jsonl").touch()
    inputs = ["secret/corpus", "secret/c*/*.jsonl", "secret/corpus/a.jsonl", "package-docs"]
    facts = {"inputs": inputs, "teacher": "Qwen/Qwen3-Embedding-0.6B"}
    write_card(tmp_path, "card", {}, {"Finetuning": facts})
    text = (tmp_path / "README.md").read_text()
    assert "secret" not in text
    assert "['corpus', '*.jsonl', 'a.jsonl', 'package-docs']" in text
    assert "Qwen/Qwen3-Embedding-0.6B" in text


def test_the_current_folder_has_a_name(parent_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(parent_folder)
    initialize(".", tmp_path / "init", num_sentinel_tokens=3, verify=False)
    monkeypatch.chdir(tmp_path / "init")
    assert extract_encoder(".", tmp_path / "out").averaged == ["init"]
    assert metadata_load(tmp_path / "out/README.md")["base_model"] == parent_folder.name


def test_bad_checkpoints_are_named(init_folder, parent_folder, tmp_path):
    out = tmp_path / "out"

    def refused(sentence, checkpoint, **options):
        with pytest.raises(InputError, match=sentence):
            extract_encoder(checkpoint, out, **options)

    refused("nowhere does not exist; train one with: qwen3-encdec train", tmp_path / "nowhere")
    refused("this is a 'qwen3' model, not an encoder-decoder", parent_folder)
    refused("pooling 'max' is not one of mean, last, cls", init_folder, pooling="max")
    refused("max_seq_length=0 is not between 2 and 32768", init_folder, max_seq_length=0)
    refused("average_last=2 is impossible with the 0 step-", init_folder, average_last=2)
    (tmp_path / "empty").mkdir()
    refused("has neither a config.json nor checkpoints", tmp_path / "empty")
    broken = shutil.copytree(init_folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.encoder.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused("broken: tensor model.encoder.norm.weight contains NaN", broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    refused("broken/model.safetensors is truncated", broken)
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "broken"}
