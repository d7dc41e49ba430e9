"""What one GPU makes of the model. Random weights, no network, one call.

    python bench/gpu_report.py                        # one CUDA GPU, under 9 minutes on an H100
    python bench/gpu_report.py --device cpu --tiny    # the same parts at toy size, to test this script

| part           | what is measured                                                                                   |
|----------------|----------------------------------------------------------------------------------------------------|
| correctness    | every attention backend and loss against fp32 eager, one example at a time, on the CPU             |
| training       | the 0.6B pair at 2k context: tokens/s, MFU, peak memory; two precisions, compiled or not, each loss |
| loss alone     | 2048 tokens x 1024 x 152,036 classes: seconds and peak memory of each loss and of the plain one    |
| decoding       | greedy tokens/s, batch 8 after 2,048 source tokens: growing cache, and static cache compiled       |
| T5Gemma 2      | the 0.6B pair against T5Gemma 2 of the same size, as in `bench/model.py`                           |

A part that cannot run (a package is absent, memory is out, time is up) says so in one line; the
others go on.

- An error is the norm of the difference over the norm of the reference. In fp32 it must be within
  1e-5; in bf16 within twice that of bf16 eager (of the plain loss), flash-attention's own
  criterion. The control lets the pairs of a row see each other and has to fail both.
- A training step is 4 micro-batches of packed rows with UL2's mixture of lengths, then AdamW; MFU
  is by `training.budget.flops` over real tokens. "autocast": bf16 autocast over fp32 weights;
  "fsdp2": FSDP2 on this one device with bf16 parameters and fp32 reduction, as `scripts/train.py`
  does on several. Compiled: each layer by itself, with dynamic shapes.
"""

import argparse
import atexit
import gc
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import model as bench
import numpy as np
import torch
from torch.nn import attention

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.data.collate import collate, pack
from qwen3_encdec.data.ul2 import PRESETS, Example, raw_length
from qwen3_encdec.folders import write_json
from qwen3_encdec.modeling_qwen3_encdec import linear_cross_entropy
from qwen3_encdec.training.plan import count_parameters, flops, peak_flops

CHECKED: dict[str, Any] = {
    "vocab_size": 331, "num_sentinel_tokens": 11, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": 300, "eos_token_id": 301,
    "initializer_range": 0.1,
}  # fmt: skip
BACKENDS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
LOSSES = ("chunked", "liger", "cce")
FLASH = ("FA3", "FA4")  # what torch's flash attention can be done by; its own is FlashAttention-2
FP32_TOLERANCE, BF16_FACTOR = 1e-5, 2.0
BF16_NOISE = 1e-4  # an error below is luck, and no measure for others
TIME_LIMIT = 7.0  # minutes after which no part begins

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    config: dict[str, Any]
    size: dict[str, int]  # of the comparison
    lengths: tuple[int, int, int]  # source and target tokens of a row, rows of a micro-batch
    loss_shape: tuple[int, int, int]
    decode: tuple[int, int, int]  # batch, source tokens, new tokens
    sources: tuple[int, int]  # of the comparison
    examples: int
    rounds: int


FULL = Scale(
    config={},
    size={
        "hidden_size": 1024,
        "layers": 28,
        "vocab_size": 152_036,
        "heads": 16,
        "kv_heads": 8,
        "head_dim": 128,
    },
    lengths=(2048, 1024, 8),
    loss_shape=(2048, 1024, 152_036),
    decode=(8, 2048, 64),
    sources=(512, 4096),
    examples=16,
    rounds=3,
)
TINY = Scale(
    config=CHECKED,
    size=bench.QUICK.sizes["tiny"],
    lengths=(32, 24, 1),
    loss_shape=(64, 32, 800),
    decode=(2, 32, 3),
    sources=(16, 48),
    examples=4,
    rounds=1,
)


class Report:
    """Parts that may fail, and what they found."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Any]] = {}
        self.began = time.time()

    def part(
        self, name: str, measure: Callable[..., dict[str, Any]], *arguments: Any
    ) -> dict[str, Any]:
        """Run one part and print its figures, or the one line that says why there are none."""
        try:
            gc.collect()  # a failed part's frames hold tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if time.time() - self.began > 60 * TIME_LIMIT:
                raise TimeoutError(f"not started, {TIME_LIMIT:g} minutes were up")
            figures = measure(*arguments)
        except (
            Exception
        ) as error:  # whatever a kernel or a missing package raises, the other parts go on
            state = "absent" if isinstance(error, (ImportError, NotImplementedError)) else "failed"
            figures = {
                state: f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            }
        self.parts[name] = figures
        for figure, value in figures.items():
            print(
                f"{name:<36} {figure:<28} {value if isinstance(value, str) else format(value, '.4g')}",
                flush=True,
            )
        return figures


# ---- correctness


def make_rows(
    source_length: int, target_length: int, rows: int, vocab_size: int
) -> list[list[Example]]:
    """Packed rows of random tokens with the length mixture of UL2 on documents of up to one raw
    chunk.
    """
    rng = np.random.default_rng(0)
    preset = PRESETS["t5gemma2"]
    weights = np.array([denoiser.weight for denoiser in preset])
    examples: list[Example] = []
    while len(packed := pack(examples, source_length, target_length)) < rows + 1:
        for _ in range(4 * rows):
            index = int(rng.choice(len(preset), p=weights / weights.sum()))
            raw = int(rng.integers(16, raw_length(preset[index], source_length, target_length) + 1))
            source = max(2, round(raw * (1 - preset[index].corruption)))
            ids = rng.integers(0, vocab_size - 110, size=(source + max(2, raw - source + 1)))
            examples.append(Example(ids[:source], ids[source:], index))
    return packed[:rows]


def make_batch(rows: list[list[Example]], pad_id: int, device: torch.device) -> Batch:
    """The collated rows on a device, masks on the CPU, where the model reads how rows are divided."""
    batch = collate(rows, pad_id=pad_id)
    return {
        name: value if "mask" in name else value.to(device)
        for name, value in batch.items()
        if name != "denoiser"
    }


def compile_layers(model: Qwen3ForSeq2SeqLM) -> None:
    """Compile every layer by itself.

    On a CPU the graphs are captured only, which needs no C++ compiler.
    """
    backend = "inductor" if model.device.type == "cuda" else "eager"
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        layer.compile(dynamic=True, backend=backend)


def make_checked(backend: str, dtype: torch.dtype, device: torch.device) -> Qwen3ForSeq2SeqLM:
    """The small model whose answers are compared, on a backend that is really used."""
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig(**CHECKED)).to(device).train()
    for parameter in (
        model.parameters()
    ):  # not the rotary frequencies, which stay in fp32 when a model is loaded
        parameter.data = parameter.data.to(dtype)
    model.set_attn_implementation(backend)
    if model.config._attn_implementation != backend:
        raise ValueError(f"transformers chose {model.config._attn_implementation} for {backend}")
    return model


def answers(model: Qwen3ForSeq2SeqLM, batches: list[Batch], tokens: int) -> dict[str, torch.Tensor]:
    """Losses of all target tokens in order and the embedding's gradient, as fp32 on the CPU."""
    losses = []
    for batch in batches:
        output = model(**batch, num_items_in_batch=tokens)
        output.loss.backward()
        losses.append(output.token_losses[batch["decoder_attention_mask"] > 0])
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    return {"loss": torch.cat(losses).float().cpu(), "gradient": gradient.float().cpu()}


def padded_logits(model: Qwen3ForSeq2SeqLM, batches: list[Batch]) -> torch.Tensor:
    """[N, V] logits of the real target tokens, by the path that has masks instead of segments."""
    logits = []
    for batch in batches:
        inputs = {
            name: batch[name] for name in ("input_ids", "attention_mask", "decoder_attention_mask")
        }
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        with torch.no_grad():
            logits.append(model.eval()(**inputs).logits[batch["decoder_attention_mask"] > 0])
    return torch.cat(logits).float().cpu()


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return (
        torch.linalg.vector_norm(found - reference) / torch.linalg.vector_norm(reference)
    ).item()


class Correctness:
    """Holds the reference: fp32, eager, on the CPU, one example at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rows = make_rows(200, 150, 3, CHECKED["vocab_size"])
        self.examples = [[example] for row in self.rows for example in row]
        self.tokens = sum(len(example.target) for (example,) in self.examples)
        cpu = torch.device("cpu")
        model = make_checked("eager", torch.float32, cpu)
        alone = [make_batch([row], CHECKED["pad_token_id"], cpu) for row in self.examples]
        self.reference = answers(model, alone, self.tokens) | {
            "padded logits": padded_logits(model, alone)
        }

    def errors(
        self, backend: str, dtype: torch.dtype, compiled: bool = False, control: bool = False
    ) -> dict[str, Any]:
        """Errors of packed losses, of their gradient, and of padded logits."""
        model = make_checked(backend, dtype, self.device)
        if compiled:
            compile_layers(model)
        packed, padded = (
            make_batch(rows, CHECKED["pad_token_id"], self.device)
            for rows in (self.rows, self.examples)
        )
        if control:  # the pairs of a row see each other
            for name in ("attention_mask", "decoder_attention_mask"):
                packed[name] = (packed[name] > 0).long()
        found = answers(model, [packed], self.tokens)
        if not control:
            found["padded logits"] = padded_logits(model, [padded])
        return {name: error(value, self.reference[name]) for name, value in found.items()}


def require_loss(implementation: str, device: torch.device) -> None:
    """Raise if a loss cannot be had here."""
    package = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}.get(implementation)
    if package and find_spec(package) is None:
        raise ImportError(f"{package} is not installed")
    if package and device.type == "cpu":
        raise NotImplementedError(f"{package} runs on CUDA only")


def loss_errors(implementation: str, device: torch.device) -> dict[str, Any]:
    """Errors of a bf16 loss and its gradients against fp32 cross-entropy of the same numbers."""
    require_loss(implementation, device)
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 128).bfloat16(), torch.randn(5_000, 128).mul(0.3).bfloat16()
    labels = torch.randint(0, 5_000, (300,)).masked_fill(torch.rand(300) < 0.1, -100)

    def results(kind: str, dtype: torch.dtype, place: torch.device) -> dict[str, torch.Tensor]:
        states, matrix = (part.to(place, dtype).requires_grad_() for part in (hidden, weight))
        if kind == "plain":
            logits = torch.nn.functional.linear(states, matrix).float()
            value = torch.nn.functional.cross_entropy(logits, labels.to(place))
        else:
            value = linear_cross_entropy(kind, states, matrix, labels.to(place))[0]
        value.backward()
        assert states.grad is not None
        assert matrix.grad is not None
        found = {
            "value": value.detach(),
            "states' gradient": states.grad,
            "matrix' gradient": matrix.grad,
        }
        return {name: part.float().cpu() for name, part in found.items()}

    reference = results("plain", torch.float32, torch.device("cpu"))
    found = results(implementation, torch.bfloat16, device)
    return {name: error(value, reference[name]) for name, value in found.items()}


def check(report: Report, device: torch.device) -> list[tuple[str, float, float, bool]]:
    """All of correctness; the targets it has to meet."""
    correctness = Correctness(device)
    errors: dict[str, list[float]] = {"fp32": [], "bf16": []}
    controls = {}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        eager = report.part(f"correct {label} eager", correctness.errors, "eager", dtype)
        scale = eager if label == "bf16" else None
        errors[label].append(largest(eager, scale))
        for backend in BACKENDS[1:]:
            if "flash" in backend and label == "fp32":
                continue  # there is none
            found = report.part(f"correct {label} {backend}", correctness.errors, backend, dtype)
            errors[label].append(largest(found, scale))
        control = report.part(
            f"correct {label} control", correctness.errors, "sdpa", dtype, False, True
        )
        controls[label] = largest(control, scale)
    compiled = report.part(
        "correct bf16 sdpa compiled", correctness.errors, "sdpa", torch.bfloat16, True
    )
    errors["bf16"].append(largest(compiled, eager))
    for package in FLASH:
        found = report.part(
            f"correct bf16 sdpa {package}",
            by_flash,
            package,
            correctness.errors,
            "sdpa",
            torch.bfloat16,
        )
        errors["bf16"].append(largest(found, eager))
    plain = report.part("correct bf16 loss plain", loss_errors, "plain", device)
    losses = [
        report.part(f"correct bf16 loss {name}", loss_errors, name, device) for name in LOSSES
    ]
    return [
        ("correctness-fp32", float(np.max(errors["fp32"])), FP32_TOLERANCE, False),
        ("correctness-fp32-control", controls["fp32"], FP32_TOLERANCE, True),
        ("correctness-bf16-over-eager", float(np.max(errors["bf16"])), BF16_FACTOR, False),
        ("correctness-bf16-over-eager-control", controls["bf16"], BF16_FACTOR, True),
        (
            "losses-bf16-over-plain",
            float(np.max([largest(found, plain) for found in losses])),
            BF16_FACTOR,
            False,
        ),
    ]


def largest(found: dict[str, Any], scale: dict[str, Any] | None = None) -> float:
    """The largest error, of each as a multiple of its `scale`.

    0 for what is absent; NaN, which meets no target, for what failed.
    """
    if "absent" in found:
        return 0.0
    if "failed" in found or "failed" in (scale or {}):
        return math.nan
    return float(
        np.max(
            [
                value / (max(scale[name], BF16_NOISE) if scale else 1.0)
                for name, value in found.items()
            ]
        )
    )


# ---- speed and memory


class Training:
    """The pair, its optimizer and the micro-batches of one step;

    made when they are first needed.
    """

    def __init__(self, scale: Scale, device: torch.device, precision: str, compiled: bool = False):
        self.device, self.precision, self.compiled = device, precision, compiled
        self.config = Qwen3EncoderDecoderConfig(**scale.config)
        source, target, number = scale.lengths
        rows = make_rows(source, target, 4 * number, self.config.vocab_size)
        self.pairs = [example for row in rows for example in row]
        self.groups = [rows[i::4] for i in range(4)]

    @cached_property
    def batches(self) -> list[Batch]:
        """The micro-batches on the device."""
        assert self.config.pad_token_id is not None
        return [make_batch(rows, self.config.pad_token_id, self.device) for rows in self.groups]

    @cached_property
    def model(self) -> Qwen3ForSeq2SeqLM:
        """Random weights in fp32, compiled and sharded as asked for."""
        torch.manual_seed(0)
        with self.device:
            model = Qwen3ForSeq2SeqLM(self.config).train()
        if self.compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            compile_layers(model)
        if self.precision == "fsdp2":
            shard(model)
        return model

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Fused AdamW."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self, loss_implementation: str) -> float:
        """One optimizer step; its seconds."""
        items = sum(len(example.target) for example in self.pairs)
        batches, optimizer = self.batches, self.optimizer
        bench.synchronize(self.device.type)
        began = time.perf_counter()
        for batch in batches:
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.precision == "autocast"
            ):
                loss = self.model(
                    **batch, num_items_in_batch=items, loss_implementation=loss_implementation
                ).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bench.synchronize(self.device.type)
        return time.perf_counter() - began

    def measure(self, loss_implementation: str) -> dict[str, float]:
        """Real tokens per second, MFU and peak memory with one of the losses."""
        require_loss(loss_implementation, self.device)
        first = self.step(loss_implementation)  # compiles, and tunes kernels
        self.step(loss_implementation)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = sum(self.step(loss_implementation) for _ in range(3)) / 3
        tokens, sizes = (
            bench.count_tokens([(e.source, e.target) for e in self.pairs]),
            count_parameters(self.config),
        )
        work = sum(flops(self.config, sizes, len(e.source), len(e.target)) for e in self.pairs)
        figures = {
            "tokens/s": tokens / seconds,
            "step seconds": seconds,
            "TFLOP/s": work / seconds / 1e12,
        }
        if peak := peak_flops(self.device, 1):
            figures["MFU"] = work / seconds / peak
        if self.device.type == "cuda":
            figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        if self.compiled:
            counters = torch._dynamo.utils.counters
            figures |= {"first step seconds": first, "graphs": counters["stats"]["unique_graphs"]}
            figures["graph breaks"] = sum(counters["graph_break"].values())
        return figures


def shard(model: Qwen3ForSeq2SeqLM) -> None:
    """FSDP2 over one device, with the precisions of `scripts/train.py`."""
    from torch.distributed import (
        HashStore,
        destroy_process_group,
        init_process_group,
        is_initialized,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = model.device.type
    if not is_initialized():
        init_process_group(
            "nccl" if kind == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1
        )
        atexit.register(destroy_process_group)
    mesh = init_device_mesh(kind, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def by_flash(
    package: str, measure: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """Measure while torch's own flash attention, varlen too, is done by "FA3" or "FA4", if that is
    installed.
    """
    attention.activate_flash_attention_impl(package)
    try:
        return measure(*arguments)
    finally:
        attention.restore_flash_attention_impl()


def train(report: Report, scale: Scale, device: torch.device) -> None:
    """Compiled training: with torch's own flash attention or another package's, and with each loss."""
    training = Training(scale, device, "autocast", True)
    report.part("train autocast compiled chunked", training.measure, "chunked")
    for package in FLASH:
        measure = Training(scale, device, "autocast", True).measure
        report.part(f"train autocast compiled {package}", by_flash, package, measure, "chunked")
    for implementation in LOSSES[1:]:
        report.part(f"train autocast compiled {implementation}", training.measure, implementation)


def train_variants(report: Report, scale: Scale, device: torch.device) -> None:
    """What is not compiled or is sharded, other backends, and layers computed again in the backward
    pass.
    """
    for precision, compiled in (("autocast", False), ("fsdp2", True), ("fsdp2", False)):
        name = f"train {precision} {'compiled' if compiled else 'eager'} chunked"
        report.part(name, Training(scale, device, precision, compiled).measure, "chunked")

    def checkpointed() -> dict[str, float]:
        training = Training(scale, device, "autocast")
        training.model.gradient_checkpointing_enable({"use_reentrant": False})
        return training.measure("chunked")

    def on(backend: str) -> dict[str, float]:
        training = Training(scale, device, "autocast")
        training.model.set_attn_implementation(backend)
        return training.measure("chunked")

    report.part("train autocast eager checkpointed", checkpointed)
    for backend in BACKENDS[2:]:
        report.part(f"train autocast eager {backend}", on, backend)


def decode(scale: Scale, device: torch.device, static: bool) -> dict[str, float]:
    """Greedy tokens per second with a growing cache, or with a static one that generate() compiles."""
    batch, source, new_tokens = scale.decode
    torch.manual_seed(0)
    with device:
        model = Qwen3ForSeq2SeqLM._from_config(
            Qwen3EncoderDecoderConfig(**scale.config), dtype=torch.bfloat16
        ).eval()
    options = {"cache_implementation": "static"} if static else {}
    bench.generate(model, batch, source, new_tokens, **options)
    first, rest = bench.generate(model, batch, source, new_tokens, **options)
    return {
        "decode tokens/s": batch * (new_tokens - 1) / rest,
        "prefill tokens/s": batch * source / first,
    }


def loss_alone(implementation: str, scale: Scale, device: torch.device) -> dict[str, float]:
    """Seconds and peak GB of the loss step by itself;

    "plain" is one product and one fp32 cross-entropy.
    """
    require_loss(implementation, device)
    side = {"plain": "theirs", "chunked": "ours"}.get(implementation, implementation)
    return bench.loss(side, scale.loss_shape, "bfloat16", device.type)


def compare(report: Report, scale: Scale, device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """Ours and T5Gemma 2 taking turns, by the stages of `bench/model.py`."""
    turns = bench.Bench(scale.rounds, lambda stage, *arguments: stage(*arguments, device.type))

    def compare_training() -> dict[str, float]:
        pairs = bench.read_examples(
            scale.size["vocab_size"], 600 if tiny else None, 4 * scale.examples
        )
        return turns.compare(bench.train, "bf16", scale.size, "bfloat16", pairs, 4)

    def compare_decoding() -> dict[str, float]:
        try:
            return turns.compare(bench.decode, "bf16", scale.size, "bfloat16", scale.sources, 33)
        finally:
            bench.ready_to_decode.cache_clear()

    report.part("ours / T5Gemma 2, training", compare_training)
    report.part("ours / T5Gemma 2, decoding", compare_decoding)
    return turns.measurements


def environment(device: torch.device) -> dict[str, Any]:
    """Commit, versions and hardware, the GPU's included."""
    found = bench.environment()
    for name in ("triton", "flash-attn", "liger-kernel", "cut-cross-entropy"):
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": gpu.name,
            "gpu memory GB": round(gpu.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return found


def main() -> None:
    """Run everything on one device and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="toy size")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for the results",
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible; --device cpu --tiny tests this script without one")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu goes with --tiny; the full size is for a GPU")
    device, scale, report = torch.device(args.device), TINY if args.tiny else FULL, Report()
    described = environment(device)
    targets = check(report, device)
    train(report, scale, device)
    report.part("decode, growing cache", decode, scale, device, False)
    turns = compare(report, scale, device, args.tiny)
    for implementation in ("plain", *LOSSES):
        report.part(f"loss alone, {implementation}", loss_alone, implementation, scale, device)
    train_variants(report, scale, device)
    report.part("decode, static cache compiled", decode, scale, device, True)
    speeds = {name: part for name, part in report.parts.items() if "step seconds" in part}
    fastest = max(speeds, key=lambda name: speeds[name]["tokens/s"], default=None)

    if args.device == "cuda":
        best = speeds.get(fastest or "", {})
        targets += [
            ("mfu", best.get("MFU", 0.0), 0.40, True),
            ("tokens-per-second", best.get("tokens/s", 0.0), 85_000, True),
        ]
    minutes = round((time.time() - report.began) / 60, 1)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"gpu-{bench.slug(name)}{'-tiny' * args.tiny}.json"
    verdicts = [
        {
            "name": target,
            "figure": figure if math.isfinite(figure) else None,
            "wanted": f"{'>=' if more_is_better else '<='} {wanted:g}",
            "met": figure >= wanted if more_is_better else figure <= wanted,
        }
        for target, figure, wanted, more_is_better in targets
    ]
    write_json(
        path,
        {
            **described,
            "minutes": minutes,
            "parts": report.parts,
            "turns": turns,
            "targets": verdicts,
        },
    )
    print(f"wrote {path} after {minutes} minutes; fastest: {fastest}")
    for verdict in verdicts:
        state = "met" if verdict["met"] else "missed"
        figure = "none" if verdict["figure"] is None else f"{verdict['figure']:.3g}"
        print(f"target {verdict['name']}: {figure} (wanted {verdict['wanted']}) {state}")


if __name__ == "__main__":
    main()
