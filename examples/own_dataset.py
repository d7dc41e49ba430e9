"""Mix your own corpus with another, three tokens to one, and print a row as training sees it.

python examples/own_dataset.py
"""

import json
import tempfile
from itertools import islice
from pathlib import Path

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import UL2Data, heldout_examples, rows
from qwen3_encdec.data.ul2 import render
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer


def main() -> None:
    """Write two small corpora and print the first row of their mixture."""
    with tempfile.TemporaryDirectory() as folder:
        recipes, letters = Path(folder, "recipes.jsonl"), Path(folder, "letters.txt")
        steps = (
            "Wash and cut the leeks.",
            "Boil the potatoes in salted water.",
            "Let the dough rest for an hour.",
        )
        recipes.write_text(
            "".join(json.dumps({"body": f"Step {i}. {steps[i % 3]}"}) + "\n" for i in range(400))
        )
        letters.write_text(
            "".join(f"Dear reader {i}, this is a whole document on one line.\n" for i in range(400))
        )
        config = DataConfig(
            mixture=[
                {"inputs": [str(recipes)], "text_column": "body", "weight": 3},
                {"inputs": [str(letters)], "weight": 1},
            ],
            source_length=96,
            target_length=64,
            min_tokens=4,
            heldout_every=20,
        )
        tokenizer = build_tokenizer(num_ranks=4096)
        drawn = list(islice(rows(UL2Data(config, tokenizer)), 200))
        examples = sum(len(row.examples) for row in drawn)
        print(f"{examples:,} examples in {len(drawn)} rows; the first row has:")
        for example in drawn[0].examples:
            print(render(example, tokenizer, config.denoisers))
        heldout = heldout_examples(config, tokenizer, 8)
        print(f"{len(heldout)} examples from held-out texts")


if __name__ == "__main__":
    main()
