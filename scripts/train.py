"""Train an encoder-decoder on UL2; see ``--help``. Launch it with ``accelerate launch`` for several processes."""

from qwen3_encdec.training.command import main

if __name__ == "__main__":
    main()
