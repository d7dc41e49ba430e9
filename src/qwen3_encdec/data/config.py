"""The `data:` section of a training YAML, and the types of values that all configs share."""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import inf
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as strict_dataclass

from qwen3_encdec.data.ul2 import PRESETS, Denoiser, Preset, raw_length
from qwen3_encdec.folders import InputError, read_yaml

# YAML 1.1 reads 1e-4 as a string, so strings are parsed; pydantic would take `lr: yes` as 1.0.
Number = Annotated[
    float,
    Field(allow_inf_nan=False),
    BeforeValidator(lambda value: str(value) if isinstance(value, bool) else value),
]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Several = Annotated[int, Field(ge=2, strict=True)]
Seed = Annotated[Natural, Field(lt=2**32)]  # numpy's limit
Name = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Source:
    """One corpus of a mixture."""

    inputs: list[str]
    """Same as `DataConfig.inputs`."""
    weight: float = 1.0
    """Share of the tokens, relative to the other corpora."""
    text_column: str = "text"
    """Same as `DataConfig.text_column`."""
    name: str = ""
    """Name in logs; by default the last part of the first input."""

    def __post_init__(self) -> None:
        if not is_texts(self.inputs) or not self.inputs:
            raise InputError(f"data.inputs is empty or not a list of names: {self.inputs!r}")
        if not is_texts([self.text_column]):
            raise InputError(f"data.text_column={self.text_column!r} is not the name of a column")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < inf:
            raise InputError(f"data.mixture: weight={weight!r} of {self.inputs} must be positive")


@strict_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DataConfig:
    """Settings that determine the training examples."""

    inputs: list[str] = field(default_factory=lambda: ["package-docs"])
    """Files, folders or globs of .jsonl, .txt (one document per line), .json, .csv (all also .gz,
    .zst, .bz2 or .xz) or .parquet; a folder that prepare-data wrote; a hub dataset as ORG/NAME or
    ORG/NAME:CONFIG; or package-docs, the docstrings of the installed Python packages.
    """
    mixture: list[dict] = field(default_factory=list)
    """Instead of inputs: corpora as {inputs: [...], weight: 1, text_column: text, name: web};
    weight is a share of the tokens.
    """
    text_column: str = "text"
    """Field of a JSON line, or column of a table or hub dataset, that holds the text."""
    hub_split: str = "train"
    """Split to read of a hub dataset."""
    heldout_inputs: list[Name] = field(default_factory=list)
    """Inputs for evaluation; if empty, package-docs holds out whole packages."""
    heldout_every: Several = 100
    """If heldout_inputs is empty, hold out one document in this many, chosen by its hash."""
    preset: str | list[dict] = "t5gemma2"
    """Denoisers: t5gemma2, ul2, t5, or a list of {name, mean_span, corruption, weight}, also in a
    .yaml file.
    """
    source_length: Several = 512
    """Maximum source tokens in a row, including sentinels and EOS."""
    target_length: Several = 256
    """Maximum target tokens in a row, including sentinels and EOS."""
    min_tokens: Several = 8
    """Shorter documents are refused and counted; no chunk of a document is shorter."""
    streams: Count = 64
    """Number of canonical streams; ranks times workers must divide it. It affects the order."""
    cache_gib: NotNegative = 32.0
    """Compressed inputs, .csv, .json and hub datasets of up to this many GiB are unpacked or
    downloaded into the cache before training; larger ones are streamed.
    """
    seed: Natural = 0
    """Seed of order and corruption."""
    accept_changes: bool = False
    """Resume, at a new epoch, even if corpus, tokenizer or these settings have changed."""

    def __post_init__(self) -> None:
        _ = self.sources  # parsed here, so that errors come early, also under python -O
        for denoiser, longest in zip(self.denoisers, self.raw_lengths, strict=True):
            if longest < 2 * self.min_tokens:
                raise InputError(
                    f"data.min_tokens={self.min_tokens} is more than half of the {longest} tokens "
                    f"that denoiser {denoiser.name} takes at source_length={self.source_length}, "
                    f"target_length={self.target_length}"
                )

    @cached_property
    def denoisers(self) -> Preset:
        """The mixture that `preset` names or lists."""
        return resolve_preset(self.preset)

    @cached_property
    def raw_lengths(self) -> list[int]:
        """Longest text, in tokens, that each denoiser can take."""
        lengths = self.source_length, self.target_length
        return [raw_length(denoiser, *lengths) for denoiser in self.denoisers]

    @cached_property
    def sources(self) -> list[Source]:
        """Return the items of `mixture`, or one source of `inputs`."""
        sources: dict[str, Source] = {}
        for number, item in enumerate(self.mixture or [{"inputs": self.inputs}]):
            source = _build(Source, item, "data.mixture", text_column=self.text_column)
            name = source.name or source.inputs[0].strip("/").rpartition("/")[2]
            while name in sources:
                name = f"{name}-{number}"
            sources[name] = replace(source, name=name)
        return list(sources.values())


def resolve_preset(preset: str | list[dict[str, Any]]) -> Preset:
    """Return a preset by name, from a .yaml file that lists denoisers, or from such a list.

    Raises InputError for anything else.
    """
    where = "preset"
    if isinstance(preset, str):
        if preset in PRESETS:
            return PRESETS[preset]
        if not preset.endswith((".yaml", ".yml")):
            known = ", ".join(PRESETS)
            raise InputError(f"preset {preset!r} must be one of {known} or a .yaml file")
        where, preset = f"preset {preset}", read_yaml(preset, "preset")
    if not isinstance(preset, list) or not preset:
        raise InputError(f"{where}: {preset!r} is not a list of at least one denoiser")
    denoisers = tuple(_build(Denoiser, item, where) for item in preset)
    names = [denoiser.name for denoiser in denoisers]
    if not is_texts(names) or len(set(names)) < len(names):
        raise InputError(f"{where}: denoiser names {names} must be distinct texts")
    return denoisers


def _build(kind: type[Any], item: Any, where: str, **defaults: Any) -> Any:
    """Build a dataclass from a YAML mapping of its fields."""
    try:
        return kind(**{**defaults, **item})
    except TypeError as error:
        keys = ", ".join(field.name for field in fields(kind))
        raise InputError(f"{where}: {item!r} must be a mapping of {keys} ({error})") from None


def is_texts(values: Any) -> bool:
    """Return True for a list of strings, none of them empty."""
    return isinstance(values, list) and all(isinstance(each, str) and each for each in values)
