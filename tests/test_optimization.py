"""The optimizer, and what is done to the layers: always against the plain way."""

import os
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import HashStore
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.folders import InputError
from qwen3_encdec.training.config import TrainingConfig, load_config
from qwen3_encdec.training.layers import (
    choose_attention,
    compile_layers,
    disagreement,
    recompute_layers,
)
from qwen3_encdec.training.optimization import (
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from tests.conftest import tiny_config


def packed_batch(seed: int = 0, documents: int = 5) -> dict[str, torch.Tensor]:
    """Documents of odd lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 18, (2, documents), generator=generator).tolist()
    sides = [
        [torch.randint(0, 290, (length,), generator=generator).numpy() for length in side]
        for side in lengths
    ]
    return collate_packed(*sides)


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def test_schedules():
    config = load_config(None, ["max_steps=100", "warmup_steps=10", "lr=1.0", "min_lr_ratio=0.1"])
    assert [learning_rate(step, config) for step in (1, 5, 10, 80)] == [0.1, 0.5, 1.0, 1.0]
    assert learning_rate(90, config) == pytest.approx(0.55)
    for schedule in ("wsd", "cosine", "linear"):
        options = ["max_steps=100", "warmup_steps=10", "lr=1.0", f"schedule={schedule}"]
        changed = load_config(None, options)
        rates = [learning_rate(step, changed) for step in range(1, 101)]
        assert max(rates) == 1.0
        assert rates[-1] == pytest.approx(0.1)
        assert rates[9:] == sorted(rates[9:], reverse=True)


def test_projections_are_decayed_and_gates_learn_faster():
    model = Qwen3ForSeq2SeqLM(tiny_config(source_gate=True))
    optimizer = build_optimizer(model, TrainingConfig(lr=1e-4))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(chain(*groups)) == sorted(names.values())
    matrices, others, gates = groups
    assert all(name.endswith("proj.weight") for name in matrices)
    assert all(name.endswith(("norm.weight", "shared.weight")) for name in others)
    assert all(name.endswith(".source_gate") for name in gates)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    set_learning_rate(optimizer, 1e-4)
    # AdamW's first step is the learning rate: the gate moves 200 times as far as the norm
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    pair = gates[0], others[-1]
    moved = [(model.get_parameter(n).detach() - before[n]).abs().mean() for n in pair]
    assert float(moved[0] / moved[1]) == pytest.approx(200, rel=0.02)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_gradients_are_the_same(model, how):
    batch = packed_batch()
    expected = gradients(model.train(), batch)
    calls = []
    model.model.encoder.layers[0].self_attn.q_norm.register_forward_hook(lambda *_: calls.append(1))
    recompute_layers(model, TrainingConfig(gradient_checkpointing=how))
    found = gradients(model, batch)
    assert len(calls) == 2  # forward, and again for the backward pass
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(model, packed_batch(1)), expected)


def test_compiled_layers_take_any_packed_batch(model):
    torch.compiler.reset()
    model.set_attn_implementation("eager")
    batches = [packed_batch(seed, documents) for seed, documents in ((1, 3), (2, 5), (3, 8))]
    expected = [gradients(model.train(), batch) for batch in batches]
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(model, TrainingConfig(compile=True), backend=counter)
    found, compiled = [], []
    for batch in batches:
        found.append(gradients(model, batch))
        compiled.append(counter.frame_count)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert compiled[0] > 0
    assert compiled[1] == compiled[-1]  # whatever comes, nothing is compiled again


def test_ddp_does_not_split_compiled_layers(model, monkeypatch):
    """Older torch refuses to: a layer's graph holds an autograd function or FlexAttention."""
    torch.compiler.reset()
    monkeypatch.setattr(DDPOptimizer, "compile_fn", None)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        # Not monkeypatch, which deletes the setting in the end: nothing would compile any more.
        with torch._dynamo.config.patch(optimize_ddp=True):
            replicated = DistributedDataParallel(model)
            compile_layers(model, TrainingConfig(compile=True), backend="eager")
            assert replicated(**packed_batch()).loss.isfinite()
    finally:
        torch.distributed.destroy_process_group()


SHARDED = """
import time
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.layers import compile_layers, layers_of, recompute_layers
from tests.conftest import tiny_config
from tests.test_optimization import packed_batch

class Products(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))

def backward_products(how, when):
    config = TrainingConfig(gradient_checkpointing=how, compile=bool(when))
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Qwen3ForSeq2SeqLM(tiny_config()).train()
    model.set_attn_implementation("eager")
    recompute_layers(model, config)
    if when == "before":
        compile_layers(model, config, backend="aot_eager")
    for layer in [*layers_of(model), model]:
        fully_shard(layer)
    if when == "after":
        compile_layers(model, config, backend="aot_eager")
    loss = model(**packed_batch()).loss
    with Products() as products:
        loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return products.count, float(norm.full_tensor())

dist.init_process_group("gloo")
cases = [(False, None), ("full", None), (False, "after"), ("full", "after"), ("full", "before")]
for case in cases:
    print("FOUND", *backward_products(*case), flush=True)
dist.destroy_process_group()
time.sleep(0.1)
"""


def test_recomputation_survives_sharding_and_compiling(tmp_path):
    """Products in the backward pass: recomputed ones are there in whatever way layers run."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("FOUND")]
    plain, full, compiled, both, before = [int(count) for count, _ in lines]
    norms = [float(norm) for _, norm in lines]
    assert norms == pytest.approx([norms[0]] * 5, rel=1e-4)
    assert full > plain
    assert both - compiled >= full - plain - 2
    assert before <= both  # compiled before it is sharded, a layer may lose its recomputation


def test_attention_is_chosen_by_what_is_there():
    lines = []
    here = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16", print=lines.append)
    # here no flash package is installed, and dropout does not disturb the comparison
    config = tiny_config(attention_dropout=0.3)
    assert choose_attention("auto", config, here) == "sdpa"
    assert choose_attention("eager", config, here) == "eager"
    assert lines == ["attention: eager"]
    with pytest.raises(InputError, match="attention: cannot use flash_attention_2 .ImportError"):
        choose_attention("flash_attention_2", config, here)


def test_an_unfit_attention_is_refused():
    def leaking(module, query, key, value, mask, **options):
        mask = mask | mask.roll(1, dims=-1)  # one key more on the right of each query's
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    def half_precision(module, query, *arguments, **options):
        assert query.dtype == torch.bfloat16, "only fp16 and bf16"  # as flash-attention says
        return sdpa_attention_forward(module, query, *arguments, **options)

    AttentionInterface.register("leaking", leaking)
    AttentionInterface.register("half_precision", half_precision)
    check = partial(disagreement, model_config=tiny_config(), device=torch.device("cpu"))
    assert "its gradient differs from sdpa's by" in check("leaking", precision="bf16")
    assert check("half_precision", precision="bf16") is None
    assert "only fp16 and bf16" in check("half_precision", precision="no")
