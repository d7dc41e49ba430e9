"""Write the experiment's tables and plots from its JSON files alone.

python experiments/objective/report.py           # into docs/results.md and docs/objective-*.svg
python experiments/objective/report.py --check   # fails if a byte differs from what the files say
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure
from scipy.stats import t as student

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

Score = Callable[[dict[str, Any]], float | None]


def main() -> None:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="folder of results.md and the plots"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a file would change"
    )
    arguments = parser.parse_args()
    page = arguments.docs / "results.md"
    plan = yaml.safe_load(arguments.plan.read_text(encoding="utf-8"))
    found = read(arguments.results)
    files = {arguments.docs / name: content for name, content in plots(plan, found).items()}
    files[page] = between(page, BEGIN, END, tables(plan, found))
    stale = rewrite(files, arguments.check)
    if arguments.check and stale:
        print(f"out of date with the JSON files: {', '.join(stale)}", file=sys.stderr)
        raise SystemExit(1)
    print(f"{len(found)} pieces: {len(files) - len(stale)} of {len(files)} files are unchanged")


def between(page: Path, begin: str, end: str, content: str) -> str:
    """Return the text of a page with new content between its two marks."""
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        print(f"{page} must contain {begin} and {end} once each", file=sys.stderr)
        raise SystemExit(2)
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


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Read the pieces, by their path without suffix."""
    files = sorted(results.rglob("*.json"))
    return {
        f.relative_to(results).with_suffix("").as_posix(): json.loads(f.read_text(encoding="utf-8"))
        for f in files
    }


def tables(plan: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """Return everything between the marks."""
    columns = scores(plan)
    parts = []
    for size, widths in plan["sizes"].items():
        shape = f"{widths['hidden_size']} wide, {widths['num_hidden_layers']} layers"
        parts.append(f"### {size.capitalize()}: {shape}")
        if not begun(found, size):
            parts.append("Not run.")
            continue
        parts.append(f"**Answer.** {answer(plan, found, size)}")
        header = ["after the contrastive stage", *columns]
        rows = [[name, *(over(plan, found, size, f"score-{name}", "after", score) for score in columns.values())]
                for name in plan["contestants"]]  # fmt: skip
        parts.append(table(header, rows))
        rows = [[f"{a} - {b}", *(spread(difference(plan, found, size, a, b, score)) for score in columns.values())]
                for a, b in CONTESTS]  # fmt: skip
        parts.append(table(["difference, paired by seed", *columns], rows))
        rows = [[name, *(over(plan, found, size, f"score-{name}", "before", score) for score in columns.values())]
                for name in plan["contestants"]]  # fmt: skip
        for embedder in (
            "Causal parent (mean)",
            "Causal parent (last)",
            "Parent without mask (mean)",
        ):
            own = scores(plan, embedder)
            rows.append(
                [
                    embedder,
                    *(over(plan, found, size, "score-parent", "before", s) for s in own.values()),
                ]
            )
        parts.append(table(["before it", *columns], rows))
        rows = []
        for name in ("parent", *trained(plan)):
            key = "parent" if name == "parent" else f"train-{name}"
            tokens = "tokens" if name == "parent" else "text tokens"
            cells = [
                (tokens, ",.0f"),
                ("steps", ",.0f"),
                ("flops", ".2e"),
                ("loss", ".3f"),
                ("cpu seconds", ",.0f"),
            ]
            rows.append(
                [name, *(mean(plan, found, size, key, field, form) for field, form in cells)]
            )
        parts.append(
            table(["training", "text tokens", "steps", "FLOPs", "last loss", "processor s"], rows)
        )
        parts.append(table(["held-out nats a token", *DENOISERS], denoising(plan, found, size)))
    parts.append("### Baselines")
    names = ("TF-IDF", "WordLlama", "MiniLM-L6")
    rows = [
        [name, *(one(found, "baselines", "before", s) for s in scores(plan, name).values())]
        for name in names
    ]
    parts.append(table(["without our training", *columns], rows))
    parts.append("### Ablations, one seed")
    unit = "{size}-{seed}".format(**plan["ablate"])
    header = ["after the contrastive stage", *columns, "held-out nats, mean"]
    rows = [[name, *(one(found, f"{unit}/score-{slug(name)}", "after", s) for s in columns.values()),
             held_out(found, f"{unit}/train-{slug(name)}")] for name in ("ul2", *plan["ablations"])]  # fmt: skip
    parts.append(table(header, rows))
    parts.append(provenance(found))
    return "\n\n".join(parts)


def begun(found: dict[str, dict[str, Any]], size: str) -> bool:
    """Return whether anything of a size has been run."""
    return any(name.startswith(f"{size}-") for name in found)


DENOISERS = ("R1", "R2", "X1", "X2", "S")


def slug(name: str) -> str:
    """Name a contestant's files as run.py does."""
    return name.replace(" ", "-")


def trained(plan: dict[str, Any]) -> list[str]:
    """List the contestants that have a training of their own."""
    reading = ("causal", "pooling")
    seen: dict[str, str] = {}
    for name, values in plan["contestants"].items():
        seen.setdefault(
            json.dumps({k: v for k, v in values.items() if k not in reading}, sort_keys=True), name
        )
    return list(seen.values())


def scores(plan: dict[str, Any], embedder: str | None = None) -> dict[str, Score]:
    """Map each column to a function that finds its score in the suite's output, for an embedder or
    for the only one.
    """

    def pick(of: dict[str, Any]) -> dict[str, Any]:
        return of.get(embedder, {}) if embedder else next(iter(of.values()), {})

    def retrieval(key: str, found: dict[str, Any]) -> float | None:
        return pick(found.get("retrieval", {})).get(key)

    def main_score(task: str, found: dict[str, Any]) -> float | None:
        return pick(found["tasks"].get(task, {}).get("scores", {})).get("score")

    columns: dict[str, Score] = {
        f"package-docs {label}": partial(retrieval, key) for label, key in RETRIEVAL.items()
    }
    for task in plan["evaluation"]["tasks"]:
        columns[f"{task}{' R@1' if task == 'package-docs' else ''}"] = partial(main_score, task)
    return columns


def seeds(
    plan: dict[str, Any],
    found: dict[str, dict[str, Any]],
    size: str,
    piece: str,
    stage: str,
    score: Score,
) -> dict[int, float]:
    """Return a score by seed, for the seeds that have it."""
    pieces = {seed: found.get(f"{size}-{seed}/{slug(piece)}") for seed in plan["seeds"]}
    values = {seed: score(piece[stage]) for seed, piece in pieces.items() if piece}
    return {seed: value for seed, value in values.items() if value is not None}


def difference(
    plan: dict[str, Any],
    found: dict[str, dict[str, Any]],
    size: str,
    first: str,
    second: str,
    score: Score,
) -> list[float]:
    """Return the difference between two contestants' scores for each seed."""
    a, b = (seeds(plan, found, size, f"score-{name}", "after", score) for name in (first, second))
    return [a[seed] - b[seed] for seed in a if seed in b]


def interval(values: Sequence[float]) -> float | None:
    """Return half the 95 % interval of a mean over seeds (Student's t), None for a single seed."""
    if len(values) < 2:
        return None
    return (
        float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    )


def spread(values: Sequence[float]) -> str:
    """Format mean and interval of differences as a cell."""
    if not values:
        return NOT_RUN
    half = interval(values)
    return f"{statistics.fmean(values):+.3f}" + (
        f" ± {half:.3f}" if half is not None else " (1 seed)"
    )


def over(
    plan: dict[str, Any],
    found: dict[str, dict[str, Any]],
    size: str,
    piece: str,
    stage: str,
    score: Score,
) -> str:
    """Format mean and interval of a score over seeds as a cell."""
    values = seeds(plan, found, size, piece, stage, score)
    return spread(list(values.values())).replace("+", "").replace("-", "−") if values else NOT_RUN


def one(found: dict[str, dict[str, Any]], piece: str, stage: str, score: Score) -> str:
    """Format a score of a single piece as a cell."""
    value = score(found[piece][stage]) if piece in found else None
    return NOT_RUN if value is None else f"{value:.3f}"


def mean(
    plan: dict[str, Any],
    found: dict[str, dict[str, Any]],
    size: str,
    piece: str,
    field: str,
    form: str,
) -> str:
    """Format the mean over seeds of a field that trainings record."""
    pieces = [found.get(f"{size}-{seed}/{slug(piece)}", {}) for seed in plan["seeds"]]
    values = [piece[field] for piece in pieces if field in piece]
    if not values:
        return "–" if any(pieces) else NOT_RUN
    return format(statistics.fmean(values), form)


def denoising(plan: dict[str, Any], found: dict[str, dict[str, Any]], size: str) -> list[list[str]]:
    """Tabulate losses by denoiser of the encoder-decoders, before and after their training."""
    rows = []
    for name, label in (("ul2", "initialization"), ("ul2", "trained"), ("ul2+mntp", "trained")):
        pieces = [found.get(f"{size}-{seed}/train-{name}") for seed in plan["seeds"]]
        losses = [piece["denoising"][label] for piece in pieces if piece]
        cells = [
            f"{statistics.fmean(loss[d] for loss in losses):.3f}" if losses else NOT_RUN
            for d in DENOISERS
        ]
        rows.append([label if label == "initialization" else name, *cells])
    return rows


def held_out(found: dict[str, dict[str, Any]], piece: str) -> str:
    """Format the mean held-out loss over the denoisers.

    A contestant without a training of its own has ul2's.
    """
    if piece not in found:
        return "as ul2" if piece.endswith("last-pooling") else NOT_RUN
    return f"{statistics.fmean(found[piece]['denoising']['trained'].values()):.3f}"


def answer(plan: dict[str, Any], found: dict[str, dict[str, Any]], size: str) -> str:
    """Summarize each contest by package-docs nDCG@10, in one sentence."""
    score = scores(plan)["package-docs nDCG@10"]
    sentences = []
    for first, second in CONTESTS[:3]:
        values = difference(plan, found, size, first, second, score)
        half = interval(values)
        if not values:
            verdict = NOT_RUN
        elif half is None:
            verdict = f"{spread(values)}, no interval"
        else:
            middle = statistics.fmean(values)
            told = "better" if middle > half else "worse" if middle < -half else "not told apart"
            verdict = f"{told} ({spread(values)}, {len(values)} seeds)"
        sentences.append(f"{first} against {second}: {verdict}")
    return "package-docs nDCG@10 after the contrastive stage: " + "; ".join(sentences) + "."


def provenance(found: dict[str, dict[str, Any]]) -> str:
    """Say which commit, machine and command the figures are from."""
    facts = [piece["provenance"] for piece in found.values()]
    if not facts:
        return f"Command, commit and hardware of these figures: {NOT_RUN}."
    lines = [
        f"{len(facts)} pieces, {sum(fact['seconds'] for fact in facts) / 3600:.1f} hours one after another."
    ]
    for field in ("command", "commit", "hardware"):
        counts: dict[str, int] = {}
        for fact in facts:
            counts[str(fact.get(field, "not recorded"))] = (
                counts.get(str(fact.get(field, "not recorded")), 0) + 1
            )
        lines.append(
            f"{field.capitalize()}: "
            + "; ".join(f"`{value}` ({n})" for value, n in counts.items())
            + "."
        )
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plots(plan: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Plot scores by contestant with every seed as a point, and differences with their intervals.

    Returns SVG by file name.
    """
    columns = {name: score for name, score in scores(plan).items() if name != "package-docs R@1"}
    sizes = [size for size in plan["sizes"] if begun(found, size)] or list(plan["sizes"])
    scored: dict[str, str] = {}
    with matplotlib.rc_context(STYLE):
        for kind, height in (("scores", 2.6), ("differences", 2.9)):
            figure = Figure(figsize=(10, height * len(sizes)), layout="constrained")
            grid = figure.subplots(len(sizes), len(columns), squeeze=False)
            for i, size in enumerate(sizes):
                for j, (label, score) in enumerate(columns.items()):
                    axes = grid[i][j]
                    axes.set_title(label.replace("package-docs ", "package-docs\n"), fontsize=8)
                    names = (
                        list(plan["contestants"])
                        if kind == "scores"
                        else [f"{a} -\n{b}" for a, b in CONTESTS]
                    )
                    for k in range(len(names)):
                        if kind == "scores":
                            piece = f"score-{list(plan['contestants'])[k]}"
                            values = list(seeds(plan, found, size, piece, "after", score).values())
                        else:
                            values = difference(plan, found, size, *CONTESTS[k], score)
                        if values:
                            color = COLORS[k % len(COLORS)]
                            axes.errorbar(
                                statistics.fmean(values),
                                k,
                                xerr=interval(values) or 0,
                                fmt="o",
                                color=color,
                                ms=4,
                            )
                            axes.plot(
                                values, [k + 0.25] * len(values), ".", color=color, alpha=0.5, ms=4
                            )
                    axes.set_yticks(
                        range(len(names)), names if j == 0 else [""] * len(names), fontsize=7
                    )
                    axes.set_ylim(len(names) - 0.5, -0.5)
                    axes.tick_params(axis="x", labelsize=6)
                    if kind == "differences":
                        axes.axvline(0, color="#888888", linewidth=0.7)
                    if j == 0:
                        axes.set_ylabel(size)
            name = f"objective-{kind}.svg"
            scored[name] = svg(figure)
    return scored


def svg(figure: Figure) -> str:
    """Return the figure as text that does not depend on the time or on matplotlib's version string."""
    import io

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    main()
