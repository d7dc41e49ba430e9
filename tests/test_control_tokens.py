"""Corpus text that spells control tokens, over a base checkpoint with Qwen's own flags.

Qwen marks twelve of its added tokens as not special, and `split_special_tokens` splits special ones
only: a tokenizer that keeps those flags turns corpus text into control tokens.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from qwen3_encdec import Qwen3EncoderDecoderTokenizer
from qwen3_encdec.conversion.initialize import initialize
from qwen3_encdec.data import tokenization
from qwen3_encdec.data.collate import collate_rows
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import UL2Data, rows
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.folders import load_tokenizer
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer
from tests.conftest import ORDINARY_ADDED_TOKENS, save_qwen_tokenizer

BYTE_TOKENS = 512


def added_tokens(tokenizer) -> dict[str, bool]:
    """Spelling of every added token -> whether it is special."""
    decoder = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: token.special for token in decoder.values()}


@pytest.fixture(scope="module")
def spelled(init_folder) -> list[str]:
    """Texts of ours that hold every added token, the checkpoint's and the sentinels."""
    tokens = added_tokens(Qwen3EncoderDecoderTokenizer.from_pretrained(init_folder))
    assert {*ORDINARY_ADDED_TOKENS, "<|im_end|>", "<extra_id_10>"} < tokens.keys()
    return [f"text before {token} and{token}after, number {i}" for i, token in enumerate(tokens)]


@pytest.fixture(scope="module")
def corpus(spelled, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("spelled") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in spelled))
    return path


@pytest.fixture(scope="module")
def with_qwen_flags(init_folder, tmp_path_factory) -> Path:
    """The control: the same folder, its tokenizer with the flags that Qwen ships."""
    folder = shutil.copytree(init_folder, tmp_path_factory.mktemp("control") / "init")
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] not in ORDINARY_ADDED_TOKENS
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize("base", ["package", "checkpoint", "tokenizer"])
def test_every_added_token_is_special_whatever_the_base(base, parent_folder, tmp_path):
    if base == "package":
        tokenizer = build_tokenizer(None, 11, num_ranks=BYTE_TOKENS)
    elif base == "checkpoint":
        flags = added_tokens(AutoTokenizer.from_pretrained(parent_folder))
        ordinary = {token for token, special in flags.items() if not special}
        assert ordinary == set(ORDINARY_ADDED_TOKENS)
        tokenizer = build_tokenizer(parent_folder, 11)
    else:
        save_qwen_tokenizer(tmp_path / "base")
        tokenizer = build_tokenizer(tmp_path / "base", 11)
    assert len(added_tokens(tokenizer)) == len(tokenizer) - BYTE_TOKENS == 139
    assert all(added_tokens(tokenizer).values())
    tokenizer.save_pretrained(tmp_path / "saved")
    assert all(added_tokens(AutoTokenizer.from_pretrained(tmp_path / "saved")).values())


def tokenized(run_script, corpus: Path, folder: Path, output: Path) -> list[list[int]]:
    """Ids of each document as `scripts/prepare_ul2_data.py` writes them."""
    arguments = ["--tokenizer", folder, "--input", corpus, "--output", output, "--processes", "1"]
    code, _, error = run_script("scripts/prepare_ul2_data.py", *arguments)
    assert code == 0, error
    documents = []
    for file in output.glob("**/*.parquet"):
        table = pq.read_table(file)
        (column,) = [field.name for field in table.schema if "list" in str(field.type)]
        documents += table[column].to_pylist()
    return documents


def test_prepared_corpora_hold_no_control_token(
    init_folder, with_qwen_flags, corpus, spelled, run_script, tmp_path
):
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(init_folder)
    documents = tokenized(run_script, corpus, init_folder, tmp_path / "ours")
    assert max(max(ids) for ids in documents) < BYTE_TOKENS
    assert sorted(tokenizer.decode(ids) for ids in documents) == sorted(spelled)
    control = tokenized(run_script, corpus, with_qwen_flags, tmp_path / "wrong")
    smuggled = {i for ids in control for i in ids if i >= BYTE_TOKENS}
    assert smuggled == set(tokenizer.convert_tokens_to_ids(list(ORDINARY_ADDED_TOKENS)))


def test_examples_hold_no_control_token(init_folder, with_qwen_flags, corpus):
    """Prefix to suffix is the only denoiser, which inserts no sentinel."""
    suffix = {"name": "S", "mean_span": None, "corruption": 0.75}
    config = DataConfig(inputs=[str(corpus)], preset=[suffix], heldout_every=1000)
    tokenizer = load_tokenizer(init_folder)

    def controls(folder: Path) -> set[int]:
        made = rows(UL2Data(config, load_tokenizer(folder)), epochs=1)
        batch = collate_rows(list(made))
        ids = {*batch["input_ids"].unique().tolist(), *batch["labels"].unique().tolist()}
        return {i for i in ids if i >= BYTE_TOKENS} - {tokenizer.eos_token_id}

    assert not controls(init_folder)
    think = tokenizer.convert_tokens_to_ids(list(ORDINARY_ADDED_TOKENS))
    assert controls(with_qwen_flags) == set(think)


def test_a_real_checkpoint_is_encoded_fast(init_folder, with_qwen_flags, spelled, caplog):
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(init_folder)
    fast = Encoder(tokenizer)
    assert fast.fallback_reason is None
    for text in spelled:
        slow = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert fast(text).tolist() == slow
    assert not caplog.text
    tokenization.logging.warning_once.cache_clear()
    wrong = Qwen3EncoderDecoderTokenizer.from_pretrained(with_qwen_flags)
    think = wrong.convert_tokens_to_ids("<think>")
    control = Encoder(wrong)
    assert control("<think>").tolist() == [think]
    assert "rebuild the tokenizer with initialize" in caplog.text


def test_verification_allows_any_pad(parent_folder, tmp_path):
    """`<|endoftext|>` may have id 0, as in SmolLM2's vocabulary."""
    folder = shutil.copytree(parent_folder, tmp_path / "base")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    spec = json.loads((folder / "tokenizer.json").read_text())
    controls = len(spec["added_tokens"])
    vocabulary = {token: i + controls for token, i in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        token["id"] -= BYTE_TOKENS
        vocabulary[token["content"]] = token["id"]
    spec["model"]["vocab"] = vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    report = initialize(folder, tmp_path / "init", num_sentinel_tokens=3)
    assert report.verification.passed
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(tmp_path / "init")
    assert tokenizer.pad_token_id == 0
    assert torch.tensor(Encoder(tokenizer)("text <think> text")).min() >= controls
