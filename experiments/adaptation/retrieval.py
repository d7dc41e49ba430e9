"""Measure which encoder of an adapted language model retrieves best.

    python experiments/adaptation/retrieval.py --parent FOLDER

Every contestant in settings.yaml starts from the same language model, which is trained further
causally, with masked next-token prediction (MNTP), as an encoder-decoder, or not at all. Its encoder
is scored, goes through the same contrastive stage and is scored again. UL2 encoders are read from the
states that run.py saves. Each contestant and seed is a piece with one JSON file, skipped while that
holds the settings. Several processes can share the pieces. See docs/results.md.
"""

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import yaml
from experiments.adaptation.run import Run, claim, update
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen3ForCausalLM

from qwen3_encdec import folders
from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.conversion.initialize import initialize
from qwen3_encdec.data.package_docs import package_docs, summary_pairs
from qwen3_encdec.embedding.finetune import finetune
from qwen3_encdec.evaluation import baselines
from qwen3_encdec.evaluation.retrieval import Embed, rank_scores, relevant_ranks
from qwen3_encdec.evaluation.suite import provenance
from qwen3_encdec.training import optimization
from qwen3_encdec.training.config import TrainingConfig

Settings = dict[str, Any]
Weights = dict[str, torch.Tensor]


def train(start: Path, kind: str, seed: int, settings: Settings) -> tuple[Weights, dict[str, Any]]:
    """Train further, causally or with MNTP. Returns the encoder's weights and tokens, steps and losses."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    causal = kind == "causal"
    model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32, is_causal=causal).train()
    rates = {name: settings[name] for name in ("lr", "warmup_steps")}
    config = TrainingConfig(**rates, max_steps=10**9, decay_fraction=0.0)  # as in run.py
    optimizer = optimization.build_optimizer(model, config)
    rng = np.random.default_rng(seed)
    losses: list[float] = []
    tokens = 0
    for rows in steps(read_rows(tokenizer, settings, rng), settings["step_tokens"]):
        batch = collate(rows, tokenizer, settings, rng, mntp=not causal)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(round(loss.item(), 4))
        update(model, optimizer, len(losses), config)
        tokens += sum(map(len, rows))
    return model.model.state_dict(), {"tokens": tokens, "steps": len(losses), "losses": losses}


def read_rows(tokenizer: Any, settings: Settings, rng: np.random.Generator) -> list[torch.Tensor]:
    """Cut documents in random order into rows that end in EOS, `tokens` in all, and shuffle them."""
    documents = package_docs("train")
    rows: list[torch.Tensor] = []
    size, left = settings["row_tokens"] - 1, settings["tokens"]
    for i in rng.permutation(len(documents)):
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        ids = tokenizer.encode(documents[i].text, **plain)
        for begin in range(0, len(ids), size):
            rows.append(torch.tensor([*ids[begin : begin + size], tokenizer.eos_token_id]))
            left -= len(rows[-1])
        if left <= 0:
            break
    return [rows[i] for i in rng.permutation(len(rows))]


def steps(rows: list[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Group rows, closing a group when it holds at least `most` tokens."""
    taken: list[torch.Tensor] = []
    for i, row in enumerate(rows, 1):
        taken.append(row)
        if sum(map(len, taken)) >= most or i == len(rows):
            yield taken
            taken = []


def collate(
    rows: list[torch.Tensor],
    tokenizer: Any,
    settings: Settings,
    rng: np.random.Generator,
    mntp: bool,
) -> dict[str, torch.Tensor]:
    """Pad rows to a batch [B, T] whose labels are all tokens or, with MNTP, the masked ones.

    The model shifts labels, so both predict a token from the position before it.
    """
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    asked, inputs = real.bool(), ids
    if mntp:
        drawn = torch.from_numpy(rng.random(ids.shape) < settings["masked"])
        asked = asked & drawn & (ids != tokenizer.eos_token_id)
        mask_id = tokenizer.convert_tokens_to_ids(settings["mask_token"])
        inputs = ids.masked_fill(asked, mask_id)
    return {"input_ids": inputs, "attention_mask": real, "labels": ids.masked_fill(~asked, -100)}


def read_state(arm: str, seed: int, settings: Settings, runs: Path) -> tuple[Weights, dict]:
    """Read the encoder's weights, tokens and steps from a state of run.py."""
    state = runs / Run(arm, settings["lr"], seed).name
    kept, _ = folders.read_json(state / "state.json", list)
    weights = {}
    with safe_open(state / "state.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            name = key.replace("weight model.shared.", "weight model.encoder.embed_tokens.")
            if name.startswith("weight model.encoder."):
                weights[name.removeprefix("weight model.encoder.")] = file.get_tensor(key)
    return weights, {"tokens": kept["tokens"], "steps": kept["step"]}


def write_encoder(start: Path, folder: Path, weights: Weights, causal: bool) -> None:
    """Write weights as an encoder folder like `start`; `causal` keeps the mask."""
    with safe_open(start / "model.safetensors", "pt") as file:
        assert weights.keys() == set(file.keys())
    with folders.new_folder(folder, "encoder", source=start.name) as building:
        folders.copy_without_weights(start, building)
        config = folders.read_json(building / "config.json")
        mask = {"is_causal": causal, "use_bidirectional_attention": not causal}
        folders.write_json(building / "config.json", config | mask)
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(weights, building / "model.safetensors", metadata={"format": "pt"})


def choose_texts(asked: Settings) -> tuple[list[str], list[str]]:
    """Draw bodies of held-out packages' docstrings, and the summary lines of the first of them."""
    pairs = summary_pairs("heldout")
    order = np.random.default_rng(asked["seed"]).permutation(len(pairs))[: asked["documents"]]
    summaries, bodies = zip(*(pairs[i] for i in order), strict=True)
    return list(summaries[: asked["queries"]]), list(bodies)


def score(embed: Embed, asked: Settings) -> dict[str, Any]:
    """Search for each summary line's body among all bodies; `ranks` has one rank per query."""
    began = time.monotonic()
    queries, documents = choose_texts(asked)
    with torch.autocast("cpu", torch.bfloat16):
        found = embed(queries, "query", asked["max_tokens"])
        among = embed(documents, "document", asked["max_tokens"])
    ranks = relevant_ranks(found, among, np.arange(len(queries)))
    return {
        **rank_scores(ranks),
        "seconds": round(time.monotonic() - began, 1),
        "texts": hashlib.sha256("\0".join(queries + documents).encode()).hexdigest()[:16],
        "ranks": ranks.tolist(),
    }


def measure(
    contestant: Settings, seed: int, settings: Settings, arguments: Any, name: str
) -> dict[str, Any]:
    """Score a contestant, and an encoder again after the contrastive stage."""
    kind, asked = contestant["kind"], settings["scoring"]
    if kind == "TF-IDF":
        return {"before": score(baselines.tfidf(choose_texts(asked)[1]), asked)}
    if kind == "MiniLM":
        return {"before": score(baselines.minilm(), asked)}
    if kind == "parent":
        embed = baselines.parent(arguments.parent, pooling=contestant["pooling"])
        return {"before": score(embed, asked)}
    start, work = arguments.runs / "retrieval-start", arguments.runs / f"retrieval-{name}"
    if not start.exists():
        extract_encoder(arguments.runs / "init", start)
    shutil.rmtree(work, ignore_errors=True)
    record: dict[str, Any] = {}
    encoder, began = start, time.monotonic()
    if kind != "unmasked":
        encoder = work / "encoder"
        if kind == "UL2":
            weights, facts = read_state(contestant["arm"], seed, settings, arguments.runs)
        else:
            weights, facts = train(start, kind, seed, settings)
        write_encoder(start, encoder, weights, causal=kind == "causal")
        record["training"] = facts | {"seconds": round(time.monotonic() - began, 1)}
    record["before"] = score(baselines.encoder(encoder), asked)
    began = time.monotonic()
    pairs = summary_pairs("train")
    record["contrastive"] = finetune(encoder, work / "tuned", pairs, **settings["contrastive"])
    record["contrastive"]["seconds"] = round(time.monotonic() - began, 1)
    record["after"] = score(baselines.encoder(work / "tuned"), asked)
    shutil.rmtree(work)
    return record


def walk(settings: Settings, arguments: Any) -> None:
    """Run the pieces that are not done or claimed by another process, seed by seed."""
    contestants = settings["contestants"]
    common = {name: value for name, value in settings.items() if name != "contestants"}
    pieces = [(seed, name) for name in contestants for seed in range(contestants[name]["seeds"])]
    for seed, name in sorted(pieces, key=itemgetter(0)):
        contestant = {k: value for k, value in contestants[name].items() if k != "seeds"}
        head = {"contestant": name, "seed": seed, "settings": common | {"contestant": contestant}}
        file = arguments.results / f"{Run(name, settings['lr'], seed).name}.json"
        with claim(arguments.runs / f"retrieval-{file.stem}.lock") as mine:
            if not mine:
                continue
            if file.exists() and head.items() <= folders.read_json(file).items():
                continue
            began = time.monotonic()
            record = head | measure(contestant, seed, settings, arguments, file.stem)
            record["provenance"] = provenance(started=began, threads=torch.get_num_threads())
            record["provenance"]["command"] = "retrieval.py --parent FOLDER"
            folders.write_json(file, record)
        scores = {k: round(record[k]["mrr"], 4) for k in ("before", "after") if k in record}
        print(f"{name}, seed {seed}: {scores}", flush=True)


def main() -> None:
    """Run the pieces."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parent", type=Path, required=True, help="Qwen3 folder")
    parser.add_argument("--results", type=Path, default=HERE / "results-retrieval", help="JSON")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "adaptation", help="weights")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    if not (arguments.runs / "init").exists():
        initialize(arguments.parent, arguments.runs / "init")
    plan = yaml.safe_load((HERE / "settings.yaml").read_text(encoding="utf-8"))
    walk(plan["retrieval"], arguments)


if __name__ == "__main__":
    main()
