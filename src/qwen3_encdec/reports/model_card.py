"""The model card of a whole run: a fact that no folder records is called "not recorded"."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qwen3_encdec.conversion.card import base_of, public, read_card, without_path
from qwen3_encdec.folders import PROVENANCE_FILE, read_json
from qwen3_encdec.reports.page import code, escape_markdown, markdown_table, read_metrics
from qwen3_encdec.reports.scores import denoising_table, tasks_table

UNKNOWN = "not recorded"
_SIZES = (
    "model_type", "hidden_size", "num_hidden_layers", "num_decoder_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "is_causal",
)  # fmt: skip


def model_card(folders: Sequence[Path]) -> str:
    """The card of the model behind the folders of its runs and evaluations, as Markdown."""
    metrics = [
        read_json(folder / "metrics.json")
        for folder in folders
        if (folder / "metrics.json").exists()
    ]
    evaluated = [
        Path(m["provenance"]["model"]) for m in metrics if m.get("provenance", {}).get("model")
    ]
    encoders = [folder for folder in evaluated if (folder / "modules.json").exists()]
    model = next(iter([*encoders, *evaluated, *folders]))
    chain = _chain(model)
    near = [
        place for folder in chain for place in (folder, *folder.parents[1:2])
    ]  # a checkpoint lies two below its run
    runs = [
        folder for folder in dict.fromkeys([*folders, *near]) if (folder / "config.yaml").exists()
    ]
    config = read_json(chain[0] / "config.json") if (chain[0] / "config.json").exists() else {}

    head = {"base_model": base_of(chain[-1]), "tags": ["qwen3", "ul2"]} | read_card(model)
    if (model / "modules.json").exists():
        head |= {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    front = f"---\n{yaml.safe_dump(head, sort_keys=True)}---"
    blocks = [front, f"# {escape_markdown(model.name)}", "## How it was made"]
    blocks.append("\n".join(f"1. {_step(folder)}" for folder in reversed(chain)))
    blocks += [
        "## Architecture",
        _facts({key: config[key] for key in _SIZES if key in config}),
        "## Training",
    ]
    trained = [_training(run) for run in runs]
    trained += [
        _facts({"finetuned": folder.name, **_record(folder)["config"]})
        for folder in chain
        if _tuned(folder)
    ]
    blocks += trained or [UNKNOWN]
    blocks.append("## Evaluation")
    for found in metrics:
        if "denoising" in found:
            blocks.append(markdown_table(denoising_table(found["denoising"])))
        if found.get("tasks"):
            blocks.append(
                "Scores with half the width of their 95 % bootstrap intervals; ties count against "
                "the model."
            )
            blocks.append(
                markdown_table(tasks_table(found["tasks"], found.get("tasks_not_run", {})))
            )
        facts = found.get("provenance", {})
        blocks.append(_facts({key: facts[key] for key in facts if key not in ("model", "command")}))
    if not metrics:
        blocks.append("not run")
    blocks += [
        "## Intended use, limits",
        f"{UNKNOWN}: whoever publishes the model writes this.",
    ]
    return "\n\n".join(blocks) + "\n"


def _chain(folder: Path) -> list[Path]:
    """A folder and what it was made from, as far as the folders are still there."""
    chain = [folder]
    while len(chain) < 20:
        record = _record(chain[-1])
        source = next(
            (record[key] for key in ("finetuned_from", "source", "model") if record.get(key)), None
        )
        if source is None:
            break
        beside = chain[-1].parent / Path(source).name  # folders that were moved together
        found = beside if beside.exists() and not Path(source).exists() else Path(source)
        if found in chain:
            break
        chain.append(found)
    return chain


def _record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / PROVENANCE_FILE) if (folder / PROVENANCE_FILE).exists() else {}
    return record | (
        {"model": _settings(folder).get("model")} if (folder / "config.yaml").exists() else {}
    )


def _tuned(folder: Path) -> bool:
    return isinstance(_record(folder).get("config"), dict)


def _settings(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def _step(folder: Path) -> str:
    record = _record(folder)
    facts = ", ".join(
        f"{key} {without_path(value) if isinstance(value, str) else value}"
        for key, value in record.items()
        if key not in ("kind", "versions", "config")
    )
    return f"{code(folder.name)}: {escape_markdown(record.get('kind', UNKNOWN))}" + (
        f", {escape_markdown(facts)}" if facts else ""
    )


def _training(run: Path) -> str:
    file = run / "metrics.jsonl"
    lines = read_metrics(file) if file.exists() else []
    last: dict[str, Any] = next((line for line in reversed(lines) if "target_tokens" in line), {})
    facts: dict[str, Any] = {
        key: last[key]
        for key in ("step", "source_tokens", "target_tokens", "examples", "loss")
        if key in last
    }
    return _facts({"run": run.name, **facts, **_settings(run)})


def _facts(facts: dict[str, Any]) -> str:
    lines = [f"- {escape_markdown(key)}: {code(str(public(facts[key])))}" for key in facts]
    return "\n".join(lines) or UNKNOWN
