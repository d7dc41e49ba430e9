"""Define your own denoisers, print what each makes of a sentence, and check that no token is lost.

    python examples/own_denoiser.py

To train on it, put the same list under `data.preset` in a training YAML.
"""

from typing import Any

import numpy as np

from qwen3_encdec.data.config import resolve_preset
from qwen3_encdec.data.ul2 import Example, corrupt, render, uncorrupt
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

PRESET: list[dict[str, Any]] = [
    {"name": "R-words", "mean_span": 1.5, "corruption": 0.2, "weight": 2},
    {"name": "X-halves", "mean_span": 6, "corruption": 0.5, "weight": 1},
    {"name": "S-late", "mean_span": None, "corruption": 0.3, "weight": 1},
]
TEXT = (
    "The encoder reads the whole sentence at once, and the decoder writes down what was taken out."
)


def main() -> None:
    """Print one example of each denoiser."""
    tokenizer, rng = build_tokenizer(num_ranks=8192), np.random.default_rng(0)
    kinds = {"sentinel_ids": tokenizer.sentinel_token_ids, "eos_id": tokenizer.eos_token_id}
    tokens = np.array(
        tokenizer(TEXT, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    )
    preset = resolve_preset(PRESET)
    for index, denoiser in enumerate(preset):
        example = Example(*corrupt(tokens, denoiser, rng, **kinds), index)
        print(render(example, tokenizer, preset))
        assert np.array_equal(uncorrupt(example.source, example.target, **kinds), tokens)


if __name__ == "__main__":
    main()
