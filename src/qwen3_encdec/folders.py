"""What every command shares about files and about the people who call it.

Outputs are built beside their destination and renamed into place, so a failure leaves nothing
behind. Each folder that this project writes holds a ``qwen3_encdec.json`` that says how it came to
be; a folder without it is somebody else's and is never replaced.
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
from typing import Any, TypeVar

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from transformers import PreTrainedModel

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer

PROVENANCE_FILE = "qwen3_encdec.json"


class InputError(ValueError):
    """Something the caller can mend.

    The command line prints it as one sentence and exits with 2.
    """


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide results, as installed;

    packages that are absent are left out.
    """
    versions = {}
    for name in (
        "qwen3-encdec",
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "sentence-transformers",
    ):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_source(*options: str) -> str | None:
    """The commit of this package's checkout as `git describe` words it, with -dirty where files
    differ.

    None where it is installed without a checkout.
    """
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
    """What a YAML file holds.

    Raises InputError, naming it as the `what` that it is, if it cannot be read.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON through a temporary file and a rename, so that a reader never sees half of it."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def check_output(output: str | Path, kind: str | None = None) -> Path:
    """Refuse a destination that we may not write: call it before any work begins.

    An absent folder, an empty folder and a folder of ours (it holds ``qwen3_encdec.json``) are
    fine; with ``kind``, only one of that kind, so that an encoder never replaces a run. Raises
    InputError otherwise.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / PROVENANCE_FILE).exists():
        raise InputError(
            f"output folder {output} exists and was not written by qwen3-encdec; name another folder or empty it first"
        )
    if kind is not None and (output / PROVENANCE_FILE).exists():
        found = read_json(output / PROVENANCE_FILE).get("kind")
        if found != kind:
            raise InputError(
                f"output folder {output} holds a {found}, not a {kind}; name another folder"
            )
    return output


@contextmanager
def new_folder(output: str | Path, kind: str, **provenance: Any) -> Iterator[Path]:
    """Build a folder beside ``output`` and rename it into place when the block ends without an
    exception.

    ``kind`` (``"tokenizer"``, ``"encoder-decoder"``, ``"encoder"``, ...) and ``provenance`` are
    recorded in its ``qwen3_encdec.json``. After an exception the unfinished folder is removed and
    ``output`` is as it was.
    """
    output = check_output(output, kind)
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(
        tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent)
    )
    building.chmod(0o755)
    try:
        yield building
        write_json(
            building / PROVENANCE_FILE, {"kind": kind, **provenance, "versions": package_versions()}
        )
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


def copy_without_weights(source: Path, folder: Path) -> None:
    """Every file of a model folder but its weights and its provenance, into a folder that exists."""
    weights = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", PROVENANCE_FILE)
    shutil.copytree(source, folder, ignore=weights, dirs_exist_ok=True)


M = TypeVar("M", bound=PreTrainedModel)
TRAIN_COMMAND = (
    "accelerate launch --config_file configs/accelerate_fsdp2.yaml "
    "scripts/train.py --config configs/training_config.yaml"
)
INITIALIZE_COMMAND = "python scripts/initialize_from_qwen3.py --qwen3-model FOLDER_OR_HUB_ID --output-dir ./qwen3-encdec-init"


def resolve_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint that is given as a folder or as a hub id.

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
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))
        or str(name).startswith(".")
    ):
        raise InputError(f"checkpoint {name} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.txt"])
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"checkpoint {name} is no local folder and could not be fetched from the hub: {reason}"
        ) from None


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a checkpoint's safetensors files, one at a time.

    Raises:
        InputError: there are none, or one is missing or damaged.
    """
    for path in _safetensors_files(folder):
        with _opened(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def read_averages(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the same of the running average that training with `ema_decay` keeps.

    Raises:
        InputError: there is none, or a file is damaged.
    """
    reader = HuggingFaceStorageReader(str(folder / "state"))
    try:
        metadata = reader.read_metadata() if (folder / "state").is_dir() else None
        stored = metadata.state_dict_metadata if metadata else {}
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
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
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


def load_config(folder: str | Path) -> Qwen3EncoderDecoderConfig:
    """The configuration of an encoder-decoder folder.

    Raises:
        InputError: the folder is missing (names the command that makes one), or holds another kind
            of model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        missing = "holds no config.json" if folder.is_dir() else "does not exist"
        raise InputError(f"model folder {folder} {missing}; make it with: {INITIALIZE_COMMAND}")
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
    folder: str | Path, config: Qwen3EncoderDecoderConfig | None = None
) -> Qwen3EncoderDecoderTokenizer:
    """The tokenizer of a folder; with `config`, checked to have as many entries as the model has
    rows.

    Raises:
        InputError: there is none (names the command that makes one), it has no sentinels, or the
            sizes differ.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        missing = "holds no tokenizer.json" if folder.is_dir() else "does not exist"
        command = (
            f"qwen3-encdec tokenizer --output {folder}" if config is None else INITIALIZE_COMMAND
        )
        raise InputError(f"tokenizer {folder} {missing}; make it with: {command}")
    try:
        tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(folder)
    except Exception as error:  # `tokenizers` raises bare exceptions
        raise InputError(f"{folder} holds a tokenizer that cannot be read: {error}") from None
    if config is not None and len(tokenizer) != config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer):,} entries and the model {config.vocab_size:,} rows; "
            "save the model with its own tokenizer"
        )
    return tokenizer


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> Qwen3ForSeq2SeqLM:
    """The encoder-decoder of a folder, whole: a missing tensor is an error and never random.

    Raises:
        InputError: as `load_config`, or the tensors are damaged, missing, too many or of other
            shapes.
    """
    return load_whole(Qwen3ForSeq2SeqLM, Path(folder), load_config(folder), dtype)


def load_whole(
    kind: type[M], folder: Path, config: Qwen3EncoderDecoderConfig, dtype: torch.dtype
) -> M:
    """A model of a folder, all of `dtype`: transformers itself would fill what is missing at
    random.

    Raises:
        InputError: a tensor is missing, too many or of another shape, or a file is damaged.
    """
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in kind(config).named_parameters()}
    found = tensor_shapes(folder)
    for name in sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    ):
        state = (
            "is missing"
            if name not in found
            else f"is {found[name]}, expected {expected.get(name, 'none')}"
        )
        raise InputError(f"{folder}: tensor {name} {state}")
    return kind.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True)
