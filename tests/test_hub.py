"""Checkpoints and datasets that come from a hub, through the clients that users have."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

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
    dataset = root / "datasets/org/texts"
    dataset.mkdir(parents=True)
    for file in range(FILES):
        lines = [{"text": text_of(file, line)} for line in range(TEXTS * (file + 1))]
        body = "".join(json.dumps(line) + "\n" for line in lines)
        (dataset / f"data-{file}.jsonl").write_text(body)
    both = root / "datasets/org/both"
    for config in ("de", "en"):
        (both / config).mkdir(parents=True)
        (both / config / "a.jsonl").write_text(json.dumps({"text": f"in {config}"}) + "\n")
    configs = [f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("de", "en")]
    (both / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    return root


@pytest.fixture
def hub(root):
    with serve(root) as hub:
        yield hub


def client(hub: Hub, cache: Path, code: str, *arguments: str) -> str:
    """Output of a program that sees this hub: what it prints, or how it dies."""
    environment = hub.environment(cache, PYTHONHASHSEED="0", XDG_CACHE_HOME=str(cache))
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout if done.returncode == 0 else done.stderr


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


READ = """
import re
import sys
from collections import Counter
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import RowLoader, UL2Data
from qwen3_encdec.data.ul2 import uncorrupt
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer
cache_gib, *pairs = sys.argv[1:]
config = DataConfig(
    inputs=["org/texts"], source_length=256, target_length=192, cache_gib=float(cache_gib)
)
tokenizer = build_tokenizer(num_ranks=512)
data = UL2Data(config, tokenizer)
marks = {"sentinel_ids": data.sentinel_ids, "eos_id": data.eos_id}
for pair in pairs:
    workers, ranks = map(int, pair.split(":"))
    loaders = [
        iter(RowLoader(data, batch_size=8 // ranks, rank=rank, ranks=ranks,
                       num_workers=workers, collate=list))
        for rank in range(ranks)
    ]
    made, files = [], Counter()
    for _ in range(12):
        examples = [e for loader in loaders for row in next(loader) for e in row.examples]
        made.append(hash(frozenset(e.source.tobytes() for e in examples)))
        for e in examples:
            text = tokenizer.decode(uncorrupt(e.source, e.target, **marks))
            files[int(re.search("of file (.) says", text)[1])] += 1
    print(*made, "files", *(files[file] for file in range(5)), flush=True)
"""


@pytest.mark.parametrize("cache_gib", [1, 0], ids=["downloaded", "streamed"])
def test_a_hub_dataset_gives_the_same_steps_to_any_workers_and_ranks(hub, tmp_path, cache_gib):
    """In spite of failing requests; and files count by their size."""
    hub.fail_every = 5
    pairs = ("0:1", "1:1", "2:1", "4:1", "2:2", "0:4", "0:8")
    # Of each pair, hashes of its steps, and by file the documents in them.
    first, *others = client(hub, tmp_path, READ, str(cache_gib), *pairs).splitlines()
    assert others == [first] * 6
    made, _, files = first.partition(" files ")
    assert len(set(made.split())) == 12
    found = np.array(files.split(), int)
    assert found.sum() > 200
    assert chisquare(found, np.arange(1, 6) / 15 * found.sum()).pvalue > 1e-3
    # the control: each file as often as any other
    assert chisquare(found, np.full(5, 1 / 5) * found.sum()).pvalue < 1e-3
    assert len(hub.requests) > 20


def test_a_dataset_that_vanishes_in_mid_run(hub, init_folder, tmp_path):
    """A streamed one ends training with one sentence and a checkpoint of the last step."""
    settings = {
        "model": init_folder, "output_dir": tmp_path / "run", "max_steps": 100_000, "log_every": 1,
        "batch_size": 1, "eval_every": 0, "save_every": 0, "num_workers": 1, "trackers": "[]",
        "data.inputs": "[org/texts]", "data.cache_gib": 0, "data.source_length": 64,
        "data.target_length": 64,
    }  # fmt: skip
    code = "from qwen3_encdec.cli import main; main()"
    command = [sys.executable, "-c", code, "train"]
    command += [f"{name}={value}" for name, value in settings.items()]
    environment = hub.environment(tmp_path / "cache", XDG_CACHE_HOME=str(tmp_path / "cache"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    metrics = tmp_path / "run/metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (metrics.exists() and '"loss"' in metrics.read_text()):
            break
        time.sleep(0.1)
    hub.gone.add("org/texts")
    _, said = process.communicate(timeout=200)
    (error,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert error.startswith("error: hf://datasets/org/texts@"), said
    assert "404" in error
    assert process.returncode == 2
    assert "Traceback" not in said
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step-*")
    assert checkpoint.name == f"step-{last:06}"


def test_the_config_of_a_hub_dataset(hub, tmp_path):
    code = """
from qwen3_encdec.data.config import DataConfig, Source
from qwen3_encdec.data.corpus import open_corpus
items = {"train": ("org/both:en", "org/both", "org/none"), "test": ("org/both:en",)}
for split, item in ((split, item) for split in items for item in items[split]):
    try:
        corpus = open_corpus(Source([item]), DataConfig(hub_split=split))
        print([document.content for document in corpus.documents()])
    except ValueError as error:
        print(error)
"""
    texts, config, missing, split = client(hub, tmp_path, code).splitlines()
    assert texts == "['in en']"
    assert split == "input 'org/both:en': no split 'test'; found train"
    assert config.endswith("opened as ORG/NAME or ORG/NAME:CONFIG: Config name is missing.")
    assert missing.startswith("input 'org/none': no such file, and no hub dataset could be opened")


def test_an_encoder_is_pushed_and_read_back(hub, init_folder, tmp_path):
    def extract(repository: str, token: str, output: str) -> subprocess.CompletedProcess:
        command = [
            *(sys.executable, "-c", "from qwen3_encdec.cli import main; main()", "extract"),
            *("--model", init_folder, "--output", tmp_path / output),
            *("--push-to-hub", repository),
        ]
        environment = hub.environment(tmp_path / "cache", HF_TOKEN=token)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    done = extract("org/encoder", hub.token, "encoder")
    assert f"uploaded {hub.url}/org/encoder" in done.stderr
    code = """
from transformers import AutoModel
print(type(AutoModel.from_pretrained("org/encoder")).__name__)
"""
    assert client(hub, tmp_path / "other", code).splitlines()[-1] == "Qwen3Model"
    pushed = hub.root / "models/org/encoder"
    assert (pushed / "README.md").exists()
    assert not (pushed / "qwen3_encdec.json").exists()  # it names local paths
    refused = extract("org/encoder", "wrong", "refused")
    assert refused.returncode == 2
    assert "repository org/encoder cannot be written: " in refused.stderr
    assert not (tmp_path / "refused").exists()  # said before the work
