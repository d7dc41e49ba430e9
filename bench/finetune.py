"""Measure nDCG@10 of encoder and causal parent finetuned on package-docs, at full and smaller widths.

    python bench/finetune.py --encoder runs/demo/encoder --parent runs/demo/parent-embedder

Training pairs come from training packages, retrieval uses held-out ones, and ties count against the
model. One configuration, one seed; a second run with it must give the same figures.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers.utils import logging

from qwen3_encdec.embedding.finetune import FinetuneConfig, finetune
from qwen3_encdec.evaluation import baselines
from qwen3_encdec.evaluation.retrieval import package_retrieval, rank_scores, relevant_ranks
from qwen3_encdec.folders import read_json, write_json
from qwen3_encdec.training.config import load_dataclass

SHARES = (1, 2, 4, 8)


def main() -> None:
    """Finetune, measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, default=Path("runs/demo/encoder"))
    parser.add_argument("--parent", type=Path, default=Path("runs/demo/parent-embedder"))
    parser.add_argument("--config", type=Path, default=Path("configs/finetune.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    width = read_json(arguments.encoder / "config.json")["hidden_size"]
    config = load_dataclass(FinetuneConfig, arguments.config, arguments.set)
    settings = {
        "finetuned": replace(config, matryoshka_dims=[]),
        "Matryoshka": replace(config, matryoshka_dims=[width // share for share in SHARES[1:]]),
    }
    rows: dict[str, dict[str, float]] = {}
    print(f"{'nDCG@10 at dimensions':32}" + "".join(f"{width // share:>8}" for share in SHARES))

    def add(label: str, folder: Path) -> None:
        rows[label] = measure(folder, width, arguments.queries)
        print(
            f"{label:32}" + "".join(f"{score:8.3f}" for score in rows[label].values()), flush=True
        )

    with tempfile.TemporaryDirectory() as scratch:
        for base, folder in (("encoder", arguments.encoder), ("causal parent", arguments.parent)):
            add(base, folder)
            for label, setting in settings.items():
                finetune(folder, Path(scratch) / f"{base} {label}", config=setting)
                add(f"{base}, {label}", Path(scratch) / f"{base} {label}")
        finetune(arguments.encoder, Path(scratch) / "again", config=settings["finetuned"])
        add("encoder, finetuned, again", Path(scratch) / "again")
    same = rows["encoder, finetuned, again"] == rows["encoder, finetuned"]
    word = "equal" if same else "different"
    print(f"target the same figures again: {word} (wanted equal) {'met' if same else 'missed'}")
    if arguments.output:
        write_json(arguments.output, {"ndcg@10": rows})


def measure(folder: Path, width: int, most: int) -> dict[str, float]:
    """Measure nDCG@10 in held-out packages by number of leading dimensions."""
    task = package_retrieval(most, 0)
    embed = baselines.encoder(folder)
    queries, bodies = embed(task.queries, role="query"), embed(task.documents, role="document")
    cuts = [width // share for share in SHARES]
    return {str(cut): _score(queries[:, :cut], bodies[:, :cut], task.relevant) for cut in cuts}


def _score(queries: np.ndarray, documents: np.ndarray, relevant: np.ndarray) -> float:
    return rank_scores(relevant_ranks(queries, documents, relevant))["ndcg@10"]


if __name__ == "__main__":
    main()
