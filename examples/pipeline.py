"""Go from a causal Qwen3 to embeddings, one function per stage. Takes a minute at toy size.

    python examples/pipeline.py [FOLDER]

With a real checkpoint, skip the first call and pass its folder or hub id to the second.
"""

import sys
import tempfile
from pathlib import Path

from sentence_transformers import SentenceTransformer

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.conversion.initialize import initialize
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.demo.parent import parent_tokenizer, train_causal_parent
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.loop import run_training

TEXTS = [
    f"Return the {word} of {n} numbers. The list must not be empty."
    for n in range(200)
    for word in ("sum", "mean")
]


def main(folder: Path) -> None:
    """Run every stage in `folder`."""
    (folder / "corpus.txt").write_text("\n".join(TEXTS))
    train_causal_parent(
        folder / "qwen3",
        tokenizer=parent_tokenizer(512),
        texts=TEXTS,
        hidden_size=64,
        num_hidden_layers=2,
        steps=5,
        batch_size=2,
        block_size=64,
    )
    print(initialize(folder / "qwen3", folder / "init"))
    data = DataConfig(
        inputs=[str(folder / "corpus.txt")], source_length=64, target_length=32, heldout_every=10
    )
    config = TrainingConfig(
        model=str(folder / "init"),
        output_dir=str(folder / "run"),
        data=data,
        max_steps=5,
        batch_size=2,
        warmup_steps=1,
        save_every=0,
        eval_every=0,
        trackers=[],
    )
    checkpoint = run_training(config)
    print(extract_encoder(checkpoint, folder / "encoder"))
    model = SentenceTransformer(str(folder / "encoder"))
    embeddings = model.encode(
        ["Return the sum of 3 numbers.", "Return the mean of 3 numbers.", "An unrelated line."]
    )
    print(model.similarity(embeddings, embeddings))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
