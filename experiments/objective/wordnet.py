"""Read WordNet's glosses from its database files, as Debian's package `wordnet-base` installs them."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from qwen3_encdec.evaluation.baselines import NotRun

PARTS = ("noun", "verb", "adj", "adv")
INSTALLED = Path("/usr/share/wordnet")


class Synset(NamedTuple):
    """One meaning."""

    lemmas: list[str]
    """Words with this meaning, the most common one first."""
    definition: str
    """Definition without the examples."""
    examples: list[str]
    """Phrases or sentences that use one of the lemmas."""
    lexicographer: int
    """Number of its file, one of 45: noun.animal, verb.motion, adj.all ..."""


def wordnet_folder() -> Path:
    """Return the folder that holds data.noun.

    It is searched for in `$WNSEARCHDIR`, in `$XDG_CACHE_HOME/qwen3-encdec/wordnet` (where the package
    can be unpacked without root: `apt download wordnet-base && dpkg -x wordnet-base_*.deb DIR`) and
    in `/usr/share/wordnet`.

    Raises:
        NotRun: it is in none of them.
    """
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "qwen3-encdec"
        / "wordnet"
    )
    folders = [cache / "usr/share/wordnet", cache, INSTALLED]
    if named := os.environ.get("WNSEARCHDIR"):
        folders.insert(0, Path(named))
    for folder in folders:
        if all((folder / f"data.{part}").is_file() for part in PARTS):
            return folder
    raise NotRun("apt install wordnet-base")


def synsets(folder: Path) -> list[Synset]:
    """Read all meanings, in the order of the files."""
    found = []
    for part in PARTS:
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the license
                continue
            fields, _, gloss = line.partition(" | ")
            _, lexicographer, _, count, *words = fields.split(" ")
            lemmas = [
                re.sub(r"\((a|p|ip)\)$", "", word) for word in words[: 2 * int(count, 16) : 2]
            ]
            definition, _, rest = gloss.strip().partition('; "')
            found.append(
                Synset(
                    [lemma.replace("_", " ") for lemma in lemmas],
                    definition,
                    re.findall(r'"([^"]+)"', f'"{rest}') if rest else [],
                    int(lexicographer),
                )
            )
    return found
