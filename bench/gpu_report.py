"""Measure the 0.6B pair on one GPU: random weights, no network, one call, under 9 minutes.

    python bench/gpu_report.py            # one CUDA GPU
    python bench/gpu_report.py --quick    # the same parts at toy size, as a test without a GPU

The parts, in order: the recipe's step with a profile, attention alone by backend, the step with the
fastest, with bf16 weights and with more rows, FSDP2 on one device, decoding, and `run_training`
itself. Each prints when it is done, and none starts after the time limit.

A step is 4 micro-batches of documents with UL2's mixture of lengths, then AdamW. MFU counts the
operations of `training/plan.py` over real tokens.
"""

import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from measure import command_line, generate, save_pair, target, write
from torch.distributed import HashStore, init_process_group, is_initialized
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.attention_qwen3_encdec import Varlen, attend
from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.data.ul2 import PRESETS, corrupt, raw_length
from qwen3_encdec.folders import first_line
from qwen3_encdec.training import flops, plan
from qwen3_encdec.training.config import TrainingConfig, load_config
from qwen3_encdec.training.layers import FASTEST_FIRST, compile_layers, disagreement, layers_of
from qwen3_encdec.training.loop import run_training
from qwen3_encdec.training.optimization import build_optimizer

LENGTHS, ROWS = (1024, 512), 16  # as in configs/recipes/0.6b-1gpu.yaml
TINY = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 64}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 331}
TINY |= {"num_sentinel_tokens": 11, "pad_token_id": 0, "eos_token_id": 1}
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


def pair_config(tiny: bool) -> Qwen3EncoderDecoderConfig:
    """Return the 0.6B pair's configuration or a toy one, with the source gate of `initialize`."""
    return Qwen3EncoderDecoderConfig(source_gate=True, **TINY if tiny else {})


def documents(config: Any, source_length: int, target_length: int, rows: int) -> list[Any]:
    """Corrupt random texts of UL2's length mixture until their targets fill `rows`."""
    rng, preset = np.random.default_rng(0), PRESETS["t5gemma2"]
    weights = np.array([denoiser.weight for denoiser in preset])
    words = config.vocab_size - config.num_sentinel_tokens  # the sentinels come last
    marks = {"sentinel_ids": np.arange(words, config.vocab_size), "eos_id": config.eos_token_id}
    found: list[tuple[np.ndarray, np.ndarray]] = []
    while sum(len(target) for _, target in found) < rows * target_length:
        denoiser = preset[int(rng.choice(len(preset), p=weights / weights.sum()))]
        length = rng.integers(16, raw_length(denoiser, source_length, target_length) + 1)
        found.append(corrupt(rng.integers(2, words, length), denoiser, rng, **marks))
    return found


class Training:
    """The pair, its optimizer and the micro-batches of one step."""

    def __init__(self, args: Any, backend: str = "sdpa", rows: int = ROWS) -> None:
        self.device, self.config = torch.device(args.device), pair_config(args.quick)
        pairs = documents(self.config, *(32, 24, 4) if args.quick else (*LENGTHS, 4 * rows))
        batches = [collate_packed(*zip(*pairs[i::4], strict=True)) for i in range(4)]
        self.batches = send_to_device(batches, self.device)
        lengths = np.array([[len(source), len(target)] for source, target in pairs])
        self.tokens, self.targets = int(lengths.sum()), int(lengths[:, 1].sum())
        per_sum = flops.flops_per_sum(self.config, flops.count_parameters(self.config))
        self.work = float(per_sum @ flops.length_sums(*lengths.T))
        torch.manual_seed(0)
        with self.device:
            self.model = Qwen3ForSeq2SeqLM(self.config).train()
        self.model.set_attn_implementation(backend)
        self.autocast = True
        self.masters: list[torch.Tensor] = []

    def compile(self) -> None:
        """Compile the layers; on a CPU only capture them, which needs no compiler."""
        torch._dynamo.reset()
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
    args: Any, backend: str, *preparations: str, profile: bool = False, **rows: int
) -> dict:
    """Measure training after calling these of its methods in order."""
    training = Training(args, backend, **rows)
    for name in preparations:
        getattr(training, name)()
    return training.measure(profile)


def kernel_shares(events: Any) -> dict[str, float]:
    """Return the share of the time by class of kernel."""
    spent: Counter[str] = Counter()
    cuda = torch.cuda.is_available()
    for event in events:
        time_of = event.self_device_time_total if cuda else event.self_cpu_time_total
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
        model = Qwen3ForSeq2SeqLM(pair_config(args.quick)).to(torch.bfloat16).eval()
    for _ in range(2):  # the first time compiles
        first, rest = generate(model, rows, source, new, cache_implementation="static")
    return {"new tokens/s": rows * new / (first + rest)}


def real_run(args: Any, backend: str) -> dict[str, float]:
    """Run the training command's own loop on package-docs; return tokens per second and MFU."""
    with tempfile.TemporaryDirectory() as name:
        folder, (source, target) = Path(name), (64, 64) if args.quick else LENGTHS
        sizes = {"num_ranks": 8000, **TINY} if args.quick else {}
        settings = {
            "model": save_pair(folder / "model", source_gate=True, **sizes),
            "output_dir": folder / "run", "trackers": "[]", "log_every": 3, "eval_every": 0,
            "data.source_length": source, "data.target_length": target, "attention": backend,
            "batch_size": 1 if args.quick else ROWS, "gradient_accumulation_steps": 4,
            "max_steps": 3 if args.quick else 15, "warmup_steps": 1,
            "num_workers": 0 if args.quick else 2,
        }  # fmt: skip
        run_training(load_config(None, [f"{key}={value}" for key, value in settings.items()]))
        last = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    return {name: last[name] for name in ("tokens_per_second", "mfu", "data_wait") if name in last}


def now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Run everything on one device and write the figures."""
    parser = command_line(__doc__)
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.quick:
        parser.error("no CUDA GPU is visible; --quick tests this script without one")

    part("baseline", measured, args, "sdpa", "compile", profile=True)
    times = {}
    for backend in ("sdpa", *FASTEST_FIRST):
        found = part(f"attention, {backend}", attention_alone, args, backend)
        if "ms, encoder" in found:
            times[backend] = found["ms, encoder"] + found["ms, decoder"]
    best = min(times, key=lambda name: times[name], default="sdpa")
    speeds = [part(f"step, {best}", measured, args, best, "compile")]
    speeds.append(part("step, bf16 weights", measured, args, best, "compile", "keep_masters"))
    for rows in (2 * ROWS, 4 * ROWS):
        speeds.append(part(f"step, {rows} rows", measured, args, best, "compile", rows=rows))
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
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    slug = "-".join(name.lower().split()) + "-quick" * args.quick
    file = args.output or Path(__file__).parent / f"results/gpu-{slug}.json"
    minutes = round((time.time() - _began) / 60, 1)
    write(file, device=name, minutes=minutes, parts=_parts)
    print(f"wrote {file} after {minutes} minutes")


if __name__ == "__main__":
    main()
