"""The training stream: documents to packed rows, in one order for any number of machines.

    data = UL2Data(config, tokenizer)
    loader = RowLoader(data, batch_size=8, rank=rank, ranks=ranks, num_workers=4)
    batch = next(iter(loader))
    state = merge_states([...loader.state_dict() of every rank])
    loader = RowLoader(data, ..., state=state)      # any ranks and workers that divide the streams

The order. A corpus is an endless sequence of blocks: epoch after epoch, each in an order of its
own. C canonical streams deal them out, block q to stream q mod C; a stream turns its blocks into
rows, and the rows of all streams in rotation are the global sequence: row i comes from stream i
mod C. None of this knows of ranks or workers. Of R readers (workers of ranks, R dividing C), reader
j makes the rows i with i mod R = j, which are those of C / R streams.

    row      0   1   2   3   4   5   6   7   8   9 ...      C = 4 streams
    stream   0   1   2   3   0   1   2   3   0   1 ...
    reader   0   1   0   1   0   1   0   1   0   1 ...      R = 2 readers

A corpus that has to be read from the start of its files is dealt out by document: stream s takes
the documents j with (j + offset) mod C = s of every file.

The state. Every row carries the position of its stream behind it, so that a loader knows where it
stands by the rows that it has handed out, whatever its workers have prepared beyond.
"""

import hashlib
import json
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, count, islice, tee
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.data.collate import Position, Row, collate_rows, pack
from qwen3_encdec.data.config import MODES, DataConfig, Source
from qwen3_encdec.data.corpus import (
    Corpus,
    Document,
    File,
    MemoryFile,
    Place,
    TokensFile,
    all_places,
    open_corpus,
)
from qwen3_encdec.data.package_docs import Split
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.data.ul2 import Example, check_capacity, corrupt
from qwen3_encdec.folders import InputError, write_json

WINDOW_ROWS = 16
"""Rows' worth of examples of a stream that are packed together."""
NOTHING = np.empty(0, np.int32)
_LANES = 8
COUNTS = ("tokens", "documents", "refused", "heldout")
BEGINNING: Position = dict.fromkeys(("turn", "document", "row", *COUNTS), 0)
"""A stream in a corpus: which block, documents done in it, rows given behind them, and totals."""


class HeldoutText(NamedTuple):
    """A text that training never sees."""

    corpus: int
    """Index into `UL2Data.heldout_corpora`."""
    path: str
    key: int
    tokens: list[int]


class UL2Data:
    """The corpora of a config, opened, and what becomes of their documents."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.sentinel_ids, self.eos_id, self.mode_ids = special_ids(config, tokenizer)
        self.kept_ids = np.array([self.eos_id, *self.sentinel_ids, *self.mode_ids])
        self.encode = Encoder(tokenizer)
        self.opened = [self._open(source, source.inputs) for source in config.sources]
        self.corpora = [corpus.name for corpus in self.opened]
        self.heldout_corpora = ["heldout_inputs"] if config.heldout_inputs else self.corpora
        self._check_files()
        self._excluded: set[int] = set()
        self._bounds = list(accumulate(denoiser.weight for denoiser in config.denoisers))

    def _open(self, source: Source, inputs: list[str], split: Split = "train") -> Corpus:
        return open_corpus(
            inputs,
            name=source.name,
            text_column=source.text_column,
            hub_split=self.config.hub_split,
            package_split=split,
            cache_bytes=self.config.cache_gib * 2**30,
            streams=self.config.streams,
        )

    def _check_files(self) -> None:
        for file in (file for corpus in self.opened for file in corpus.files):
            if isinstance(file, TokensFile) and file.tokenizer != self.encode.fingerprint:
                raise InputError(
                    f"{file.path} was prepared with another tokenizer; prepare the corpus again"
                )
        if self.config.heldout_inputs:
            mine = {str(Path(f.path).resolve()) for corpus in self.opened for f in corpus.files}
            for file in self._heldout_corpus(0).files:
                if str(Path(file.path).resolve()) in mine:
                    raise InputError(f"{file.path} is an input and a held-out input; take one away")

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the settings, the tokenizer, and the files of the corpora."""
        free = ("inputs", "mixture", "heldout_inputs", "accept_changes", "cache_gib")
        settings = {n: value for n, value in vars(self.config).items() if n not in free}
        sources = [(source.weight, source.text_column) for source in self.config.sources]
        files = [corpus.fingerprint() for corpus in self.opened]
        parts = repr((settings, sources, self.encode.fingerprint, files))
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def report(self) -> list[str]:
        """Say what there is to read, by corpus, and what is passed over."""
        lines = []
        for corpus in self.opened:
            size = sum(file.size for file in corpus.files)
            line = f"{corpus.name}: {len(corpus.files):,} files, {size:,} bytes"
            lines.append(line + self._contents(corpus, size))
            if corpus.passed_over:
                shown = ", ".join(corpus.passed_over[:3])
                rest = len(corpus.passed_over) - 3
                more = f" and {rest:,} more" if rest > 0 else ""
                lines.append(f"{corpus.name}: passed over {shown}{more}")
        return lines

    def _contents(self, corpus: Corpus, size: int) -> str:
        """Count a prepared corpus, estimate another by its first block."""
        if corpus.streamed:
            return ", streamed: every reader reads all files"
        prepared = [file for file in corpus.files if isinstance(file, TokensFile)]
        if len(prepared) == len(corpus.files):
            documents = sum(sum(file.rows) for file in prepared)
            tokens = sum(file.tokens for file in prepared)
            return f", {documents:,} documents, {tokens:,} tokens"
        some = [file.parse(place).content for file, place in islice(corpus.places(0), 256)]
        texts = [text for text in some if isinstance(text, str)]
        read = sum(len(text.encode("utf-8", "replace")) for text in texts)
        if not read:
            return ""
        tokens = sum(len(self.encode(text)) for text in texts) * size // read
        return f", about {len(texts) * size // read:,} documents and {tokens:,} tokens"

    def epoch(self, corpus: int, stream: int, turn: int) -> int:
        """Epoch of a stream's turn: of its `turn`-th block or, if streamed, file."""
        blocks = self.opened[corpus].num_blocks
        if self.opened[corpus].streamed:
            return turn // blocks
        return (stream + self.config.streams * turn) // blocks

    def first_turn(self, corpus: int, stream: int, epoch: int) -> int:
        """First turn of a stream in an epoch."""
        blocks = self.opened[corpus].num_blocks
        if self.opened[corpus].streamed:
            return epoch * blocks
        return max(0, -((stream - epoch * blocks) // self.config.streams))

    def documents(
        self, corpus: int, stream: int, turn: int, dealers: "Dealers"
    ) -> Iterator[tuple[File, Place]]:
        """Yield the documents of a stream's turn, unparsed."""
        opened = self.opened[corpus]
        if opened.streamed:
            yield from dealers.documents(corpus, stream, turn)
            return
        epoch, index = divmod(stream + self.config.streams * turn, opened.num_blocks)
        order = block_order(self.config.seed, epoch, corpus, opened.num_blocks)
        yield from opened.places(int(order[index]))

    def streamed_file(self, corpus: int, lane: int, turn: int) -> tuple[File, int]:
        """File that the streams of a lane read at a turn, and the stream of its first document.

        The eight lanes read different files at a time.
        """
        files = self.opened[corpus].files
        epoch, place = divmod(turn, len(files))
        place = (place + lane * len(files) // _LANES) % len(files)
        number = int(block_order(self.config.seed, epoch, corpus, len(files))[place])
        rng = np.random.default_rng([self.config.seed, epoch, corpus, number])
        return files[number], int(rng.integers(self.config.streams))

    def read(self, file: File, place: Place) -> tuple[str, int, np.ndarray]:
        """Parse a document: which of `COUNTS` it belongs to, its key, and its tokens if used."""
        document = file.parse(place)
        if self.is_heldout(file, document.key):
            return "heldout", document.key, NOTHING
        tokens = self.tokens(document)
        used = len(tokens) >= self.config.min_tokens
        return "documents" if used else "refused", document.key, tokens

    def tokens(self, document: Document) -> np.ndarray:
        """Token ids of a document."""
        content = document.content
        return self.encode(content) if isinstance(content, str) else content

    def is_heldout(self, file: File, key: int) -> bool:
        """Tell whether a document is kept from training. Copies share their text's fate."""
        if self.config.heldout_inputs:
            return key in self._excluded
        # Package-docs holds out whole packages.
        return not isinstance(file, MemoryFile) and key % self.config.heldout_every == 0

    def exclude(self, texts: Iterable[HeldoutText]) -> None:
        """Pass over copies of these texts in training."""
        self._excluded = {text.key for text in texts}

    def examples(self, tokens: np.ndarray, key: int, epoch: int, corpus: int) -> list[Example]:
        """Cut a document into chunks, each as long as its denoiser may take, and corrupt them.

        No token is lost: where less than `min_tokens` would remain, the chunk before is shorter.
        """
        config, least = self.config, self.config.min_tokens
        rng = np.random.Generator(np.random.PCG64((epoch << 128) + (config.seed << 64) + key))
        lengths = config.raw_lengths
        examples: list[Example] = []
        start = 0
        while start < len(tokens):
            number = bisect(self._bounds, rng.random() * self._bounds[-1])
            size = min(lengths[number], len(tokens) - start)
            left = len(tokens) - start - size
            size -= least - left if 0 < left < least else 0
            examples.append(self.example(tokens[start : start + size], number, rng, corpus))
            start += size
        return examples

    def example(self, tokens: np.ndarray, number: int, rng: Any, corpus: int) -> Example:
        """Corrupt a chunk by the preset's denoiser of that number."""
        source, target = corrupt(
            tokens,
            self.config.denoisers[number],
            rng,
            sentinel_ids=self.sentinel_ids,
            eos_id=self.eos_id,
            prefix=self.mode_ids[number : number + 1],
        )
        return Example(source, target, number, corpus)

    def choose_heldout(self, number: int) -> list[HeldoutText]:
        """Choose texts for evaluation, from the corpora by their weight, spread over their files.

        The seed has no influence, nor has anything that training does. Raises InputError if there
        are too few.
        """
        if self.config.heldout_inputs:
            shares = [number]
        else:
            weights = np.array([source.weight for source in self.config.sources])
            exact = np.cumsum(weights) / weights.sum() * number
            shares = np.diff(np.floor(exact + 0.5).astype(int), prepend=0).tolist()
        chosen: list[HeldoutText] = []
        for corpus, share in enumerate(shares):
            chosen += self._heldout_of(corpus, share)
        if len(chosen) < number:
            raise InputError(
                f"{number} held-out texts are wanted and there are {len(chosen)}: lower "
                f"data.heldout_every={self.config.heldout_every}, name data.heldout_inputs, or "
                "evaluate on fewer"
            )
        return chosen

    def _heldout_corpus(self, corpus: int) -> Corpus:
        source = self.config.sources[corpus]
        inputs = self.config.heldout_inputs or source.inputs
        if not self.config.heldout_inputs and "package-docs" not in inputs:
            return self.opened[corpus]
        return self._open(source, inputs, "heldout")

    def _heldout_of(self, corpus: int, number: int) -> list[HeldoutText]:
        """Take two texts of each block in turn; more of each only where those do not suffice."""
        opened = self._heldout_corpus(corpus)
        chosen: list[HeldoutText] = []
        spare: list[HeldoutText] = []
        seen: set[int] = set()
        for block in np.random.default_rng(0).permutation(opened.num_blocks).tolist():
            if len(chosen) >= number:
                break
            found: list[HeldoutText] = []
            for file, place in opened.places(block):
                document = file.parse(place)
                if document.key in seen or not self._is_for_evaluation(file, document.key):
                    continue
                seen.add(document.key)
                tokens = self.tokens(document)[: min(self.config.raw_lengths)]
                if len(tokens) >= self.config.min_tokens:
                    found.append(HeldoutText(corpus, file.path, document.key, tokens.tolist()))
                if len(found) == (2 if opened.streamed else 8):
                    break
            chosen += found[:2]
            spare += found[2:]
        return (chosen + spare)[:number]

    def _is_for_evaluation(self, file: File, key: int) -> bool:
        apart = bool(self.config.heldout_inputs) or isinstance(file, MemoryFile)
        return apart or self.is_heldout(file, key)

    def heldout_examples(self, texts: Sequence[HeldoutText]) -> list[Example]:
        """Corrupt each text by each denoiser, always the same way."""
        examples = []
        for text in texts:
            tokens = np.array(text.tokens, np.int32)
            for number in range(len(self.config.denoisers)):
                rng = np.random.Generator(np.random.PCG64((number << 64) + text.key))
                examples.append(self.example(tokens, number, rng, text.corpus))
        return examples

    def adopt(self, state: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Return the state to continue with, and a phrase about what is not as before.

        Raises InputError if the data is not the same, unless `data.accept_changes`.
        """
        if state["data"] == self.fingerprint:
            return state, None
        if not self.config.accept_changes:
            raise InputError(
                "the saved position is of another corpus, data config or tokenizer; "
                "data.accept_changes=true goes on with what is there now, at a new epoch"
            )
        epoch = state["epoch"] + 1
        streams = {
            str(stream): [
                BEGINNING | {"turn": self.first_turn(corpus, stream, epoch)}
                for corpus in range(len(self.opened))
            ]
            for stream in range(self.config.streams)
        }
        changed = {"data": self.fingerprint, "rows": state["rows"], "streams": streams}
        return changed, f"the data has changed and begins anew at epoch {epoch}"


@lru_cache(64)
def block_order(seed: int, epoch: int, corpus: int, num_blocks: int) -> np.ndarray:
    """Shuffle the blocks of a corpus for an epoch."""
    return np.random.default_rng([seed, epoch, corpus]).permutation(num_blocks)


class Dealers:
    """Documents of the files that a reader reads from their start, dealt out to its streams."""

    def __init__(self, data: UL2Data, positions: dict[int, Sequence[Position]]) -> None:
        self.data = data
        self._open: dict[tuple[int, int, int], dict[int, Iterator[Place]]] = {}
        self._turns = {
            (corpus, stream): position["turn"]
            for stream, of_stream in positions.items()
            for corpus, position in enumerate(of_stream)
        }

    def documents(self, corpus: int, stream: int, turn: int) -> Iterator[tuple[File, Place]]:
        """Yield the documents of a stream's turn; its file is read once for all streams."""
        self._turns[corpus, stream] = turn
        lane, total = stream % _LANES, self.data.config.streams
        file, offset = self.data.streamed_file(corpus, lane, turn)
        key = (corpus, lane, turn)
        if key not in self._open:
            sharers = [
                s
                for (c, s), at in self._turns.items()
                if c == corpus and s % _LANES == lane and at <= turn
            ]
            copies = tee(all_places(file), len(sharers))
            self._open[key] = dict(zip(sharers, copies, strict=True))
        places = self._open[key].pop(stream)
        if not self._open[key]:
            del self._open[key]
        for place in islice(places, (stream - offset) % total, None, total):
            yield file, place


class Stream:
    """One canonical stream: its rows, for ever or for some epochs."""

    def __init__(
        self,
        data: UL2Data,
        number: int,
        positions: Sequence[Position],
        dealers: Dealers,
        epochs: int | None = None,
    ) -> None:
        self.data, self.number, self.dealers, self.epochs = data, number, dealers, epochs
        self.positions = positions
        config = data.config
        self._weights = [source.weight for source in config.sources]
        self._given = [position["tokens"] for position in positions]
        # Streams begin at different points of the mixture, so that all give a mixed first row.
        rng = np.random.default_rng([config.seed, number, 0])
        phases = rng.random(len(positions)) * (config.source_length + config.target_length)
        self._phases = phases.tolist()

    def __iter__(self) -> Iterator[Row]:
        rows = {corpus: self._rows_of(corpus, at) for corpus, at in enumerate(self.positions)}
        while rows:
            corpus = min(rows, key=self._share_given)
            row = next(rows[corpus], None)
            if row is None:
                del rows[corpus]
                continue
            self._given[corpus] = row.position["tokens"]
            yield row

    def _share_given(self, corpus: int) -> float:
        return (self._given[corpus] + self._phases[corpus]) / self._weights[corpus]

    def _rows_of(self, corpus: int, position: Position) -> Iterator[Row]:
        """Yield the rows of a corpus behind a position."""
        data, fruitless = self.data, 0
        now = BEGINNING | position
        while True:
            epoch = data.epoch(corpus, self.number, now["turn"])
            if self.epochs is not None and epoch >= self.epochs:
                return
            documents = data.documents(corpus, self.number, now["turn"], self.dealers)
            documents = islice(documents, now["document"], None)
            for examples, counts in self._windows(documents, corpus, epoch):
                rows = self._pack(examples, corpus, now)
                fruitless = 0 if rows else fruitless
                for number, row in enumerate(rows[now["row"] :], now["row"] + 1):
                    now["row"] = number
                    now["tokens"] += sum(len(e.source) + len(e.target) for e in row)
                    if number == len(rows):
                        now = _behind(now, counts)
                    yield Row(row, self.number, corpus, dict(now))
                if not rows:
                    now = _behind(now, counts)
            now |= {"turn": now["turn"] + 1, "document": 0, "row": 0}
            fruitless += 1
            if fruitless > data.opened[corpus].num_blocks:
                self._check_usable(corpus)
                fruitless = 0

    def _windows(
        self, documents: Iterator, corpus: int, epoch: int
    ) -> Iterator[tuple[list[Example], Counter[str]]]:
        """Yield examples to pack together, and counts of the documents read for them."""
        config = self.data.config
        budgets = WINDOW_ROWS * config.source_length, WINDOW_ROWS * config.target_length
        examples: list[Example] = []
        counts: Counter[str] = Counter()
        source = target = 0
        for file, place in documents:
            what, key, tokens = self.data.read(file, place)
            counts["document"] += 1
            counts[what] += 1
            if what != "documents":
                continue
            made = self.data.examples(tokens, key, epoch, corpus)
            source += sum(len(example.source) for example in made)
            target += sum(len(example.target) for example in made)
            examples += made
            if source >= budgets[0] or target >= budgets[1]:
                yield examples, counts
                examples, counts = [], Counter()
                source = target = 0
        if counts:
            yield examples, counts

    def _pack(self, examples: list[Example], corpus: int, now: Position) -> list[list[Example]]:
        config = self.data.config
        if config.packing:
            rows = pack(examples, config.source_length, config.target_length)
        else:
            rows = [[example] for example in examples]
        seed = [config.seed, corpus, self.number, now["turn"], now["document"]]
        return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]

    def _check_usable(self, corpus: int) -> None:
        """Raise InputError unless a document of the corpus can be trained on."""
        opened, config = self.data.opened[corpus], self.data.config
        counts: Counter[str] = Counter()
        for block in range(opened.num_blocks):
            for file, place in opened.places(block):
                counts[self.data.read(file, place)[0]] += 1
                if counts["documents"]:
                    return
        reasons = {
            "heldout": "held out",
            "refused": f"shorter than data.min_tokens={config.min_tokens}",
        }
        why = ", ".join(f"{number:,} {reasons[what]}" for what, number in counts.items())
        inputs = ", ".join(config.sources[corpus].inputs)
        raise InputError(f"there is nothing to train on in {inputs}: {why or 'no documents'}")


def _behind(now: Position, counts: Counter[str]) -> Position:
    """Return the position behind a window."""
    return {name: number + counts[name] for name, number in now.items()} | {"row": 0}


def reader_number(rank: int, ranks: int, worker: int) -> int:
    """Number the readers: ranks in turn, of each its workers in turn, have the rows in order."""
    return worker * ranks + rank


class _Reader(IterableDataset):
    """The rows of one worker of one rank; an error is the last of them."""

    def __init__(self, data: UL2Data, state: dict[str, Any], rank: int, ranks: int) -> None:
        self.data, self.state, self.rank, self.ranks = data, state, rank, ranks

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        total, readers = self.data.config.streams, self.ranks * workers
        first = self.state["rows"] + reader_number(self.rank, self.ranks, worker)
        own = [row % total for row in range(first, first + total, readers)]
        positions = {s: self.state["streams"][str(s)] for s in own}
        dealers = Dealers(self.data, positions)
        try:
            streams = {s: iter(Stream(self.data, s, positions[s], dealers)) for s in own}
            for row in count(first, readers):
                yield next(streams[row % total])
        except InputError as error:
            # An exception would cross the process as 20 lines of traces.
            yield Row([], -1, 0, {}, str(error))


class RowLoader:
    """Endless batches of one rank, collated in this process from the rows of its workers.

    `batch_size` counts rows; `state` is what `merge_states` and `UL2Data.adopt` returned, to
    continue from there. Raises InputError if ranks times workers do not divide the streams; and, at
    `next`, for whatever is wrong with the data, at the row that it concerns.
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
        total = data.config.streams
        if state is None:
            begin = [BEGINNING] * len(data.opened)
            state = {"rows": 0, "streams": dict.fromkeys(map(str, range(total)), begin)}
        self._rows_given = state["rows"]
        own = range(self._rows_given + rank, self._rows_given + rank + total, ranks)
        self._positions = {s % total: list(state["streams"][str(s % total)]) for s in own}
        options: dict[str, Any] = {"collate_fn": _as_is, "num_workers": num_workers}
        if num_workers:
            options["worker_init_fn"] = worker_init_fn
            options["prefetch_factor"] = max(2, 4 * batch_size // num_workers)
        self._rows = DataLoader(_Reader(data, state, rank, ranks), batch_size=None, **options)

    def __iter__(self) -> Generator[Any, None, None]:
        rows = iter(self._rows)
        while True:
            batch = list(islice(rows, self.batch_size))
            for row in batch:
                if row.error:
                    raise InputError(row.error)
            for row in batch:
                self._positions[row.stream][row.corpus] = row.position
            self._rows_given += self.ranks * len(batch)
            yield self.collate(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch, as JSON: small, and readable."""
        streams = {str(s): [dict(p) for p in self._positions[s]] for s in sorted(self._positions)}
        return {
            "data": self.data.fingerprint,
            "rows": self._rows_given,
            "epoch": max(self._epochs()),
            "streams": streams,
        }

    def counts(self) -> dict[str, int]:
        """Count source and target tokens, and documents, by corpus, of this rank's streams."""
        total: Counter[str] = Counter()
        for positions in self._positions.values():
            for name, position in zip(self.data.corpora, positions, strict=True):
                total.update({f"{what}/{name}": position[what] for what in COUNTS})
        return dict(total)

    def epoch(self) -> int:
        """Return the epoch in which the last of this rank's streams is."""
        return min(self._epochs())

    def _epochs(self) -> list[int]:
        return [
            self.data.epoch(corpus, stream, position["turn"])
            for stream, positions in self._positions.items()
            for corpus, position in enumerate(positions)
        ]


def _as_is(row: Row) -> Row:
    return row


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make one state, for any number of ranks and workers, of the states of all ranks.

    Raises InputError if they are not all, or not of one moment of one run.
    """
    first = states[0]
    streams = {s: positions for state in states for s, positions in state["streams"].items()}
    number = sum(len(state["streams"]) for state in states)
    apart = {(state["data"], state["rows"]) for state in states}
    if len(apart) > 1 or number != len(streams) or set(streams) != set(map(str, range(number))):
        raise InputError("the saved positions in the data are not those of all ranks of one step")
    epoch = max(state["epoch"] for state in states)
    return {**first, "epoch": epoch, "streams": {s: streams[s] for s in sorted(streams, key=int)}}


def check_readers(config: DataConfig, ranks: int, num_workers: int) -> None:
    """Raise InputError unless the readers divide the streams."""
    readers = ranks * max(num_workers, 1)
    if config.streams % readers == 0:
        return
    fitting = [n for n in range(1, config.streams + 1) if config.streams % (ranks * n) == 0]
    workers = f"num_workers of {', '.join(map(str, fitting))}" if fitting else "no num_workers"
    raise InputError(
        f"{ranks} ranks with {max(num_workers, 1)} workers each are {readers} readers, "
        f"which do not divide data.streams={config.streams}: with {ranks} ranks, {workers} would"
    )


def heldout_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, num_per_denoiser: int
) -> list[Example]:
    """Make the fixed examples for evaluation: so many texts under every denoiser."""
    data = UL2Data(config, tokenizer)
    return data.heldout_examples(data.choose_heldout(num_per_denoiser))


def write_heldout(path: Path, texts: Sequence[HeldoutText]) -> None:
    """Keep held-out texts with a run."""
    write_json(path, [text._asdict() for text in texts])


def read_heldout(path: Path) -> list[HeldoutText]:
    """Read what `write_heldout` wrote."""
    return [HeldoutText(**text) for text in json.loads(path.read_text(encoding="utf-8"))]


def rows(data: UL2Data, epochs: int | None = None) -> Iterator[Row]:
    """Yield rows in the global order in this process; streams that have ended are passed over."""
    begin = [BEGINNING] * len(data.opened)
    numbers = range(data.config.streams)
    dealers = Dealers(data, dict.fromkeys(numbers, begin))
    streams = [iter(Stream(data, s, begin, dealers, epochs)) for s in numbers]
    while streams:
        for stream in list(streams):
            row = next(stream, None)
            if row is None:
                streams.remove(stream)
            else:
                yield row


def special_ids(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, int, list[int]]:
    """Return ids of the sentinels (int32) after checking that they suffice, of EOS, and of each
    denoiser's mode token.

    Mode tokens are the first of the tokenizer's reserved ones; none without `mode_tokens`.
    """
    name = tokenizer.name_or_path
    ids = getattr(tokenizer, "sentinel_token_ids", None)
    if ids is None:
        raise InputError(f"tokenizer {name!r} has no sentinels; make one of Qwen3's first")
    check_capacity(config.denoisers, config.source_length, config.target_length, len(ids))
    modes: list[int] = []
    if config.mode_tokens:
        vocabulary = tokenizer.get_vocab()
        for denoiser in config.denoisers:
            token = f"<|reserved_{MODES.index(denoiser.name[0])}|>"
            if token not in vocabulary:
                raise InputError(f"data.mode_tokens: tokenizer {name!r} has no {token} to use")
            modes.append(vocabulary[token])
    return np.asarray(ids, dtype=np.int32), int(tokenizer.eos_token_id), modes
