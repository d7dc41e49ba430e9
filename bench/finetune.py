"""What finetuning on package-docs brings, beside the causal parent with the same budget, at full
and smaller widths.

    python bench/finetune.py --encoder runs/demo/encoder --parent runs/demo/parent-embedder

Pairs of training packages; retrieval among the held-out ones, each query's body among all bodies,
ties against the model. Everything is one configuration and one seed; a second run with it must give
the same weights.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

SHARES = (1, 2, 4, 8)


def main() -> None:
    """Finetune, measure, print the table and the targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, default=Path("runs/demo/encoder"))
    parser.add_argument(
        "--parent", type=Path, default=Path("runs/demo/parent-embedder"), help="causal, mean-pooled"
    )
    parser.add_argument("--config", type=Path, default=Path("configs/finetune.yaml"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override the config"
    )
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--documents", type=int, help="fewer than all held-out ones")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    from transformers.utils import logging

    from qwen3_encdec.embedding.finetune import FinetuneConfig, finetune
    from qwen3_encdec.evaluation.suite import provenance
    from qwen3_encdec.folders import read_json, write_json
    from qwen3_encdec.training.config import load_dataclass

    logging.disable_progress_bar()
    started = time.monotonic()
    width = read_json(arguments.encoder / "config.json")["hidden_size"]
    config = load_dataclass(FinetuneConfig, arguments.config, arguments.set)
    nested = replace(config, matryoshka_dims=[width // share for share in SHARES[1:]])
    plain = replace(config, matryoshka_dims=[])
    rows: dict[str, dict[str, float]] = {}
    print(
        f"{'nDCG@10 at dimensions':32}" + "".join(f"{width // share:>8}" for share in SHARES),
        flush=True,
    )

    def add(label: str, folder: Path) -> None:
        rows[label] = measure(folder, width, arguments.queries, arguments.documents)
        print(
            f"{label:32}" + "".join(f"{score:8.3f}" for score in rows[label].values()), flush=True
        )

    with tempfile.TemporaryDirectory() as name:
        for base, folder in (("encoder", arguments.encoder), ("causal parent", arguments.parent)):
            add(base, folder)
            for label, settings in (("finetuned", plain), ("Matryoshka", nested)):
                finetune(folder, tuned_folder := Path(name) / f"{base} {label}", config=settings)
                add(f"{base}, {label}", tuned_folder)
        finetune(arguments.encoder, Path(name) / "again", config=plain)
        add("encoder, finetuned, again", Path(name) / "again")

    full, least = str(width), str(width // SHARES[-1])
    encoder, tuned, nest = rows["encoder"], rows["encoder, finetuned"], rows["encoder, Matryoshka"]
    parent = rows["causal parent, finetuned"]
    gain = tuned[full] - encoder[full]
    target("finetuned over the encoder", f"{gain:+.3f}", "> 0", gain > 0)
    print(f"the encoder over its causal parent, both finetuned: {tuned[full] - parent[full]:+.3f}")
    kept = nest[least] - tuned[least]
    target(f"Matryoshka over plain at {least} dimensions", f"{kept:+.3f}", "> 0", kept > 0)
    same = rows["encoder, finetuned, again"] == tuned
    target("the same figures again", "equal" if same else "different", "equal", same)
    if arguments.output:
        facts = provenance(
            started=started,
            encoder=str(arguments.encoder),
            config=json.loads(json.dumps(vars(config))),
        )
        write_json(arguments.output, {"ndcg@10": rows, "provenance": facts})


def measure(folder: Path, width: int, most: int, documents: int | None = None) -> dict[str, float]:
    """nDCG@10 in held-out packages by number of leading dimensions."""
    import numpy as np

    from qwen3_encdec.data.package_docs import summary_pairs
    from qwen3_encdec.evaluation import baselines
    from qwen3_encdec.evaluation.retrieval import retrieval_scores

    pairs = summary_pairs("heldout")[:documents]
    relevant = np.sort(np.random.default_rng(0).permutation(len(pairs))[:most])
    embed = baselines.encoder(folder)
    queries, bodies = embed([pairs[i][0] for i in relevant]), embed([body for _, body in pairs])
    cuts = [width // share for share in SHARES]
    return {
        str(cut): retrieval_scores(queries[:, :cut], bodies[:, :cut], relevant)["ndcg@10"]
        for cut in cuts
    }


def target(name: str, figure: str, wanted: str, met: bool) -> None:
    """One line that says whether a figure is as wanted."""
    print(f"target {name}: {figure} (wanted {wanted}) {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
