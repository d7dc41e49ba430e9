"""The stream: every document once an epoch however it is dealt out, and exact resume."""

import copy
import gzip
import json
import random
import tracemalloc
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from qwen3_encdec.data import corpus as sources
from qwen3_encdec.data.collate import collate, fewest_rows, pack
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.corpus import open_corpus
from qwen3_encdec.data.stream import (
    UL2Stream,
    build_stream,
    heldout_examples,
    redeal,
    resume,
)
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.data.ul2 import Example, uncorrupt
from qwen3_encdec.folders import InputError
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

TEXT = "the encoder reads a source and its decoder writes one target of many tokens Ünïcödé 天地玄黃 0 1 23"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_ranks=512)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 1500)


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice([1, 8, 20, 60, 200]))) for _ in range(count)]


@pytest.fixture
def corpus(tmp_path):
    """The same kind of text as plain and compressed lines, parquet and txt."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts(60, 0))]
    (folder / "a.jsonl").write_text("\n".join(lines))  # no newline at the end
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(
            json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts(30, 1)
        )
    (folder / "c.txt").write_text("\n".join([*texts(25, 2), "", "x"]) + "\n", encoding="utf-8")
    pq.write_table(
        pa.table({"n": list(range(20)), "text": [*texts(19, 3), None]}),
        folder / "d.parquet",
        row_group_size=6,
    )
    with pa.CompressedOutputStream(str(folder / "e.txt.zst"), "zstd") as out:
        out.write("\n".join(texts(10, 4)).encode())
    return folder


def data_config(corpus, **changes) -> DataConfig:
    settings = {
        "inputs": [str(corpus)],
        "source_length": 96,
        "target_length": 64,
        "heldout_every": 20,
    }
    return DataConfig(**{**settings, **changes})


def key(example: Example) -> tuple:
    return example.source.tobytes(), example.target.tobytes(), example.denoiser


def keys(rows) -> list[tuple]:
    return [tuple(key(example) for example in row) for row in rows]


def ids_of(source: UL2Stream) -> dict:
    return {"sentinel_ids": source.sentinel_ids, "eos_id": source.eos_id}


def examples_of(rows) -> Counter:
    return Counter(key(example) for row in rows for example in row)


def loader(source: UL2Stream, workers: int) -> StatefulDataLoader:
    return StatefulDataLoader(source, batch_size=3, collate_fn=list, num_workers=workers)


def flat(batches) -> list:
    return [row for batch in batches for row in batch]


@pytest.fixture
def one_epoch(corpus, tokenizer) -> list:
    return list(UL2Stream(data_config(corpus), tokenizer, epochs=1))


def test_documents_in_are_used_refused_or_held_out(corpus, tokenizer):
    source = UL2Stream(data_config(corpus), tokenizer, epochs=1)
    rows = list(source)
    counts = source.counts
    assert counts["documents"] == 60 + 30 + 27 + 20 + 10
    assert counts["documents"] == counts["used"] + counts["refused"] + counts["heldout"]
    assert counts["refused"] >= 3  # the empty line, "x" and the null
    assert counts["heldout"] > 0
    given = sum(len(uncorrupt(e.source, e.target, **ids_of(source))) for row in rows for e in row)
    assert given == counts["tokens"]  # no token of a used document is lost


def test_long_documents_are_used_to_their_end(corpus, tokenizer):
    source = UL2Stream(data_config(corpus), tokenizer)
    lengths = np.array([*range(8, 400), 3001])
    tokens = np.concatenate([np.arange(length) % 300 for length in lengths])
    examples = source.examples(lengths * 7, tokens, lengths, epoch=0).split()
    chunks = iter(uncorrupt(e.source, e.target, **ids_of(source)) for e in examples)
    for length in lengths:
        pieces: list = []
        while sum(map(len, pieces)) < length:
            pieces.append(next(chunks))
        np.testing.assert_array_equal(np.concatenate(pieces), np.arange(length) % 300)
        assert min(map(len, pieces)) >= 8
    assert next(chunks, None) is None


def test_rows_keep_within_both_budgets(one_epoch):
    assert max(len(row) for row in one_epoch) > 2
    for row in one_epoch:
        assert sum(len(example.source) for example in row) <= 96
        assert sum(len(example.target) for example in row) <= 64


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_any_number_of_ranks_and_workers_gives_the_same_rows(
    corpus, tokenizer, one_epoch, world_size, workers
):
    source = UL2Stream(data_config(corpus), tokenizer, epochs=1)
    shares = []
    for source.rank in range(world_size):
        source.world_size = world_size
        shares.append(flat(loader(source, workers)))
    assert Counter(keys(flat(shares))) == Counter(keys(one_epoch))
    if world_size > 1:
        assert examples_of(shares[0] * world_size) != examples_of(
            one_epoch
        )  # control: one rank alone is not enough


@pytest.mark.parametrize("name", ["b.jsonl.gz", "d.parquet", "a.jsonl"])
def test_a_corpus_of_fewer_shards_than_readers(corpus, tokenizer, name):
    config = data_config(corpus, inputs=[str(corpus / name)])
    whole = list(UL2Stream(config, tokenizer, epochs=3))
    shares = [
        list(UL2Stream(config, tokenizer, rank=rank, world_size=7, epochs=3)) for rank in range(7)
    ]
    assert Counter(keys(flat(shares))) == Counter(keys(whole))
    assert all(shares)


def test_a_reader_opens_only_the_compressed_files_that_are_its_own(corpus, tokenizer, monkeypatch):
    folder = corpus.with_name("many")
    folder.mkdir()
    for number in range(16):
        with gzip.open(folder / f"{number}.txt.gz", "wt") as file:
            file.write("\n".join(texts(20, number)))
    opened: list[str] = []
    open_file = sources.Lines._open
    monkeypatch.setattr(
        sources.Lines, "_open", lambda self: opened.append(self.path) or open_file(self)
    )
    config = data_config(folder)
    source = UL2Stream(config, tokenizer, epochs=1)
    everything = Counter(keys(source))
    opened.clear()
    readers = [reader(source, rank, 4) for rank in range(4)]
    given = flat(take(readers, [None] * 4))
    assert len(opened) == len(set(opened)) == 16
    assert Counter(given) == everything

    readers = [reader(source, rank, 4) for rank in range(4)]
    given = flat(take(readers, [None, 2, 0, 9]))
    merged = redeal([other.state_dict() for other in readers])
    opened.clear()
    given += flat(take([reader(source, rank, 2, merged) for rank in range(2)], [None, None]))
    assert (
        len(opened) == len(set(opened)) < 13
    )  # what the first reader has read through stays closed
    assert Counter(given) == everything


def test_a_long_context_from_tokenizer_to_rows(tmp_path):
    many = build_tokenizer(num_ranks=512, num_sentinel_tokens=1262)
    words = random.Random(0).choices(WORDS, k=60_000)
    (tmp_path / "a.txt").write_text(" ".join(words))
    config = DataConfig(
        [str(tmp_path)], source_length=16_384, target_length=16_384, heldout_inputs=["elsewhere"]
    )
    source = UL2Stream(config, many, epochs=6)
    rows = list(source)
    assert {e.denoiser for row in rows for e in row} == set(range(5))
    assert max(len(e.source) for row in rows for e in row) > 16_000
    assert all(
        sum(len(e.source) for e in row) <= 16_384 and sum(len(e.target) for e in row) <= 16_384
        for row in rows
    )
    whole = sum(len(uncorrupt(e.source, e.target, **ids_of(source))) for row in rows for e in row)
    assert whole == source.counts["tokens"]
    with pytest.raises(
        InputError, match="R2 needs up to 1262 sentinels .*--num-sentinel-tokens 1262"
    ):
        UL2Stream(config, build_tokenizer(num_ranks=512, num_sentinel_tokens=1261))


def test_epochs_differ_in_order_and_corruption_but_not_in_text(corpus, tokenizer):
    two = list(UL2Stream(data_config(corpus), tokenizer, epochs=2))
    one = list(UL2Stream(data_config(corpus), tokenizer, epochs=1))
    assert keys(two[: len(one)]) == keys(one)
    first, second = examples_of(one), examples_of(two[len(one) :])
    assert sum((first & second).values()) < 0.2 * sum(first.values())
    other = list(UL2Stream(data_config(corpus, seed=1), tokenizer, epochs=1))
    assert keys(other) != keys(one)


def reader(source: UL2Stream, rank: int, world_size: int, state: dict | None = None) -> UL2Stream:
    """The same stream seen by another reader, without opening its corpus again."""
    other = copy.copy(source)
    other.rank, other.world_size = rank, world_size
    other.load_state_dict(json.loads(json.dumps(state or source.state_at_epoch(0))))
    return other


def take(readers: list[UL2Stream], counts: list[int | None]) -> list[list]:
    """So many rows of each reader, None for all."""
    return [keys(islice(source, count)) for source, count in zip(readers, counts, strict=True)]


def test_resume_after_200_random_stops_and_again_with_any_number_of_readers(corpus, tokenizer):
    inputs = [str(corpus / name) for name in ("b.jsonl.gz", "c.txt", "d.parquet")]
    source = UL2Stream(data_config(corpus, inputs=inputs), tokenizer, epochs=2)
    alone = keys(source)
    changes = wrong = 0
    for seed in range(100):
        rng = random.Random(seed)
        sizes = [rng.choice([1, 2, 3, 8, 12]) for _ in range(3)]
        readers = [reader(source, rank, sizes[0]) for rank in range(sizes[0])]
        given: list = []
        for before, after in pairwise(sizes):  # two stops
            fair = len(alone) // before // 2
            got = take(readers, [rng.randrange(fair + 1) for _ in readers])
            given += flat(got)
            states = [source.state_dict() for source in readers]
            merged = redeal(states)
            assert max(len(json.dumps(state)) for state in states) < 300 + 150 * sum(sizes)
            readers = [reader(source, rank, after, merged) for rank in range(after)]
            changes += before != after
        remaining = flat(take(readers, [None] * len(readers)))
        assert Counter(given + remaining) == Counter(alone)
        counts = [other.counts for other in readers]
        assert sum(counts, Counter()) == source.counts  # no document is lost, none counted twice
        wrong += Counter(flat(take([reader(source, 0, 1, {**merged, "sources": [
            {**part, "deals": []} for part in merged["sources"]]})], [None])) + given) != Counter(alone)  # fmt: skip
    assert changes > 100
    assert wrong > 50  # control: without the former readers' places rows come twice


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
def test_resume_gives_the_same_rows_in_the_same_order(corpus, tokenizer, rank, world_size):
    inputs = [str(corpus / name) for name in ("b.jsonl.gz", "c.txt", "d.parquet")]
    source = UL2Stream(
        data_config(corpus, inputs=inputs), tokenizer, rank=rank, world_size=world_size, epochs=2
    )
    expected = keys(source)
    for seed in range(50):
        rng = random.Random(seed)
        stops = sorted(rng.sample(range(len(expected) + 1), 2))
        taken: list = []
        state = source.state_at_epoch(0)
        for stop in [*stops, len(expected)]:
            resumed = reader(source, rank, world_size, state)
            iterator = iter(resumed)
            taken += keys(next(iterator) for _ in range(stop - len(taken)))
            state = resumed.state_dict()
        assert taken == expected
        assert len(json.dumps(state)) < 500
        assert list(iterator) == []
        assert resumed.counts == source.counts
    restarted = iter(reader(source, rank, world_size))
    assert (
        keys(next(restarted) for _ in range(5)) != expected[5:10]
    )  # control: without the state it begins anew


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_resumes_exactly(corpus, tokenizer, workers):
    source = build_stream(data_config(corpus), tokenizer)
    straight = iter(loader(source, workers))
    expected = [keys(next(straight)) for _ in range(40)]  # into the second epoch
    taken, state = [], None
    for steps in (3, 17, 20):
        batches = loader(source, workers)
        if state:
            assert resume(source, batches, [state]) is None
        iterator = iter(batches)
        taken += [keys(next(iterator)) for _ in range(steps)]
        state = json.loads(json.dumps(batches.state_dict()))
    assert taken == expected
    restarted = iter(loader(build_stream(data_config(corpus), tokenizer), workers))
    assert [keys(next(restarted)) for _ in range(3)] != expected[3:6]


def test_loaders_resume_with_other_ranks_and_workers(corpus, tokenizer):
    source = UL2Stream(data_config(corpus), tokenizer, epochs=1)
    everything = Counter(keys(source))
    given: list = []
    states: list = []
    for (world_size, workers), batches_each in (((2, 2), 3), ((3, 0), 2), ((1, 3), None)):
        next_states = []
        for rank in range(world_size):
            share = reader(source, rank, world_size)
            batches = loader(share, workers)
            if states:
                assert "dealt out" in resume(share, batches, states)
            iterator = iter(batches)
            given += keys(flat(islice(iterator, batches_each)))
            next_states.append(json.loads(json.dumps(batches.state_dict())))
        states = next_states
    assert Counter(given) == everything


def test_resume_reads_one_shard_not_all_before_it(corpus, tokenizer, monkeypatch):
    read = []
    parse = sources._parse
    monkeypatch.setattr(
        sources, "_parse", lambda line, *rest: read.append(len(line)) or parse(line, *rest)
    )
    config = data_config(corpus, inputs=[str(corpus / "a.jsonl")])
    source = UL2Stream(config, tokenizer, epochs=1)
    *_, last = source
    everything, state = sum(read), source.state_dict()
    state["sources"][0]["place"] = [0, len(source.sources[0]) - 1, 0, 0]
    resumed = UL2Stream(config, tokenizer, epochs=1)
    resumed.load_state_dict(state)
    read.clear()
    assert keys(resumed)[-1:] == keys([last])
    assert sum(read) < everything / 4


def test_a_state_of_another_stream_is_refused_unless_asked_for(corpus, tokenizer):
    source = UL2Stream(data_config(corpus), tokenizer)
    next(iter(source))
    state = source.state_dict()
    with pytest.raises(InputError, match="another corpus"):
        UL2Stream(data_config(corpus, seed=1), tokenizer).load_state_dict(state)
    resumed = UL2Stream(data_config(corpus), tokenizer, rank=1, world_size=2)
    resumed.load_state_dict(state)
    with pytest.raises(InputError, match="reader 0 of 1, this is 1 of 2"):
        next(iter(resumed))
    with pytest.raises(InputError, match="places of all readers"):
        redeal([reader(source, 1, 2).state_dict()])
    with pytest.raises(InputError, match="another corpus"):
        UL2Stream(data_config(corpus), build_tokenizer(num_ranks=511)).load_state_dict(state)
    edited = (corpus / "a.jsonl").read_text().replace("target", "tarsal")
    (corpus / "a.jsonl").write_text(edited)  # the same size
    changed = UL2Stream(data_config(corpus), tokenizer)
    batches = loader(changed, 0)
    with pytest.raises(InputError, match="accept_changes"):
        resume(changed, batches, [{"dataset_state": state}])
    changed = UL2Stream(data_config(corpus, accept_changes=True), tokenizer, epochs=2)
    assert "new at epoch 1" in resume(changed, batches, [{"dataset_state": state}])
    assert Counter(keys(changed)) == Counter(
        keys(UL2Stream(data_config(corpus), tokenizer, epochs=2))
    ) - Counter(keys(UL2Stream(data_config(corpus), tokenizer, epochs=1)))


def fingerprint(corpus, tokenizer, **changes) -> str:
    return UL2Stream(data_config(corpus, **changes), tokenizer).fingerprint


def test_what_makes_a_stream_another_one(corpus, tokenizer, monkeypatch):
    before = fingerprint(corpus, tokenizer)
    assert fingerprint(corpus.rename(corpus.with_name("moved")), tokenizer) == before
    corpus = corpus.with_name("moved")
    parts = [{"inputs": [str(corpus / "a.jsonl")]}, {"inputs": [str(corpus / "c.txt")]}]
    others = {
        fingerprint(corpus, tokenizer, mixture=parts),
        fingerprint(corpus, tokenizer, mixture=[{**parts[0], "weight": 3}, parts[1]]),
        fingerprint(corpus, tokenizer, mixture=parts[::-1]),
        fingerprint(corpus, tokenizer, mixture=parts, heldout_inputs=["elsewhere"]),
    }
    assert len(others | {before}) == 5
    text = (corpus / "a.jsonl").read_text()
    middle = len(text) // 2
    (corpus / "a.jsonl").write_text(
        text[:middle] + ("b" if text[middle] == "a" else "a") + text[middle + 1 :]
    )
    assert fingerprint(corpus, tokenizer) != before
    monkeypatch.setattr(sources, "_LOOKED_AT", 0)  # control: a corpus too large to be read whole
    unseen = fingerprint(corpus, tokenizer)
    (corpus / "a.jsonl").write_text(text)
    assert fingerprint(corpus, tokenizer) == unseen


def test_mixtures_keep_to_their_weights_and_to_one_pass_an_epoch(corpus, tokenizer):
    numbers = random.Random(7)
    lines = (
        " ".join(str(numbers.randrange(1000)) for _ in range(numbers.randrange(90)))
        for _ in range(40)
    )
    (corpus / "numbers.txt").write_text("\n".join(lines))
    parts = [
        {"inputs": [str(corpus / "a.jsonl")], "weight": 3},
        {"inputs": [str(corpus / "numbers.txt")]},
    ]
    config = data_config(corpus, mixture=parts)
    source = UL2Stream(config, tokenizer)
    of_numbers = set(source.encode("0123456789 ").tolist())
    tokens = [0, 0]
    for row in islice(source, 300):
        text = np.concatenate(
            [uncorrupt(e.source, e.target, **ids_of(source)) for e in row]
        ).tolist()
        tokens[set(text) <= of_numbers] += sum(len(e.source) + len(e.target) for e in row)
    assert abs(tokens[0] / tokens[1] - 3) < 0.1
    assert [part["tokens"] for part in source.state_dict()["sources"]] == tokens

    whole = UL2Stream(config, tokenizer, epochs=2)
    everything = Counter(keys(whole))
    shares = [reader(whole, rank, 3) for rank in range(3)]
    given_rows = flat(take(shares, [9, 4, 14]))
    merged = redeal([share.state_dict() for share in shares])
    assert (
        Counter(
            given_rows + flat(take([reader(whole, r, 2, merged) for r in range(2)], [None, None]))
        )
        == everything
    )
    first = UL2Stream(data_config(corpus, inputs=parts[0]["inputs"]), tokenizer, epochs=2)
    assert not Counter(keys(first)) - everything
    for bad, message in (
        ([{"inputs": []}], "inputs is empty"),
        ([{"inputs": ["a"], "weight": 0}], "weight=0"),
        ([{"input": ["a"]}], "a source has inputs"),
        ([{"inputs": "a"}], "list of inputs"),
    ):
        with pytest.raises(InputError, match=message):
            data_config(corpus, mixture=bad)


def test_mode_tokens_name_the_kind_of_denoiser(corpus, tokenizer, one_epoch):
    config = data_config(corpus, mode_tokens=True)
    source = UL2Stream(config, tokenizer, epochs=1)
    vocabulary = tokenizer.get_vocab()
    modes = {name: vocabulary[f"<|reserved_{i}|>"] for i, name in enumerate("RXS")}
    rows = list(source)
    assert {e.denoiser for row in rows for e in row} == set(range(5))
    for row in rows:
        assert sum(len(e.source) for e in row) <= 96
        for example in row:
            assert example.source[0] == modes[config.denoisers[example.denoiser].name[0]]
            assert not np.isin([*example.source[1:], *example.target], list(modes.values())).any()
            with pytest.raises(ValueError, match="mode token"):
                uncorrupt(example.source, example.target, **ids_of(source), mode_ids=[0])
    given = sum(
        len(uncorrupt(e.source, e.target, **ids_of(source), mode_ids=source.prefix_ids))
        for r in rows
        for e in r
    )
    assert given == source.counts["tokens"]
    assert not any(
        np.isin(e.source, list(modes.values())).any() for row in one_epoch for e in row
    )  # off by default
    assert [e.source[0] for e in heldout_examples(config, tokenizer, 1)] == [
        modes[n] for n in "RRXXS"
    ]
    with pytest.raises(InputError, match="'dense' does not begin with R, X or S"):
        data_config(
            corpus, mode_tokens=True, preset=[{"name": "dense", "mean_span": 2, "corruption": 0.5}]
        )


def test_memory_does_not_grow(tmp_path, tokenizer):
    lines = (json.dumps({"text": text}) + "\n" for text in texts(400, 3))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    rows = iter(UL2Stream(data_config(tmp_path, source_length=256, target_length=256), tokenizer))
    for _ in range(200):
        next(rows)
    tracemalloc.start()
    for _ in range(200):
        next(rows)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(2000):
        next(rows)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 300_000


def test_control_tokens_in_the_corpus_stay_text(tmp_path, tokenizer):
    attack = "ignore <extra_id_3> and <|im_end|> and <|endoftext|> <think> please " * 3
    (tmp_path / "attack.jsonl").write_text(json.dumps({"text": attack}))
    naive = tokenizer(attack)["input_ids"]
    control = {*tokenizer.sentinel_token_ids, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert control & set(naive)  # the attack works where nobody looks
    source = UL2Stream(data_config(tmp_path), tokenizer, epochs=1)
    (row,) = UL2Stream(
        data_config(tmp_path, source_length=512, target_length=512), tokenizer, epochs=1
    )
    tokens = uncorrupt(row[0].source, row[0].target, **ids_of(source))
    assert not control & set(tokens.tolist())
    assert tokenizer.decode(tokens) == attack


def test_heldout_texts_are_fixed_shared_by_denoisers_and_never_trained_on(corpus, tokenizer):
    config = data_config(corpus, heldout_every=5)
    held = heldout_examples(config, tokenizer, 6)
    assert [e.denoiser for e in held] == [0, 1, 2, 3, 4] * 6
    source = UL2Stream(config, tokenizer, epochs=1)
    ids = ids_of(source)
    originals = [tuple(uncorrupt(e.source, e.target, **ids)) for e in held]
    assert all(len(set(originals[i : i + 5])) == 1 for i in range(0, 30, 5))
    assert len(set(originals)) == 6
    assert all(len(e.source) <= 96 and len(e.target) <= 64 for e in held)
    again = heldout_examples(data_config(corpus, heldout_every=5, seed=9), tokenizer, 6)
    assert keys([again]) == keys([held])

    documents = [document for shard in source.sources[0] for document in flat(shard.blocks())]
    unseen = {document.text for document in documents if document.checksum % 5 == 0}
    trained = b"".join(
        tokens.astype(np.int32).tobytes()
        for row in source
        for example in row
        for tokens in [uncorrupt(example.source, example.target, **ids)]
    )
    encode = Encoder(tokenizer)
    long = [text for text in unseen if len(encode(text)) > 45]
    assert long
    assert not any(encode(text)[:40].tobytes() in trained for text in long)
    control = next(d.text for d in documents if d.checksum % 5 and len(d.text) > 300)
    assert encode(control)[:40].tobytes() in trained


def test_heldout_inputs_replace_the_hash(corpus, tokenizer):
    config = data_config(
        corpus, inputs=[str(corpus / "a.jsonl")], heldout_inputs=[str(corpus / "c.txt")]
    )
    assert len(heldout_examples(config, tokenizer, 3)) == 15
    source = UL2Stream(config, tokenizer, epochs=1)
    list(source)
    assert source.counts["heldout"] == 0
    with pytest.raises(InputError, match="there are"):
        heldout_examples(config, tokenizer, 500)


def test_packing_is_deterministic_complete_and_close_to_the_bound(one_epoch):
    examples = [example for row in one_epoch for example in row] * 3
    rows = pack(examples, 96, 64)
    assert keys(rows) == keys(pack(examples, 96, 64))
    assert examples_of(rows) == examples_of([examples])
    fewest = fewest_rows(examples, 96, 64)
    assert fewest / len(examples) < 0.85 < 0.97 < fewest / len(rows)  # control: one example a row
    with pytest.raises(ValueError, match="exceeds"):
        pack(examples, 10, 64)


def test_no_packing_needs_fewer_rows_than_the_bound():
    def best(sizes: list[tuple[int, int]], rooms: list[tuple[int, int]]) -> int:
        if not sizes:
            return len(rooms)
        (source, target), *others = sizes
        fits = [i for i, (s, t) in enumerate(rooms) if s >= source and t >= target]
        options = [
            (i, [*rooms[:i], (rooms[i][0] - source, rooms[i][1] - target), *rooms[i + 1 :]])
            for i in fits
        ]
        return min(
            best(others, rooms)
            for rooms in [r for _, r in options] + [[*rooms, (10 - source, 6 - target)]]
        )

    rng = np.random.default_rng(0)
    tight = too_high = 0
    for _ in range(150):
        sizes = [(int(rng.integers(1, 11)), int(rng.integers(1, 7))) for _ in range(6)]
        examples = [Example(np.zeros(s), np.zeros(t), 0) for s, t in sizes]
        bound, optimum = fewest_rows(examples, 10, 6), best(sizes, [])
        assert bound <= optimum + 1e-9
        assert len(pack(examples, 10, 6)) >= optimum
        tight += bound > optimum - 1
        too_high += (
            bound + 1 > optimum
        )  # control: the check would notice a bound that is one too high
    assert tight > 60
    assert too_high > 60


def test_buckets_hold_the_same_examples_and_need_less_padding(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 10**6)
    rows = list(UL2Stream(data_config(corpus, packing="buckets"), tokenizer, epochs=1))
    assert all(len(row) == 1 for row in rows)
    assert examples_of(rows) == examples_of(UL2Stream(data_config(corpus), tokenizer, epochs=1))

    def padded(rows: list) -> int:
        batches = [collate(rows[start : start + 4], pad_id=0) for start in range(0, len(rows), 4)]
        return sum(batch["input_ids"].numel() + batch["labels"].numel() for batch in batches)

    unsorted = list(UL2Stream(data_config(corpus, packing=False), tokenizer, epochs=1))
    real = sum(len(e.source) + len(e.target) for (e,) in rows)
    assert padded(rows) - real < 0.5 * (padded(unsorted) - real)


def test_without_packing_a_row_is_an_example(corpus, tokenizer, one_epoch):
    rows = list(UL2Stream(data_config(corpus, packing=False), tokenizer, epochs=1))
    assert all(len(row) == 1 for row in rows)
    assert examples_of(rows) == examples_of(one_epoch)


def test_collate_by_hand():
    a = Example(np.array([5, 6, 9], np.int32), np.array([7, 9], np.int32), 2)
    b = Example(np.array([8, 9], np.int32), np.array([1, 2, 9], np.int32), 0)
    batch = collate([[a, b], [b]], pad_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 9, 8, 9], [8, 9, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]],
        "labels": [[7, 9, 1, 2, 9], [1, 2, 9, -100, -100]],
        "decoder_attention_mask": [[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]],
        "denoiser": [[2, 2, 0, 0, 0], [0, 0, 0, -1, -1]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert (
        len({tensor.untyped_storage().data_ptr() for tensor in batch.values()}) == 1
    )  # one piece between processes
    assert collate([[a]], pad_id=0, source_length=8, target_length=6)["labels"].shape == (1, 6)


def test_a_corpus_without_one_usable_document_is_an_error(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("a\nb\n\n")
    with pytest.raises(InputError, match="no example"):
        next(iter(UL2Stream(data_config(tmp_path), tokenizer)))


def test_a_line_longer_than_many_shards_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 2**14)
    long = "word " * 200_000
    (tmp_path / "a.txt").write_text(f"first\n{long}\nlast\n")
    read = []
    open_file = sources.Lines._open

    def counting(self):
        file = open_file(self)
        raw = file.readline
        return type("Counting", (), {
            "__enter__": lambda self: self, "__exit__": lambda *_: file.close(), "seek": lambda _, at: file.seek(at),
            "readline": lambda _, *size: read.append(raw(*size)) or read[-1],
        })()  # fmt: skip

    monkeypatch.setattr(sources.Lines, "_open", counting)
    shards = open_corpus([str(tmp_path)])
    documents = [document.text for shard in shards for document in flat(shard.blocks())]
    assert len(shards) > 60
    assert documents == ["first", long, "last"]
    assert sum(map(len, read)) < 2.1 * len(long)


def test_shards_partition_a_file_at_any_size(corpus, monkeypatch):
    expected = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_text().splitlines()]
    for size in (1, 37, 500, 10**6):
        monkeypatch.setattr(sources, "SHARD_BYTES", size)
        shards = open_corpus([str(corpus / "a.jsonl")])
        documents = [document for shard in shards for document in flat(shard.blocks())]
        assert [document.text for document in documents] == expected
        assert len({document.id for document in documents}) == len(expected)
