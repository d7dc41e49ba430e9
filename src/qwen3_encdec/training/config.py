"""Read and check the training configuration: one YAML file and dotted overrides.

What the model is stands in the model folder's config.json, where it runs in the accelerate YAML.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.folders import InputError, read_yaml

T = TypeVar("T")
Count = Annotated[int, Field(ge=1, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
# YAML 1.1 reads a bare `no` as false.
Precision = Annotated[
    Literal["auto", "no", "bf16"],
    BeforeValidator(lambda value: "no" if value is False else value),
]
Flash = Literal["flash_attention_2", "flash_attention_3", "flash_attention_4"]
RETIRED = ("async_checkpoints", "eps", "keep_best")
"""Keys of earlier versions, ignored so that their config.yaml still loads."""


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
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
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
    attention: Literal["auto", "sdpa", "eager", "flex_attention", Flash] = "auto"
    """Attention implementation; auto takes the fastest that is installed and passes a check."""
    gradient_checkpointing: Literal[False, True, "full", "selective"] = False
    """Recompute layers in the backward pass from their inputs (full, true) or products too."""
    compile: Literal[False, True, "auto"] = "auto"
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
    """Checkpoints kept beside that of the lowest held-out loss; 0 keeps all."""
    keep_every: Natural = 0
    """Checkpoints of steps divisible by it are never deleted; 0 makes no such exception."""
    spike_sigma: NotNegative = 6.0
    """Skip a step whose loss or gradient norm is so many deviations above the mean; or 0."""
    spike_window: Count = 128
    """Steps over which spike_sigma is measured; half of them must be there."""
    stall_seconds: NotNegative = 1800.0
    """End the process when no step has finished for so long; 0 waits for ever."""
    resume: Literal[False, True, "auto"] = "auto"
    """true continues the run in output_dir, false refuses a used folder, auto does what fits."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Trackers by accelerate's names."""

    def __post_init__(self) -> None:
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
        key, equals, text = override.partition("=")
        section, _, name = key.strip().rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if not equals or not isinstance(target, dict):
            raise InputError(f"override {override!r} is not key=value or data.key=value")
        try:
            target[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"override {override!r} has a value that is not YAML") from None
    return read_dataclass(cls, values, "the command line")


def read_dataclass(cls: type[T], values: Any, origin: str) -> T:
    """Build a dataclass from parsed YAML.

    Raises InputError naming ``origin`` for an unknown key, a wrong type or a value out of range.
    """
    strict = with_config(ConfigDict(extra="forbid"))(cls)
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key not in RETIRED}
    try:
        return TypeAdapter(strict).validate_python(values)
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
    """Put the keys of each section beside the others, dotted."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": item for name, item in inner} or {key: value}
    return flat
