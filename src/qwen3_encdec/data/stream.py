"""Training stream: documents to packed rows, in the same order on any number of machines.

    data = UL2Data(config, tokenizer)
    loader = RowLoader(data, batch_size=8, rank=rank, ranks=ranks, num_workers=4)
    batch = next(iter(loader))
    state = merge_states([...loader.state_dict() of every rank])
    loader = RowLoader(data, ..., state=state)      # any ranks and workers that divide the streams

Order: a corpus is an endless sequence of blocks, reshuffled in each epoch. Block q goes to
canonical stream q mod C, which turns its blocks into rows; row i of the global sequence comes from
stream i mod C. None of this depends on ranks or workers. Of R readers (all workers of all ranks; R
divides C), reader j makes the rows i with i mod R = j, which are those of C / R streams.

    row      0   1   2   3   4   5   6   7   8   9 ...      C = 4 streams
    stream   0   1   2   3   0   1   2   3   0   1 ...
    reader   0   1   0   1   0   1   0   1   0   1 ...      R = 2 readers

State: every row carries the position of its stream after that row, so a loader's state follows from
the rows it has handed out, regardless of what its workers have prefetched.
"""

import hashlib
import os
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from itertools import accumulate, chain, count, islice, product, zip_longest
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.collate import Position, Row, collate_rows, count_tokens, pack
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.corpus import PACKAGE_DOCS, Corpus, Document, open_corpus
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.data.ul2 import Example, check_capacity, corrupt
from qwen3_encdec.folders import InputError, input_errors, read_json

WINDOW_ROWS = 16
"""Number of rows' worth of examples that a stream packs together."""
COUNTS = ("tokens", "documents", "refused", "heldout")
BEGINNING: Position = dict.fromkeys(("turn", "epoch", "document", "row", *COUNTS), 0)
"""Position of a stream in a corpus: its block, documents done in it, rows given after those."""
FREE = ("inputs", "mixture", "heldout_inputs", "accept_changes", "cache_gib")
"""Settings that may change in a run, or whose effect the corpora's fingerprints cover."""


class HeldoutText(NamedTuple):
    """A text that training never sees."""

    corpus: str
    path: str
    key: int
    tokens: list[int]


class UL2Data:
    """The opened corpora of a config, and how their documents become examples."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        ids = getattr(tokenizer, "sentinel_token_ids", None)
        if ids is None:
            name = tokenizer.name_or_path
            raise InputError(f"tokenizer {name!r} has no sentinels; run: qwen3-encdec tokenizer")
        check_capacity(config.denoisers, config.source_length, config.target_length, len(ids))
        self.sentinel_ids = np.asarray(ids, dtype=np.int32)
        self.eos_id = int(tokenizer.eos_token_id)
        self.kept_ids = np.array([self.eos_id, *self.sentinel_ids])
        self.encode = Encoder(tokenizer)
        self.opened = [open_corpus(source, config) for source in config.sources]
        self.corpora = [corpus.name for corpus in self.opened]
        self._excluded: set[int] = set()
        self._bounds = list(accumulate(denoiser.weight for denoiser in config.denoisers))
        self._check_files()
        parts = [self.encode.fingerprint, *(corpus.fingerprint() for corpus in self.opened)]
        parts += [(source.weight, source.text_column) for source in config.sources]
        parts += [getattr(config, field.name) for field in fields(config) if field.name not in FREE]
        # Of a file, the setting is only the path. Other fingerprints stay as they were.
        if str(config.preset).endswith((".yaml", ".yml")):
            parts.append(config.denoisers)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        """Changes with the settings, the tokenizer, and the files of the corpora."""

    def _check_files(self) -> None:
        files = [file for corpus in self.opened for file in corpus.files]
        heldout = self._heldout_corpus(0).files if self.config.heldout_inputs else ()
        for file in (*files, *heldout):
            if file.tokenizer not in ("", self.encode.fingerprint):
                raise InputError(
                    f"{file.path} was prepared with another tokenizer; prepare the corpus again"
                )
        # Links of many files are resolved only if need be.
        mine = {os.path.realpath(file.copy) for file in files} if heldout else ()
        for file in heldout:
            if os.path.realpath(file.copy) in mine:
                raise InputError(f"{file.path} is an input and a held-out input; remove one")

    def report(self) -> list[str]:
        """Describe, by corpus, what will be read and what is skipped."""
        lines = []
        for corpus in self.opened:
            size = sum(file.size for file in corpus.files)
            about = f"{len(corpus.files):,} files, {size:,} bytes, {self._contents(corpus)}"
            lines.append(f"{corpus.name}: {about}")
            if corpus.passed_over:
                number, shown = len(corpus.passed_over), ", ".join(corpus.passed_over[:3])
                lines.append(f"{corpus.name}: skipped {number:,}, such as {shown}")
        return lines

    def _contents(self, corpus: Corpus) -> str:
        """Count a prepared corpus and the rows of tables; estimate the rest from some texts."""
        if any(file.streamed for file in corpus.files):
            return "streamed"
        rows = sum(sum(file.rows) for file in corpus.files)
        if all(file.tokenizer for file in corpus.files):
            return f"{rows:,} documents, {sum(file.tokens for file in corpus.files):,} tokens"
        unknown = [file for file in corpus.files if not file.rows]
        file = (unknown or corpus.files)[0]
        blocks = min(file.num_blocks, 8)
        end: Any = (file.size * blocks // file.num_blocks, None)
        # Up to 256 documents, and the offset behind them.
        *sample, (size, _) = islice(chain(file.read(range(blocks)), [end]), 257)
        documents = rows + sum(file.size for file in unknown) * len(sample) / max(size, 1)
        lengths = [len(self.encode(document.content)) for _, document in sample]
        tokens = documents * sum(lengths) / max(len(sample), 1)
        return f"about {documents:,.0f} documents, {tokens:,.0f} tokens"

    def start(self, epoch: int = 0) -> dict[str, Any]:
        """Return the state in which all streams are at the start of an epoch."""
        total, streams = self.config.streams, {}
        firsts = [epoch * corpus.num_blocks for corpus in self.opened]
        for stream in range(total):
            turns = [-(-(first - stream) // total) for first in firsts]
            positions = [BEGINNING | {"turn": turn, "epoch": epoch} for turn in turns]
            streams[str(stream)] = positions
        return {"data": self.fingerprint, "rows": 0, "streams": streams}

    def adopt(self, state: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Return the state to resume from, and a note if the data has changed.

        Raises InputError if the data has changed, unless `data.accept_changes` is set.
        """
        if state["data"] == self.fingerprint:
            return state, None
        if not self.config.accept_changes:
            raise InputError(
                "the saved position belongs to another corpus, data config or tokenizer; "
                "set data.accept_changes=true to continue with the current ones at a new epoch"
            )
        epochs = [at.get("epoch", 0) for stream in state["streams"].values() for at in stream]
        epoch = 1 + max(epochs, default=0)
        note = f"the data has changed; continuing with it at epoch {epoch}"
        return self.start(epoch) | {"rows": state["rows"]}, note

    def outcome(self, document: Document) -> tuple[str, np.ndarray | None]:
        """Return which of `COUNTS` a document belongs to, and its tokens if it is used."""
        if self.is_heldout(document):
            return "heldout", None
        tokens = self.encode(document.content)
        used = len(tokens) >= self.config.min_tokens
        return ("documents", tokens) if used else ("refused", None)

    def is_heldout(self, document: Document) -> bool:
        """Return True if a document is held out. Copies of a text are treated alike."""
        if document.key in self._excluded:
            return True
        # Package-docs holds out whole packages.
        apart = self.config.heldout_inputs or document.path == PACKAGE_DOCS
        return not apart and document.key % self.config.heldout_every == 0

    def exclude(self, texts: Iterable[HeldoutText]) -> None:
        """Exclude copies of these texts from training."""
        self._excluded = {text.key for text in texts}

    def examples(self, tokens: np.ndarray, key: int, epoch: int) -> list[Example]:
        """Split a document into chunks, each as long as its denoiser can take, and corrupt them.

        No token is lost: if fewer than `min_tokens` would remain, the previous chunk is shortened.
        """
        config, least = self.config, self.config.min_tokens
        rng = np.random.Generator(np.random.PCG64((epoch << 128) + (config.seed << 64) + key))
        examples: list[Example] = []
        start = 0
        while start < len(tokens):
            number = bisect(self._bounds, rng.random() * self._bounds[-1])
            size = min(config.raw_lengths[number], len(tokens) - start)
            left = len(tokens) - start - size
            size -= least - left if 0 < left < least else 0
            examples.append(self.example(tokens[start : start + size], number, rng))
            start += size
        return examples

    def example(self, tokens: np.ndarray, number: int, rng: Any) -> Example:
        """Corrupt a chunk with the preset's denoiser of that index."""
        denoiser, ids = self.config.denoisers[number], self.sentinel_ids
        source, target = corrupt(tokens, denoiser, rng, sentinel_ids=ids, eos_id=self.eos_id)
        return Example(source, target, number)

    def choose_heldout(self, number: int) -> list[HeldoutText]:
        """Choose evaluation texts from the corpora by weight, spread over their files.

        The choice depends neither on the seed nor on training. Raises InputError if there are too
        few.
        """
        sources = self.config.sources[:1] if self.config.heldout_inputs else self.config.sources
        weights = np.cumsum([source.weight for source in sources])
        ends = np.floor(weights / weights[-1] * number + 0.5).astype(int)
        chosen: list[HeldoutText] = []
        for corpus, share in enumerate(np.diff(ends, prepend=0).tolist()):
            own = self._heldout_of(corpus, share)
            if len(own) < share:
                raise InputError(
                    f"{share} held-out texts are needed of {self.corpora[corpus]}, but there are "
                    f"only {len(own)}; lower data.heldout_every={self.config.heldout_every}, set "
                    "data.heldout_inputs, or evaluate on fewer"
                )
            chosen += own
        return chosen

    def _heldout_corpus(self, corpus: int) -> Corpus:
        source, inputs = self.config.sources[corpus], self.config.heldout_inputs
        if not inputs and PACKAGE_DOCS not in source.inputs:
            return self.opened[corpus]
        source = replace(source, inputs=inputs or source.inputs)
        return open_corpus(source, self.config, "heldout")

    def _heldout_of(self, corpus: int, number: int) -> list[HeldoutText]:
        """Take two texts from each block in turn, and more from each only if that is not enough."""
        config, opened = self.config, self._heldout_corpus(corpus)
        chosen: dict[int, HeldoutText] = {}

        def is_fresh(document: Document) -> bool:
            apart = bool(config.heldout_inputs) or document.path == PACKAGE_DOCS
            return document.key not in chosen and (apart or self.is_heldout(document))

        blocks = np.random.default_rng(0).permutation(opened.num_blocks).tolist()
        for most, block in chain(product([2], blocks), product([number], blocks)):
            if len(chosen) >= number:
                break
            fresh = filter(is_fresh, opened.read(block))
            for path, key, content in islice(fresh, min(most, number - len(chosen))):
                tokens = self.encode(content)[: min(config.raw_lengths)]
                if len(tokens) >= config.min_tokens:
                    chosen[key] = HeldoutText(opened.name, path, key, tokens.tolist())
        return list(chosen.values())

    def heldout_examples(self, texts: Sequence[HeldoutText]) -> list[Example]:
        """Corrupt each text with each denoiser, deterministically."""
        examples = []
        for text in texts:
            tokens = np.array(text.tokens, np.int32)
            for number in range(len(self.config.denoisers)):
                rng = np.random.Generator(np.random.PCG64((number << 64) + text.key))
                examples.append(self.example(tokens, number, rng))
        return examples

    def check_usable(self, corpus: int) -> None:
        """Raise InputError unless the corpus has a document to train on."""
        counts: Counter[str] = Counter()
        for document in self.opened[corpus].documents():
            counts[self.outcome(document)[0]] += 1
            if counts["documents"]:
                return
        inputs = ", ".join(self.config.sources[corpus].inputs)
        raise InputError(
            f"no documents to train on in {inputs}: {counts['heldout']:,} are held out, "
            f"{counts['refused']:,} shorter than data.min_tokens={self.config.min_tokens}"
        )


@lru_cache(64)
def _block_order(seed: int, epoch: int, corpus: int, num_blocks: int) -> np.ndarray:
    """Shuffle the blocks of a corpus for an epoch."""
    return np.random.default_rng([seed, epoch, corpus]).permutation(num_blocks)


def stream_rows(
    data: UL2Data, stream: int, positions: Sequence[Position], epochs: float = inf
) -> Iterator[Row]:
    """Yield the rows of a stream after its positions, mixing the corpora by weight."""
    config = data.config
    # Streams start at different points of the mixture, so that their first rows are mixed.
    rng = np.random.default_rng([config.seed, stream, 0])
    phases = rng.random(len(positions)) * (config.source_length + config.target_length)
    weights = [source.weight for source in config.sources]
    tokens = [position["tokens"] for position in positions]
    rows = {c: _rows_of(data, stream, c, at, epochs) for c, at in enumerate(positions)}
    while rows:
        corpus = min(rows, key=lambda c: (phases[c] + tokens[c]) / weights[c])
        row = next(rows[corpus], None)
        if row is None:
            del rows[corpus]
            continue
        tokens[corpus] = row.position["tokens"]
        yield row


def _rows_of(
    data: UL2Data, stream: int, corpus: int, now: Position, epochs: float
) -> Iterator[Row]:
    config, opened, fruitless = data.config, data.opened[corpus], 0
    while True:
        epoch, place = divmod(stream + config.streams * now["turn"], opened.num_blocks)
        if epoch >= epochs:
            return
        block = int(_block_order(config.seed, epoch, corpus, opened.num_blocks)[place])
        documents = islice(opened.read(block), now["document"], None)
        for examples, counts in _windows(data, documents, epoch):
            rows = pack(examples, config.source_length, config.target_length)
            seed = [config.seed, corpus, stream, now["turn"], now["document"]]
            order = np.random.default_rng(seed).permutation(len(rows))
            behind = {name: number + counts[name] for name, number in now.items()}
            for given in range(now["row"], len(rows)):
                row = rows[order[given]]
                tokens = now["tokens"] + count_tokens(row)
                now = now | {"row": given + 1, "epoch": epoch, "tokens": tokens}
                if given + 1 == len(rows):
                    now = behind | {"row": 0, "epoch": epoch, "tokens": tokens}
                yield Row(row, stream, corpus, now)
            now = now if rows else behind
            fruitless = 0 if rows else fruitless
        now = now | {"turn": now["turn"] + 1, "document": 0, "row": 0}
        fruitless += 1
        if fruitless > opened.num_blocks:
            data.check_usable(corpus)
            fruitless = 0


def _windows(
    data: UL2Data, documents: Iterator[Document], epoch: int
) -> Iterator[tuple[list[Example], Counter[str]]]:
    """Yield examples to pack together, and counts of the documents read for them."""
    examples: list[Example] = []
    counts: Counter[str] = Counter()
    source = target = 0.0
    for document in documents:
        outcome, tokens = data.outcome(document)
        counts.update(("document", outcome))
        if tokens is None:
            continue
        made = data.examples(tokens, document.key, epoch)
        source += sum(len(example.source) for example in made) / data.config.source_length
        target += sum(len(example.target) for example in made) / data.config.target_length
        examples += made
        if max(source, target) >= WINDOW_ROWS:
            yield examples, counts
            examples, counts, source, target = [], Counter(), 0.0, 0.0
    if counts:
        yield examples, counts


def rows(data: UL2Data, epochs: float = inf) -> Iterator[Row]:
    """Yield rows in the global order in this process, skipping streams that have ended."""
    start = data.start()["streams"]
    streams = [stream_rows(data, int(s), positions, epochs) for s, positions in start.items()]
    for turn in zip_longest(*streams):
        yield from filter(None, turn)


class _Reader(IterableDataset):
    """The rows of one worker of one rank."""

    def __init__(self, data: UL2Data, state: dict[str, Any], rank: int, ranks: int) -> None:
        self.data, self.state, self.rank, self.ranks = data, state, rank, ranks

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        total, readers = self.data.config.streams, self.ranks * workers
        # Rows go to all ranks in turn, then to their next workers.
        first = self.state["rows"] + worker * self.ranks + self.rank
        own = [row % total for row in range(first, first + total, readers)]
        streams = {s: stream_rows(self.data, s, self.state["streams"][str(s)]) for s in own}
        for row in count(first, readers):
            yield next(streams[row % total])


class RowLoader:
    """Endless batches of one rank, collated in this process from the rows of its workers.

    `batch_size` counts rows; `state`, from `merge_states` and `UL2Data.adopt`, is where to resume.
    Raises InputError if ranks times workers does not divide the streams and, at `next`, for an
    error in the data, once the row that it concerns is reached.
    """

    def __init__(
        self,
        data: UL2Data,
        *,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        num_workers: int = 0,
        collate: Callable[[list[Row]], Any] = collate_rows,
        state: dict[str, Any] | None = None,
        worker_init_fn: Callable[[int], None] | None = None,
    ) -> None:
        check_readers(data.config, ranks, num_workers)
        self.data, self.batch_size, self.ranks, self.collate = data, batch_size, ranks, collate
        state = state or data.start()
        self._rows_given, total = state["rows"], data.config.streams
        own = sorted((state["rows"] + row) % total for row in range(rank, total, ranks))
        self._positions = {stream: list(state["streams"][str(stream)]) for stream in own}
        self._rank = rank
        self._options: dict[str, Any] = {"collate_fn": _as_is, "num_workers": num_workers}
        if num_workers:
            self._options["worker_init_fn"] = worker_init_fn
            self._options["prefetch_factor"] = max(2, 4 * batch_size // num_workers)

    def __iter__(self) -> Generator[Any, None, None]:
        """Yield the batches after those already given."""
        reader = _Reader(self.data, self.state_dict(), self._rank, self.ranks)
        rows = iter(DataLoader(reader, batch_size=None, **self._options))
        while True:
            batch = list(islice(rows, self.batch_size))
            for row in batch:
                self._positions[row.stream][row.corpus] = row.position
            self._rows_given += self.ranks * len(batch)
            yield self.collate(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch as a small JSON-serializable dict."""
        streams = {str(stream): list(positions) for stream, positions in self._positions.items()}
        return {"data": self.data.fingerprint, "rows": self._rows_given, "streams": streams}


def _as_is(row: Row) -> Row:
    return row


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks into one, for any number of ranks and workers.

    Raises InputError if a rank's state is missing, or they are not of one step of one run.
    """
    streams = {s: positions for state in states for s, positions in state["streams"].items()}
    number = sum(len(state["streams"]) for state in states)
    apart = {(state["data"], state["rows"]) for state in states}
    if len(apart) > 1 or number != len(streams) or set(streams) != set(map(str, range(number))):
        raise InputError("the saved data positions are not those of all ranks at one step")
    return states[0] | {"streams": streams}


def progress(state: dict[str, Any], corpora: Sequence[str]) -> dict[str, int]:
    """Return a state's `COUNTS` by corpus, and `epoch`, the lowest of all streams and corpora."""
    streams = state["streams"].values()
    total = Counter(epoch=min(at["epoch"] for positions in streams for at in positions))
    for positions in streams:
        for name, position in zip(corpora, positions, strict=True):
            total.update({f"{what}/{name}": position[what] for what in COUNTS})
    return dict(total)


def check_readers(config: DataConfig, ranks: int, num_workers: int) -> None:
    """Raise InputError unless the readers divide the streams."""
    workers, streams = max(num_workers, 1), config.streams
    fitting = [n for n in range(1, streams + 1) if streams % (ranks * n) == 0]
    if workers in fitting:
        return
    hint = f"set data.streams to a multiple of {ranks}"
    if fitting:
        hint = f"use num_workers {', '.join(map(str, fitting))}"
    raise InputError(
        f"{ranks} ranks x {workers} workers = {ranks * workers}, which does not divide "
        f"data.streams={streams}; with {ranks} ranks, {hint}"
    )


def heldout_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, num_per_denoiser: int
) -> list[Example]:
    """Make the fixed evaluation examples: `num_per_denoiser` texts under every denoiser."""
    data = UL2Data(config, tokenizer)
    return data.heldout_examples(data.choose_heldout(num_per_denoiser))


def read_heldout(path: Path) -> list[HeldoutText]:
    """Read a run's heldout.json. Raises InputError for any other file."""
    with input_errors(f"{path} does not hold held-out texts"):
        return [HeldoutText(**text) for text in read_json(path, list)]
