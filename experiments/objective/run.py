"""Compare a UL2-trained encoder with its causal parent, the unmasked parent and MNTP at equal tokens.
See docs/results.md.

    python experiments/objective/run.py --jobs 2

Each piece (a parent, a training, a score) writes one JSON file under results/ when it finishes and
is skipped while that file holds the plan's settings; weights are in runs/. The command can be
stopped at any time and rerun, and a stop costs at most one piece of each job.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from experiments.objective.benchmarks import evaluate
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.conversion.initialize import initialize
from qwen3_encdec.data.collate import mask_token_id
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.package_docs import package_docs, summary_pairs
from qwen3_encdec.data.stream import UL2Data, rows
from qwen3_encdec.data.ul2 import PRESETS
from qwen3_encdec.demo.parent import (
    causal_embedder,
    fit,
    parent_tokenizer,
    token_blocks,
    train_causal_parent,
)
from qwen3_encdec.embedding.finetune import finetune
from qwen3_encdec.evaluation.suite import evaluate_denoising, provenance
from qwen3_encdec.folders import (
    InputError,
    copy_without_weights,
    load_config,
    load_model,
    load_tokenizer,
    new_folder,
    read_json,
    read_yaml,
    write_json,
)
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.flops import count_parameters, flops_per_sum, length_sums
from qwen3_encdec.training.loop import train_to_the_end

BLOCK = 256
FAMILY = 200  # maximum man pages with one name prefix: thousands of one tool are one text
MASKED = 0.2  # share of masked tokens, in MNTP alone and beside UL2

Plan = Record = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """A branch of the parent's training, and how its encoder is used."""

    branch: Literal["causal", "mntp", "ul2"]
    causal: bool = False
    """Keep the mask in the contrastive stage and after it."""
    pooling: Literal["mean", "last"] = "mean"
    mntp_weight: float = 0.0
    s_weight: float = 4.0
    decoder_share: float = 1.0
    random_sentinels: bool = False

    @property
    def trained(self) -> "Contestant":
        """What its training depends on; mask and pooling at their defaults."""
        return replace(self, causal=False, pooling="mean")


class Unit:
    """One size and seed: its parent, its trainings and its scores."""

    def __init__(self, plan: Plan, size: str, seed: int, results: Path, runs: Path) -> None:
        self.plan, self.seed, self.name = plan, seed, f"{size}-{seed}"
        self.sizes = plan["sizes"][size]
        self.results, self.runs = results / self.name, runs / self.name
        named = {**plan["contestants"], **plan["ablations"]}
        self.all = {name: Contestant(**values) for name, values in named.items()}

    def parent(self) -> Path:
        """Train the causal parent and write branch.jsonl, the documents that every branch reads."""
        settings = {"parent": self.plan["parent"], "tokens": self.plan["branch"]["tokens"]}
        self._piece("parent", settings, self._parent, self.runs / "branch.jsonl")
        return self.runs / "parent"

    def train(self, name: str) -> Path:
        """Train a contestant's branch: a causal Qwen3, an encoder (MNTP) or a run (UL2)."""
        name = self.training(name)
        contestant = self.all[name].trained
        parent, folder = self.parent(), self.runs / f"train-{slug(name)}"
        kind = {"causal": self._causal, "mntp": self._mntp, "ul2": self._ul2}[contestant.branch]
        keys = ("branch", "ul2", "parent") if contestant.branch == "ul2" else ("branch", "parent")
        settings = {key: self.plan[key] for key in keys} | {"contestant": asdict(contestant)}

        def work() -> Record:
            began = time.monotonic()
            record = kind(contestant, parent, folder)
            (folder / "done").touch()
            return record | {"training seconds": round(time.monotonic() - began, 1)}

        self._piece(f"train {name}", settings, work, folder / "done")
        return folder / "checkpoint" if contestant.branch == "ul2" else folder

    def score(self, name: str) -> None:
        """Score a contestant's encoder with the suite, before and after the contrastive stage.

        "parent" is the unchanged parent: with mean and last-token pooling, and without its mask.
        """
        self._piece(f"score {name}", self._score_settings(name), lambda: self._score(name))

    def training(self, name: str) -> str:
        """Return the first contestant with the same training; mask and pooling may differ."""
        wanted = self.all[name].trained
        return next(other for other in self.all if self.all[other].trained == wanted)

    def scored(self, name: str) -> bool:
        """Return whether `score` has nothing to do."""
        return is_done(*self._place(f"score {name}", self._score_settings(name)))

    def _score_settings(self, name: str) -> Record:
        if name == "parent":
            return {key: self.plan[key] for key in ("parent", "evaluation")}
        keys = ("parent", "branch", "ul2", "contrastive", "evaluation")
        return {key: self.plan[key] for key in keys} | {"contestant": asdict(self.all[name])}

    def _piece(
        self, name: str, settings: Record, work: Callable[[], Record], needed: Path | None = None
    ) -> None:
        run_piece(*self._place(name, settings), self.runs, work, needed)

    def _place(self, name: str, settings: Record) -> tuple[Path, Record]:
        """Return a piece's file and all of its settings."""
        shared = {"size": self.sizes, "seed": self.seed, "corpus": self.plan["corpus"]}
        return self.results / f"{slug(name)}.json", shared | settings

    def _parent(self) -> Record:
        sizes, wanted = self.plan["parent"], self.plan["branch"]["tokens"] + BLOCK
        documents = corpus(**self.plan["corpus"])
        order = np.random.default_rng(self.seed).permutation(len(documents))
        half = len(documents) // 2  # the first is for the parent, the second for its branches
        tokenizer = parent_tokenizer(self.plan["corpus"]["num_ranks"])
        record: Record = train_causal_parent(
            self.runs / "parent",
            tokenizer=tokenizer,
            texts=[documents[i] for i in order[:half]],
            block_size=BLOCK,
            seed=self.seed,
            **self.sizes,
            **schedule(sizes),
        )
        taken, count = [], 0
        for i in order[half:]:
            taken.append(json.dumps({"text": documents[i]}) + "\n")
            count += len(tokenizer.encode(documents[i], split_special_tokens=True)) + 1
            if count >= wanted:
                break
        (self.runs / "branch.jsonl").write_text("".join(taken), encoding="utf-8")
        # An equal number may not be equal texts: man pages depend on the machine.
        texts = "\0".join(sorted(documents)).encode("utf-8", "surrogatepass")
        facts = {"documents": len(documents), "branch documents": len(taken)}
        return record | {"corpus": facts | {"sha256": hashlib.sha256(texts).hexdigest()}}

    def _score(self, name: str) -> Record:
        if name == "parent":
            return {"before": self._evaluate({}, parent=self.parent())}
        encoder = self.runs / "encoders" / slug(name)
        self._encoder(name, encoder)
        before = self._evaluate({name: encoder})
        tuned = encoder.with_name(f"{encoder.name}-contrastive")
        settings = {**self.plan["contrastive"], "seed": self.seed}
        began = time.monotonic()
        facts = finetune(encoder, tuned, summary_pairs("train"), **settings)
        facts["seconds"] = round(time.monotonic() - began, 1)
        return {"before": before, "contrastive": facts, "after": self._evaluate({name: tuned})}

    def _evaluate(self, encoders: dict[str, Path], **options: Any) -> Record:
        asked = {name: self.plan["evaluation"][name] for name in ("tasks", "num_queries")}
        return evaluate(encoders, outside=False, **asked, **options)

    def _encoder(self, name: str, folder: Path) -> None:
        """Write a contestant's trained model as a sentence-transformers folder."""
        contestant, trained = self.all[name], self.train(name)
        if contestant.causal:
            causal_embedder(trained, folder)
        elif contestant.branch == "mntp":
            with new_folder(folder, "encoder", source=str(trained)) as building:
                copy_without_weights(trained, building)
                shutil.copy(trained / "model.safetensors", building)
        else:
            if contestant.branch == "causal":
                initialize(trained, self.runs / "unmasked-init", seed=self.seed)
                trained = self.runs / "unmasked-init"
            extract_encoder(trained, folder, pooling=contestant.pooling)

    def _blocks(self, tokenizer: Any) -> np.ndarray:
        """Cut the branch's documents into blocks (N, BLOCK)."""
        sizes = schedule(self.plan["branch"])
        lines = (self.runs / "branch.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        most = sizes["steps"] * sizes["batch_size"]
        return token_blocks(texts, tokenizer, most, BLOCK, self.seed)

    def _count_text(self, ids: np.ndarray) -> int:
        """Count the tokens that are no control tokens, sentinels or padding."""
        return int((ids < self.plan["corpus"]["num_ranks"]).sum())

    def _causal(self, contestant: Contestant, parent: Path, folder: Path) -> Record:
        model = Qwen3ForCausalLM.from_pretrained(parent)
        tokenizer = AutoTokenizer.from_pretrained(parent)
        blocks = self._blocks(tokenizer)
        losses = fit(model, blocks, blocks, **schedule(self.plan["branch"]))
        with new_folder(folder, "causal branch", source=str(parent)) as building:
            model.save_pretrained(building)
            tokenizer.save_pretrained(building)
        return self._read(model.model, blocks, losses, asked=1.0, seen=0.5)

    def _mntp(self, contestant: Contestant, parent: Path, folder: Path) -> Record:
        start = self.runs / "mntp-start"
        initialize(parent, self.runs / "mntp-init", seed=self.seed)
        extract_encoder(self.runs / "mntp-init", start)
        model = Qwen3ForCausalLM.from_pretrained(start)
        mask_id = mask_token_id(AutoTokenizer.from_pretrained(start))
        blocks = self._blocks(AutoTokenizer.from_pretrained(parent))
        masked = np.random.default_rng(self.seed).random(blocks.shape) < MASKED
        inputs, labels = np.where(masked, mask_id, blocks), np.where(masked, blocks, -100)
        losses = fit(model, inputs, labels, **schedule(self.plan["branch"]))
        weights = {name: tensor.contiguous() for name, tensor in model.model.state_dict().items()}
        with new_folder(folder, "encoder", source=str(start)) as building:
            copy_without_weights(start, building)
            save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
        return self._read(model.model, blocks, losses, asked=MASKED, seen=1.0)

    def _read(
        self, body: Any, blocks: np.ndarray, losses: list[float], asked: float, seen: float
    ) -> Record:
        """Return what a training on blocks read and cost.

        A share `asked` of the tokens is predicted, each from a share `seen` of a block.
        """
        number = len(losses) * self.plan["branch"]["batch_size"]
        head = body.embed_tokens.weight.numel()
        layers = body.num_parameters() - head
        c = body.config
        attention = 12 * c.num_attention_heads * c.head_dim * c.num_hidden_layers * BLOCK * seen
        return {
            "text tokens": self._count_text(np.resize(blocks, (number, BLOCK))),
            "steps": len(losses),
            "flops": number * BLOCK * (6 * (layers + asked * head) + attention),
            "loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
        }

    def _ul2(self, contestant: Contestant, parent: Path, folder: Path) -> Record:
        sizes, init = self.plan["ul2"], folder / "init"
        lengths = {name: sizes[name] for name in ("source_length", "target_length")}
        layers = round(contestant.decoder_share * self.sizes["num_hidden_layers"])
        initialize(parent, init, num_decoder_layers=layers, seed=self.seed)
        if contestant.random_sentinels:
            redraw_sentinels(init, self.seed)
        preset = [asdict(denoiser) for denoiser in PRESETS["t5gemma2"]]
        preset[-1]["weight"] = contestant.s_weight  # S is the last
        data = DataConfig(
            inputs=[str(self.runs / "branch.jsonl")],
            heldout_every=10**9,
            preset=preset,
            seed=self.seed,
            **lengths,
        )
        number, text = self._count_steps(data, load_tokenizer(init))
        config = TrainingConfig(
            model=str(init),
            output_dir=str(folder / "run"),
            data=data,
            max_steps=number,
            batch_size=sizes["batch_size"],
            lr=self.plan["branch"]["lr"],
            schedule="cosine",
            warmup_steps=number // 20,
            mntp_weight=contestant.mntp_weight,
            mntp_probability=MASKED,
            mixed_precision="no",
            spike_sigma=0.0,
            eval_every=0,
            save_every=500,
            keep_last=1,
            trackers=[],
            seed=self.seed,
        )
        checkpoint = train_to_the_end(config)
        (folder / "checkpoint").unlink(missing_ok=True)
        (folder / "checkpoint").symlink_to(checkpoint.resolve())

        metrics = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last, model_config = json.loads(metrics[-1]), load_config(init)
        counts = count_parameters(model_config)
        means = [
            np.array([last[name] / last["examples"]]) for name in ("source_tokens", "target_tokens")
        ]
        flops = last["examples"] * flops_per_sum(model_config, counts) @ length_sums(*means)
        masked = MASKED * last["source_tokens"] if contestant.mntp_weight else 0
        found = evaluate_denoising(
            {"initialization": init, "trained": checkpoint},
            num_examples=self.plan["evaluation"]["num_examples"],
            data=DataConfig(**lengths),
        )
        return {
            "text tokens": text,
            "steps": number,
            "flops": float(flops) + 6 * masked * counts.embedding,
            "source tokens": last["source_tokens"],
            "target tokens": last["target_tokens"],
            "loss": last["loss"],
            "denoising": found["denoising"],
            "exact gaps": found["infill"]["by_denoiser"],
        }

    def _count_steps(self, data: DataConfig, tokenizer: Any) -> tuple[int, int]:
        """Count UL2's steps, and their text tokens, until they have read as much text as blocks hold."""
        wanted, size = self._count_text(self._blocks(tokenizer)), self.plan["ul2"]["batch_size"]
        text = 0
        for number, row in enumerate(rows(UL2Data(data, tokenizer)), start=1):
            for example in row.examples:
                text += self._count_text(example.source) + self._count_text(example.target)
            if text >= wanted and number % size == 0:
                break
        return number // size, text


def slug(name: str) -> str:
    """Return a name as it is in files."""
    return name.replace(" ", "-")


def is_done(file: Path, settings: Record) -> bool:
    """Return whether a piece's file exists with these settings."""
    return file.exists() and read_json(file)["settings"] == settings


def run_piece(
    file: Path,
    settings: Record,
    runs: Path,
    work: Callable[[], Record],
    needed: Path | None = None,
) -> None:
    """Write what `work` returns, unless the file has these settings and `needed` exists."""
    if is_done(file, settings) and (needed is None or needed.exists()):
        return
    started, cpu = time.monotonic(), time.process_time()
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f"{file.stem}.log").open("w", encoding="utf-8") as out, redirect_stdout(out):
        record = work()
    facts = provenance(started=started)
    facts["command"] = re.sub(r" --piece ('[^']*'|\S+)", "", facts["command"])
    spent = {"cpu seconds": round(time.process_time() - cpu, 1), "provenance": facts}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"settings": settings, **record, **spent})
    print(f"{runs.name:9} {file.stem:32} {facts['seconds']:8.1f} s", flush=True)


def schedule(sizes: Record) -> dict[str, Any]:
    """Return the steps that read the given tokens, their batch size and learning rate."""
    steps = max(1, sizes["tokens"] // (BLOCK * sizes["batch_size"]))
    return {"steps": steps, "batch_size": sizes["batch_size"], "lr": sizes["lr"]}


def corpus(num_ranks: int, man_pages: int, man_characters: int) -> list[str]:
    """Return docstrings of the training packages and, if installed, evenly sampled man pages."""
    documents = [document.text for document in package_docs("train")]
    families: dict[str, list[Path]] = {}
    for file in sorted(Path("/usr/share/man").glob("man[1-8]/*.gz")):
        families.setdefault(re.split(r"[-_.:]", file.name)[0], []).append(file)
    files = [file for family in families.values() for file in family[:FAMILY]]
    sampled = files[:: max(1, len(files) // man_pages)][:man_pages] if man_pages else []
    for file in sampled:
        try:
            roff = gzip.decompress(file.read_bytes()).decode("utf-8", errors="ignore")
        except OSError:
            continue
        text = plain(roff)[:man_characters]
        if len(text) > 200:
            documents.append(text)
    return documents


def plain(roff: str) -> str:
    """Return the words of a man page.

    Escapes are removed, and so are requests, except those whose arguments are text.
    """
    lines, skipping = [], False
    for line in roff.splitlines():
        if re.match(r"['.]\s*(de|ie|if|el|ig)\b", line):
            skipping = r"\{" in line or line.lstrip("'. ").startswith(("de", "ig"))
        elif skipping:
            skipping = not re.match(r"['.](\.|br\\}|\\})", line)
        elif not line.startswith((".", "'")):
            lines.append(line)
        elif words := re.match(r"\.(SH|SS|B|I|BR|IR|RB|RI|BI|IB|Nm|Fl|Ar|Sh|Ss)\s+(.+)", line):
            lines.append(words[2].replace('"', ""))
    text = re.sub(r"\\f.|\\[&|^/,]|\\s[-+]?\d", "", "\n".join(lines))
    text = text.replace(r"\-", "-").replace("\\ ", " ").replace(r"\e", "\\")
    text = re.sub(r"\\\*?\((.)(.)|\\\*?\[[^]]*\]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def redraw_sentinels(folder: Path, seed: int) -> None:
    """Redraw the sentinel rows like a fresh model's, for the ablation of their initialization."""
    model = load_model(folder)
    new = model.model.shared.weight.data[-model.config.num_sentinel_tokens :]
    new.normal_(0.0, model.config.initializer_range, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)


def read_plan(file: Path, scale: float, sizes: list[str], seeds: list[int]) -> Plan:
    """Read the plan with `scale` times the tokens, contrastive steps and queries, for the named
    sizes and seeds or all.
    """
    plan = read_yaml(file, "plan")
    if scale <= 0:
        raise InputError(f"scale {scale:g} must be above 0")
    for name in sizes:
        if name not in plan["sizes"]:
            raise InputError(f"size {name!r} is not one of {', '.join(plan['sizes'])}")
    plan["sizes"] = {name: plan["sizes"][name] for name in sizes or plan["sizes"]}
    plan["seeds"] = seeds or plan["seeds"]
    for part in ("parent", "branch"):
        plan[part]["tokens"] = int(scale * plan[part]["tokens"])
    plan["contrastive"]["steps"] = max(1, int(scale * plan["contrastive"]["steps"]))
    asked = plan["evaluation"]
    asked["num_queries"] = min(asked["num_queries"], max(100, int(scale * asked["num_queries"])))
    return plan


def pieces(plan: Plan, ablate: bool, results: Path, runs: Path) -> dict[str, list[str]]:
    """List missing pieces and those whose weights they need, each with the pieces that must run
    before it.

    A piece is "baselines" or "SIZE-SEED KIND CONTESTANT".
    """
    ablated = "{size}-{seed}".format(**plan["ablate"])
    found: dict[str, list[str]] = {}
    for size, seed in itertools.product(plan["sizes"], plan["seeds"]):
        unit = Unit(plan, size, seed, results, runs)
        names = unit.all if ablate and unit.name == ablated else plan["contestants"]
        parent = f"{unit.name} parent all"
        for name in ("parent", *names):
            if unit.scored(name):
                continue
            found[parent], needed = [], parent
            if name != "parent":
                needed = f"{unit.name} train {unit.training(name)}"
                found[needed] = [parent]
            found[f"{unit.name} score {name}"] = [needed]
    order = {"parent": 0, "train": 1, "score": 2}  # what others wait for comes first
    found = dict(sorted(found.items(), key=lambda item: order[item[0].split(" ")[1]]))
    if not is_done(results / "baselines.json", plan["evaluation"]):
        found["baselines"] = []
    return found


def walk(plan: Plan, job: str, results: Path, runs: Path) -> None:
    """Run one of the `pieces`."""
    disable_progress_bar()
    if job == "baselines":
        asked = plan["evaluation"]
        wanted = {"tasks": asked["tasks"], "num_queries": asked["num_queries"]}
        run_piece(
            results / "baselines.json", asked, runs, lambda: {"before": evaluate({}, **wanted)}
        )
        return
    place, kind, name = job.split(" ", 2)
    size, seed = place.rsplit("-", 1)
    unit = Unit(plan, size, int(seed), results, runs)
    if kind == "parent":
        unit.parent()
    elif kind == "train":
        unit.train(name)
    else:
        unit.score(name)


def main() -> None:
    """Run the plan, several jobs at a time, and stop them all when one fails or this is stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--plan", type=Path, default=HERE / "plan.yaml")
    option("--results", type=Path, default=HERE / "results", help="JSON, committed")
    option("--runs", type=Path, default=ROOT / "runs" / "objective", help="weights")
    option("--scale", type=float, default=1.0, help="fraction of its tokens, steps and queries")
    option("--size", action="append", default=[], help="only this size; may be repeated")
    option("--seed", action="append", default=[], type=int, help="only this seed; repeatable")
    option("--no-ablations", action="store_true")
    option("--jobs", type=int, default=1, help="pieces in parallel, which share the cores")
    option("--piece", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs} must be at least 1")
    try:
        plan = read_plan(arguments.plan, arguments.scale, arguments.size, arguments.seed)
        if arguments.piece:
            walk(plan, arguments.piece, arguments.results, arguments.runs)
        else:
            launch(plan, arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def launch(plan: Plan, arguments: argparse.Namespace) -> None:
    """Run all pieces, up to `--jobs` at a time, each after those that it needs."""
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    waiting = pieces(plan, not arguments.no_ablations, arguments.results, arguments.runs)
    running: dict[str, subprocess.Popen] = {}
    done: set[str] = set()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or running:
            for job in [job for job, before in waiting.items() if done.issuperset(before)]:
                if len(running) < arguments.jobs:
                    del waiting[job]
                    command = [sys.executable, *sys.argv, "--piece", job]
                    running[job] = subprocess.Popen(command, env=environment)
            time.sleep(0.2)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                if code := running.pop(job).returncode:
                    raise SystemExit(code)
                done.add(job)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
