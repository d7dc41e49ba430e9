"""How a model is trained: one strict dataclass, read from one YAML file and from dotted overrides.

What the model is stands in the model folder's config.json, where it runs in the accelerate YAML.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.folders import InputError, read_yaml

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a training run except the model's architecture and the machines."""

    model: str = "./qwen3-encdec-init"
    """Folder of the encoder-decoder to train, with its tokenizer."""
    output_dir: str = "./runs/ul2"
    """Folder of the run: config.yaml, metrics.jsonl, trackers and checkpoints/."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus and UL2 settings, see ``data/config.py``."""

    max_steps: int = 1000
    """Optimizer steps of the whole run; the schedule ends here."""
    batch_size: int = 8
    """Rows per micro-batch and per process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step and per process."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon takes the projection matrices, at the same lr, and leaves norms and the embedding to
    AdamW.
    """
    lr: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"
    """Shape after the warm-up:

    wsd holds the peak, then decays linearly; cosine and linear decay at once.
    """
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up from 0."""
    decay_fraction: float = 0.2
    """wsd only: share of max_steps spent in the final decay."""
    min_lr_ratio: float = 0.1
    """Learning rate at max_steps as a share of the peak."""
    weight_decay: float = 0.1
    """Weight decay of the projection matrices; norms and the embedding are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments' decay rates."""
    eps: float = 1e-8
    """AdamW denominator term."""
    max_grad_norm: float = 1.0
    """Global gradient norm to clip to; 0 measures without clipping."""
    ema_decay: float = 0.0
    """Decay by step of a running average of the weights, kept in the checkpoints beside them;

    0 keeps none.
    """

    z_loss: float = 0.0
    """Coefficient of the squared log-sum-exp of every target token's logits, 1e-4 where used;

    0 is none.
    """
    label_smoothing: float = 0.0
    """Share of the target that is spread over the vocabulary."""
    loss_implementation: Literal["chunked", "cce"] = "chunked"
    """chunked runs everywhere; cce on CUDA with the package cut-cross-entropy."""
    mntp_weight: float = 0.0
    """Weight of masked next-token prediction on the encoder, per masked token; 0 masks nothing."""
    mntp_probability: float = 0.15
    """Share of source tokens that mntp_weight masks."""

    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Compute precision over fp32 master weights;

    auto is bf16 on an accelerator and no on a CPU.
    """
    gradient_checkpointing: bool | Literal["full", "selective"] = False
    """Recompute each layer in the backward pass, for memory: full (or true) keeps its input only
    and costs a third more compute, selective keeps what matrix products and attention returned and
    recomputes the rest.
    """
    compile: bool = False
    """Compile each layer with torch.compile."""
    num_workers: int = 0
    """Data-loading processes per training process."""
    seed: int = 0
    """Seed of the training process; the data has its own."""

    log_every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    eval_every: int = 500
    """Optimizer steps between held-out evaluations, also done before the first and after the last;

    0 is never.
    """
    eval_examples_per_denoiser: int = 64
    """Held-out examples per denoiser, the same in every evaluation."""
    save_every: int = 500
    """Optimizer steps between checkpoints; the last step is always saved; 0 saves only there."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted. 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps divisible by it are never deleted; 0 makes no such exception."""
    async_checkpoints: bool = True
    """Go on training while a checkpoint is written."""
    spike_sigma: float = 6.0
    """Leave out a step whose loss or gradient norm is so many standard deviations above the mean;

    0 never does.
    """
    spike_window: int = 128
    """Applied steps over which spike_sigma is measured; half of them must be there."""
    stall_seconds: float = 1800.0
    """End the process when no step has finished for so long; 0 waits for ever."""
    resume: bool | Literal["auto"] = "auto"
    """true: continue the run in output_dir;

    false: begin anew and refuse a used folder; auto: whichever fits.
    """
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers by accelerate's names: tensorboard, trackio, wandb."""

    def __post_init__(self) -> None:
        """Refuse values outside their range. Raises InputError naming the field and the value."""
        for name in (
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "spike_window",
        ):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "warmup_steps",
            "num_workers",
            "eval_every",
            "save_every",
            "keep_last",
            "keep_every",
            "seed",
        ):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in (
            "weight_decay",
            "max_grad_norm",
            "z_loss",
            "mntp_weight",
            "spike_sigma",
            "stall_seconds",
        ):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "eps"):
            _require(self, name, 0 < getattr(self, name) < float("inf"), "above 0 and finite")
        for name in (
            "decay_fraction",
            "min_lr_ratio",
            "label_smoothing",
            "mntp_probability",
            "ema_decay",
        ):
            _require(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        _require(
            self, "eval_examples_per_denoiser", self.eval_examples_per_denoiser >= 1, "at least 1"
        )
        _require(
            self,
            "warmup_steps",
            self.warmup_steps <= self.max_steps,
            f"at most max_steps {self.max_steps}",
        )
        known = {"tensorboard", "trackio", "wandb"}
        _require(self, "trackers", set(self.trackers) <= known, f"among {', '.join(sorted(known))}")


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> TrainingConfig:
    """Read a training YAML and apply overrides such as ``lr=3e-4`` or ``data.source_length=256``.

    ``path`` None starts from the defaults. Raises InputError naming the file or override, the key
    and the value.
    """
    return load_dataclass(TrainingConfig, path, overrides)


def load_dataclass(cls: type[T], path: str | Path | None, overrides: Iterable[str] = ()) -> T:
    """``load_config`` for any strict dataclass."""
    values: dict[str, Any] = {}
    if path is not None:
        values = read_yaml(path, "config") or {}
    config = read_dataclass(cls, values, str(path))  # alone first, so that its errors name the file
    values = config_to_dict(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        *sections, name = key.strip().split(".")
        target: Any = values
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        if not equals or not isinstance(target, dict):
            raise InputError(
                f"override {override!r} is not of the form key=value or data.key=value"
            )
        try:
            target[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"override {override!r} has a value that is not valid YAML") from None
    return read_dataclass(cls, values, "the command line")


def config_to_dict(config: Any) -> dict[str, Any]:
    """The config as plain YAML and JSON values, as ``load_config`` reads them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {prefix + key: value}
        )
    return flat


def read_dataclass(cls: type[T], values: Any, source: str, prefix: str = "") -> T:
    """Build a dataclass from parsed YAML, strictly:

    unknown keys and wrong types raise InputError naming ``source``.
    """
    if not isinstance(values, Mapping):
        raise InputError(
            f"{source}: {prefix.rstrip('.') or 'the config'} must be a mapping, got {values!r}"
        )
    types_of = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(typing.cast(Any, cls))]
    arguments = {}
    for key, value in values.items():
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.4)
            hint = (
                f"; did you mean {prefix}{nearest[0]}?"
                if nearest
                else f"; known: {', '.join(names)}"
            )
            raise InputError(f"{source}: unknown key {prefix}{key}{hint}")
        arguments[key] = _convert(
            value, types_of[key], f"{source}: {prefix}{key}", source, f"{prefix}{key}."
        )
    try:
        return cls(**arguments)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _convert(value: Any, expected: Any, where: str, source: str, prefix: str) -> Any:
    """Check one parsed value against a type hint;

    YAML 1.1 reads ``1e-4`` as a string and ``no`` as false.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        return read_dataclass(typing.cast(Any, expected), value, source, prefix)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(value, option, where, source, prefix)
            except InputError:
                continue
    elif origin is Literal:
        if value is False and "no" in arguments:
            return "no"
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        kinds = arguments if origin is tuple else arguments * len(value)
        if len(value) == len(kinds):
            pairs = zip(value, kinds, strict=True)
            return origin(_convert(item, kind, where, source, prefix) for item, kind in pairs)
    elif expected is float:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
    elif (
        not origin
        and isinstance(value, expected)
        and not (expected is int and isinstance(value, bool))
    ):
        return value
    raise InputError(f"{where} must be {_describe(expected)}, got {value!r}")


def _describe(expected: Any) -> str:
    """A type hint in words."""
    if typing.get_origin(expected) is Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(expected))
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(expected))
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        type(None): "null",
    }
    return names.get(expected, f"a {expected}".replace("typing.", ""))


def _require(config: TrainingConfig, name: str, holds: bool, condition: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {condition}, got {getattr(config, name)!r}")
