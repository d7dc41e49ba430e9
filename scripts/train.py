"""Encoder-decoder -> the same, trained on UL2;

several processes through `accelerate launch`. See `--help`.
"""

from qwen3_encdec.cli import run, train

if __name__ == "__main__":
    run(train)
