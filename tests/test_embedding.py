"""Our encoder embeds as sentence-transformers does, whichever version wrote the folder, in any
order, width, precision and number of processes.
"""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.embedding.encoder import (
    TextEncoder,
    encoder_folder,
    token_batches,
    write_embeddings,
)
from qwen3_encdec.folders import InputError, read_json, write_json

TEXTS = [
    "",
    "One.",
    "A few more words to read.",
    "naïve <|im_end|> text",
    "word " * 700,
    "short",
    "x" * 90,
    "Two.",
]


@pytest.fixture(scope="module", params=["mean", "last", "cls"])
def encoder(request, init_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / request.param
    extract_encoder(init_folder, folder, pooling=request.param, max_seq_length=200)
    return folder


@pytest.fixture(scope="module")
def mean_encoder(init_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "mean"
    extract_encoder(init_folder, folder, max_seq_length=200)
    settings = read_json(folder / "config_sentence_transformers.json")
    prompts = {"query": "query: ", "document": ""}
    write_json(folder / "config_sentence_transformers.json", {**settings, "prompts": prompts})
    return folder


@pytest.fixture
def fp32(mean_encoder):
    return TextEncoder(mean_encoder, dtype=torch.float32)


def stock(folder, texts, **options):
    kwargs = {"dtype": torch.float32}
    return SentenceTransformer(str(folder), device="cpu", model_kwargs=kwargs).encode(
        texts, **options
    )


def test_embeddings_are_those_of_sentence_transformers(encoder):
    ours = TextEncoder(encoder, dtype=torch.float32)
    assert np.allclose(ours.encode(TEXTS), stock(encoder, TEXTS), atol=2e-6)
    assert ours.num_cut == 1
    causal = SentenceTransformer(
        str(encoder), device="cpu", config_kwargs={"is_causal": True}
    ).encode(TEXTS)
    assert not np.allclose(ours.encode(TEXTS), causal, atol=1e-2)


@pytest.mark.parametrize("budget", [1, 7, 64, 10_000])
def test_no_text_depends_on_its_batch(fp32, budget):
    alone = np.concatenate([fp32.encode([text]) for text in TEXTS])
    assert np.allclose(fp32.encode(TEXTS, batch_tokens=budget), alone, atol=2e-6)
    assert not np.allclose(fp32.encode(TEXTS[::-1], batch_tokens=budget), alone, atol=1e-2)


def test_batches_hold_every_text_once_and_about_the_budget():
    lengths = np.array([3, 900, 3, 3, 50, 1, 50, 3])
    batches = token_batches(lengths, 100)
    assert sorted(np.concatenate(batches).tolist()) == list(range(8))
    assert [int(lengths[batch].sum()) for batch in batches] == [900, 100, 13]


def test_dimensions_are_cut_and_normalized_again(fp32, mean_encoder):
    cut = fp32.encode(TEXTS, dimensions=10)
    assert np.allclose(
        cut, stock(mean_encoder, TEXTS, truncate_dim=10, normalize_embeddings=True), atol=2e-6
    )
    assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)
    with pytest.raises(InputError, match="dimensions 41 must be between 1 and 40"):
        fp32.encode(TEXTS, dimensions=41)


def test_bfloat16_is_near_and_the_default_where_it_is_native(fp32, mean_encoder, monkeypatch):
    near = TextEncoder(mean_encoder, dtype=torch.bfloat16).encode(TEXTS)
    cosines = (near * fp32.encode(TEXTS)).sum(1)
    assert 0.99 < cosines.min() < 1 - 1e-6
    for name, expected in (("amx_bf16", torch.bfloat16), ("avx2", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert TextEncoder(mean_encoder, device="cpu").dtype == expected


SETTINGS = {
    "prompts": {"query": "query: ", "passage": "text: "},
    "default_prompt_name": "query",
    "truncate_dim": 16,
}


def written_by_sentence_transformers(mean_encoder, folder):
    """Its present layout: the length limit stands in the tokenizer alone."""
    model = SentenceTransformer(str(mean_encoder), device="cpu", **SETTINGS)
    model.max_seq_length = 30
    model.save_pretrained(str(folder))
    assert "max_seq_length" not in read_json(folder / "sentence_bert_config.json")


def of_older_versions(mean_encoder, folder):
    """Flags for the pooling, and the limit in the transformer's own file."""
    shutil.copytree(mean_encoder, folder)
    pooling = read_json(folder / "1_Pooling/config.json")
    del pooling["pooling_mode"]
    write_json(folder / "1_Pooling/config.json", pooling)
    transformer = read_json(folder / "sentence_bert_config.json")
    write_json(folder / "sentence_bert_config.json", transformer | {"max_seq_length": 30})
    settings = read_json(folder / "config_sentence_transformers.json")
    write_json(folder / "config_sentence_transformers.json", settings | SETTINGS)


@pytest.mark.parametrize("write", [written_by_sentence_transformers, of_older_versions])
def test_folders_are_read_as_sentence_transformers_reads_them(mean_encoder, tmp_path, write):
    write(mean_encoder, tmp_path / "folder")
    ours = TextEncoder(tmp_path / "folder", dtype=torch.float32)
    theirs = SentenceTransformer(str(tmp_path / "folder"), device="cpu")
    assert (ours.max_tokens, ours.dimensions) == (30, 16)
    assert np.allclose(ours.encode(TEXTS), theirs.encode(TEXTS), atol=2e-6)
    for role, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        assert np.allclose(ours.encode(TEXTS, prompt_name=role), encode(TEXTS), atol=2e-6)
    query, document = (ours.encode(TEXTS, prompt_name=role) for role in ("query", "document"))
    assert np.abs(query - document).max() > 0.01
    wide = ours.encode(TEXTS, dimensions=40)
    assert np.allclose(wide, theirs.encode(TEXTS, truncate_dim=40), atol=2e-6)


def test_any_number_of_texts_in_any_chunks(fp32, monkeypatch):
    expected = fp32.encode(TEXTS)
    assert np.array_equal(fp32.encode("A text."), fp32.encode(["A text."])[0])
    assert fp32.encode([]).shape == (0, 40)
    monkeypatch.setattr("qwen3_encdec.embedding.encoder._CHUNK", 3)
    assert np.allclose(fp32.encode(text for text in TEXTS), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (None, "texts must be a str or a list of them, got NoneType"),
        (7, "texts must be a str or a list of them, got int"),
        (["a", None], "text 2 is NoneType, not str"),
        (["a", b"b"], "text 2 is bytes, not str"),
        (["a"] * 5000 + ["c\ud800"], "text 5001 contains the lone surrogate"),
    ],
)
def test_what_is_no_text_is_named(fp32, texts, sentence):
    with pytest.raises(InputError, match=sentence):
        fp32.encode(texts)
    with pytest.raises(InputError, match="'questions' is unknown; the model has: query, document"):
        fp32.encode(TEXTS, prompt_name="questions")


def test_very_long_text_and_max_tokens(mean_encoder):
    text = "many words " * 50_000
    encoder = TextEncoder(mean_encoder, dtype=torch.float32, max_tokens=300)
    tokens = encoder.tokenize([text, "short"])
    assert len(tokens.ids[0]) == 300
    assert tokens.ids[0][-1] == read_json(mean_encoder / "config.json")["eos_token_id"]
    assert tokens.cut == [True, False]
    with pytest.raises(InputError, match=r"max_tokens 90000 must be between 2 and 32768"):
        TextEncoder(mean_encoder, max_tokens=90_000)


def test_weights_of_mixed_dtypes_are_one(mean_encoder, tmp_path):
    folder = shutil.copytree(mean_encoder, tmp_path / "mixed")
    tensors = load_file(folder / "model.safetensors")
    tensors = {
        name: tensor.bfloat16() if "mlp" in name else tensor for name, tensor in tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = TextEncoder(folder, dtype=torch.float32)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    assert np.allclose(encoder.encode(TEXTS), stock(folder, TEXTS), atol=2e-6)


def test_an_encoder_decoder_is_taken_apart_and_that_is_said(init_folder, mean_encoder, capsys):
    encoder = TextEncoder(init_folder, dtype=torch.float32, max_tokens=200)
    assert "is an encoder-decoder: using its encoder, mean-pooled" in capsys.readouterr().err
    assert np.allclose(
        encoder.encode(TEXTS),
        TextEncoder(mean_encoder, dtype=torch.float32).encode(TEXTS),
        atol=1e-6,
    )
    with encoder_folder(init_folder) as folder:
        assert (folder / "modules.json").exists()
    assert not folder.exists()


def test_what_is_no_encoder_is_refused(mean_encoder, parent_folder, tmp_path):
    def damaged(file, **changes):
        folder = shutil.copytree(mean_encoder, tmp_path / "damaged", dirs_exist_ok=True)
        write_json(folder / file, {**read_json(folder / file), **changes})
        return folder

    causal = damaged("config.json", is_causal=True)
    for folder in (tmp_path / "nowhere", parent_folder, causal):
        with pytest.raises(InputError, match="is not an encoder folder; make one with: qwen3-enc"):
            TextEncoder(folder)
    with pytest.raises(InputError, match="pooling must be mean, last, cls"):
        TextEncoder(damaged("1_Pooling/config.json", pooling_mode="max"))
    sentence = r"layers.0.mlp.down_proj.weight is \(40, 56\), expected \(40, 64\)"
    with pytest.raises(InputError, match=sentence):
        TextEncoder(damaged("config.json", intermediate_size=64))
    weights = damaged("config.json") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="model.safetensors is truncated"):
        TextEncoder(weights.parent)


def test_embed_from_stdin_to_npy(command, mean_encoder, tmp_path, fp32):
    output = tmp_path / "new" / "x.npy"
    code, out, _ = command("embed", "--model", mean_encoder, "--input", "-", "--output", output, "--dtype", "float32",
                           stdin="".join(f"{text}\n" for text in TEXTS))  # fmt: skip
    assert code == 0
    assert "8 texts in float32, 1 cut at 200 tokens: (8, 40) float32" in out
    assert np.allclose(np.load(output), fp32.encode(TEXTS), atol=1e-6)
    assert [file.name for file in output.parent.iterdir()] == ["x.npy"]


def test_embed_from_jsonl_to_parquet_with_prompt_and_dimensions(
    command, mean_encoder, tmp_path, fp32
):
    lines = "\n".join(json.dumps({"body": text}) for text in TEXTS)
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    options = {"input": tmp_path / "texts.jsonl.gz", "output": tmp_path / "x.parquet", "text-column": "body",
               "prompt-name": "query", "dimensions": 8, "dtype": "float32"}  # fmt: skip
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    code, _, err = command("embed", "--model", mean_encoder, *arguments)
    assert code == 0, err
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["text"].to_pylist() == TEXTS
    found = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    assert np.allclose(found, fp32.encode(TEXTS, prompt_name="query", dimensions=8), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--output", "x.csv"), "must be a file ending in .npy or .parquet"),
        (("--output", "x.npy", "--input", "nowhere.txt"), "no such file"),
        (("--output", "x.npy", "--input", "empty.txt"), "empty"),
        (("--output", "x.npy", "--model", "nowhere"), "is not an encoder folder"),
    ],
)
def test_embed_refuses_and_writes_nothing(
    command, mean_encoder, tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    (tmp_path / "empty.txt").write_text("")
    code, _, err = command("embed", "--model", mean_encoder, "--input", "texts.txt", *arguments)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty.txt", "texts.txt"]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match="expected"):
        write_embeddings(tmp_path / "x.parquet", np.zeros((3, 2), dtype=np.float32), ["one"])
    assert not list(tmp_path.iterdir())


def test_similarity_prints_the_matrix(command, mean_encoder):
    code, out, _ = command("similarity", "--model", mean_encoder, "One.", "One.", "Another thing")
    assert code == 0
    rows = np.array([float(cell) for cell in out.replace("[", " ").replace("]", " ").split()])
    rows = rows.reshape(3, 3)
    assert np.allclose(rows[:2, :2], 1)
    assert (rows[2, :2] < 0.99).all()


def test_bench_runs_whole_at_toy_size(tmp_path):
    script = Path(__file__).parent.parent / "bench/embed.py"
    output = ["--output", tmp_path / "figures.json"]
    command = [sys.executable, script, "--quick", "--forms", "", *output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(wanted >= 0.99999) met" in done.stdout
    assert read_json(tmp_path / "figures.json")["seconds"]
