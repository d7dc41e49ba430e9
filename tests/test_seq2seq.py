import math
import re

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForSeq2SeqLM

from qwen3_encdec import (
    Qwen3EncoderDecoderModel,
    Qwen3EncoderForTokenClassification,
    Qwen3EncoderModel,
    Qwen3ForSeq2SeqLM,
)
from qwen3_encdec.modeling_qwen3_encdec import (
    _form_gradient,
    chunked_cross_entropy,
    dense_cross_entropy,
    linear_cross_entropy,
    vocabulary_logits,
)
from qwen3_encdec.modeling_qwen3_encoder import CACHE_FIELD
from tests.conftest import BACKENDS, tiny_config, use_backend

B, S, T = 3, 9, 7


def batch(padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(0, 300, (B, S), generator=generator),
        "attention_mask": torch.ones(B, S, dtype=torch.long),
        "labels": torch.randint(0, 300, (B, T), generator=generator),
    }
    if padded:
        inputs["attention_mask"][1, 6:] = 0
        inputs["attention_mask"][2, :3] = 0
        inputs["labels"][0, 5:] = -100
        inputs["labels"][2, 1:] = -100
    return inputs


def plain_loss(model, inputs) -> torch.Tensor:
    """The textbook loss: right shift by hand, dense logits of the padded batch, one cross-entropy."""
    labels = inputs["labels"]
    shifted = torch.cat(
        [torch.full((B, 1), model.config.decoder_start_token_id), labels[:, :-1]], dim=1
    )
    shifted[shifted == -100] = model.config.pad_token_id
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=shifted,
    ).logits
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.mark.parametrize("padded", [False, True])
def test_loss_is_shifted_once_and_padding_is_not_in_it(model, padded):
    inputs = batch(padded)
    expected = plain_loss(model, inputs)
    torch.testing.assert_close(model(**inputs).loss, expected, atol=1e-5, rtol=0)
    # the control: shifted twice, the loss is another
    twice = dict(inputs, labels=model.prepare_decoder_input_ids_from_labels(inputs["labels"]))
    assert abs(model(**twice).loss - expected) > 1e-3


def test_zero_logits_give_log_v(model):
    torch.nn.init.zeros_(model.model.decoder.norm.weight)
    assert model(**batch()).loss.item() == pytest.approx(math.log(331), abs=1e-5)


@pytest.mark.parametrize(
    "implementation", [name for name in BACKENDS if name != "flex_attention"]
)  # GPU only
def test_parity_gradients_of_the_ragged_pass_are_those_of_the_plain_one(model, implementation):
    inputs = batch()
    gradients = []
    for backend in (implementation, "eager"):
        use_backend(model, backend)
        model.zero_grad()
        (plain_loss(model, inputs) if gradients else model(**inputs).loss).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)


def test_token_losses_and_the_divisor(model):
    inputs = batch()
    output = model(**inputs)
    kept = inputs["labels"] != -100
    assert (output.token_losses[~kept] == 0).all()
    assert not output.token_losses.requires_grad
    torch.testing.assert_close(output.token_losses.sum() / kept.sum(), output.loss.detach())
    other = model(**inputs, num_items_in_batch=torch.tensor(100))
    torch.testing.assert_close(other.loss, output.loss * kept.sum() / 100)
    assert output.loss.dtype == torch.float32


def test_training_needs_no_logits(model):
    assert model(**batch()).logits.shape == (B, T, 331)
    assert model.train()(**batch()).logits is None
    assert model(**batch(), return_logits=True).logits.shape == (B, T, 331)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_parity_packed_rows_are_their_pairs_one_by_one(model, implementation):
    """Two pairs in a row: encoder, decoder and cross attention apart, positions and shift
    restarting.
    """
    use_backend(model, implementation)
    pairs = [((0, 4), (0, 3)), ((4, 9), (3, 7))]
    inputs = batch(padded=False)
    packed = {
        "input_ids": inputs["input_ids"],
        "labels": inputs["labels"],
        "attention_mask": torch.tensor([[1] * 4 + [2] * 5] * B),
        "decoder_attention_mask": torch.tensor([[1] * 3 + [2] * 4] * B),
    }
    output = model(**packed)
    for (s0, s1), (t0, t1) in pairs:
        alone = model(input_ids=inputs["input_ids"][:, s0:s1], labels=inputs["labels"][:, t0:t1])
        torch.testing.assert_close(
            output.token_losses[:, t0:t1], alone.token_losses, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(output.logits[:, t0:t1], alone.logits, atol=1e-5, rtol=1e-5)
    # the control: unpacked, the second pair sees the first
    leaking = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
    assert (leaking.token_losses[:, 3:] - output.token_losses[:, 3:]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="every source needs its target"):
        model(**{**packed, "decoder_attention_mask": torch.ones(B, T, dtype=torch.long)})


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_chunked_loss_is_the_dense_loss(chunk, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 16).to(dtype).requires_grad_()
    weight = torch.randn(41, 16).to(dtype).requires_grad_()
    labels = torch.randint(0, 41, (3, 5))
    labels[1, 2:] = -100
    loss, token_losses = chunked_cross_entropy(hidden, weight, labels, chunk=chunk)
    (loss * 3).backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match="modified by an inplace operation"
    ):  # never gradients of another scale
        loss.backward()
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    dense = cross_entropy(
        (h @ w.T).float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    )
    (dense.sum() / (labels != -100).sum() * 3).backward()
    tolerance = (
        {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    )
    torch.testing.assert_close(loss, dense.sum() / 12, **tolerance)
    torch.testing.assert_close(token_losses.flatten(), dense, **tolerance)
    torch.testing.assert_close(hidden.grad, h.grad, **tolerance)
    torch.testing.assert_close(weight.grad, w.grad, **tolerance)
    # the control: dividing by all tokens instead of those with a label
    assert abs(loss - dense.sum() / 15) > 0.1


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_parity_of_z_loss_and_label_smoothing(z_loss, label_smoothing):
    """Chunked and dense against torch's smoothing and a z-loss written out, values and gradients."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 5, 16).requires_grad_(), torch.randn(41, 16).requires_grad_()
    labels = torch.randint(0, 41, (3, 5))
    labels[1, 2:] = -100
    flat = labels.flatten()

    def textbook() -> torch.Tensor:
        logits = (hidden @ weight.T).flatten(0, 1)
        smoothed = cross_entropy(
            logits, flat, label_smoothing=label_smoothing, reduction="sum", ignore_index=-100
        )
        return (smoothed + z_loss * logits.logsumexp(-1)[flat != -100].square().sum()) / 20

    def gradients(loss: torch.Tensor) -> tuple:
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    options = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    expected = gradients(textbook())
    chunked, token_losses = chunked_cross_entropy(hidden, weight, labels, 20, chunk=4, **options)
    dense, dense_losses = dense_cross_entropy(hidden @ weight.T, labels, 20, **options)
    for mine in (chunked, dense):
        for value, reference in zip(gradients(mine), expected, strict=True):
            torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)
    plain = cross_entropy(
        (hidden @ weight.T).flatten(0, 1), flat, reduction="none", ignore_index=-100
    )
    for mine in (token_losses, dense_losses):  # the meters stay comparable
        torch.testing.assert_close(mine.flatten(), plain.detach(), atol=1e-5, rtol=1e-5)
    if z_loss or label_smoothing:  # the control: without them it is another loss
        assert abs(chunked_cross_entropy(hidden, weight, labels, 20)[0] - expected[0]) > 1e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["padded", "packed", "full"])
def test_lookups_add_to_the_gradient_of_the_head(model, kind, training):
    """No second matrix is made at the peak of a step, and the gradients are those of autograd by
    itself.
    """
    inputs = batch() | {
        "encoder_labels": torch.full((B, S), -100).index_fill(1, torch.tensor([3]), 17)
    }
    if kind == "packed":
        inputs |= {
            "attention_mask": torch.tensor([[1] * 4 + [2] * 5] * B),
            "decoder_attention_mask": torch.tensor([[1] * 3 + [2] * 4] * B),
        }
    if kind != "padded":
        inputs["labels"] = batch(False)["labels"]
    if kind == "full":
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    inputs["input_ids"][:, 1] = (
        model.config.pad_token_id
    )  # as a text may have it; its row gets nothing from lookups
    shared, made = (
        model.get_input_embeddings(),
        ("aten::embedding_dense_backward", "aten::add", "aten::add_"),
    )

    def gradients() -> tuple[dict[str, torch.Tensor], list[str]]:
        model.train(training).zero_grad()
        loss = model(**inputs).loss
        with torch.profiler.profile(record_shapes=True) as profiler:
            loss.backward()
        shape = list(shared.weight.shape)
        events = [e for e in profiler.events() if e.name in made]
        names = [e.name for e in events if e.name == made[0] or shape in e.input_shapes]
        return {name: p.grad.clone() for name, p in model.named_parameters()}, names

    found, matrices = gradients()
    assert matrices == ["aten::add_"]  # the encoder's loss and the decoder's
    hook = shared.register_forward_hook(lambda *_: None)
    expected, matrices = gradients()
    assert matrices.count(made[0]) == 2
    hook.remove()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    shared.padding_idx = None
    assert not torch.allclose(
        gradients()[0]["model.shared.weight"], expected["model.shared.weight"], atol=1e-4
    )


@pytest.mark.parametrize(
    "kind", [Qwen3ForSeq2SeqLM, Qwen3EncoderModel, Qwen3EncoderForTokenClassification]
)
def test_a_configuration_that_asks_for_all_states_gets_them_in_training(kind):
    """Real tokens alone are computed otherwise, and states of layers are not laid out for them."""
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    if kind is Qwen3ForSeq2SeqLM:
        inputs["labels"] = batch()["labels"]
    for wanted in (True, False):
        output = kind(tiny_config(output_hidden_states=wanted)).train()(**inputs)
        states = output.get("encoder_hidden_states", output.get("hidden_states"))
        assert [tuple(part.shape) for part in states or ()] == [(B, S, 40)] * 4 * wanted


@pytest.mark.parametrize(
    "kind", [Qwen3ForSeq2SeqLM, Qwen3EncoderForTokenClassification, Qwen3EncoderModel]
)
def test_the_tensor_parallel_plan_names_what_is_there(kind):
    model = kind(tiny_config())
    modules = {re.sub(r"\d+", "*", name) for name, _ in model.named_modules()}
    assert len(model.tp_plan) == (18 if kind is Qwen3ForSeq2SeqLM else 9)
    assert model.tp_plan.keys() <= modules


def test_other_losses_are_refused_where_they_cannot_run(model):
    inputs = batch()
    for name, reason in (
        ("liger", "runs on CUDA only"),
        ("cce", "runs on CUDA only"),
        ("ligre", "not one of chunked"),
    ):
        with pytest.raises(ValueError, match=reason):
            model.train()(**inputs, loss_implementation=name)
    hidden, labels = torch.randn(1, 2, 40), torch.tensor([[1, -100]])
    value, _ = linear_cross_entropy("chunked", hidden, model.model.shared.weight, labels)
    assert value > 0


def test_the_loss_comes_from_the_logits_where_there_are_some(model):
    output = model(**batch())
    (gradient,) = torch.autograd.grad(output.loss, output.logits)
    assert (gradient.abs().amax(-1) > 0).equal(batch()["labels"] != -100)
    torch.testing.assert_close(model.train()(**batch()).loss, output.loss, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_encoder_loss_is_masked_next_token_prediction(model, packed):
    """Against a loop over the masked tokens:

    the state before each one predicts it, within its document.
    """
    inputs = batch()
    if packed:
        inputs |= {
            "attention_mask": torch.tensor([[1] * 4 + [2] * 5] * B), "labels": batch(False)["labels"],
            "decoder_attention_mask": torch.tensor([[1] * 3 + [2] * 4] * B),
        }  # fmt: skip
    encoder_labels = torch.full((B, S), -100)
    encoder_labels[0, 3], encoder_labels[0, 4], encoder_labels[1, 2], encoder_labels[2, 0] = (
        17,
        23,
        5,
        9,
    )
    plain = model.train()(**inputs).loss
    total = model(**inputs, encoder_labels=encoder_labels, encoder_loss_weight=0.7).loss
    asked = (
        [(0, 3, 17), (1, 2, 5)] if packed else [(0, 3, 17), (0, 4, 23), (1, 2, 5)]
    )  # (0, 4) begins a document
    states = model.eval()(**inputs).encoder_last_hidden_state
    expected = sum(
        cross_entropy(states[row, place - 1] @ model.model.shared.weight.T, torch.tensor(label))
        for row, place, label in asked
    )  # fmt: skip
    items = (inputs["labels"] != -100).sum()
    torch.testing.assert_close(total - plain, 0.7 * expected / items, atol=1e-5, rtol=1e-4)
    # the control: the state of the mask itself predicting it, which is plain masked-language
    # modelling
    other = sum(
        cross_entropy(states[row, place] @ model.model.shared.weight.T, torch.tensor(label))
        for row, place, label in asked
    )  # fmt: skip
    assert abs(other - expected) > 1e-2


def test_rope_on_encoder_keys_is_off_and_can_be_turned_on(model):
    inputs = batch()
    torch.manual_seed(0)
    rotated = Qwen3ForSeq2SeqLM(tiny_config(rope_on_encoder_keys=True)).eval()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), rotated.parameters(), strict=True)
    )
    assert abs(rotated(**inputs).loss - model(**inputs).loss) > 1e-4
    torch.testing.assert_close(
        rotated(**inputs).loss, plain_loss(rotated, inputs), atol=1e-5, rtol=0
    )
    # the order of the source now matters to the decoder, which is what the ablation asks about
    order = torch.tensor([4, 0, 2, 1, 3, 5, 8, 6, 7])
    for m, matters in ((model, False), (rotated, True)):
        states = m.get_encoder()(inputs["input_ids"]).last_hidden_state
        ids = inputs["input_ids"][:, :3]
        straight, permuted = (
            m(encoder_outputs=(s,), decoder_input_ids=ids).logits
            for s in (states, states[:, order])
        )
        assert ((straight - permuted).abs().max() > 1e-4) == matters
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    generated = [
        rotated.generate(**source, max_new_tokens=6, use_cache=use) for use in (True, False)
    ]
    assert torch.equal(*generated)


def test_a_row_without_source_or_target_takes_nobody_elses(model):
    """Documents are matched by row:

    an empty source in one row and an empty target in another are no pair.
    """
    inputs = batch(padded=False)
    inputs["decoder_attention_mask"] = torch.ones(B, T, dtype=torch.long)
    inputs["attention_mask"][0] = 0
    inputs["decoder_attention_mask"][1] = 0
    output = model(**inputs)
    alone = model(input_ids=inputs["input_ids"][2:], labels=inputs["labels"][2:])
    torch.testing.assert_close(output.token_losses[2:], alone.token_losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.token_losses[1], torch.zeros(T))
    # without a source, the target tokens see each other only
    ids = model.prepare_decoder_input_ids_from_labels(inputs["labels"])[:1]
    nothing = torch.zeros(1, S, dtype=torch.long)
    logits = model(
        input_ids=inputs["input_ids"][:1], attention_mask=nothing, decoder_input_ids=ids
    ).logits
    expected = cross_entropy(logits[0], inputs["labels"][0], reduction="none")
    torch.testing.assert_close(output.token_losses[0], expected, atol=1e-5, rtol=0)


def test_a_missing_embedding_is_reported_and_initialized(model, tmp_path):
    state = {
        name: p
        for name, p in model.state_dict().items()
        if "shared" not in name and "embed" not in name
    }
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = Qwen3ForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "model.shared.weight" in info["missing_keys"]
    assert loaded.model.shared.weight.device.type == "cpu"
    assert loaded.model.shared.weight.std().item() == pytest.approx(0.2, rel=0.1)


def test_fewer_decoder_layers_size_the_static_cache():
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(tiny_config(num_decoder_layers=2)).eval()
    torch.nn.init.normal_(model.model.shared.weight)  # as in test_generation.py
    ids = batch()["input_ids"]
    dynamic = model.generate(input_ids=ids, max_new_tokens=4)
    static = model.generate(
        input_ids=ids, max_new_tokens=4, cache_implementation="static", return_dict_in_generate=True
    )  # fmt: skip
    assert torch.equal(static.sequences, dynamic)
    assert len(static[CACHE_FIELD].self_attention_cache.layers) == 2


def test_no_label_at_all_is_a_zero_loss_not_a_nan(model):
    inputs = batch()
    inputs["labels"][:] = -100
    loss = model(**inputs).loss
    loss.backward()
    assert loss == 0


def test_one_embedding_object(model, tmp_path):
    def check(m):
        assert m.model.shared is m.model.encoder.embed_tokens is m.model.decoder.embed_tokens
        assert m.get_input_embeddings() is m.model.shared
        names = [name for name, _ in m.named_parameters() if "embed" in name or "shared" in name]
        assert names == ["model.shared.weight"]

    check(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        saved = list(tensors.keys())
    assert [name for name in saved if "embed" in name or "shared" in name] == [
        "model.shared.weight"
    ]
    loaded = Qwen3ForSeq2SeqLM.from_pretrained(tmp_path)
    check(loaded)
    for (name, mine), (other, reference) in zip(
        loaded.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, reference)
    loaded.resize_token_embeddings(345)
    check(loaded)
    loaded.save_pretrained(tmp_path / "resized")
    again = Qwen3ForSeq2SeqLM.from_pretrained(tmp_path / "resized")
    check(again)
    assert again.model.shared.weight.shape == (345, 40)
    # the control: two modules that share a parameter are not one object
    torn = Qwen3ForSeq2SeqLM(tiny_config())
    torn.model.decoder.embed_tokens = torch.nn.Embedding.from_pretrained(torn.model.shared.weight)
    with pytest.raises(AssertionError):
        check(torn)


def test_buffers_come_back_from_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Qwen3ForSeq2SeqLM.from_pretrained(tmp_path).eval()
    for stack in (loaded.model.encoder, loaded.model.decoder):
        assert torch.equal(stack.rotary_emb.inv_freq, model.model.encoder.rotary_emb.inv_freq)
    assert torch.equal(loaded(**batch()).loss, model(**batch()).loss)


def test_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(tmp_path), Qwen3ForSeq2SeqLM)
    assert isinstance(AutoModel.from_pretrained(tmp_path), Qwen3EncoderDecoderModel)


def test_state_dict_names_are_those_of_the_design(model):
    layer = {
        *(f"self_attn.{name}_proj" for name in "qkvo"), "self_attn.q_norm", "self_attn.k_norm",
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")), "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    expected = {"model.shared.weight"}
    for stack in ("encoder", "decoder"):
        expected |= {f"model.{stack}.norm.weight"}
        expected |= {f"model.{stack}.layers.{i}.{name}.weight" for i in range(3) for name in layer}
    assert {name for name, _ in model.named_parameters()} == expected


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
def test_cached_decoding_is_uncached_decoding(model, implementation, options):
    use_backend(model, implementation)
    inputs = batch()
    inputs.pop("labels")
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        runs.append(model.generate(**inputs, max_new_tokens=8, use_cache=use_cache, **options))
    assert torch.equal(*runs)
    # the control: another source gives another text
    torch.manual_seed(0)
    other = dict(inputs, input_ids=inputs["input_ids"].flip(1))
    changed = model.generate(**other, max_new_tokens=8, **options)
    assert changed.shape != runs[0].shape or not torch.equal(changed, runs[0])


def test_cached_logits_step_by_step(model):
    inputs = batch()
    ids = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    source = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    full = model(**source, decoder_input_ids=ids).logits
    cache, encoded, steps = None, model.get_encoder()(**source), []
    for start, stop in ((0, 3), (3, 4), (4, 7)):  # a prefill, one token, a chunk
        output = model(
            encoder_outputs=encoded,
            attention_mask=source["attention_mask"],
            decoder_input_ids=ids[:, start:stop],
            **{CACHE_FIELD: cache},
            use_cache=True,
        )
        cache = output[CACHE_FIELD]
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=1e-5)
    assert cache.cross_attention_cache.layers[0].keys.shape == (B, 2, S, 14)


def test_arguments_that_nothing_reads_are_refused(model):
    """transformers 5.24 renamed past_key_values to cache:

    swallowed, decoding forgot its own past.
    """
    inputs = batch()
    with pytest.raises(TypeError, match="unexpected argument 'cache_params'"):
        model(**inputs, cache_params=None)
    with pytest.raises(TypeError, match="unexpected argument 'token_type_ids'"):
        model.get_encoder()(inputs["input_ids"], token_type_ids=None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_ignores_padding(model, side):
    ids = batch(padded=False)["input_ids"][:1]
    padding = torch.full((1, 4), model.config.pad_token_id)
    order = (padding, ids) if side == "left" else (ids, padding)
    padded = torch.cat(order, dim=1)
    mask = torch.cat([torch.full_like(part, int(part is ids)) for part in order], dim=1)
    alone = model.generate(input_ids=ids, max_new_tokens=6)
    assert torch.equal(
        model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=6), alone
    )


def test_gradient_checkpointing_changes_nothing_but_memory(model):
    inputs, gradients = batch(), []
    model.train()
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            assert model.model.encoder.gradient_checkpointing
            assert model.model.decoder.gradient_checkpointing
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-7, rtol=1e-6)


def test_fewer_decoder_than_encoder_layers():
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(tiny_config(num_decoder_layers=2)).eval()
    assert (len(model.model.encoder.layers), len(model.model.decoder.layers)) == (3, 2)
    inputs = batch()
    torch.testing.assert_close(model(**inputs).loss, plain_loss(model, inputs), atol=1e-5, rtol=0)
    inputs.pop("labels")
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == B


def test_bf16_autocast_keeps_the_loss_in_fp32(model):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch())
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, model(**batch()).loss, atol=5e-2, rtol=0)
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [40, 64, 331])
@pytest.mark.parametrize("amx", [True, False])
def test_logits_of_few_rows_are_the_ordinary_product(classes, dtype, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(classes, 40, dtype=dtype))
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    )
    for batch, length in ((1, 1), (3, 1), (2, 4), (3, 3)):
        states = torch.randn(batch, length, 40, dtype=dtype)
        expected = states.float() @ weight.float().t()
        with torch.no_grad():
            logits = vocabulary_logits(states, weight)
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, **tolerance)
        if batch * length > 1:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(logits.float(), expected.roll(1, dims=-1), **tolerance)


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-3, 0.1)])
def test_the_loss_formed_in_one_pass_for_a_gpu_is_that_of_a_cpu(z_loss, smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(37, 1088), torch.randint(0, 1003, (37,))
    logits[:, 1003:] = 0.0  # classes that fill up the matrix
    labels[::5] = -100
    compiled = torch.compile(_form_gradient, dynamic=True, backend="aot_eager")

    def formed(function, labels):
        gradient = logits.clone()
        return *function(gradient[:, :1003], labels, z_loss, smoothing, True), gradient

    expected, found = formed(_form_gradient, labels), formed(compiled, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert found[0][::5].eq(0).all()
    assert found[2][::5].eq(0).all()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(formed(compiled, labels.roll(1)), expected, rtol=1e-5, atol=1e-7)
