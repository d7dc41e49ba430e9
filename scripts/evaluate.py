"""Encoder-decoder or encoder -> metrics and a report beside the baselines. See `--help`."""

from qwen3_encdec.cli import evaluate, run

if __name__ == "__main__":
    run(evaluate)
