"""One model, one set of numbers: whatever the form of a batch, the mode, and what wraps the model.

The reference is always each document alone, without a mask, its loss taken from its logits by hand.
"""

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, T5ForConditionalGeneration
from transformers.integrations.neftune import activate_neftune

from qwen3_encdec import (
    Qwen3EncoderDecoderConfig,
    Qwen3EncoderForSequenceClassification,
    Qwen3ForSeq2SeqLM,
)
from qwen3_encdec.data.collate import collate_packed
from tests.conftest import BACKENDS, tiny_config, tiny_t5_config, use_backend

IGNORED, PAD = -100, 300
LENGTHS = [(5, 3), (1, 4), (9, 1), (0, 2), (4, 6)]  # of source and target, document by document
Batch = dict[str, Any]


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    return [(random.integers(0, 290, s), random.integers(0, 290, t)) for s, t in LENGTHS]


def build(**changes) -> Qwen3ForSeq2SeqLM:
    torch.manual_seed(0)
    return Qwen3ForSeq2SeqLM(tiny_config(num_hidden_layers=2, **changes))


def shift(labels: np.ndarray, start: int) -> np.ndarray:
    return np.concatenate([[start], labels[:-1]])


def pad(rows: list[np.ndarray], fill: int, side: str) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)


def make_batch(form: str, start: int, labels: bool = True) -> Batch:
    """The four documents as "right" or "left" padded rows or "packed"."""
    sources, targets = map(list, zip(*documents(), strict=True))
    inputs = [shift(target, start) for target in targets]
    if form == "packed":
        batch = collate_packed(sources, targets)
        if not labels:
            del batch["labels"]
            batch["decoder_input_ids"] = torch.tensor(np.concatenate(inputs))[None]
        return batch
    masks = [[np.ones_like(row) for row in side] for side in (sources, targets)]
    batch = {"input_ids": pad(sources, PAD, form), "attention_mask": pad(masks[0], 0, form)}
    if form == "left" or not labels:
        batch["decoder_attention_mask"] = pad(masks[1], 0, form)
    if labels:
        return batch | {"labels": pad(targets, IGNORED, form)}
    return batch | {"decoder_input_ids": pad(inputs, PAD, form)}


def by_document(form: str, of_targets: torch.Tensor) -> list[torch.Tensor]:
    """[B, T, ...] or [1, N, ...] -> the part of each document."""
    lengths = [target for _, target in LENGTHS]
    if form == "packed":
        return list(of_targets[0].split(lengths))
    rows = zip(of_targets, lengths, strict=True)
    return [row[:length] if form == "right" else row[-length:] for row, length in rows]


def alone(model: Qwen3ForSeq2SeqLM) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of each document by itself, and the mean loss of all tokens."""
    logits, total = [], torch.zeros(())
    for source, target in documents():
        ids = torch.tensor(shift(target, model.config.decoder_start_token_id))[None]
        output = model(input_ids=torch.tensor(source)[None], decoder_input_ids=ids)
        logits.append(output.logits[0])
        loss = nn.functional.cross_entropy(logits[-1], torch.tensor(target), reduction="sum")
        total = total + loss / sum(target for _, target in LENGTHS)
    return logits, total


def peft_wrapped(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="SEQ_2_SEQ_LM")
    return peft.get_peft_model(model, config)


WRAPPERS: dict[str, Callable] = {
    "bare": lambda model: model,
    "peft": peft_wrapped,
    "cpu_offload": lambda model: cpu_offload(model, torch.device("cpu")),
}
SETTINGS = WRAPPERS | {name: partial(use_backend, name=name) for name in BACKENDS if name != "sdpa"}
forms = pytest.mark.parametrize("form", ["right", "left", "packed"])
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@forms
@modes
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "decoder_input_ids"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_parity_every_form_gives_the_numbers_of_documents_alone(form, training, labels, setting):
    """Left-padded targets count positions from the mask; T5Gemma 2's from the first column."""
    expected, loss = alone(build().eval())
    model = build()
    batch = make_batch(form, model.config.decoder_start_token_id, labels)
    model = SETTINGS[setting](model).train(training)
    output = model(**batch, return_logits=True)
    for mine, its in zip(by_document(form, output.logits), expected, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-4)
    if not labels:
        assert output.loss is None
        return
    torch.testing.assert_close(output.loss, loss)
    of_tokens = by_document(form, output.token_losses)
    for mine, its, (_, target) in zip(of_tokens, expected, documents(), strict=True):
        by_hand = nn.functional.cross_entropy(its, torch.tensor(target), reduction="none")
        torch.testing.assert_close(mine, by_hand, atol=1e-5, rtol=1e-4)
    # the control: another document's tokens are seen
    batch["input_ids"] = batch["input_ids"].roll(1, 1)
    other = by_document(form, model(**batch, return_logits=True).logits)
    assert (other[0] - expected[0]).abs().max() > 1e-3


@forms
@pytest.mark.parametrize("recompute", [None, True, False], ids=["", "reentrant", "checkpointed"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "flex_attention"])
def test_parity_every_form_has_the_gradients_of_documents_alone(form, recompute, backend):
    reference, model = build(), use_backend(build().train(), backend)
    alone(reference)[1].backward()
    if recompute is not None:
        model.gradient_checkpointing_enable({"use_reentrant": recompute})
        model.enable_input_require_grads()
    calls = []
    for stack in (model.model.encoder, model.model.decoder):
        stack.layers[1].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model(**make_batch(form, model.config.decoder_start_token_id)).loss.backward()
    assert len(calls) == (2 if recompute is None else 4)
    for (name, mine), its in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, atol=1e-5, rtol=1e-3, msg=name)


# --- every argument of forward


def embedded(model, ids: torch.Tensor) -> torch.Tensor:
    return model.get_input_embeddings()(ids)


def encoded(model, batch: Batch):
    names = ("input_ids", "attention_mask", "position_ids", "cu_seqlens", "max_seqlen")
    with torch.no_grad():
        return model.get_encoder()(**{name: batch[name] for name in names if name in batch})


def decoder_ids(model, batch: Batch) -> torch.Tensor:
    start = model.config.decoder_start_token_id
    form = "packed" if "cu_seqlens" in batch else "right"
    return make_batch(form, start, labels=False)["decoder_input_ids"]


def changed(ids: torch.Tensor) -> torch.Tensor:
    """Other ids at a first, real place."""
    ids = ids.clone()
    ids[0, 0] = (ids[0, 0] + 1) % 290
    return ids


def positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def some_targets(batch: Batch) -> torch.Tensor:
    targets = torch.full_like(batch["input_ids"], IGNORED)
    targets[0, 1:3] = 17
    return targets


def count(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())


# Name -> a value that leaves the numbers of a padded batch as they are, and one that must not.
Value = Callable[[Qwen3ForSeq2SeqLM, Batch], Any]
SAME: dict[str, Value] = {
    "input_ids": lambda m, b: b["input_ids"].masked_fill(b["attention_mask"] == 0, 7),
    "attention_mask": lambda m, b: b["attention_mask"].bool(),
    "position_ids": lambda m, b: positions(b["input_ids"]),
    "inputs_embeds": lambda m, b: embedded(m, b["input_ids"]),
    "encoder_outputs": lambda m, b: [encoded(m, b).last_hidden_state],
    "decoder_input_ids": lambda m, b: decoder_ids(m, b),
    "decoder_attention_mask": lambda m, b: (b["labels"] != IGNORED).long(),
    "decoder_position_ids": lambda m, b: positions(b["labels"]),
    "decoder_inputs_embeds": lambda m, b: embedded(m, decoder_ids(m, b)),
    "cache": lambda m, b: DynamicCache(config=m.config),
    "use_cache": lambda m, b: True,
    "labels": lambda m, b: b["labels"].clone(),
    "num_items_in_batch": lambda m, b: torch.tensor(count(b)),
    "encoder_targets": lambda m, b: torch.full_like(b["input_ids"], IGNORED),
    "encoder_loss_weight": lambda m, b: 3.0,  # without encoder_targets
    "z_loss": lambda m, b: 0.0,
    "return_logits": lambda m, b: True,
    "logits_to_keep": lambda m, b: torch.arange(b["labels"].shape[1]),
}
OTHER: dict[str, Value] = {
    "input_ids": lambda m, b: changed(b["input_ids"]),
    "attention_mask": lambda m, b: b["attention_mask"].roll(1, 1),
    "position_ids": lambda m, b: 2 * positions(b["input_ids"]),
    "inputs_embeds": lambda m, b: embedded(m, changed(b["input_ids"])),
    "encoder_outputs": lambda m, b: encoded(m, b | {"input_ids": changed(b["input_ids"])}),
    "decoder_input_ids": lambda m, b: changed(decoder_ids(m, b)),
    "decoder_attention_mask": lambda m, b: (b["labels"] != IGNORED).long().roll(1, 1),
    "decoder_position_ids": lambda m, b: 2 * positions(b["labels"]),
    "decoder_inputs_embeds": lambda m, b: embedded(m, changed(decoder_ids(m, b))),
    "labels": lambda m, b: changed(b["labels"]),
    "num_items_in_batch": lambda m, b: 2 * count(b),
    "encoder_targets": lambda m, b: some_targets(b),
    "z_loss": lambda m, b: 0.1,
}
# In a packed batch some mean nothing, and are refused; some are of this form alone.
REFUSED_PACKED: dict[str, Value] = {
    "attention_mask": lambda m, b: torch.ones_like(b["input_ids"]),
    "decoder_attention_mask": lambda m, b: torch.ones_like(b["labels"]),
    "cache": SAME["cache"],
}
ONLY_PACKED_SAME: dict[str, Value] = {
    "input_ids": lambda m, b: b["input_ids"].clone(),
    "position_ids": lambda m, b: b["position_ids"] + 5,  # they are relative
    "decoder_position_ids": lambda m, b: b["decoder_position_ids"].clone(),
    "max_seqlen": lambda m, b: b["max_seqlen"],
    "decoder_max_seqlen": lambda m, b: b["decoder_max_seqlen"],
}
ONLY_PACKED_OTHER: dict[str, Value] = {
    "position_ids": lambda m, b: 2 * b["position_ids"],
    "decoder_position_ids": lambda m, b: 2 * b["decoder_position_ids"],
    "cu_seqlens": lambda m, b: moved(b["cu_seqlens"]),
    "decoder_cu_seqlens": lambda m, b: moved(b["decoder_cu_seqlens"]),
    "key_order": lambda m, b: b["key_order"].roll(1),
}


def moved(cumulative: torch.Tensor) -> torch.Tensor:
    """The first document ends one token sooner."""
    cumulative = cumulative.clone()
    cumulative[1] -= 1
    return cumulative


def changes(form: str) -> tuple[dict[str, Value], dict[str, Value]]:
    if form == "right":
        return SAME, OTHER
    same = {name: value for name, value in SAME.items() if name not in REFUSED_PACKED}
    other = {name: value for name, value in OTHER.items() if name not in REFUSED_PACKED}
    return same | ONLY_PACKED_SAME, other | ONLY_PACKED_OTHER


def test_every_argument_is_walked():
    arguments = list(inspect.signature(Qwen3ForSeq2SeqLM.forward).parameters)[1:-1]
    packed_same, packed_other = changes("packed")
    assert set(arguments) == {*SAME, *OTHER, *packed_same, *packed_other, *REFUSED_PACKED}


def results(model, batch: Batch, form: str) -> dict[str, torch.Tensor]:
    """Loss, and logits of real tokens."""
    with torch.no_grad():
        output = model(**{"return_logits": True} | batch)
    return {"loss": output.loss, "logits": torch.cat(by_document(form, output.logits))}


WALK = [
    (form, name, wrapper)
    for form in ("right", "packed")
    for name in sorted({name for part in changes(form) for name in part})
    for wrapper in ("bare", "peft", "cpu_offload")
]


@modes
@pytest.mark.parametrize(("form", "name", "wrapper"), WALK)
def test_an_argument_changes_what_it_says_and_nothing_else(form, name, wrapper, training):
    bare = build().train(training)
    batch = make_batch(form, bare.config.decoder_start_token_id)
    expected = results(bare, batch, form)
    model = WRAPPERS[wrapper](build()).train(training)
    instead = {"input_ids": None} if name in ("inputs_embeds", "encoder_outputs") else {}
    same, other = changes(form)
    if name in same:
        found = results(model, batch | instead | {name: same[name](bare, batch)}, form)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    if name in other:
        found = results(model, batch | instead | {name: other[name](bare, batch)}, form)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@modes
@pytest.mark.parametrize("name", REFUSED_PACKED)
def test_a_packed_batch_refuses_what_it_would_ignore(name, training):
    model = build().train(training)
    batch = make_batch("packed", model.config.decoder_start_token_id)
    with pytest.raises(ValueError, match=f"(omit {name}|a {name} cannot be used)"):
        model(**batch | {name: REFUSED_PACKED[name](model, batch)})


# --- inputs that do not fit together


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 290, shape, generator=torch.Generator().manual_seed(1))


# What changes in a batch of input_ids and labels that fit, or in a packed batch.
UNFIT: dict[str, Batch] = {
    "a short source mask": {"attention_mask": torch.ones(2, 7)},
    "a square source mask": {"attention_mask": torch.ones(2, 1, 9, 9)},
    "more sources than targets": {"input_ids": ids(3, 9)},
    "more targets than sources": {"labels": ids(3, 5)},
    "labels and decoder ids": {"decoder_input_ids": ids(2, 6)},
    "a short target mask": {"decoder_attention_mask": torch.ones(2, 3)},
    "rows of encoder outputs": {"input_ids": None, "encoder_outputs": (torch.randn(3, 9, 40),)},
    "a mask of other encoder outputs": {
        "input_ids": None, "encoder_outputs": (torch.randn(2, 9, 40),),
        "attention_mask": torch.ones(2, 7),
    },
    "source ids and embeddings": {"inputs_embeds": torch.randn(2, 9, 40)},
    "target ids and embeddings": {
        "decoder_input_ids": ids(2, 5), "decoder_inputs_embeds": torch.randn(2, 5, 40),
    },
    "no source": {"input_ids": None},
    "no target": {"labels": None},
    "source positions": {"position_ids": torch.arange(7)[None]},
    "target positions": {"decoder_position_ids": torch.arange(4)[None]},
    "encoder targets": {"encoder_targets": ids(2, 8)},
    "encoder targets without labels": {
        "labels": None, "encoder_targets": ids(2, 9), "decoder_input_ids": ids(2, 5),
    },
}  # fmt: skip
PACKED = make_batch("packed", PAD)
UNFIT_PACKED: dict[str, Batch] = {
    "a source too few": {"cu_seqlens": PACKED["cu_seqlens"][:-1]},
    "a target too few": {"decoder_cu_seqlens": PACKED["decoder_cu_seqlens"][:-1]},
    "tokens too few": {name: PACKED[name][:, :-1] for name in ("input_ids", "position_ids")},
    "positions too few": {"position_ids": PACKED["position_ids"][:, :-1]},
    "labels too few": {"labels": PACKED["labels"][:, :-1]},
    "keys too few": {"key_order": PACKED["key_order"][:-1]},
    "several rows": {
        "input_ids": ids(2, PACKED["input_ids"].shape[1]),
        "position_ids": PACKED["position_ids"].expand(2, -1),
    },
}


@modes
@pytest.mark.parametrize("kind", [*UNFIT, *UNFIT_PACKED])
def test_inputs_that_do_not_fit_are_refused(kind, training):
    fit = {"input_ids": ids(2, 9), "labels": ids(2, 5)} if kind in UNFIT else PACKED
    shapes = r" has shape \(.*\), but these inputs require \("
    others = "pass exactly one of|requires labels|pass one target per source|batch has 18 tokens"
    with pytest.raises(ValueError, match=f"{shapes}|{others}"):
        build().train(training)(**fit | (UNFIT | UNFIT_PACKED)[kind])


@pytest.mark.parametrize(
    "name",
    [
        *("position_ids", "cu_seqlens", "max_seqlen", "key_order"),
        *("decoder_position_ids", "decoder_cu_seqlens", "decoder_max_seqlen"),
    ],
)
def test_an_incomplete_packed_batch_is_refused(name):
    with pytest.raises(ValueError, match=f"a packed batch needs .*{name}"):
        build()(**PACKED | {name: None})


def test_an_argument_that_nothing_reads_is_refused():
    with pytest.raises(TypeError, match="atention_mask"):
        build()(input_ids=ids(2, 9), labels=ids(2, 5), atention_mask=torch.ones(2, 9))


# --- masks over the target


@modes
def test_a_mask_over_real_labels_is_read_with_the_loss_as_without(training):
    model = build().train(training)
    source, labels = ids(2, 6), ids(2, 5)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
    batch = {"input_ids": source, "decoder_attention_mask": mask}
    prepared = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model(**batch, decoder_input_ids=prepared).logits
    by_hand = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(**batch, labels=labels).loss, by_hand)
    batch["decoder_attention_mask"] = torch.ones_like(mask)
    assert (model(**batch, labels=labels).loss - by_hand).abs() > 1e-3


# --- caches


@modes
@pytest.mark.parametrize("use_cache", [None, True, False])
def test_a_cache_is_honoured_with_labels_too(training, use_cache):
    """The second half of a target behind its first half, as T5 does it."""
    model = build().train(training)
    source, target = ids(2, 6), ids(2, 7)
    whole = model(input_ids=source, decoder_input_ids=target).logits
    cache = model(input_ids=source, decoder_input_ids=target[:, :4], use_cache=True).cache
    assert cache.layers[0].keys.shape == (2, 2, 6 + 4, 14)  # the source is a prefix
    assert cache.get_seq_length() == 4
    rest = {"decoder_input_ids": target[:, 4:], "labels": target[:, 4:]}
    found = model(input_ids=source, **rest, cache=cache, use_cache=use_cache, return_logits=True)
    torch.testing.assert_close(found.logits, whole[:, 4:], atol=1e-5, rtol=1e-4)
    by_hand = nn.functional.cross_entropy(whole[:, 4:].flatten(0, 1), target[:, 4:].flatten())
    torch.testing.assert_close(found.loss, by_hand)


def test_a_cache_is_refused_with_gradient_checkpointing():
    model = build().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="a cache cannot be used with .* gradient checkpointing"):
        model(input_ids=ids(2, 6), labels=ids(2, 5), cache=DynamicCache())


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(tiny_t5_config(vocab_size=331))


@pytest.mark.parametrize("make", [t5, build])
@pytest.mark.parametrize("grad", [True, False])
def test_generation_in_training_with_checkpointing_is_that_of_evaluation(make, grad):
    model, source = make(), ids(3, 6)
    expected = model.eval().generate(source, max_new_tokens=6)
    model.train().gradient_checkpointing_enable()
    with torch.set_grad_enabled(grad):
        assert torch.equal(model.generate(source, max_new_tokens=6), expected)
    assert len(expected[:, 1:].unique()) > 2


# --- sizes of zero and one


@modes
def test_batches_of_nothing(training):
    model = build().train(training)
    empty = torch.zeros(2, 0, dtype=torch.long)
    for length in (1, 4):
        none = {"input_ids": ids(0, length), "decoder_input_ids": ids(0, length)}
        assert model(**none).logits.shape == (0, length, 331)
    assert model(input_ids=ids(2, 6), decoder_input_ids=empty).logits.shape == (2, 0, 331)
    for batch in (
        {"input_ids": ids(2, 6), "labels": empty},
        {"input_ids": ids(0, 6), "labels": ids(0, 4)},
    ):
        output = model(**batch)
        assert output.loss == 0
        output.loss.backward()
    nothing = model(input_ids=empty, decoder_input_ids=ids(2, 4)).logits
    masked = model(
        input_ids=ids(2, 6), attention_mask=torch.zeros(2, 6), decoder_input_ids=ids(2, 4)
    ).logits
    torch.testing.assert_close(nothing, masked, atol=1e-5, rtol=1e-4)
    assert nothing.isfinite().all()


@modes
def test_a_row_without_source_or_target_leaves_the_others_alone(training):
    model = build().train(training)
    source, labels = ids(3, 6), ids(3, 5)
    mask = torch.ones(3, 6)
    mask[1] = 0
    labels[2] = IGNORED
    output = model(input_ids=source, attention_mask=mask, labels=labels, return_logits=True)
    assert output.loss.isfinite()
    output.loss.backward()
    assert all(part.grad.isfinite().all() for part in model.parameters())
    for row in (0, 1):
        inputs = {"input_ids": source[row : row + 1], "attention_mask": mask[row : row + 1]}
        one = model(**inputs, labels=labels[row : row + 1], return_logits=True)
        torch.testing.assert_close(output.logits[row], one.logits[0], atol=1e-5, rtol=1e-4)


def test_many_documents_need_no_unique():
    """On a GPU it waits for the device."""
    labels, start = ids(1, 4_000), build().config.decoder_start_token_id
    bounds = torch.tensor([0, 0, *range(0, 4_001, 40)], dtype=torch.int32)
    with torch.profiler.profile() as profile:
        found = build().prepare_decoder_input_ids_from_labels(labels, cu_seqlens=bounds)
    assert not [event.key for event in profile.key_averages() if "unique" in event.key]
    expected = labels.roll(1, 1)
    expected[0, ::40] = start
    assert torch.equal(found, expected)


def test_one_token_of_everything():
    model = build(vocab_size=64, pad_token_id=0, eos_token_id=1, num_sentinel_tokens=1).train()
    one = torch.ones(1, 1, dtype=torch.long)
    model(input_ids=one, labels=one).loss.backward()
    packed = collate_packed([one[0].numpy()], [one[0].numpy()])
    torch.testing.assert_close(model(**packed).loss, model(input_ids=one, labels=one).loss)
    assert model.generate(one, max_new_tokens=1).shape == (1, 2)


@modes
def test_a_step_without_labels_has_no_loss(training):
    """Trainer counts the labels of a step; a step of empty targets divides by zero."""
    batch = {"input_ids": ids(2, 6), "labels": torch.full((2, 5), IGNORED)}
    for count in (None, 0, torch.tensor(0)):
        loss = build().train(training)(**batch, num_items_in_batch=count).loss
        loss.backward()
        assert loss == 0


@modes
def test_a_replica_of_data_parallel_gives_the_same_numbers(training, monkeypatch):
    """Trainer wraps a model so on several GPUs; here both replicas are on the CPU."""
    module = import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    model = build().train(training)
    batch = {"input_ids": ids(2, 6), "labels": ids(2, 5)}
    expected = model(**batch, num_items_in_batch=20).loss
    expected.backward()
    _, replica = module.replicate(model, [0, 1])
    model.model.shared.weight.data.zero_()  # a replica that reads it gives other numbers
    loss = replica(**batch, num_items_in_batch=torch.tensor([[20]])).loss
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="DataParallel cuts packed batches apart"):
        replica(**PACKED)


# --- compiled


@pytest.mark.parametrize("form", ["right", "packed"])
def test_a_training_step_compiles_whole(form):
    """Without a graph break; aot_eager traces the backward pass too."""
    model, reference = build().train(), build().train()
    batch = make_batch(form, model.config.decoder_start_token_id)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = compiled(**batch).loss, reference(**batch).loss
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for (name, mine), its in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, atol=1e-5, rtol=1e-3, msg=name)


# --- folders


@pytest.mark.parametrize("loaded", [Qwen3ForSeq2SeqLM, Qwen3EncoderDecoderConfig])
def test_a_plain_qwen3_folder_names_the_command(loaded, parent_folder):
    with pytest.raises(ValueError, match="qwen3-encdec initialize"):
        loaded.from_pretrained(parent_folder)


def test_neftune_is_refused_rather_than_added_to_the_logits():
    model = build().train()
    activate_neftune(model, 5.0)
    with pytest.raises(ValueError, match="neftune_noise_alpha is not supported"):
        model(input_ids=ids(2, 6), decoder_input_ids=ids(2, 5))
    encoder = Qwen3EncoderForSequenceClassification(tiny_config()).train()  # has no LM head
    before = encoder(input_ids=ids(2, 6)).logits
    activate_neftune(encoder, 5.0)
    assert not torch.equal(encoder(input_ids=ids(2, 6)).logits, before)
