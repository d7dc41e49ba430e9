"""Write the experiment's tables and plot from its JSON files alone.

python experiments/adaptation/report.py           # into docs/results.md and docs/adaptation.svg
python experiments/adaptation/report.py --check   # fails if they differ from what the files say
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import matplotlib
import numpy as np
from experiments.adaptation.run import power
from experiments.objective.report import (
    STYLE,
    between,
    interval,
    origins,
    read,
    rewrite,
    svg,
    table,
)
from matplotlib.figure import Figure

from qwen3_encdec.evaluation.retrieval import mean_interval
from qwen3_encdec.folders import InputError

BEGIN, END = (
    f"<!-- experiments/adaptation/report.py writes {end} here -->" for end in ("from", "to")
)
RETRIEVAL = [mark.replace(" writes ", " writes retrieval ") for mark in (BEGIN, END)]
UNMASKED = "parent without mask"
HEADLINE = {
    "raw values": "#8f7a3a",
    "scaled values": "#d9822b",
    "scaled values, gate": "#4078c0",
    "gate on keys too": "#7d5ba6",
    "closing from -8": "#2f9e79",
}
RAW = "raw values"
MAIN = (RAW, "scaled values", "scaled values, gate")
"""Arms with several learning rates."""
RATE, FAST = 1e-4, 1e-3
"""Learning rate of every arm, and the best one tried of raw values."""
SHOWN = (0, 4096, 8192, 16384, 32768, 65536)
"""Tokens in the tables of rates and of all runs."""

Record = dict[str, Any]


def main() -> None:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--results", type=Path, default=HERE / "results")
    option("--retrieval", type=Path, default=HERE / "results-retrieval")
    option("--docs", type=Path, default=ROOT / "docs", help="folder of results.md")
    option("--check", action="store_true", help="write nothing; exit with 1 if stale")
    arguments = parser.parse_args()
    page = arguments.docs / "results.md"
    try:
        records, pieces = read_runs(arguments.results), list(read(arguments.retrieval).values())
        files = {page: between(page, BEGIN, END, tables(records))}
        files[arguments.docs / "adaptation.svg"] = plot(records)
        stale = rewrite(files, arguments.check)
        text = between(page, *RETRIEVAL, retrieval(pieces))
        stale += rewrite({page: text}, arguments.check)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{len(records)} runs, {len(pieces)} pieces of retrieval")
    print(f"stale files: {', '.join(stale) or 'none'}")
    raise SystemExit(int(arguments.check and bool(stale)))


def read_runs(results: Path) -> list[Record]:
    """Read the runs and add `curve`: losses by denoiser at 0 and at each power of two."""
    records = list(read(results).values())
    for record in records:
        record["curve"] = {power(p["tokens"]): p["losses"] for p in record["points"]}
    return [record for record in records if record["settings"]["device"] == "cpu"]


def by_seed(records: Sequence[Record], arm: str, lr: float = RATE) -> dict[int, Record]:
    """Return an arm's runs at a learning rate."""
    wanted = {"arm": arm, "lr": lr}
    return {r["run"]["seed"]: r for r in records if wanted.items() <= r["run"].items()}


def mean(losses: dict[str, float]) -> float:
    """Average over the denoisers with equal weight."""
    return statistics.fmean(losses.values())


def spread(values: Sequence[float]) -> str:
    """Format mean and 95 % interval over seeds."""
    if not values:
        return "not run"
    half = interval(values)
    return f"{statistics.fmean(values):.2f}" + (f" ± {half:.2f}" if half is not None else "")


def tables(records: Sequence[Record]) -> str:
    """Return everything between the marks."""
    runs = {arm: by_seed(records, arm) for arm in HEADLINE}
    rows = []
    for tokens in sorted({tokens for record in records for tokens in record["curve"]}):
        curves = [[run["curve"] for run in seeds.values()] for seeds in runs.values()]
        cells = [[mean(curve[tokens]) for curve in of if tokens in curve] for of in curves]
        rows.append([f"{tokens:,}", *(spread(values) for values in cells)])
    header = ["tokens", *(f"{arm} ({len(seeds)})" for arm, seeds in runs.items())]
    parts = ["Mean over the five denoisers; in brackets the number of seeds:", table(header, rows)]
    parts.append("Tokens of the first arm's end over those of another for the same loss, by seed:")
    parts.append(table(["arms", "tokens ratio"], ratios(runs)))
    parts.append("Learning rates, in the same way; the ratio is that of raw values to the arm:")
    header = ["arm", *(f"{tokens:,}" for tokens in SHOWN), "tokens ratio"]
    parts.append(table(header, rates(records)))
    parts.append("First seed, all runs: mean of the denoisers by tokens, then each at the last:")
    parts.append(all_runs(records))
    parts += gaps(runs)
    return "\n\n".join([*parts, origin(records)])


def ratios(runs: dict[str, dict[int, Record]]) -> list[list[str]]:
    """Compare each arm with the slower ones before it."""
    return [
        [f"{slow} / {fast}", ratio(runs[slow], runs[fast])]
        for slow in ("raw values", "scaled values")
        for fast in list(HEADLINE)[list(HEADLINE).index(slow) + 1 :]
    ]


def rates(records: Sequence[Record]) -> list[list[str]]:
    """Tabulate the main arms at every learning rate."""
    rows = []
    for lr in sorted({record["run"]["lr"] for record in records}):
        for arm in MAIN:
            seeds = by_seed(records, arm, lr)
            curves = [run["curve"] for run in seeds.values()]
            found = [[mean(curve[n]) for curve in curves if n in curve] for n in SHOWN]
            cells = [spread(values) for values in found]
            last = "–" if arm == RAW else ratio(by_seed(records, RAW, lr), seeds)
            if seeds:
                rows.append([f"{arm}, lr {lr:g} ({len(seeds)})", *cells, last])
    return rows


def ratio(slow: dict[int, Record], fast: dict[int, Record]) -> str:
    """Divide the tokens of an arm by those that another needs for the same loss.

    Takes the runs by seed, to the length that all runs of the slow arm have. Returns the geometric
    mean over seeds with its interval.
    """
    seeds = slow.keys() & fast.keys()
    if not seeds:
        return "not run"
    end = min(max(slow[seed]["curve"]) for seed in seeds)
    found = [crossing(fast[seed]["curve"], mean(slow[seed]["curve"][end])) for seed in seeds]
    if any(tokens == 0 for tokens in found):
        return f"there before its first step, ends at {end:,} tokens"
    known = [math.log(end / tokens) for tokens in found if tokens]
    if len(known) < len(found):
        return "not reached by every seed"
    middle, half = statistics.fmean(known), interval(known)
    text = f"{math.exp(middle):.1f}"
    first = max(min(n for n in fast[seed]["curve"] if n) for seed in seeds)
    if any(tokens == first for tokens in found):
        text = f"at least {text}"  # the curve has no point between the start and the first
    elif half is not None:
        text += f" ({math.exp(middle - half):.1f} to {math.exp(middle + half):.1f})"
    return f"{text}, ends at {end:,} tokens"


def crossing(curve: dict[int, dict[str, float]], loss: float) -> float | None:
    """Return the tokens at which a curve falls to a loss, interpolated in their logarithm.

    None if it never does, 0 if it starts there; between the start and the first point, the latter.
    """
    above = 0, math.inf
    for tokens, losses in sorted(curve.items()):
        value = mean(losses)
        if value > loss:
            above = tokens, value
        elif not above[0]:
            return tokens
        else:
            share = (above[1] - loss) / (above[1] - value)
            return above[0] * (tokens / above[0]) ** share
    return None


def all_runs(records: Sequence[Record]) -> str:
    """Tabulate the first seed's runs, headline arms first, then the ablations by their name."""
    order = list(HEADLINE)
    runs = [record for record in records if record["run"]["seed"] == 0]
    runs.sort(key=lambda r: order.index(r["run"]["arm"]) if r["run"]["arm"] in order else 9)
    names = list(runs[0]["points"][0]["losses"]) if runs else []
    rows = []
    for record in runs:
        run, curve = record["run"], record["curve"]
        label = run["arm"] + ("" if run["lr"] == RATE else f", lr {run['lr']:g}")
        cells = [f"{mean(curve[tokens]):.2f}" if tokens in curve else "–" for tokens in SHOWN]
        last = curve[max(tokens for tokens in SHOWN if tokens in curve)]
        rows.append([label, *cells, *(f"{last[name]:.2f}" for name in names)])
    return table(["arm", *(f"{tokens:,}" for tokens in SHOWN), *names], rows)


def gaps(runs: dict[str, dict[int, Record]], number: int = 3) -> list[str]:
    """Show gaps of held-out texts as the arms fill them."""
    found = [of[0] for of in runs.values() if 0 in of and "infilled" in of[0]]
    blocks = []
    for i in range(number if found else 0):
        example = found[0]["infilled"][i]
        lines = [f"text      {example['source']!r}", f"expected  {example['expected']!r}"]
        for record in found:
            tokens = record["points"][-1]["tokens"]
            lines.append(f"{record['run']['arm']}, {tokens:,} tokens:")
            lines.append(f"          {record['infilled'][i]['generated'][:300]!r}")
        blocks.append("\n".join(["```", *lines, "```"]))
    return ["Gaps of held-out texts, filled greedily:", *blocks] if blocks else []


def origin(records: Sequence[Record]) -> str:
    """Say which commit and machine the figures are from."""
    seconds = sum(record["points"][-1]["processor seconds"] for record in records)
    first = f"{len(records)} runs, {seconds / 3600:.1f} processor hours of training."
    return "\n".join([first, *machines(records)])


def machines(records: Sequence[Record]) -> list[str]:
    """List commits and hardware with the number of records of each."""
    return origins([record["provenance"] for record in records], "commit", "hardware")


def retrieval(pieces: Sequence[Record]) -> str:
    """Tabulate retrieval: first what has no contrastive stage, then the encoders, best last."""
    found: dict[str, list[Record]] = {}
    for piece in pieces:
        found.setdefault(piece["contestant"], []).append(piece)
    names = sorted(found, key=lambda name: (stages(found[name]), final(found[name])))
    header = ["encoder", "seeds", "MRR before", "MRR after", "after, by seed", "R@1", "nDCG@10"]
    header += ["difference before", "difference after"]
    seconds = sum(piece["provenance"]["seconds"] for piece in pieces)
    last = [f"{len(pieces)} pieces, {seconds / 3600:.1f} hours.", *machines(pieces)]
    rows = [retrieval_row(found, name) for name in names]
    return "\n\n".join([table(header, rows), "\n".join(last)])


def stages(pieces: Sequence[Record]) -> list[str]:
    """Return the times at which an encoder is scored."""
    return [stage for stage in ("before", "after") if stage in pieces[0]]


def final(pieces: Sequence[Record]) -> float:
    """Return the mean MRR at the last stage."""
    return float(reciprocal(pieces, stages(pieces)[-1]).mean())


def retrieval_row(found: dict[str, list[Record]], name: str) -> list[str]:
    """Tabulate an encoder's scores and paired differences, by query, to the parent without mask."""
    pieces, reference = found[name], found.get(UNMASKED, [])
    scores, differences = ["–", "–"], ["–", "–"]
    for i, stage in enumerate(stages(pieces)):
        own = reciprocal(pieces, stage)
        scores[i] = ranged(own)
        if reference and name != UNMASKED:
            differences[i] = ranged(own - reciprocal(reference, stage), sign="+")
    last = [piece[stages(pieces)[-1]] for piece in pieces]
    seeds = " ".join(f"{score['mrr']:.3f}" for score in last)
    others = [f"{statistics.fmean(s[key] for s in last):.3f}" for key in ("r@1", "ndcg@10")]
    several = seeds if len(pieces) > 1 else "–"
    return [name, str(len(pieces)), *scores, several, *others, *differences]


def reciprocal(pieces: Sequence[Record], stage: str) -> np.ndarray:
    """Return a stage's reciprocal ranks [Q], averaged over seeds for each query."""
    return np.mean([1 / np.array(piece[stage]["ranks"]) for piece in pieces], axis=0)


def ranged(values: np.ndarray, sign: str = "") -> str:
    """Format the mean over queries with its 95 % bootstrap interval."""
    found = {name: format(value, f"{sign}.3f") for name, value in mean_interval(values).items()}
    return f"{found['score']} ({found['low']} to {found['high']})"


def plot(records: Sequence[Record]) -> str:
    """Draw learning curves with intervals over seeds; the start is drawn at half the first point."""
    panels: dict[str, Callable] = {"mean of five denoisers": mean}
    panels |= {"R1": lambda losses: losses["R1"], "S": lambda losses: losses["S"]}
    lines = [(arm, arm, RATE, ".-") for arm in HEADLINE]
    lines += [(f"{arm}, lr {FAST:g}", arm, FAST, ".--") for arm in MAIN]
    last = max((max(record["curve"]) for record in records), default=0)
    powers = [2**n for n in range(11, 20) if 2**n <= last]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        for axes, (title, score) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            shown: list[float] = []
            for label, arm, lr, style in lines:
                points: dict[int, list[float]] = {}
                for run in by_seed(records, arm, lr).values():
                    for tokens, losses in run["curve"].items():
                        points.setdefault(tokens or 1024, []).append(score(losses))
                means = [statistics.fmean(values) for values in points.values()]
                halves = [interval(values) or 0.0 for values in points.values()]
                shown += means
                color = HEADLINE[arm]
                axes.errorbar(list(points), means, halves, fmt=style, color=color, label=label)
            if shown:  # a wide interval may leave the picture
                axes.set_ylim(min(shown) - 1, max(shown) + 1)
            axes.set_title(title)
            axes.set_xscale("log", base=2)
            axes.set_xticks([1024, *powers], ["start", *(f"{power // 1024}k" for power in powers)])
            axes.minorticks_off()
            axes.set_xlabel("tokens")
        figure.axes[0].set_ylabel("held-out nats per target token")
        labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(*labels, loc="outside lower center", ncols=4, fontsize=8)
        return svg(figure)


if __name__ == "__main__":
    main()
