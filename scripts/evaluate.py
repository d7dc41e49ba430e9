"""Evaluate an encoder-decoder or encoder beside the baselines. See `--help`."""

from qwen3_encdec.cli import evaluate, run

if __name__ == "__main__":
    run(evaluate)
