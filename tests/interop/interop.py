"""One encoder folder in every runtime that runs on this machine: cosine to our own encoder, worst and mean of 32 texts.

Wants the runtimes on its path; what is missing is named. The encoder is a nano one with random weights, large enough
that attention decides; the texts have 1 to 2,000 tokens and go in padded batches of 8. The control reads
the same folder causally. Exit code 1 if a runtime that ran is not as close as it must be.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from qwen3_encdec.demo.parent import parent_tokenizer
from qwen3_encdec.embedding import TextEncoder
from qwen3_encdec.export import FORMS, _embed, causal_embeddings, export_encoder, sample_texts
from qwen3_encdec.extraction import extract_encoder
from qwen3_encdec.files import write_json
from qwen3_encdec.initialization import initialize

EXACT, BYTES = 0.99999, 0.999
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


class NotRun(Exception):
    """A runtime that is not there."""


def make_encoder(folder: Path) -> Path:
    """A nano encoder by the package's own road, for texts of up to 2,048 tokens."""
    tokenizer = parent_tokenizer(4096)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    rows = -(-len(tokenizer) // 128) * 128
    config = Qwen3Config(
        vocab_size=rows, **sizes, **heads, **ids, tie_word_embeddings=True, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    for saved in (Qwen3ForCausalLM(config), tokenizer):
        saved.save_pretrained(folder / "parent")
    initialize(folder / "parent", folder / "init")
    extract_encoder(folder / "init", folder / "encoder", max_seq_length=2048)
    return folder / "encoder"


def stock(folder: Path, implementation: str, texts: list[str]) -> np.ndarray:
    """Stock transformers' states, pooled."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation).eval()
    return _embed(folder, lambda ids, mask: model(ids, mask).last_hidden_state, 8, texts)


def elsewhere(command: list[str], arguments: list, scratch: Path, texts: list[str], **options) -> np.ndarray:
    """What another process writes of the texts."""
    write_json(scratch / "texts.json", texts)
    (scratch / "rows.json").unlink(missing_ok=True)
    done = subprocess.run(
        [*command, *map(str, arguments), str(scratch / "texts.json"), str(scratch / "rows.json")],
        capture_output=True, text=True, timeout=300, **options,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return np.array(json.loads((scratch / "rows.json").read_text()), dtype=np.float32)


def with_packages(packages: Path, folder: Path, scratch: Path, texts: list[str]) -> np.ndarray:
    """Through sentence-transformers with the packages of a folder before those of the environment."""
    if not packages.is_dir():
        raise NotRun(f"{packages.name} could not be installed")
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    return elsewhere([sys.executable, "-c", SENTENCE_TRANSFORMERS], [folder], scratch, texts, env=environment)


def transformers_js(npm: Path, folder: Path, dtype: str, scratch: Path, texts: list[str]) -> np.ndarray:
    """Through transformers.js in node; for code given on the command line, packages are sought from where it runs."""
    if not (npm / "node_modules" / "@huggingface" / "transformers").is_dir():
        raise NotRun("npm or the package @huggingface/transformers is not there")
    command = ["node", "--input-type=module", "-e", TRANSFORMERS_JS, "--"]
    return elsewhere(command, [folder.parent, folder.name, dtype], scratch, texts, cwd=npm)


def refusal(packages: Path, folder: Path, scratch: Path, texts: list[str], expected: np.ndarray) -> tuple[str, bool]:
    """transformers 5.1 takes the folder for a causal model: it must refuse it, and does because of `requirements`."""
    try:
        with_packages(packages, folder, scratch, texts)
    except NotRun as reason:
        return f"not run: {reason}", True
    except RuntimeError as error:
        said = str(error)
    else:
        return "loads the folder and embeds causally", False
    # The control: without the requirement it loads, and is causal.
    path = folder / "config_sentence_transformers.json"
    declared = json.loads(path.read_text())
    try:
        write_json(path, {key: value for key, value in declared.items() if key != "requirements"})
        cosine = float((with_packages(packages, folder, scratch, texts) * expected).sum(-1).mean())
    finally:
        write_json(path, declared)
    refused = "transformers" in said and ">=5.2.0" in said
    verdict = "refused" if refused else f"failed otherwise: {said}"
    return f"{verdict}; without the requirement it would embed causally, cosine {cosine:.4f}", refused and cosine < 0.9


def main() -> int:
    """Print the table; 0 if all that ran is right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runtimes", type=Path, default=Path(".venv/interop"), help="where `make interop` installs")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    runtimes: Path = options.runtimes.absolute()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        encoder = make_encoder(scratch)
        texts = sample_texts(AutoTokenizer.from_pretrained(encoder), 32, 2000)
        expected = TextEncoder(encoder, dtype=torch.float32, device="cpu").encode(texts)

        def exported(form: str) -> np.ndarray:
            missing = [name for name in FORMS[form].packages if not __import__("importlib.util").util.find_spec(name)]
            if missing:
                raise NotRun(f"{missing[0]} is not installed")
            if not (scratch / form).exists():
                export_encoder(encoder, form, scratch / form)
            return FORMS[form].read(scratch / form)(texts)

        def in_js(form: str, dtype: str) -> np.ndarray:
            if not (scratch / form).exists():
                raise NotRun(f"{form} was not exported")
            return transformers_js(runtimes / "npm", scratch / form, dtype, scratch, texts)

        own, other = version("transformers"), version("sentence-transformers")
        rows = [
            (f"transformers {own}, eager", EXACT, lambda: stock(encoder, "eager", texts)),
            (f"transformers {own}, sdpa", EXACT, lambda: stock(encoder, "sdpa", texts)),
            (f"sentence-transformers {other}", EXACT, lambda: exported("safetensors")),
            (
                "sentence-transformers 5.7.0",
                EXACT,
                lambda: with_packages(runtimes / "sentence-transformers-5", encoder, scratch, texts),
            ),
            ("onnxruntime fp32", EXACT, lambda: exported("onnx")),
            ("onnxruntime int8", BYTES, lambda: exported("onnx-int8")),
            ("OpenVINO fp32", EXACT, lambda: exported("openvino")),
            ("llama.cpp f32", EXACT, lambda: exported("gguf")),
            ("llama.cpp f16", 0.9999, lambda: exported("gguf-f16")),
            ("llama.cpp q8_0", BYTES, lambda: exported("gguf-q8_0")),
            ("transformers.js fp32", EXACT, lambda: in_js("onnx", "fp32")),
            ("transformers.js q8", BYTES, lambda: in_js("onnx-int8", "q8")),
        ]
        failed, figures = [], {}
        print(f"{'runtime':34}{'least cosine':>14}{'mean':>11}{'wanted':>10}")
        for name, limit, embed in rows:
            try:
                cosines = (embed() * expected).sum(-1)
            except NotRun as reason:
                print(f"{name:34}not run: {reason}")
                continue
            except Exception as error:
                print(f"{name:34}failed: {str(error).splitlines()[0]}")
                failed.append(name)
                continue
            least, mean = float(cosines.min()), float(cosines.mean())
            figures[name] = {"least": least, "mean": mean, "wanted": limit}
            print(f"{name:34}{least:14.7f}{mean:11.7f}{limit:10} {'ok' if least >= limit else 'FAILED'}", flush=True)
            failed += [name] * (least < limit)
        cosines = (causal_embeddings(encoder, texts) * expected).sum(-1)
        print(f"{'control: read causally':34}{cosines.min():14.7f}{cosines.mean():11.7f}{'< 0.9':>10}")
        failed += ["control"] * bool(cosines.mean() >= 0.9)
        line, right = refusal(runtimes / "transformers-5.1", encoder, scratch, texts, expected)
        print(f"{'transformers 5.1.0':34}{line}")
        failed += ["transformers 5.1.0"] * (not right)
        if options.output:
            write_json(options.output, {"rows": figures, "causal": float(cosines.mean()), "failed": failed})
    print(f"failed: {', '.join(failed)}" if failed else f"all of {len(figures)} runtimes read one encoder alike")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
