"""What a run costs: counted and measured where that can be, and the plans that are refused."""

import dataclasses
import functools
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.data.ul2 import check_capacity
from qwen3_encdec.folders import InputError
from qwen3_encdec.modeling_qwen3_encoder import Segments
from qwen3_encdec.training import plan as budget
from qwen3_encdec.training.config import TrainingConfig, load_config
from qwen3_encdec.training.distributed import prepare_layers
from qwen3_encdec.training.optimization import build_optimizer
from tests.conftest import tiny_config

ROOT = Path(__file__).parents[1]
ONE = budget.Machines()
RECIPES = {
    "nano-cpu": (
        "1xA100",
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 8000},
    ),
    "0.6b-1gpu": ("1xH100", {}),
    "0.6b-8gpu-fineweb": ("8xH100", {}),
    "1.7b-64gpu": ("8x8xH100", {"hidden_size": 2048, "intermediate_size": 6144}),
}


def small(**changes) -> TrainingConfig:
    settings = {
        "mixed_precision": "no",
        "data.source_length": 64,
        "data.target_length": 40,
        "batch_size": 3,
    }
    return load_config(None, [f"{key}={value}" for key, value in {**settings, **changes}.items()])


@pytest.mark.parametrize("how", [False, "selective", "full"])
def test_activations_are_those_that_a_forward_pass_keeps(how):
    model_config = tiny_config(num_hidden_layers=4, num_decoder_layers=3)
    config = small(gradient_checkpointing=how)
    model = Qwen3ForSeq2SeqLM(model_config).train()
    prepare_layers(model, config)
    batch = budget.full_rows(model_config, config, config.batch_size)
    source, target = (
        Segments.from_mask(batch[name]) for name in ("attention_mask", "decoder_attention_mask")
    )
    with budget._Living([*model.parameters(), *model.buffers()]) as living:
        *states, _ = model.model.look_up(
            source.gather(batch["input_ids"]), target.gather(batch["labels"])
        )
        kept = model.model.forward_ragged(states[0], source, states[1], target)
        held = living.count()
    parts, _ = budget.memory(
        model_config, budget.count_parameters(model_config), config, ONE,
        budget.saved_by_layers(model_config, config, ONE),
    )  # fmt: skip
    # beside the layers: embedded tokens, what the last norms keep, rotation, where documents lie
    rest = (64 + 40) * 3 * 4 * (4 * 40 + 2 * 14 + 8)
    assert held - rest <= parts["activations"] * 1.05
    assert parts["activations"] <= held * 1.05
    swapped = small(
        gradient_checkpointing=how, **{"data.source_length": 40, "data.target_length": 64}
    )
    other, _ = budget.memory(
        model_config, budget.count_parameters(model_config), swapped, ONE,
        budget.saved_by_layers(model_config, swapped, ONE),
    )  # fmt: skip
    assert how == "full" or abs(other["activations"] / parts["activations"] - 1) > 0.02
    del kept


def test_recomputation_saves_memory():
    model_config = Qwen3EncoderDecoderConfig()
    for machines, precision in ((ONE, "no"), (ONE, "bf16"), (budget.Machines(8, 8), "bf16")):
        kept = []
        for how in (False, "selective", "full"):
            config = TrainingConfig(gradient_checkpointing=how, mixed_precision=precision)
            layers, without = budget.saved_by_layers(model_config, config, machines)
            kept.append(sum(layers) / sum(without))
        assert kept[0] == 1
        assert kept[1] < 0.7
        assert kept[2] < 0.15


def test_states_are_divided_and_optimizers_differ():
    model_config = Qwen3EncoderDecoderConfig()
    sizes = budget.count_parameters(model_config)
    assert sizes.total == 1_036_619_776

    def parts(machines: budget.Machines, **changes) -> dict[str, float]:
        config = TrainingConfig(mixed_precision="bf16", **changes)
        return budget.memory(model_config, sizes, config, machines, ([0, 0], [0, 0]))[0]

    alone, eight = parts(ONE), parts(budget.Machines(8, 8))
    for name in ("weights", "gradients", "adamw states"):
        assert alone[name] == 8 * eight[name] == (8 if "states" in name else 4) * sizes.total
    muon = parts(ONE, optimizer="muon", ema_decay=0.999)
    assert muon["muon states"] == alone["adamw states"] - 4 * (sizes.total - sizes.embedding)
    assert muon["average of the weights"] == 4 * sizes.total


def test_bytes_sent():
    sizes = budget.Sizes(encoder=600, decoder=600, embedding=300)
    config = TrainingConfig(mixed_precision="bf16")
    send = budget.communication
    assert send(sizes, config, ONE) == 0
    assert (
        send(sizes, config, budget.Machines(2, 1)) == 4 * 1500
    )  # DDP: each half of fp32 gradients, twice
    gathered, reduced = 2 * (2 * 1200 + 300), 4 * 1500
    assert send(sizes, config, budget.Machines(4, 4)) == 0.75 * (gathered + reduced)
    thrice = dataclasses.replace(config, gradient_accumulation_steps=3)
    assert send(sizes, thrice, budget.Machines(4, 4)) == 3 * send(
        sizes, config, budget.Machines(4, 4)
    )
    hybrid = send(sizes, config, budget.Machines(8, 4)) - send(sizes, config, budget.Machines(4, 4))
    assert hybrid == 4 * 1500 / 4  # half of the shard's gradients, twice


def accelerator(processes: int = 1, sharded: bool = False, replicas: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        num_processes=processes,
        device=torch.device("cpu"),
        is_fsdp2=sharded,
        parallelism_config=ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=2)
        if replicas
        else None,
        backward=torch.Tensor.backward,
    )


def test_machines():
    planned = budget.machines(accelerator(), "8x8xH100", mfu=0.5)
    assert planned == budget.Machines(64, 8, 80e9, 989e12, 0.5, True)
    assert budget.machines(accelerator(), "2xA100", memory_gib=40).memory == 40 * 2**30
    here = budget.machines(accelerator(4, sharded=True))
    assert (here.processes, here.shards, here.peak, here.accelerator) == (4, 4, None, False)
    assert here.memory > 2**28
    hybrid = budget.machines(accelerator(6, sharded=True, replicas=3))
    assert (hybrid.processes, hybrid.shards) == (6, 2)
    for wrong in ("8xB3", "H100", "0xH100", "8x", "axH100"):
        with pytest.raises(
            InputError, match=r"is not COUNTxNAME such as 8xH100; known: H100, H200, A100"
        ):
            budget.machines(accelerator(), wrong)
    with pytest.raises(InputError, match="mfu 40"):
        budget.machines(accelerator(), mfu=40)
    with pytest.raises(InputError, match="memory-gib 0"):
        budget.machines(accelerator(), memory_gib=0)


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "configs/recipes").glob("*.yaml"))
)
def test_recipes_load_and_fit(name):
    config = load_config(ROOT / f"configs/recipes/{name}.yaml")
    devices, changes = RECIPES[name]
    ids = {"pad_token_id": 0, "eos_token_id": 1} if "vocab_size" in changes else {}
    model_config = Qwen3EncoderDecoderConfig(**changes, **ids)
    check_capacity(
        config.data.denoisers,
        config.data.source_length,
        config.data.target_length,
        model_config.num_sentinel_tokens,
    )
    lines: list[str] = []
    budget.dry_run(model_config, config, budget.machines(accelerator(), devices), lines.append)
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "parameters", "tokens", "steps", "FLOPs", "memory", "communication", "time",
    ]  # fmt: skip
    if "fineweb" in name:
        tokens = int(lines[2].split()[2].replace(",", ""))
        assert 10e9 < tokens < 30e9
        assert config.schedule == "wsd"


def test_a_plan_that_cannot_fit_is_refused():
    model_config = Qwen3EncoderDecoderConfig()
    config = load_config(ROOT / "configs/recipes/0.6b-8gpu-fineweb.yaml", ["batch_size=256"])
    machines = budget.machines(accelerator(), "8xH100")
    lines: list[str] = []
    with pytest.raises(
        InputError, match=r"batch_size=256 needs \d+\.\d GiB a process and there are 74\.5; "
    ) as error:
        budget.dry_run(model_config, config, machines, lines.append)
    assert len(lines) > 8  # what it would cost is said first
    fits = int(str(error.value).split("batch_size=")[2].split()[0])
    assert 16 <= fits < 256
    budget.dry_run(
        model_config, dataclasses.replace(config, batch_size=fits), machines, lines.append
    )
    with pytest.raises(InputError, match=f"batch_size={fits} would fit"):
        budget.dry_run(
            model_config, dataclasses.replace(config, batch_size=fits + 1), machines, lines.append
        )
    with pytest.raises(InputError, match="no batch_size fits: shard over more processes"):
        budget.dry_run(
            model_config, config, dataclasses.replace(machines, memory=5e9), lines.append
        )


class Hungry(torch.nn.Module):
    """Runs out of memory from some number of rows on."""

    def __init__(self, most: int):
        super().__init__()
        self.weight, self.most, self.tried = torch.nn.Parameter(torch.ones(2, 2)), most, []

    def forward(self, input_ids, **_):
        self.tried.append(len(input_ids))
        if len(input_ids) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return SimpleNamespace(loss=self.weight.sum())


def test_the_batch_size_finder_goes_down_until_a_step_fits(monkeypatch):
    config, model_config = small(), tiny_config()
    monkeypatch.setattr(budget, "rows_that_fit", lambda *_: 40)
    model = Hungry(most=17)
    optimizer = build_optimizer(model, config)
    gpu = dataclasses.replace(ONE, accelerator=True)
    found = budget.find_batch_size(config, model_config, gpu, model, optimizer, accelerator())
    assert (model.tried[0], model.tried[-1]) == (50, found)
    assert 15 <= found <= 17
    assert not model.weight.detach().eq(1).all()  # a whole step
    with pytest.raises(InputError, match=r"not even one row of 64 \+ 40 tokens fits"):
        budget.find_batch_size(config, model_config, ONE, Hungry(most=0), optimizer, accelerator())
    broken = Hungry(most=17)
    broken.forward = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        budget.find_batch_size(config, model_config, ONE, broken, optimizer, accelerator())


def test_rows_that_fit_by_the_estimate():
    model_config, config = tiny_config(), small()
    machines = dataclasses.replace(ONE, memory=10e6)
    rows = budget.rows_that_fit(model_config, config, machines)
    sizes, saved = (
        budget.count_parameters(model_config),
        budget.saved_by_layers(model_config, config, machines),
    )

    def peak(number: int) -> float:
        _, moments = budget.memory(
            model_config, sizes, dataclasses.replace(config, batch_size=number), machines, saved
        )
        return max(moments.values())

    assert peak(rows) <= 10e6 < peak(rows + 1)
    assert budget.rows_that_fit(model_config, config, dataclasses.replace(ONE, memory=1e3)) == 0
    assert (
        budget.rows_that_fit(model_config, config, dataclasses.replace(ONE, memory=math.inf))
        == 4096
    )


@functools.cache
def counted(model: str, sharded: bool) -> tuple:
    model_config = Qwen3EncoderDecoderConfig(**RECIPES["1.7b-64gpu"][1] if model == "1.7B" else {})
    how = "gradient_checkpointing=selective" if model == "1.7B" else "gradient_checkpointing=false"
    lengths = [
        "data.source_length=1024",
        "data.target_length=512",
        "batch_size=8",
        "mixed_precision=bf16",
    ]
    config = load_config(None, [how, *lengths])
    sizes = budget.count_parameters(model_config)
    saved = budget.saved_by_layers(model_config, config, budget.Machines(2, 2 if sharded else 1))
    return model_config, config, sizes, saved


def planned_row(model: str, devices: str) -> str:
    """A line of the table in docs/scaling.md."""
    machines = budget.machines(accelerator(), devices)
    model_config, config, sizes, saved = counted(model, machines.shards > 1)
    _, moments = budget.memory(model_config, sizes, config, machines, saved)
    sent = budget.communication(sizes, config, machines)
    rows = config.batch_size * machines.processes
    tokens, work = rows * (1024 + 512), budget.flops(model_config, sizes, 1024, 512, rows)
    seconds = work / (machines.processes * machines.peak * machines.mfu)
    figures = (
        f"{tokens:,}", f"{max(moments.values()) / 2**30:.1f}", f"{sent / 2**30:.2f}", f"{seconds:.3f}",
        f"{sent / seconds / 1e9:.0f}", f"{100e9 / tokens * seconds / 3600:,.1f}",
    )  # fmt: skip
    return " | ".join([f"| {model}", devices, *figures]) + " |"


def test_the_table_of_the_documentation_is_what_the_estimate_says():
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| [\d.]+B \| \d+x", line)]
    assert len(rows) == 14
    assert rows == [planned_row(*re.findall(r"[\w.]+", row)[:2]) for row in rows]


@pytest.mark.slow
def test_the_bench_measures_beside_the_estimate():
    command = [sys.executable, str(ROOT / "bench/memory.py"), "--quick", "--only", "packed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    targets = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("target ")]
    assert targets == ["memory-packed:"]


def test_a_folder_with_nothing_but_its_configuration_can_be_planned(tmp_path, run_script):
    script = ROOT / "scripts/train.py"
    Qwen3EncoderDecoderConfig().save_pretrained(tmp_path / "model")
    recipe = [
        "--config",
        str(ROOT / "configs/recipes/0.6b-8gpu-fineweb.yaml"),
        f"model={tmp_path / 'model'}",
    ]
    code, out, err = run_script(
        script,
        *recipe,
        f"output_dir={tmp_path / 'run'}",
        "--dry-run",
        "--devices",
        "8xH100",
        "--mfu",
        "0.5",
    )
    assert code == 0, err
    assert "parameters        1,036,619,776" in out
    assert re.search(r"^time +\d+\.\d hours, .* at 50% of the peak$", out, re.MULTILINE)
    short = ["--dry-run", "--devices", "8xH100", "--memory-gib", "20"]
    code, _, err = run_script(script, *recipe, *short)
    assert code == 2
    assert re.fullmatch(
        r"error: batch_size=16 needs .* and there are 20\.0; batch_size=\d would fit\n",
        err,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_train_command_finds_a_batch_size(init_folder, tmp_path, monkeypatch, capsys):
    from qwen3_encdec.training.loop import run_training

    monkeypatch.setattr(budget, "rows_that_fit", lambda *_: 5)
    config = small(
        model=init_folder, output_dir=tmp_path / "run", mixed_precision="auto", trackers="[]"
    )
    assert run_training(config, find_batch_size=True) == tmp_path / "run"
    assert "batch_size=5 fits" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
