import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.modeling_qwen3_encoder import Qwen3SharedEmbedding
from tests.conftest import pack

B, S, T = 3, 9, 7


def batch(padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(0, 300, (B, S), generator=generator),
        "attention_mask": torch.ones(B, S, dtype=torch.long),
        "labels": torch.randint(0, 300, (B, T), generator=generator),
    }
    if padded:
        inputs["attention_mask"][1, 6:] = inputs["attention_mask"][2, :3] = 0
        inputs["labels"][0, 5:] = inputs["labels"][2, 1:] = -100
    return inputs


def source_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def test_zero_logits_give_log_v(model):
    torch.nn.init.zeros_(model.model.decoder.norm.weight)
    assert model(**batch()).loss.item() == pytest.approx(math.log(331), abs=1e-5)


def test_the_loss_is_a_function_of_the_logits_beside_it(model):
    inputs = batch()
    output = model(**inputs)
    (found,) = torch.autograd.grad(output.loss, output.logits)
    logits = output.logits.detach().requires_grad_()
    textbook = cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100)
    (expected,) = torch.autograd.grad(textbook, logits)
    torch.testing.assert_close(found, expected)


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


@pytest.mark.parametrize("packed", [False, True])
def test_encoder_targets_are_masked_next_token_prediction(model, packed):
    """Against a loop over the masked tokens: the state before each predicts it, in its document."""
    inputs = batch()
    asked = {(0, 3): 17, (1, 2): 5, (2, 6): 23}
    targets = torch.full((B, S), -100)
    for place, token in (asked | {(1, 0): 9}).items():  # nothing stands before (1, 0)
        targets[place] = token
    states = model(**inputs).encoder_last_hidden_state
    items = (inputs["labels"] != -100).sum()
    form = pack(inputs) if packed else inputs
    kept = inputs["attention_mask"].bool()
    given = targets[kept][None] if packed else targets
    plain = model.train()(**form).loss
    total = model(**form, encoder_targets=given, encoder_loss_weight=0.7).loss

    def loss(offset: int) -> torch.Tensor:
        before = torch.stack([states[row, place - offset] for row, place in asked])
        tokens = torch.tensor(list(asked.values()))
        return cross_entropy(before @ model.model.shared.weight.T, tokens, reduction="sum")

    torch.testing.assert_close(total - plain, 0.7 * loss(1) / items, atol=1e-5, rtol=1e-4)
    # the control: the state of the mask itself predicting it, which is masked language modelling
    assert abs(loss(0) - loss(1)) > 1e-2


def test_one_embedding_under_one_name(model, tmp_path):
    def check(m):
        shared = [name for name, module in m.named_modules() if isinstance(module, nn.Embedding)]
        assert shared == ["model.shared"]
        assert isinstance(m.get_input_embeddings(), Qwen3SharedEmbedding)
        assert m.model.encoder.get_input_embeddings() is m.get_input_embeddings()
        assert m.model.decoder.get_input_embeddings() is m.get_input_embeddings()

    check(model)
    check(copy.deepcopy(model))
    assert copy.deepcopy(model).model.encoder.get_input_embeddings() is not model.model.shared
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert [n for n in saved if "embed" in n or "shared" in n] == ["model.shared.weight"]
    loaded = Qwen3ForSeq2SeqLM.from_pretrained(tmp_path)
    check(loaded)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    loaded.resize_token_embeddings(345)
    check(loaded)
    loaded.save_pretrained(tmp_path / "resized")
    again = Qwen3ForSeq2SeqLM.from_pretrained(tmp_path / "resized")
    check(again)
    assert again.model.shared.weight.shape == (345, 40)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_every_use_of_the_embedding_is_a_call(model, form):
    """Encoder ids, decoder ids and states: hooks of launchers and wrappers see all three."""
    inputs = pack(batch()) if form == "packed" else batch()
    calls = []
    model.model.shared.register_forward_hook(lambda _, args, __: calls.append(args[0].dtype))
    model.train()(**inputs)
    assert calls == [torch.int64, torch.int64, torch.float32]


def test_a_missing_embedding_is_reported_and_initialized(model, tmp_path):
    state = model.state_dict()
    del state["model.shared.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = Qwen3ForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "model.shared.weight" in info["missing_keys"]
    assert loaded.model.shared.weight.device.type == "cpu"
    assert loaded.model.shared.weight.std().item() == pytest.approx(0.2, rel=0.1)


def test_the_loss_ignores_which_logits_are_kept(model):
    inputs = batch()
    expected = model(**inputs)
    for keep in (2, torch.tensor([0, 3]), torch.arange(T).flip(0)):
        assert torch.allclose(model(**inputs, logits_to_keep=keep).loss, expected.loss)
    assert torch.equal(model(**inputs, logits_to_keep=2).logits, expected.logits[:, -2:])


def test_bf16_autocast_keeps_the_loss_in_fp32(model):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch())
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, model(**batch()).loss, atol=5e-2, rtol=0)
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
