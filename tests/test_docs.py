"""Commands, options, errors and names on the pages exist in the code."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import typer.main
import yaml

from qwen3_encdec.cli import app
from qwen3_encdec.evaluation.retrieval import Retrieval

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TEXTS = "\n".join(file.read_text(encoding="utf-8") for file in (*PAGES, *CONFIGS))
COMMANDS = typer.main.get_command(app).commands


def unknown_words(text):
    """`COMMAND --option` of `qwen3-encdec` in code that the command line does not know."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL)
    code = "\n".join(blocks + re.findall(r"`([^`\n]+)`", text)).replace("\\\n", " ")
    unknown = []
    for name, rest in re.findall(r"^\s*qwen3-encdec +([a-z][\w-]*)(.*)", code, re.MULTILINE):
        if name not in COMMANDS:
            unknown.append(name)
            continue
        parameters = COMMANDS[name].params
        known = {option for p in parameters for option in p.opts + p.secondary_opts}
        options = [word for word in shlex.split(rest, comments=True) if word.startswith("--")]
        unknown += [f"{name} {word}" for word in options if word.split("=")[0] not in known]
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    assert unknown_words(page.read_text(encoding="utf-8")) == []


def test_a_wrong_command_would_be_found():
    page = "```\nqwen3-encdec extract --model a --pool mean\nqwen3-encdec extrakt\n```"
    assert unknown_words(page) == ["extract --pool", "extrakt"]


def test_troubleshooting_quotes_the_errors_as_they_are():
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # sentences that are broken over lines
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(quoted) > 10
    for sentence in quoted:
        for part in sentence.removeprefix("not run: ").split(" ... "):
            assert part in source, sentence


def test_the_site_has_every_page_once():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [page for section in navigation for group in section.values() for page in group]
    assert sorted(pages) == sorted(file.name for file in (ROOT / "docs").glob("*.md"))


def test_the_reference_names_what_is_there():
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: (.+)$", page, re.MULTILINE)
    assert len(names) > 25
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__doc__, name


def included(text):
    """Files that the site includes in a page. A formatter may spoil the line that names one."""
    assert "8 < --" not in text
    return re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE)


def test_examples_are_shown_on_the_pages():
    files = [file for page in PAGES for file in included(page.read_text(encoding="utf-8"))]
    assert len(files) == 5
    assert all((ROOT / file).is_file() for file in files)
    with pytest.raises(AssertionError):
        included('--8 < --"examples/own_denoiser.py"')


def test_hsdp_commands_have_as_many_processes_as_their_sizes_multiply_to():
    """Also those of the recipes, whose launch needs more GPUs than a test has."""
    joined = re.sub(r"\\\n#? *", "", TEXTS)
    commands = re.findall(r"accelerate launch .*accelerate_hsdp.yaml.*", joined)
    assert len(commands) >= 3
    for command in commands:
        options = dict(re.findall(r"--(\w+) (\d+)", command))
        replicas, shards = (
            int(options[f"parallelism_config_dp_{kind}_size"]) for kind in ("replicate", "shard")
        )
        assert replicas * shards == int(options["num_processes"]), command


def test_folders_of_the_demo_are_named_as_it_names_them():
    source = (ROOT / "src/qwen3_encdec/demo/pipeline.py").read_text(encoding="utf-8")
    named = set(re.findall(r"runs/demo/([a-z-]+?)(?:-contrastive)?\b(?!\.)", TEXTS))
    assert {"init", "encoder"} <= named <= set(re.findall(r'root / "([a-z-]+)"', source)), named


def test_a_task_has_what_the_page_says():
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    names = re.findall(r"`(\w+)", page.partition("anything else with")[2].partition(";")[0])
    task = Retrieval("name", [], [], np.empty(0))
    assert len(names) == 6
    assert [name for name in names if not hasattr(task, name)] == []


def test_the_shell_completes_commands():
    words = {"COMP_WORDS": "qwen3-encdec ev", "COMP_CWORD": "1"}
    words["_QWEN3_ENCDEC_COMPLETE"] = "complete_bash"
    command = Path(sys.executable).with_name("qwen3-encdec")
    done = subprocess.run([command], env=os.environ | words, capture_output=True, text=True)
    assert done.stdout.split() == ["evaluate"]
