"""Write the experiment's tables and plots from its JSON files alone.

python experiments/objective/report.py           # into docs/results.md and docs/objective-*.svg
python experiments/objective/report.py --check   # fails if a byte differs from what the files say
"""

import argparse
import io
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from scipy.stats import t as student

from qwen3_encdec.folders import InputError, read_json, read_yaml

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
BEGIN, END = "<!-- experiments/objective/report.py writes from here -->", "<!-- to here -->"
NOT_RUN = "not run"
RETRIEVAL = {"MRR": "mrr", "nDCG@10": "ndcg@10"}
CONTESTS = [
    ("ul2", "causal"),
    ("ul2", "unmasked"),
    ("ul2", "mntp"),
    ("ul2+mntp", "mntp"),
    ("ul2+mntp", "ul2"),
]
COLORS = ("#4078c0", "#d9822b", "#2f9e79", "#b5539c", "#8f7a3a")
STYLE: Any = {
    "svg.fonttype": "path", "svg.hashsalt": "objective", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip

DENOISERS = ("R1", "R2", "X1", "X2", "S")
PARENTS = ("Causal parent (mean)", "Causal parent (last)", "Parent without mask (mean)")

Record = dict[str, Any]
Score = Callable[[Record], float | None]


def main() -> None:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--plan", type=Path, default=HERE / "plan.yaml")
    option("--results", type=Path, default=HERE / "results")
    option("--docs", type=Path, default=DOCS, help="folder of results.md and the plots")
    option("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    arguments = parser.parse_args()
    page = arguments.docs / "results.md"
    try:
        plan, found = read_yaml(arguments.plan, "plan"), read(arguments.results)
        files = {arguments.docs / name: content for name, content in plots(plan, found).items()}
        files[page] = between(page, BEGIN, END, tables(plan, found))
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    stale = rewrite(files, arguments.check)
    if arguments.check and stale:
        print(f"out of date with the JSON files: {', '.join(stale)}", file=sys.stderr)
        raise SystemExit(1)
    print(f"{len(found)} pieces: {len(files) - len(stale)} of {len(files)} files are unchanged")


def between(page: Path, begin: str, end: str, content: str) -> str:
    """Return the text of a page with new content between its two marks."""
    if not page.is_file():
        raise InputError(f"{page} does not exist; --docs names the folder of results.md")
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"{page} must contain {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def rewrite(files: dict[Path, str], check: bool) -> list[str]:
    """Write the files whose content differs, or none with `check`; return their names."""
    stale = []
    for file, content in files.items():
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            stale.append(file.name)
            if not check:
                file.write_text(content, encoding="utf-8")
    return stale


def read(results: Path) -> dict[str, Record]:
    """Read the pieces, by their path without suffix."""
    if not results.is_dir():
        raise InputError(f"results folder {results} does not exist")
    files = sorted(results.rglob("*.json"))
    return {f.relative_to(results).with_suffix("").as_posix(): read_json(f) for f in files}


class Size:
    """The pieces of one size."""

    def __init__(self, plan: Record, found: dict[str, Record], name: str) -> None:
        self.plan, self.found, self.name = plan, found, name

    @property
    def begun(self) -> bool:
        """True if anything has been run."""
        return any(name.startswith(f"{self.name}-") for name in self.found)

    def pieces(self, piece: str) -> dict[int, Record]:
        """Return a piece's records by seed, for the seeds that have it."""
        names = {seed: f"{self.name}-{seed}/{slug(piece)}" for seed in self.plan["seeds"]}
        return {seed: self.found[name] for seed, name in names.items() if name in self.found}

    def seeds(self, piece: str, stage: str, score: Score) -> dict[int, float]:
        """Return a score by seed, for the seeds that have it."""
        values = {seed: score(found[stage]) for seed, found in self.pieces(piece).items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def difference(self, first: str, second: str, score: Score) -> list[float]:
        """Return the difference between two contestants' scores for each seed."""
        a, b = (self.seeds(f"score-{name}", "after", score) for name in (first, second))
        return [a[seed] - b[seed] for seed in a if seed in b]

    def over(self, piece: str, stage: str, score: Score) -> str:
        """Format mean and interval of a score over seeds as a cell."""
        cell = spread(list(self.seeds(piece, stage, score).values()))
        return cell if cell == NOT_RUN else cell.replace("+", "").replace("-", "−")

    def mean(self, piece: str, field: str, form: str) -> str:
        """Format the mean over seeds of a field that trainings record."""
        pieces = self.pieces(piece).values()
        values = [found[field] for found in pieces if field in found]
        if not values:
            return "–" if pieces else NOT_RUN
        return format(statistics.fmean(values), form)

    def tables(self) -> list[str]:
        """Return the answer in one sentence and the tables."""
        names, columns = self.plan["contestants"], scores(self.plan)
        rows = [[name, *(self.over(f"score-{name}", "after", score) for score in columns.values())]
                for name in names]  # fmt: skip
        parts = [f"**Answer.** {self.answer()}"]
        parts.append(table(["after the contrastive stage", *columns], rows))
        rows = [[f"{a} - {b}", *(spread(self.difference(a, b, score)) for score in columns.values())]
                for a, b in CONTESTS]  # fmt: skip
        parts.append(table(["difference, paired by seed", *columns], rows))
        rows = [[name, *(self.over(f"score-{name}", "before", score) for score in columns.values())]
                for name in names]  # fmt: skip
        for embedder in PARENTS:
            own = scores(self.plan, embedder).values()
            rows.append([embedder, *(self.over("score-parent", "before", s) for s in own)])
        parts.append(table(["before it", *columns], rows))
        header = ["training", "text tokens", "steps", "FLOPs", "last loss", "processor s"]
        parts.append(table(header, self.trainings()))
        parts.append(table(["held-out nats a token", *DENOISERS], self.denoising()))
        return parts

    def trainings(self) -> list[list[str]]:
        """Tabulate what each training read and cost."""
        rows = []
        for name in ("parent", *trained(self.plan)):
            piece, tokens = f"train-{name}", "text tokens"
            if name == "parent":
                piece, tokens = "parent", "tokens"
            fields = {tokens: ",.0f", "steps": ",.0f", "flops": ".2e", "loss": ".3f"}
            fields["cpu seconds"] = ",.0f"
            rows.append([name, *(self.mean(piece, *field) for field in fields.items())])
        return rows

    def denoising(self) -> list[list[str]]:
        """Tabulate losses by denoiser of the encoder-decoders, before and after their training."""
        rows = []
        for name, label in (("ul2", "initialization"), ("ul2", "trained"), ("ul2+mntp", "trained")):
            pieces = self.pieces(f"train-{name}").values()
            cells = [NOT_RUN] * len(DENOISERS)
            if pieces:
                losses = [piece["denoising"][label] for piece in pieces]
                means = [statistics.fmean(loss[d] for loss in losses) for d in DENOISERS]
                cells = [f"{mean:.3f}" for mean in means]
            rows.append([label if label == "initialization" else name, *cells])
        return rows

    def answer(self) -> str:
        """Summarize each contest by package-docs nDCG@10, in one sentence."""
        score = scores(self.plan)["package-docs nDCG@10"]
        sentences = []
        for first, second in CONTESTS[:3]:
            values = self.difference(first, second, score)
            half = interval(values)
            if not values:
                verdict = NOT_RUN
            elif half is None:
                verdict = f"{spread(values)}, no interval"
            else:
                middle = statistics.fmean(values)
                told = (
                    "better" if middle > half else "worse" if middle < -half else "not told apart"
                )
                verdict = f"{told} ({spread(values)}, {len(values)} seeds)"
            sentences.append(f"{first} against {second}: {verdict}")
        return "package-docs nDCG@10 after the contrastive stage: " + "; ".join(sentences) + "."


def tables(plan: Record, found: dict[str, Record]) -> str:
    """Return everything between the marks."""
    columns = scores(plan)
    parts = []
    for name, widths in plan["sizes"].items():
        shape = f"{widths['hidden_size']} wide, {widths['num_hidden_layers']} layers"
        size = Size(plan, found, name)
        parts.append(f"### {name.capitalize()}: {shape}")
        parts += size.tables() if size.begun else ["Not run."]
    parts.append("### Baselines")
    rows = [[name, *(one(found, "baselines", "before", s) for s in scores(plan, name).values())]
            for name in ("TF-IDF", "MiniLM-L6")]  # fmt: skip
    parts.append(table(["without our training", *columns], rows))
    parts.append("### Ablations, one seed")
    unit = "{size}-{seed}".format(**plan["ablate"])
    header = ["after the contrastive stage", *columns, "held-out nats, mean"]
    rows = [[name, *(one(found, f"{unit}/score-{slug(name)}", "after", s) for s in columns.values()),
             held_out(found, f"{unit}/train-{slug(name)}")] for name in ("ul2", *plan["ablations"])]  # fmt: skip
    parts.append(table(header, rows))
    parts.append(provenance(found))
    return "\n\n".join(parts)


def slug(name: str) -> str:
    """Name a contestant's files as run.py does."""
    return name.replace(" ", "-")


def trained(plan: Record) -> list[str]:
    """List the contestants that have a training of their own."""
    reading = ("causal", "pooling")
    seen: dict[str, str] = {}
    for name, values in plan["contestants"].items():
        training = {key: value for key, value in values.items() if key not in reading}
        seen.setdefault(json.dumps(training, sort_keys=True), name)
    return list(seen.values())


def scores(plan: Record, embedder: str | None = None) -> dict[str, Score]:
    """Map each column to a function that finds its score in the suite's output, for an embedder or
    for the only one.
    """

    def pick(of: Record) -> Record:
        return of.get(embedder, {}) if embedder else next(iter(of.values()), {})

    def retrieval(key: str, found: Record) -> float | None:
        return pick(found.get("retrieval", {})).get(key)

    def main_score(task: str, found: Record) -> float | None:
        return pick(found["tasks"].get(task, {}).get("scores", {})).get("score")

    columns: dict[str, Score] = {
        f"package-docs {label}": partial(retrieval, key) for label, key in RETRIEVAL.items()
    }
    for task in plan["evaluation"]["tasks"]:
        columns[f"{task}{' R@1' if task == 'package-docs' else ''}"] = partial(main_score, task)
    return columns


def interval(values: Sequence[float]) -> float | None:
    """Return half the 95 % interval of a mean over seeds (Student's t), None for a single seed."""
    if len(values) < 2:
        return None
    quantile = float(student.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def spread(values: Sequence[float]) -> str:
    """Format mean and interval of differences as a cell."""
    if not values:
        return NOT_RUN
    half = interval(values)
    width = " (1 seed)" if half is None else f" ± {half:.3f}"
    return f"{statistics.fmean(values):+.3f}{width}"


def one(found: dict[str, Record], piece: str, stage: str, score: Score) -> str:
    """Format a score of a single piece as a cell."""
    value = score(found[piece][stage]) if piece in found else None
    return NOT_RUN if value is None else f"{value:.3f}"


def held_out(found: dict[str, Record], piece: str) -> str:
    """Format the mean held-out loss over the denoisers.

    A contestant without a training of its own has ul2's.
    """
    if piece not in found:
        return "as ul2" if piece.endswith("last-pooling") else NOT_RUN
    return f"{statistics.fmean(found[piece]['denoising']['trained'].values()):.3f}"


def provenance(found: dict[str, Record]) -> str:
    """Say which command, commit and machine the figures are from."""
    facts = [piece["provenance"] for piece in found.values()]
    if not facts:
        return f"Command, commit and hardware of these figures: {NOT_RUN}."
    hours = sum(fact["seconds"] for fact in facts) / 3600
    first = f"{len(facts)} pieces, {hours:.1f} hours one after another."
    return "\n".join([first, *origins(facts, "command", "commit", "hardware")])


def origins(facts: Sequence[Record], *fields: str) -> list[str]:
    """List the values of these fields of the provenance with the number of records of each."""
    lines = []
    for field in fields:
        counts = Counter(str(fact.get(field, "not recorded")) for fact in facts)
        shown = "; ".join(f"`{value}` ({n})" for value, n in counts.items())
        lines.append(f"{field.capitalize()}: {shown}.")
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plots(plan: Record, found: dict[str, Record]) -> dict[str, str]:
    """Plot scores by contestant with every seed as a point, and differences with their intervals.

    Returns SVG by file name.
    """
    columns = {name: score for name, score in scores(plan).items() if name != "package-docs R@1"}
    every = [Size(plan, found, name) for name in plan["sizes"]]
    sizes = [size for size in every if size.begun] or every
    drawn: dict[str, str] = {}
    with matplotlib.rc_context(STYLE):
        for kind, height in (("scores", 2.6), ("differences", 2.9)):
            figure = Figure(figsize=(10, height * len(sizes)), layout="constrained")
            grid = figure.subplots(len(sizes), len(columns), squeeze=False)
            for i, size in enumerate(sizes):
                for j, (label, score) in enumerate(columns.items()):
                    if kind == "scores":
                        names = list(plan["contestants"])
                        points = [size.seeds(f"score-{n}", "after", score).values() for n in names]
                    else:
                        names = [f"{a} -\n{b}" for a, b in CONTESTS]
                        points = [size.difference(*contest, score) for contest in CONTESTS]
                    axes = grid[i][j]
                    axes.set_title(label.replace("package-docs ", "package-docs\n"), fontsize=8)
                    draw(axes, [list(values) for values in points])
                    shown = names if j == 0 else [""] * len(names)
                    axes.set_yticks(range(len(names)), shown, fontsize=7)
                    axes.set_ylim(len(names) - 0.5, -0.5)
                    axes.tick_params(axis="x", labelsize=6)
                    if kind == "differences":
                        axes.axvline(0, color="#888888", linewidth=0.7)
                grid[i][0].set_ylabel(size.name)
            drawn[f"objective-{kind}.svg"] = svg(figure)
    return drawn


def draw(axes: Any, points: list[list[float]]) -> None:
    """Draw a line for each list of values: mean and interval, and below it every seed."""
    for k, values in enumerate(points):
        if values:
            color = COLORS[k % len(COLORS)]
            middle, half = statistics.fmean(values), interval(values) or 0
            axes.errorbar(middle, k, xerr=half, fmt="o", color=color, ms=4)
            axes.plot(values, [k + 0.25] * len(values), ".", color=color, alpha=0.5, ms=4)


def svg(figure: Figure) -> str:
    """Return the figure as text that does not depend on the time or on matplotlib's version string."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    main()
