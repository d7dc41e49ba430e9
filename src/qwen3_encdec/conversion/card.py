"""Model card of an encoder folder: hub metadata, and facts recorded in the folders.

File and folder names are reduced to their last part, so no local path is published.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save

from qwen3_encdec.folders import PROVENANCE_FILE, local_paths, read_optional

_METADATA = {
    # As for Qwen3's dense checkpoints and package-docs.
    "license": "apache-2.0",
    "language": ["en"],
    "library_name": "sentence-transformers",
    "pipeline_tag": "sentence-similarity",
    "tags": ["qwen3", "ul2", "feature-extraction", "text-embeddings"],
}
_USE = """## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
query = model.encode_query(["What is a text encoder?"])
documents = model.encode_document(["A model that maps texts to vectors."])
print(model.similarity(query, documents))
```

Attention is bidirectional. Use transformers >= 5.2; sentence-transformers rejects older ones."""


def write_card(
    folder: Path,
    name: str,
    metadata: Mapping[str, Any],
    sections: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write README.md into an encoder folder under construction.

    Args:
        folder: Encoder folder.
        name: Title of the card.
        metadata: Hub metadata: `base_model`, and overrides of the default license and language.
        sections: Facts by section title.
    """
    parts = [f"# {name}", _USE.format(name=name)]
    for title, facts in sections.items():
        lines = [f"- {key}: `{_public(value)}`".replace("\n", " ") for key, value in facts.items()]
        parts.append("\n".join([f"## {title}\n", *lines]))
    file = folder / "README.md"
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    metadata_save(file, {**_METADATA, **metadata})


def inherited(folder: Path) -> dict[str, Any]:
    """Read what a card inherits from that of the folder its model was made of: license, language
    and base model, but no scores. Without a card, the folder itself is the base.
    """
    file = folder / "README.md"
    found = (metadata_load(file) or {}) if file.is_file() else {}
    names = ("base_model", "license", "license_name", "license_link", "language")
    kept = {name: found[name] for name in names if name in found}
    return {"base_model": without_path(folder), **kept}


def base_of(checkpoint: Path) -> str:
    """Trace an encoder-decoder to its base checkpoint: a hub id if it came from a hub.

    A checkpoint records the folder its run started from, and that folder records its source.
    """
    source = str(checkpoint)
    for _ in range(9):  # bounded, in case of a cycle
        record = read_optional(Path(source) / PROVENANCE_FILE)
        source = record.get("source") or record.get("model") or source
    return without_path(source)


def without_path(name: str | Path) -> str:
    """Return a hub id unchanged, or the last part of a path."""
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)) and not Path(name).exists()
    return str(name) if is_hub_id else Path(name).absolute().name


def _public(value: Any) -> Any:
    """Reduce the local paths in a value to their last part."""
    if isinstance(value, list | tuple):
        return [_public(each) for each in value]
    if not isinstance(value, str | Path):
        return value
    local = str(value).startswith(("/", "~", "./", "../")) or local_paths(value)
    return Path(value).name if local else value
