"""Batches: what a packed one holds, which tokens are masked, and transformers' own form of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qwen3_encdec.data.collate import (
    DataCollatorForPackedSeq2Seq,
    collate_masked_rows,
    collate_micro_batches,
    collate_packed,
    collate_rows,
    mask_token_id,
    pack,
)
from qwen3_encdec.data.ul2 import Example
from qwen3_encdec.folders import InputError
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

EOS = 9


def example(source: list[int], target: list[int], denoiser: int = 0) -> Example:
    return Example(np.array(source, np.int32), np.array(target, np.int32), denoiser)


def row(*examples: Example) -> SimpleNamespace:
    return SimpleNamespace(examples=list(examples))


ROWS = [
    row(example([1, 2, 9], [3, 9], 4), example([5, 9], [6, 7, 8, 9], 0)),
    row(example([4, 9], [2, 9], 2)),
]


def test_collate_by_hand():
    batch = collate_rows(ROWS)
    lists = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    assert lists == {
        "input_ids": [[1, 2, 9, 5, 9, 4, 9]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1]],
        "cu_seqlens": [0, 3, 5, 7],
        "max_seqlen": 3,
        "labels": [[3, 9, 6, 7, 8, 9, 2, 9]],
        "decoder_position_ids": [[0, 1, 0, 1, 2, 3, 0, 1]],
        "decoder_cu_seqlens": [0, 2, 6, 8],
        "decoder_max_seqlen": 4,
        "key_order": [0, 1, 2, 7, 8, 3, 4, 9, 10, 11, 12, 5, 6, 13, 14],
        "denoiser": [[4, 4, 0, 0, 0, 0, 2, 2]],
    }
    kinds = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert kinds.pop("cu_seqlens") == kinds.pop("decoder_cu_seqlens") == torch.int32
    assert set(kinds.values()) == {torch.int64}


def test_the_collator_of_transformers_trainer_makes_the_same_batch():
    examples = [example for r in ROWS for example in r.examples]
    features = [
        {"input_ids": e.source.tolist(), "attention_mask": [1], "labels": torch.tensor(e.target)}
        for e in examples
    ]
    made = DataCollatorForPackedSeq2Seq()(features)
    expected = collate_packed([e.source for e in examples], [e.target for e in examples])
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(made[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("number", [1, 3, 7])
def test_micro_batches_share_the_rows_by_tokens(number):
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(1, 500, 18), 900, 900, 900]
    rows = [row(example([5] * (n // 3 + 1), [6] * (n - n // 3))) for n in sizes]
    batches = collate_micro_batches(rows, number=number, collate=list)
    order = {id(each): index for index, each in enumerate(rows)}
    indices = [[order[id(each)] for each in batch] for batch in batches]
    assert sorted(index for part in indices for index in part) == list(range(len(rows)))
    assert all(part == sorted(part) for part in indices)
    assert all(indices)

    def spread(parts: list) -> int:
        tokens = [
            sum(len(e.source) + len(e.target) for r in part for e in r.examples) for part in parts
        ]
        return max(tokens) - min(tokens)

    by_rows = [rows[n::number] for n in range(number)]
    assert spread(batches) < 0.2 * spread(by_rows) or number == 1


def test_masking_keeps_what_is_no_text():
    rng = np.random.default_rng(0)
    sources = [
        [70, *rng.integers(0, 50, 60), 60, *rng.integers(0, 50, 30), EOS + 90] for _ in range(40)
    ]
    rows = [row(example(source, [1, 99])) for source in sources]
    options = {"mask_id": 80, "kept_ids": np.array([99, 60, 70]), "probability": 0.15}
    batch = collate_masked_rows(rows, **options)
    plain = collate_rows(rows)
    masked = batch["encoder_targets"] != -100
    assert torch.equal(batch["encoder_targets"][masked], plain["input_ids"][masked])
    assert (batch["input_ids"][masked] == 80).all()
    assert torch.equal(batch["input_ids"][~masked], plain["input_ids"][~masked])
    assert not set(plain["input_ids"][masked].tolist()) & {99, 60, 70}
    assert masked.float().mean() == pytest.approx(0.15 * 90 / 93, abs=0.02)
    # A source alone decides: alone, in another order, again.
    alone = torch.cat([collate_masked_rows([r], **options)["input_ids"] for r in rows], dim=1)
    assert torch.equal(alone, batch["input_ids"])
    # The control: without mode tokens among the kept ones some are masked.
    options["kept_ids"] = np.array([99])
    loose = collate_masked_rows(rows, **options)["encoder_targets"]
    assert set(loose.flatten().tolist()) & {60, 70}


def test_the_mask_token():
    tokenizer = build_tokenizer(num_ranks=512)
    assert tokenizer.convert_ids_to_tokens(mask_token_id(tokenizer)) == "<|reserved_3|>"
    bare = SimpleNamespace(get_vocab=dict, name_or_path="bare")
    with pytest.raises(InputError, match="tokenizer 'bare' has no"):
        mask_token_id(bare)


def test_packing_is_complete_deterministic_and_tight():
    rng = np.random.default_rng(0)
    examples = [
        example([1] * int(rng.integers(2, 60)), [2] * int(rng.integers(2, 40))) for _ in range(400)
    ]
    rows = pack(examples, 96, 64)
    assert sorted(map(id, (e for r in rows for e in r))) == sorted(map(id, examples))
    fills = np.array([[sum(len(e.source) for e in r), sum(len(e.target) for e in r)] for r in rows])
    assert (fills <= (96, 64)).all()
    least = max(
        sum(len(e.source) for e in examples) / 96, sum(len(e.target) for e in examples) / 64
    )
    assert len(rows) < 1.15 * least
    again = pack(examples, 96, 64)
    assert [[id(e) for e in r] for r in again] == [[id(e) for e in r] for r in rows]
    # The control: in the order of the documents, first row that has room.
    first_fit = 1
    source = target = 0
    for e in examples:
        source, target = source + len(e.source), target + len(e.target)
        if source > 96 or target > 64:
            first_fit, source, target = first_fit + 1, len(e.source), len(e.target)
    assert first_fit > 1.2 * least
    assert pack([], 96, 64) == []
    with pytest.raises(ValueError, match="source_length=96"):
        pack([example([1] * 97, [1])], 96, 64)
