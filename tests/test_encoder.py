import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from qwen3_encdec import Qwen3Encoder, modeling_qwen3_encoder
from qwen3_encdec.modeling_qwen3_encoder import (
    RaggedLayout,
    Segments,
    attend,
    bottom_right_causal_bias,
    multiply_few_rows,
    project,
)
from tests.conftest import BACKENDS, tiny_config, use_backend


def encoder_with(implementation: str, **changes) -> Qwen3Encoder:
    torch.manual_seed(0)
    encoder = Qwen3Encoder(tiny_config(**changes)).eval()
    return use_backend(encoder, implementation)


def ids(batch: int = 3, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def qwen3_of(encoder: Qwen3Encoder) -> Qwen3Model:
    """The stock causal Qwen3 with the encoder's weights."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "pad_token_id")  # fmt: skip
    qwen3 = Qwen3Model(
        Qwen3Config(**{name: getattr(encoder.config, name) for name in names})
    ).eval()
    qwen3.load_state_dict(encoder.state_dict())
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


def test_segments_are_as_drawn():
    mask = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    segments = Segments.from_mask(mask)
    assert segments.index.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert segments.layout.query_lengths == [3, 2, 2]
    assert segments.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    batch = torch.randn(2, 6, 5)
    assert torch.equal(segments.scatter(segments.gather(batch)), batch * (mask > 0)[..., None])


@pytest.mark.parametrize("implementation", BACKENDS)
def test_parity_ragged_encoder_is_the_padded_eager_one(implementation):
    encoder = encoder_with(implementation)
    tokens = ids()
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = 0
    mask[2, :4] = 0
    segments = Segments.from_mask(mask)
    ragged = encoder(segments.gather(tokens), segments=segments).last_hidden_state
    padded = encoder_with("eager")(tokens, attention_mask=mask).last_hidden_state * mask[..., None]
    torch.testing.assert_close(segments.scatter(ragged), padded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_parity_packed_documents_are_encoded_as_if_alone(implementation):
    encoder = encoder_with(implementation)
    tokens = ids(1, 11)
    mask = torch.tensor([[1] * 4 + [2] * 5 + [0] * 2])
    segments = Segments.from_mask(mask)
    packed = encoder(segments.gather(tokens), segments=segments).last_hidden_state[0]
    alone = [encoder(tokens[:, place]).last_hidden_state[0] for place in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)
    # the control: one document of nine tokens is something else
    assert (encoder(tokens[:, :9]).last_hidden_state[0] - packed).abs().max() > 1e-3
    with pytest.raises(ValueError, match="several documents a row"):
        encoder(tokens, attention_mask=mask)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_parity_ragged_attention_is_brute_force(causal, implementation):
    torch.manual_seed(0)
    attention = encoder_with(implementation).layers[0].self_attn
    queries, keys = [3, 1, 4], [5, 2, 4]
    q, k, v = torch.randn(1, 4, 8, 14), torch.randn(1, 2, 11, 14), torch.randn(1, 2, 11, 14)
    documents = [torch.arange(3).repeat_interleave(torch.tensor(side)) for side in (queries, keys)]
    output, _ = attend(attention, q, k, v, layout=RaggedLayout(*documents, causal=causal))
    uncut, _ = attend(attention, q[:, :, :3], k, v, causal=causal)
    q_start = k_start = 0
    for n_q, n_k in zip(queries, keys, strict=True):
        for head in range(4):
            for i in range(n_q):
                seen = n_k - n_q + i + 1 if causal else n_k
                key = k[0, head // 2, k_start : k_start + seen]
                weights = (key @ q[0, head, q_start + i] * attention.scaling).softmax(-1)
                expected = weights @ v[0, head // 2, k_start : k_start + seen]
                torch.testing.assert_close(
                    output[0, q_start + i, head], expected, atol=1e-6, rtol=1e-5
                )
        q_start, k_start = q_start + n_q, k_start + n_k
    # the control: the first document with the keys of the others in sight
    assert (uncut[0, :, 0] - output[0, :3, 0]).abs().max() > 1e-2


def test_bottom_right_mask_is_as_drawn():
    seen = bottom_right_causal_bias(4, 7, torch.zeros(1)) == 0
    drawn = ["1111000", "1111100", "1111110", "1111111"]
    assert ["".join(str(int(cell)) for cell in row) for row in seen] == drawn
    # what the GPU is told instead
    assert torch.equal(torch.nn.attention.bias.causal_lower_right(4, 7)._materialize(), seen)


def test_states_and_attentions_are_recorded():
    encoder = encoder_with("eager")
    output = encoder(ids(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 11, 40)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 11, 11)] * 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 4, 11))


@pytest.fixture
def few_rows_products(monkeypatch) -> list[int]:
    """The rows of every product that `multiply_few_rows` makes."""
    rows_of: list[int] = []

    def spy(states, weight):
        rows_of.append(states.shape[:-1].numel())
        return multiply_few_rows(states, weight)

    monkeypatch.setattr(
        modeling_qwen3_encoder, "_HAS_MKL", True
    )  # the forms are right without it too
    monkeypatch.setattr(modeling_qwen3_encoder, "multiply_few_rows", spy)
    return rows_of


@pytest.mark.parametrize("classes", [40, 64, 331])
def test_few_rows_are_projected_as_by_the_ordinary_product(few_rows_products, classes):
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, classes, bias=False)
    for batch, length in ((0, 1), (1, 1), (3, 1), (1, 5), (2, 4), (3, 3)):
        states = torch.randn(length, batch, 48).transpose(0, 1)
        with torch.no_grad():
            projected = project(linear, states)
        expected = states.double() @ linear.weight.double().t()
        assert projected.is_contiguous()
        torch.testing.assert_close(projected, expected.float(), rtol=1e-5, atol=1e-5)
        if batch:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(
                    projected, expected.float().roll(1, dims=-1), rtol=1e-5, atol=1e-5
                )
    assert few_rows_products == [1, 3, 5, 8]  # none of no rows, none of 9


def test_only_a_plain_linear_that_nobody_has_touched_is_projected_by_few_rows(few_rows_products):
    class Adapted(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    def linear(kind=torch.nn.Linear, bias=False, dtype=torch.float32):
        return kind(48, 80, bias=bias, dtype=dtype)

    plain, hooked, prehooked, replaced, parametrized = (linear() for _ in range(5))
    plain.requires_grad_(False)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    prehooked.register_forward_pre_hook(lambda module, args: args[0] + 1)
    replaced.forward = lambda states: states
    torch.nn.utils.parametrizations.weight_norm(parametrized)
    states = torch.randn(3, 1, 48)
    for module in (hooked, prehooked, replaced, parametrized, linear(Adapted), linear(bias=True)):
        with torch.no_grad():
            torch.testing.assert_close(project(module, states), module(states), rtol=0, atol=0)
    with torch.no_grad():
        project(linear(dtype=torch.bfloat16), states.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert project(linear(), states).dtype == torch.bfloat16
        traced = torch.jit.trace(lambda states: project(plain, states), states, check_trace=False)
        assert traced(torch.randn(20, 1, 48)).shape == (20, 1, 80)
    assert project(linear(), states).requires_grad
    assert few_rows_products == []
    with torch.no_grad():
        project(linear(), states)
    assert few_rows_products == [3]
