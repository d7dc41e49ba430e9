"""Our encoder embeds as sentence-transformers does, whichever version wrote the folder, in any
order, width, precision and number of processes.
"""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.embedding.encoder import TextEncoder, encoder_folder, read_texts, token_batches
from qwen3_encdec.folders import InputError, read_json, write_json

TEXTS = ["", "One.", "A few more words to read.", "naïve <|im_end|> text"]
TEXTS += ["word " * 700, "short", "x" * 90, "Two."]


@pytest.fixture
def fp32(prompted_encoder):
    return TextEncoder(prompted_encoder, dtype=torch.float32)


def stock(folder, **options):
    kwargs = {"dtype": torch.float32}
    return SentenceTransformer(str(folder), device="cpu", model_kwargs=kwargs, **options)


def near(found, expected):
    return np.allclose(found, expected, atol=2e-6)


def changed(folder, file, **changes):
    write_json(folder / file, read_json(folder / file) | changes)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_embeddings_are_those_of_sentence_transformers(init_folder, tmp_path, pooling):
    encoder = tmp_path / pooling
    extract_encoder(init_folder, encoder, pooling=pooling, max_seq_length=200)
    ours = TextEncoder(encoder, dtype=torch.float32)
    assert near(ours.encode(TEXTS), stock(encoder).encode(TEXTS))
    assert ours.num_cut == 1
    causal = stock(encoder, config_kwargs={"is_causal": True})
    assert not np.allclose(ours.encode(TEXTS), causal.encode(TEXTS), atol=1e-2)


@pytest.mark.parametrize("budget", [1, 7, 64, 10_000])
def test_no_text_depends_on_its_batch(fp32, budget):
    alone = np.concatenate([fp32.encode([text]) for text in TEXTS])
    assert near(fp32.encode(TEXTS, batch_tokens=budget), alone)
    assert not np.allclose(fp32.encode(TEXTS[::-1], batch_tokens=budget), alone, atol=1e-2)


def test_batches_hold_every_text_once_and_about_the_budget():
    lengths = np.array([3, 900, 3, 3, 50, 1, 50, 3])
    batches = token_batches(lengths, 100)
    assert sorted(np.concatenate(batches).tolist()) == list(range(8))
    assert [int(lengths[batch].sum()) for batch in batches] == [900, 100, 13]
    # Beside another text, the mask of a long one would be quadratic in its length.
    assert [len(batch) for batch in token_batches(np.array([20, 950, 20]), 100)] == [1, 2]


def test_an_accelerator_that_cannot_pool_is_left_alone(prompted_encoder, monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("mps")
    )
    assert TextEncoder(prompted_encoder).device.type == "cpu"


def test_batches_are_small_where_a_packed_batch_needs_a_mask(fp32):
    fp32.device = torch.device("cuda")
    assert fp32.batch_tokens == 1024  # no varlen kernel takes fp32
    fp32.dtype = torch.bfloat16
    assert fp32.batch_tokens == 32_768


def test_dimensions_are_cut_and_normalized_again(fp32, prompted_encoder):
    expected = stock(prompted_encoder, truncate_dim=10).encode(TEXTS, normalize_embeddings=True)
    assert near(fp32.encode(TEXTS, dimensions=10), expected)


def test_bfloat16_is_near_and_the_default_where_it_is_native(fp32, prompted_encoder, monkeypatch):
    near = TextEncoder(prompted_encoder, dtype=torch.bfloat16).encode(TEXTS)
    cosines = (near * fp32.encode(TEXTS)).sum(1)
    assert 0.99 < cosines.min() < 1 - 1e-6
    for name, expected in (("amx_bf16", torch.bfloat16), ("avx2", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert TextEncoder(prompted_encoder, device="cpu").dtype == expected


SETTINGS = {
    "prompts": {"query": "query: ", "passage": "text: ", "document": None},
    "default_prompt_name": "query",
    "truncate_dim": 16,
}


def of_this_version(folder):
    """The length limit is in the tokenizer alone."""
    model = SentenceTransformer(str(folder), device="cpu", **SETTINGS)
    model.max_seq_length = 30
    model.save_pretrained(str(folder))
    (folder / "sentence_bert_config.json").unlink()  # optional


def of_older_versions(folder):
    """Flags for the pooling, and the limit in the transformer's own file."""
    pooling = read_json(folder / "1_Pooling/config.json")
    del pooling["pooling_mode"]
    write_json(folder / "1_Pooling/config.json", pooling)
    changed(folder, "sentence_bert_config.json", max_seq_length=30)
    changed(folder, "config_sentence_transformers.json", **SETTINGS)


def of_other_tools(folder):
    """Texts are cut on the left, weights are of mixed dtypes, and dimensions exceed the width."""
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: t.bfloat16() if "mlp" in name else t for name, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    changed(folder, "tokenizer_config.json", truncation_side="left")
    changed(folder, "config_sentence_transformers.json", truncate_dim=400)


@pytest.mark.parametrize("write", [of_this_version, of_older_versions, of_other_tools])
def test_folders_are_read_as_sentence_transformers_reads_them(prompted_encoder, tmp_path, write):
    folder = shutil.copytree(prompted_encoder, tmp_path / "folder")
    write(folder)
    ours, theirs = TextEncoder(folder, dtype=torch.float32), stock(folder)
    assert ours.max_tokens == theirs.max_seq_length
    assert near(ours.encode(TEXTS), theirs.encode(TEXTS))
    query, document = (ours.encode(TEXTS, prompt_name=role) for role in ("query", "document"))
    assert near(query, theirs.encode_query(TEXTS))
    assert near(document, theirs.encode_document(TEXTS))
    assert np.abs(query - document).max() > 0.01
    assert query.shape == (len(TEXTS), ours.layout.dimensions)
    assert near(ours.encode(TEXTS, dimensions=40), theirs.encode(TEXTS, truncate_dim=40))


def test_any_number_of_texts_in_any_chunks(fp32, monkeypatch):
    expected = fp32.encode(TEXTS)
    assert np.array_equal(fp32.encode("A text."), fp32.encode(["A text."])[0])
    assert fp32.encode([]).shape == (0, 40)
    monkeypatch.setattr("qwen3_encdec.embedding.encoder._CHUNK", 3)
    assert near(fp32.encode(text for text in TEXTS), expected)
    assert near(fp32.encode(pd.Series(TEXTS)), expected)
    submitted = []
    tokenize = fp32.tokenize
    monkeypatch.setattr(
        fp32, "tokenize", lambda *given: submitted.append(given) or tokenize(*given)
    )
    ahead = fp32._tokenize_ahead(TEXTS * 3, "")
    next(ahead)
    ahead.close()
    assert len(submitted) <= 2  # of eight chunks


def test_embeddings_are_in_memory_once(fp32, monkeypatch):
    """And of the kept dimensions alone."""
    fp32.layout = replace(fp32.layout, width=50_000, dimensions=20_000)
    monkeypatch.setattr("qwen3_encdec.embedding.encoder._CHUNK", 3)
    monkeypatch.setattr(fp32, "_embed", lambda ids, _: np.zeros((len(ids), 50_000), np.float32))
    tracemalloc.start()
    size = fp32.encode(TEXTS * 20).nbytes
    assert size == 160 * 80_000
    assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (None, "texts must be a str or a list of them, got NoneType"),
        (7, "texts must be a str or a list of them, got int"),
        ({"text": "a"}, "texts must be a str or a list of them, got dict"),
        (pd.DataFrame({"text": ["a"]}), "texts must be a str or a list of them, got DataFrame"),
        ({"a", "b"}, "texts must be a str or a list of them, got set"),
        (b"ab", "texts must be a str or a list of them, got bytes"),
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


def test_very_long_text_and_max_tokens(prompted_encoder):
    text = "many words " * 50_000
    encoder = TextEncoder(prompted_encoder, dtype=torch.float32, max_tokens=300)
    tokens = encoder.tokenize([text, "short"])
    assert len(tokens.ids[0]) == 300
    assert tokens.ids[0][-1] == read_json(prompted_encoder / "config.json")["eos_token_id"]
    assert tokens.cut == [True, False]
    with pytest.raises(InputError, match=r"max_tokens 90000 must be between 2 and 32768"):
        TextEncoder(prompted_encoder, max_tokens=90_000)


def test_an_encoder_decoder_is_taken_apart_and_that_is_said(init_folder, fp32, capsys):
    encoder = TextEncoder(init_folder, dtype=torch.float32, max_tokens=200)
    assert "is an encoder-decoder: using its encoder, mean-pooled" in capsys.readouterr().err
    assert near(encoder.encode(TEXTS), fp32.encode(TEXTS))
    with encoder_folder(init_folder) as folder:
        assert (folder / "modules.json").exists()
    assert not folder.exists()


def test_what_is_no_encoder_is_refused(prompted_encoder, parent_folder, tmp_path):
    causal = changed(
        shutil.copytree(prompted_encoder, tmp_path / "causal"), "config.json", is_causal=1
    )
    for folder in (tmp_path / "nowhere", parent_folder, causal):
        with pytest.raises(InputError, match="is not an encoder folder; make one with: qwen3-enc"):
            TextEncoder(folder)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling 'max' must be mean"),
        ("config.json", {"hidden_size": "40"}, "malformed settings: Validation error .*hidden"),
        ("config.json", {"layer_types": ["sliding_attention"] * 3}, "sliding-window layers"),
        ("config.json", {"intermediate_size": 64}, r"down_proj.weight is \(40, 56\), expected"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "has malformed settings"),
        ("config_sentence_transformers.json", {"truncate_dim": "9"}, "has malformed settings"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, "has malformed settings"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "sets do_lower_case"),
        ("sentence_bert_config.json", {"query_length": 9}, "sets query_length"),
    ],
)
def test_settings_that_cannot_be_read_are_named(
    prompted_encoder, tmp_path, file, changes, sentence
):
    folder = changed(shutil.copytree(prompted_encoder, tmp_path / "folder"), file, **changes)
    with pytest.raises(InputError, match=sentence):
        TextEncoder(folder)


def test_damaged_files_are_named(prompted_encoder, tmp_path):
    folder = shutil.copytree(prompted_encoder, tmp_path / "folder")

    def refused(sentence):
        with pytest.raises(InputError, match=sentence):
            TextEncoder(folder)

    weights, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    refused("tensor encoder.norm.weight contains NaN or infinity")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("model.safetensors is truncated")
    (folder / "tokenizer.json").write_text("{}")
    refused("tokenizer of .* cannot be read")
    (folder / "sentence_bert_config.json").write_text("[]")
    refused("holds a JSON list, not a dict")


def test_embed_from_stdin_to_npy(command, prompted_encoder, tmp_path, fp32):
    output, lines = tmp_path / "new" / "x.npy", "".join(f"{text}\n" for text in TEXTS)
    paths = ("--model", prompted_encoder, "--input", "-", "--output", output)
    code, out, _ = command("embed", *paths, "--dtype", "float32", stdin=lines)
    assert code == 0
    assert "8 texts in float32, 1 cut at 200 tokens: (8, 40) float32" in out
    assert near(np.load(output), fp32.encode(TEXTS))
    assert [file.name for file in output.parent.iterdir()] == ["x.npy"]


def test_embed_from_jsonl_to_parquet_with_prompt_and_dimensions(
    command, prompted_encoder, tmp_path, fp32, monkeypatch
):
    monkeypatch.setattr("qwen3_encdec.embedding.encoder._CHUNK", 3)
    lines = "\n".join(json.dumps({"body": text}) for text in TEXTS)
    source, output = tmp_path / "texts.jsonl.gz", tmp_path / "x.parquet"
    source.write_bytes(gzip.compress(lines.encode()))
    paths = ("--model", prompted_encoder, "--input", source, "--output", output)
    options = ("--text-column", "body", "--prompt-name", "query", "--dimensions", 8)
    code, _, err = command("embed", *paths, *options, "--dtype", "float32")
    assert code == 0, err
    assert pq.ParquetFile(output).num_row_groups == 3
    table = pq.read_table(output)
    assert table["text"].to_pylist() == TEXTS
    found = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    assert near(found, fp32.encode(TEXTS, prompt_name="query", dimensions=8))


@pytest.mark.parametrize(
    ("output", "arguments", "sentence"),
    [
        ("x.csv", (), "must be a file ending in .npy or .parquet"),
        ("folder.npy", (), "must be a file ending in .npy or .parquet"),
        ("texts.txt/x.npy", (), "output texts.txt/x.npy cannot be written: "),
        ("folder.npy/in.parquet", ("--input", "folder.npy"), "is part of the input folder.npy"),
        ("texts.parquet", ("--input", "*.parquet"), "is part of the input *.parquet"),
        ("x.npy", ("--input", "nowhere.txt"), "no such file"),
        ("x.npy", ("--input", "empty.txt"), "empty"),
        ("x.npy", ("--input", "-"), "input - contains no texts"),
        ("x.npy", ("--model", "nowhere"), "is not an encoder folder"),
        ("x.npy", ("--dimensions", "41"), "dimensions 41 must be between 1 and 40"),
    ],
)
def test_embed_refuses_and_writes_nothing(
    command, prompted_encoder, tmp_path, monkeypatch, output, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "texts.parquet").touch()
    (tmp_path / "folder.npy").mkdir()
    paths = ("--model", prompted_encoder, "--input", "texts.txt", "--output", output)
    code, _, err = command("embed", *paths, *arguments)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert len(list(tmp_path.rglob("*"))) == 4


def test_standard_input_that_is_not_utf8_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    with pytest.raises(InputError, match="standard input is not UTF-8"):
        read_texts("-")


def test_similarity_prints_the_matrix(command, prompted_encoder):
    texts = ("One.", "One.", "Another thing")
    code, out, _ = command("similarity", "--model", prompted_encoder, *texts)
    rows = [line.split() for line in out.splitlines()]
    assert (code, rows[0][:2], rows[1][:2]) == (0, ["1.000"] * 2, ["1.000"] * 2)
    assert float(rows[2][0]) < 0.99


def test_bench_runs_whole_at_toy_size(tmp_path):
    script = Path(__file__).parent.parent / "bench/embed.py"
    output = ["--output", tmp_path / "figures.json"]
    command = [sys.executable, script, "--quick", *output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(wanted >= 0.99999) met" in done.stdout
    assert read_json(tmp_path / "figures.json")["seconds"]
