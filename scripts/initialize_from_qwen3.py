"""Qwen3 checkpoint -> verified encoder-decoder folder. See `--help`."""

from qwen3_encdec.cli import initialize, run

if __name__ == "__main__":
    run(initialize)
