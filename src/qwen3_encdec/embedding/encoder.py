"""Embed texts with our own encoder, in packed batches that hold no padding.

Weights, tokenizer, pooling, prompts, length limit and width are those that sentence-transformers
reads from the folder, so embeddings of both can share one index. Tokenization runs ahead of the
model; batches are packed on the CPU and results stay on the device until a chunk ends.
"""

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply, send_to_device
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import Qwen3Config

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.conversion.extract import POOLING, extract_encoder, pooling_mode
from qwen3_encdec.data.collate import collate_packed
from qwen3_encdec.data.config import DataConfig, Source
from qwen3_encdec.data.corpus import open_corpus
from qwen3_encdec.folders import (
    InputError,
    check_finite,
    input_errors,
    load_whole,
    local_paths,
    read_json,
    read_optional,
    writing,
)
from qwen3_encdec.modeling_qwen3_encoder import Qwen3EncoderModel

_CHUNK = 4096
# Settings of sentence-transformers that change the tokens of a text.
_UNREAD = (
    "do_lower_case",
    "processing_kwargs",
    "query_length",
    "document_length",
    "query_expansion",
)
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokens(NamedTuple):
    """Token ids of texts, int32, and whether each text was cut."""

    ids: list[np.ndarray]
    cut: list[bool]


@dataclass(frozen=True)
class Layout:
    """Embedding settings of a sentence-transformers folder."""

    pooling: str
    normalize: bool
    max_tokens: int
    truncation_side: str
    width: int
    dimensions: int
    prompts: dict[str, str]
    default_prompt: str | None

    def prompt(self, name: str | None = None) -> str:
        """Return the prompt of a name or role, or the folder's default, or raise InputError."""
        name = self.default_prompt if name is None else name
        if name is not None and name not in self.prompts:
            names = ", ".join(self.prompts)
            raise InputError(f"prompt {name!r} is unknown; the model has: {names}")
        return "" if name is None else self.prompts[name] or ""


def read_layout(folder: Path) -> Layout:
    """Read an encoder folder as sentence-transformers does, whichever version wrote it.

    Raises InputError if a file is broken, or a module or pooling is not supported.
    """
    with input_errors(f"{folder} has malformed settings"):
        return _layout(folder)


def _layout(folder: Path) -> Layout:
    modules = read_json(folder / "modules.json", list)
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        listed = ", ".join(kinds)
        raise InputError(f"{folder} has modules {listed}; only Pooling and Normalize are supported")
    pooling = read_json(folder / modules[1]["path"] / "config.json")
    mode = pooling_mode(pooling)
    if mode not in POOLING.values() or not pooling.get("include_prompt", True):
        modes = ", ".join(POOLING)
        raise InputError(f"{folder}: pooling {mode!r} must be {modes} and include the prompt")
    transformer = read_optional(folder / "sentence_bert_config.json")
    if unread := [name for name in _UNREAD if transformer.get(name)]:
        raise InputError(f"{folder} sets {unread[0]}, which is not supported")
    tokenizer = read_optional(folder / "tokenizer_config.json")
    # Since 6.0 only the tokenizer has the limit.
    limit = transformer.get("max_seq_length") or tokenizer.get("model_max_length")
    config = Qwen3Config.from_pretrained(folder)
    longest, width = config.max_position_embeddings, config.hidden_size
    settings = read_optional(folder / "config_sentence_transformers.json")
    return Layout(
        pooling=mode,
        normalize=kinds[-1] == "Normalize",
        max_tokens=int(min(limit or longest, longest)),
        truncation_side=tokenizer.get("truncation_side", "right"),
        width=width,
        dimensions=min(settings.get("truncate_dim") or width, width),
        prompts={"query": "", "document": "", **(settings.get("prompts") or {})},
        default_prompt=settings.get("default_prompt_name"),
    )


class TextEncoder:
    """Embed texts with an encoder folder; `num_cut` counts the texts that were cut.

    Args:
        folder: Encoder written by `extract_encoder`, `finetune` or sentence-transformers, or an
            encoder-decoder (folder, checkpoint or run), whose encoder is extracted, mean-pooled.
        dtype: By default bfloat16 where the device computes it natively, else float32.
        device: By default CUDA, else the CPU; `torch.segment_reduce` has kernels for these alone.
        max_tokens: Tokens after which a text is cut; by default the folder's own limit.

    Raises InputError if `folder` is neither, or is causal or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.name = Path(folder).resolve().name
        best = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or best)
        self.dtype = dtype or (torch.bfloat16 if _computes_bfloat16(self.device) else torch.float32)
        self.num_cut = 0
        with encoder_folder(folder) as path:
            self.layout = read_layout(path)
            with input_errors(f"tokenizer of {path} cannot be read"):
                self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
            self.model = load_encoder(path, self.dtype).to(self.device)
        self.max_tokens = self.layout.max_tokens if max_tokens is None else max_tokens
        longest = self.model.config.max_position_embeddings
        if not 2 <= self.max_tokens <= longest:
            raise InputError(f"max_tokens {self.max_tokens} must be between 2 and {longest}")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_tokens, direction=self.layout.truncation_side)

    @property
    def batch_tokens(self) -> int:
        """Default tokens per batch: a CPU's cache holds no more, and without a varlen kernel the
        mask of a batch is quadratic.
        """
        has_kernel = self.device.type == "cuda" and self.dtype != torch.float32
        return 32_768 if has_kernel else 1024

    def tokenize(self, texts: Sequence[str], prompt: str = "", first: int = 1) -> Tokens:
        """Tokenize texts after a prompt, cut at `max_tokens`; safe to call from any thread.

        Raises InputError with the text's number, from `first`, if one is empty or not Unicode.
        """
        for number, text in enumerate(texts, first):
            if not isinstance(text, str):
                raise InputError(f"text {number} is {type(text).__name__}, not str")
            if not text.isascii() and (found := _SURROGATE.search(text)):
                raise InputError(
                    f"text {number} contains the lone surrogate {found[0]!a}, which is not valid "
                    "Unicode"
                )
        encodings = self.tokenizer.encode_batch_fast([prompt + text for text in texts])
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        for number, tokens in enumerate(ids, first):
            if not len(tokens):
                raise InputError(f"text {number} is empty and the tokenizer appends no EOS")
        return Tokens(ids, [bool(encoding.overflowing) for encoding in encodings])

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Embed texts in order: [texts, dimensions] float32, or [dimensions] for a single str.

        Args:
            texts: One text, or any number of them.
            prompt_name: One of the folder's prompts or a role, `"query"` or `"document"`.
            dimensions: Keep this many leading dimensions (Matryoshka), normalized again.
            batch_tokens: Approximate number of tokens per batch.
            progress: Show a progress bar on a terminal.

        Raises InputError if a text is not a str, or there is no such prompt or width.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt_name=prompt_name, dimensions=dimensions)[0]
        # A data frame or a dict would yield its keys, a set no order.
        unordered = isinstance(texts, Mapping | Set | bytes) or getattr(texts, "ndim", 1) != 1
        if unordered or not isinstance(texts, Iterable):
            raise InputError(f"texts must be a str or a list of them, got {type(texts).__name__}")
        texts, prompt = list(texts), self.layout.prompt(prompt_name)
        self.check_dimensions(dimensions)
        embeddings = np.empty((len(texts), dimensions or self.layout.dimensions), dtype=np.float32)
        done = 0
        with tqdm(total=len(texts), unit="text", disable=None if progress else True) as bar:
            for tokens in self._tokenize_ahead(texts, prompt):
                self.num_cut += sum(tokens.cut)
                rows = self._embed(tokens.ids, batch_tokens or self.batch_tokens)
                embeddings[done : done + len(rows)] = self.cut_to(rows, dimensions)
                done += len(rows)
                bar.update(len(rows))
        return embeddings

    def _tokenize_ahead(self, texts: Sequence[str], prompt: str) -> Iterator[Tokens]:
        """Tokenize chunk by chunk, each while the caller computes the one before it."""
        with ThreadPoolExecutor(1) as thread:
            ahead: list[Future[Tokens]] = []
            for start in range(0, len(texts), _CHUNK):
                chunk = texts[start : start + _CHUNK]
                ahead.append(thread.submit(self.tokenize, chunk, prompt, start + 1))
                if len(ahead) == 2:
                    yield ahead.pop(0).result()
            for tokens in ahead:
                yield tokens.result()

    def _embed(self, ids: Sequence[np.ndarray], budget: int) -> np.ndarray:
        """Embed a chunk of texts, [N, E] float32; wait for the device once, at the end."""
        batches = token_batches(np.array([len(text) for text in ids]), budget)
        rows = torch.cat([self.forward([ids[i] for i in batch]) for batch in batches])
        embeddings = np.empty(rows.shape, dtype=np.float32)
        embeddings[np.concatenate(batches)] = rows.cpu().numpy()
        return embeddings

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise InputError if `dimensions` is set and not in 1 ... width."""
        if dimensions is not None and not 1 <= dimensions <= self.layout.width:
            raise InputError(f"dimensions {dimensions} must be between 1 and {self.layout.width}")

    def cut_to(self, embeddings: np.ndarray, dimensions: int | None) -> np.ndarray:
        """Cut [N, E] embeddings to `dimensions` and normalize again, or by default to the folder's
        `truncate_dim` without normalizing again, as sentence-transformers does.
        """
        kept = embeddings[:, : dimensions or self.layout.dimensions]
        if dimensions is None or not self.layout.normalize:
            return kept
        return kept / np.linalg.norm(kept, axis=1, keepdims=True).clip(min=1e-12)

    @torch.inference_mode()
    def forward(self, ids: Sequence[np.ndarray]) -> torch.Tensor:
        """Embed a batch of int32 ids: [texts, E] float32 on the device, without synchronizing."""
        batch = pack(ids) | {"lengths": torch.tensor([len(text) for text in ids])}
        if self.device.type == "cuda":
            batch = recursively_apply(torch.Tensor.pin_memory, batch)
        batch = send_to_device(batch, self.device, non_blocking=True)
        lengths = batch.pop("lengths")
        states = self.model(**batch).last_hidden_state.flatten(0, 1)  # (M, E)
        ends = lengths.cumsum(0)
        if self.layout.pooling == "mean":
            pooled = torch.segment_reduce(states.float(), "mean", lengths=lengths, unsafe=True)
        else:
            last = self.layout.pooling == "lasttoken"
            pooled = states[ends - 1 if last else ends - lengths].float()
        return F.normalize(pooled, dim=-1) if self.layout.normalize else pooled


def pack(ids: Sequence[np.ndarray]) -> dict[str, Any]:
    """Build `Qwen3EncoderModel` inputs from ids: [B, S] if lengths are equal, else packed."""
    if len({len(text) for text in ids}) == 1:
        return {"input_ids": torch.from_numpy(np.stack(ids)).long()}
    batch = collate_packed(ids, [ids[0][:0]] * len(ids))
    names = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")
    return {name: batch[name] for name in names}


def token_batches(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Group text indices, longest first, into batches of about `budget` tokens or one text."""
    order = np.argsort(-lengths, kind="stable")
    batch = (lengths[order].cumsum() - lengths[order]) // budget
    return np.split(order, np.flatnonzero(np.diff(batch)) + 1)


@contextmanager
def encoder_folder(model: str | Path) -> Iterator[Path]:
    """Yield an encoder folder; extract a temporary one from an encoder-decoder (noted on stderr).

    Raises InputError if `model` is neither.
    """
    folder = Path(model)
    config = read_optional(folder / "config.json")
    kind = config.get("model_type")
    if kind == Qwen3EncoderDecoderConfig.model_type or (folder / "checkpoints").is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            extract_encoder(folder, encoder := Path(scratch) / "encoder")
            note = f"{folder} is an encoder-decoder: using its encoder, mean-pooled"
            print(note, file=sys.stderr)
            yield encoder
    elif (
        kind == "qwen3" and config.get("is_causal") is False and (folder / "modules.json").is_file()
    ):
        yield folder
    else:
        raise InputError(f"{folder} is not an encoder folder; make one with: qwen3-encdec extract")


def load_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3EncoderModel:
    """Load an encoder folder into our own encoder.

    Raises InputError as `load_whole` does, or if the configuration is not supported or a weight is
    not finite.
    """
    stock = Qwen3Config.from_pretrained(folder)
    same = {"vocab_size": stock.vocab_size, "pad_token_id": stock.pad_token_id}
    with input_errors(str(folder / "config.json")):
        config = Qwen3EncoderDecoderConfig.from_qwen3_config(stock, num_sentinel_tokens=0, **same)
    names = {r"^embed_tokens\.": "shared.", r"^(layers|norm)\.": r"encoder.\1."}
    model = load_whole(Qwen3EncoderModel, folder, config, dtype, key_mapping=names).eval()
    check_finite(folder, model.named_parameters())
    return model


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def read_texts(source: str, text_column: str = "text") -> list[str]:
    """Read texts from a file, a folder, a hub dataset, or the lines of standard input (`-`)."""
    if source == "-":
        with input_errors("standard input is not UTF-8"):
            return [line.rstrip("\r\n") for line in sys.stdin]
    corpus = open_corpus(Source([source], text_column=text_column), DataConfig())
    texts: list[Any] = [document.content for document in corpus.documents()]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"input {source} contains token ids from prepare-data; pass the texts")
    return texts


def _write_embeddings(path: Path, embeddings: np.ndarray, texts: Sequence[str]) -> None:
    """Write .npy, or .parquet with the columns `text` and `embedding`."""
    if path.suffix == ".npy":
        return np.save(path, embeddings)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    table = pa.table({"text": texts, "embedding": vectors})
    pq.write_table(table, path, row_group_size=_CHUNK)  # a row group needs its size in memory again


def embed_file(
    encoder: TextEncoder,
    source: str,
    output: str | Path,
    *,
    text_column: str = "text",
    prompt_name: str | None = None,
    dimensions: int | None = None,
) -> str:
    """Embed the texts of a file, write the output atomically, and return a one-line summary.

    Raises InputError if a file or setting is wrong, or if the output is part of the input.
    """
    output = Path(output)
    if output.suffix not in (".npy", ".parquet") or output.is_dir():
        raise InputError(f"output {output} must be a file ending in .npy or .parquet")
    place = output.resolve()
    inputs = {Path(path).resolve() for path in local_paths(source)}
    if output.suffix == ".parquet" and inputs & {place, *place.parents}:
        raise InputError(f"output {output} is part of the input {source}; choose another file")
    texts = read_texts(source, text_column)
    if not texts:
        raise InputError(f"input {source} contains no texts")
    building = output.with_name(f".partial.{output.name}")
    try:
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            building.touch()  # an output that cannot be written fails before the work
            embeddings = encoder.encode(
                texts, prompt_name=prompt_name, dimensions=dimensions, progress=True
            )
            _write_embeddings(building, embeddings, texts)
            building.replace(output)
    finally:
        with suppress(OSError):
            building.unlink()
    cut = f", {encoder.num_cut:,} cut at {encoder.max_tokens:,} tokens" if encoder.num_cut else ""
    kind = str(encoder.dtype).removeprefix("torch.")
    return f"{len(texts):,} texts in {kind}{cut}: {embeddings.shape} float32"
