"""Read and check the training configuration: one YAML file and dotted overrides."""

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from qwen3_encdec.data.config import Count, DataConfig, Natural, NotNegative, Number, Positive, Seed
from qwen3_encdec.folders import InputError, read_yaml

T = TypeVar("T")
Share = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Seconds = Annotated[Number, Field(ge=0, le=1e9)]  # the timer's limit is near 1e10
Folder = Annotated[str, AfterValidator(os.path.expanduser)]
# YAML 1.1 reads a bare `no` as false.
Precision = Annotated[
    Literal["auto", "no", "bf16"],
    BeforeValidator(lambda value: "no" if value is False else value),
]
Tracker = Literal["tensorboard", "trackio", "wandb"]
Flash = Literal["flash_attention_2", "flash_attention_3", "flash_attention_4"]


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run; configs/training_config.yaml documents each one."""

    model: Folder = "./qwen3-encdec-init"
    output_dir: Folder = "./runs/ul2"
    data: DataConfig = field(default_factory=DataConfig)

    # Rows per step: batch_size x gradient_accumulation_steps x processes.
    max_steps: Count = 1000
    batch_size: Count = 8
    gradient_accumulation_steps: Count = 1

    # Optimizer.
    lr: Positive = 1e-4
    source_gate_lr_multiplier: Positive = 200.0
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"
    warmup_steps: Natural = 100
    decay_fraction: Share = 0.2
    min_lr_ratio: Share = 0.1
    weight_decay: NotNegative = 0.1
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    max_grad_norm: NotNegative = 1.0

    # Loss.
    z_loss: NotNegative = 0.0
    mntp_weight: NotNegative = 0.0
    mntp_probability: Share = 0.15

    # Speed and memory.
    mixed_precision: Precision = "auto"
    attention: Literal["auto", "sdpa", "eager", "flex_attention", Flash] = "auto"
    gradient_checkpointing: Literal[False, True, "full", "selective"] = False
    compile: Literal[False, True, "auto"] = "auto"
    num_workers: Natural = 1
    seed: Seed = 0

    # Logging, evaluation and checkpoints, in optimizer steps.
    log_every: Count = 10
    eval_every: Natural = 500
    eval_examples_per_denoiser: Count = 64
    save_every: Natural = 500
    keep_last: Natural = 2
    keep_every: Natural = 0
    trackers: list[Tracker] = field(default_factory=lambda: ["tensorboard"])

    # Guards.
    spike_sigma: NotNegative = 6.0
    spike_window: Count = 128
    stall_seconds: Seconds = 1800.0

    def __post_init__(self) -> None:
        if self.warmup_steps > self.max_steps:
            raise InputError(
                f"warmup_steps must be at most max_steps {self.max_steps}, got {self.warmup_steps}"
            )


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> TrainingConfig:
    """Read a training YAML; see `load_dataclass`."""
    return load_dataclass(TrainingConfig, path, overrides)


def load_dataclass(cls: type[T], path: str | Path | None, overrides: Iterable[str] = ()) -> T:
    """Read a YAML file, or use the defaults, and apply overrides like ``data.source_length=256``.

    Raises InputError naming the file or override, the key and the value.
    """
    values: Any = {} if path is None else read_yaml(path, "config") or {}
    read_dataclass(cls, values, str(path))  # first without overrides, so that errors name the file
    for override in overrides:
        key, equals, text = override.partition("=")
        section, _, name = key.strip().rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if not equals or not isinstance(target, dict):
            raise InputError(f"override {override!r} must be key=value or data.key=value")
        try:
            target[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"override {override!r}: the value is not valid YAML") from None
    return read_dataclass(cls, values, "the command line")


def read_dataclass(cls: type[T], values: Any, origin: str) -> T:
    """Build a dataclass from parsed YAML; an InputError names ``origin``, key and value."""
    try:
        return TypeAdapter(cls).validate_python(values, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if isinstance(own := first.get("ctx", {}).get("error"), InputError):
        raise InputError(f"{origin}: {own}")
    key = ".".join(map(str, first["loc"]))
    if first["type"] != "unexpected_keyword_argument":
        raise InputError(f"{origin}: {key or 'config'}: {first['msg']}, got {first['input']!r}")
    known = flatten(config_to_dict(cls()))
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise InputError(f"{origin}: unknown key {key}{hint}")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return the config as plain YAML and JSON values, as ``load_config`` reads them."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Flatten one level of sections into dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": item for name, item in inner} or {key: value}
    return flat
