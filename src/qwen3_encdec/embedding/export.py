"""Export an encoder folder to other runtimes and verify parity in each.

| form                      | files                     | read by                          |
|---------------------------|---------------------------|----------------------------------|
| onnx                      | onnx/model.onnx           | onnxruntime, transformers.js     |
| onnx-int8                 | onnx/model_quantized.onnx | onnxruntime, transformers.js     |
| gguf, gguf-f16, gguf-q8_0 | model-f32.gguf, ...       | llama.cpp and what builds on it  |

ONNX folders also get the small files: tokenizer, pooling, prompts, length limit. A GGUF file
contains tokenizer, pooling and length limit, but its readers do not normalize text, so text that is
not NFC gets wrong embeddings. The report measures this.
"""

import importlib.util
import logging
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config

from qwen3_encdec.conversion.extract import pool
from qwen3_encdec.embedding.encoder import TextEncoder, encoder_folder, read_layout
from qwen3_encdec.evaluation.retrieval import normalize
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
NOT_NFC = ("Übergröße für Äpfel", "crème brûlée à la façon", "Việt Nam đẹp", "naïve coöperation")
ONNX, GGUF = ("onnx", "onnxscript", "onnxruntime"), ("gguf", "xllamacpp")
"""Required packages; the extra that installs them has the name of the first."""


class Form(NamedTuple):
    """Functions that write an encoder folder in this form and open it in its runtime, the lowest
    accepted cosine, and the required packages.
    """

    write: Callable[[Path, Path], None]
    read: Callable[[Path], Embed]
    cosine: float
    packages: tuple[str, ...]


@dataclass(frozen=True)
class ExportReport:
    """Lowest cosine and largest difference between the exported runtime and our own encoder; lowest
    cosines of weights that are read causally (the control) and of texts that are not NFC.
    """

    form: str
    cosine: float
    limit: float
    difference: float
    causal: float
    decomposed: float

    def __str__(self) -> str:
        line = (
            f"{self.form}: cosine to our encoder >= {self.cosine:.7f} (limit {self.limit}), "
            f"difference <= {self.difference:.1e}; cosine of a causal reading {self.causal:.4f}, "
            f"of text not in NFC {self.decomposed:.4f}"
        )
        if self.decomposed < self.limit:
            line += "\nthe runtime does not normalize text: convert texts to NFC before embedding"
        return line


def export_encoder(model: str | Path, form: str, output_dir: str | Path) -> ExportReport:
    """Export an encoder and verify parity in the form's own runtime.

    Args:
        model: An encoder folder, or an encoder-decoder folder or run, whose encoder is extracted
            first, mean-pooled.
        form: One of `FORMS`.
        output_dir: Built in a temporary folder and renamed into place if parity holds.

    Raises:
        InputError: `model` is neither, the form is unknown, a package that it needs is missing
            (names the extra), or the written files do not embed as our own encoder does.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} is not one of {', '.join(FORMS)}")
    kind = FORMS[form]
    check_output(output_dir, "exported encoder", inputs=[model])
    check_packages(form, kind.packages)
    output = new_folder(output_dir, "exported encoder", form=form, source=str(model))
    with encoder_folder(model) as encoder, output as folder:
        kind.write(encoder, folder)
        report = _compare(encoder, folder, form)
        # A control that comes close means that the texts cannot detect a causal reading.
        if report.cosine < kind.cosine or 1 - report.causal < 10 * (1 - kind.cosine):
            raise InputError(f"{model} exported as {form} failed verification: {report}")
    return report


def _compare(encoder: Path, folder: Path, form: str) -> ExportReport:
    ours = TextEncoder(encoder, dtype=torch.float32, device="cpu")
    texts = sample_texts(AutoTokenizer.from_pretrained(encoder), 16, min(256, ours.max_tokens))
    texts += [unicodedata.normalize("NFD", text) for text in NOT_NFC]
    expected, prompt = ours.encode(texts), ours.layout.prompt()
    found = FORMS[form].read(folder)([prompt + text for text in texts])[:, : expected.shape[1]]
    causal = causal_embeddings(encoder, texts)[:, : expected.shape[1]]
    cosines, blind = cosine(found, expected), cosine(causal, expected)
    difference = float(np.abs(normalize(found) - normalize(expected))[:16].max())
    least = [float(values.min()) for values in (cosines[:16], blind[:16], cosines[16:])]
    return ExportReport(form, least[0], FORMS[form].cosine, difference, *least[1:])


def check_packages(form: str, packages: tuple[str, ...]) -> None:
    """Raise InputError naming the extra if a package that a form needs is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            install = f"pip install -e '.[{packages[0]}]'"
            raise InputError(f"{form} needs the package {package}: {install}")


def cosine(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the cosines [N] between the rows of two arrays [N, E]."""
    return (normalize(found) * normalize(expected)).sum(-1)


def causal_embeddings(folder: Path, texts: list[str]) -> np.ndarray:
    """Embed with `folder` read as a causal model (the control): [N, E] float32, normalized."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model.config.is_causal = True
    return embed_padded(folder, lambda ids, mask: model(ids, mask).last_hidden_state, texts)


def sample_texts(
    tokenizer: PreTrainedTokenizerBase, number: int, longest: int, seed: int = 0
) -> list[str]:
    """Sample texts of random vocabulary words, 1 to about `longest` tokens each, in random order,
    with lengths evenly spaced on a log scale.
    """
    rng = np.random.default_rng(seed)
    tokens = tokenizer.batch_decode(rng.permutation(len(tokenizer))[:, None])
    words = [text[1:] for text in tokens if text[:1] == " " and text[1:].isalpha()]
    words = [word for word in words if unicodedata.is_normalized("NFC", word)][:2000]
    # EOS is one token; the first word has no space before it and may take several tokens.
    lengths = np.geomspace(1, max(longest - 8, 1), number).round().astype(int)
    return [" ".join(rng.choice(words, length)) for length in rng.permutation(lengths)]


@torch.inference_mode()
def embed_padded(
    folder: Path, states: Callable[[torch.Tensor, torch.Tensor], Any], texts: list[str]
) -> np.ndarray:
    """Embed texts with the folder's tokenizer and pooling; `states` maps ids and mask, [B, S]
    int64, to states [B, S, E].
    """
    tokenizer, pooling = AutoTokenizer.from_pretrained(folder), read_layout(folder).pooling
    rows = []
    for start in range(0, len(texts), 8):
        part = texts[start : start + 8]
        batch = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"]
        rows.append(pool(torch.as_tensor(states(batch["input_ids"], mask)), mask, pooling))
    return torch.cat(rows).numpy()


class _Int8Embedding(torch.nn.Module):
    """Int8 embedding table with a scale per row; onnxruntime cannot quantize lookups to 8 bits."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.table = (weight / self.scale).round().to(torch.int8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids] * self.scale[ids]


def _write_onnx(encoder: Path, output: Path, int8: bool = False) -> None:
    copy_without_weights(encoder, output)
    model = AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    if int8:
        model.embed_tokens = _Int8Embedding(model.embed_tokens.weight.detach())
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask}
    file = output / "onnx" / "model.onnx"
    file.parent.mkdir()
    options: Any = {"input_names": list(inputs), "output_names": ["last_hidden_state"]}
    save_onnx(file, model, kwargs=inputs, dynamic_shapes=dict.fromkeys(inputs, shape), **options)
    if int8:
        _to_8_bits(file)
    changes = {
        "config.json": {"transformers.js_config": {"use_external_data_format": True}},
        # transformers.js truncates at the tokenizer's limit, which may be higher than the folder's.
        "tokenizer_config.json": {"model_max_length": read_layout(encoder).max_tokens},
    }
    for name, values in changes.items():
        write_json(output / name, read_json(output / name) | values)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters, which log every node."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def save_onnx(file: Path, module: torch.nn.Module, args: tuple = (), **options: Any) -> None:
    """Export with `torch.onnx.export`, weights in a second file: an ONNX file ends at 2 GiB."""
    import onnx_ir

    with quiet():
        program = torch.onnx.export(module, args, verbose=False, **options)
    assert program is not None
    onnx_ir.save(program.model, file, external_data=f"{file.name}_data")


def _to_8_bits(file: Path) -> None:
    """Quantize weights to 8 bits, one scale per 32, for integer products, as llama.cpp's q8_0."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    options = {"bits": 8, "block_size": 32, "is_symmetric": True, "accuracy_level": 4}
    quantizer = MatMulNBitsQuantizer(onnx.load(file), **options)
    with quiet():
        quantizer.process()
    for written in file.parent.iterdir():
        written.unlink()
    name = "model_quantized.onnx"
    data = {"save_as_external_data": True, "location": f"{name}_data"}
    onnx.save(quantizer.model.model, file.parent / name, **data)


def _read_onnx(folder: Path) -> Embed:
    import onnxruntime

    file = next(folder.glob("onnx/*.onnx"))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def states(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        return session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]

    return partial(embed_padded, folder, states)


def _write_gguf(kind: str, encoder: Path, output: Path) -> None:
    """Write a GGUF with the layout of llama.cpp's Qwen3 converter, plus the keys of an encoder: not
    causal, pooled, EOS added.
    """
    import gguf

    config, layout = Qwen3Config.from_pretrained(encoder), read_layout(encoder)
    rope: Any = config.rope_parameters
    if rope["rope_type"] != "default":
        raise InputError(f"{encoder}: GGUF export does not support rope_type {rope['rope_type']}")
    if config.attention_bias:
        raise InputError(f"{encoder} has attention biases, which llama.cpp's Qwen3 lacks; use onnx")
    writer = gguf.GGUFWriter(output / f"model-{kind.lower()}.gguf", "qwen3")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_context_length(layout.max_tokens)  # readers use it as the length limit of a text
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_causal_attention(False)
    pooling = {"mean": "MEAN", "lasttoken": "LAST", "cls": "CLS"}[layout.pooling]
    writer.add_pooling_type(gguf.PoolingType[pooling])

    tokenizer, ids = AutoTokenizer.from_pretrained(encoder), range(config.vocab_size)
    special, types = set(tokenizer.added_tokens_decoder), gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(ids))
    writer.add_token_types([types.CONTROL if i in special else types.NORMAL for i in ids])
    vocabulary = gguf.SpecialVocab(encoder, load_merges=True)
    vocabulary.add_special_token = {"bos": False, "eos": True}
    vocabulary.add_to_gguf(writer, quiet=True)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, tensor in read_tensors(encoder):
        values = tensor.float().numpy()
        # As in llama.cpp, vectors stay F32, and rows not divisible into blocks of 32 are F16.
        dtype = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else kind]
        if dtype == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
            dtype = gguf.GGMLQuantizationType.F16
        target = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        writer.add_tensor(target, gguf.quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_server(folder: Path) -> Any:
    """Start llama.cpp's own server in this process on a free port; it tokenizes and pools."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(next(folder.glob("*.gguf")))
    params.embedding = True
    params.n_parallel = 1
    # Bidirectional attention needs the whole text in one batch.
    params.n_ctx = params.n_batch = params.n_ubatch = 4096
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.port = params.verbosity = 0
    return xllamacpp.Server(params)


def _read_gguf(folder: Path) -> Embed:
    server = llama_cpp_server(folder)

    def embed(texts: list[str]) -> np.ndarray:
        answer = server.handle_embeddings({"input": texts})
        if "data" not in answer:  # it does not truncate texts
            raise InputError(f"llama.cpp does not embed the test texts: {answer}")
        return np.array([row["embedding"] for row in answer["data"]], dtype=np.float32)

    return embed


FORMS = {
    "onnx": Form(_write_onnx, _read_onnx, 0.99999, ONNX),
    "onnx-int8": Form(partial(_write_onnx, int8=True), _read_onnx, 0.999, ONNX),
    "gguf": Form(partial(_write_gguf, "F32"), _read_gguf, 0.99999, GGUF),
    "gguf-f16": Form(partial(_write_gguf, "F16"), _read_gguf, 0.9999, GGUF),
    "gguf-q8_0": Form(partial(_write_gguf, "Q8_0"), _read_gguf, 0.999, GGUF),
}
