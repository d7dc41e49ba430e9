"""Share what benchmarks have in common: command line, random model, process, target lines, JSON."""

import argparse
import operator
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
from qwen3_encdec.evaluation.suite import provenance
from qwen3_encdec.folders import write_json
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt, "==": operator.eq}
PRELOADED = ["qwen3_encdec.modeling_qwen3_encdec", "transformers.models.t5gemma2.modeling_t5gemma2"]


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options --quick and --output."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy size: tests the script")
    parser.add_argument("--output", type=_new_file, help="JSON file to write")
    return parser


def _new_file(name: str) -> Path:
    if Path(name).is_dir() or not Path(name).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} must be a file in an existing folder")
    return Path(name)


def save_pair(folder: Path, num_ranks: int | None = None, **settings: Any) -> Path:
    """Save an encoder-decoder with random weights, and its tokenizer cut after `num_ranks`."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(num_ranks=num_ranks)
    settings["vocab_size"] = len(tokenizer)
    for name in ("num_sentinel_tokens", "pad_token_id", "eos_token_id"):
        settings[name] = getattr(tokenizer, name)
    Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def generate(model: Any, rows: int, source: int, new: int, **options: Any) -> tuple[float, float]:
    """Generate after random sources; return seconds to the first token and from it to the last."""
    times = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(10, size, (rows, source), device=model.device)
    options |= {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(ids), "stopping_criteria": [Clock()]}
    began = time.perf_counter()
    model.generate(input_ids=ids, **options)
    assert len(times) == new
    return times[0] - began, times[-1] - times[0]


def alone(measurement: Callable, *arguments: Any) -> Any:
    """Run a function in a fork of a process that has imported the models and computed nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measurement, *arguments).result()


_targets: dict[str, dict[str, Any]] = {}


def target(name: str, figure: float, wanted: str, form: str = "{:.2f}") -> None:
    """Print a figure and whether it is as wanted: a sign and a number, perhaps with words after."""
    sign, number = wanted.split()[:2]
    verdict = "met" if COMPARE[sign](figure, float(number)) else "missed"
    print(f"target {name}: {form.format(figure)} (wanted {wanted}) {verdict}", flush=True)
    _targets[name] = {"figure": figure, "wanted": wanted}


def write(output: Path | None, **figures: Any) -> None:
    """Write the targets and other figures, with what they were measured on, if a file was named."""
    if output:
        facts = provenance(threads=torch.get_num_threads())
        write_json(output, {"provenance": facts, "targets": _targets, **figures})
