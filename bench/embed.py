"""Sentences per second of `qwen3-encdec embed` beside sentence-transformers and exported forms:
same weights and texts.

    python bench/embed.py            # 8 to 17 minutes on 2 cores with nothing beside it
    python bench/embed.py --quick    # toy size: tests this script, measures nothing

The encoder has Qwen3-0.6B's dimensions (hidden 1024, 16 heads of 128, MLP 3072, whole vocabulary),
6 of its 28 layers
and random weights: speed does not depend on them. Texts are random words of 5 to 500 tokens, every
length alike, in random order. Both sides use all cores, take turns in one process, and sort by
length themselves; sentence-transformers has its default batch of 32. The median of the rounds
counts.

Recall compares vectors of real text: which of the ten nearest documents under float32 are still
found.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL = {"layers": 6, "texts": 96, "longest": 500, "rounds": 3, "documents": 3000, "queries": 300,
        "sizes": {}, "ranks": None}  # fmt: skip
QUICK = {"layers": 1, "texts": 12, "longest": 60, "rounds": 1, "documents": 60, "queries": 12, "ranks": 512,
         "sizes": {"vocab_size": 740, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
                   "num_key_value_heads": 1, "head_dim": 32}}  # fmt: skip
FORMS = {
    "onnx": "onnxruntime",
    "onnx-int8": "onnxruntime",
    "openvino": "openvino",
    "gguf-q8_0": "xllamacpp",
}


def main() -> None:
    """Run all sides, print figures, then targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument(
        "--forms",
        default=",".join(FORMS),
        help="exported forms, by commas; those not installed are named",
    )
    parser.add_argument("--recall", type=Path, default=Path("runs/demo/encoder-contrastive"),
                        help="encoder whose vectors are quantized; absent, the random one")  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    from qwen3_encdec.embedding.encoder import TextEncoder
    from qwen3_encdec.evaluation.suite import provenance
    from qwen3_encdec.folders import write_json

    logging.disable_progress_bar()
    started, plan = time.monotonic(), QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = make_encoder(Path(name), plan)
        texts = random_texts(TextEncoder(folder), plan)
        sides: dict[str, Callable[[list[str]], Any]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            short = str(dtype).removeprefix("torch.")
            stock = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
            sides[f"sentence-transformers {short}"] = lambda texts, stock=stock: stock.encode(texts)
            sides[f"ours {short}"] = TextEncoder(folder, dtype=dtype, device="cpu").encode
        default = str(TextEncoder(folder, device="cpu").dtype).removeprefix("torch.")
        print(
            f"{len(texts)} texts, {plan['layers']} layers, {torch.get_num_threads()} threads; our default is {default}"
        )
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        found: dict[str, np.ndarray] = {}
        for encode in sides.values():
            encode(texts[:4])
        for _ in range(plan["rounds"]):
            for side, encode in sides.items():
                began = time.perf_counter()
                found[side] = np.asarray(encode(texts), dtype=np.float32)
                seconds[side].append(time.perf_counter() - began)
        reference = found["sentence-transformers float32"]
        forms, not_run = exported(folder, texts, reference, arguments.forms.split(","), Path(name))
        seconds |= {form: [taken] for form, (taken, _) in forms.items()}
        found |= {form: vectors for form, (_, vectors) in forms.items()}
        source = (
            arguments.recall
            if (arguments.recall / "modules.json").is_file() and not arguments.quick
            else folder
        )
        recalls = recall(source, plan)

    median = {side: statistics.median(times) for side, times in seconds.items()}
    base = median["sentence-transformers float32"]
    print(f"{'':32}{'texts/s':>9}{'x':>7}{'cosine >=':>12}   seconds of each round")
    for side, taken in median.items():
        cosine = float((found[side] * reference).sum(1).min())
        rounds = ", ".join(f"{each:.2f}" for each in seconds[side])
        print(f"{side:32}{len(texts) / taken:9.2f}{base / taken:7.2f}{cosine:12.6f}   {rounds}")
    for form, reason in not_run.items():
        print(f"{form:32} not run: {reason}")
    print(f"recall@10 of vectors of {'the random encoder' if source == folder else source}: "
          + ", ".join(f"{kind} {value:.3f}" for kind, value in recalls.items()))  # fmt: skip
    for short in ("float32", "bfloat16"):
        ratio = median[f"sentence-transformers {short}"] / median[f"ours {short}"]
        target(f"same dtype, {short}", f"{ratio:.2f} x", ">= 1.3 x", ratio >= 1.3)
    ratio = base / median[f"ours {default}"]
    target(
        f"our default {default} over its default float32", f"{ratio:.2f} x", ">= 4 x", ratio >= 4
    )
    least = float((found["ours float32"] * reference).sum(1).min())
    target(
        "cosine to sentence-transformers in float32", f"{least:.7f}", ">= 0.99999", least >= 0.99999
    )
    if arguments.output:
        facts = provenance(started=started, plan=plan, threads=torch.get_num_threads())
        write_json(
            arguments.output,
            {"seconds": seconds, "recall@10": recalls, "not_run": not_run, "provenance": facts},
        )


def make_encoder(root: Path, plan: dict) -> Path:
    """An encoder folder with random weights, by way of an encoder-decoder, as every encoder comes
    to be.
    """
    import torch

    from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM
    from qwen3_encdec.conversion.extract import extract_encoder
    from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(num_ranks=plan["ranks"])
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    layers = {"num_hidden_layers": plan["layers"], "num_decoder_layers": 1}
    Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig(**layers, **plan["sizes"], **ids)).save_pretrained(
        root / "encdec"
    )
    tokenizer.save_pretrained(root / "encdec")
    extract_encoder(root / "encdec", root / "encoder")
    return root / "encoder"


def random_texts(encoder, plan: dict) -> list[str]:
    """Texts of 5 tokens to the longest, every length alike, shuffled."""
    import numpy as np

    rng = np.random.default_rng(0)
    decode = encoder._tokenizer.decode
    words = [
        decode([int(token)]) for token in rng.permutation(min(100_000, plan["ranks"] or 100_000))
    ]
    words = [
        word for word in words if word.startswith(" ") and word[1:].isascii() and word[1:].isalpha()
    ]
    lengths = np.linspace(5, plan["longest"], plan["texts"]).astype(int) - 1  # and EOS
    texts = ["".join(rng.choice(words, length)).strip() for length in lengths]
    return [texts[i] for i in rng.permutation(len(texts))]


def exported(
    folder: Path, texts: list[str], reference, forms: list[str], root: Path
) -> tuple[dict, dict]:
    """Seconds and vectors of each exported form, its texts sorted by length for it;

    and why others were not run.
    """
    import numpy as np

    from qwen3_encdec.embedding import export

    ran, not_run = {}, {}
    order = np.argsort([len(text) for text in texts])
    for form in filter(None, forms):
        if importlib.util.find_spec(FORMS[form]) is None:
            not_run[form] = f"{FORMS[form]} is not installed"
            continue
        try:
            export.export_encoder(folder, form, root / form)
        except ValueError as error:
            not_run[form] = str(error)
            continue
        embed = export.FORMS[form].read(root / form)
        embed(texts[:4])
        began = time.perf_counter()
        vectors = embed([texts[i] for i in order])
        ran[form] = time.perf_counter() - began, vectors[np.argsort(order)]
    return ran, not_run


def recall(folder: Path, plan: dict) -> dict[str, float]:
    """Recall@10 against float32, by kind of vector, for summaries of docstrings among bodies."""
    import numpy as np
    import torch

    from qwen3_encdec.data.package_docs import summary_pairs
    from qwen3_encdec.embedding.encoder import TextEncoder, int8_ranges, quantize

    pairs = summary_pairs("heldout")[: plan["documents"]]
    encoder = TextEncoder(folder, dtype=torch.float32, max_tokens=64)
    documents = encoder.encode([body for _, body in pairs])
    queries = encoder.encode(
        [summary for summary, _ in pairs[:: max(1, len(pairs) // plan["queries"])]]
    )

    def bits(vectors):
        return (
            np.unpackbits(
                (quantize(vectors, "binary").astype(np.int16) + 128).astype(np.uint8), axis=1
            )
            * 2.0
            - 1
        )

    def nearest(scores, number=10):
        return np.argsort(-scores, axis=1, kind="stable")[:, :number]

    expected = nearest(queries @ documents.T)

    def share(found):
        return float(
            np.mean([len(set(a) & set(b)) / 10 for a, b in zip(expected, found, strict=True)])
        )

    spans = int8_ranges(documents)
    restored = (quantize(documents, "int8", spans) + 128.0) * (spans[1] - spans[0]) / 255 + spans[0]
    hamming, mixed = bits(queries) @ bits(documents).T, queries @ bits(documents).T
    candidates = nearest(hamming, 100)
    again = nearest(np.take_along_axis(queries @ restored.T, candidates, axis=1))
    return {
        "int8": share(nearest(queries @ restored.T)),
        "binary": share(nearest(hamming)),
        "binary documents, float32 queries": share(nearest(mixed)),
        "binary, 100 nearest ranked again by int8": share(
            np.take_along_axis(candidates, again, axis=1)
        ),
        "control, shuffled documents": share(
            nearest(queries @ documents[np.random.default_rng(0).permutation(len(documents))].T)
        ),
    }


def target(name: str, figure: str, wanted: str, met: bool) -> None:
    """One line that says whether a figure is as wanted."""
    print(f"target {name}: {figure} (wanted {wanted}) {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
