"""Several processes over gloo, launched as a user launches them: one run, equal to one process."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from qwen3_encdec.folders import InputError
from qwen3_encdec.training import distributed
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.distributed import launched
from tests.conftest import small_run, small_settings
from tests.test_training import plain_trace, read_metrics

ROOT = Path(__file__).parents[1]
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="deepspeed: make test-distributed")


def launch(script: Path, *arguments: str, config: str = "fsdp2", processes: int = 2) -> str:
    """Run ``accelerate launch``; returns standard output, shows standard error if it fails."""
    file = ROOT / f"configs/accelerate_{config}.yaml"
    where = ["--config_file", str(file), "--num_processes", str(processes)]
    where += ["--main_process_port", "0"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE", "FSDP"))
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    # A compilation that was killed leaves a lock in the shared folder, on which all later ones wait.
    extensions = Path(tempfile.gettempdir()) / f"torch-extensions-{os.getpid()}"
    environment |= {"TORCH_EXTENSIONS_DIR": str(extensions)}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *where, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,  # DeepSpeed's first launch on a machine compiles an operator, a minute or two
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAIN = """
import json, sys
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from qwen3_encdec.training.config import load_config
from qwen3_encdec.training.loop import run_training

prepare = Accelerator.prepare

def prepare_and_look(self, model, optimizer):
    model, optimizer = prepare(self, model, optimizer)
    weight = self.unwrap_model(model).get_input_embeddings().weight
    groups = optimizer.param_groups
    self.print("LOOK " + json.dumps({
        "matrices": sum(p.shape == weight.shape for p in model.parameters()),
        "in the optimizer": sum(p is weight for g in groups for p in g["params"]),
        "sharded": isinstance(weight, DTensor),
        "local rows": getattr(weight, "_local_tensor", weight).shape[0],
    }))
    return model, optimizer

Accelerator.prepare = prepare_and_look
run_training(load_config(None, sys.argv[1:]))
"""


FIND = """
import sys, torch
from qwen3_encdec.training import start
from qwen3_encdec.training.config import load_config
from qwen3_encdec.training.distributed import TrainingState

backward, calls = TrainingState.backward, []

def run_out_of_memory(gradient):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

def first_one_fails(self, loss):
    calls.append(self)
    if len(calls) == 1:
        self.parameters["model.encoder.norm.weight"].register_hook(run_out_of_memory)
    backward(self, loss)

TrainingState.backward = first_one_fails
start.find_batch_size(load_config(None, sys.argv[1:]))
"""


def test_the_batch_size_finder_survives_a_failed_backward_pass(init_folder, corpus, tmp_path):
    script = tmp_path / "find.py"
    script.write_text(FIND)
    settings = small_settings(init_folder, corpus, output_dir=tmp_path / "run")
    printed = launch(script, *settings, config="ddp")
    assert "batch_size=230 fits" in printed  # 256 did not


@pytest.mark.parametrize(
    ("config", "processes", "kind", "shards"),
    [
        ("fsdp2", 2, "FSDP2", 2),
        ("ddp", 2, "DDP", 1),
        ("hsdp", 4, "FSDP2", 2),  # two replicas of two shards each
        pytest.param("deepspeed_zero2", 2, "DeepSpeed", 0, marks=needs_deepspeed),
        pytest.param("deepspeed_zero3", 2, "DeepSpeed", 0, marks=needs_deepspeed),
    ],
)
def test_each_file_launches_one_model(
    init_folder, corpus, tmp_path, config, processes, kind, shards
):
    script, run_dir = tmp_path / "train.py", tmp_path / "run"
    script.write_text(TRAIN)
    more = {"gradient_accumulation_steps": 4 // processes, "output_dir": run_dir, "eval_every": 0}
    settings = small_settings(init_folder, corpus, **more)
    printed = launch(script, *settings, config=config, processes=processes)
    assert f"{processes} x cpu, {kind}, compute fp32\n" in printed
    if shards:
        look = json.loads(printed.split("LOOK ")[1].splitlines()[0])
        rows = json.loads((init_folder / "config.json").read_text())["vocab_size"]
        assert look.pop("local rows") == -(-rows // shards)
        assert look == {"matrices": 1, "in the optimizer": 1, "sharded": shards > 1}

    alone = small_run(init_folder, corpus, **more)
    trace = read_metrics(run_dir, "loss", "grad_norm")
    assert len(trace) == 4
    torch.testing.assert_close(trace, list(plain_trace(alone, processes)), rtol=1e-5, atol=1e-5)
    # a sharded checkpoint holds the model's own code, not torch's
    code = {path.stem for path in (run_dir / "checkpoints/latest").glob("*.py")}
    assert all("qwen3" in name for name in code)


def test_a_broken_line_in_the_first_report_ends_every_rank(init_folder, tmp_path):
    script, broken = tmp_path / "train.py", tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a line that is whole"}\nnone\n')
    script.write_text(
        "import os, sys\nfrom qwen3_encdec.folders import InputError\n"
        "from qwen3_encdec.training.config import load_config\n"
        "from qwen3_encdec.training.loop import run_training\n"
        "try:\n    run_training(load_config(None, sys.argv[1:]))\n"
        "except InputError as error:\n"
        "    sys.stdout.write(f'{os.environ[\"RANK\"]}: {error}\\n')\n"
    )
    settings = small_settings(init_folder, broken, output_dir=tmp_path / "run", eval_every=0)
    lines = launch(script, *settings, config="ddp").splitlines()
    for rank in range(2):
        assert any(line.startswith(f"{rank}: {broken} line 2: not valid JSON") for line in lines)


def test_the_given_command_without_a_launcher_s_file_for_one_process(init_folder, corpus, tmp_path):
    settings = small_settings(init_folder, corpus, output_dir=tmp_path / "run", max_steps=1)
    printed = launch(ROOT / "scripts/train.py", *settings, config="ddp", processes=1)
    assert "1 x cpu, one process, compute fp32\n" in printed


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
    """Without the pause in `launched`, every second of these launches ends with SIGABRT."""
    script = tmp_path / "reduce.py"
    script.write_text(
        "import torch\n"
        "from qwen3_encdec.training.config import TrainingConfig\n"
        "from qwen3_encdec.training.distributed import launched\n"
        "with launched(TrainingConfig(trackers=[], mixed_precision='no')) as accelerator:\n"
        "    # as FSDP2's caches keep it\n"
        "    torch.kept = torch.distributed.distributed_c10d._get_default_group()\n"
        "    for _ in range(20):\n"
        "        total = accelerator.reduce(torch.tensor([1, 2, 3]), 'sum').tolist()\n"
        "    accelerator.print(total)\n"
    )
    for _ in range(3):
        assert launch(script, config="ddp") == "[2, 4, 6]\n"


def test_processes_that_have_not_met_stop(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    config = TrainingConfig(trackers=[], mixed_precision="no", output_dir=str(tmp_path))
    with pytest.raises(InputError, match="started 2 processes but accelerate sees 1"):
        launched(config).__enter__()


def test_hsdp_over_another_number_of_processes_stops(monkeypatch):
    for name in ("WORLD_SIZE", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE"):
        monkeypatch.setenv(name, "8")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(InputError, match="size 8 x dp_shard_size 2 must be .* processes, 8; pass"):
        launched(TrainingConfig()).__enter__()


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_user_s_allocator_settings_stay(monkeypatch, tmp_path, name):
    mine = {name: "max_split_size_mb:64"}
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    config = TrainingConfig(trackers=[], mixed_precision="no", output_dir=str(tmp_path))
    for before, after in ((mine, mine), ({}, {names[0]: "expandable_segments:True"})):
        monkeypatch.setattr(os, "environ", before | {"HOME": str(tmp_path)})
        with launched(config):
            assert {key: os.environ[key] for key in names if key in os.environ} == after


def test_training_on_a_mac_takes_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with launched(TrainingConfig(trackers=[])) as accelerator:
        assert (accelerator.device.type, accelerator.mixed_precision) == ("cpu", "no")


@pytest.fixture
def given(monkeypatch) -> dict:
    """What `launched` gives accelerate."""
    options: dict = {}
    monkeypatch.setattr(distributed, "Accelerator", options.update)
    return options


@pytest.mark.parametrize(
    ("native", "cpu", "precision"),
    [(True, "false", "bf16"), (False, "false", "no"), (True, "true", "no")],
)
def test_bf16_is_chosen_where_the_gpu_computes_it_natively(
    monkeypatch, given, native, cpu, precision
):
    """On a T4 torch emulates it, and its varlen kernel fails."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    with pytest.raises(AttributeError):  # there is no accelerator
        launched(TrainingConfig(trackers=[])).__enter__()
    assert given["mixed_precision"] == precision


@pytest.mark.parametrize(("stall", "hours"), [(3600.0, 2), (5.0, 0.5), (0.0, 480), (1e9, 480)])
def test_no_group_of_processes_gives_up_before_the_stall_guard(given, stall, hours):
    with pytest.raises(AttributeError):
        launched(TrainingConfig(trackers=[], stall_seconds=stall)).__enter__()
    (limit,) = [h.timeout for h in given["kwargs_handlers"] if hasattr(h, "timeout")]
    assert limit.total_seconds() == hours * 3600


@pytest.mark.parametrize(("stage", "precision"), [("1", "no"), ("2", "bf16")])
@needs_deepspeed
def test_what_deepspeed_cannot_do_is_refused(monkeypatch, stage, precision):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    config = TrainingConfig(trackers=[], mixed_precision=precision)
    with pytest.raises(InputError, match="ZeRO stages 2 and 3 with mixed_precision=no"):
        launched(config).__enter__()
