"""User-fixable errors, atomic output folders, and loading of models and tokenizers.

A folder without `qwen3_encdec.json` was not written by this package and is never replaced. torch is
imported where it is used, so `--help` and input checks need neither torch nor transformers.
"""

import errno
import glob
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from safetensors import SafetensorError, safe_open

import qwen3_encdec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROVENANCE_FILE = "qwen3_encdec.json"
INITIALIZE_COMMAND = "qwen3-encdec initialize --model HUB_ID --output FOLDER"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "sentence-transformers")
M = TypeVar("M", bound="PreTrainedModel")


class InputError(ValueError):
    """An error the caller can fix: the command line prints one sentence and exits with 2."""

    def __init__(self, sentence: str) -> None:
        # A DataLoader raises a worker's error anew, with a traceback that ends in the sentence.
        super().__init__(sentence.rpartition(f"{__name__}.InputError: ")[2].rstrip())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def input_errors(what: str) -> Iterator[None]:
    """Convert any exception into a one-line InputError that names `what`."""
    try:
        yield
    except Exception as error:  # libraries and the hub raise many types
        if isinstance(error, InputError):  # an `except` clause of its own fails at interpreter exit
            raise
        raise InputError(f"{what}: {first_line(error)}") from None


def default_device() -> "torch.device":
    """Return the available accelerator, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that affect results."""
    versions = {"qwen3-encdec": qwen3_encdec.__version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def describe_source(*options: str) -> str | None:
    """`git describe` of this package's checkout, with -dirty if files differ; None without one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    with suppress(OSError, subprocess.CalledProcessError):
        # An environment inside the checkout of another project is not part of it.
        run([*git, "ls-files", "--error-unmatch", Path(__file__).name])
        return run([*git, "describe", "--always", "--dirty", *options]).stdout.strip()
    return None


def read_json(path: str | Path, kind: type = dict) -> Any:
    """Parse a JSON file that holds a `kind`. Raises InputError naming a file that does not."""
    value = _parse(path, json.loads, "JSON")
    if not isinstance(value, kind):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not a {kind.__name__}")
    return value


def read_optional(path: str | Path) -> dict[str, Any]:
    """Parse a JSON object; empty if there is no such file."""
    return read_json(path) if Path(path).is_file() else {}


def read_yaml(path: str | Path, what: str) -> Any:
    """Parse a YAML file, called `what` in errors. Raises InputError like `read_json`."""
    return _parse(path, partial(yaml.load, Loader=_UniqueKeys), f"YAML {what}")


class _UniqueKeys(yaml.SafeLoader):
    """Refuse a key that occurs twice in a mapping; `SafeLoader` takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"key {key} occurs twice", problem_mark=mark)
        return node


def _parse(path: str | Path, parse: Callable[[str], Any], form: str) -> Any:
    try:
        return parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not valid {form}: {' '.join(str(error).split())}") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(Path(path), json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary one: a full disk leaves the file as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A file name that is not UTF-8 becomes an escape, which JSON reads back.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def local_paths(*inputs: str | Path) -> list[str]:
    """Return the existing files and folders that inputs name: paths, or matches of globs."""
    found: list[str] = []
    for item in map(str, inputs):
        found += [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
    return found


def check_output(output: str | Path, kind: str, inputs: Iterable[str | Path] = ()) -> Path:
    """Return `output` as a path.

    Raises InputError unless it can be written, is absent, empty or a folder of `kind` that this
    package wrote, and holds none of the `inputs` (paths or globs), which it would replace.
    """
    output = Path(output)
    with writing(output):
        existing = next(path for path in (output, *output.parents) if path.exists())
        if not existing.is_dir():
            raise InputError(f"output {output}: {existing} is a file; choose another folder")
        if not os.access(existing, os.W_OK):
            raise InputError(f"output {output}: no permission to write in {existing}")
        if existing != output or not any(output.iterdir()):
            return output
    if not (output / PROVENANCE_FILE).exists():
        raise InputError(f"output {output} was not written by qwen3-encdec; choose another folder")
    found = str(read_json(output / PROVENANCE_FILE).get("kind"))
    if kind != found:
        article = "an" if found.startswith("e") else "a"
        raise InputError(f"output {output} holds {article} {found}; choose another folder")
    for path in local_paths(*inputs):
        if Path(path).resolve().is_relative_to(output.resolve()):
            raise InputError(f"output {output} would replace {path}; choose another folder")
    return output


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Raise an OSError in the block as an InputError that names the output."""
    try:
        yield
    except OSError as error:
        raise InputError(f"output {output} cannot be written: {error.strerror or error}") from None


@contextmanager
def new_folder(output: str | Path, kind: str, **provenance: Any) -> Iterator[Path]:
    """Build a folder beside `output` and rename it into place when the block ends.

    `kind` (`"tokenizer"`, `"encoder"`, ...) and `provenance` are recorded in its
    `qwen3_encdec.json`. On an exception the unfinished folder is deleted and `output` is unchanged;
    a full disk is an InputError.
    """
    output = check_output(output, kind).resolve()  # of a link, the target is replaced
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(".partial", f".{output.name}.", output.parent))
    try:
        yield building
        facts = {"kind": kind, **provenance, "versions": package_versions()}
        write_json(building / PROVENANCE_FILE, facts)
        _apply_umask(building)
        move_into_place(building, output)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno in _DISK_FULL
        if full or (isinstance(error, SafetensorError) and "serializing" in str(error)):
            raise InputError(f"output {output} cannot be written: {first_line(error)}") from None
        raise


def move_into_place(building: Path, output: Path) -> None:
    """Rename a finished folder to `output`; what it replaces is deleted last, or put back."""
    replaced = building.with_suffix(".replaced")
    try:
        if output.exists():
            os.rename(output, replaced)
        os.rename(building, output)
    except BaseException:
        if replaced.exists() and not output.exists():
            os.rename(replaced, output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _apply_umask(folder: Path) -> None:
    """Give every file the mode of a new file; safetensors creates its files with 0600."""
    mode = (folder / PROVENANCE_FILE).stat().st_mode & 0o666
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


def copy_without_weights(source: Path, folder: Path) -> None:
    """Copy a model folder's files into a folder, but no weights, training state, metrics or
    provenance.
    """
    weights = ("*.safetensors", "*.bin", "*.index.json", "*.gguf", "onnx", "openvino", "state")
    ignored = shutil.ignore_patterns(*weights, "metrics.jsonl", PROVENANCE_FILE)
    shutil.copytree(source, folder, ignore=ignored, dirs_exist_ok=True)


def resolve_checkpoint(name: str | Path) -> Path:
    """Return a checkpoint's folder, downloading a hub id. Raises InputError if it is neither."""
    folder = Path(name)
    if (folder / "config.json").exists():
        return folder
    if folder.exists():
        raise InputError(f"{folder} has no config.json; it is not a checkpoint folder")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name)):
        raise InputError(f"checkpoint {name} does not exist")
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.safetensors", "*.txt"]
    with input_errors(f"{name} could not be fetched from the hub"):
        return Path(snapshot_download(str(name), allow_patterns=files))


def read_tensors(folder: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield (name, tensor) pairs of a checkpoint. Raises InputError if it is damaged."""
    for tensors in _safetensors(folder):
        for name in tensors.keys():  # noqa: SIM118
            yield name, tensors.get_tensor(name)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a checkpoint's tensors from the headers. Raises like `read_tensors`."""
    return {
        name: tuple(tensors.get_slice(name).get_shape())
        for tensors in _safetensors(folder)
        for name in tensors.keys()  # noqa: SIM118
    }


def _safetensors(folder: Path) -> Iterator[safe_open]:
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(read_json(index).get("weight_map", {}).values())
    elif not (folder / "model.safetensors").exists():
        raise InputError(f"{folder} has no model.safetensors; convert it with save_pretrained")
    for file in sorted(files):
        try:
            tensors = safe_open(folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / file} is truncated, damaged or missing: {error}") from None
        with tensors:
            yield tensors


def load_config(folder: str | Path) -> "qwen3_encdec.Qwen3EncoderDecoderConfig":
    """Load an encoder-decoder's configuration. Raises InputError if it is missing or invalid."""
    folder = _require(folder, "config.json", "model folder", INITIALIZE_COMMAND)
    check_unquantized(folder, read_json(folder / "config.json"))
    try:
        return qwen3_encdec.Qwen3EncoderDecoderConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types
        raise InputError(f"{folder / 'config.json'}: {error}") from None


def check_unquantized(name: str | Path, fields: dict[str, Any]) -> None:
    """Raise InputError if the fields of a model's config.json say that it is quantized."""
    if quantization := fields.get("quantization_config"):
        method = quantization.get("quant_method")
        raise InputError(f"{name} is quantized ({method}); use the unquantized checkpoint")


def check_finite(folder: Path, tensors: Iterable[tuple[str, Any]]) -> None:
    """Raise InputError if a tensor of a folder's model holds NaN or infinity."""
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise InputError(f"{folder}: tensor {name} contains NaN or infinity")


def load_tokenizer(
    folder: str | Path, config: "qwen3_encdec.Qwen3EncoderDecoderConfig | None" = None
) -> "qwen3_encdec.Qwen3EncoderDecoderTokenizer":
    """Load a tokenizer. Raises InputError if it does not load or its size is not `config`'s."""
    is_model = (Path(folder) / "config.json").exists()
    command = INITIALIZE_COMMAND if is_model else "qwen3-encdec tokenizer --output FOLDER"
    folder = _require(folder, "tokenizer.json", "tokenizer", command)
    with input_errors(f"the tokenizer in {folder} cannot be loaded"):
        tokenizer = qwen3_encdec.Qwen3EncoderDecoderTokenizer.from_pretrained(folder)
    if config and len(tokenizer) != config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer):,} entries but the model "
            f"{config.vocab_size:,} rows; save the model with its own tokenizer"
        )
    return tokenizer


def _require(folder: str | Path, file: str, thing: str, command: str) -> Path:
    folder = Path(folder)
    if not (folder / file).is_file():
        missing = f"has no {file}" if folder.is_dir() else "does not exist"
        if folder.is_file():
            missing = "is a file, not a folder"
        raise InputError(f"{thing} {folder} {missing}; create it with: {command}")
    return folder


def load_model(
    folder: str | Path, dtype: "torch.dtype | None" = None
) -> "qwen3_encdec.Qwen3ForSeq2SeqLM":
    """Load an encoder-decoder in fp32 or `dtype`. Raises like `load_config` and `load_whole`."""
    import torch

    config = load_config(folder)
    return load_whole(qwen3_encdec.Qwen3ForSeq2SeqLM, Path(folder), config, dtype or torch.float32)


def load_whole(
    kind: type[M],
    folder: Path,
    config: "qwen3_encdec.Qwen3EncoderDecoderConfig",
    dtype: "torch.dtype",
    key_mapping: dict[str, str] | None = None,
) -> M:
    """Load with `from_pretrained`; raise InputError for unmatched tensors or a damaged file."""
    tensor_shapes(folder)  # names a damaged file, which transformers does not
    checks = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = kind.from_pretrained(
        folder, config=config, dtype=dtype, key_mapping=key_mapping, **checks
    )
    faults = [f"{name} is missing" for name in info["missing_keys"]]
    faults += [f"{name} is not part of the model" for name in info["unexpected_keys"]]
    for name, found, expected in info["mismatched_keys"]:
        faults.append(f"{name} is {tuple(found)}, expected {tuple(expected)}")
    if faults:
        raise InputError(f"{folder}: tensor {min(faults)}")
    return model
