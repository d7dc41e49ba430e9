"""Initialize a verified encoder-decoder folder from a Qwen3 checkpoint. See `--help`."""

from qwen3_encdec.cli import initialize, run

if __name__ == "__main__":
    run(initialize)
