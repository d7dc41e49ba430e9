"""What every command shares about files and about the people who call it.

Outputs are built beside their destination and renamed into place, so a failure leaves nothing behind. Each
folder that this project writes holds a ``qwen3_encdec.json`` that says how it came to be; a folder without it
is somebody else's and is never replaced.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

PROVENANCE_FILE = "qwen3_encdec.json"


class InputError(ValueError):
    """Something the caller can mend. The command line prints it as one sentence and exits with 2."""


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide results, as installed; packages that are absent are left out."""
    versions = {}
    for name in ("qwen3-encdec", "torch", "transformers", "accelerate", "datasets", "sentence-transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_source(*options: str) -> str | None:
    """The commit of this package's checkout as `git describe` words it, with -dirty where files differ.

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
    """What a YAML file holds. Raises InputError, naming it as the `what` that it is, if it cannot be read."""
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

    An absent folder, an empty folder and a folder of ours (it holds ``qwen3_encdec.json``) are fine; with ``kind``,
    only one of that kind, so that an encoder never replaces a run. Raises InputError otherwise.
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
            raise InputError(f"output folder {output} holds a {found}, not a {kind}; name another folder")
    return output


@contextmanager
def new_folder(output: str | Path, kind: str, **provenance: Any) -> Iterator[Path]:
    """Build a folder beside ``output`` and rename it into place when the block ends without an exception.

    ``kind`` (``"tokenizer"``, ``"encoder-decoder"``, ``"encoder"``, ...) and ``provenance`` are recorded in its
    ``qwen3_encdec.json``. After an exception the unfinished folder is removed and ``output`` is as it was.
    """
    output = check_output(output, kind)
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    building.chmod(0o755)
    try:
        yield building
        write_json(building / PROVENANCE_FILE, {"kind": kind, **provenance, "versions": package_versions()})
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
