"""Soups: one encoder of several, by averaging or by spherical interpolation, tensor by tensor, in
fp32.

sentence-transformers' own `merge` goes through mergekit and takes equal models only. This one also
merges an encoder with the causal Qwen3 it came from, whose tensors have other names, and whose
vocabulary lacks the sentinels.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from transformers import Qwen3Config

from qwen3_encdec.folders import (
    PROVENANCE_FILE,
    InputError,
    check_output,
    copy_without_weights,
    new_folder,
    read_json,
    read_tensors,
    resolve_checkpoint,
    tensor_shapes,
)

T = TypeVar("T")
METHODS = ("linear", "slerp")
# What the shapes of the tensors do not say.
_ARCHITECTURE = ("num_attention_heads", "hidden_act", "rms_norm_eps", "rope_parameters")


def soup(
    models: Sequence[str | Path],
    output_dir: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "linear",
) -> None:
    """Merge encoders into a copy of the first one.

    Args:
        models: Encoder folders of one architecture, tokenizer and pooling. From the second on, one
            may be the causal Qwen3 that they came from: its embedding rows are merged, those that
            it lacks stay the first model's.
        output_dir: Written beside and renamed into place.
        weights: Share of each model, by default equal ones; they are divided by their sum.
        method: `"linear"`, the weighted mean; or `"slerp"`, of two models: along the arc between
            two tensors.

    Raises:
        InputError: fewer than two models, weights that do not fit, an unknown method, or models
            that differ in more than their weights.
    """
    if len(models) < 2:
        raise InputError("a soup needs at least two models")
    if method not in METHODS or (method == "slerp" and len(models) != 2):
        raise InputError(
            f"method {method!r} with {len(models)} models is neither linear nor slerp of two"
        )
    weights = [1.0] * len(models) if weights is None else list(weights)
    valid = len(weights) == len(models) and all(0 <= weight < math.inf for weight in weights)
    if not valid or not sum(weights):
        raise InputError(f"weights {weights} must be {len(models)} numbers of 0 or more, not all 0")
    shares = [weight / sum(weights) for weight in weights]
    output_dir = check_output(output_dir, "encoder")
    folders = [resolve_checkpoint(model) for model in models]
    if not (folders[0] / "modules.json").is_file():
        raise InputError(f"{folders[0]} is no encoder folder; the first model must be one")
    for folder in folders[1:]:
        _check_same(folders[0], folder)
    merged = dict(_of_encoder(read_tensors(folders[0])))
    dtypes = {name: tensor.dtype for name, tensor in merged.items()}
    total = shares[0]
    for folder, share in zip(folders[1:], shares[1:], strict=True):
        total += share
        for name, tensor in _of_encoder(read_tensors(folder)) if share else ():
            rows, ours = len(tensor), merged[name].float()
            meet = slerp if method == "slerp" else torch.lerp
            # A mean of means: weighted by its share of the models so far.
            met = meet(ours[:rows], tensor.float(), share / total)
            merged[name] = torch.cat([met, ours[rows:]])
    facts: dict[str, Any] = {"soup_of": list(map(str, models)), "weights": shares, "method": method}
    if (record := folders[0] / PROVENANCE_FILE).is_file():
        first = read_json(record)
        facts |= {key: first[key] for key in ("finetuned_from", "source") if key in first}
    with new_folder(output_dir, "encoder", **facts) as folder:
        copy_without_weights(folders[0], folder)
        tensors = {name: tensor.to(dtypes[name]).contiguous() for name, tensor in merged.items()}
        save_torch_state_dict(tensors, folder, metadata={"format": "pt"})


def _of_encoder(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield values under an encoder's tensor names; the head of a causal model is left out."""
    for name, value in named:
        if name != "lm_head.weight":
            yield name.removeprefix("model."), value


def _check_same(first: Path, other: Path) -> None:
    configs = []
    for folder in (first, other):
        if read_json(folder / "config.json").get("model_type") != "qwen3":
            raise InputError(
                f"{folder} holds no Qwen3; a soup is made of encoders and their causal parent"
            )
        configs.append(Qwen3Config.from_pretrained(folder))
    for name in _ARCHITECTURE:
        ours, theirs = (getattr(config, name) for config in configs)
        if ours != theirs:
            raise InputError(
                f"{other} is of another architecture than {first}: {name} is {theirs}, not {ours}"
            )
    shapes = [dict(_of_encoder(tensor_shapes(folder).items())) for folder in (first, other)]
    causal = read_json(other / "config.json").get("is_causal") is not False
    rows = shapes[0].get("embed_tokens.weight", (0,))[0]
    if causal and shapes[1].get("embed_tokens.weight", (rows + 1,))[0] <= rows:
        # It has no rows for the sentinels.
        shapes[1]["embed_tokens.weight"] = shapes[0]["embed_tokens.weight"]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        ours, theirs = (of.get(name) for of in shapes)
        if ours != theirs:
            raise InputError(f"{other}: tensor {name} is {theirs}, in {first} {ours}")
    first_vocabulary, vocabulary = (
        read_json(folder / "tokenizer.json")["model"]["vocab"] for folder in (first, other)
    )
    if first_vocabulary != vocabulary:
        raise InputError(f"{other} has another vocabulary than {first}")
    if not causal and (other / "1_Pooling").is_dir():
        pooling = [read_json(folder / "1_Pooling" / "config.json") for folder in (first, other)]
        if pooling[0] != pooling[1]:
            raise InputError(f"{other} pools in another way than {first}")


def slerp(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """The point at `share` (0 first, 1 second) of the arc between two tensors;

    their mean where they are parallel.
    """
    a, b = first.flatten(), second.flatten()
    cosine = torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-12)
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-4:
        return torch.lerp(first, second, share)
    arc = torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second
    return arc / angle.sin()
