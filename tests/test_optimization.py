"""Muon beside AdamW, the running average, and what is done to the layers:

always against the plain way.
"""

import copy
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.folders import InputError
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.distributed import prepare_layers
from qwen3_encdec.training.loop import run_training
from qwen3_encdec.training.optimization import Chained, build_optimizer
from tests.conftest import use_backend
from tests.test_training import small_run, write_corpus

MUON = TrainingConfig(optimizer="muon", lr=1e-2)


def ragged_batch(rows: int, longest: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two documents a row and padding, different in every row."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for ids, mask, length in (
        ("input_ids", "attention_mask", longest),
        ("labels", "decoder_attention_mask", longest - 3),
    ):
        batch[ids] = torch.randint(0, 290, (rows, length), generator=generator)
        segments = torch.zeros(rows, length, dtype=torch.long)
        for row in segments:
            first, both = sorted(torch.randperm(length - 2, generator=generator)[:2] + 1)
            row[:first], row[first : both + 1] = 1, 2
        batch[mask] = segments
        if ids == "labels":
            batch[ids] = batch[ids].masked_fill(segments == 0, -100)
    return batch


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        gradients(model, ragged_batch(2, 12, seed=step))
        optimizer.step()


def test_muon_takes_the_projections_and_adamw_the_rest(model):
    optimizer = build_optimizer(model, MUON)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (muon, adamw) = optimizer.param_groups
    assert all(names[id(parameter)].endswith("proj.weight") for parameter in muon["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert (muon["weight_decay"], adamw["weight_decay"]) == (0.1, 0.0)

    # two steps are those of the two optimizers of torch, each on its own
    other = copy.deepcopy(model)
    theirs = {name.endswith("proj.weight"): [] for name in names.values()}
    for name, parameter in other.named_parameters():
        theirs[name.endswith("proj.weight")].append(parameter)
    by_hand = (
        torch.optim.Muon(theirs[True], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            theirs[False], lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True
        ),
    )
    before = copy.deepcopy(model)
    for step in range(2):
        for each, steppers in ((model, (optimizer,)), (other, by_hand)):
            gradients(each, ragged_batch(2, 12, seed=step))
            for stepper in steppers:
                stepper.step()
    for ours, hand, old in zip(
        model.parameters(), other.parameters(), before.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, hand, rtol=1e-6, atol=1e-7)
        assert not torch.equal(ours, old)


def test_updates_of_muon_are_as_large_as_those_of_adamw(model):
    sizes = {}
    for name in ("adamw", "muon"):
        trained = copy.deepcopy(model)
        train(
            trained,
            build_optimizer(trained, TrainingConfig(optimizer=name, lr=1e-3, weight_decay=0.0)),
            5,
        )
        moved = [
            (new - old).detach().square().mean().sqrt() / 5e-3
            for (key, new), old in zip(trained.named_parameters(), model.parameters(), strict=True)
            if key.endswith("proj.weight")
        ]
        sizes[name] = float(torch.stack(moved).mean())
    assert 0.1 < sizes["muon"] < 1 > sizes["adamw"] > 0.1
    # the control: Muon's own scale
    unscaled = copy.deepcopy(model)
    optimizer = build_optimizer(
        unscaled, TrainingConfig(optimizer="muon", lr=1e-3, weight_decay=0.0)
    )
    optimizer.param_groups[0]["adjust_lr_fn"] = "original"
    train(unscaled, optimizer, 5)
    matrix = dict(unscaled.named_parameters())["model.encoder.layers.0.mlp.up_proj.weight"]
    old = dict(model.named_parameters())["model.encoder.layers.0.mlp.up_proj.weight"]
    wide = float((matrix - old).square().mean().sqrt() / 5e-3)
    assert abs(wide / sizes["muon"] - 1) > 0.2


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_loaded_optimizer_goes_on_to_the_same_bits(model, name):
    config = TrainingConfig(optimizer=name, lr=1e-2, ema_decay=0.5)
    optimizer = build_optimizer(model, config)
    train(model, optimizer, 2)
    resumed = copy.deepcopy(model)
    again = build_optimizer(resumed, config)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh = copy.deepcopy(model)
    for each, stepper in (
        (model, optimizer),
        (resumed, again),
        (fresh, build_optimizer(fresh, config)),
    ):
        train(each, stepper, 2)
    for one, two, without in zip(
        model.parameters(), resumed.parameters(), fresh.parameters(), strict=True
    ):
        assert torch.equal(one, two)
        assert torch.equal(optimizer.state[one]["ema"], again.state[two]["ema"])
        assert not torch.equal(one, without)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_running_average(model, name):
    optimizer = build_optimizer(model, TrainingConfig(optimizer=name, lr=1e-2, ema_decay=0.75))
    expected = None
    for step in range(3):
        gradients(model, ragged_batch(2, 12, seed=step))
        optimizer.step()
        now = [parameter.detach().clone() for parameter in model.parameters()]
        expected = (
            now
            if expected is None
            else [0.75 * e + 0.25 * n for e, n in zip(expected, now, strict=True)]
        )
    for parameter, average in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(optimizer.state[parameter]["ema"], average, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(average, parameter, rtol=1e-4, atol=1e-5)
    plain = build_optimizer(model, TrainingConfig(optimizer=name))
    train(model, plain, 1)
    assert not any("ema" in state for state in plain.state.values())


def test_extraction_takes_the_running_average(init_folder, tmp_path):
    checkpoint = shutil.copytree(init_folder, tmp_path / "step-000001")
    with pytest.raises(InputError, match=r"step-000001 holds no running average .*ema_decay"):
        extract_encoder(checkpoint, tmp_path / "out", ema=True)
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "state").mkdir()
    averages = {f"{name}.ema": 0.5 * tensor for name, tensor in weights.items()}
    save_file(
        averages | {f"{name}.exp_avg": tensor for name, tensor in weights.items()},
        checkpoint / "state/optimizer.safetensors",
    )
    for ema, factor in ((True, 0.5), (False, 1.0)):
        assert extract_encoder(checkpoint, tmp_path / "out", ema=ema).averaged == [
            "step-000001" + " (ema)" * ema
        ]
        extracted = load_file(tmp_path / "out/model.safetensors")
        for name, tensor in extracted.items():
            source = (
                "model.shared.weight" if name == "embed_tokens.weight" else f"model.encoder.{name}"
            )
            assert torch.equal(tensor, factor * weights[source])


SHARDED = """
import functools, time
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.training import optimization
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.distributed import prepare_layers
from tests.conftest import tiny_config
from tests.test_optimization import train

dist.init_process_group("gloo")
torch.manual_seed(1)

def trained(sharded, gradients=None, **options):
    config = TrainingConfig(**{"optimizer": "muon", "lr": 1e-2, "ema_decay": 0.5, **options})
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(tiny_config()).train()
    prepare_layers(model, config)
    if sharded:
        for layer in [*model.model.encoder.layers, *model.model.decoder.layers, model]:
            fully_shard(layer)
    optimizer = optimization.build_optimizer(model, config)
    if gradients is None:
        train(model, optimizer, 1)
    else:
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if sharded else gradient.clone()
        optimizer.step()
    tensors = [tensor for p in model.parameters() for tensor in (p.detach(), *optimizer.state[p].values())]
    assert sharded == any(p.to_local().shape != p.shape for p in model.parameters() if sharded)
    return [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors]

def difference(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))

# Gradients that are the same to the last bit: in bf16, orthogonalization makes much of little.
given = [torch.randn(p.shape) for p in Qwen3ForSeq2SeqLM(tiny_config()).parameters()]
whole = trained(False, given)
found = [difference(trained(True, given), whole)]
optimization.Muon = torch.optim.Muon
found.append(difference(trained(True, given), whole))
nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")
plain = trained(False, optimizer="adamw", eps=1e-3)
for options in ({"compile": True}, {"gradient_checkpointing": "full"}, {"gradient_checkpointing": "selective"}):
    found.append(difference(trained(True, optimizer="adamw", eps=1e-3, **options), plain))
print("FOUND", *found, flush=True)
dist.destroy_process_group()
time.sleep(0.1)  # as training.launch.release: sharded over gloo, too
"""


def test_shards_take_the_step_of_the_whole(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*launcher, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    muon, muon_of_torch, *layers = map(
        float, done.stdout.split("FOUND ")[1].splitlines()[0].split()
    )
    assert muon < 1e-6
    assert muon_of_torch > 1e-4  # the control, and when it fails, torch's own step will do
    assert len(layers) == 3
    assert max(layers) < 1e-5  # compiled, recomputed, selectively recomputed


@pytest.mark.parametrize("how", [True, "full", "selective"])
def test_recomputed_gradients_are_the_same(model, how):
    batch = ragged_batch(3, 16)
    expected = gradients(model.train(), batch)
    calls = []
    model.model.encoder.layers[0].self_attn.q_norm.register_forward_hook(lambda *_: calls.append(1))
    prepare_layers(model, TrainingConfig(gradient_checkpointing=how))
    found = gradients(model, batch)
    assert len(calls) == 2  # forward, and again for the backward pass
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            gradients(model, ragged_batch(3, 16, seed=1)), expected, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize(
    ("backend", "recompute", "graphs"),
    # attention by document breaks a layer into pieces on a CPU, and one that is recomputed is then
    # not compiled at all
    [("eager", False, 3), ("eager", "full", 3), ("sdpa", False, 16), ("sdpa", "full", 0)],
)
def test_compiled_layers_take_any_packed_batch(model, monkeypatch, backend, recompute, graphs):
    torch.compiler.reset()
    use_backend(model, backend)
    batches = [
        ragged_batch(rows, longest, seed=rows) for rows, longest in ((2, 12), (5, 23), (3, 31))
    ]
    expected = [gradients(model.train(), batch) for batch in batches]
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=counter)
    )
    prepare_layers(model, TrainingConfig(compile=True, gradient_checkpointing=recompute))
    found, compiled = [], []
    for batch in batches:
        found.append(gradients(model, batch))
        compiled.append(counter.frame_count)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert compiled[0] == compiled[-1] <= graphs  # whatever comes, nothing is compiled again
    assert bool(compiled[0]) == bool(graphs)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[1:], expected[:-1], rtol=1e-5, atol=1e-6)


def test_chained_is_one_optimizer_to_a_loop():
    matrix, vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))
    optimizer = Chained(torch.optim.Muon([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    (matrix.sum() + vector.sum()).backward()
    optimizer.step()
    assert matrix.eq(1).all()
    assert vector.eq(1).all()
    optimizer.zero_grad()
    assert matrix.grad is vector.grad is None


def test_a_run_with_all_of_it_goes_on_from_its_checkpoint(init_folder, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    changes = {
        "optimizer": "muon",
        "ema_decay": 0.5,
        "gradient_checkpointing": "selective",
        "eval_every": 0,
    }
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run_training(small_run(init_folder, corpus, output_dir=straight, **changes))
    shutil.copytree(straight, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints/step-000004")
    run_training(small_run(init_folder, corpus, output_dir=cut, **changes))
    states = [
        load_file(run / "checkpoints/step-000004/state/optimizer-00001-of-00001.safetensors")
        for run in (straight, cut)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    kinds = {name.rpartition(".")[2] for name in states[0]}
    assert kinds == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step", "ema"}
    assert extract_encoder(cut, tmp_path / "encoder", ema=True).averaged == ["step-000004 (ema)"]
    with pytest.raises(InputError, match="optimizer"):
        run_training(
            small_run(
                init_folder,
                corpus,
                output_dir=cut,
                **{**changes, "optimizer": "adamw", "max_steps": 6},
            )
        )
