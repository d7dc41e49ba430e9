import pytest
import torch
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import rotate_half
from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2DecoderConfig
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2MergedAttention

from qwen3_encdec import Qwen3EncoderDecoderModel
from qwen3_encdec.attention_qwen3_encdec import project_key_value
from qwen3_encdec.modeling_qwen3_decoder import Qwen3MergedAttention, Qwen3MergedDecoder
from tests.conftest import BACKENDS, tiny_config, tiny_qwen3_config, use_backend

S, T = 7, 5


def decoder_with(implementation: str, **changes) -> Qwen3MergedDecoder:
    torch.manual_seed(0)
    model = Qwen3EncoderDecoderModel(tiny_config(**changes)).eval()
    return use_backend(model, implementation).decoder


def target_ids() -> torch.Tensor:
    return torch.randint(0, 300, (3, T), generator=torch.Generator().manual_seed(0))


def source_states() -> torch.Tensor:
    return torch.randn(3, S, 40, generator=torch.Generator().manual_seed(1))


def run(decoder, source: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """States of the same three targets."""
    options = {"encoder_hidden_states": source, "encoder_attention_mask": mask}
    return decoder(target_ids(), **options).last_hidden_state


def t5gemma2_attention(config, ours: Qwen3MergedAttention) -> T5Gemma2MergedAttention:
    """transformers' merged attention with our weights.

    Gemma's norms multiply by 1 + weight, Qwen3's by weight.
    """
    sizes = (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
    )
    theirs_config = T5Gemma2DecoderConfig(
        **{name: getattr(config, name) for name in sizes},
        num_hidden_layers=1,
        layer_types=["full_attention"],
        query_pre_attn_scalar=config.head_dim,
        attention_bias=False,
    )
    theirs_config._attn_implementation = "eager"
    theirs = T5Gemma2MergedAttention(theirs_config, 0)
    state = {k: v - 1 if k.endswith("_norm.weight") else v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_parity_merged_attention_is_t5gemma2s(implementation, masked):
    """Values and gradients; T5Gemma 2 lays the keys out decoder first and needs a dense mask."""
    config = tiny_config()
    config._attn_implementation = implementation
    torch.manual_seed(0)
    ours = Qwen3MergedAttention(config, 0).eval()
    for norm in (ours.q_norm, ours.k_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    theirs = t5gemma2_attention(config, ours)
    angles = torch.arange(T)[:, None] * torch.logspace(0, -2, 7).repeat(2)[None]
    position = (angles.cos()[None].expand(3, -1, -1), angles.sin()[None].expand(3, -1, -1))
    kept = torch.ones(3, S, dtype=torch.bool)
    if masked:
        kept[1, 4:] = kept[2, :3] = False
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    cross, own = kept[:, None, None].expand(3, 1, T, S), causal[None, None].expand(3, 1, T, T)

    def additive(seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    results = []
    for module, mask in (
        (ours, torch.cat([cross, own], -1)),
        (theirs, torch.cat([own, cross], -1)),
    ):
        states = torch.randn(3, T, 40, generator=torch.Generator().manual_seed(2)).requires_grad_()
        source = source_states().requires_grad_()
        mask = additive(mask)
        if module is ours and not masked and implementation == "sdpa":
            mask = None  # bottom-right causal is the whole truth
        inputs = (source, S, mask) if module is ours else (mask, source)
        output = module(states, position, *inputs)[0]
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append([output, states.grad, source.grad, *(p.grad for p in module.parameters())])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)
    # the control: rotated encoder keys, the bug of the published ports, are not T5Gemma 2's
    angles = torch.arange(S)[:, None] * torch.logspace(0, -2, 7).repeat(2)[None]
    rotation = angles.cos()[None, None], angles.sin()[None, None]

    def rotated(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = project_key_value(ours, states)
        return key * rotation[0] + rotate_half(key) * rotation[1], value

    ours.source_key_value = rotated
    mask = additive(torch.cat([cross, own], -1))
    wrong = ours(states, position, source, S, mask)[0]
    assert (wrong - results[1][0]).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", BACKENDS)
def test_parity_decoder_with_masked_source_is_qwen3(implementation):
    decoder = decoder_with(implementation)
    rope = decoder.config.rope_parameters
    qwen3 = Qwen3ForCausalLM(tiny_qwen3_config(vocab_size=331, rope_parameters=rope)).eval()
    embedding = decoder.get_input_embeddings().weight
    qwen3.model.load_state_dict({"embed_tokens.weight": embedding, **decoder.state_dict()})
    reference = qwen3(target_ids()).logits
    logits = run(decoder, source_states(), torch.zeros(3, S)) @ embedding.T
    torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)
    # the control: with its source in sight it is not Qwen3
    assert (run(decoder, source_states()) @ embedding.T - reference).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", BACKENDS)
def test_permuted_source_changes_nothing(implementation):
    decoder = decoder_with(implementation)
    source, mask = source_states(), torch.ones(3, S, dtype=torch.long)
    mask[0, 5:] = 0
    order = torch.randperm(S, generator=torch.Generator().manual_seed(3))
    straight = run(decoder, source, mask)
    permuted = run(decoder, source[:, order], mask[:, order])
    torch.testing.assert_close(permuted, straight, atol=1e-5, rtol=0)
    # the control: the states move and their mask does not
    assert (run(decoder, source[:, order], mask) - straight).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", BACKENDS[1:])
@pytest.mark.parametrize("padded", [(), ("source",), ("target",), ("source", "target")])
def test_parity_every_backend_is_eager(implementation, padded):
    masks = {"encoder_attention_mask": torch.ones(3, S), "attention_mask": torch.ones(3, T)}
    if "source" in padded:
        masks["encoder_attention_mask"][1, 2:] = masks["encoder_attention_mask"][2, :4] = 0
    if "target" in padded:
        masks["attention_mask"][0, 3:] = masks["attention_mask"][2, :2] = 0
    kept = masks["attention_mask"][..., None]
    inputs = {"input_ids": target_ids(), "encoder_hidden_states": source_states()}
    reference = decoder_with("eager")(**inputs, **masks).last_hidden_state
    output = decoder_with(implementation)(**inputs, **masks).last_hidden_state
    torch.testing.assert_close(output * kept, reference * kept, atol=1e-5, rtol=0)
    # the control: top-left alignment, which scaled_dot_product_attention means by is_causal
    blind = run(decoder_with("eager"), source_states(), torch.ones(3, S).tril())
    assert (blind - reference).abs().max() > 1e-3


def test_attentions_split_one_softmax():
    mask = torch.ones(3, S, dtype=torch.long)
    mask[1, 2:] = 0
    inputs = {"encoder_hidden_states": source_states(), "encoder_attention_mask": mask}
    output = decoder_with("eager")(target_ids(), **inputs, output_attentions=True)
    own, cross = output.attentions[1], output.cross_attentions[1]
    assert own.shape == (3, 4, T, T)
    assert cross.shape == (3, 4, T, S)
    torch.testing.assert_close(own.sum(-1) + cross.sum(-1), torch.ones(3, 4, T))
    assert cross[1, ..., 2:].max() == 0
    assert (own.triu(1) == 0).all()


def test_the_decoder_needs_encoder_states():
    with pytest.raises(ValueError, match="needs encoder_hidden_states"):
        decoder_with("sdpa")(target_ids())


@pytest.mark.parametrize("implementation", BACKENDS)
def test_a_closed_gate_lets_no_value_of_the_source_in(implementation):
    decoder = decoder_with(implementation, source_gate=True)
    two = source_states(), 5 * source_states().flip(1)
    for layer in decoder.layers:
        layer.self_attn.k_proj.weight.data.zero_()  # the source takes the same softmax mass
    closed = [run(decoder, states) for states in two]
    torch.testing.assert_close(*closed, atol=1e-6, rtol=0)
    for layer in decoder.layers:
        layer.self_attn.source_gate.data.fill_(0.5)
        layer.self_attn.source_scale.fill_(2.0)
    opened = [run(decoder, states) for states in two]
    assert (opened[0] - opened[1]).abs().max() > 1e-2
    # half of twice the values are the values themselves: the gate is off
    plain = decoder_with(implementation)
    plain.load_state_dict(decoder.state_dict(), strict=False)
    for states, expected in zip(two, opened, strict=True):
        torch.testing.assert_close(run(plain, states), expected, atol=1e-5, rtol=0)
