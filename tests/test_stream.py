"""The stream: one order for any number of machines, every document once an epoch, exact resume."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import chisquare
from torch.utils.data import get_worker_info

from qwen3_encdec.data import corpus as corpora
from qwen3_encdec.data import stream
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import (
    RowLoader,
    UL2Data,
    check_readers,
    heldout_examples,
    merge_states,
    read_heldout,
    rows,
)
from qwen3_encdec.data.ul2 import uncorrupt
from qwen3_encdec.folders import InputError, write_json
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

TEXT = "the encoder reads a source and its decoder writes one target Ünïcödé 天地玄黃 0 1 23"
WORDS = TEXT.split()
RANKS, WORKERS = (1, 2, 4, 8), (0, 1, 2, 4)
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_ranks=512)


def texts(count: int, seed: int) -> list[str]:
    """Distinct texts, so short that none is cut."""
    rng = random.Random(seed)
    return [
        f"{seed} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for i in range(count)
    ]


def write_lines(file, lines) -> None:
    body = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    file.write_bytes({".gz": gzip.compress, ".zst": zstd}.get(file.suffix, bytes)(body))


def zstd(body: bytes) -> bytes:
    return pa.compress(body, "zstd", asbytes=True)


@pytest.fixture
def folder(tmp_path):
    """Every kind of file, as uneven as 1 to 300."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "a.jsonl", texts(300, 0))
    write_lines(folder / "b.jsonl.gz", texts(40, 1))
    (folder / "c.txt").write_text("\n".join(texts(25, 2)), encoding="utf-8")
    table = pa.table({"n": list(range(20)), "text": texts(20, 3)})
    pq.write_table(table, folder / "d.parquet", row_group_size=6)
    (folder / "e.txt.zst").write_bytes(zstd("\n".join(texts(10, 4)).encode()))
    write_lines(folder / "f.jsonl", texts(1, 5))
    return folder


ALL = Counter(t for seed, n in enumerate((300, 40, 25, 20, 10, 1)) for t in texts(n, seed))


def config_of(folder, **changes) -> DataConfig:
    settings = {"inputs": [str(folder)], "source_length": 256, "target_length": 192}
    return DataConfig(**{**settings, "heldout_every": 10**9, "min_tokens": 2, **changes})


def chunks(data, made) -> list[np.ndarray]:
    """The tokens that rows were made of."""
    marks = {"sentinel_ids": data.sentinel_ids, "eos_id": data.eos_id}
    return [uncorrupt(e.source, e.target, **marks) for row in made for e in row.examples]


def documents(data, tokenizer, made) -> list[str]:
    """The texts that rows were made of."""
    return [tokenizer.decode(chunk) for chunk in chunks(data, made)]


def key(row) -> tuple:
    return tuple((e.source.tobytes(), e.target.tobytes(), e.denoiser) for e in row.examples)


def steps(data, ranks, workers, state, number, global_batch=16):
    """Rows of each optimizer step, as sets, by real loaders; and the state of all ranks behind."""
    loaders = [
        RowLoader(data, batch_size=global_batch // ranks, rank=rank, ranks=ranks,
                  num_workers=workers, collate=list, state=state)
        for rank in range(ranks)
    ]  # fmt: skip
    batches = [iter(loader) for loader in loaders]
    made = []
    for _ in range(number):
        step = Counter(key(row) for batch in batches for row in next(batch))
        made.append(step)
    return made, [loader.state_dict() for loader in loaders]


@pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["cached", "streamed"])
def test_a_step_has_the_same_rows_for_any_ranks_and_workers(
    folder, tokenizer, cache_gib, monkeypatch
):
    data = UL2Data(config_of(folder, cache_gib=cache_gib), tokenizer)
    straight, _ = steps(data, 1, 0, None, 5)
    assert len(set().union(*straight)) > 40
    pairs = [(ranks, workers) for ranks in RANKS for workers in WORKERS if ranks * workers <= 8]
    pairs = pairs if cache_gib else pairs[::3]
    for number, (ranks, workers) in enumerate(pairs):
        first, states = steps(data, ranks, workers, None, 2)
        assert first == straight[:2], (ranks, workers)
        # and goes on with another pair, after a round trip through JSON
        state, note = data.adopt(merge_states(json.loads(json.dumps(states))))
        assert note is None
        others = pairs[(number * 5 + 3) % len(pairs)]
        rest, _ = steps(data, *others, state, 3)
        assert rest == straight[2:], (ranks, workers, others)
    # The control: each rank's workers in the wrong order.
    straight, _ = steps(data, 1, 0, None, 5, global_batch=2)
    assert steps(data, 2, 2, None, 5, global_batch=2)[0] == straight
    wrong = lambda: SimpleNamespace(num_workers=2, id=1 - get_worker_info().id)  # noqa: E731
    monkeypatch.setattr(stream, "get_worker_info", wrong)
    assert steps(data, 2, 2, None, 5, global_batch=2)[0] != straight


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (0, 4), (4, 1), (2, 0)])
def test_resume_with_other_workers_in_the_middle_of_their_turn(folder, tokenizer, before, after):
    data = UL2Data(config_of(folder), tokenizer)
    straight, _ = steps(data, 1, 0, None, 6, global_batch=3)
    first, states = steps(data, 1, before, None, 2, global_batch=3)
    rest, _ = steps(data, 1, after, merge_states(states), 4, global_batch=3)
    assert first + rest == straight


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_is_iterated_again_goes_on(folder, tokenizer, workers):
    data = UL2Data(config_of(folder), tokenizer)
    straight, (state,) = steps(data, 1, 0, None, 4)
    loader = RowLoader(data, batch_size=16, num_workers=workers, collate=list)
    made = [batch for _ in range(2) for batch in islice(loader, 2)]
    assert [Counter(map(key, batch)) for batch in made] == straight
    assert loader.state_dict() == state
    # The state is small, readable JSON.
    assert len(json.dumps(state)) < 64 * 160
    assert (state["rows"], len(state["streams"])) == (64, 64)
    assert set(state["streams"]["3"][0]) == set(stream.BEGINNING)


@pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["cached", "streamed"])
def test_every_document_once_an_epoch(folder, tokenizer, cache_gib):
    data = UL2Data(config_of(folder, cache_gib=cache_gib), tokenizer)
    assert any(getattr(f, "streamed", False) for f in data.opened[0].files) == (cache_gib == 0)
    once = documents(data, tokenizer, rows(data, epochs=1))
    assert Counter(once) == ALL
    twice = documents(data, tokenizer, rows(data, epochs=2))
    assert Counter(twice) == ALL + ALL
    # Corrupted and packed in another way.
    assert len({key(row) for row in rows(data, epochs=2)}) > 1.8 * len(list(rows(data, epochs=1)))


def shares(data, tokenizer, readers: int, count: int) -> list[int]:
    """Documents of the large file and of the small ones in the first rows of all readers."""
    loaders = [
        iter(RowLoader(data, batch_size=1, rank=r, ranks=readers, collate=list))
        for r in range(readers)
    ]
    made = [row for _ in range(count // readers) for loader in loaders for row in next(loader)]
    found = Counter(text.startswith("0 ") for text in documents(data, tokenizer, made))
    return [found[True], found[False]]


def fits(found: list[int], true: list[int]) -> bool:
    """Chi-square over two classes; documents of an epoch are drawn without putting back."""
    expected = np.array(true) / sum(true) * sum(found)
    return chisquare(found, expected).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["cached", "streamed"])
def test_small_compressed_files_count_no_more_than_they_hold(tmp_path, tokenizer, kind, cache_gib):
    sizes = [600] + [1] * 15
    for number, size in enumerate(sizes):
        write_lines(tmp_path / f"{number:02}.jsonl.{kind}", texts(size, number))
    data = UL2Data(config_of(tmp_path, cache_gib=cache_gib), tokenizer)
    for readers in (1, 2, 4, 8):
        assert fits(shares(data, tokenizer, readers, 1200), [600, 15])
    # The control: whole files dealt out to four readers that turn in their own files.
    found = Counter()
    for reader in range(4):
        own = [n for n, size in enumerate(sizes) for _ in range(size) if n % 4 == reader]
        found.update((own * 300)[i] == 0 for i in range(300))
    assert not fits([found[True], found[False]], [600, 15])


def test_a_sorted_corpus_is_not_a_curriculum(tmp_path, tokenizer):
    for number in range(2):
        write_lines(tmp_path / f"{number}.jsonl", texts(2000, number))
    data = UL2Data(config_of(tmp_path), tokenizer)
    batches = iter(RowLoader(data, batch_size=32, collate=list))
    for batch in islice(batches, 12):
        first = [text.startswith("0 ") for text in documents(data, tokenizer, batch)]
        assert 0.15 < np.mean(first) < 0.85
    # The control: the same rows in the order of the files.
    in_order = sorted(documents(data, tokenizer, rows(data, epochs=1)))
    assert all(text.startswith("0 ") for text in in_order[:1000])


def test_mixtures_keep_to_their_weights(tmp_path, tokenizer):
    for name, count, seed in (("web", 800, 0), ("books", 300, 1)):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "a.jsonl", texts(count, seed))
    mixture = [
        {"inputs": [str(tmp_path / "web")], "weight": 3},
        {"inputs": [str(tmp_path / "books")], "weight": 1, "name": "library"},
    ]
    data = UL2Data(config_of(tmp_path, mixture=mixture), tokenizer)
    loader = RowLoader(data, batch_size=64, collate=list)
    batches = iter(loader)
    assert 0.5 < 1 - np.mean([row.corpus for row in next(batches)]) < 0.95
    for _ in range(20):
        next(batches)
    counts = stream.progress(loader.state_dict(), data.corpora)
    tokens = counts["tokens/web"] + counts["tokens/library"]
    assert counts["tokens/web"] / tokens == pytest.approx(0.75, abs=0.02)
    assert counts["documents/library"] > 0
    assert {row.corpus for row in rows(data, epochs=1)} == {0, 1}


def test_counts_and_report(folder, tokenizer):
    (folder / "notes.pdf").write_text("x")
    write_lines(folder / "g.jsonl", ["", "x", *texts(5, 9)])
    data = UL2Data(config_of(folder, heldout_every=10, min_tokens=4), tokenizer)
    last = {row.stream: row.position for row in rows(data, epochs=1)}
    total = {name: sum(position[name] for position in last.values()) for name in stream.COUNTS}
    outcomes = total["documents"], total["heldout"], total["refused"]
    # Documents after the last row of a stream are not counted yet.
    assert sum(ALL.values()) - 20 < sum(outcomes) <= sum(ALL.values()) + 7
    assert total["heldout"] > 15
    first, passed = data.report()
    assert first.startswith("corpus: 7 files, ")
    assert "notes.pdf (unknown type)" in passed


def test_the_report_counts_documents(tmp_path, tokenizer):
    """By rows and by lines: estimates from bytes missed compression, and other fields."""
    table = tmp_path / "a.parquet"
    text = "one text of seven words, always same"
    pq.write_table(pa.table({"text": [text] * 500 + [None] * 500}), table)
    (tmp_path / "none").mkdir()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none/a.parquet")
    line = json.dumps({"text": text, "html": text * 40}) + "\n"
    (tmp_path / "b.jsonl").write_text(line * 2000)
    for inputs, number in ((table, 1000), (tmp_path / "**/*.parquet", 1000), (tmp_path, 3000)):
        (report,) = UL2Data(config_of(inputs), tokenizer).report()
        about = re.search("about (.*) documents", report)[1].replace(",", "")
        assert int(about) == pytest.approx(number, rel=0.02)


def test_heldout_texts_are_spread_kept_and_never_trained_on(tmp_path, tokenizer):
    for name, files in (("web", (400, 200, 600)), ("books", (500,))):
        (tmp_path / name).mkdir()
        for number, count in enumerate(files):
            seed = 10 * (name == "books") + number
            write_lines(tmp_path / name / f"{number}.jsonl", texts(count, seed) + texts(9, 99))
    mixture = [
        {"inputs": [str(tmp_path / "web")], "weight": 3},
        {"inputs": [str(tmp_path / "books")], "weight": 1},
    ]
    config = config_of(tmp_path, mixture=mixture, heldout_every=10, min_tokens=4)
    data = UL2Data(config, tokenizer)
    chosen = data.choose_heldout(40)
    assert Counter(text.corpus for text in chosen) == {"web": 30, "books": 10}
    by_file = Counter(text.path.rpartition("/")[2] for text in chosen if text.corpus == "web")
    assert fits([by_file["0.jsonl"] + by_file["1.jsonl"], by_file["2.jsonl"]], [600, 600])
    assert len({text.key for text in chosen}) == 40
    # Kept with the run, as they are.
    write_json(tmp_path / "heldout.json", [text._asdict() for text in chosen])
    assert read_heldout(tmp_path / "heldout.json") == chosen
    for text, fault in (('[{"corpus": 0', "is not valid JSON"), ("[3]", "held-out texts: ")):
        (tmp_path / "foreign.json").write_text(text)
        with pytest.raises(InputError, match=f"foreign.json.*{fault}"):
            read_heldout(tmp_path / "foreign.json")
    # Neither the seed nor the ranks have a say.
    assert UL2Data(config_of(tmp_path, mixture=mixture, heldout_every=10, min_tokens=4, seed=7),
                   tokenizer).choose_heldout(40) == chosen  # fmt: skip
    held = {tokenizer.decode(text.tokens) for text in chosen}
    trained = set(documents(data, tokenizer, rows(data, epochs=1)))
    assert not any(text[:40] in {t[:40] for t in held} for text in trained)
    # The control: another rule for training, and the same texts leak.
    leaky = UL2Data(config_of(tmp_path, mixture=mixture, min_tokens=4), tokenizer)
    trained = {t[:40] for t in documents(leaky, tokenizer, rows(leaky, epochs=1))}
    assert any(text[:40] in trained for text in held)
    leaky.exclude(chosen)  # of a run, whatever it holds out now
    trained = {t[:40] for t in documents(leaky, tokenizer, rows(leaky, epochs=1))}
    assert not any(text[:40] in trained for text in held)
    with pytest.raises(
        InputError, match="3750 held-out texts are needed of web, but there are only"
    ):
        data.choose_heldout(5000)


def test_heldout_inputs_and_their_copies(tmp_path, tokenizer):
    write_lines(tmp_path / "train.jsonl", texts(100, 0) + texts(20, 1))
    write_lines(tmp_path / "held.jsonl", texts(20, 1))
    config = config_of(tmp_path / "train.jsonl", heldout_inputs=[str(tmp_path / "held.jsonl")])
    data = UL2Data(config, tokenizer)
    assert sum(t.startswith("1 ") for t in documents(data, tokenizer, rows(data, epochs=1))) == 20
    chosen = data.choose_heldout(20)
    data.exclude(chosen)
    trained = documents(data, tokenizer, rows(data, epochs=1))
    assert Counter(trained) == Counter(texts(100, 0))
    assert len(heldout_examples(config, tokenizer, 3)) == 15
    same = config_of(tmp_path, heldout_inputs=[str(tmp_path / "held.jsonl")])
    with pytest.raises(InputError, match=r"held.jsonl is an input and a held-out input"):
        UL2Data(same, tokenizer)


def test_file_names_that_are_not_utf_8(tmp_path, tokenizer):
    for name in (b"caf\xe9.jsonl", b"caf\xe9.jsonl.gz"):
        write_lines(tmp_path / os.fsdecode(name), texts(40, len(name)))
    data = UL2Data(config_of(tmp_path, heldout_every=2), tokenizer)
    chosen = data.choose_heldout(4)
    write_json(tmp_path / "heldout.json", [text._asdict() for text in chosen])
    assert read_heldout(tmp_path / "heldout.json") == chosen


def test_choosing_heldout_texts_reads_a_few_blocks(tmp_path, tokenizer, monkeypatch):
    for number in range(30):
        write_lines(tmp_path / f"{number}.jsonl", texts(200, number))
    data = UL2Data(config_of(tmp_path, heldout_every=5), tokenizer)
    read, of_file = [], corpora.File.read
    monkeypatch.setattr(
        corpora.File, "read", lambda file, block: read.append(block) or of_file(file, block)
    )
    data.choose_heldout(20)
    assert len(read) < 0.1 * data.opened[0].num_blocks


def test_a_changed_corpus_is_refused_or_begun_at_a_new_epoch(folder, tokenizer):
    data = UL2Data(config_of(folder), tokenizer)
    _, states = steps(data, 2, 0, None, 3)
    state = merge_states(states)
    write_lines(folder / "more.jsonl", texts(30, 7))
    changed = UL2Data(config_of(folder), tokenizer)
    with pytest.raises(InputError, match="belongs to another corpus, data config or tokenizer"):
        changed.adopt(state)
    changed = UL2Data(config_of(folder, accept_changes=True, heldout_every=9), tokenizer)
    epochs = [at["epoch"] for positions in state["streams"].values() for at in positions]
    state, note = changed.adopt(state)
    assert note == f"the data has changed; continuing with it at epoch {max(epochs) + 1}"
    # All of that epoch, and nothing of the one before.
    new = max(epochs) + 1
    begun = enumerate(changed.start(new)["streams"].values())
    made = [row for s, at in begun for row in stream.stream_rows(changed, s, at, epochs=new + 1)]
    assert {row.position["epoch"] for row in made} == {new}
    kept = [text for text in (*ALL, *texts(30, 7)) if corpora.text_key(text) % 9]
    assert Counter(documents(changed, tokenizer, made)) == Counter(kept)
    with pytest.raises(InputError, match="not those of all ranks"):
        merge_states(states[:1])


def test_settings_are_part_of_the_fingerprint_and_folders_are_not(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(stream, "os", None)  # no link is resolved, which takes long for many files

    def fingerprint(path, **changes) -> str:
        return UL2Data(config_of(path, **changes), tokenizer).fingerprint

    same = fingerprint(folder)
    assert fingerprint(folder, cache_gib=2.0) == same
    for change in ({"seed": 1}, {"source_length": 255}, {"streams": 32}, {"cache_gib": 0.0}):
        assert fingerprint(folder, **change) != same
    listed = "[{name: S, mean_span: null, corruption: 0.75, weight: %d}]"
    preset = folder.with_name("preset.yaml")
    preset.write_text(listed % 1)
    first = fingerprint(folder, preset=str(preset))
    assert fingerprint(folder, preset=str(preset)) == first
    preset.write_text(listed % 2)
    assert fingerprint(folder, preset=str(preset)) != first
    moved = folder.rename(folder.with_name("moved"))
    assert fingerprint(moved) == same


def test_readers_must_divide_the_streams():
    check_readers(DataConfig(), 8, 8)
    with pytest.raises(InputError, match=r"3 workers.*4 ranks, use num_workers 1, 2, 4, 8, 16"):
        check_readers(DataConfig(), 4, 3)
    with pytest.raises(InputError, match="with 3 ranks, set data.streams to a multiple of 3"):
        check_readers(DataConfig(), 3, 0)
    check_readers(DataConfig(streams=256), 64, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_line_is_one_sentence_at_its_row(tmp_path, tokenizer, workers):
    lines = [json.dumps({"text": text}) for text in texts(600, 0)]
    lines[400] = '{"text": "cut off'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = UL2Data(config_of(tmp_path, source_length=64, target_length=48), tokenizer)
    batches = iter(RowLoader(data, batch_size=4, num_workers=workers, collate=list))
    made = []
    with pytest.raises(InputError) as caught:
        made.extend(next(batches) for _ in range(500))
    message = str(caught.value)
    assert "a.jsonl line 401: not valid JSON" in message
    assert "\n" not in message
    assert made or workers  # some batches came before


def test_a_corpus_with_nothing_to_train_on(tmp_path, tokenizer):
    write_lines(tmp_path / "a.jsonl", ["x", "", "y"])
    with pytest.raises(InputError, match="3 shorter than data.min_tokens=8"):
        next(rows(UL2Data(config_of(tmp_path, min_tokens=8), tokenizer)))
    # One usable document among many is found by every stream.
    write_lines(tmp_path / "a.jsonl", ["x"] * 50 + texts(1, 0))
    data = UL2Data(config_of(tmp_path, min_tokens=8), tokenizer)
    assert len(list(islice(rows(data), 65))) == 65


def test_long_documents_are_used_to_their_end(tmp_path, tokenizer):
    long = " ".join(random.Random(0).choices(WORDS, k=5000))
    write_lines(tmp_path / "a.jsonl", [long, *texts(20, 1)])
    config = config_of(tmp_path, source_length=96, target_length=64, min_tokens=8)
    data = UL2Data(config, tokenizer)
    made = list(rows(data, epochs=1))
    for row in made:
        assert sum(len(e.source) for e in row.examples) <= 96
        assert sum(len(e.target) for e in row.examples) <= 64
    found = Counter(chunk.tobytes() for chunk in chunks(data, made))
    assert min(map(len, found)) >= 8 * 4
    short = Counter(data.encode(text).tobytes() for text in texts(20, 1))
    assert short <= found
    assert sum(map(len, (found - short).elements())) == data.encode(long).nbytes


def test_a_script_that_stops_reading_ends_quietly(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "{i} {"word " * 30}"}}\n' for i in range(200))
    )
    code = """
import sys
from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.stream import RowLoader, UL2Data
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer
data = UL2Data(DataConfig(inputs=sys.argv[1:]), build_tokenizer(num_ranks=512))
batches = iter(RowLoader(data, batch_size=1))
next(batches)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Exception ignored" not in ended.stderr
