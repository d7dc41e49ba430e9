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
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import yaml  # noqa: E402

from qwen3_encdec.folders import InputError, read_json, write_json  # noqa: E402

BLOCK = 256
FAMILY = 200  # maximum man pages with one name prefix: thousands of one tool are one text
MASKED = 0.2  # share of masked tokens, in MNTP alone and beside UL2


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

    def __init__(
        self, plan: dict[str, Any], size: str, seed: int, results: Path, runs: Path
    ) -> None:
        self.plan, self.seed, self.name = plan, seed, f"{size}-{seed}"
        self.sizes = plan["sizes"][size]
        self.results, self.runs = results / self.name, runs / self.name
        self.contestants = {
            name: Contestant(**values) for name, values in plan["contestants"].items()
        }
        ablations = {name: Contestant(**values) for name, values in plan["ablations"].items()}
        self.all = self.contestants | ablations

    @cached_property
    def texts(self) -> tuple[list[str], list[str]]:
        """Corpus in this seed's order, one half for the parent and one for its branches."""
        documents = corpus(**self.plan["corpus"])
        order = np.random.default_rng(self.seed).permutation(len(documents))
        half = len(documents) // 2
        return [documents[i] for i in order[:half]], [documents[i] for i in order[half:]]

    def parent(self) -> Path:
        """Train the causal parent and write branch.jsonl, the documents that every branch reads."""
        from qwen3_encdec.demo.parent import parent_tokenizer, train_causal_parent

        folder, sizes, branch = self.runs / "parent", self.plan["parent"], self.plan["branch"]
        with self._piece(
            "parent", self.runs / "branch.jsonl", parent=sizes, tokens=branch["tokens"]
        ) as record:
            if record is None:
                return folder
            tokenizer = parent_tokenizer(self.plan["corpus"]["num_ranks"])
            record |= train_causal_parent(
                folder, tokenizer=tokenizer, texts=self.texts[0], **self.sizes, seed=self.seed,
                steps=steps(sizes), batch_size=sizes["batch_size"], lr=sizes["lr"], block_size=BLOCK,
            )  # fmt: skip
            taken, count = [], 0
            for text in self.texts[1]:
                taken.append(text)
                count += len(tokenizer.encode(text, split_special_tokens=True)) + 1
                if count >= branch["tokens"] + BLOCK:
                    break
            lines = "".join(json.dumps({"text": text}) + "\n" for text in taken)
            (self.runs / "branch.jsonl").write_text(lines, encoding="utf-8")
            texts = sorted(
                self.texts[0] + self.texts[1]
            )  # an equal number may not be equal texts: man pages depend on the machine
            digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
            record["corpus"] = {
                "documents": len(texts),
                "branch documents": len(taken),
                "sha256": digest,
            }
        return folder

    def training(self, name: str) -> str:
        """Return the first contestant with the same training; mask and pooling may differ."""
        return next(
            other
            for other, contestant in self.all.items()
            if contestant.trained == self.all[name].trained
        )

    def train(self, name: str) -> Path:
        """Train a contestant's branch: a causal Qwen3, an encoder (MNTP) or a run (UL2)."""
        name = self.training(name)
        contestant = self.all[name].trained
        parent, folder = self.parent(), self.runs / f"train-{name.replace(' ', '-')}"
        keys = ("branch", "ul2", "parent") if contestant.branch == "ul2" else ("branch", "parent")
        settings = {key: self.plan[key] for key in keys}
        with self._piece(
            f"train {name}", folder / "done", contestant=asdict(contestant), **settings
        ) as record:
            if record is not None:
                kinds = {"causal": self._causal, "mntp": self._mntp, "ul2": self._ul2}
                began = time.monotonic()
                record |= kinds[contestant.branch](contestant, parent, folder)
                record["training seconds"] = round(time.monotonic() - began, 1)
                (folder / "done").touch()
        return folder / "checkpoint" if contestant.branch == "ul2" else folder

    def score(self, name: str) -> None:
        """Score a contestant's encoder with the suite, before and after the contrastive stage.

        "parent" is the unchanged parent: with mean and last-token pooling, and without its mask.
        """
        from qwen3_encdec.data.package_docs import summary_pairs
        from qwen3_encdec.embedding.finetune import finetune

        with self._piece(f"score {name}", **self._score_settings(name)) as record:
            if record is None:
                return
            if name == "parent":
                record["before"] = self._evaluate({}, parent=self.parent())
                return
            encoder = self.runs / "encoders" / name.replace(" ", "-")
            self._encoder(name, encoder)
            record["before"] = self._evaluate({name: encoder})
            tuned = encoder.with_name(f"{encoder.name}-contrastive")
            settings = {**self.plan["contrastive"], "seed": self.seed}
            began = time.monotonic()
            record["contrastive"] = finetune(encoder, tuned, summary_pairs("train"), **settings)
            record["contrastive"]["seconds"] = round(time.monotonic() - began, 1)
            record["after"] = self._evaluate({name: tuned})

    def scored(self, name: str) -> bool:
        """Return whether `score` has nothing to do."""
        return is_done(*self._place(f"score {name}", self._score_settings(name)))

    def _score_settings(self, name: str) -> dict[str, Any]:
        if name == "parent":
            return {key: self.plan[key] for key in ("parent", "evaluation")}
        keys = ("parent", "branch", "ul2", "contrastive", "evaluation")
        return {key: self.plan[key] for key in keys} | {"contestant": asdict(self.all[name])}

    def _evaluate(self, encoders: dict[str, Path], **options: Any) -> dict[str, Any]:
        from experiments.objective.benchmarks import evaluate

        asked = self.plan["evaluation"]
        return evaluate(
            encoders,
            tasks=asked["tasks"],
            num_queries=asked["num_queries"],
            outside=False,
            **options,
        )

    def _encoder(self, name: str, folder: Path) -> None:
        """Write a contestant's trained model as a sentence-transformers folder."""
        from qwen3_encdec.conversion.extract import extract_encoder
        from qwen3_encdec.conversion.initialize import initialize
        from qwen3_encdec.demo.parent import causal_embedder
        from qwen3_encdec.folders import copy_without_weights, new_folder

        contestant, trained = self.all[name], self.train(name)
        if contestant.causal:
            causal_embedder(trained, folder)
        elif contestant.branch == "mntp":
            with new_folder(folder, "encoder", source=str(trained)) as building:
                copy_without_weights(trained, building)
                (building / "model.safetensors").write_bytes(
                    (trained / "model.safetensors").read_bytes()
                )
        else:
            if contestant.branch == "causal":
                initialize(trained, self.runs / "unmasked-init", seed=self.seed)
                trained = self.runs / "unmasked-init"
            extract_encoder(trained, folder, pooling=contestant.pooling)

    def _blocks(self, tokenizer: Any) -> np.ndarray:
        from qwen3_encdec.demo.parent import token_blocks

        lines = (self.runs / "branch.jsonl").read_text(encoding="utf-8").splitlines()
        sizes = self.plan["branch"]
        return token_blocks(
            [json.loads(line)["text"] for line in lines],
            tokenizer,
            steps(sizes) * sizes["batch_size"],
            BLOCK,
            self.seed,
        )

    def _causal(self, contestant: Contestant, parent: Path, folder: Path) -> dict[str, Any]:
        from transformers import AutoTokenizer, Qwen3ForCausalLM

        from qwen3_encdec.demo.parent import fit
        from qwen3_encdec.folders import new_folder

        model, tokenizer = (
            Qwen3ForCausalLM.from_pretrained(parent),
            AutoTokenizer.from_pretrained(parent),
        )
        blocks, sizes = self._blocks(tokenizer), self.plan["branch"]
        options = {"steps": steps(sizes), "batch_size": sizes["batch_size"], "lr": sizes["lr"]}
        losses = fit(model, blocks, blocks, **options)
        with new_folder(folder, "causal branch", source=str(parent)) as building:
            model.save_pretrained(building)
            tokenizer.save_pretrained(building)
        return self._read(model.model, blocks, losses, asked=1.0, seen=0.5)

    def _mntp(self, contestant: Contestant, parent: Path, folder: Path) -> dict[str, Any]:
        from safetensors.torch import save_file
        from transformers import AutoTokenizer, Qwen3ForCausalLM

        from qwen3_encdec.conversion.extract import extract_encoder
        from qwen3_encdec.conversion.initialize import initialize
        from qwen3_encdec.data.collate import mask_token_id
        from qwen3_encdec.demo.parent import fit
        from qwen3_encdec.folders import copy_without_weights, new_folder

        initialize(parent, self.runs / "mntp-init", seed=self.seed)
        extract_encoder(self.runs / "mntp-init", self.runs / "mntp-start")
        model = Qwen3ForCausalLM.from_pretrained(self.runs / "mntp-start")
        mask_id = mask_token_id(AutoTokenizer.from_pretrained(self.runs / "mntp-start"))
        blocks, sizes = self._blocks(AutoTokenizer.from_pretrained(parent)), self.plan["branch"]
        masked = np.random.default_rng(self.seed).random(blocks.shape) < MASKED
        inputs, labels = np.where(masked, mask_id, blocks), np.where(masked, blocks, -100)
        options = {"steps": steps(sizes), "batch_size": sizes["batch_size"], "lr": sizes["lr"]}
        losses = fit(model, inputs, labels, **options)
        body = model.model
        with new_folder(folder, "encoder", source=str(self.runs / "mntp-start")) as building:
            copy_without_weights(self.runs / "mntp-start", building)
            save_file({k: v.contiguous() for k, v in body.state_dict().items()}, building / "model.safetensors",
                      metadata={"format": "pt"})  # fmt: skip
        return self._read(body, blocks, losses, asked=MASKED, seen=1.0)

    def _read(
        self, body: Any, blocks: np.ndarray, losses: list[float], asked: float, seen: float
    ) -> dict[str, Any]:
        """Return what a training on blocks read and cost.

        A share `asked` of the tokens is predicted, each from a share `seen` of a block.
        """
        rows = len(losses) * self.plan["branch"]["batch_size"]
        text = int((np.resize(blocks, (rows, BLOCK)) < self.plan["corpus"]["num_ranks"]).sum())
        head = body.embed_tokens.weight.numel()
        layers = body.num_parameters() - head
        c = body.config
        attention = 12 * c.num_attention_heads * c.head_dim * c.num_hidden_layers * BLOCK * seen
        tail = max(1, len(losses) // 10)
        flops = rows * BLOCK * (6 * (layers + asked * head) + attention)
        return {
            "text tokens": text,
            "steps": len(losses),
            "flops": flops,
            "loss": float(np.mean(losses[-tail:])),
        }

    def _ul2(self, contestant: Contestant, parent: Path, folder: Path) -> dict[str, Any]:
        from qwen3_encdec.conversion.initialize import initialize
        from qwen3_encdec.data import stream
        from qwen3_encdec.data.config import DataConfig
        from qwen3_encdec.data.ul2 import PRESETS
        from qwen3_encdec.evaluation.suite import evaluate_denoising
        from qwen3_encdec.folders import load_config, load_tokenizer
        from qwen3_encdec.training.config import TrainingConfig
        from qwen3_encdec.training.loop import train_to_the_end
        from qwen3_encdec.training.plan import count_parameters, flops_per_sum, length_sums

        sizes, ul2, init = self.plan["branch"], self.plan["ul2"], folder / "init"
        layers = round(contestant.decoder_share * self.sizes["num_hidden_layers"])
        initialize(parent, init, num_decoder_layers=layers, seed=self.seed)
        if contestant.random_sentinels:
            redraw_sentinels(init, self.seed)
        preset = [asdict(denoiser) for denoiser in PRESETS["t5gemma2"]]
        preset = [d | ({"weight": contestant.s_weight} if d["name"] == "S" else {}) for d in preset]
        lengths = {"source_length": ul2["source_length"], "target_length": ul2["target_length"]}
        data = DataConfig(
            inputs=[str(self.runs / "branch.jsonl")],
            heldout_every=10**9,
            preset=preset,
            seed=self.seed,
            **lengths,
        )
        tokenizer, rows, text = load_tokenizer(init), 0, 0
        blocks = self._blocks(tokenizer)
        wanted = int((blocks < self.plan["corpus"]["num_ranks"]).sum())
        for row in stream.rows(stream.UL2Data(data, tokenizer)):
            text += sum(
                int((ids < self.plan["corpus"]["num_ranks"]).sum())
                for e in row.examples
                for ids in (e.source, e.target)
            )
            rows += 1
            if text >= wanted and rows % ul2["batch_size"] == 0:
                break
        number = rows // ul2["batch_size"]
        config = TrainingConfig(
            model=str(init), output_dir=str(folder / "run"), data=data, max_steps=number, batch_size=ul2["batch_size"],
            lr=sizes["lr"], schedule="cosine", warmup_steps=number // 20, mntp_weight=contestant.mntp_weight,
            mntp_probability=MASKED, mixed_precision="no", spike_sigma=0.0, eval_every=0, save_every=500, keep_last=1,
            trackers=[], seed=self.seed,
        )  # fmt: skip
        checkpoint = train_to_the_end(config)
        if (folder / "checkpoint").is_symlink():
            (folder / "checkpoint").unlink()
        (folder / "checkpoint").symlink_to(checkpoint.resolve())
        last = json.loads(
            (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        )
        read, examples, model_config = (
            [last["source_tokens"], last["target_tokens"]],
            last["examples"],
            load_config(init),
        )
        counts = count_parameters(model_config)
        means = [np.array([tokens / examples]) for tokens in read]
        flops = float(examples * flops_per_sum(model_config, counts) @ length_sums(*means))
        masked = MASKED * read[0] if contestant.mntp_weight else 0
        examined, heldout = self.plan["evaluation"]["num_examples"], DataConfig(**lengths)
        found = evaluate_denoising(
            {"initialization": init, "trained": checkpoint}, num_examples=examined, data=heldout
        )
        return {
            "text tokens": text, "steps": config.max_steps, "flops": flops + 6 * masked * counts.embedding,
            "source tokens": read[0], "target tokens": read[1], "loss": last["loss"],
            "denoising": found["denoising"], "exact gaps": found["infill"]["by_denoiser"],
        }  # fmt: skip

    @contextmanager
    def _piece(
        self, name: str, needed: Path | None = None, **settings: Any
    ) -> Iterator[dict[str, Any] | None]:
        """Yield a record to fill, written when the block ends.

        Yields None if the record and `needed` already exist.
        """
        file, settings = self._place(name, settings)
        with piece(file, needed, self.runs, settings) as record:
            yield record

    def _place(self, name: str, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Return a piece's file and all of its settings."""
        shared = {"size": self.sizes, "seed": self.seed, "corpus": self.plan["corpus"]}
        return self.results / f"{name.replace(' ', '-')}.json", shared | settings


def is_done(file: Path, settings: dict[str, Any]) -> bool:
    """Return whether a piece's file exists with these settings."""
    return file.exists() and read_json(file)["settings"] == settings


@contextmanager
def piece(
    file: Path, needed: Path | None, runs: Path, settings: dict[str, Any]
) -> Iterator[dict[str, Any] | None]:
    """Yield a record to fill; see `Unit._piece`."""
    from qwen3_encdec.evaluation.suite import provenance

    if is_done(file, settings) and (needed is None or needed.exists()):
        yield None
        return
    started, cpu = time.monotonic(), time.process_time()
    record: dict[str, Any] = {}
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f"{file.stem}.log").open("w", encoding="utf-8") as out, redirect_stdout(out):
        yield record
    facts = provenance(started=started)
    facts["command"] = re.sub(r" --piece ('[^']*'|\S+)", "", facts["command"])
    record = {
        "settings": settings,
        **record,
        "cpu seconds": round(time.process_time() - cpu, 1),
        "provenance": facts,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)
    print(f"{runs.name:9} {file.stem:32} {facts['seconds']:8.1f} s", flush=True)


def steps(sizes: dict[str, Any]) -> int:
    """Return the number of optimizer steps that read the given tokens."""
    return max(1, sizes["tokens"] // (BLOCK * sizes["batch_size"]))


def corpus(num_ranks: int, man_pages: int, man_characters: int) -> list[str]:
    """Return docstrings of the training packages and, if installed, evenly sampled man pages."""
    from qwen3_encdec.data.package_docs import package_docs

    documents = [document.text for document in package_docs("train")]
    families: dict[str, list[Path]] = {}
    for file in sorted(Path("/usr/share/man").glob("man[1-8]/*.gz")):
        families.setdefault(re.split(r"[-_.:]", file.name)[0], []).append(file)
    files = [file for family in families.values() for file in family[:FAMILY]]
    for file in files[:: max(1, len(files) // man_pages)][:man_pages] if man_pages else []:
        try:
            text = plain(gzip.decompress(file.read_bytes()).decode("utf-8", errors="ignore"))[
                :man_characters
            ]
        except OSError:
            continue
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
    """Redraw the sentinel rows, for the ablation of their initialization.

    Rows are drawn like those of a fresh model instead of being the mean of the rows.
    """
    import torch

    from qwen3_encdec.folders import load_model

    model = load_model(folder)
    rows = model.model.shared.weight.data[-model.config.num_sentinel_tokens :]
    rows.normal_(0.0, model.config.initializer_range, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)


def read_plan(file: Path, scale: float, sizes: list[str], seeds: list[int]) -> dict[str, Any]:
    """Read the plan with `scale` times the tokens, contrastive steps and queries, for the named
    sizes and seeds or all.
    """
    plan = yaml.safe_load(file.read_text(encoding="utf-8"))
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


def pieces(plan: dict[str, Any], ablate: bool, results: Path, runs: Path) -> dict[str, list[str]]:
    """List missing pieces and those whose weights they need, each with the pieces that must run
    before it.

    A piece is "baselines" or "SIZE-SEED KIND CONTESTANT".
    """
    ablated = "{size}-{seed}".format(**plan["ablate"])
    found: dict[str, list[str]] = {}
    for size, seed in itertools.product(plan["sizes"], plan["seeds"]):
        unit = Unit(plan, size, seed, results, runs)
        names = unit.all if ablate and unit.name == ablated else unit.contestants
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


def walk(plan: dict[str, Any], job: str, results: Path, runs: Path) -> None:
    """Run one of the `pieces`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if job == "baselines":
        from experiments.objective.benchmarks import evaluate

        asked = plan["evaluation"]
        with piece(results / "baselines.json", None, runs, asked) as record:
            if record is not None:
                record["before"] = evaluate(
                    {}, tasks=asked["tasks"], num_queries=asked["num_queries"]
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
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="JSON, committed")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "objective", help="weights, not committed"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="fraction of its tokens, steps and queries"
    )
    parser.add_argument(
        "--size", action="append", default=[], help="only this size; may be repeated"
    )
    parser.add_argument(
        "--seed", action="append", default=[], type=int, help="only this seed; may be repeated"
    )
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if available")
    parser.add_argument(
        "--jobs", type=int, default=1, help="pieces in parallel, which share the cores"
    )
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        plan = read_plan(arguments.plan, arguments.scale, arguments.size, arguments.seed)
        if arguments.piece:
            walk(plan, arguments.piece, arguments.results, arguments.runs)
            return
        launch(plan, arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def launch(plan: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Run all pieces, up to `--jobs` at a time, each after those that it needs."""
    environment = dict(os.environ)
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("device cuda is not available; use --device cpu")
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
    waiting = pieces(plan, not arguments.no_ablations, arguments.results, arguments.runs)
    running: dict[str, subprocess.Popen] = {}
    done: set[str] = set()

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            for job in [job for job, before in waiting.items() if done.issuperset(before)]:
                if len(running) < arguments.jobs:
                    del waiting[job]
                    running[job] = subprocess.Popen(
                        [sys.executable, *sys.argv, "--piece", job], env=environment
                    )
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
