"""The stream: every document once an epoch however it is dealt out, and exact resume."""

import gzip
import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from qwen3_encdec.data import sources, stream
from qwen3_encdec.data.collator import collate
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.packing import pack, packing_efficiency
from qwen3_encdec.data.sources import Document, open_corpus
from qwen3_encdec.data.stream import UL2Stream, build_stream, heldout_examples, is_heldout
from qwen3_encdec.data.tokenization import Encoder
from qwen3_encdec.data.ul2 import Example, uncorrupt
from qwen3_encdec.files import InputError
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

TEXT = "the encoder reads a source and its decoder writes one target of many tokens Ünïcödé 天地玄黃 0 1 23"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_ranks=512)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    for module in (sources, stream):
        monkeypatch.setattr(module, "SHARD_BYTES", 1500)


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
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts(30, 1))
    (folder / "c.txt").write_text("\n".join([*texts(25, 2), "", "x"]) + "\n", encoding="utf-8")
    pq.write_table(
        pa.table({"n": list(range(20)), "text": [*texts(19, 3), None]}), folder / "d.parquet", row_group_size=6
    )
    with pa.CompressedOutputStream(str(folder / "e.txt.zst"), "zstd") as out:
        out.write("\n".join(texts(10, 4)).encode())
    return folder


def data_config(corpus, **changes) -> DataConfig:
    settings = {"inputs": [str(corpus)], "source_length": 96, "target_length": 64, "heldout_every": 20}
    return DataConfig(**{**settings, **changes})


def key(example: Example) -> tuple:
    return example.source.tobytes(), example.target.tobytes(), example.denoiser


def keys(rows) -> list[tuple]:
    return [tuple(key(example) for example in row) for row in rows]


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
    given = sum(
        len(uncorrupt(e.source, e.target, sentinel_ids=source.sentinel_ids, eos_id=source.eos_id))
        for row in rows
        for e in row
    )
    assert given == counts["tokens"]  # no token of a used document is lost


def test_long_documents_are_used_to_their_end(corpus, tokenizer):
    source = UL2Stream(data_config(corpus), tokenizer)
    for length in [*range(8, 400), 3001]:
        tokens = np.arange(length) % 300
        chunks = [
            uncorrupt(e.source, e.target, sentinel_ids=source.sentinel_ids, eos_id=source.eos_id)
            for e in source.examples(Document(length, ""), tokens, epoch=0)
        ]
        np.testing.assert_array_equal(np.concatenate(chunks), tokens)
        assert min(map(len, chunks)) >= 8


def test_rows_keep_within_both_budgets(one_epoch):
    assert max(len(row) for row in one_epoch) > 2
    for row in one_epoch:
        assert sum(len(example.source) for example in row) <= 96
        assert sum(len(example.target) for example in row) <= 64


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_and_workers_gives_the_same_examples(corpus, tokenizer, one_epoch, world_size, workers):
    shares = [
        flat(loader(UL2Stream(data_config(corpus), tokenizer, rank=rank, world_size=world_size, epochs=1), workers))
        for rank in range(world_size)
    ]
    assert all(shares)
    assert examples_of(flat(shares)) == examples_of(one_epoch)
    if world_size > 1:
        assert examples_of(shares[0] * world_size) != examples_of(one_epoch)  # control: one rank alone is not enough


def test_a_corpus_of_fewer_shards_than_readers_is_dealt_out_by_documents(corpus, tokenizer):
    config = data_config(corpus, inputs=[str(corpus / "b.jsonl.gz")])
    whole = list(UL2Stream(config, tokenizer, epochs=1))
    shares = [list(UL2Stream(config, tokenizer, rank=rank, world_size=5, epochs=1)) for rank in range(5)]
    assert all(shares)
    assert examples_of(flat(shares)) == examples_of(whole)


def test_epochs_differ_in_order_and_corruption_but_not_in_text(corpus, tokenizer):
    two = list(UL2Stream(data_config(corpus), tokenizer, epochs=2))
    one = list(UL2Stream(data_config(corpus), tokenizer, epochs=1))
    assert keys(two[: len(one)]) == keys(one)
    first, second = examples_of(one), examples_of(two[len(one) :])
    assert sum((first & second).values()) < 0.2 * sum(first.values())
    other = list(UL2Stream(data_config(corpus, seed=1), tokenizer, epochs=1))
    assert keys(other) != keys(one)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
def test_resume_anywhere_twice_in_a_row(corpus, tokenizer, rank, world_size):
    def fresh() -> UL2Stream:
        return UL2Stream(data_config(corpus), tokenizer, rank=rank, world_size=world_size, epochs=2)

    straight = fresh()
    expected = keys(straight)
    for seed in range(12):
        rng = random.Random(seed)
        stops = sorted(rng.sample(range(len(expected) + 1), 2))
        taken: list = []
        state = fresh().state_dict()
        for stop in [*stops, len(expected)]:
            source = fresh()
            source.load_state_dict(json.loads(json.dumps(state)))
            iterator = iter(source)
            taken += keys(next(iterator) for _ in range(stop - len(taken)))
            state = source.state_dict()
        assert taken == expected
        assert len(json.dumps(state)) < 500
        assert list(iterator) == []
        assert source.counts == straight.counts
    restarted = iter(fresh())
    assert keys(next(restarted) for _ in range(5)) != expected[5:10]  # control: without the state it begins anew


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_resumes_exactly(corpus, tokenizer, workers):
    def fresh() -> StatefulDataLoader:
        return loader(build_stream(data_config(corpus), tokenizer), workers)

    straight = iter(fresh())
    expected = [keys(next(straight)) for _ in range(40)]  # into the second epoch
    taken, state = [], None
    for steps in (3, 17, 20):
        batches = fresh()
        if state:
            batches.load_state_dict(state)
        iterator = iter(batches)
        taken += [keys(next(iterator)) for _ in range(steps)]
        state = json.loads(json.dumps(batches.state_dict()))
    assert taken == expected
    restarted = iter(fresh())
    assert [keys(next(restarted)) for _ in range(3)] != expected[3:6]


def test_resume_reads_one_shard_not_all_before_it(corpus, tokenizer, monkeypatch):
    read = []
    parse = sources._parse
    monkeypatch.setattr(sources, "_parse", lambda line, *rest: read.append(len(line)) or parse(line, *rest))
    config = data_config(corpus, inputs=[str(corpus / "a.jsonl")])
    source = UL2Stream(config, tokenizer, epochs=1)
    *_, last = source
    everything, state = sum(read), source.state_dict()
    state["row"] -= 1
    resumed = UL2Stream(config, tokenizer, epochs=1)
    resumed.load_state_dict(state)
    read.clear()
    assert keys([next(iter(resumed))]) == keys([last])
    assert sum(read) < everything / 4


def test_a_state_of_another_stream_is_refused(corpus, tokenizer):
    state = UL2Stream(data_config(corpus), tokenizer).state_dict()
    with pytest.raises(InputError, match="another corpus"):
        UL2Stream(data_config(corpus, seed=1), tokenizer).load_state_dict(state)
    source = UL2Stream(data_config(corpus), tokenizer)
    next(iter(source))
    resumed = UL2Stream(data_config(corpus), tokenizer, rank=1, world_size=2)
    resumed.load_state_dict(source.state_dict())
    with pytest.raises(InputError, match="reader 0 of 1, this is 1 of 2"):
        next(iter(resumed))


def test_control_tokens_in_the_corpus_stay_text(tmp_path, tokenizer):
    attack = "ignore <extra_id_3> and <|im_end|> and <|endoftext|> <think> please " * 3
    (tmp_path / "attack.jsonl").write_text(json.dumps({"text": attack}))
    naive = tokenizer(attack)["input_ids"]
    control = {*tokenizer.sentinel_token_ids, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert control & set(naive)  # the attack works where nobody looks
    source = UL2Stream(data_config(tmp_path), tokenizer, epochs=1)
    (row,) = UL2Stream(data_config(tmp_path, source_length=512, target_length=512), tokenizer, epochs=1)
    tokens = uncorrupt(row[0].source, row[0].target, sentinel_ids=source.sentinel_ids, eos_id=source.eos_id)
    assert not control & set(tokens.tolist())
    assert tokenizer.decode(tokens) == attack


def test_fast_encoding_is_that_of_the_tokenizer(tokenizer):
    encode = Encoder(tokenizer)
    assert encode.fallback_reason is None
    for text in [
        *texts(40, 9),
        "e\u0301 \ud83d half a pair".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
    ]:
        assert encode(text).tolist() == tokenizer(text, split_special_tokens=True)["input_ids"]


def test_a_tokenizer_that_tiktoken_cannot_be_is_used_itself(tokenizer, caplog):
    from tokenizers import normalizers

    other = build_tokenizer(num_ranks=512)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    encode = Encoder(other)
    assert encode.fallback_reason is not None
    assert "Lowercase" in caplog.text
    assert encode("ABC <|im_end|>").tolist() == other("abc <|im_end|>", split_special_tokens=True)["input_ids"]
    ranks = build_tokenizer(num_ranks=512)
    pattern = json.loads(ranks.backend_tokenizer.to_str())
    pattern["model"]["merges"].reverse()  # the same vocabulary that merges in another order: only the sample can tell
    ranks._tokenizer = type(ranks.backend_tokenizer).from_str(json.dumps(pattern))
    assert "differ" in (Encoder(ranks).fallback_reason or "")


def test_heldout_texts_are_fixed_shared_by_denoisers_and_never_trained_on(corpus, tokenizer):
    config = data_config(corpus, heldout_every=5)
    held = heldout_examples(config, tokenizer, 6)
    assert [e.denoiser for e in held] == [0, 1, 2, 3, 4] * 6
    source = UL2Stream(config, tokenizer, epochs=1)
    ids = {"sentinel_ids": source.sentinel_ids, "eos_id": source.eos_id}
    originals = [tuple(uncorrupt(e.source, e.target, **ids)) for e in held]
    assert all(len(set(originals[i : i + 5])) == 1 for i in range(0, 30, 5))
    assert len(set(originals)) == 6
    assert all(len(e.source) <= 96 and len(e.target) <= 64 for e in held)
    again = heldout_examples(data_config(corpus, heldout_every=5, seed=9), tokenizer, 6)
    assert keys([again]) == keys([held])

    unseen = {
        document.text for shard in source.shards for document in shard.read() if is_heldout(document.text, config)
    }
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
    control = next(
        d.text for s in source.shards for d in s.read() if not is_heldout(d.text, config) and len(d.text) > 300
    )
    assert encode(control)[:40].tobytes() in trained


def test_heldout_inputs_replace_the_hash(corpus, tokenizer):
    config = data_config(corpus, inputs=[str(corpus / "a.jsonl")], heldout_inputs=[str(corpus / "c.txt")])
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
    loose = packing_efficiency([[e] for e in examples], 96, 64)[2]  # control: one example a row
    assert loose < 0.7 < 0.8 < packing_efficiency(rows, 96, 64)[2]
    with pytest.raises(ValueError, match="exceeds"):
        pack(examples, 10, 64)


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
    assert collate([[a]], pad_id=0, source_length=8, target_length=6)["labels"].shape == (1, 6)


def test_a_corpus_without_one_usable_document_is_an_error(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("a\nb\n\n")
    with pytest.raises(InputError, match="no example"):
        next(iter(UL2Stream(data_config(tmp_path), tokenizer)))


def test_shards_partition_a_file_at_any_size(corpus, monkeypatch):
    expected = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_text().splitlines()]
    for size in (1, 37, 500, 10**6):
        monkeypatch.setattr(sources, "SHARD_BYTES", size)
        shards = open_corpus([str(corpus / "a.jsonl")])
        documents = [document for shard in shards for document in shard.read()]
        assert [document.text for document in documents] == expected
        assert len({document.id for document in documents}) == len(expected)
