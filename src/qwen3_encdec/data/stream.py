"""The training stream: documents to packed UL2 rows, with a state that resumes it exactly and at once.

Everything is done block by block, a block being the documents of about a megabyte of text that follow each other in a
shard. The rows of a block are a pure function of (seed, epoch, shard, block), so the state is four integers: epoch,
place in the epoch's shard order, block, and rows already given. To resume is to seek to that shard (see `sources`) and
make one block again.

Each document is used once an epoch, whatever the number of ranks and workers: shards are dealt out to them, or, where
there are too few shards to go round, the documents of every block. Each reader goes on to its next epoch by itself.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.packing import Row, pack
from qwen3_encdec.data.sources import SHARD_BYTES, Document, Shard, Texts, open_corpus
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.data.ul2 import Example, check_capacity, corrupt, draw_denoiser, example_rng, raw_length
from qwen3_encdec.files import InputError

_SHARDS_PER_CONSUMER = 4
_HELDOUT_SEED = 2**64  # no training seed


class UL2Stream(IterableDataset):
    """Rows (lists of `Example`) for one rank, forever or for some epochs.

    `counts` says what became of the documents read so far in this process: `documents` = `used` + `refused` (too
    short) + `heldout`, and their `tokens` and `refused_tokens`. A resumed stream counts on.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
    ) -> None:
        self.config, self.epochs = config, epochs
        self.rank, self.world_size = rank, world_size
        self.sentinel_ids = _sentinels(config, tokenizer)
        self.eos_id = int(tokenizer.eos_token_id)
        self.shards = open_corpus(config.inputs, text_column=config.text_column, hub_split=config.hub_split)
        self.encode = Encoder(tokenizer)
        self.counts: Counter[str] = Counter()
        self._preset = config.denoisers
        self._lengths = [raw_length(d, config.source_length, config.target_length) for d in self._preset]
        fingerprint = hashlib.sha256()
        for part in (config, self.sentinel_ids.tolist(), self.eos_id, *self.shards):
            fingerprint.update(repr(part).encode())
        self._fingerprint = fingerprint.hexdigest()[:16]
        self._state: dict[str, Any] = self._fresh()
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as JSON: valid for this config, corpus and number of ranks and workers."""
        return dict(self._loaded or self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state at the next iteration. Raises InputError if it is of another stream."""
        if state["stream"] != self._fingerprint:
            raise InputError("the saved place in the data is of another corpus, data config or tokenizer")
        self._loaded = dict(state)

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        consumer, consumers = self.rank * workers + number, self.world_size * workers
        state = self._loaded or self._fresh()
        if state["consumers"] not in (None, [consumer, consumers]):
            raise InputError(
                f"the saved place in the data is of reader {state['consumers'][0]} of {state['consumers'][1]}, "
                f"this is {consumer} of {consumers}: resume with as many ranks and workers"
            )
        self._loaded = None
        state["consumers"] = [consumer, consumers]
        self.counts = Counter(state["counts"])
        deal_documents = len(self.shards) < _SHARDS_PER_CONSUMER * consumers
        self._state = dict(state)
        rows_given = state["epoch"] + state["shard"] + state["block"] + state["row"]
        while self.epochs is None or state["epoch"] < self.epochs:
            order = np.random.default_rng([self.config.seed, state["epoch"]]).permutation(len(self.shards))
            mine = order if deal_documents else order[consumer::consumers]
            for shard in mine[state["shard"] :]:
                for block, documents in enumerate(_blocks(self.shards[shard])):
                    if block < state["block"]:
                        continue
                    if deal_documents:
                        documents = documents[consumer::consumers]
                    state["counts"] = dict(self.counts)
                    rows = self._rows(documents, state["epoch"], int(shard), block)
                    for row in rows[state["row"] :]:
                        state["row"] += 1
                        self._state = dict(state)
                        rows_given += 1
                        yield row
                    state.update(block=block + 1, row=0)
                state.update(shard=state["shard"] + 1, block=0)
            state.update(epoch=state["epoch"] + 1, shard=0)
            if not rows_given:
                raise InputError(
                    f"reader {consumer} of {consumers} got no example out of {', '.join(self.config.inputs)}: "
                    f"{dict(self.counts)}"
                )

    def examples(self, document: Document, tokens: np.ndarray, epoch: int) -> Iterator[Example]:
        """Cut a document into chunks, each as long as its denoiser may take, and corrupt them.

        No token is lost: where less than `min_tokens` would remain, the chunk before is cut shorter.
        """
        start, chunk = 0, 0
        while start < len(tokens):
            rng = example_rng(self.config.seed, epoch, document.id, chunk)
            denoiser = draw_denoiser(self._preset, rng)
            length = min(self._lengths[denoiser], len(tokens) - start)
            if 0 < (rest := len(tokens) - start - length) < self.config.min_tokens:
                length -= self.config.min_tokens - rest
            piece = tokens[start : start + length]
            pair = corrupt(piece, self._preset[denoiser], rng, sentinel_ids=self.sentinel_ids, eos_id=self.eos_id)
            yield Example(*pair, denoiser)
            start, chunk = start + length, chunk + 1

    def _rows(self, documents: Sequence[Document], epoch: int, shard: int, block: int) -> list[Row]:
        # package-docs has its own split
        holding_out = not self.config.heldout_inputs and not isinstance(self.shards[shard], Texts)
        examples: list[Example] = []
        for document in documents:
            self.counts["documents"] += 1
            if holding_out and is_heldout(document.text, self.config):
                self.counts["heldout"] += 1
                continue
            tokens = self.encode(document.text)
            used = len(tokens) >= self.config.min_tokens
            self.counts["used" if used else "refused"] += 1
            self.counts["tokens" if used else "refused_tokens"] += len(tokens)
            if used:
                examples.extend(self.examples(document, tokens, epoch))
        budgets = self.config.source_length, self.config.target_length
        rows = pack(examples, *budgets) if self.config.packing else [[example] for example in examples]
        order = np.random.default_rng([self.config.seed, epoch, shard, block]).permutation(len(rows))
        return [rows[i] for i in order]

    def _fresh(self) -> dict[str, Any]:
        place = {"epoch": 0, "shard": 0, "block": 0, "row": 0}
        return {**place, "counts": {}, "consumers": None, "stream": self._fingerprint}


def build_stream(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world_size: int = 1
) -> UL2Stream:
    """The endless training stream of a rank. Raises InputError for anything wrong that can be seen at the start."""
    return UL2Stream(config, tokenizer, rank=rank, world_size=world_size)


def heldout_examples(config: DataConfig, tokenizer: PreTrainedTokenizerBase, num_per_denoiser: int) -> list[Example]:
    """A fixed set for evaluation: the same `num_per_denoiser` texts under every denoiser, in that order.

    The texts are the starts of documents that training never sees (`heldout_inputs`, held-out packages, or 1 document
    in `heldout_every`), cut to what every denoiser can take. The training seed has no influence.

    Raises InputError if there are too few.
    """
    sentinel_ids, encode = _sentinels(config, tokenizer), Encoder(tokenizer)
    shards = open_corpus(
        config.heldout_inputs or config.inputs,
        text_column=config.text_column,
        hub_split=config.hub_split,
        package_split="heldout",
    )
    longest = min(raw_length(d, config.source_length, config.target_length) for d in config.denoisers)

    def texts() -> Iterator[tuple[int, np.ndarray]]:
        for shard in (shards[i] for i in np.random.default_rng(0).permutation(len(shards))):
            all_heldout = bool(config.heldout_inputs) or isinstance(shard, Texts)
            for document in shard.read():
                if all_heldout or is_heldout(document.text, config):
                    tokens = encode(document.text)
                    if len(tokens) >= config.min_tokens:
                        yield document.id, tokens[:longest]

    chosen = list(islice(texts(), num_per_denoiser))
    if len(chosen) < num_per_denoiser:
        raise InputError(
            f"{num_per_denoiser} held-out texts are wanted and there are {len(chosen)}: lower data.heldout_every="
            f"{config.heldout_every}, name data.heldout_inputs, or evaluate on fewer"
        )
    ids: dict[str, Any] = {"sentinel_ids": sentinel_ids, "eos_id": tokenizer.eos_token_id}
    return [
        Example(*corrupt(tokens, denoiser, example_rng(_HELDOUT_SEED, 0, document, i), **ids), i)
        for document, tokens in chosen
        for i, denoiser in enumerate(config.denoisers)
    ]


def is_heldout(text: str, config: DataConfig) -> bool:
    """Whether 1-in-`heldout_every` holds a text out. Copies of a text share its fate, so that none leaks."""
    return zlib.crc32(text.encode("utf-8", "replace")) % config.heldout_every == 0


def _sentinels(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of the sentinels, int32, after checking that they suffice."""
    ids = getattr(tokenizer, "sentinel_token_ids", None)
    if ids is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no sentinels; make one of Qwen3's first")
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise InputError(f"the sentinels of tokenizer {tokenizer.name_or_path!r} are not consecutive ids")
    check_capacity(config.denoisers, config.source_length, config.target_length, len(ids))
    return np.asarray(ids, dtype=np.int32)


def _blocks(shard: Shard) -> Iterator[list[Document]]:
    block: list[Document] = []
    size = 0
    for document in shard.read():
        block.append(document)
        size += len(document.text)
        if size >= SHARD_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block
