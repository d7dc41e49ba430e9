"""Several runs on one page, looked at by a real browser."""

import json
import re
import shutil
import subprocess
from html import escape

import pytest
import yaml

from qwen3_encdec.folders import PROVENANCE_FILE, InputError
from qwen3_encdec.reports import comparison
from tests.test_report import CURVES, HOSTILE, METRICS, TASKS, Page

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
MEASURE = """<script>
const wide = (selector) => [...document.querySelectorAll(selector)].map(e => e.getBoundingClientRect().width);
const inked = [...document.querySelectorAll('svg')].map(svg => svg.querySelectorAll('path, use').length);
parent.document.title = 'MEASURED ' + JSON.stringify({
  inner: innerWidth, page: document.documentElement.scrollWidth, svg: wide('svg'), table: wide('.scroll'), inked});
</script>"""


def write_run(folder, kind, *, metrics=None, curves=None, config=None, **record):
    folder.mkdir(parents=True)
    (folder / PROVENANCE_FILE).write_text(json.dumps({"kind": kind, **record}))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if curves:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curves))
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two training runs, and an evaluation of the encoder that came out of the first."""
    totals = {"source_tokens": 700, "target_tokens": 300, "examples": 20}
    slower = [{**line, "loss": 7.0, **totals} if "loss" in line else line for line in CURVES]
    encoder = write_run(
        tmp_path / "encoder", "encoder", source=str(tmp_path / "a" / "ul2"), pooling="mean"
    )
    (encoder / "modules.json").write_text("[]")
    (encoder / "config.json").write_text(
        '{"model_type": "qwen3", "hidden_size": 96, "is_causal": false}'
    )
    write_run(tmp_path / "init", "encoder-decoder", source="Qwen/Qwen3-0.6B")
    evaluated = METRICS | {
        "tasks": TASKS,
        "provenance": {"model": str(encoder), "commit": "abc1234"},
    }
    settings = {"model": str(tmp_path / "init"), "lr": 0.125}
    return [
        write_run(tmp_path / "a" / "ul2", "training run", curves=slower, config=settings),
        write_run(tmp_path / "b" / "ul2", "training run", curves=CURVES, config={"lr": 0.5}),
        write_run(
            tmp_path / "evaluation",
            "evaluation",
            metrics=evaluated,
            model=str(encoder),
        ),
    ]


def test_page_holds_every_run(runs, tmp_path):
    comparison.compare(runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    # loss, held-out loss, learning rate, throughput
    assert page.tags.count("svg") == 4
    assert "http" not in text
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for expected in (
        "a/ul2",
        "b/ul2",
        "1,000",
        "abc1234",
        "0.200 ±.150",
        "3.250",
        "not run: pip install gensim",
        HOSTILE,
    ):
        assert expected in page.text
    assert (tmp_path / "out" / PROVENANCE_FILE).exists()


def test_an_embedder_that_scores_alike_is_one_column_and_else_two(tmp_path):
    other = json.loads(json.dumps(TASKS))
    other["wordnet-lemma"]["scores"][HOSTILE]["score"] = 0.3
    for name, tasks in (("first", TASKS), ("second", other)):
        write_run(tmp_path / name, "evaluation", metrics={"tasks": tasks, "tasks_not_run": {}})
    runs = [comparison._read(tmp_path / name, name) for name in ("first", "second")]
    merged, _ = comparison._merged_tasks(runs)
    assert set(merged["wordnet-lemma"]["scores"]) == {
        "TF-IDF",
        f"{HOSTILE} (first)",
        f"{HOSTILE} (second)",
    }
    other["wordnet-lemma"]["size"] = 50
    (tmp_path / "second" / "metrics.json").write_text(json.dumps({"tasks": other}))
    merged, _ = comparison._merged_tasks([runs[0], comparison._read(tmp_path / "second", "second")])
    assert {"wordnet-lemma, 3,000", "wordnet-lemma, 50"} < set(merged)
    assert set(merged["wordnet-lemma, 50"]["scores"]) == {
        "TF-IDF",
        HOSTILE,
    }  # what another size scores is no other score


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it_without_complaint_and_within_its_width(runs, tmp_path, width):
    comparison.compare(runs, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()

    def look(text):
        file = tmp_path / "page.html"
        inner = escape(text.replace("</body>", MEASURE + "</body>"))
        file.write_text(
            f'<title></title><iframe srcdoc="{inner}" width="{width}" height="900" style="border:0">'
        )
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--dump-dom", file.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        measured = re.search(r"<title>MEASURED (.*?)</title>", done.stdout)
        assert measured, done.stderr
        return json.loads(measured[1]), complaints

    seen, complaints = look(page)
    assert complaints == []
    assert seen["inner"] == width
    assert seen["page"] <= width
    assert len(seen["svg"]) == 4
    assert all(0.6 * min(width, 500) <= drawn <= width for drawn in seen["svg"])
    assert all(drawn <= width for drawn in seen["table"])
    assert min(seen["inked"]) > 5
    # Control: a table outside its scrolling box would widen the page; a script that fails would be
    # heard.
    broken = page.replace('<div class="scroll">', "<div>").replace(
        "</body>", "<script>nothing()</script></body>"
    )
    seen, complaints = look(broken)
    assert complaints
    assert width > 390 or seen["page"] > width


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "was not written by qwen3-encdec"),
        (lambda folder: write_run(folder, "encoder"), "nothing to show"),
        (lambda folder: write_run(folder, "training run", curves=[1, 2]), "is not a JSON object"),
    ],
)  # fmt: skip
def test_bad_runs_are_named_and_nothing_is_written(tmp_path, make, sentence):
    make(tmp_path / "run")
    with pytest.raises(InputError, match=f"run.*{sentence}"):
        comparison.compare([tmp_path / "run"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_named_twice_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match="named twice"):
        comparison.compare([runs[0], runs[0]], tmp_path / "out")
    with pytest.raises(InputError, match="at least one"):
        comparison.compare([], tmp_path / "out")
