"""Tiny real models: odd sizes everywhere, head_dim != hidden / heads, a vocabulary cut from Qwen3's
own.
"""

import io
import itertools
import json
import os
import runpy
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny: threads would wait for each other

from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM, T5Config
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.utils import logging

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM, cli
from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.conversion.initialize import initialize
from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer, qwen3_backend
from qwen3_encdec.training.config import TrainingConfig, load_config

logging.disable_progress_bar()


def flash_by_hand(module, query, key, value, mask, scaling, dropout, is_causal, **lengths):
    """Attend as flash-attention documents it: row by row, bottom-right causal.

    A padding mask or cumulative lengths say which queries and keys [row, positions] meet.
    """
    if lengths:
        assert mask is None
        bounds = [lengths[f"cu_seq_lens_{side}"].tolist() for side in "qk"]
        for side, limit in zip(bounds, ("max_length_q", "max_length_k"), strict=True):
            longest = max(b - a for a, b in itertools.pairwise(side))
            assert longest <= lengths[limit] < longest + 20
        pairs = zip(*(itertools.pairwise(side) for side in bounds), strict=True)
        documents = [(0, torch.arange(*of_q), torch.arange(*of_k)) for of_q, of_k in pairs]
    else:
        keys = torch.ones(query.shape[0], key.shape[2]) if mask is None else mask
        queries = keys[:, -query.shape[2] :]
        if query.shape[2] == 1:
            queries = torch.ones(query.shape[0], 1)
        documents = [
            (row, queries[row].nonzero()[:, 0], k.nonzero()[:, 0]) for row, k in enumerate(keys)
        ]
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    outputs = torch.zeros_like(query)
    for row, q, k in documents:
        scores = query[row][:, q] @ key[row][:, k].transpose(1, 2) * scaling
        if is_causal:
            seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            scores = scores.masked_fill(~seen, float("-inf"))
        outputs[row][:, q] = scores.softmax(-1) @ value[row][:, k]
    return outputs.transpose(1, 2), None


AttentionInterface.register("flash_by_hand", flash_by_hand)
AttentionMaskInterface.register("flash_by_hand", flash_attention_mask)
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_by_hand")


@pytest.fixture(autouse=True)
def _compiler():
    """Undo `use_backend`: compiled models of later tests would run eagerly."""
    yield
    torch.compiler.set_stance("default")


def use_backend(model, name: str):
    """`set_attn_implementation`, and around its check that a flash package is installed."""
    if name == "flash_by_hand":
        model.config._attn_implementation = name
    else:
        model.set_attn_implementation(name)
    # FlexAttention compiles itself and has no backward on a CPU: what it computes is shown by its
    # eager form.
    torch.compiler.set_stance("force_eager" if name == "flex_attention" else "default")
    return model.requires_grad_(name != "flex_attention")


SIZES = {
    "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 14, "initializer_range": 0.2,
}  # fmt: skip


def tiny_config(**changes) -> Qwen3EncoderDecoderConfig:
    ids = {"vocab_size": 331, "num_sentinel_tokens": 11, "pad_token_id": 300, "eos_token_id": 302}
    return Qwen3EncoderDecoderConfig(**{**SIZES, **ids, **changes})


def tiny_qwen3_config(**changes) -> Qwen3Config:
    return Qwen3Config(**{**SIZES, "vocab_size": 640, "tie_word_embeddings": True, **changes})


def tiny_t5_config(**changes) -> T5Config:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ids = {"pad_token_id": 300, "eos_token_id": 302, "decoder_start_token_id": 300}
    return T5Config(**{**sizes, **ids, "dropout_rate": 0, **changes})


def pack(inputs: dict[str, torch.Tensor]) -> dict:
    """The packed form of a padded batch of `input_ids`, `attention_mask` and `labels`."""
    sources = [
        row[mask.bool()].numpy()
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    targets = [row[row != -100].numpy() for row in inputs["labels"]]
    return collate_packed(sources, targets)


# Several processes each, or minutes of computing: `make test-all` runs these, `make test` does not.
SLOW_FILES = {"test_distributed.py", "test_chaos.py"}


def pytest_collection_modifyitems(items):
    """Mark what is slow file by file; single tests carry the mark themselves."""
    for item in items:
        if item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a Python file as a program in this process: no second import of torch.

    Returns (exit code, standard output, standard error).
    """

    def call(path, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(Path(path).parent))
        code = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `qwen3-encdec ...` in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qwen3-encdec", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return stop.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """An empty cache of unpacked files."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "qwen3-encdec"


@pytest.fixture
def config() -> Qwen3EncoderDecoderConfig:
    return tiny_config()


@pytest.fixture
def model(config) -> Qwen3ForSeq2SeqLM:
    torch.manual_seed(0)
    return Qwen3ForSeq2SeqLM(config).eval()


@pytest.fixture
def source() -> dict[str, torch.Tensor]:
    """Three texts of nine, six and six tokens, one padded on each side."""
    ids = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def tokenizer():
    """395 tokens, 11 of them sentinels; pad and EOS are those of `tiny_config`."""
    return build_tokenizer(num_sentinel_tokens=11, num_ranks=300)


ORDINARY_ADDED_TOKENS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
"""Added tokens that Qwen's own folders do not mark as special."""


def save_qwen_tokenizer(folder: Path, num_ranks: int = 512) -> None:
    """Write the tokenizer files of a Qwen3 checkpoint, with Qwen's own flags on added tokens."""
    spec = json.loads(qwen3_backend(num_ranks).to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] not in ORDINARY_ADDED_TOKENS
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    added = {str(token.pop("id")): token for token in map(dict, spec["added_tokens"])}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [
            token["content"] for token in added.values() if token["special"]
        ],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


@pytest.fixture(scope="session")
def parent_folder(tmp_path_factory) -> Path:
    """An ordinary Qwen3 checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("parent")
    torch.manual_seed(0)
    Qwen3ForCausalLM(tiny_qwen3_config()).save_pretrained(folder)
    save_qwen_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def init_folder(parent_folder, tmp_path_factory) -> Path:
    """The encoder-decoder initialized from `parent_folder`."""
    folder = tmp_path_factory.mktemp("init") / "encdec"
    initialize(parent_folder, folder, num_sentinel_tokens=11)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(init_folder, tmp_path_factory) -> Path:
    """The encoder extracted from `init_folder` with default settings."""
    folder = tmp_path_factory.mktemp("encoder") / "out"
    extract_encoder(init_folder, folder)
    return folder


@pytest.fixture(scope="session")
def prompted_encoder(init_folder, tmp_path_factory) -> Path:
    """The same encoder, named `mean`, with a prompt for queries and a limit of 200 tokens."""
    folder = tmp_path_factory.mktemp("prompted") / "mean"
    extract_encoder(init_folder, folder, max_seq_length=200)
    file = folder / "config_sentence_transformers.json"
    prompts = {"query": "query: ", "document": ""}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prompts": prompts}))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Documents of different lengths: micro-batches and ranks hold different numbers of tokens."""
    text = "the loss of an optimizer step is a sum over its target tokens"
    words = text.split()
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w") as file:
        for _ in range(120):
            length = int(torch.randint(5, 60, (), generator=generator))
            chosen = torch.randint(len(words), (length,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(words[i] for i in chosen)}) + "\n")
    return path


SMALL = {
    "max_steps": 4, "warmup_steps": 1, "lr": 3e-3, "batch_size": 2, "log_every": 1, "save_every": 2,
    "keep_last": 0, "eval_every": 2, "eval_examples_per_denoiser": 2, "trackers": "[]",
    "num_workers": 0, "data.heldout_every": 10, "data.source_length": 64, "data.target_length": 64,
    "max_grad_norm": 0.5,
    # At this lr, 200 times it would throw the gates to and fro, and rounding with them.
    "source_gate_lr_multiplier": 10.0,
}  # fmt: skip


def small_settings(folder: Path, corpus: Path, **changes) -> list[str]:
    settings = {"model": folder, "data.inputs": f"[{corpus}]", "output_dir": corpus.parent / "run"}
    return [f"{key}={value}" for key, value in (settings | SMALL | changes).items()]


def small_run(folder: Path, corpus: Path, **changes) -> TrainingConfig:
    return load_config(None, small_settings(folder, corpus, **changes))


@pytest.fixture
def train(init_folder, corpus, tmp_path):
    """Train a small run in `tmp_path / "run"`; keywords change its settings."""
    from qwen3_encdec.training.loop import run_training

    def call(model: Path = init_folder, inputs: Path = corpus, **changes) -> Path:
        settings = {"output_dir": tmp_path / "run"} | changes
        return run_training(small_run(model, inputs, **settings))

    return call
