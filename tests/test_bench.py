import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize("script", sorted(path.name for path in BENCH.glob("*.py")))
def test_every_bench_answers_help(script):
    done = subprocess.run([sys.executable, BENCH / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_gpu_report_runs_whole_at_toy_size(tmp_path):
    command = [sys.executable, BENCH / "gpu_report.py", "--device", "cpu", "--tiny", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("target ")]
    assert [line.rpartition(" ")[2] for line in lines] == ["met", "met"]
    (written,) = tmp_path.glob("gpu-*-tiny.json")
    report = json.loads(written.read_text())
    assert report["training"]["tokens_per_second"] > 0
    assert report["decoding"]["decode_tokens_per_second"] > 0


def test_gpu_report_without_a_gpu_says_so(monkeypatch):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, BENCH / "gpu_report.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA GPU is visible" in done.stderr
