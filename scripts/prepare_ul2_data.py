"""What UL2 makes of a corpus, before any training. See `--help`."""

from qwen3_encdec.cli import prepare_data, run

if __name__ == "__main__":
    run(prepare_data)
