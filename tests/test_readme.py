"""What the README and the documents say exists and runs."""

import re
from pathlib import Path

import pytest

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.training.config import TrainingConfig, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(init_folder, tmp_path, capsys):
    extract_encoder(init_folder, tmp_path / "encoder")
    folders = {"runs/demo/encoder-contrastive": tmp_path / "encoder", "runs/demo/init": init_folder}
    using = (ROOT / "docs/model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", README + using, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        for shown, real in folders.items():
            block = block.replace(shown, str(real))
        exec(compile(block, "README.md", "exec"), {})
    assert "1.0000, " in capsys.readouterr().out


def test_every_make_target_script_and_config_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"(?:scripts|configs|docs|bench)/[\w./-]+\.(?:py|yaml|md|json)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("document", sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("**/*.md")
                                            if not re.match(r"runs/|\.", str(p.relative_to(ROOT)))))  # fmt: skip
def test_links_and_test_names_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (ROOT / document).parent.joinpath(link).exists(), link
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


ROWS = re.compile(r"(\]\((src/[\w/]+\.py)\) \|) (\d+) \|")


def count_lines(match: re.Match) -> str:
    return f"{match[1]} {len((ROOT / match[2]).read_text().splitlines())} |"


def test_line_counts_are_those_of_the_files():
    assert ROWS.search(README)
    assert ROWS.sub(count_lines, README) == README, "run: python tests/test_readme.py"


def test_the_shipped_training_config_names_every_key():
    path = ROOT / "configs" / "training_config.yaml"
    load_config(path)
    written = set(re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert written == set(TrainingConfig.__dataclass_fields__)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(ROWS.sub(count_lines, README), encoding="utf-8")
