"""What to train on: the `data:` section of a training YAML."""

from dataclasses import dataclass, field

from qwen3_encdec.data.ul2 import Preset, raw_length, resolve_preset
from qwen3_encdec.files import InputError


@dataclass(frozen=True)
class DataConfig:
    """Everything that decides which examples there are; nothing here says how fast or where they are made."""

    inputs: list[str] = field(default_factory=lambda: ["package-docs"])
    """Files, folders or globs of .jsonl, .txt (one document a line; both also .gz or .zst) or .parquet; a hub dataset
    as ORG/NAME or ORG/NAME:CONFIG; or package-docs, the docstrings of the installed Python packages."""
    text_column: str = "text"
    """Field of a JSON line, column of a parquet file or hub dataset that holds the text."""
    hub_split: str = "train"
    """Split to read of a hub dataset."""
    heldout_inputs: list[str] = field(default_factory=list)
    """Inputs for evaluation. Without any, package-docs holds packages out and other inputs 1 in heldout_every."""
    heldout_every: int = 100
    """Without heldout_inputs, one document in so many is kept from training, chosen by a hash of its text."""
    preset: str | list[dict] = "t5gemma2"
    """Mixture of denoisers: t5gemma2, ul2, t5, or a list of {name, mean_span, corruption, weight}."""
    source_length: int = 512
    """Most source tokens in a row, sentinels and EOS counted."""
    target_length: int = 256
    """Most target tokens in a row, sentinels and EOS counted."""
    min_tokens: int = 8
    """Shorter documents are refused and counted, and no chunk of a document is shorter."""
    packing: bool = True
    """Put several examples in a row, isolated from each other; false is one example a row."""
    seed: int = 0
    """Decides order and corruption."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("data.inputs is empty; name at least one file, folder, hub dataset or package-docs")
        if self.min_tokens < 2:
            raise InputError(f"data.min_tokens={self.min_tokens} is below 2")
        if self.heldout_every < 2:
            raise InputError(f"data.heldout_every={self.heldout_every} is below 2")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"data.seed={self.seed} is not between 0 and 2**64")
        for name in ("source_length", "target_length"):
            if getattr(self, name) < 2:
                raise InputError(f"data.{name}={getattr(self, name)} is below 2")
        for denoiser in self.denoisers:
            longest = raw_length(denoiser, self.source_length, self.target_length)
            if longest < 2 * self.min_tokens:
                raise InputError(
                    f"data.min_tokens={self.min_tokens} is more than half of the {longest} tokens that denoiser "
                    f"{denoiser.name} takes at source_length={self.source_length}, target_length={self.target_length}"
                )

    @property
    def denoisers(self) -> Preset:
        """The mixture that `preset` names or lists."""
        return resolve_preset(self.preset)
