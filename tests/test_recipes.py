"""Each shipped recipe for real, at nano size, on a checkpoint and a dataset that come from a hub.

Initialize, train, interrupt, resume, extract and evaluate, by the commands, with the recipe's own
workers. Only the size is another: steps, lengths, rows, a hub id of the fixture, and no compiling.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from qwen3_encdec.tokenization_qwen3_encdec import CONTROL_TOKENS
from tests.hub import Hub, serve

ROOT = Path(__file__).parent.parent
RECIPES = [
    *sorted((ROOT / "configs/recipes").glob("*.yaml")),
    ROOT / "configs/training_config.yaml",
]
TEXT = "the encoder reads a source and its decoder writes one target of many tokens 0 1 23"
WORDS = TEXT.split()
CLI = "from qwen3_encdec.cli import main; main()"
STEPS = 8
SIZE = [
    f"max_steps={STEPS}", "warmup_steps=1", "batch_size=2", "gradient_accumulation_steps=1",
    "compile=false", "log_every=1", "save_every=2", "eval_every=4", "eval_examples_per_denoiser=2",
    "trackers=[]", "data.source_length=96", "data.target_length=64", "data.heldout_every=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def hub(parent_folder, tmp_path_factory):
    """A base checkpoint with Qwen's own flags on added tokens, and a dataset that spells them."""
    root = tmp_path_factory.mktemp("hub")
    model = root / "models/org/qwen3-nano"
    shutil.copytree(parent_folder, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        spec = json.loads((model / name).read_text())
        added = spec.get("added_tokens", spec.get("added_tokens_decoder", {}))
        for token in added if isinstance(added, list) else added.values():
            # Qwen ships <think>, <tool_call> and others as added tokens that are not special.
            token["special"] = token["content"] in CONTROL_TOKENS[:14]
        (model / name).write_text(json.dumps(spec))
    dataset = root / "datasets/org/texts"
    dataset.mkdir(parents=True)
    rng = random.Random(0)
    for file in range(3):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(20, 200))) for _ in range(150)]
        texts += [f"{token} spelled in a text of the corpus" for token in CONTROL_TOKENS]
        body = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (dataset / f"train-{file}.jsonl").write_text(body)
    with serve(root) as hub:
        yield hub


@pytest.fixture(scope="module")
def environment(hub: Hub, tmp_path_factory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    return hub.environment(cache, XDG_CACHE_HOME=str(cache), OMP_NUM_THREADS="1")


def command(environment, *arguments, launcher=("-c", CLI)) -> str:
    called = [sys.executable, *launcher, *map(str, arguments)]
    done = subprocess.run(called, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def initialized(environment, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("initialized") / "encdec"
    arguments = ("--qwen3-model", "org/qwen3-nano", "--output-dir", folder)
    command(environment, "initialize", *arguments)
    return folder


def steps_of(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


def interrupt(environment, run: Path, *arguments: str) -> None:
    """Train until two steps are done, then ask it to stop as a scheduler does."""
    called = [sys.executable, *arguments]
    process = subprocess.Popen(
        called, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(6000):
        if max(steps_of(run), default=0) >= 2 or process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1][-3000:]
    (run / "STOP").touch()
    process.communicate(timeout=300)
    process.send_signal(signal.SIGKILL) if process.poll() is None else None


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_from_the_hub_to_an_evaluated_encoder(
    recipe, ranks, environment, initialized, tmp_path
):
    run, encoder = tmp_path / "run", tmp_path / "encoder"
    settings = yaml.safe_load(recipe.read_text())
    overrides = [*SIZE, f"model={initialized}", f"output_dir={run}"]
    if settings["data"]["inputs"] != ["package-docs"]:
        overrides.append("data.inputs=[org/texts]")
    launch = ["scripts/train.py", "--config", str(recipe), *overrides]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launch = launcher + launch
    interrupt(environment, run, *launch)
    stopped = max(steps_of(run))
    assert 2 <= stopped < STEPS, "it was not interrupted"
    resumed = command(environment, launcher=launch)
    assert "resuming from" in resumed
    assert steps_of(run)[-1] == STEPS
    assert (run / "heldout.json").exists()
    command(environment, "extract", "--checkpoint", run, "--output-dir", encoder)
    arguments = ("--model", run, "--output", tmp_path / "evaluation")
    command(environment, "evaluate", *arguments, "--initialization", initialized)
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert metrics["denoising"]
    assert json.loads((encoder / "config.json").read_text())["is_causal"] is False
