"""Measure the 0.6B pair on one GPU: random weights, no network, one call, under 9 minutes.

    python bench/gpu_report.py                       # one CUDA GPU
    python bench/gpu_report.py --device cpu --tiny   # the same parts at toy size, as a test

The parts, in order: the recipe's step with a profile, attention alone by backend, the step with the
fastest, with bf16 weights and with more rows, FSDP2 on one device, decoding, and `run_training`
itself. Each prints when it is done, and none starts after the time limit.

A step is 4 micro-batches of documents with UL2's mixture of lengths, then AdamW. MFU counts the
operations of `training/plan.py` over real tokens.
"""

import argparse
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.attention_qwen3_encdec import Varlen, attend
from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.data.ul2 import PRESETS, raw_length
from qwen3_encdec.folders import package_versions, write_json
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer
from qwen3_encdec.training import plan
from qwen3_encdec.training.config import TrainingConfig, load_config
from qwen3_encdec.training.layers import FASTEST_FIRST, compile_layers, disagreement, layers_of
from qwen3_encdec.training.loop import run_training
from qwen3_encdec.training.optimization import build_optimizer

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
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        figures = {"failed": f"{type(error).__name__}: {reason}"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _parts[name] = figures
    for figure, value in figures.items():
        shown = value if isinstance(value, str) else f"{value:.4g}"
        print(f"{name:<34} {figure:<24} {shown}", flush=True)
    return figures


def documents(source_length: int, target_length: int, rows: int, vocabulary: int) -> list[Any]:
    """Make random documents with UL2's length mixture that fill the target budget of ``rows``."""
    rng, preset = np.random.default_rng(0), PRESETS["t5gemma2"]
    weights = np.array([denoiser.weight for denoiser in preset])
    found: list[tuple[np.ndarray, np.ndarray]] = []
    while sum(len(target) for _, target in found) < rows * target_length:
        denoiser = preset[int(rng.choice(len(preset), p=weights / weights.sum()))]
        raw = int(rng.integers(16, raw_length(denoiser, source_length, target_length) + 1))
        kept = max(2, round(raw * (1 - denoiser.corruption)))
        ids = rng.integers(0, vocabulary - 110, size=kept + max(2, raw - kept + 1))
        found.append((ids[:kept], ids[kept:]))
    return found


class Training:
    """The pair, its optimizer and the micro-batches of one step."""

    def __init__(self, args: Any, backend: str = "sdpa", rows: int = 8) -> None:
        self.device = torch.device(args.device)
        self.config = model_config(args.tiny)
        lengths = (32, 24) if args.tiny else (2048, 1024)
        rows = 1 if args.tiny else rows
        self.batches, sums = [], np.zeros(4)
        pairs = documents(*lengths, 4 * rows, self.config.vocab_size)
        for number in range(4):
            batch = collate_packed(*zip(*pairs[number::4], strict=True))
            self.batches.append(
                {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            )
            sizes = [[len(side) for side in pair] for pair in pairs[number::4]]
            sums += plan.length_sums(*np.array(sizes).T)
        self.tokens, self.targets = int(sums[0] + sums[1]), int(sums[1])
        counted = plan.count_parameters(self.config)
        self.work = float(plan.flops_per_sum(self.config, counted) @ sums)
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
        from torch.distributed import HashStore, init_process_group, is_initialized
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            init_process_group(backend, store=HashStore(), rank=0, world_size=1)
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
        _synchronize(self.device)
        began, steps = time.perf_counter(), 3
        for _ in range(steps):
            self.step(optimizer)
        _synchronize(self.device)
        seconds = (time.perf_counter() - began) / steps
        figures = {"tokens/s": self.tokens / seconds, "TFLOP/s": self.work / seconds / 1e12}
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        if peak := next((plan.DEVICES[known][0] for known in plan.DEVICES if known in name), None):
            figures["MFU"] = self.work / seconds / peak
            figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        if profile:
            with torch.profiler.profile() as profiler:
                self.step(optimizer)
            figures |= kernel_shares(profiler.key_averages())
        return figures


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
    dtype = torch.bfloat16
    if reason := disagreement(backend, config, device):
        return {"absent": reason}
    module = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation=backend),
        scaling=config.head_dim**-0.5,
        attention_dropout=0.0,
        training=True,
        is_causal=False,
        num_key_value_groups=config.num_attention_heads // config.num_key_value_heads,
    )
    source, target = batch["cu_seqlens"], batch["decoder_cu_seqlens"]
    longest, longest_target = batch["max_seqlen"], batch["decoder_max_seqlen"]
    cases = {
        "encoder": Varlen(source, source, longest, longest),
        "decoder": Varlen(target, source + target, longest_target, longest + longest_target, True),
    }
    figures = {}
    for name, packed in cases.items():
        queries, keys = int(packed.queries[-1]), int(packed.keys[-1])
        shape = (1, config.num_attention_heads, queries, config.head_dim)
        query = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        shape = (1, config.num_key_value_heads, keys, config.head_dim)
        key = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        packed.prepare(backend, query[0, 0][None], keys)
        for repeat in range(4):
            if repeat == 1:  # the first one compiles
                _synchronize(device)
                began = time.perf_counter()
            attend(module, query, key, key, packed=packed)[0].sum().backward()
        _synchronize(device)
        figures[f"ms, {name}"] = 1000 * (time.perf_counter() - began) / 3
    return figures


def decode(args: Any) -> dict[str, float]:
    """Decode greedily with a static cache, which generate() compiles on a GPU."""
    device, (rows, source, new) = torch.device(args.device), (8, 2048, 64)
    if args.tiny:
        rows, source, new = 2, 32, 3
    torch.manual_seed(0)
    with device:
        model = Qwen3ForSeq2SeqLM(model_config(args.tiny)).to(torch.bfloat16).eval()
    ids = torch.randint(2, 100, (rows, source), device=device)
    for _ in range(2):
        began = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
        )
        _synchronize(device)
        seconds = time.perf_counter() - began
    return {"new tokens/s": rows * new / seconds}


def real_run(args: Any, backend: str) -> dict[str, float]:
    """Run the training command's own loop on package-docs; return tokens per second and MFU."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = build_tokenizer(num_ranks=8000 if args.tiny else None)
        config = model_config(args.tiny, tokenizer)
        Qwen3ForSeq2SeqLM(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        lengths = (64, 64) if args.tiny else (2048, 1024)
        settings = {
            "model": folder / "model", "output_dir": folder / "run", "trackers": "[]",
            "data.source_length": lengths[0], "data.target_length": lengths[1], "log_every": 3,
            "batch_size": 1 if args.tiny else 8, "gradient_accumulation_steps": 4, "eval_every": 0,
            "max_steps": 3 if args.tiny else 15, "warmup_steps": 1, "attention": backend,
            "num_workers": 0 if args.tiny else 2,
        }  # fmt: skip
        run_training(load_config(None, [f"{key}={value}" for key, value in settings.items()]))
        lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    return {name: last[name] for name in ("tokens_per_second", "mfu", "data_wait") if name in last}


def model_config(tiny: bool, tokenizer: Any = None) -> Qwen3EncoderDecoderConfig:
    """Return the 0.6B pair's configuration or a toy one, with the source gate of `initialize`."""
    sizes: dict[str, Any] = {"source_gate": True} | (TINY if tiny else {})
    if tokenizer is not None:
        names = ("num_sentinel_tokens", "pad_token_id", "eos_token_id")
        sizes |= {name: getattr(tokenizer, name) for name in names}
        sizes["vocab_size"] = len(tokenizer)
    return Qwen3EncoderDecoderConfig(**sizes)


def measured(
    args: Any, backend: str, *preparations: str, rows: int = 8, profile: bool = False
) -> dict[str, float]:
    """Measure training after calling these of its methods in order."""
    training = Training(args, backend, rows)
    for name in preparations:
        getattr(training, name)()
    return training.measure(profile)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run everything on one device and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="toy size")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible; --device cpu --tiny tests this script without one")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu requires --tiny; the full size needs a GPU")

    part("baseline", measured, args, "sdpa", "compile", profile=True)
    times = {}
    for backend in ("sdpa", *FASTEST_FIRST):
        found = part(f"attention, {backend}", attention_alone, args, backend)
        if "ms, encoder" in found:
            times[backend] = found["ms, encoder"] + found["ms, decoder"]
    best = min(times, key=lambda name: times[name], default="sdpa")
    speeds = [part(f"step, {best}", measured, args, best, "compile")]
    speeds.append(part("step, bf16 weights", measured, args, best, "compile", "keep_masters"))
    for rows in (16, 32):
        speeds.append(part(f"step, {rows} rows", measured, args, best, "compile", rows=rows))
    part("FSDP2, compiled after", measured, args, best, "shard", "compile")
    part("FSDP2, compiled before", measured, args, best, "compile", "shard")
    part("decoding, static cache", decode, args)
    real = part("run_training", real_run, args, best)

    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    slug = "-".join(name.lower().split()) + "-tiny" * args.tiny
    minutes, file = round((time.time() - _began) / 60, 1), args.output / f"gpu-{slug}.json"
    found = {"device": name, "versions": package_versions(), "minutes": minutes, "parts": _parts}
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(file, found)
    print(f"wrote {file} after {minutes} minutes")
    if args.device == "cuda":
        bench = speeds[0].get("tokens/s", float("nan"))
        targets = {
            "mfu": (max(speed.get("MFU", 0.0) for speed in speeds), 0.45),
            "tokens-per-second": (max(speed.get("tokens/s", 0.0) for speed in speeds), 110_000),
            "real-loop-over-bench": (real.get("tokens_per_second", 0.0) / bench, 0.97),
        }
        for target, (figure, wanted) in targets.items():
            state = "met" if figure >= wanted else "missed"
            print(f"target {target}: {figure:.3g} (wanted >= {wanted:g}) {state}")


if __name__ == "__main__":
    main()
