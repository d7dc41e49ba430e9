import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from qwen3_encdec import Qwen3EncoderModel
from tests.conftest import BACKENDS, tiny_config, use_backend


def encoder_with(implementation: str, **changes) -> Qwen3EncoderModel:
    torch.manual_seed(0)
    encoder = Qwen3EncoderModel(tiny_config(**changes)).eval()
    return use_backend(encoder, implementation)


def ids(batch: int = 3, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def qwen3_of(encoder: Qwen3EncoderModel) -> Qwen3Model:
    """The stock causal Qwen3 with the encoder's weights."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "pad_token_id")  # fmt: skip
    qwen3 = Qwen3Model(
        Qwen3Config(**{name: getattr(encoder.config, name) for name in names})
    ).eval()
    state = {"embed_tokens.weight": encoder.shared.weight, **encoder.encoder.state_dict()}
    qwen3.load_state_dict(state)
    return qwen3


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_last_token_changes_the_first_state(implementation, batch):
    encoder = encoder_with(implementation)
    before = ids(batch)
    after = before.clone()
    after[:, -1] = (after[:, -1] + 1) % 300
    change = (
        (encoder(before).last_hidden_state - encoder(after).last_hidden_state)[:, 0].abs().amax(-1)
    )
    assert (change > 1e-3).all()
    # the control: Qwen3 itself is causal
    causal = qwen3_of(encoder)
    assert torch.equal(
        causal(before).last_hidden_state[:, 0], causal(after).last_hidden_state[:, 0]
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])  # the two that take any mask
def test_parity_causal_encoder_is_qwen3(implementation):
    encoder = encoder_with(implementation)
    tokens = ids()
    causal = torch.ones(11, 11).tril().bool()[None, None].expand(3, -1, -1, -1)
    if implementation == "eager":
        causal = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    reference = qwen3_of(encoder)(tokens).last_hidden_state
    torch.testing.assert_close(
        encoder(tokens, attention_mask=causal).last_hidden_state, reference, atol=1e-5, rtol=0
    )
    # the control: without the causal mask it is not Qwen3
    assert (encoder(tokens).last_hidden_state - reference).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_order_change_nothing(implementation, side):
    encoder = encoder_with(implementation)
    tokens, lengths = ids(), (11, 7, 3)
    padded, mask = torch.full((3, 11), 300), torch.zeros(3, 11, dtype=torch.long)
    places = [slice(11 - n, None) if side == "left" else slice(0, n) for n in lengths]
    for row, (place, n) in enumerate(zip(places, lengths, strict=True)):
        padded[row, place], mask[row, place] = tokens[row, :n], 1
    states = encoder(padded, attention_mask=mask).last_hidden_state
    reordered = encoder(padded[[2, 0, 1]], attention_mask=mask[[2, 0, 1]]).last_hidden_state
    for row, (place, n) in enumerate(zip(places, lengths, strict=True)):
        alone = encoder(tokens[row : row + 1, :n]).last_hidden_state[0]
        torch.testing.assert_close(states[row, place], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(reordered[[1, 2, 0][row], place], alone, atol=1e-5, rtol=0)
    # the control: an ignored mask lets the padding in
    assert (
        encoder(padded).last_hidden_state[2, places[2]] - states[2, places[2]]
    ).abs().max() > 1e-3


def packed_form(tokens: list[torch.Tensor]) -> dict:
    """Texts one after another, with their lengths."""
    lengths = [len(text) for text in tokens]
    return {
        "input_ids": torch.cat(tokens)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
    }


@pytest.mark.parametrize("implementation", BACKENDS)
def test_parity_packed_texts_are_encoded_as_if_alone(implementation):
    encoder = encoder_with(implementation)
    texts = [ids(1, 4)[0], ids(1, 0)[0], ids(1, 7, seed=1)[0]]  # the second is empty
    packed = encoder(**packed_form(texts)).last_hidden_state[0]
    alone = [encoder(text[None]).last_hidden_state[0] for text in (texts[0], texts[2])]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)
    # the control: one text of eleven tokens is something else
    joined = encoder(torch.cat(texts)[None]).last_hidden_state[0]
    assert (joined - packed).abs().max() > 1e-3


def test_an_incomplete_packed_batch_is_refused():
    encoder = encoder_with("sdpa")
    whole = packed_form([ids(1, 4)[0], ids(1, 7)[0]])
    for name in ("position_ids", "max_seqlen"):
        with pytest.raises(ValueError, match=f"a packed batch needs .*{name}"):
            encoder(**{**whole, name: None})
    with pytest.raises(ValueError, match="omit attention_mask"):
        encoder(**whole, attention_mask=torch.ones(1, 11))
    with pytest.raises(
        ValueError, match="cu_seqlens ends at 11, but the packed batch has 9 tokens"
    ):
        encoder(**{**whole, **{k: whole[k][:, :9] for k in ("input_ids", "position_ids")}})
    with pytest.raises(ValueError, match="position_ids has shape"):
        encoder(**{**whole, "position_ids": whole["position_ids"][:, :9]})


def test_states_and_attentions_are_recorded():
    encoder = encoder_with("eager")
    output = encoder(ids(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 11, 40)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 11, 11)] * 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 4, 11))
