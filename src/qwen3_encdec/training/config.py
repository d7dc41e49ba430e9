"""Read and check the training configuration: one YAML file and dotted overrides.

What the model is stands in the model folder's config.json, where it runs in the accelerate YAML.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.folders import InputError, read_yaml

T = TypeVar("T")


def _number(value: Any) -> Any:
    """Refuse true and false, which Python counts as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


Count = Annotated[int, Field(ge=1, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
Moment = Annotated[float, Field(ge=0, lt=1)]
# YAML 1.1 reads a bare `no` as false.
Precision = Annotated[
    Literal["auto", "no", "bf16"],
    BeforeValidator(lambda value: "no" if value is False else value),
]
Tracker = Literal["tensorboard", "trackio", "wandb"]
Flash = Literal["flash_attention_2", "flash_attention_3", "flash_attention_4"]
Attention = Literal["auto", "sdpa", "eager", "flex_attention", Flash]


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a training run except the model's architecture and the machines."""

    model: str = "./qwen3-encdec-init"
    """Folder of the encoder-decoder to train, with its tokenizer."""
    output_dir: str = "./runs/ul2"
    """Folder of the run: config.yaml, metrics.jsonl, trackers and checkpoints/."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus and UL2 settings, see ``data/config.py``."""

    max_steps: Count = 1000
    """Optimizer steps of the whole run; the schedule ends here."""
    batch_size: Count = 8
    """Rows per micro-batch and per process."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimizer step and per process."""

    lr: Positive = 1e-4
    """Peak learning rate."""
    source_gate_lr_multiplier: Positive = 200.0
    """Learning rate of the source gates as a multiple of lr; they are few and begin at 0."""
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"
    """wsd holds the peak, then decays linearly; cosine and linear decay after the warm-up."""
    warmup_steps: Natural = 100
    """Optimizer steps of linear warm-up from 0."""
    decay_fraction: Share = 0.2
    """wsd only: share of max_steps spent in the final decay."""
    min_lr_ratio: Share = 0.1
    """Learning rate at max_steps as a share of the peak."""
    weight_decay: NotNegative = 0.1
    """Weight decay of the projection matrices; norms, gates and the embedding are not decayed."""
    betas: tuple[Moment, Moment] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    eps: Positive = 1e-8
    """AdamW denominator term."""
    max_grad_norm: NotNegative = 1.0
    """Global gradient norm to clip to; 0 measures without clipping."""
    ema_decay: Share = 0.0
    """Decay per step of a running average of the weights, kept in the checkpoints; 0 keeps none."""

    z_loss: NotNegative = 0.0
    """Coefficient of the squared log-sum-exp of every target token's logits; 0 is none."""
    label_smoothing: Share = 0.0
    """Share of the target that is spread over the vocabulary."""
    mntp_weight: NotNegative = 0.0
    """Weight of masked next-token prediction on the encoder, per masked token; 0 masks nothing."""
    mntp_probability: Share = 0.15
    """Share of source tokens that mntp_weight masks."""

    mixed_precision: Precision = "auto"
    """Compute precision over fp32 master weights; auto is bf16 on an accelerator, no on a CPU."""
    attention: Attention = "auto"
    """Attention implementation; auto takes the fastest that is installed and passes a check."""
    gradient_checkpointing: bool | Literal["full", "selective"] = False
    """Recompute layers in the backward pass from their inputs (full, true) or products too."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each layer with torch.compile; auto does so on an accelerator."""
    num_workers: Natural = 1
    """Data-loading processes per training process."""
    seed: Natural = 0
    """Seed of the training process; the data has its own."""

    log_every: Count = 10
    """Optimizer steps between lines of metrics.jsonl."""
    eval_every: Natural = 500
    """Optimizer steps between held-out evaluations, also before the first and after the last."""
    eval_examples_per_denoiser: Count = 64
    """Held-out examples per denoiser, the same in every evaluation."""
    save_every: Natural = 500
    """Optimizer steps between checkpoints; the last step is always saved; 0 saves only there."""
    keep_last: Natural = 2
    """Checkpoints kept; older ones are deleted. 0 keeps all."""
    keep_every: Natural = 0
    """Checkpoints of steps divisible by it are never deleted; 0 makes no such exception."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest held-out loss, linked as checkpoints/best."""
    async_checkpoints: bool = True
    """Continue training while a checkpoint is written."""
    spike_sigma: NotNegative = 6.0
    """Skip a step whose loss or gradient norm is so many deviations above the mean; or 0."""
    spike_window: Count = 128
    """Steps over which spike_sigma is measured; half of them must be there."""
    stall_seconds: NotNegative = 1800.0
    """End the process when no step has finished for so long; 0 waits for ever."""
    resume: bool | Literal["auto"] = "auto"
    """true continues the run in output_dir, false refuses a used folder, auto does what fits."""
    trackers: list[Tracker] = field(default_factory=lambda: ["tensorboard"])
    """Trackers by accelerate's names: tensorboard, trackio, wandb."""

    def __post_init__(self) -> None:
        """Check fields against each other."""
        if self.warmup_steps > self.max_steps:
            raise InputError(
                f"warmup_steps must be at most max_steps {self.max_steps}, got {self.warmup_steps}"
            )


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> TrainingConfig:
    """Read a training YAML, see `load_dataclass`."""
    return load_dataclass(TrainingConfig, path, overrides)


def load_dataclass(cls: type[T], path: str | Path | None, overrides: Iterable[str] = ()) -> T:
    """Read a YAML and apply overrides such as ``lr=3e-4`` or ``data.source_length=256``.

    ``path`` None starts from the defaults. Raises InputError naming the file or override, the key
    and the value.
    """
    values: Any = {} if path is None else read_yaml(path, "config") or {}
    read_dataclass(cls, values, str(path))  # alone first, so that its errors name the file
    for override in overrides:
        _apply(override, values)
    return read_dataclass(cls, values, "the command line")


def read_dataclass(cls: type[T], values: Any, origin: str) -> T:
    """Build a dataclass from parsed YAML.

    Raises InputError naming ``origin`` for an unknown key, a wrong type or a value out of range.
    """
    _refuse_unknown(cls, values, origin)
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise InputError(f"{origin}: {_sentence(error)}") from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return the config as plain YAML and JSON values, as ``load_config`` reads them."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Merge nested mappings into one, under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _apply(override: str, values: dict[str, Any]) -> None:
    """Set one ``key=value`` or ``section.key=value`` in parsed YAML."""
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    target: Any = values
    for section in sections:
        target = target.setdefault(section, {}) if isinstance(target, dict) else None
    if not equals or not isinstance(target, dict):
        raise InputError(f"override {override!r} is not of the form key=value or data.key=value")
    try:
        target[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r} has a value that is not valid YAML") from None


def _refuse_unknown(cls: Any, values: Any, origin: str, prefix: str = "") -> None:
    """Raise InputError for a key that no field has, with the nearest one that does."""
    if not isinstance(values, Mapping):
        section = prefix.rstrip(".") or "the config"
        raise InputError(f"{origin}: {section} must be a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.4)
            hint = f"known: {', '.join(names)}"
            if nearest:
                hint = f"did you mean {prefix}{nearest[0]}?"
            raise InputError(f"{origin}: unknown key {prefix}{key}; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            _refuse_unknown(hints[key], value, origin, f"{prefix}{key}.")


def _sentence(error: ValidationError) -> str:
    """Name the first field at fault, what it must be and what it is, in one sentence."""
    details = error.errors(include_url=False)
    first = details[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), InputError):
        return str(cause)
    # Alternatives of a union each complain, under a location that begins with the field's.
    nested = first["loc"][0] == "data"
    path = [str(part) for part in first["loc"][: 2 if nested else 1]]
    same = [item for item in details if list(map(str, item["loc"][: len(path)])) == path]
    wishes = []
    for item in same:
        wish = item["msg"].removeprefix("Value error, ").replace("Input should", "must")
        wish = wish.replace("Field required", "must have another item")
        wishes.append(re.sub(", (unable|got) .*", "", wish))
    wish = " or ".join(dict.fromkeys(wishes)).replace(" or must be", " or")
    return f"{'.'.join(path)} {wish}, got {first['input']!r}"
