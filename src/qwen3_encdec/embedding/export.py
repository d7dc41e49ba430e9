"""An encoder folder -> the files that other runtimes read, each compared with our own encoder in
its own runtime.

| form                      | files                       | read by                                                   |
|---------------------------|-----------------------------|-----------------------------------------------------------|
| safetensors               | model.safetensors           | transformers, sentence-transformers, vLLM, TEI            |
| onnx                      | onnx/model.onnx             | onnxruntime, transformers.js (`fp32`), TEI's ORT          |
| onnx-int8                 | onnx/model_quantized.onnx   | onnxruntime, transformers.js (`q8`)                       |
| openvino                  | openvino/openvino_model.xml | OpenVINO                                                  |
| gguf, gguf-f16, gguf-q8_0 | model-f32.gguf, ...         | llama.cpp and what is built on it                         |

All but GGUF, which carries everything in one file, also get the folder's small files: tokenizer,
pooling, prompts.
"""

import importlib.util
import json
import logging
import shutil
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
from qwen3_encdec.embedding.encoder import TextEncoder, encoder_folder, load_encoder
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
    """One form of an encoder.

    Args:
        write: Makes it of an encoder folder (first) in another (second).
        read: Opens it in its own runtime.
        cosine: Least allowed between its embedding and our own encoder's in fp32, for the worst of
            the texts.
        packages: What must be installed to write and to read it.
        extra: The extra of this package that installs them.
        small_files: Whether the encoder's small files go beside it.
    """

    write: Callable[[Path, Path], None]
    read: Callable[[Path], Embed]
    cosine: float
    packages: tuple[str, ...]
    extra: str
    small_files: bool = True


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how close its runtime comes to our own encoder: the worst of `texts`.

    `difference` is the largest of any entry of a normalized embedding, `causal` the cosine that
    reading the same weights causally would give.
    """

    form: str
    megabytes: float
    texts: int
    cosine: float
    difference: float
    causal: float
    limit: float

    def __str__(self) -> str:
        return (
            f"{self.form}: {self.megabytes:.1f} MB; {self.texts} texts in padded batches: cosine to our encoder "
            f">= {self.cosine:.7f} (limit {self.limit}), largest difference {self.difference:.1e}; "
            f"read causally {self.causal:.4f}"
        )


def export_encoder(model: str | Path, form: str, output_dir: str | Path) -> ExportReport:
    """Write an encoder in another form, and prove in that form's own runtime that it embeds as ours
    does.

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
    for package in kind.packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"{form} needs the package {package}: pip install 'qwen3-encdec[{kind.extra}]'"
            )
    check_output(output_dir, "exported encoder")
    with (
        encoder_folder(model) as encoder,
        new_folder(output_dir, "exported encoder", form=form, source=str(model)) as to,
    ):
        if kind.small_files:
            copy_without_weights(encoder, to)
        kind.write(encoder, to)
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        texts = sample_texts(tokenizer, 16, min(256, tokenizer.model_max_length))
        expected = TextEncoder(encoder, dtype=torch.float32, device="cpu").encode(texts)
        found = kind.read(to)(texts)
        report = ExportReport(
            form,
            sum(file.stat().st_size for file in to.rglob("*") if file.is_file()) / 1e6,
            len(texts),
            float((found * expected).sum(-1).min()),
            float(np.abs(found - expected).max()),
            float((causal_embeddings(encoder, texts) * expected).sum(-1).min()),
            kind.cosine,
        )
        # A control that comes close would mean that the texts cannot tell causal from
        # bidirectional.
        if not (report.cosine >= kind.cosine and 1 - report.causal > 10 * (1 - kind.cosine)):
            raise InputError(f"{model} as {form} does not embed as our encoder does: {report}")
    return report


@torch.inference_mode()
def causal_embeddings(folder: Path, texts: list[str]) -> np.ndarray:
    """[N, E] float32, normalized:

    the control, what a reader that takes `folder` for a causal model would give.
    """
    encoder = load_encoder(folder)

    def states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = mask.new_ones(1, 1, *ids.shape[1:] * 2, dtype=torch.bool).tril()
        return encoder(input_ids=ids, attention_mask=seen).last_hidden_state

    return embed_padded(folder, states, 1, texts)


def sample_texts(
    tokenizer: PreTrainedTokenizerBase, number: int, longest: int, seed: int = 0
) -> list[str]:
    """Random words of the vocabulary, 1 to about `longest` tokens a text, lengths even on a log
    scale, shuffled.
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


def _write_safetensors(encoder: Path, output: Path) -> None:
    for file in encoder.glob("*.safetensors*"):
        shutil.copy(file, output)


def _read_safetensors(folder: Path) -> Embed:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )
    return partial(model.encode, batch_size=8, show_progress_bar=False)


class _States(torch.nn.Module):
    """Stock transformers' encoder as a function of two tensors to one."""

    def __init__(self, folder: Path):
        super().__init__()
        self.model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class _Int8Embedding(torch.nn.Module):
    """A table of bytes with one scale a row:

    one scale for all of it, as onnxruntime's own, costs ten times as much.
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
    import onnx_ir

    states = _States(encoder)
    if int8:
        states.model.embed_tokens = _Int8Embedding(states.model.embed_tokens.weight.detach())
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with _quiet():
        program = torch.onnx.export(
            states,
            (torch.zeros_like(mask), mask),
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes=(shape, shape),
            verbose=False,
        )
    assert program is not None
    model = _eight_bits(program.model) if int8 else program.model
    (output / "onnx").mkdir()
    file = output / "onnx" / ("model_quantized.onnx" if int8 else "model.onnx")
    external = None
    if (
        sum(tensor.const_value.nbytes for tensor in model.graph.initializers.values())
        > _LARGEST_ONNX
    ):
        external = f"{file.name}_data"
        config = read_json(output / "config.json")
        config["transformers.js_config"] = {"use_external_data_format": {file.name: 1}}
        write_json(output / "config.json", config)
    onnx_ir.save(model, file, external_data=external)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters log of every node."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _eight_bits(model: Any) -> Any:
    """Weights of 8 bits with a scale for every 32, and products of integers, as llama.cpp's q8_0."""
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


def _write_openvino(encoder: Path, output: Path) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(encoder / "config.json", scratch)
        _write_onnx(encoder, Path(scratch))
        model = openvino.convert_model(Path(scratch) / "onnx" / "model.onnx")
        openvino.save_model(
            model, output / "openvino" / "openvino_model.xml", compress_to_fp16=False
        )


def _read_openvino(folder: Path) -> Embed:
    import openvino

    # Left to itself it computes in bf16 where the processor has it.
    model = openvino.compile_model(
        folder / "openvino" / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )

    def states(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        return model({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]

    return partial(embed_padded, folder, states, 8)


def _write_gguf(kind: str, encoder: Path, output: Path) -> None:
    """As llama.cpp's own converter lays out a Qwen3, plus what makes it an encoder:

    not causal, pooled, EOS added.
    """
    import gguf

    config, arch = Qwen3Config.from_pretrained(encoder), gguf.MODEL_ARCH.QWEN3
    if config.rope_parameters["rope_type"] != "default":
        raise InputError(
            f"{encoder}: rope_type {config.rope_parameters['rope_type']} is not written as GGUF"
        )
    with _quiet():
        writer = gguf.GGUFWriter(output / f"model-{kind.lower()}.gguf", gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(output.name)
    writer.add_file_type(
        gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType[f"MOSTLY_{kind}"]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_causal_attention(False)
    pooling = read_json(encoder / "1_Pooling" / "config.json")["pooling_mode"]
    writer.add_pooling_type({"mean": gguf.PoolingType.MEAN, "lasttoken": gguf.PoolingType.LAST}.get(
        pooling, gguf.PoolingType.CLS
    ))  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in backend["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
            for i in range(config.vocab_size)
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in read_tensors(encoder):
        target = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        values = tensor.float().numpy()
        # As llama.cpp does: vectors stay whole, and so do rows that do not divide into blocks of
        # 32.
        dtype = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        if dtype == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
            dtype = gguf.GGMLQuantizationType.F16
        writer.add_tensor(target, gguf.quantize(values, dtype), raw_dtype=dtype)
    with _quiet():
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def llama_cpp_server(folder: Path) -> Any:
    """llama.cpp's own server, in this process and on a free port:

    it tokenizes, pools and normalizes itself.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(next(folder.glob("*.gguf")))
    params.embedding = True
    params.n_parallel = 1
    params.n_ctx = params.n_batch = params.n_ubatch = (
        4096  # attention that is not causal wants a text in one batch
    )
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


_ST, _ONNX, _OPENVINO, _GGUF = (
    ("sentence_transformers",),
    ("onnx", "onnxscript", "onnxruntime"),
    ("onnx", "onnxscript", "openvino"),
    ("gguf", "xllamacpp"),
)
_write_int8, _read_int8 = (
    partial(_write_onnx, int8=True),
    partial(_read_onnx, "model_quantized.onnx"),
)
FORMS = {
    "safetensors": Form(_write_safetensors, _read_safetensors, 0.99999, _ST, "export"),
    "onnx": Form(_write_onnx, partial(_read_onnx, "model.onnx"), 0.99999, _ONNX, "onnx"),
    "onnx-int8": Form(_write_int8, _read_int8, 0.999, _ONNX, "onnx"),
    "openvino": Form(_write_openvino, _read_openvino, 0.99999, _OPENVINO, "openvino"),
    "gguf": Form(
        partial(_write_gguf, "F32"), _read_gguf, 0.99999, _GGUF, "gguf", small_files=False
    ),
    "gguf-f16": Form(
        partial(_write_gguf, "F16"), _read_gguf, 0.9999, _GGUF, "gguf", small_files=False
    ),
    "gguf-q8_0": Form(
        partial(_write_gguf, "Q8_0"), _read_gguf, 0.999, _GGUF, "gguf", small_files=False
    ),
}
