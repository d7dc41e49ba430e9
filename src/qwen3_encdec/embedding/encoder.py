"""Texts -> embeddings, through our own encoder on ragged batches: sorted by length, cut by tokens,
no padding.

Weights, tokenizer, pooling and prompts are those that sentence-transformers reads from the folder:
embeddings of both can stand in one index.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import Qwen3Config

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.conversion.extract import POOLING, extract_encoder
from qwen3_encdec.folders import InputError, load_whole, read_json

SUFFIXES = (".npy", ".parquet")
PRECISIONS = ("float32", "int8", "binary")
_TOKENIZED_AT_ONCE = 4096


class TextEncoder:
    """An encoder folder as a function from texts to embeddings.

    Args:
        folder: What `extract_encoder` or `finetune` writes. Of an encoder-decoder (a folder,
            checkpoint or run), the encoder is taken out first and mean-pooled.
        dtype: None is bfloat16 where the device computes it natively, else float32.
        device: By default the accelerator, else the CPU.
        max_tokens: Tokens after which a text is cut; by default the folder's own limit.

    Attributes:
        prompts: What the folder puts before a text, by name.
        num_cut: Texts that were cut so far.

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
        self.name = Path(folder).name
        self._opened = ExitStack()  # what was extracted goes when the encoder goes
        self.folder = self._opened.enter_context(encoder_folder(folder))
        self.device = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
        self.dtype = dtype or (torch.bfloat16 if _computes_bfloat16(self.device) else torch.float32)
        self._read_modules()
        settings = read_json(self.folder / "sentence_bert_config.json")
        longest = read_json(self.folder / "config.json")["max_position_embeddings"]
        self.max_tokens = max_tokens or settings.get("max_seq_length") or longest
        if not 2 <= self.max_tokens <= longest:
            raise InputError(
                f"max tokens {self.max_tokens} must lie in 2 ... {longest}, the model's positions"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # `tokenizers` raises bare exceptions
            raise InputError(
                f"{self.folder} holds a tokenizer that cannot be read: {error}"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.max_tokens)
        self.num_cut = 0

    def _read_modules(self) -> None:
        kinds = [
            module["type"].rpartition(".")[2] for module in read_json(self.folder / "modules.json")
        ]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise InputError(
                f"{self.folder} has the modules {', '.join(kinds)}; only pooling and normalization are known"
            )
        self.normalize = kinds[-1] == "Normalize"
        pooling = read_json(self.folder / "1_Pooling" / "config.json")
        self.pooling = pooling.get("pooling_mode")
        if self.pooling not in POOLING.values() or not pooling.get("include_prompt", True):
            raise InputError(
                f"{self.folder / '1_Pooling'} pools in another way than {', '.join(POOLING)}"
            )
        self.prompts: dict[str, str] = (
            read_json(self.folder / "config_sentence_transformers.json").get("prompts") or {}
        )

    @cached_property
    def model(self) -> Qwen3EncoderModel:
        """The encoder, loaded on first use. Raises InputError as `load_encoder`."""
        return load_encoder(self.folder, self.dtype).to(self.device)

    @property
    def dimensions(self) -> int:
        """Width of an embedding."""
        return read_json(self.folder / "config.json")["hidden_size"]

    def tokenize(self, texts: Sequence[str], prompt_name: str | None = None) -> list[np.ndarray]:
        """Ids of each text with its prompt, int32, cut at `max_tokens`.

        Raises:
            InputError: the folder has no such prompt, or a text has no tokens at all.
        """
        prompt = ""
        if prompt_name is not None:
            if prompt_name not in self.prompts:
                raise InputError(
                    f"prompt {prompt_name!r} is none of {self.name}'s: {', '.join(self.prompts) or 'none'}"
                )
            prompt = self.prompts[prompt_name]
        ids = []
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            chunk = [prompt + text for text in texts[start : start + _TOKENIZED_AT_ONCE]]
            for encoding in self._tokenizer.encode_batch_fast(chunk):
                self.num_cut += bool(encoding.overflowing)
                ids.append(np.array(encoding.ids, dtype=np.int32))
                if not len(encoding.ids):
                    raise InputError(
                        f"text {len(ids)} is empty, and this tokenizer ends texts with no token to embed"
                    )
        return ids

    def embed(
        self,
        ids: Sequence[np.ndarray],
        *,
        dimensions: int | None = None,
        batch_tokens: int | None = None,
        processes: int = 1,
        progress: bool = False,
    ) -> np.ndarray:
        """Embeddings of tokenized texts.

        Args:
            ids: From `tokenize`; any order and lengths.
            dimensions: Keep this many leading dimensions (of a model trained for that), at length 1
                again.
            batch_tokens: Most tokens computed at a time, but for a longer text; by default what
                suits the device.
            processes: Each has the model and its share of the cores, or an accelerator of its own.
            progress: Draw a bar on standard error.

        Returns:
            [texts, dimensions] float32, in the order of `ids`.

        Raises:
            InputError: more dimensions than there are.
        """
        if dimensions is not None and not 1 <= dimensions <= self.dimensions:
            raise InputError(f"dimensions {dimensions} must lie in 1 ... {self.dimensions}")
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        # On a CPU, tensors that fit near the cores and in memory that is reused: larger ones cost
        # page faults.
        budget = batch_tokens or (1024 if self.device.type == "cpu" else 32_768)
        batches = list(token_batches(lengths, budget))
        embeddings = np.empty((len(ids), dimensions or self.dimensions), dtype=np.float32)
        with tqdm(
            total=int(lengths.sum()), unit="tok", unit_scale=True, disable=not progress
        ) as bar:
            computed = self._compute([[ids[i] for i in rows] for rows in batches], processes)
            for rows, states in zip(batches, computed, strict=True):
                embeddings[rows] = states[:, : embeddings.shape[1]]
                bar.update(int(lengths[rows].sum()))
        if self.normalize and dimensions is not None:
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True).clip(min=1e-12)
        return embeddings

    def encode(
        self, texts: Sequence[str], *, prompt_name: str | None = None, **options
    ) -> np.ndarray:
        """`tokenize` and `embed` in one."""
        return self.embed(self.tokenize(texts, prompt_name), **options)

    def _compute(
        self, batches: Sequence[Sequence[np.ndarray]], processes: int
    ) -> Iterator[np.ndarray]:
        if processes == 1:
            yield from map(self.forward, batches)
            return
        context = multiprocessing.get_context("spawn")
        ranks = context.SimpleQueue()
        for rank in range(processes):
            ranks.put(rank)
        arguments = (self.folder, self.dtype, self.device.type, processes, ranks)
        with ProcessPoolExecutor(
            processes, context, initializer=_start_worker, initargs=arguments
        ) as pool:
            yield from pool.map(_forward_in_worker, batches)

    @torch.inference_mode()
    def forward(self, ids: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings, [texts, dimensions] float32, of texts that are computed together."""
        lengths = torch.tensor([len(text) for text in ids])
        row = torch.from_numpy(np.concatenate(ids)).long()[None]
        if bool((lengths == lengths[0]).all()):  # attention then runs over all texts at once
            batch = {"input_ids": row.view(len(ids), -1)}
        else:
            ends = lengths.cumsum(0)
            starts = (ends - lengths).repeat_interleave(lengths)
            batch = {
                "input_ids": row,
                "position_ids": (torch.arange(row.shape[1]) - starts)[None],
                "cu_seqlens": F.pad(ends, (1, 0)).int(),
            }
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            batch["max_seqlen"] = int(lengths.max())
        states = self.model(**batch).last_hidden_state.flatten(0, 1)
        lengths = lengths.to(self.device)
        if self.pooling == "mean":
            pooled = torch.segment_reduce(states.float(), "mean", lengths=lengths)
        else:
            ends = lengths.cumsum(0)
            pooled = states[ends - 1 if self.pooling == "lasttoken" else ends - lengths].float()
        return (F.normalize(pooled, dim=-1) if self.normalize else pooled).cpu().numpy()


@contextmanager
def encoder_folder(model: str | Path) -> Iterator[Path]:
    """The encoder folder `model`; of an encoder-decoder a temporary one with its encoder, and that
    is said.

    Raises:
        InputError: it is neither.
    """
    folder = Path(model)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (
        config.get("model_type") == Qwen3EncoderDecoderConfig.model_type
        or (folder / "checkpoints").is_dir()
    ):
        with tempfile.TemporaryDirectory() as scratch:
            extract_encoder(folder, encoder := Path(scratch) / "encoder")
            print(
                f"{folder} is an encoder-decoder: its encoder, mean-pooled, was taken out",
                file=sys.stderr,
            )
            yield encoder
        return
    if (
        config.get("model_type") != "qwen3"
        or config.get("is_causal", True)
        or not (folder / "modules.json").is_file()
    ):
        raise InputError(f"{folder} is no encoder folder; make one with: qwen3-encdec extract")
    yield folder


# What `Qwen3EncoderModel` calls the tensors of an encoder folder.
ENCODER_NAMES = {r"^embed_tokens\.": "shared.", r"^(layers|norm)\.": r"encoder.\1."}


def load_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3EncoderModel:
    """Our own encoder with the weights of an encoder folder. Raises InputError as `load_whole`."""
    source = Qwen3Config.from_pretrained(folder)
    ids = {
        "vocab_size": source.vocab_size,
        "num_sentinel_tokens": 0,
        "pad_token_id": source.pad_token_id,
    }
    config = Qwen3EncoderDecoderConfig.from_qwen3_config(source, **ids)
    return load_whole(Qwen3EncoderModel, folder, config, dtype, key_mapping=ENCODER_NAMES).eval()


def token_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Indices of texts that are computed together, longest first:

    at most `budget` tokens, but at least one text.
    """
    order = np.argsort(-lengths, kind="stable")
    start = tokens = 0
    for place, length in enumerate(lengths[order]):
        if tokens and tokens + length > budget:
            yield order[start:place]
            start, tokens = place, 0
        tokens += length
    if len(order):
        yield order[start:]


_WORKER: list[TextEncoder] = []


def _start_worker(folder: Path, dtype: torch.dtype, device: str, processes: int, ranks) -> None:
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    else:
        device = f"{device}:{ranks.get() % torch.accelerator.device_count()}"
    _WORKER.append(TextEncoder(folder, dtype=dtype, device=device))


def _forward_in_worker(ids: Sequence[np.ndarray]) -> np.ndarray:
    return _WORKER[0].forward(ids)


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
        from qwen3_encdec.data.corpus import Tokenized, open_corpus

        texts = []
        for shard in open_corpus([source], text_column=text_column):
            for block in shard.blocks():
                if isinstance(block, Tokenized):
                    raise InputError(f"input {source} holds token ids of prepare-data, not texts")
                texts += [document.text for document in block]
    if not texts:
        raise InputError(f"input {source} holds no texts")
    return texts


def quantize(
    embeddings: np.ndarray, precision: str, ranges: np.ndarray | None = None
) -> np.ndarray:
    """[N, d] float32 -> the same; int8 [N, d] over each dimension's `ranges` [2, d]; or binary, [N,
    d / 8] int8.

    sentence-transformers' own formats, which vector stores and its search functions read.
    """
    from sentence_transformers.util.quantization import quantize_embeddings

    return np.asarray(quantize_embeddings(embeddings, precision, ranges=ranges))  # type: ignore[arg-type]


def int8_ranges(embeddings: np.ndarray) -> np.ndarray:
    """Least and largest value of each dimension, [2, d] float32: what int8 spans."""
    return np.stack([embeddings.min(0), embeddings.max(0)])


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

                vectors = pa.FixedSizeListArray.from_arrays(
                    pa.array(embeddings.ravel()), embeddings.shape[1]
                )
                pq.write_table(
                    pa.table({"text": pa.array(texts, pa.string()), "embedding": vectors}), file
                )
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

    `ranges` are those of an earlier file, so that both can be searched together. Returns what was
    done, in a sentence.

    Raises:
        InputError: a folder, file or setting that is not right (see `TextEncoder`, `read_texts`);
            nothing is written.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES or output.is_dir():
        raise InputError(f"output {output} must be a file ending in {' or '.join(SUFFIXES)}")
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    encoder = TextEncoder(model, dtype=dtype, max_tokens=max_tokens)
    width = dimensions or encoder.dimensions
    spans = None
    if ranges is not None:
        try:
            spans = np.load(ranges)
        except (OSError, ValueError) as error:
            raise InputError(f"ranges {ranges} cannot be read: {error}") from None
        if spans.shape != (2, width) or precision != "int8":
            raise InputError(
                f"ranges {ranges} of shape {spans.shape} do not fit {width} dimensions in {precision}"
            )
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
    return f"{len(texts):,} texts in {str(encoder.dtype).removeprefix('torch.')}{cut}: {embeddings.shape} {precision}"


def similarity_table(
    encoder: TextEncoder, texts: Sequence[str], prompt_name: str | None = None
) -> str:
    """Cosines of all pairs of texts, as lines for a terminal."""
    embeddings = encoder.encode(texts, prompt_name=prompt_name)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True).clip(min=1e-12)
    lines = ["    " + "".join(f"{i:>7}" for i in range(1, len(texts) + 1))]
    for number, (row, text) in enumerate(zip(embeddings @ embeddings.T, texts, strict=True), 1):
        lines.append(
            f"{number:>4}"
            + "".join(f"{cosine:7.3f}" for cosine in row)
            + f"   {' '.join(text.split())[:60]}"
        )
    return "\n".join(lines)
