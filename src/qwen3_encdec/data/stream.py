"""The training stream: documents to packed UL2 rows, with a state that resumes it exactly and at
once.

Everything is done block by block, a block being about a megabyte of text (see `sources`). An epoch
takes the shards in an order of its own; epochs follow each other without end. The rows of a block
are a pure function of (seed, epoch, shard, block), so all that has to be remembered is a place:
epoch, place in the epoch's order of shards, block, and rows already given. To resume is to seek to
that shard and make one block again.

Blocks are dealt out to the readers (workers of ranks) by their number, so that each is read once an
epoch whatever the number of readers. To continue with another number of readers is to deal out
again what is left: `redeal` keeps, as a `deal`, the places at which all former readers stopped, and
from these any reader can tell for any block whether it is done. A deal is forgotten once a reader
is past all of its places.
"""

import copy
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.collate import Row, bucket, pack
from qwen3_encdec.data.config import MODES, DataConfig
from qwen3_encdec.data.corpus import (
    Block,
    Shard,
    Texts,
    Tokenized,
    TokenizedGroup,
    corpus_fingerprint,
    open_corpus,
    tokenized,
)  # fmt: skip
from qwen3_encdec.data.package_docs import Split
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.data.ul2 import (
    Example,
    Examples,
    check_capacity,
    corrupt_batch,
    draw_denoisers,
    example_keys,
)
from qwen3_encdec.folders import InputError

_SHARDS_PER_READER = 4
_HELDOUT_EPOCH = -1


class UL2Stream(IterableDataset):
    """Rows (lists of `Example`) for one rank, forever or for some epochs.

    Rows of several sources alternate such that their tokens are in the ratio of their weights.

    `counts` says what became of the documents read so far: `documents` = `used` + `refused` (too
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
        self.sentinel_ids, self.eos_id, self.prefix_ids = special_ids(config, tokenizer)
        self.sources = [
            open_corpus(source.inputs, text_column=source.text_column, hub_split=config.hub_split)
            for source in config.sources
        ]
        self.encode = Encoder(tokenizer)
        for shard in (shard for shards in self.sources for shard in shards):
            if isinstance(shard, TokenizedGroup) and shard.tokenizer != self.encode.fingerprint:
                raise InputError(
                    f"{shard.path} was prepared with another tokenizer; prepare the corpus again"
                )
        fingerprint = hashlib.sha256()
        corpora = [corpus_fingerprint(shards) for shards in self.sources]
        # Where the corpus lies does not count.
        settings = dataclasses.replace(
            config,
            accept_changes=False,
            inputs=["."],
            mixture=[],
            heldout_inputs=config.heldout_inputs and ["."],
        )
        shares = [(source.weight, source.text_column) for source in config.sources]
        for part in (settings, shares, self.encode.fingerprint, corpora):
            fingerprint.update(repr(part).encode())
        self.fingerprint = fingerprint.hexdigest()[:16]
        self._state, self._loaded = self.state_at_epoch(0), False
        self._making = [Counter[str]() for _ in self.sources]

    @property
    def counts(self) -> Counter[str]:
        """What became of the documents so far."""
        done = (Counter(source["counts"]) for source in self._state["sources"])
        return sum((*done, *self._making), Counter[str]())

    def state_at_epoch(self, epoch: int) -> dict[str, Any]:
        """The state in which every reader begins an epoch."""
        sources = [
            {"place": [epoch, 0, 0, 0], "tokens": 0, "counts": {}, "deals": []}
            for _ in self.sources
        ]
        return {"stream": self.fingerprint, "reader": None, "sources": sources}

    def state_dict(self) -> dict[str, Any]:
        """Where this reader is, as JSON:

        for the same config, corpus, tokenizer, and number of readers.
        """
        self._settle()
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state at the next iteration.

        Raises InputError if it is of another stream.
        """
        self.check(state)
        self._state, self._loaded = copy.deepcopy(state), True
        self._making = [Counter[str]() for _ in self.sources]

    def check(self, state: dict[str, Any]) -> None:
        """Raise InputError if a state is of another stream."""
        if state["stream"] != self.fingerprint:
            raise InputError(
                "the saved place in the data is of another corpus, data config or tokenizer; "
                "data.accept_changes=true goes on with what is there now, at a new epoch"
            )

    def _settle(self) -> tuple[int, int]:
        """Make a state that is everybody's this reader's own.

        Returns reader and number of readers.
        """
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = self.rank * workers + number, self.world_size * workers
        if self._state["reader"] is None:
            self._state["reader"] = [reader, readers]
            for source in self._state["sources"] if reader else ():
                source["counts"] = {}
        return reader, readers

    def __iter__(self) -> Iterator[Row]:
        if not self._loaded:
            self.load_state_dict(self.state_at_epoch(0))
        self._loaded = False
        reader, readers = self._settle()
        states, weights = self._state["sources"], [source.weight for source in self.config.sources]
        if self._state["reader"] != [reader, readers]:
            raise InputError(
                f"the saved place in the data is of reader {self._state['reader'][0]} of {self._state['reader'][1]}, "
                f"this is {reader} of {readers}: resume with as many ranks and workers, or deal it out anew"
            )
        rows = {number: self._read(number, reader, readers) for number in range(len(states))}
        while rows:
            number = min(rows, key=lambda i: states[i]["tokens"] / weights[i])
            row = next(rows[number], None)
            if row is None:
                del rows[number]
                continue
            states[number]["tokens"] += sum(len(e.source) + len(e.target) for e in row)
            yield row

    def _read(self, number: int, reader: int, readers: int) -> Iterator[Row]:
        """The rows of one source that this reader has still to give;

        its place is kept in the state.
        """
        state, shards, counts = (
            self._state["sources"][number],
            self.sources[number],
            self._making[number],
        )
        fruitless, patience = 0, min(20 * len(shards), 1000)
        while self.epochs is None or state["place"][0] < self.epochs:
            epoch, begin, *_ = state["place"]
            order = np.random.default_rng([self.config.seed, epoch, number]).permutation(
                len(shards)
            )
            for position, shard in enumerate(order[begin:].tolist(), begin):

                def rows_given(
                    block: int, place: tuple[int, int] = (epoch, position)
                ) -> int | None:
                    return _rows_given(state, len(shards), [*place, block], reader, readers)

                whole = _dealt_whole(len(shards), max(readers, *map(len, state["deals"]), 0))
                for block, documents in _blocks_left(shards[shard], rows_given, whole):
                    skipped = rows_given(block) or 0
                    rows = self._rows(number, documents, epoch, shard, block)
                    fruitless = 0 if rows else fruitless + 1
                    if fruitless >= patience:
                        inputs = ", ".join(self.config.sources[number].inputs)
                        raise InputError(
                            f"reader {reader} of {readers} got no example out of {inputs}: {dict(counts)}"
                        )
                    for given, row in enumerate(rows[skipped:], skipped + 1):
                        state["place"] = [epoch, position, block, given]
                        yield row
                    state["place"] = [epoch, position, block + 1, 0]
                    state["counts"] = dict(Counter(state["counts"]) + counts)
                    counts.clear()
                state["place"] = [epoch, position + 1, 0, 0]
                state["deals"] = [
                    places for places in state["deals"] if max(places) > state["place"]
                ]
            state["place"] = [epoch + 1, 0, 0, 0]

    def _rows(self, number: int, documents: Block, epoch: int, shard: int, block: int) -> list[Row]:
        """The rows of a block."""
        usable = self._usable(number, documents, self.sources[number][shard])
        if not len(usable.ids):
            return []
        examples = self.examples(usable.ids, usable.tokens, usable.lengths, epoch, number).split()
        rng = np.random.default_rng([self.config.seed, epoch, number, shard, block])
        if self.config.packing == "buckets":
            return bucket(examples, rng)
        budgets = self.config.source_length, self.config.target_length
        rows = (
            pack(examples, *budgets) if self.config.packing else [[example] for example in examples]
        )
        return [rows[i] for i in rng.permutation(len(rows))]

    def _usable(self, number: int, block: Block, shard: Shard) -> Tokenized:
        """Tokenize; take out and count what is held out or too short."""
        counts = self._making[number]
        documents, held = tokenized(
            block, self.encode.batch, _other_split(self.config, shard, "train")
        )
        short = documents.lengths < self.config.min_tokens
        counts["documents"] += len(held)
        counts["heldout"] += int(held.sum())
        counts["refused"] += int(short.sum())
        counts["refused_tokens"] += int(documents.lengths[short].sum())
        documents = documents.without(short)
        counts["used"] += len(documents.ids)
        counts["tokens"] += len(documents.tokens)
        return documents

    def examples(
        self, ids: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, epoch: int, source: int = 0
    ) -> Examples:
        """Cut documents into chunks, each as long as its denoiser may take, and corrupt them.

        `tokens` has all documents one after another. No token is lost: where less than `min_tokens`
        would remain, the chunk before is cut shorter.
        """
        least, longest = self.config.min_tokens, np.array(self.config.raw_lengths)
        left, rest = lengths.copy(), np.arange(len(lengths))
        chunks: list[tuple[np.ndarray, ...]] = []
        while len(rest):
            keys = example_keys(self.config.seed, epoch + (source << 32), ids[rest], len(chunks))
            denoisers = draw_denoisers(self.config.denoisers, keys)
            sizes = np.minimum(longest[denoisers], left[rest])
            remaining = left[rest] - sizes
            sizes -= np.where((remaining > 0) & (remaining < least), least - remaining, 0)
            chunks.append((rest, sizes, denoisers, keys))
            left[rest] -= sizes
            rest = rest[left[rest] > 0]
        owner, sizes, denoisers, keys = (
            np.concatenate(parts) for parts in zip(*chunks, strict=True)
        )
        order = np.argsort(owner, kind="stable")
        return corrupt_batch(
            tokens,
            sizes[order],
            denoisers[order],
            self.config.denoisers,
            keys[order],
            sentinel_ids=self.sentinel_ids,
            eos_id=self.eos_id,
            prefix_ids=self.prefix_ids,
        )


def build_stream(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world_size: int = 1
) -> UL2Stream:
    """The endless training stream of a rank.

    Raises InputError for anything wrong that can be seen at the start.
    """
    return UL2Stream(config, tokenizer, rank=rank, world_size=world_size)


def resume(stream: UL2Stream, loader: Any, loader_states: Sequence[dict[str, Any]]) -> str | None:
    """Continue from the states of all ranks' loaders (torchdata's), whatever the number of ranks or
    workers was.

    With the same number every row follows as if nothing had happened; with another one, the same
    rows remain to be given. Returns a phrase about what is not as before, if anything.

    Raises InputError if the data is not the same, unless `data.accept_changes`.
    """
    states = [state for loader_state in loader_states for state in reader_states(loader_state)]
    if stream.config.accept_changes and any(
        state["stream"] != stream.fingerprint for state in states
    ):
        epoch = 1 + max(source["place"][0] for state in states for source in state["sources"])
        stream.load_state_dict(stream.state_at_epoch(epoch))
        return f"the data has changed and begins anew at epoch {epoch}"
    for state in states:
        stream.check(state)
    readers = stream.world_size * max(loader.num_workers, 1)
    if len(loader_states) == stream.world_size and len(states) == readers:
        loader.load_state_dict(loader_states[stream.rank])
        return None
    stream.load_state_dict(redeal(states))
    return f"what is left of the data is dealt out from {len(states)} readers to {readers}"


def reader_states(loader_state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of a rank's readers, out of its StatefulDataLoader's."""
    workers = loader_state.get("_snapshot", {}).get("_worker_snapshots", {"": loader_state})
    return [worker["dataset_state"] for worker in workers.values()]


def redeal(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state for any number of readers out of the states of all readers.

    Raises InputError if they are not all, or not of one stream.
    """
    states = sorted(states, key=lambda state: state["reader"])
    readers = len(states)
    if [state["reader"] for state in states] != [[reader, readers] for reader in range(readers)]:
        raise InputError(
            f"these are not the places of all readers: {[state['reader'] for state in states]}"
        )
    if len({state["stream"] for state in states}) > 1:
        raise InputError("the saved places in the data are of different streams")
    sources = []
    for parts in zip(*(state["sources"] for state in states), strict=True):
        places = [part["place"] for part in parts]
        deals = [places]
        for deal in (deal for part in parts for deal in part["deals"]):
            if deal not in deals:
                deals.append(deal)
        counts = sum((Counter(part["counts"]) for part in parts), Counter[str]())
        sources.append(
            {"place": [*min(places)[:3], 0], "tokens": 0, "counts": dict(counts), "deals": deals}
        )
    return {"stream": states[0]["stream"], "reader": None, "sources": sources}


def _dealt_whole(shards: int, readers: int) -> bool:
    return shards >= _SHARDS_PER_READER * readers


def _rows_given(
    state: dict[str, Any], shards: int, block: list[int], reader: int, readers: int
) -> int | None:
    """How many of a block's rows have been given; None if all, or if the block is another reader's.

    Args:
        state: Of a source.
        shards: How many shards it has.
        block: Epoch, place in the epoch's order of shards, and block.
        reader: Who asks.
        readers: How many there are.
    """

    def owner(readers: int) -> int:
        # Shards are dealt out, so that no two readers open the same; blocks, where shards are too
        # few for that.
        within = 0 if _dealt_whole(shards, readers) else block[2]
        return (block[0] * shards + block[1] + within) % readers

    if owner(readers) != reader:
        return None
    given = 0
    for place in (state["place"], *(places[owner(len(places))] for places in state["deals"])):
        if block < place[:3]:
            return None
        if block == place[:3]:
            given = max(given, place[3])
    return given


def _blocks_left(
    shard: Shard, rows_given: Callable[[int], int | None], dealt_whole: bool
) -> Iterator[tuple[int, Block]]:
    """The blocks of a shard that `rows_given` has not all given; a shard without any is not opened
    if that is known.

    `dealt_whole` says that all blocks of a shard are one reader's, so that a block beyond the last
    speaks for all.
    """
    blocks = (
        range(shard.num_blocks)
        if shard.num_blocks is not None
        else [2**62]
        if dealt_whole
        else None
    )
    if blocks is not None and all(rows_given(block) is None for block in blocks):
        return
    for number, block in enumerate(shard.blocks()):
        if rows_given(number) is not None:
            yield number, block


def heldout_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, num_per_denoiser: int
) -> list[Example]:
    """A fixed set for evaluation: the same `num_per_denoiser` texts under every denoiser, in that
    order.

    The texts are the starts of documents that training never sees (`heldout_inputs`, held-out
    packages, or 1 document in `heldout_every`), cut to what every denoiser can take. The training
    seed has no influence.

    Raises InputError if there are too few.
    """
    sentinel_ids, eos_id, prefix_ids = special_ids(config, tokenizer)
    encode, longest = Encoder(tokenizer), min(config.raw_lengths)
    sources = [
        open_corpus(
            config.heldout_inputs or source.inputs,
            text_column=source.text_column,
            hub_split=config.hub_split,
            package_split="heldout",
        )
        for source in (config.sources[:1] if config.heldout_inputs else config.sources)
    ]
    shards = [shard for shards in sources for shard in shards]

    def texts() -> Iterator[tuple[int, np.ndarray]]:
        for shard in (shards[i] for i in np.random.default_rng(0).permutation(len(shards))):
            for block in shard.blocks():
                found, _ = tokenized(block, encode.batch, _other_split(config, shard, "heldout"))
                found = found.without(found.lengths < config.min_tokens)
                parts = np.split(found.tokens, np.cumsum(found.lengths)[:-1])
                yield from zip(
                    found.ids.tolist(), (tokens[:longest] for tokens in parts), strict=False
                )

    chosen = list(islice(texts(), num_per_denoiser))
    if len(chosen) < num_per_denoiser:
        raise InputError(
            f"{num_per_denoiser} held-out texts are wanted and there are {len(chosen)}: lower data.heldout_every="
            f"{config.heldout_every}, name data.heldout_inputs, or evaluate on fewer"
        )
    denoisers = np.tile(np.arange(len(config.denoisers)), len(chosen))
    repeated = [tokens for _, tokens in chosen for _ in config.denoisers]
    return corrupt_batch(
        np.concatenate(repeated),
        np.array([len(tokens) for tokens in repeated]),
        denoisers,
        config.denoisers,
        example_keys(
            0,
            _HELDOUT_EPOCH,
            np.repeat([document for document, _ in chosen], len(config.denoisers)),
            denoisers,
        ),
        sentinel_ids=sentinel_ids,
        eos_id=eos_id,
        prefix_ids=prefix_ids,
    ).split()


def _other_split(
    config: DataConfig, shard: Shard, split: Split
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Which documents of a shard are not of this split, from their ids and checksums.

    Copies of a text share its fate, so that none leaks.
    """
    apart = bool(config.heldout_inputs) or isinstance(
        shard, Texts
    )  # the whole shard is of one split
    heldout = split == "heldout"
    return lambda _, sums: (
        np.zeros(len(sums), bool) if apart else (sums % config.heldout_every == 0) != heldout
    )


def special_ids(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, int, list[int]]:
    """Ids of the sentinels (int32) after checking that they suffice, of EOS, and of each denoiser's
    mode token.

    Mode tokens are the first of the tokenizer's reserved ones; none without `mode_tokens`.
    """
    ids = getattr(tokenizer, "sentinel_token_ids", None)
    if ids is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no sentinels; make one of Qwen3's first"
        )
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise InputError(
            f"the sentinels of tokenizer {tokenizer.name_or_path!r} are not consecutive ids"
        )
    check_capacity(config.denoisers, config.source_length, config.target_length, len(ids))
    modes: list[int] = []
    if config.mode_tokens:
        vocabulary = tokenizer.get_vocab()
        names = [f"<|reserved_{MODES.index(denoiser.name[0])}|>" for denoiser in config.denoisers]
        for name in names:
            if name not in vocabulary:
                raise InputError(
                    f"data.mode_tokens: tokenizer {tokenizer.name_or_path!r} has no {name} to use"
                )
        modes = [vocabulary[name] for name in names]
    return np.asarray(ids, dtype=np.int32), int(tokenizer.eos_token_id), modes
