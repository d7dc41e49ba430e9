"""The model card of an encoder folder: metadata for a hub, and facts that the folders record.

Names of files and folders are cut to their last part, so that no local path is published.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qwen3_encdec.folders import PROVENANCE_FILE, InputError, read_json, read_yaml

LICENSE, LANGUAGE = "apache-2.0", "en"
"""Those of Qwen3's dense checkpoints and of package-docs."""
_USE = """## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
query = model.encode_query(["What is a text encoder?"])
documents = model.encode_document(["A model that maps texts to vectors."])
print(model.similarity(query, documents))
```

It attends in both directions, which transformers reads from 5.2 on; older ones are refused."""


def write_card(
    folder: Path,
    *,
    name: str,
    base_model: str,
    license: str = LICENSE,
    language: str | Sequence[str] = LANGUAGE,
    sections: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> None:
    """Write README.md into a folder.

    Args:
        folder: An encoder folder under construction.
        name: Its title.
        base_model: A hub id, or the last part of a folder's name.
        license: An identifier that the hub knows.
        language: Codes, in a list or by commas.
        sections: Title and facts of each part below the usage.
    """
    codes = language.split(",") if isinstance(language, str) else language
    head = {
        "license": license,
        "base_model": base_model,
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "language": [code.strip() for code in codes],
        "tags": ["qwen3", "ul2", "feature-extraction", "text-embeddings"],
    }
    blocks = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        _USE.format(name=name),
    ]
    blocks.append(f"## The folder\n\n{_facts(_folder_facts(folder))}")
    blocks += [f"## {title}\n\n{_facts(facts)}" for title, facts in sections]
    (folder / "README.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's card; empty where there is none."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        head = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        head = None
    return head if isinstance(head, dict) else {}


def base_of(checkpoint: Path) -> str:
    """The base checkpoint behind an encoder-decoder: a hub id if it came from a hub.

    A run records the folder that it began with, and that folder what it was made of. Of a local
    folder the last part of its name remains.
    """
    source, seen = str(checkpoint), set()
    while (folder := Path(source)).is_dir() and source not in seen:
        seen.add(source)
        made_of = _made_of(folder)
        if made_of is None:
            break
        source = made_of
    return without_path(source)


def _made_of(folder: Path) -> str | None:
    for place in (folder, *folder.parents[:2]):
        if (place / "config.yaml").is_file():
            settings = read_yaml(place / "config.yaml", "configuration")
            if isinstance(settings, dict) and settings.get("model"):
                return str(settings["model"])
        if place == folder and (folder / PROVENANCE_FILE).is_file():
            try:
                source = read_json(folder / PROVENANCE_FILE).get("source")
            except InputError:
                source = None
            if source:
                return str(source)
    return None


def without_path(name: str | Path) -> str:
    """A hub id as it is; of a path its last part."""
    text = str(name)
    if (
        re.fullmatch(r"[\w.-]+/[\w.-]+", text)
        and not text.startswith(".")
        and not Path(text).exists()
    ):
        return text
    return Path(text).name or text


def public(value: Any) -> Any:
    """A value with the absolute paths in it cut to their last part."""
    if isinstance(value, Mapping):
        return {key: public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    local = isinstance(value, str | Path) and str(value).startswith(("/", "~", "./", "../"))
    return Path(value).name if local else value


def _folder_facts(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    settings = read_json(folder / "config_sentence_transformers.json")
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    longest = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    return {
        "dimensions": width,
        "layers": layers,
        "pooling": read_json(folder / "1_Pooling" / "config.json").get("pooling_mode"),
        "longest text": f"{longest} tokens" if longest else "the tokenizer's limit",
        "prompts": settings.get("prompts") or "none",
    }


def _facts(facts: Mapping[str, Any]) -> str:
    lines = []
    for key, value in facts.items():
        text = " ".join(str(public(value)).split())
        fence = "``" if "`" in text else "`"
        lines.append(f"- {key}: {fence}{text}{fence}")
    return "\n".join(lines) or "not recorded"
