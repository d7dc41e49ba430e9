import pytest
import torch
from transformers import Qwen3Model

from qwen3_encdec import Qwen3EncoderForSequenceClassification, Qwen3EncoderModel
from tests.conftest import BACKENDS, tiny_config, tiny_qwen3_config, use_backend


def encoder_with(implementation: str) -> Qwen3EncoderModel:
    torch.manual_seed(0)
    return use_backend(Qwen3EncoderModel(tiny_config()).eval(), implementation)


def ids(batch: int = 3, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def qwen3_of(encoder: Qwen3EncoderModel) -> Qwen3Model:
    """The stock causal Qwen3 with the encoder's weights."""
    rope = encoder.config.rope_parameters
    qwen3 = Qwen3Model(tiny_qwen3_config(vocab_size=331, rope_parameters=rope)).eval()
    state = {"embed_tokens.weight": encoder.shared.weight, **encoder.encoder.state_dict()}
    qwen3.load_state_dict(state)
    return qwen3


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_last_token_changes_the_first_state(implementation, batch):
    encoder = encoder_with(implementation)
    before, after = ids(batch), ids(batch)
    after[:, -1] = (after[:, -1] + 1) % 300

    def first_states(model) -> list[torch.Tensor]:
        return [model(tokens).last_hidden_state[:, 0] for tokens in (before, after)]

    one, other = first_states(encoder)
    assert ((one - other).abs().amax(-1) > 1e-3).all()
    assert torch.equal(*first_states(qwen3_of(encoder)))  # the control: Qwen3 itself is causal


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])  # the two that take any mask
def test_parity_causal_encoder_is_qwen3(implementation):
    encoder = encoder_with(implementation)
    tokens = ids()
    causal = torch.ones(11, 11).tril().bool()[None, None].expand(3, -1, -1, -1)
    if implementation == "eager":
        causal = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    reference = qwen3_of(encoder)(tokens).last_hidden_state
    states = encoder(tokens, attention_mask=causal).last_hidden_state
    torch.testing.assert_close(states, reference, atol=1e-5, rtol=0)
    # the control: without the causal mask it is not Qwen3
    assert (encoder(tokens).last_hidden_state - reference).abs().max() > 1e-2


def test_states_and_attentions_are_recorded():
    encoder = encoder_with("eager")
    output = encoder(ids(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 11, 40)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 11, 11)] * 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 4, 11))


def test_the_mean_of_a_long_text_does_not_overflow_in_fp16():
    states = torch.full((1, 1100, 4), 64.0, dtype=torch.float16)
    head = Qwen3EncoderForSequenceClassification(tiny_config())
    assert torch.equal(head.pool(states, torch.ones(1, 1100)), states[:, 0])
