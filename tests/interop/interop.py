"""One encoder folder in every runtime: cosine to our own encoder, the least and the mean of 32
texts.

    make interop    # installs the runtimes, then runs this

The encoder is a nano one with random weights, wide enough that attention decides; the texts have 1
to 2,000 tokens and go in padded batches of 8. The control reads the same folder causally.
transformers 5.1, which takes the folder for a causal model, must refuse it. Exit code 1 if a
runtime is missing, fails, or is not as close as it must be.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.conversion.initialize import initialize
from qwen3_encdec.demo.parent import parent_tokenizer
from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.embedding.export import (
    FORMS,
    causal_embeddings,
    embed_padded,
    export_encoder,
    sample_texts,
)
from qwen3_encdec.embedding.export_pair import export_pair
from qwen3_encdec.folders import read_json, write_json

EXACT, HALF, BYTES, CAUSAL = 0.99999, 0.9999, 0.999, 0.9
SENTENCE_TRANSFORMERS = """
import json, sys
import torch
from sentence_transformers import SentenceTransformer
folder, texts, output = sys.argv[1:]
model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
rows = model.encode(json.load(open(texts)), batch_size=8, show_progress_bar=False)
json.dump(rows.tolist(), open(output, "w"))
"""
TRANSFORMERS_JS = """
import fs from "node:fs";
import { env, pipeline } from "@huggingface/transformers";
const [root, name, dtype, texts, output] = process.argv.slice(1);
env.allowRemoteModels = false;
env.localModelPath = root;
const extractor = await pipeline("feature-extraction", name, { dtype });
const all = JSON.parse(fs.readFileSync(texts)), rows = [];
for (let i = 0; i < all.length; i += 8)
  rows.push(...(await extractor(all.slice(i, i + 8), { pooling: "mean", normalize: true })).tolist());
fs.writeFileSync(output, JSON.stringify(rows));
"""
Rows = Callable[[], np.ndarray]


def make_encoder(root: Path) -> Path:
    """A nano encoder by the package's own pipeline, for texts of up to 2,048 tokens."""
    tokenizer = parent_tokenizer(4096)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 128) * 128, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        tie_word_embeddings=True, initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    for saved in (Qwen3ForCausalLM(config), tokenizer):
        saved.save_pretrained(root / "parent")
    initialize(root / "parent", root / "init")
    extract_encoder(root / "init", root / "encoder", max_seq_length=2048)
    return root / "encoder"


def in_process(
    command: list, arguments: list, texts: list[str], cwd: Path | None = None
) -> np.ndarray:
    """What another process makes of the texts."""
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "texts.json", Path(scratch) / "rows.json"
        write_json(source, texts)
        done = subprocess.run(
            [*command, *arguments, source, output], capture_output=True, text=True, cwd=cwd
        )
        if done.returncode:
            error = done.stderr[max(done.stderr.rfind("\n", 0, done.stderr.rfind("Error:")), 0) :]
            raise RuntimeError(" ".join(error.split())[:200] or f"exit code {done.returncode}")
        return np.array(read_json(output, list), dtype=np.float32)


def least_and_mean(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Cosines of embeddings of length 1."""
    cosines = (found * expected).sum(-1)
    return float(cosines.min()), float(cosines.mean())


def main() -> int:
    """Print the table; 0 if all of it is right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runtimes", type=Path, default=Path(".venv/interop"), help="where `make interop` installs"
    )
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    runtimes: Path = options.runtimes.absolute()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        encoder = make_encoder(scratch)
        texts = sample_texts(AutoTokenizer.from_pretrained(encoder), 32, 2000)
        ours = TextEncoder(encoder, dtype=torch.float32, device="cpu")
        tokens = [len(ids) - 1 for ids in ours.tokenize(texts).ids]
        expected = ours.encode(texts)

        def stock(implementation: str) -> Rows:
            model = AutoModel.from_pretrained(
                encoder, dtype=torch.float32, attn_implementation=implementation
            ).eval()
            return lambda: embed_padded(
                encoder, lambda ids, mask: model(ids, mask).last_hidden_state, texts
            )

        def environment(name: str) -> Rows:
            command = [runtimes / name / "bin/python", "-c", SENTENCE_TRANSFORMERS]
            return lambda: in_process(command, [encoder], texts)

        def exported(form: str) -> Rows:
            def rows() -> np.ndarray:
                export_encoder(encoder, form, scratch / form)
                return FORMS[form].read(scratch / form)(texts)

            return rows

        def node(form: str, dtype: str) -> Rows:
            # Of code on the command line, packages are sought from where it runs.
            command = ["node", "--input-type=module", "-e", TRANSFORMERS_JS, "--"]
            return lambda: in_process(command, [scratch, form, dtype], texts, cwd=runtimes / "npm")

        versions = {package.name: package.version for package in distributions()}
        rows: list[tuple[str, float, Rows]] = [
            (f"transformers {versions.get('transformers')}, eager", EXACT, stock("eager")),
            (f"transformers {versions.get('transformers')}, sdpa", EXACT, stock("sdpa")),
            (
                f"sentence-transformers {versions.get('sentence-transformers')}",
                EXACT,
                lambda: SentenceTransformer(str(encoder), device="cpu").encode(texts, batch_size=8),
            ),
            ("sentence-transformers 5", EXACT, environment("sentence-transformers-5")),
            (f"onnxruntime {versions.get('onnxruntime')} fp32", EXACT, exported("onnx")),
            (f"onnxruntime {versions.get('onnxruntime')} int8", BYTES, exported("onnx-int8")),
            (f"llama.cpp ({versions.get('xllamacpp')}) f32", EXACT, exported("gguf")),
            (f"llama.cpp ({versions.get('xllamacpp')}) f16", HALF, exported("gguf-f16")),
            (f"llama.cpp ({versions.get('xllamacpp')}) q8_0", BYTES, exported("gguf-q8_0")),
            ("transformers.js 4 fp32", EXACT, node("onnx", "fp32")),
            ("transformers.js 4 q8", BYTES, node("onnx-int8", "q8")),
        ]
        failed, figures = [], {}

        def line(name: str, least: float, mean: float, wanted: str, right: bool) -> None:
            figures[name] = {"least": least, "mean": mean, "wanted": wanted}
            failed.extend([name] * (not right))
            print(
                f"{name:40}{least:14.7f}{mean:11.7f}  {wanted:>10} {'ok' if right else 'FAILED'}",
                flush=True,
            )

        print(
            f"{len(texts)} texts of {min(tokens)} to {max(tokens):,} tokens and EOS, in padded batches of 8"
        )
        print(f"{'runtime':40}{'least cosine':>14}{'mean':>11}  {'wanted':>10}")
        for name, limit, embed in rows:
            try:
                least, mean = least_and_mean(embed(), expected)
            except Exception as error:
                print(f"{name:40}failed: {(str(error) or repr(error)).splitlines()[0]}", flush=True)
                failed.append(name)
                continue
            line(name, least, mean, f">= {limit}", least >= limit)
        try:
            print(export_pair(scratch / "init", scratch / "pair"))
        except Exception as error:
            print(f"the pair in onnxruntime failed: {error}")
            failed.append("the pair")
        least, mean = least_and_mean(causal_embeddings(encoder, texts), expected)
        line("control: read causally", least, mean, f"< {CAUSAL}", mean < CAUSAL)

        # transformers 5.1 reads the folder causally: `requirements` make sentence-transformers
        # refuse it there, and without them, the control, it would embed.
        old = "sentence-transformers 6 on transformers 5.1"
        try:
            environment("transformers-5.1")()
            said = "loads the folder and embeds causally"
        except RuntimeError as error:
            said = str(error)
        right = "transformers" in said and ">=5.2.0" in said
        print(f"{old}: {'refused' if right else 'FAILED'}: {said}")
        failed += [old] * (not right)
        settings = encoder / "config_sentence_transformers.json"
        write_json(
            settings,
            {key: value for key, value in read_json(settings).items() if key != "requirements"},
        )
        least, mean = least_and_mean(environment("transformers-5.1")(), expected)
        line("control: it without the requirement", least, mean, f"< {CAUSAL}", mean < CAUSAL)
    if options.output:
        write_json(options.output, {"rows": figures, "failed": failed})
    print(
        f"failed: {', '.join(failed)}"
        if failed
        else f"all of {len(rows)} runtimes read one encoder alike"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
