"""Export an encoder folder to other runtimes and verify parity in each.

| form                      | files                     | read by                          |
|---------------------------|---------------------------|----------------------------------|
| onnx                      | onnx/model.onnx           | onnxruntime, transformers.js     |
| onnx-int8                 | onnx/model_quantized.onnx | onnxruntime, transformers.js     |
| gguf, gguf-f16, gguf-q8_0 | model-f32.gguf, ...       | llama.cpp and what builds on it  |

ONNX folders also get the small files: tokenizer, pooling, prompts, length limit. GGUF carries
tokenizer, pooling and length limit itself, but its readers do not normalize text: what is not NFC
embeds wrongly there. The report measures that, and the README beside the file says it.
"""

import importlib.util
import json
import logging
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config

from qwen3_encdec.conversion.extract import pool
from qwen3_encdec.embedding.encoder import (
    TextEncoder,
    encoder_folder,
    load_encoder,
    read_layout,
    states_under,
)
from qwen3_encdec.folders import (
    InputError,
    check_output,
    copy_without_weights,
    new_folder,
    read_json,
    read_tensors,
    write_json,
)

Embed = Callable[[list[str]], np.ndarray]
"""Texts -> [N, E] float32, normalized."""

# One protobuf message ends at 2 GiB: weights of larger models go to a file beside it.
_LARGEST_ONNX = 1_900_000_000


@dataclass(frozen=True)
class Form:
    """One form of an encoder: how to write and read it, and how close it must come."""

    write: Callable[[Path, Path], None]
    """Makes it of an encoder folder (first) in another (second)."""
    read: Callable[[Path], Embed]
    """Opens it in its own runtime."""
    cosine: float
    """Least cosine to our own encoder in fp32, for the worst of the texts."""
    packages: tuple[str, ...]
    """Needed to write and to read it."""
    extra: str
    """The extra of this package that installs them."""


@dataclass(frozen=True)
class ExportReport:
    """Distance of the exported runtime to our own encoder: the worst of `texts`."""

    form: str
    megabytes: float
    texts: int
    cosine: float
    difference: float
    """Largest of any entry of a normalized embedding."""
    causal: float
    """The control: cosine that reading the same weights causally would give."""
    decomposed: float
    """Cosine of texts that are not NFC: below `limit`, normalize them before this reader."""
    limit: float

    def __str__(self) -> str:
        line = (
            f"{self.form}: {self.megabytes:.1f} MB; {self.texts} texts in padded batches: cosine "
            f">= {self.cosine:.7f} (limit {self.limit}), difference <= {self.difference:.1e}; "
            f"read causally {self.causal:.4f}; texts that are not NFC {self.decomposed:.4f}"
        )
        if self.decomposed < self.limit:
            line += (
                "\nits readers do not normalize text: convert texts to NFC before embedding them"
            )
        return line


def export_encoder(model: str | Path, form: str, output_dir: str | Path) -> ExportReport:
    """Export an encoder and verify parity in the form's own runtime.

    Args:
        model: An encoder folder; of an encoder-decoder folder or run the encoder is extracted
            first, mean-pooled.
        form: One of `FORMS`.
        output_dir: Written beside and renamed into place, and only if the comparison holds.

    Raises:
        InputError: `model` is neither, the form is unknown, a package that it needs is missing
            (names the extra), or the written files do not embed as our own encoder does.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} is not one of {', '.join(FORMS)}")
    kind = FORMS[form]
    check_packages(form, kind.packages, kind.extra)
    check_output(output_dir, "exported encoder")
    facts = {"form": form, "source": str(model)}
    with (
        encoder_folder(model) as encoder,
        new_folder(output_dir, "exported encoder", **facts) as folder,
    ):
        kind.write(encoder, folder)
        report = _compare(encoder, folder, form, kind)
        # A control that comes close would mean that the texts cannot tell causal from
        # bidirectional.
        close = report.cosine >= kind.cosine
        if not close or 1 - report.causal < 10 * (1 - kind.cosine):
            raise InputError(f"{model} as {form} does not embed as our encoder does: {report}")
    return report


def check_packages(form: str, packages: tuple[str, ...], extra: str) -> None:
    """Raise InputError naming the extra if a package that a form needs is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            install = f"pip install 'qwen3-encdec[{extra}]'"
            raise InputError(f"{form} needs the package {package}: {install}")


def _compare(encoder: Path, folder: Path, form: str, kind: Form) -> ExportReport:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    texts = sample_texts(tokenizer, 16, min(256, read_layout(encoder).max_tokens))
    decomposed = [unicodedata.normalize("NFD", text) for text in NOT_NFC]
    ours = TextEncoder(encoder, dtype=torch.float32, device="cpu")
    prompt = "" if ours.layout.default_prompt is None else ours.layout.prompt()
    expected = ours.encode(texts)
    embed = kind.read(folder)
    found = embed([prompt + text for text in texts])
    others = embed([prompt + text for text in decomposed])
    files = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return ExportReport(
        form,
        sum(files) / 1e6,
        len(texts),
        cosine=least_cosine(found, expected),
        difference=float(np.abs(found[:, : expected.shape[1]] - expected).max()),
        causal=least_cosine(causal_embeddings(encoder, texts), expected),
        decomposed=least_cosine(others, ours.encode(decomposed)),
        limit=kind.cosine,
    )


def least_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """The least cosine of rows, over the leading dimensions that `expected` has."""
    found = found[:, : expected.shape[1]]
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(-1) / norms).min())


def causal_embeddings(folder: Path, texts: list[str]) -> np.ndarray:
    """[N, E] float32, normalized: the control, `folder` read as a causal model."""
    encoder = load_encoder(folder)

    def states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return states_under(encoder, ids, causal=True)

    return embed_padded(folder, states, 1, texts)


NOT_NFC = ("Übergröße für Äpfel", "crème brûlée à la façon", "Việt Nam đẹp", "naïve coöperation")
"""Texts whose letters carry marks, to be decomposed."""


def sample_texts(
    tokenizer: PreTrainedTokenizerBase, number: int, longest: int, seed: int = 0
) -> list[str]:
    """Texts of random words of the vocabulary, 1 to about `longest` tokens each, lengths even on a
    log scale, shuffled.
    """
    rng = np.random.default_rng(seed)
    words = []
    for token in rng.permutation(len(tokenizer)):
        text = tokenizer.decode([int(token)])
        word = text.removeprefix(" ")
        if word != text and word.isalpha() and unicodedata.is_normalized("NFC", word):
            words.append(word)
        if len(words) == 2000:
            break
    # EOS is one token; a word without its space before it, as the first one stands, may take more.
    lengths = np.geomspace(1, longest - 8, number).round().astype(int)
    return [" ".join(rng.choice(words, length)) for length in rng.permutation(lengths)]


@torch.inference_mode()
def embed_padded(
    folder: Path,
    states: Callable[[torch.Tensor, torch.Tensor], Any],
    batch_size: int,
    texts: list[str],
) -> np.ndarray:
    """Tokenize and pool as the folder says, around a function of ids and mask, [B, S] int64, to
    states [B, S, E].
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pooling = read_json(folder / "1_Pooling" / "config.json")["pooling_mode"]
    rows = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size], padding=True, truncation=True, return_tensors="pt"
        )
        output = states(batch["input_ids"], batch["attention_mask"])
        rows.append(pool(torch.as_tensor(output), batch["attention_mask"], pooling))
    return torch.cat(rows).numpy()


class _States(torch.nn.Module):
    """Stock transformers' encoder: ids and mask [B, S] to states [B, S, E]."""

    def __init__(self, folder: Path):
        super().__init__()
        self.model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class _Int8Embedding(torch.nn.Module):
    """A table of bytes with one scale a row; onnxruntime's own, one for all, costs ten times the
    error.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.scale: torch.Tensor
        self.table: torch.Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("table", (weight / scale).round().to(torch.int8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids] * self.scale[ids]


def _write_onnx(encoder: Path, output: Path, int8: bool = False) -> None:
    copy_without_weights(encoder, output)
    states = _States(encoder)
    if int8:
        states.model.embed_tokens = _Int8Embedding(states.model.embed_tokens.weight.detach())
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    model = to_onnx(
        states,
        (torch.zeros_like(mask), mask),
        ["input_ids", "attention_mask"],
        ["last_hidden_state"],
        (shape, shape),
    )
    file = output / "onnx" / ("model_quantized.onnx" if int8 else "model.onnx")
    if save_onnx(_eight_bits(model) if int8 else model, file):
        config = read_json(output / "config.json")
        config["transformers.js_config"] = {"use_external_data_format": {file.name: 1}}
        write_json(output / "config.json", config)


def to_onnx(
    module: torch.nn.Module,
    inputs: tuple,
    input_names: list[str],
    output_names: list[str],
    dynamic_shapes: Any,
) -> Any:
    """Export a module through torch.export; an onnx_ir model."""
    with _quiet():
        program = torch.onnx.export(
            module,
            inputs,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    return program.model


def save_onnx(model: Any, file: Path) -> bool:
    """Save a model; True if its weights were so large that they went into a file beside it."""
    import onnx_ir

    file.parent.mkdir(exist_ok=True)
    size = sum(tensor.const_value.nbytes for tensor in model.graph.initializers.values())
    large = size > _LARGEST_ONNX
    onnx_ir.save(model, file, external_data=f"{file.name}_data" if large else None)
    return large


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence exporters, which log every node."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _eight_bits(model: Any) -> Any:
    """8-bit weights with a scale for every 32, and integer products, as llama.cpp's q8_0."""
    import onnx
    import onnx_ir
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with tempfile.TemporaryDirectory() as scratch:
        # Through a file, because a message of more than 2 GiB cannot be made.
        onnx_ir.save(model, whole := Path(scratch) / "model.onnx", external_data="weights")
        quantizer = MatMulNBitsQuantizer(
            onnx.load(whole), bits=8, block_size=32, is_symmetric=True, accuracy_level=4
        )
        with _quiet():
            quantizer.process()
    return onnx_ir.from_proto(quantizer.model.model)


def _read_onnx(name: str, folder: Path) -> Embed:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        folder / "onnx" / name, providers=["CPUExecutionProvider"]
    )

    def states(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        return session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]

    return partial(embed_padded, folder, states, 8)


def _write_gguf(kind: str, encoder: Path, output: Path) -> None:
    """Write a GGUF as llama.cpp's own converter lays out a Qwen3, plus the keys that make it an
    encoder: not causal, pooled, EOS added.
    """
    import gguf

    arch = gguf.MODEL_ARCH.QWEN3
    layout = read_layout(encoder)
    with _quiet():
        writer = gguf.GGUFWriter(output / f"model-{kind.lower()}.gguf", gguf.MODEL_ARCH_NAMES[arch])
    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer.add_name(output.name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    config = Qwen3Config.from_pretrained(encoder)
    _add_sizes(writer, config, encoder)
    # Readers take the context length for the limit of a text.
    writer.add_context_length(layout.max_tokens)
    writer.add_causal_attention(False)
    pooling = {"mean": "MEAN", "lasttoken": "LAST", "cls": "CLS"}[layout.pooling]
    writer.add_pooling_type(gguf.PoolingType[pooling])
    _add_tokenizer(writer, AutoTokenizer.from_pretrained(encoder), config.vocab_size)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in read_tensors(encoder):
        target = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        values = tensor.float().numpy()
        # As llama.cpp: vectors stay whole, rows that do not divide into blocks of 32 are F16.
        dtype = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        if dtype == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
            dtype = gguf.GGMLQuantizationType.F16
        writer.add_tensor(target, gguf.quantize(values, dtype), raw_dtype=dtype)
    with _quiet():
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    prompts = json.dumps(layout.prompts, ensure_ascii=False)
    (output / "README.md").write_text(
        f"An encoder for llama.cpp: {layout.pooling} pooling, at most {layout.max_tokens} tokens a "
        "text (start the server with `--embedding` and a batch that holds a whole text).\n\n"
        "GGUF readers do not normalize text: convert texts to Unicode NFC before embedding them.\n"
        f"They do not know prompts either: put them before the texts yourself: {prompts}\n",
        encoding="utf-8",
    )


def _add_sizes(writer: Any, config: Qwen3Config, encoder: Path) -> None:
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise InputError(f"{encoder}: rope_type {rope['rope_type']} cannot be written as GGUF")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    import gguf

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in backend["added_tokens"]}
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(size)))
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)


def llama_cpp_server(folder: Path) -> Any:
    """llama.cpp's own server in this process, on a free port; it tokenizes and pools itself."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(next(folder.glob("*.gguf")))
    params.embedding = True
    params.n_parallel = 1
    # Attention that is not causal wants a text in one batch.
    params.n_ctx = params.n_batch = params.n_ubatch = 4096
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.port = params.verbosity = 0
    return xllamacpp.Server(params)


def _read_gguf(folder: Path) -> Embed:
    server = llama_cpp_server(folder)

    def embed(texts: list[str]) -> np.ndarray:
        answer = server.handle_embeddings({"input": texts})
        return np.array([row["embedding"] for row in answer["data"]], dtype=np.float32)

    return embed


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FORMS = {
    "onnx": Form(_write_onnx, partial(_read_onnx, "model.onnx"), 0.99999, ONNX_PACKAGES, "onnx"),
    "onnx-int8": Form(
        partial(_write_onnx, int8=True),
        partial(_read_onnx, "model_quantized.onnx"),
        0.999,
        ONNX_PACKAGES,
        "onnx",
    ),
}
for _name, _kind, _cosine in (
    ("gguf", "F32", 0.99999),
    ("gguf-f16", "F16", 0.9999),
    ("gguf-q8_0", "Q8_0", 0.999),
):
    _write = partial(_write_gguf, _kind)
    FORMS[_name] = Form(_write, _read_gguf, _cosine, ("gguf", "xllamacpp"), "gguf")
