"""Model, tokenizer and output folders: errors a user can mend, atomic writes, checked reads.

Outputs are built beside their destination and renamed into place, so a failure leaves nothing
behind. Each folder that this project writes holds a `qwen3_encdec.json` that says how it came to
be; a folder without it is somebody else's and is never replaced. What is read is checked as a
whole: a missing tensor is an error, never random.

torch and transformers are imported where they are used: `--help` and a wrong setting need neither.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qwen3_encdec import (
        Qwen3EncoderDecoderConfig,
        Qwen3EncoderDecoderTokenizer,
        Qwen3ForSeq2SeqLM,
    )

PROVENANCE_FILE = "qwen3_encdec.json"
TRAIN_COMMAND = (
    "accelerate launch --config_file configs/accelerate_fsdp2.yaml "
    "scripts/train.py --config configs/training_config.yaml"
)
INITIALIZE_COMMAND = (
    "python scripts/initialize_from_qwen3.py --qwen3-model FOLDER_OR_HUB_ID "
    "--output-dir ./qwen3-encdec-init"
)
_PACKAGES = (
    *("qwen3-encdec", "torch", "transformers", "accelerate", "datasets"),
    "sentence-transformers",
)
M = TypeVar("M", bound="PreTrainedModel")


class InputError(ValueError):
    """Something the caller can mend.

    The command line prints it as one sentence and exits with 2.
    """


def default_device() -> "torch.device":
    """The accelerator that is there, else the CPU; every command computes on it.

    A build of torch for CUDA names `cuda` on a machine without a GPU too, unless asked to check.
    """
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide results; absent ones are left out."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_source(*options: str) -> str | None:
    """`git describe` of this package's checkout, with -dirty if files differ; None without one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises InputError naming the file if it is absent or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def read_yaml(path: str | Path, what: str) -> Any:
    """Parse a YAML file. Raises InputError, calling it a `what`, if it is absent or broken."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON through a temporary file and a rename: nobody ever reads half of it."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def check_output(output: str | Path, kind: str | None = None) -> Path:
    """Refuse a destination that we may not write: call it before any work begins.

    An absent folder, an empty folder and a folder of ours are fine; with `kind`, only one of that
    kind, so that an encoder never replaces a run. Raises InputError otherwise.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output} is a file; name a folder")
    ours = (output / PROVENANCE_FILE).exists()
    if output.is_dir() and any(output.iterdir()) and not ours:
        raise InputError(
            f"output folder {output} exists and was not written by qwen3-encdec; "
            "name another folder or empty it first"
        )
    found = read_json(output / PROVENANCE_FILE).get("kind") if ours else kind
    if kind is not None and found != kind:
        raise InputError(
            f"output folder {output} holds a {found}, not a {kind}; name another folder"
        )
    return output


@contextmanager
def new_folder(output: str | Path, kind: str, **provenance: Any) -> Iterator[Path]:
    """Build a folder beside `output` and rename it into place when the block ends.

    `kind` (`"tokenizer"`, `"encoder-decoder"`, `"encoder"`, ...) and `provenance` are recorded in
    its `qwen3_encdec.json`. After an exception the unfinished folder is removed and `output` is as
    it was.
    """
    output = check_output(output, kind)
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(
        tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent)
    )
    try:
        yield building
        facts = {"kind": kind, **provenance, "versions": package_versions()}
        write_json(building / PROVENANCE_FILE, facts)
        _give_modes(building)
        if output.exists():
            replaced = building.with_suffix(".replaced")
            os.rename(output, replaced)
            os.rename(building, output)
            shutil.rmtree(replaced)
        else:
            os.rename(building, output)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _give_modes(folder: Path) -> None:
    """Give every file the mode that the umask gives to new ones.

    safetensors makes its own 0600, and a server under another user could not read them.
    """
    mode = (folder / PROVENANCE_FILE).stat().st_mode & 0o666
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


def copy_without_weights(source: Path, folder: Path) -> None:
    """Copy a model folder's files but its weights and its provenance into an existing folder."""
    weights = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", PROVENANCE_FILE)
    shutil.copytree(source, folder, ignore=weights, dirs_exist_ok=True)


def resolve_checkpoint(name: str | Path) -> Path:
    """Return the folder of a checkpoint, fetching it from the hub if `name` is no folder.

    Raises:
        InputError: it is neither, or the folder holds no `config.json`.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} holds no config.json; it is not a checkpoint folder")
        return folder
    if (
        folder.is_file()
        or str(name).startswith(".")
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))
    ):
        raise InputError(f"checkpoint {name} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.txt"])
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise InputError(
            f"checkpoint {name} is no local folder and could not be fetched from the hub: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None


def read_tensors(folder: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield (name, tensor) of a checkpoint's safetensors files, one at a time.

    Raises:
        InputError: there are none, or one is missing or damaged.
    """
    for path in _safetensors_files(folder):
        with _opened(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def read_averages(folder: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield (name, tensor) of the running average that training with `ema_decay` keeps.

    Raises:
        InputError: there is none, or a file is damaged.
    """
    import torch
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(folder / "state"))
    try:
        metadata = reader.read_metadata() if (folder / "state").is_dir() else None
        stored: dict[str, Any] = metadata.state_dict_metadata if metadata else {}
        averages = {name: torch.empty(s.size) for name, s in stored.items() if name[-4:] == ".ema"}
        load(averages, storage_reader=reader, no_dist=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / 'state'} is truncated or damaged: {error}") from None
    if not averages:
        raise InputError(
            f"{folder} holds no running average of the weights; train with ema_decay=0.999"
        )
    for name, average in averages.items():
        yield name.removesuffix(".ema"), average


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a checkpoint's tensors, from the headers alone.

    Raises InputError as `read_tensors`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _safetensors_files(folder):
        with _opened(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(read_json(index)["weight_map"].values()))
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        raise InputError(f"{folder} holds no model.safetensors (only safetensors are read)")
    return [folder / file for file in files]


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated, damaged or missing: {error}") from None


def load_config(folder: str | Path) -> "Qwen3EncoderDecoderConfig":
    """Read the configuration of an encoder-decoder folder.

    Raises:
        InputError: the folder is missing (names the command that makes one), or holds another kind
            of model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        missing = "holds no config.json" if folder.is_dir() else "does not exist"
        raise InputError(f"model folder {folder} {missing}; make it with: {INITIALIZE_COMMAND}")
    from qwen3_encdec import Qwen3EncoderDecoderConfig

    kind = read_json(folder / "config.json").get("model_type")
    if kind != Qwen3EncoderDecoderConfig.model_type:
        raise InputError(
            f"{folder} holds a {kind!r} model, not an encoder-decoder of this project; "
            "scripts/initialize_from_qwen3.py makes one of a dense Qwen3"
        )
    try:
        return Qwen3EncoderDecoderConfig.from_pretrained(folder)
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


def load_tokenizer(
    folder: str | Path, config: "Qwen3EncoderDecoderConfig | None" = None
) -> "Qwen3EncoderDecoderTokenizer":
    """Read the tokenizer of a folder; with `config`, check that the model has as many rows.

    Raises:
        InputError: there is none (names the command that makes one), it cannot be read, or the
            sizes differ.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        missing = "holds no tokenizer.json" if folder.is_dir() else "does not exist"
        command = (
            f"qwen3-encdec tokenizer --output {folder}" if config is None else INITIALIZE_COMMAND
        )
        raise InputError(f"tokenizer {folder} {missing}; make it with: {command}")
    from qwen3_encdec import Qwen3EncoderDecoderTokenizer

    try:
        tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(folder)
    except Exception as error:  # `tokenizers` raises bare exceptions
        raise InputError(f"{folder} holds a tokenizer that cannot be read: {error}") from None
    if config is not None and len(tokenizer) != config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer):,} entries and the model "
            f"{config.vocab_size:,} rows; save the model with its own tokenizer"
        )
    return tokenizer


def load_model(folder: str | Path, dtype: "torch.dtype | None" = None) -> "Qwen3ForSeq2SeqLM":
    """Read the encoder-decoder of a folder whole, in fp32 or `dtype`.

    Raises:
        InputError: as `load_config` and `load_whole`.
    """
    import torch

    from qwen3_encdec import Qwen3ForSeq2SeqLM

    config = load_config(folder)
    return load_whole(Qwen3ForSeq2SeqLM, Path(folder), config, dtype or torch.float32)


def load_whole(
    kind: type[M],
    folder: Path,
    config: "Qwen3EncoderDecoderConfig",
    dtype: "torch.dtype",
    key_mapping: dict[str, str] | None = None,
) -> M:
    """Read a model whose tensors are all in the folder; transformers would fill gaps at random.

    Args:
        key_mapping: Patterns of the folder's tensor names and what the model calls them.

    Raises:
        InputError: a tensor is missing, too many or of another shape, or a file is damaged.
    """
    import torch

    def rename(name: str) -> str:
        for pattern, replacement in (key_mapping or {}).items():
            name = re.sub(pattern, replacement, name)
        return name

    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in kind(config).state_dict().items()}
    shapes = tensor_shapes(folder)
    names = {rename(name): name for name in shapes}
    for name in sorted(expected.keys() | names.keys()):
        if name not in names:
            raise InputError(f"{folder}: tensor {name} is missing")
        found, shape = shapes[names[name]], expected.get(name)
        if found != shape:
            raise InputError(f"{folder}: tensor {names[name]} is {found}, expected {shape}")
    return kind.from_pretrained(
        folder, config=config, dtype=dtype, key_mapping=key_mapping, local_files_only=True
    )
