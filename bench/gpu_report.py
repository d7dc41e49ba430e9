"""Measure the 0.6B pair on one GPU: random weights, no network, one call, under 9 minutes.

    python bench/gpu_report.py            # one CUDA GPU
    python bench/gpu_report.py --quick    # the same parts at toy size, as a test without a GPU

The parts, in order: the recipe's step with a profile, attention alone by backend, the step with the
fastest, with bf16 weights and with more rows, FSDP2 on one device, decoding, and `run_training`
itself. Each prints when it is done, and none starts after the time limit.

Every step takes the rows of `run_training`'s first one: package-docs, packed, in 4 micro-batches.
MFU counts the operations of `training/flops.py` over real tokens.
"""

import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from measure import command_line, generate, save_pair, target, write
from torch.autograd import DeviceType
from torch.distributed import HashStore, init_process_group, is_initialized
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.attention_qwen3_encdec import Varlen, attend
from qwen3_encdec.data.collate import collate_micro_batches
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import RowLoader, UL2Data
from qwen3_encdec.folders import first_line, load_config, load_tokenizer
from qwen3_encdec.training import flops, plan
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.layers import FASTEST_FIRST, compile_layers, disagreement, layers_of
from qwen3_encdec.training.loop import run_training
from qwen3_encdec.training.optimization import build_optimizer

LENGTHS, ROWS = (1024, 512), 16  # as in configs/recipes/0.6b-1gpu.yaml
MICRO_BATCHES = 4
TINY = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 64}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TIME_LIMIT = 7.0  # minutes after which no part starts
KERNELS = {
    "products": ("gemm", "matmul", "cutlass", "aten::mm", "aten::addmm", "aten::bmm", "nvjet"),
    "attention": ("flash", "attn", "attention", "softmax"),
    "optimizer": ("adam",),
    "copies and casts": ("copy", "memcpy", "memset", "_to_copy"),
    "indexing": ("index", "gather", "scatter", "embedding"),
}
_began = time.time()
_parts: dict[str, dict[str, Any]] = {}


def part(name: str, do: Callable[..., dict[str, Any]], *given: Any, **options: Any) -> dict:
    """Run one part and print its figures, or the reason why there are none."""
    try:
        if time.time() - _began > 60 * TIME_LIMIT:
            raise TimeoutError(f"not started: the limit of {TIME_LIMIT:g} minutes has passed")
        torch.compiler.reset()  # or the parts' compilations would add up to the limit
        figures = do(*given, **options)
    except Exception as error:  # whatever a kernel raises, the other parts continue
        figures = {"failed": f"{type(error).__name__}: {first_line(error)[:200]}"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    _parts[name] = figures
    for figure, value in figures.items():
        shown = value if isinstance(value, str) else f"{value:.4g}"
        print(f"{name:<34} {figure:<24} {shown}", flush=True)
    return figures


def make_run(folder: Path, quick: bool) -> TrainingConfig:
    """Save a pair with random weights and return the settings of its run."""
    source, target = (64, 64) if quick else LENGTHS
    sizes = {"num_ranks": 8000, **TINY} if quick else {}
    return TrainingConfig(
        model=str(save_pair(folder / "model", source_gate=True, **sizes)),
        output_dir=str(folder / "run"),
        data=DataConfig(source_length=source, target_length=target),
        max_steps=3 if quick else 15,
        warmup_steps=1,
        batch_size=1 if quick else ROWS,
        gradient_accumulation_steps=MICRO_BATCHES,
        num_workers=0 if quick else 2,
        log_every=3,
        eval_every=0,
        trackers=[],
    )


class Training:
    """The pair, its optimizer and the micro-batches of one step."""

    def __init__(self, args: Any, backend: str = "sdpa", scale: int = 1) -> None:
        self.device, self.config = torch.device(args.device), load_config(args.run.model)
        collate = partial(collate_micro_batches, number=MICRO_BATCHES)
        rows = MICRO_BATCHES * args.run.batch_size * scale
        batches = next(iter(RowLoader(args.data, batch_size=rows, collate=collate)))
        sums = np.zeros(4)
        for batch in batches:
            del batch["denoiser"]
            sides = batch["cu_seqlens"].numpy(), batch["decoder_cu_seqlens"].numpy()
            sums += flops.length_sums(*map(np.diff, sides))
        self.batches = send_to_device(batches, self.device)
        self.tokens, self.targets = sums[:2].sum(), int(sums[1])
        self.work = flops.flops_per_sum(self.config, flops.count_parameters(self.config)) @ sums
        torch.manual_seed(0)
        with self.device:
            self.model = Qwen3ForSeq2SeqLM(self.config).train()
        self.model.set_attn_implementation(backend)
        self.autocast = True
        self.masters: list[torch.Tensor] = []

    def compile(self) -> None:
        """Compile the layers; on a CPU only capture them, which needs no compiler."""
        options = {} if self.device.type == "cuda" else {"backend": "eager"}
        compile_layers(self.model, TrainingConfig(compile=True), **options)

    def shard(self) -> None:
        """Shard over this one device as FSDP2 does over several."""
        if not is_initialized():
            init_process_group(store=HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh(self.device.type, (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in [*layers_of(self.model), self.model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self.autocast = False

    def keep_masters(self) -> None:
        """Compute with bf16 weights that are refreshed from fp32 masters once a step."""
        self.masters = [p.detach().clone() for p in self.model.parameters()]
        self.model.bfloat16()
        self.autocast = False

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Do one optimizer step."""
        for batch in self.batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.model(**batch, num_items_in_batch=self.targets).loss
            loss.backward()
        weights = list(self.model.parameters())
        for master, weight in zip(self.masters, weights, strict=False):
            master.grad = weight.grad.float()
            weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if self.masters:
            torch._foreach_copy_([weight.data for weight in weights], self.masters)

    def measure(self, profile: bool = False) -> dict[str, float]:
        """Return tokens per second, MFU and peak memory, and shares of time by kernel class."""
        if self.masters:
            optimizer: Any = torch.optim.AdamW(self.masters, lr=1e-5, fused=True)
        else:
            optimizer = build_optimizer(self.model, TrainingConfig(lr=1e-5))
        for _ in range(2):  # compiles, and tunes kernels
            self.step(optimizer)
        began, steps = now(self.device), 3
        for _ in range(steps):
            self.step(optimizer)
        seconds = (now(self.device) - began) / steps
        figures = {"tokens/s": self.tokens / seconds, "TFLOP/s": self.work / seconds / 1e12}
        if self.device.type == "cuda":
            figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
            for name, (peak, _) in plan.DEVICES.items():
                if name in torch.cuda.get_device_name():
                    figures["MFU"] = self.work / seconds / peak
        if profile:
            with torch.profiler.profile() as profiler:
                self.step(optimizer)
            figures |= kernel_shares(profiler.key_averages())
        return figures


def measured(
    args: Any, backend: str, *preparations: str, profile: bool = False, scale: int = 1
) -> dict:
    """Measure training after calling these of its methods in order."""
    training = Training(args, backend, scale)
    for name in preparations:
        getattr(training, name)()
    return training.measure(profile)


def kernel_shares(events: Any) -> dict[str, float]:
    """Return the share of the time by class of kernel; on a CPU, of operator."""
    spent: Counter[str] = Counter()
    for event in events:
        time_of = event.self_cpu_time_total
        if torch.cuda.is_available():  # an operator's event repeats the time of its kernels
            is_kernel = event.device_type == DeviceType.CUDA and not event.is_user_annotation
            time_of = event.self_device_time_total if is_kernel else 0
        name = event.key.lower()
        kinds = (kind for kind, words in KERNELS.items() if any(w in name for w in words))
        spent[next(kinds, "other")] += time_of
    return {f"share of {kind}": time / spent.total() for kind, time in spent.most_common()}


def attention_alone(args: Any, backend: str) -> dict[str, Any]:
    """Time both stacks' attention, forward and backward, over the real cumulative lengths."""
    training = Training(args)
    config, device, batch = training.config, training.device, training.batches[0]
    if reason := disagreement(backend, config, device, "bf16"):
        return {"absent": reason}
    training.model.set_attn_implementation(backend)
    source, target = batch["cu_seqlens"], batch["decoder_cu_seqlens"]
    longest, longest_target = batch["max_seqlen"], batch["decoder_max_seqlen"]
    cases = {
        "encoder": Varlen(source, source, longest, longest),
        "decoder": Varlen(target, source + target, longest_target, longest + longest_target, True),
    }
    states = partial(torch.randn, device=device, dtype=torch.bfloat16, requires_grad=True)
    figures = {}
    for name, packed in cases.items():
        module = getattr(training.model.model, name).layers[0].self_attn
        query = states(1, config.num_attention_heads, int(packed.queries[-1]), config.head_dim)
        key = states(1, config.num_key_value_heads, int(packed.keys[-1]), config.head_dim)
        packed.prepare(backend, query[0, 0][None], key.shape[2])
        for repeat in range(4):
            if repeat == 1:  # the first one compiles
                began = now(device)
            attend(module, query, key, key, packed=packed)[0].sum().backward()
        figures[f"ms, {name}"] = 1000 * (now(device) - began) / 3
    return figures


def decode(args: Any) -> dict[str, float]:
    """Decode greedily with a static cache, which generate() compiles on a GPU."""
    rows, source, new = (2, 32, 3) if args.quick else (8, 2048, 64)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = Qwen3ForSeq2SeqLM(load_config(args.run.model)).to(torch.bfloat16).eval()
    for _ in range(2):  # the first time compiles
        first, rest = generate(model, rows, source, new, cache_implementation="static")
    return {"new tokens/s": rows * new / (first + rest)}


def real_run(args: Any, backend: str) -> dict[str, float]:
    """Run the training command's own loop; return tokens per second, MFU and the wait for data."""
    run_training(replace(args.run, attention=backend))
    lines = (Path(args.run.output_dir) / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    return {name: last[name] for name in ("tokens_per_second", "mfu", "data_wait") if name in last}


def now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run_parts(args: Any) -> None:
    """Run all parts in order, then print the targets of a GPU."""
    part("baseline", measured, args, "sdpa", "compile", profile=True)
    times = {}
    for backend in ("sdpa", *FASTEST_FIRST):
        found = part(f"attention, {backend}", attention_alone, args, backend)
        if "ms, encoder" in found:
            times[backend] = found["ms, encoder"] + found["ms, decoder"]
    best = min(times, key=lambda name: times[name], default="sdpa")
    speeds = [part(f"step, {best}", measured, args, best, "compile")]
    speeds.append(part("step, bf16 weights", measured, args, best, "compile", "keep_masters"))
    for scale in (2, 4):
        speeds.append(part(f"step, {scale} x rows", measured, args, best, "compile", scale=scale))
    part("FSDP2, compiled after", measured, args, best, "shard", "compile")
    part("FSDP2, compiled before", measured, args, best, "compile", "shard")
    decoding = part("decoding, static cache", decode, args)
    real = part("run_training", real_run, args, best)

    if args.device == "cuda":
        nan = float("nan")
        fastest = max(speeds, key=lambda speed: speed.get("tokens/s", 0.0))
        target("mfu", fastest.get("MFU", nan), ">= 0.45", "{:.3g}")
        target("tokens-per-second", fastest.get("tokens/s", nan), ">= 110000", "{:.0f}")
        share = real.get("tokens_per_second", nan) / speeds[0].get("tokens/s", nan)
        target("real-loop-over-bench", share, ">= 0.97", "{:.3g}")
        decoded = decoding.get("new tokens/s", nan)
        target("decoding-static-cache", decoded, ">= 2500 tokens/s on an H200", "{:.0f}")


def main() -> None:
    """Run everything on one device and write the figures."""
    parser = command_line(__doc__)
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.quick:
        parser.error("no CUDA GPU is visible; --quick tests this script without one")

    with tempfile.TemporaryDirectory() as folder:
        args.run = make_run(Path(folder), args.quick)
        args.data = UL2Data(args.run.data, load_tokenizer(args.run.model))
        run_parts(args)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    slug = "-".join(name.lower().split()) + "-quick" * args.quick
    file = args.output or Path(__file__).parent / f"results/gpu-{slug}.json"
    minutes = round((time.time() - _began) / 60, 1)
    write(file, device=name, minutes=minutes, parts=_parts)
    print(f"wrote {file} after {minutes} minutes")


if __name__ == "__main__":
    main()
