"""The one call into a kernel, against brute force, and the packed form's bounds as drawn."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import repeat_kv

from qwen3_encdec import attention_qwen3_encdec
from qwen3_encdec.attention_qwen3_encdec import Varlen, _bottom_right, _sdpa, attend
from qwen3_encdec.modeling_qwen3_encoder import Qwen3Encoder
from tests.conftest import BACKENDS, tiny_config, use_backend

QUERIES, KEYS = [3, 0, 1, 4], [5, 2, 2, 4]


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def layout(causal: bool) -> Varlen:
    return Varlen(cumulative(QUERIES), cumulative(KEYS), max(QUERIES), max(KEYS), causal)


def test_bounds_are_as_drawn():
    drawn = ["1110000000000", "1111000000000", "1111100000000"]  # 3 queries on 5 keys
    drawn += ["0000000110000"]  # 1 on 2, behind a document without queries
    drawn += ["0000000001000", "0000000001100", "0000000001110", "0000000001111"]  # 4 on 4
    packed = layout(causal=True)
    packed.prepare("eager", torch.zeros(1, 8, 40), 13)
    rows = packed.mask[0, 0].int().tolist()
    assert ["".join(map(str, row)) for row in rows] == drawn
    whole = layout(causal=False)
    whole.prepare("eager", torch.zeros(1, 8, 40), 13)
    assert whole.mask[0, 0].sum(1).tolist() == [5, 5, 5, 2, 4, 4, 4, 4]


def test_the_bottom_right_mask_is_as_drawn():
    seen = _bottom_right(4, 7, torch.zeros(1)) == 0
    drawn = ["1111000", "1111100", "1111110", "1111111"]
    assert ["".join(str(int(cell)) for cell in row) for row in seen] == drawn
    # what the GPU is told instead
    assert torch.equal(torch.nn.attention.bias.causal_lower_right(4, 7)._materialize(), seen)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_parity_packed_attention_is_brute_force(causal, implementation):
    torch.manual_seed(0)
    encoder = use_backend(Qwen3Encoder(tiny_config()).eval(), implementation)
    attention = encoder.layers[0].self_attn
    q, k, v = torch.randn(1, 4, 8, 14), torch.randn(1, 2, 13, 14), torch.randn(1, 2, 13, 14)
    packed = layout(causal)
    packed.prepare(implementation, torch.zeros(1, 8, 40), 13)
    output, _ = attend(attention, q, k, v, packed=packed)
    uncut, _ = attend(attention, q[:, :, :3], k[:, :, :5], v[:, :, :5].roll(1, 2))
    q_start = k_start = 0
    for n_q, n_k in zip(QUERIES, KEYS, strict=True):
        for head in range(4):
            for i in range(n_q):
                seen = n_k - n_q + i + 1 if causal else n_k
                key = k[0, head // 2, k_start : k_start + seen]
                weights = (key @ q[0, head, q_start + i] * attention.scaling).softmax(-1)
                expected = weights @ v[0, head // 2, k_start : k_start + seen]
                found = output[0, q_start + i, head]
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        q_start, k_start = q_start + n_q, k_start + n_k
    # the control: the values of the first document, one place off
    assert (uncut[0, 2] - output[0, 2]).abs().max() > 1e-2


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_a_gpu_repeats_heads_for_kernels_that_take_no_groups(dtype, masked, monkeypatch):
    """CUDA's mask-taking kernels are refused for grouped heads, and scores materialized."""
    repeated = []

    def repeat(states, group):
        repeated.append(group)
        return repeat_kv(states, group)

    monkeypatch.setattr(attention_qwen3_encdec, "repeat_kv", repeat)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    q, k, v = (part.to(dtype) for part in (q, k, v))
    mask = torch.rand(2, 1, 3, 7) > 0.2 if masked else None
    expected = _sdpa(q, k, v, mask, True, 0.3, 0.0)
    found = _sdpa(*(part.as_subclass(OnGPU) for part in (q, k, v)), mask, True, 0.3, 0.0)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    assert repeated == ([] if dtype == torch.bfloat16 and not masked else [2, 2])


def test_the_mask_of_a_gpu_is_a_tensor_in_a_graph():
    """Dynamo cannot trace the construction of torch's CausalBias."""
    like = SimpleNamespace(is_cuda=True, device="cpu", dtype=torch.float32)
    assert isinstance(_bottom_right(4, 7, like), torch.nn.attention.bias.CausalBias)
    traced = torch.compile(lambda: _bottom_right(4, 7, like), fullgraph=True, backend="eager")()
    torch.testing.assert_close(traced, _bottom_right(4, 7, torch.zeros(1)))


def test_the_log_sums_that_flex_returns_on_a_gpu_are_no_weights(monkeypatch):
    attention = use_backend(Qwen3Encoder(tiny_config()), "flex_attention").layers[0].self_attn

    def flex(module, query, key, value, mask, **options):
        return query.transpose(1, 2), torch.zeros(query.shape[:3])

    monkeypatch.setitem(attention_qwen3_encdec.ALL_ATTENTION_FUNCTIONS, "flex_attention", flex)
    assert attend(attention, *torch.zeros(3, 1, 2, 5, 14))[1] is None
