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


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_chunked_loss_is_the_dense_loss(chunk, dtype):
    hidden, weight, labels = example(dtype)
    loss, token_losses = chunked_cross_entropy(hidden, weight, labels, chunk=chunk)
    (loss * 3).backward(retain_graph=True)
    # never gradients of another scale
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = (h @ w.T).float().flatten(0, 1)
    dense = cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=-100)
    (dense.sum() / (labels != -100).sum() * 3).backward()
    size = 1e-5 if dtype == torch.float32 else 2e-2
    tolerance = {"atol": size, "rtol": size}
    torch.testing.assert_close(loss, dense.sum() / 12, **tolerance)
    torch.testing.assert_close(token_losses.flatten(), dense, **tolerance)
    torch.testing.assert_close(hidden.grad, h.grad, **tolerance)
    torch.testing.assert_close(weight.grad, w.grad, **tolerance)
    # the control: dividing by all tokens instead of those with a label
    assert abs(loss - dense.sum() / 15) > 0.1


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_parity_of_z_loss(z_loss):
    hidden, weight, labels = example()
    flat = labels.flatten()
    logits = (hidden @ weight.T).flatten(0, 1)
    summed = cross_entropy(logits, flat, reduction="sum", ignore_index=-100)
    squares = logits.logsumexp(-1)[flat != -100].square().sum()
    expected = (summed + z_loss * squares) / 20
    options = {"z_loss": z_loss}
    found, token_losses = chunked_cross_entropy(hidden, weight, labels, 20, chunk=4, **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    dense, dense_losses = dense_cross_entropy(hidden @ weight.T, labels, 20, **options)
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense_losses, token_losses, atol=1e-5, rtol=1e-5)
    theirs = torch.autograd.grad(expected, (hidden, weight), retain_graph=True)
    for loss in (found, dense):
        ours = torch.autograd.grad(loss, (hidden, weight), retain_graph=loss is dense)
        for mine, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)
    # the meters stay comparable
    plain = cross_entropy(logits, flat, reduction="none", ignore_index=-100)
    torch.testing.assert_close(token_losses.flatten(), plain.detach(), atol=1e-5, rtol=1e-5)
    if z_loss:  # the control: without it it is another loss
        assert abs(chunked_cross_entropy(hidden, weight, labels, 20)[0] - expected) > 1e-3


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
