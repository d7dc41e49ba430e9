"""Model soups: average several encoders into one, tensor by tensor in fp32.

sentence-transformers' own `merge` uses mergekit and accepts only equal models. This one can also
merge an encoder with the causal Qwen3 it came from, whose tensors have other names and whose
vocabulary lacks the sentinels.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import Qwen3Config

from qwen3_encdec.conversion.card import inherited, write_card
from qwen3_encdec.conversion.extract import pooling_mode
from qwen3_encdec.folders import (
    InputError,
    check_finite,
    check_output,
    copy_without_weights,
    new_folder,
    read_json,
    read_tensors,
    resolve_checkpoint,
    tensor_shapes,
)


def soup(
    models: Sequence[str | Path],
    output_dir: str | Path,
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """Average encoders into a copy of the first one.

    Args:
        models: Encoder folders of one architecture, tokenizer and pooling. From the second on, one
            may be the causal Qwen3 they came from; embedding rows it lacks are left unchanged.
        output_dir: Folder to write; built beside it and renamed into place.
        weights: Share of each model, equal by default; divided by their sum.

    Raises InputError if an argument is invalid, or models differ in more than their weights.
    """
    if len(models) < 2:
        raise InputError("a soup needs at least two models")
    weights = weights or [1.0] * len(models)
    total = sum(weights)
    if len(weights) != len(models) or min(weights) < 0 or not 0 < total < math.inf:
        rule = f"{len(models)} non-negative numbers with a positive, finite sum"
        raise InputError(f"weights {weights} must be {rule}")
    shares = [weight / total for weight in weights]
    output_dir = check_output(output_dir, "encoder", inputs=models)
    folders = [resolve_checkpoint(model) for model in models]
    first = folders[0]
    if not (first / "modules.json").is_file():
        raise InputError(f"{first} is not an encoder folder; the first model must be one")
    if modules := sorted(file.parent.name for file in first.glob("*/*.safetensors")):
        raise InputError(f"{first} has modules with weights of their own: {', '.join(modules)}")
    for folder in folders[1:]:
        _check_same(first, folder)
    own = _read(first)
    merged = {name: tensor.float().clone() for name, tensor in own.items()}
    for folder, share in zip(folders[1:], shares[1:], strict=True):
        for name, tensor in _read(folder).items():
            rows = len(tensor)
            merged[name][:rows] += share * (tensor.float() - own[name][:rows].float())
    facts = {"soup_of": list(map(str, models)), "weights": shares}
    with new_folder(output_dir, "encoder", **facts) as folder:
        copy_without_weights(first, folder)
        tensors = {name: tensor.to(own[name].dtype) for name, tensor in merged.items()}
        save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
        write_card(folder, output_dir.resolve().name, inherited(first), {"Soup": facts})


def _read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = _of_encoder(dict(read_tensors(folder)))
    check_finite(folder, tensors.items())
    return tensors


def _of_encoder(named: dict[str, Any]) -> dict[str, Any]:
    """Rename tensors or shapes to an encoder's names, without the head of a causal model."""
    named.pop("lm_head.weight", None)
    return {name.removeprefix("model."): value for name, value in named.items()}


def _check_same(first: Path, other: Path) -> None:
    configs = [read_json(folder / "config.json") for folder in (first, other)]
    if any(config.get("model_type") != "qwen3" for config in configs):
        raise InputError(f"{first} and {other} must both have model_type qwen3")
    causal = configs[1].get("is_causal") is not False
    facts: list[dict[str, Any]] = []
    for folder in (first, other):
        stock = Qwen3Config.from_pretrained(folder)
        shapes = _of_encoder(tensor_shapes(folder))
        if causal:  # it has no rows for the sentinels
            shapes["embed_tokens.weight"] = shapes["embed_tokens.weight"][1:]
        else:
            shapes["pooling"] = pooling_mode(read_json(folder / "1_Pooling/config.json"))
        for name in ("num_attention_heads", "rms_norm_eps", "rope_parameters"):
            shapes[name] = getattr(stock, name)
        shapes["vocabulary"] = read_json(folder / "tokenizer.json")["model"]["vocab"]
        facts.append(shapes)
    for name in sorted(facts[0].keys() | facts[1].keys()):
        if facts[0].get(name) != facts[1].get(name):
            raise InputError(f"{other} differs from {first} in more than its weights: {name}")
