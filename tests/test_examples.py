"""Every example but those with a test of their own runs, and says what it is there to say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "own_denoiser": ["[R-words]", "[X-halves]", "[S-late]", "<extra_id_0>"],
    "own_dataset": ["examples in 200 rows", "texts that training never sees"],
    "own_backend": ["padded: ", "packed: "],
    "whole_road": ["stock transformers differs by", "tensor([[1.0000"],
}


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    for expected in SAYS[name]:
        assert expected in said
    assert list(tmp_path.iterdir()) == []


def test_every_example_is_run_somewhere():
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    assert [file.stem for file in EXAMPLES.glob("*.py") if f"{file.stem}" not in tests] == []
