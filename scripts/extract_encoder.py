"""Extract a standalone text encoder from an encoder-decoder checkpoint. See `--help`."""

from qwen3_encdec.cli import extract, run

if __name__ == "__main__":
    run(extract)
