"""Encoder-decoder checkpoint -> standalone text encoder. See `--help`."""

from qwen3_encdec.cli import extract, run

if __name__ == "__main__":
    run(extract)
