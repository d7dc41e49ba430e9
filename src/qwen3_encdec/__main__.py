"""`python -m qwen3_encdec COMMAND`, the same as `qwen3-encdec COMMAND`."""

from qwen3_encdec.cli import main

main()
