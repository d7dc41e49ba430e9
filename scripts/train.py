"""Train an encoder-decoder on UL2; `accelerate launch` runs several processes. See `--help`."""

from qwen3_encdec.cli import run, train

if __name__ == "__main__":
    run(train)
