"""Tokenize a corpus once, or measure its UL2 examples, before training. See `--help`."""

from qwen3_encdec.cli import prepare_data, run

if __name__ == "__main__":
    run(prepare_data)
