"""What a dry run says: parameters, operations, memory, bytes sent, hours."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import ParallelismConfig
from torch.utils.flop_counter import FlopCounterMode

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.folders import InputError
from qwen3_encdec.training import flops, plan, start
from qwen3_encdec.training.config import TrainingConfig, load_config
from qwen3_encdec.training.distributed import TrainingState
from tests.conftest import small_run, tiny_config

ROOT = Path(__file__).parents[1]
RECIPES = {
    "nano-cpu": ("1xA100", "0.6B"),
    "0.6b-1gpu": ("1xH100", "0.6B"),
    "0.6b-8gpu-fineweb": ("8x1xH100", "0.6B"),
    "1.7b-64gpu": ("8x8xH100", "1.7B"),
}


def test_flops_are_summed_over_examples():
    """Against torch's counter, over a packed batch of unequal documents; a mean would miss it."""
    config = tiny_config(num_decoder_layers=2, attn_implementation="eager")
    model, lengths = Qwen3ForSeq2SeqLM(config).train(), np.array([[19, 11], [3, 30], [40, 2]])
    counted = 0
    for source, target in lengths:
        ids = [torch.randint(290, (1, int(n))) for n in (source, target)]
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[0], labels=ids[1]).loss.backward()
        counted += counter.get_total_flops()
    per_sum = flops.flops_per_sum(config, flops.count_parameters(config))
    work = per_sum @ flops.length_sums(*lengths.T)
    # eager attention computes the half of T^2 that the causal mask hides
    hidden_half = 12 * 4 * 14 * config.num_decoder_layers * (lengths[:, 1] ** 2).sum() / 2
    assert counted == pytest.approx(work + hidden_half, rel=0.01)
    swapped = per_sum @ flops.length_sums(*lengths.T[::-1])
    assert counted != pytest.approx(swapped + hidden_half, rel=0.01)
    of_means = 3 * per_sum @ flops.length_sums(*lengths.mean(0, keepdims=True).T)
    assert abs(of_means / work - 1) > 0.005


def test_activations_are_about_those_that_a_forward_pass_keeps():
    config = load_config(
        None,
        ["mixed_precision=no", "batch_size=3", "data.source_length=64", "data.target_length=40"],
    )
    model_config = Qwen3EncoderDecoderConfig(
        vocab_size=331, num_sentinel_tokens=11, hidden_size=128, intermediate_size=384,
        num_hidden_layers=4, num_decoder_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, pad_token_id=300, eos_token_id=302,
    )  # fmt: skip
    model = Qwen3ForSeq2SeqLM(model_config).train()
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    sides = [[np.ones(length // 2, dtype=np.int64)] * 6 for length in (64, 40)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**collate_packed(*sides))
    parts = plan.memory(model_config, flops.count_parameters(model_config), config, plan.Machines())
    assert parts["activations"] == pytest.approx(sum(kept.values()), rel=0.3)
    del output


def test_recomputation_saves_memory_and_shards_divide_states():
    model_config = Qwen3EncoderDecoderConfig()
    sizes = flops.count_parameters(model_config)
    assert sum(sizes) == 1_036_619_776

    def parts(machines: plan.Machines, **changes) -> dict[str, float]:
        return plan.memory(model_config, sizes, TrainingConfig(**changes), machines)

    kept = [parts(plan.Machines(), gradient_checkpointing=how)["activations"]
            for how in (False, "selective", "full")]  # fmt: skip
    assert kept[0] > kept[1] > 5 * kept[2]
    alone, eight = parts(plan.Machines()), parts(plan.Machines(8, 8))
    for name, width in (("weights", 4), ("gradients", 4), ("optimizer_states", 8)):
        assert alone[name] == 8 * eight[name] == width * sum(sizes)


def test_bytes_sent():
    sizes = flops.Sizes(encoder=600, decoder=600, embedding=300)
    config = TrainingConfig(mixed_precision="bf16")
    thrice = TrainingConfig(mixed_precision="bf16", gradient_accumulation_steps=3)
    send, four = plan.communication, plan.Machines(4, 4)
    assert send(sizes, config, plan.Machines()) == 0
    # DDP: each half of fp32 gradients, twice
    assert send(sizes, config, plan.Machines(2, 1)) == 4 * 1500
    gathered, reduced = 2 * (2 * 1200 + 300), 4 * 1500
    assert send(sizes, config, four) == 0.75 * (gathered + reduced)
    assert send(sizes, thrice, four) == 3 * send(sizes, config, four)
    hybrid = send(sizes, config, plan.Machines(8, 4)) - send(sizes, config, four)
    assert hybrid == 4 * 1500 / 4  # half of the shard's gradients, twice


def accelerator(processes: int = 1, sharded: bool = False, replicas: int = 0) -> SimpleNamespace:
    parallelism = None
    if replicas:
        parallelism = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=2)
    return SimpleNamespace(
        num_processes=processes,
        device=torch.device("cpu"),
        is_fsdp2=sharded,
        parallelism_config=parallelism,
    )


def test_machines():
    assert plan.machines(accelerator(), "8x8xH100") == plan.Machines(64, 8, 80e9, 989e12)
    here = plan.machines(accelerator(4, sharded=True))
    assert here == plan.Machines(4, 4)
    hybrid = plan.machines(accelerator(6, sharded=True, replicas=3))
    assert (hybrid.processes, hybrid.shards) == (6, 2)
    assert plan.machines(accelerator(4)).shards == 1
    for wrong in ("8xB3", "H100", "0xH100", "8x", "axH100"):
        with pytest.raises(
            InputError, match="not as in 8xH100 or 8x1xH100; known: H100, H200, A10"
        ):
            plan.machines(accelerator(), wrong)


def test_sizes_without_a_checkpoint(parent_folder):
    for name in ("0.6B", "Qwen/Qwen3-0.6B-Base"):
        assert sum(flops.count_parameters(flops.qwen3_sizes(name))) == 1_036_619_776
    assert flops.qwen3_sizes(str(parent_folder)).hidden_size == 40
    with pytest.raises(InputError, match="checkpoint ./nowhere does not exist"):
        flops.qwen3_sizes("./nowhere")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_load_and_fit_without_a_checkpoint(name, run_script, tmp_path):
    file, (devices, model) = ROOT / f"configs/recipes/{name}.yaml", RECIPES[name]
    planned = re.findall(r"^#.*--devices (\S+)$", file.read_text(), re.MULTILINE)
    assert planned in ([], [devices])
    arguments = ["--config", file, "--dry-run", "--devices", devices, "--qwen3-model", model]
    arguments += [f"output_dir={tmp_path / 'run'}"]
    code, printed, errors = run_script(ROOT / "scripts/train.py", *arguments)
    assert code == 0, errors
    assert list(tmp_path.iterdir()) == []
    assert not PartialState._shared_state  # as under a launcher, where it would meet no other rank
    assert re.search(r"^parameters: total +\d,\d{3},\d{3},\d{3}$", printed, re.MULTILINE)
    assert re.search(r"^time: mfu +0.29\ntime: seconds per step +[\d.]+$", printed, re.MULTILINE)
    cost = json.loads(run_script(ROOT / "scripts/train.py", *arguments, "--json")[1])
    config = load_config(file)
    assert cost["config"]["max_steps"] == cost["run"]["steps"] == config.max_steps
    parts = cost["memory_gib"]
    assert parts.pop("peak") == pytest.approx(sum(parts.values()))
    seconds = cost["time"]["seconds_per_step"] * config.max_steps
    assert cost["time"]["hours"] == pytest.approx(seconds / 3600)


def test_a_plan_that_cannot_fit_is_refused(capsys):
    sentence = r"batch_size=512 needs \d+\.\d GiB per device, but only 74\.5 are available; lower batch_size"
    with pytest.raises(InputError, match=sentence):
        plan.dry_run(load_config(None, ["batch_size=512"]), "8xH100", "0.6B")
    assert "memory GiB: activations" in capsys.readouterr().out  # the cost is said first


@pytest.mark.parametrize("model", ["0.6B", "1.7B"])
def test_the_table_of_the_documentation_is_what_the_plan_says(model):
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(rf"\| {model} \| \d+x", line)]
    assert len(rows) == 7
    how = "selective" if model == "1.7B" else "false"
    settings = ["data.source_length=1024", "data.target_length=512", "batch_size=8"]
    config = load_config(None, [f"gradient_checkpointing={how}", *settings])
    model_config = flops.qwen3_sizes(model)
    sizes = flops.count_parameters(model_config)
    one = flops.flops_per_sum(model_config, sizes) @ flops.length_sums(*np.array([[1024], [512]]))
    for row in rows:
        devices = row.split(" | ")[1]
        machines = plan.machines(accelerator(), devices)
        needed = sum(plan.memory(model_config, sizes, config, machines).values()) / 2**30
        sent = plan.communication(sizes, config, machines)
        seconds = 8 * one / (machines.peak * plan.MFU)
        tokens = 8 * 1536 * machines.processes
        hours = 100e9 / tokens * seconds / 3600
        figures = f"{tokens:,} | {needed:.1f} | {sent / 2**30:.2f} | {seconds:.3f}"
        figures += f" | {sent / seconds / 1e9:.0f} | {hours:,.1f}"
        assert row == f"| {model} | {devices} | {figures} |"


def test_the_batch_size_finder_goes_down_until_a_step_fits(
    init_folder, tmp_path, monkeypatch, capsys
):
    forward, tried = Qwen3ForSeq2SeqLM.forward, []

    def hungry(self, *arguments, **options):
        assert self.training
        tried.append((len(options["cu_seqlens"]) - 1) // 2)
        if tried[-1] > 210:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *arguments, **options)

    backward, held = TrainingState.backward, []

    def look(self, loss):
        held.append((bool(self.optimizer.state), bool(self.gradients())))
        backward(self, loss)

    monkeypatch.setattr(Qwen3ForSeq2SeqLM, "forward", hungry)
    monkeypatch.setattr(TrainingState, "backward", look)
    run = {"output_dir": tmp_path / "run", "gradient_accumulation_steps": 3}
    config = small_run(init_folder, tmp_path / "c.jsonl", **run)
    start.find_batch_size(config)
    assert held == [(True, False), (True, True)]  # what later micro-batches find in memory
    found = int(re.search(r"batch_size=(\d+) fits", capsys.readouterr().out)[1])
    assert (tried[0], tried[-1], found) == (256, 207, 207)
    assert list(tmp_path.iterdir()) == []

    failing = Mock(side_effect=RuntimeError("an error of another kind"))
    monkeypatch.setattr(Qwen3ForSeq2SeqLM, "forward", failing)
    with pytest.raises(RuntimeError, match="another kind"):
        start.find_batch_size(config)
