"""Checkpoints and datasets that come from a hub, through the clients that users have."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer, qwen3_backend
from tests.hub import Hub, serve

FILES, TEXTS = 5, 40


def text_of(file: int, line: int) -> str:
    return f"Document {line} of file {file} says that " + f"{file} and {line} are numbers. " * 4


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A base checkpoint, and a dataset of five files as uneven as 1 to 5."""
    root = tmp_path_factory.mktemp("hub")
    model = root / "models/org/base"
    model.mkdir(parents=True)
    qwen3_backend(512).save(str(model / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(named))
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 640}))
    for revision, texts in (("", TEXTS), ("@v1", 3)):
        dataset = root / f"datasets/org/texts{revision}"
        dataset.mkdir(parents=True)
        for file in range(FILES):
            lines = [{"text": text_of(file, line)} for line in range(texts * (file + 1))]
            body = "".join(json.dumps(line) + "\n" for line in lines)
            (dataset / f"data-{file}.jsonl").write_text(body)
    return root


@pytest.fixture
def hub(root):
    with serve(root) as hub:
        yield hub


def client(hub: Hub, cache: Path, code: str, **changes: str) -> str:
    """Output of a program that sees this hub: what it prints, or how it dies."""
    environment = hub.environment(cache, **changes)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout if done.returncode == 0 else done.stderr


def test_the_ordinary_clients_read_it(hub, tmp_path):
    code = """
from datasets import load_dataset
from huggingface_hub import HfApi, hf_hub_download
from transformers import AutoConfig
print(AutoConfig.from_pretrained("org/base").vocab_size)
print(load_dataset("org/texts", split="train").num_rows)
print(sum(1 for _ in load_dataset("org/texts", split="train", streaming=True, revision="v1")))
print(sorted(file.path for file in HfApi().list_repo_tree("org/texts", repo_type="dataset"))[0])
print(open(hf_hub_download("org/base", "config.json")).read())
"""
    printed = client(hub, tmp_path, code).splitlines()
    texts = sum(range(1, FILES + 1))
    config = (hub.root / "models/org/base/config.json").read_text()
    assert printed[-5:] == ["640", str(TEXTS * texts), str(3 * texts), "data-0.jsonl", config]
    assert any("/revision/" in request for request in hub.requests)


def test_a_gated_and_a_missing_repository(hub, tmp_path):
    code = "from transformers import AutoConfig; print(AutoConfig.from_pretrained('org/base'))"
    hub.gated.add("org/base")
    assert "gated" in client(hub, tmp_path / "a", code)
    assert '"vocab_size": 640' in client(hub, tmp_path / "b", code, HF_TOKEN=hub.token)
    hub.gone.add("org/base")
    assert "not a valid model identifier" in client(hub, tmp_path / "c", code, HF_TOKEN=hub.token)


def test_a_tokenizer_by_hub_id_is_that_of_the_folder(hub, tmp_path):
    text = "Ünïcödé 12,345 -- isn't it? <think> 你好 <|im_end|>"
    code = f"""
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer
tokenizer = build_tokenizer("org/base", num_sentinel_tokens=11)
print(len(tokenizer), tokenizer({text!r}, split_special_tokens=True)["input_ids"])
"""
    ours = build_tokenizer(hub.root / "models/org/base", num_sentinel_tokens=11)
    ids = ours(text, split_special_tokens=True)["input_ids"]
    assert client(hub, tmp_path, code).splitlines()[-1] == f"{len(ours)} {ids}"
