"""Two processes over gloo, launched as a user launches them:

one sharded run, equal to a run on one process.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors import safe_open

from qwen3_encdec.folders import InputError
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.distributed import make_accelerator
from qwen3_encdec.training.loop import run_training
from tests.test_training import plain_trace, read_metrics, small_run, write_corpus

ROOT = Path(__file__).parents[1]
FSDP2 = ["--config_file", str(ROOT / "configs/accelerate_fsdp2.yaml")]
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
DDP = ["--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"]


def launch(script: Path, *arguments: str, where: list[str] = FSDP2) -> str:
    """Run ``accelerate launch``; returns standard output, shows standard error if it fails."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *where,
        "--main_process_port",
        "0",
        str(script),
    ]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE", "FSDP"))
    }
    done = subprocess.run(
        [*command, *arguments],
        env=environment
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,  # DeepSpeed's first launch on a machine compiles an operator, a minute or two
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAIN = """
import json, sys
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from qwen3_encdec.training.config import load_config
from qwen3_encdec.training.loop import run_training

prepare = Accelerator.prepare

def prepare_and_look(self, model, optimizer):
    model, optimizer = prepare(self, model, optimizer)
    shared = self.unwrap_model(model).model.shared
    inner = self.unwrap_model(model).model
    self.print("LOOK " + json.dumps({
        "one module": inner.encoder.embed_tokens is inner.decoder.embed_tokens is shared,
        "matrices": sum(p.shape == shared.weight.shape for p in model.parameters()),
        "in the optimizer": sum(p is shared.weight for g in optimizer.param_groups for p in g["params"]),
        "sharded": isinstance(shared.weight, DTensor),
        "local rows": getattr(shared.weight, "_local_tensor", shared.weight).shape[0],
    }))
    return model, optimizer

Accelerator.prepare = prepare_and_look
run_training(load_config(None, sys.argv[1:]))
"""


def overrides(folder: Path, corpus: Path, **changes) -> list[str]:
    settings = {
        "model": folder, "max_steps": 4, "warmup_steps": 1, "lr": 3e-3, "batch_size": 2, "log_every": 1,
        "save_every": 2, "keep_last": 0, "eval_every": 0, "trackers": "[]", "gradient_accumulation_steps": 2,
        "data.inputs": f"[{corpus}]", "data.heldout_every": 10, "data.source_length": 64, "data.target_length": 64,
        "max_grad_norm": 0.5,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.mark.parametrize("where", [FSDP2, DDP], ids=["FSDP2", "DDP"])
def test_two_processes_train_one_model(init_folder, corpus, tmp_path, where):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    run_dir = tmp_path / "run"
    printed = launch(script, *overrides(init_folder, corpus, output_dir=run_dir), where=where)
    sharded = where is FSDP2
    assert f"world size 2, {'FSDP2' if sharded else 'DDP'}, cpu/gloo, compute fp32" in printed
    look = json.loads(printed.split("LOOK ")[1].splitlines()[0])
    rows = json.loads((init_folder / "config.json").read_text())["vocab_size"]
    assert look.pop("local rows") == (-(-rows // 2) if sharded else rows)
    assert look == {"one module": True, "matrices": 1, "in the optimizer": 1, "sharded": sharded}

    config = small_run(init_folder, corpus, output_dir=run_dir, gradient_accumulation_steps=2)
    trace = read_metrics(run_dir, "loss", "grad_norm")
    assert len(trace) == 4
    torch.testing.assert_close(trace, list(plain_trace(config, 2)), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            trace, list(plain_trace(config, 2, per_micro_batch=True)), rtol=1e-5, atol=1e-5
        )
    if not sharded:
        return

    # another number of processes goes on with what is left of the data
    fewer = shutil.copytree(run_dir, tmp_path / "fewer", symlinks=True)
    shutil.rmtree(fewer / "checkpoints/step-000004")
    run_training(small_run(init_folder, corpus, output_dir=fewer, gradient_accumulation_steps=4))
    alone = read_metrics(fewer, "loss", "step")
    assert [step for _, step in alone] == [1, 2, 3, 4]
    assert alone[:2] == [(loss, step) for (loss, _), step in zip(trace[:2], (1, 2), strict=True)]
    assert alone[2][0] != trace[2][0]
    assert abs(alone[2][0] - trace[2][0]) < 1

    # the same number of processes resumes to the same bits
    cut = shutil.copytree(run_dir, tmp_path / "cut", symlinks=True)
    shutil.rmtree(cut / "checkpoints/step-000004")
    launch(script, *overrides(init_folder, corpus, output_dir=cut))
    assert read_metrics(cut, "loss", "grad_norm") == trace
    names = [
        f"{name}-0000{rank}-of-00002.safetensors"
        for name in ("model", "state/optimizer")
        for rank in (1, 2)
    ]
    for name in names:
        files = [run / "checkpoints/latest" / name for run in (run_dir, cut)]
        assert files[0].read_bytes() == files[1].read_bytes()
        with safe_open(files[0], "pt") as file:
            assert sum("embed_tokens" in key for key in file.keys()) == 0  # noqa: SIM118


def test_unpatched_accelerate_starts_two_runs(tmp_path):
    """The control: when this fails, accelerate has a route of its own and ours can go."""
    assert hasattr(PartialState, "_prepare_backend")
    script = tmp_path / "count.py"
    script.write_text(
        "import sys\nfrom accelerate import PartialState\n"
        "from qwen3_encdec.training.distributed import allow_distributed_cpu\n"
        "def count(name):\n"
        "    state = PartialState()\n"
        "    sys.stdout.write(f'{name}: process {state.process_index} of {state.num_processes}\\n')\n"
        "count('before')\nPartialState._reset_state()\nallow_distributed_cpu()\ncount('after')\n"
    )
    assert sorted(launch(script).splitlines()) == [
        "after: process 0 of 2",
        "after: process 1 of 2",
        "before: process 0 of 1",
        "before: process 0 of 1",
    ]


def test_no_thread_of_gloos_holds_a_tensor_when_the_interpreter_ends(tmp_path):
    """Without the pause in `release`, every second of these launches ends with SIGABRT."""
    script = tmp_path / "reduce.py"
    script.write_text(
        "import torch\n"
        "from qwen3_encdec.training.config import TrainingConfig\n"
        "from qwen3_encdec.training.distributed import make_accelerator, release\n"
        "accelerator = make_accelerator(TrainingConfig(trackers=[], mixed_precision='no'), '')\n"
        "torch.kept = torch.distributed.distributed_c10d._get_default_group()  # as FSDP2's caches keep it\n"
        "for _ in range(20):\n"
        "    total = accelerator.reduce(torch.tensor([1, 2, 3]), 'sum').tolist()\n"
        "accelerator.print(total)\n"
        "release(accelerator)\n"
    )
    for _ in range(3):
        assert launch(script, where=DDP) == "[2, 4, 6]\n"


def test_processes_that_have_not_met_stop(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match="started 2 processes but accelerate sees 1"):
        make_accelerator(TrainingConfig(trackers=[], mixed_precision="no"), str(tmp_path))


@pytest.mark.parametrize(
    ("stage", "changes", "sentence"),
    [
        ("1", {}, "ZeRO stages 2 and 3, not 1"),
        ("2", {"optimizer": "muon"}, "muon needs whole matrices"),
        ("2", {"ema_decay": 0.9}, "ema_decay needs named weights"),
        ("2", {"mixed_precision": "bf16"}, "mixed_precision: no"),
    ],
)
@pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed: make test-distributed")
def test_what_deepspeed_cannot_do_is_refused(monkeypatch, tmp_path, stage, changes, sentence):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    with pytest.raises(InputError, match=sentence):
        make_accelerator(
            TrainingConfig(**{"trackers": [], "mixed_precision": "no", **changes}), str(tmp_path)
        )


def test_deepspeed_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"DeepSpeed is not installed: pip install qwen3-encdec\[deepspeed\]"
    ):
        make_accelerator(TrainingConfig(trackers=[], mixed_precision="no"), str(tmp_path))


@pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed: make test-distributed")
@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_files_launch(init_folder, corpus, tmp_path, stage):
    script = ROOT / "scripts/train.py"
    where = ["--config_file", str(ROOT / f"configs/accelerate_deepspeed_zero{stage}.yaml")]
    printed = launch(
        script, *overrides(init_folder, corpus, output_dir=tmp_path / "run"), where=where
    )
    assert f"world size 2, DeepSpeed ZeRO-{stage}, cpu/gloo, compute fp32" in printed
    config = small_run(
        init_folder, corpus, output_dir=tmp_path / "run", gradient_accumulation_steps=2
    )
    trace = read_metrics(tmp_path / "run", "loss", "grad_norm")
    torch.testing.assert_close(trace, list(plain_trace(config, 2)), rtol=1e-5, atol=1e-5)


def test_hybrid_sharding_is_one_model(init_folder, corpus, tmp_path):
    """Two replicas of two shards each."""
    where = ["--config_file", str(ROOT / "configs/accelerate_hsdp.yaml")]
    settings = overrides(
        init_folder, corpus, output_dir=tmp_path / "run", gradient_accumulation_steps=1
    )
    printed = launch(ROOT / "scripts/train.py", *settings, where=where)
    assert "world size 4, FSDP2" in printed
    config = small_run(
        init_folder, corpus, output_dir=tmp_path / "run", gradient_accumulation_steps=1
    )
    trace = read_metrics(tmp_path / "run", "loss", "grad_norm")
    torch.testing.assert_close(trace, list(plain_trace(config, 4)), rtol=1e-5, atol=1e-5)
