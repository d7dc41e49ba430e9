"""The chunked loss against torch's own, values and gradients."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from qwen3_encdec.loss_qwen3_encdec import (
    _form_gradient,
    chunked_cross_entropy,
    dense_cross_entropy,
)


def example(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 16).to(dtype).requires_grad_()
    weight = torch.randn(41, 16).to(dtype).requires_grad_()
    labels = torch.randint(0, 41, (3, 5))
    labels[1, 2:] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_torchs_cross_entropy(z_loss, chunk, dtype):
    """Chunked and dense: loss, losses of tokens, which are without the z-loss, and gradients."""
    hidden, weight, labels = example(dtype)
    kept = labels != -100
    logits = hidden.float() @ weight.float().T
    expected_losses = cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    ).view(labels.shape)
    squares = logits.logsumexp(-1)[kept].square().sum()
    size = 1e-5 if dtype == torch.float32 else 2e-2
    close = {"atol": size, "rtol": size, "check_dtype": False}
    found = {
        20: chunked_cross_entropy(hidden, weight, labels, 20, z_loss, chunk),
        12: chunked_cross_entropy(hidden, weight, labels, z_loss=z_loss, chunk=chunk),
        15: dense_cross_entropy(hidden @ weight.T, labels, 15, z_loss),
    }
    for divisor, (loss, token_losses) in found.items():
        expected = (expected_losses.sum() + z_loss * squares) / divisor
        torch.testing.assert_close(loss, expected, **close)
        torch.testing.assert_close(token_losses, expected_losses, **close)
        theirs = torch.autograd.grad(3 * expected, (hidden, weight), retain_graph=True)
        ours = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(ours, theirs, **close)
    # the control: another divisor
    assert abs(found[12][0] - found[20][0]) > 0.1
    # never gradients of another scale
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(found[12][0], (hidden, weight))


def test_evaluation_multiplies_for_the_logits_alone():
    hidden, weight, labels = example()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        chunked_cross_entropy(hidden, weight, labels)
    assert counter.get_total_flops() == 2 * 12 * 16 * 41


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_the_gradient_compiled_for_a_gpu_is_that_of_a_cpu(z_loss):
    torch.manual_seed(0)
    logits, labels = torch.randn(37, 1088), torch.randint(0, 1003, (37,))
    logits[:, 1003:] = 0.0  # classes that fill up the matrix
    labels[::5] = -100
    compiled = torch.compile(_form_gradient, dynamic=True, backend="aot_eager")
    scale = torch.tensor(1 / 29)

    def formed(function, labels):
        gradient = logits.clone()
        return *function(gradient[:, :1003], labels, scale, z_loss), gradient

    expected, found = formed(_form_gradient, labels), formed(compiled, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert found[0][::5].eq(0).all()
    assert found[2][::5].eq(0).all()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(formed(compiled, labels.roll(1)), expected, rtol=1e-5, atol=1e-7)
