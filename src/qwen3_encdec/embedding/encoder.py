"""Embed texts with our own encoder, in packed batches that hold no padding.

Weights, tokenizer, pooling, prompts, length limit and width are those that sentence-transformers
reads from the folder, so embeddings of both can stand in one index. Tokenization runs
ahead of the model; batches are packed on the CPU and results stay on the device until a chunk ends.
"""

import itertools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply, send_to_device
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import Qwen3Config

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.conversion.extract import POOLING, POOLING_FLAGS, extract_encoder
from qwen3_encdec.data.config import DataConfig, Source
from qwen3_encdec.data.corpus import open_corpus
from qwen3_encdec.folders import InputError, default_device, load_whole, read_json
from qwen3_encdec.modeling_qwen3_encoder import Qwen3EncoderModel

SUFFIXES = (".npy", ".parquet")
PRECISIONS = ("float32", "int8", "binary")
_CHUNK = 4096


class Tokens(NamedTuple):
    """Token ids of texts, int32, and which texts were cut."""

    ids: list[np.ndarray]
    cut: list[bool]


@dataclass(frozen=True)
class Layout:
    """Everything a sentence-transformers folder says about its embeddings."""

    pooling: str
    normalize: bool
    max_tokens: int
    width: int
    truncate_dim: int | None
    prompts: dict[str, str]
    default_prompt: str | None

    def prompt(self, name: str | None = None) -> str:
        """Return the prompt of a name, else the folder's default one; a role is a name as well.

        Raises:
            InputError: no prompt has that name.
        """
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known_names = ", ".join(self.prompts) or "none"
            raise InputError(f"prompt {name!r} is not one of the model's: {known_names}")
        return self.prompts[name]


def read_layout(folder: Path) -> Layout:
    """Read an encoder folder as sentence-transformers does, whichever version wrote it.

    Before 6.0 the length limit is `max_seq_length` of `sentence_bert_config.json`; since then it is
    the tokenizer's `model_max_length` alone.

    Raises:
        InputError: a file is broken, or a module or pooling is not one of ours.
    """
    modules = read_json(folder / "modules.json")
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        listed = ", ".join(kinds)
        raise InputError(f"{folder} has the modules {listed}; only pooling and normalization work")
    config = read_json(folder / "config.json")
    transformer = read_json(folder / "sentence_bert_config.json")
    settings = read_json(folder / "config_sentence_transformers.json")
    longest = config["max_position_embeddings"]
    limit = transformer.get("max_seq_length")
    if limit is None and (folder / "tokenizer_config.json").is_file():
        limit = read_json(folder / "tokenizer_config.json").get("model_max_length")
    if transformer.get("do_lower_case"):
        raise InputError(f"{folder} lowers the case of its texts, which is not supported")
    return Layout(
        pooling=_read_pooling(folder / modules[1]["path"]),
        normalize=kinds[-1] == "Normalize",
        max_tokens=int(min(limit or longest, longest)),
        width=config["hidden_size"],
        truncate_dim=settings.get("truncate_dim"),
        prompts={"query": "", "document": ""} | (settings.get("prompts") or {}),
        default_prompt=settings.get("default_prompt_name"),
    )


def _read_pooling(folder: Path) -> str:
    pooling = read_json(folder / "config.json")
    mode = pooling.get("pooling_mode")
    if mode is None:  # before 5.3: one flag a mode
        on = [mode for mode, flag in POOLING_FLAGS.items() if pooling.get(f"pooling_mode_{flag}")]
        mode = on[0] if len(on) == 1 else on
    if mode not in POOLING.values() or not pooling.get("include_prompt", True):
        raise InputError(f"{folder} pools in another way than {', '.join(POOLING)}")
    return mode


class TextEncoder:
    """An encoder folder as a function from texts to embeddings.

    Args:
        folder: Written by `extract_encoder`, `finetune` or sentence-transformers. Of an
            encoder-decoder (a folder, checkpoint or run) the encoder is extracted, mean-pooled.
        dtype: None is bfloat16 where the device computes it natively, else float32.
        device: By default the accelerator, else the CPU.
        max_tokens: Tokens after which a text is cut; by default the folder's own limit.

    Attributes:
        layout: Pooling, prompts, limits of the folder.
        num_cut: Texts that `encode` has cut so far.

    Raises:
        InputError: `folder` is neither, is causal or damaged, or has modules besides pooling and
            normalization.
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
        self._opened = ExitStack()  # an extracted encoder lives as long as this object
        self.folder = self._opened.enter_context(encoder_folder(folder))
        self.device = torch.device(device or default_device())
        self.dtype = dtype or (torch.bfloat16 if _computes_bfloat16(self.device) else torch.float32)
        self.layout = read_layout(self.folder)
        self.max_tokens = self.layout.max_tokens if max_tokens is None else max_tokens
        longest = read_json(self.folder / "config.json")["max_position_embeddings"]
        if not 2 <= self.max_tokens <= longest:
            raise InputError(
                f"max tokens {self.max_tokens} must lie in 2 ... {longest}, the model's positions"
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # `tokenizers` raises bare exceptions
            raise InputError(f"{self.folder}: the tokenizer cannot be read: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_tokens)
        self.num_cut = 0

    @cached_property
    def model(self) -> Qwen3EncoderModel:
        """The encoder, loaded on first use. Raises InputError as `load_encoder`."""
        return load_encoder(self.folder, self.dtype).to(self.device)

    @property
    def dimensions(self) -> int:
        """Width of an embedding unless another is asked for."""
        return self.layout.truncate_dim or self.layout.width

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch that suit the device.

        On a CPU larger activations leave the cache and cost page faults.
        """
        return 1024 if self.device.type == "cpu" else 32_768

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> Tokens:
        """Token ids of texts behind a prompt, cut at `max_tokens`; safe to call from any thread.

        Raises:
            InputError: something is not a text, or a text has no tokens at all.
        """
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str):
                raise InputError(f"text {number} is {type(text).__name__}, not str")
        try:
            encodings = self.tokenizer.encode_batch_fast([prompt + text for text in texts])
        except (TypeError, ValueError, UnicodeError):
            self._refuse_surrogates(texts)
            raise
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        for number, tokens in enumerate(ids, 1):
            if not len(tokens):
                raise InputError(f"text {number} is empty and the tokenizer appends no EOS")
        return Tokens(ids, [bool(encoding.overflowing) for encoding in encodings])

    def _refuse_surrogates(self, texts: Sequence[str]) -> None:
        for number, text in enumerate(texts, 1):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                found = ascii(text[error.start])
                raise InputError(
                    f"text {number} holds the lone surrogate {found}, which is not Unicode text"
                ) from None

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        batch_tokens: int | None = None,
        processes: int = 1,
        progress: bool = False,
    ) -> np.ndarray:
        """Embed texts.

        Args:
            texts: One text, or any number of them.
            prompt_name: Of the folder's prompts; every folder has `"query"` and `"document"`, the
                two roles. By default its default prompt, if it has one.
            dimensions: Keep this many leading dimensions (Matryoshka), normalized again.
            batch_tokens: Most tokens of a batch that holds more than one text.
            processes: Each has the model and its share of the cores, or its own accelerator.
            progress: Draw a bar on standard error.

        Returns:
            [texts, dimensions] float32 in the order of `texts`; [dimensions] of one text.

        Raises:
            InputError: a text is not a str, no such prompt, or more dimensions than there are.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt_name=prompt_name, dimensions=dimensions)[0]
        if texts is None or not isinstance(texts, Iterable):
            raise InputError(f"texts must be a str or a list of them, got {type(texts).__name__}")
        texts = list(texts)
        prompt = self.layout.prompt(prompt_name)
        self.check_dimensions(dimensions)
        budget = batch_tokens or self.batch_tokens
        parts = [np.empty((0, dimensions or self.dimensions), dtype=np.float32)]
        bar = tqdm(total=len(texts), unit="text", unit_scale=True, disable=not progress)
        with bar, _forwards(self, processes) as forward:
            for tokens in self._chunks(texts, prompt):
                self.num_cut += sum(tokens.cut)
                parts.append(self.cut_to(_embed_chunk(tokens.ids, budget, forward), dimensions))
                bar.update(len(tokens.ids))
        return np.concatenate(parts)

    def _chunks(self, texts: Sequence[str], prompt: str) -> Iterator[Tokens]:
        """Tokenize chunk by chunk, in a thread that runs ahead of the model."""
        chunks = [texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]
        with ThreadPoolExecutor(1) as ahead:
            yield from ahead.map(self.tokenize, chunks, itertools.repeat(prompt))

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise InputError unless an embedding has that many dimensions."""
        if dimensions is not None and not 1 <= dimensions <= self.layout.width:
            raise InputError(f"dimensions {dimensions} must lie in 1 ... {self.layout.width}")

    def cut_to(self, embeddings: np.ndarray, dimensions: int | None) -> np.ndarray:
        """Cut [N, E] embeddings.

        To the folder's own `truncate_dim` without a new norm, as sentence-transformers does; to
        `dimensions` that a caller asks for, normalized again.
        """
        if dimensions is None:
            return embeddings[:, : self.dimensions]
        embeddings = embeddings[:, :dimensions]
        if not self.layout.normalize:
            return embeddings
        return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).clip(min=1e-12)

    @torch.inference_mode()
    def forward(self, ids: Sequence[np.ndarray]) -> torch.Tensor:
        """Embed the tokens of texts that are computed together.

        Args:
            ids: Token ids of each text, int32.

        Returns:
            [texts, E] float32 on the device: nothing here waits for it.
        """
        lengths = torch.tensor([len(text) for text in ids])
        ends = lengths.cumsum(0)
        batch = pack(ids)
        batch |= {"lengths": lengths, "last": ends - 1, "first": ends - lengths}
        if self.device.type != "cpu":
            batch = recursively_apply(torch.Tensor.pin_memory, batch)
        batch = send_to_device(batch, self.device, non_blocking=True)
        lengths, last, first = (batch.pop(name) for name in ("lengths", "last", "first"))
        states = self.model(**batch).last_hidden_state.flatten(0, 1)  # (M, E)
        if self.layout.pooling == "mean":
            pooled = torch.segment_reduce(states.float(), "mean", lengths=lengths, unsafe=True)
        else:
            pooled = states[last if self.layout.pooling == "lasttoken" else first].float()
        return F.normalize(pooled, dim=-1) if self.layout.normalize else pooled


def pack(ids: Sequence[np.ndarray]) -> dict[str, Any]:
    """Make a batch of texts on the CPU: packed, or a plain [B, S] one where lengths are equal.

    Args:
        ids: Token ids of each text, int32.

    Returns:
        Arguments of `Qwen3EncoderModel`.
    """
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    row = torch.from_numpy(np.concatenate(ids)).long()
    if (lengths == lengths[0]).all():
        return {"input_ids": row.view(len(ids), -1)}
    bounds = np.concatenate([[0], lengths.cumsum()])
    positions = np.arange(len(row)) - bounds[:-1].repeat(lengths)
    return {
        "input_ids": row[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seqlens": torch.from_numpy(bounds).int(),
        "max_seqlen": int(lengths.max()),
    }


def _embed_chunk(ids: Sequence[np.ndarray], budget: int, forward: Any) -> np.ndarray:
    """[N, E] float32 of one chunk of texts; the device is waited for once, at the end."""
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    batches = list(token_batches(lengths, budget))
    rows = torch.cat(list(forward([[ids[i] for i in batch] for batch in batches])))
    embeddings = np.empty(rows.shape, dtype=np.float32)
    embeddings[np.concatenate(batches)] = rows.cpu().numpy()
    return embeddings


@contextmanager
def _forwards(encoder: TextEncoder, processes: int) -> Iterator[Any]:
    """A function from batches to their embeddings, in this process or in several others."""
    if processes == 1:
        yield lambda batches: map(encoder.forward, batches)
        return
    context = multiprocessing.get_context("spawn")
    ranks = context.SimpleQueue()
    for rank in range(processes):
        ranks.put(rank)
    arguments = (encoder.folder, encoder.dtype, encoder.device.type, processes, ranks)
    with ProcessPoolExecutor(
        processes, context, initializer=_start_worker, initargs=arguments
    ) as pool:
        yield lambda batches: map(torch.from_numpy, pool.map(_forward_in_worker, batches))


_WORKER: list[TextEncoder] = []


def _start_worker(folder: Path, dtype: torch.dtype, device: str, processes: int, ranks) -> None:
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    else:
        device = f"{device}:{ranks.get() % torch.accelerator.device_count()}"
    _WORKER.append(TextEncoder(folder, dtype=dtype, device=device))


def _forward_in_worker(ids: Sequence[np.ndarray]) -> np.ndarray:
    return _WORKER[0].forward(ids).cpu().numpy()


def token_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Indices of texts that are computed together, longest first: at most `budget` tokens, at
    least one text.
    """
    order = np.argsort(-lengths, kind="stable")
    start = tokens = 0
    for position, length in enumerate(lengths[order]):
        if tokens and tokens + length > budget:
            yield order[start:position]
            start, tokens = position, 0
        tokens += length
    if len(order):
        yield order[start:]


@contextmanager
def encoder_folder(model: str | Path) -> Iterator[Path]:
    """Yield an encoder folder; of an encoder-decoder a temporary one, and say so on stderr.

    Raises:
        InputError: `model` is neither.
    """
    folder = Path(model)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind = config.get("model_type")
    if kind == Qwen3EncoderDecoderConfig.model_type or (folder / "checkpoints").is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            extract_encoder(folder, encoder := Path(scratch) / "encoder")
            said = f"{folder} is an encoder-decoder: using its encoder, mean-pooled"
            print(said, file=sys.stderr)
            yield encoder
        return
    bidirectional = kind == "qwen3" and config.get("is_causal", True) is False
    if not bidirectional or not (folder / "modules.json").is_file():
        raise InputError(f"{folder} is not an encoder folder; make one with: qwen3-encdec extract")
    yield folder


ENCODER_NAMES = {r"^embed_tokens\.": "shared.", r"^(layers|norm)\.": r"encoder.\1."}
"""Names of an encoder folder's tensors, as patterns, to those of `Qwen3EncoderModel`."""


def load_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3EncoderModel:
    """Load our own encoder with the weights of an encoder folder.

    Raises InputError as `load_whole`.
    """
    stock = Qwen3Config.from_pretrained(folder)
    config = Qwen3EncoderDecoderConfig.from_qwen3_config(
        stock,
        vocab_size=stock.vocab_size,
        num_sentinel_tokens=0,
        pad_token_id=stock.pad_token_id,
    )
    return load_whole(Qwen3EncoderModel, folder, config, dtype, key_mapping=ENCODER_NAMES).eval()


def states_under(encoder: Qwen3EncoderModel, ids: torch.Tensor, causal: bool) -> torch.Tensor:
    """Last hidden states, [B, S, E], of [B, S] ids without padding; causal is the control, another
    reader's mistake.
    """
    size = ids.shape[1]
    seen = torch.ones(len(ids), 1, size, size, dtype=torch.bool, device=ids.device)
    mask = seen.tril() if causal else seen
    return encoder(input_ids=ids, attention_mask=mask).last_hidden_state


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def read_texts(source: str, text_column: str = "text") -> list[str]:
    """Texts of a .txt, .jsonl or .parquet file (.gz and .zst too), a folder, a hub dataset, or `-`,
    the lines of stdin.

    Raises:
        InputError: it cannot be read, holds no texts, or none in that column.
    """
    if source == "-":
        texts = [line.rstrip("\r\n") for line in sys.stdin]
    else:
        corpus = open_corpus(Source([source], text_column=text_column), DataConfig())
        texts = []
        for document in corpus.documents():
            if not isinstance(document.content, str):
                raise InputError(f"input {source} holds token ids of prepare-data, not texts")
            texts.append(document.content)
    if not texts:
        raise InputError(f"input {source} holds no texts")
    return texts


def quantize(
    embeddings: np.ndarray, precision: str, ranges: np.ndarray | None = None
) -> np.ndarray:
    """Quantize [N, d] float32 into sentence-transformers' own formats.

    int8 is [N, d] over each dimension's `ranges` [2, d], values outside them clipped (they would
    wrap around); binary is [N, d / 8].
    """
    from sentence_transformers.util.quantization import quantize_embeddings

    if ranges is not None:
        embeddings = np.clip(embeddings, *ranges)
    options: Any = {"precision": precision, "ranges": ranges}
    return np.asarray(quantize_embeddings(embeddings, **options))


def int8_ranges(embeddings: np.ndarray) -> np.ndarray:
    """Least and largest value of each dimension, [2, d] float32.

    Raises InputError if one of them has no width: what int8 makes of it is noise.
    """
    ranges = np.stack([embeddings.min(0), embeddings.max(0)])
    check_ranges(ranges, f"of {len(embeddings):,} texts")
    return ranges


def check_ranges(ranges: np.ndarray, origin: str) -> None:
    """Raise InputError unless int8 ranges are finite and every dimension has some width."""
    flat = int((~(ranges[1] > ranges[0]) | ~np.isfinite(ranges).all(0)).sum())
    if flat:
        raise InputError(
            f"int8 ranges {origin} have no width in {flat} of {ranges.shape[1]} dimensions; "
            "embed more texts, or name the ranges of a larger file with --ranges"
        )


def write_embeddings(path: str | Path, embeddings: np.ndarray, texts: Iterable[str]) -> None:
    """Write .npy, or .parquet with the columns `text` and `embedding`: whole, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with building.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, embeddings)
            else:
                import pyarrow as pa
                import pyarrow.parquet as pq

                flat = pa.array(embeddings.ravel())
                vectors = pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])
                columns = {"text": pa.array(texts, pa.string()), "embedding": vectors}
                pq.write_table(pa.table(columns), file)
        os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)


def embed_file(
    model: str | Path,
    source: str,
    output: str | Path,
    *,
    text_column: str = "text",
    prompt_name: str | None = None,
    precision: str = "float32",
    ranges: str | Path | None = None,
    dimensions: int | None = None,
    max_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    processes: int = 1,
) -> str:
    """Embed a file of texts into another file; int8 writes its ranges beside it, as `.ranges.npy`.

    `ranges` are those of an earlier file, so that both can be searched together. Returns a
    one-line summary.

    Raises:
        InputError: a folder, file or setting is wrong (see `TextEncoder`, `read_texts`); nothing
            is written.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES or output.is_dir():
        raise InputError(f"output {output} must be a file ending in {' or '.join(SUFFIXES)}")
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    encoder = TextEncoder(model, dtype=dtype, max_tokens=max_tokens)
    encoder.check_dimensions(dimensions)
    width = dimensions or encoder.dimensions
    spans = _read_ranges(ranges, width, precision) if ranges is not None else None
    texts = read_texts(source, text_column)
    embeddings = encoder.encode(
        texts,
        prompt_name=prompt_name,
        dimensions=dimensions,
        processes=processes,
        progress=sys.stderr.isatty(),
    )
    if precision == "int8" and spans is None:
        spans = int8_ranges(embeddings)
        write_embeddings(output.with_suffix(".ranges.npy"), spans, [])
    if precision != "float32":
        embeddings = quantize(embeddings, precision, spans)
    write_embeddings(output, embeddings, texts)
    cut = f", {encoder.num_cut:,} cut at {encoder.max_tokens:,} tokens" if encoder.num_cut else ""
    kind = str(encoder.dtype).removeprefix("torch.")
    return f"{len(texts):,} texts in {kind}{cut}: {embeddings.shape} {precision}"


def _read_ranges(file: str | Path, width: int, precision: str) -> np.ndarray:
    try:
        ranges = np.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"ranges {file} cannot be read: {error}") from None
    if ranges.shape != (2, width) or precision != "int8":
        raise InputError(
            f"ranges {file} of shape {ranges.shape} do not fit {width} dimensions in {precision}"
        )
    check_ranges(ranges, f"in {file}")
    return ranges


def similarity_table(
    encoder: TextEncoder, texts: Sequence[str], prompt_name: str | None = None
) -> str:
    """Cosines of all pairs of texts, as lines for a terminal."""
    embeddings = encoder.encode(list(texts), prompt_name=prompt_name)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True).clip(min=1e-12)
    lines = ["    " + "".join(f"{number:>7}" for number in range(1, len(texts) + 1))]
    for number, row in enumerate(embeddings @ embeddings.T):
        cosines = "".join(f"{cosine:7.3f}" for cosine in row)
        label = " ".join(texts[number].split())[:60]
        lines.append(f"{number + 1:>4}{cosines}   {label}")
    return "\n".join(lines)
