# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""Cross-entropy over a large vocabulary without materializing all logits.

Softmax and log-sum-exp run in fp32, whatever the dtype of the matmul. Gradients are computed in the
forward pass, chunk by chunk, as in Liger's and Apple's fused losses.

Shapes: N tokens, C tokens of a chunk, E hidden size, V vocabulary.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from .attention_qwen3_encdec import compute_dtype

IGNORED = -100


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy of `hidden @ weight.T`.

    A second backward pass through the same loss (`retain_graph`) raises RuntimeError: the weight
    gradient is scaled in place.

    Args:
        hidden: [..., E].
        weight: [V, E].
        labels: [...] int64, -100 is ignored.
        num_items: Divisor of the sum; None uses the number of labels that are not ignored.
        z_loss: Weight of each token's squared log-sum-exp (PaLM, arXiv 2204.02311, section 5).
        chunk: Tokens per chunk of logits; by default 2,048 on CUDA and 512 elsewhere.

    Returns:
        Loss (fp32 scalar, differentiable), and the detached fp32 negative log-likelihood of every
        token in the shape of `labels`, without z-loss, 0 where ignored.
    """
    if not torch.is_grad_enabled():  # a Function is told of `requires_grad` alone
        hidden, weight = hidden.detach(), weight.detach()
    states, flat = hidden.flatten(0, -2), labels.flatten()
    if num_items is None:
        num_items = (flat != IGNORED).sum().clamp(min=1)
    scale = 1 / torch.as_tensor(num_items, dtype=torch.float32, device=hidden.device)
    # Each chunk reads and writes the whole weight gradient, so a GPU needs larger chunks.
    chunk = chunk or (2048 if hidden.is_cuda else 512)
    options = (scale, chunk, z_loss)
    # Elsewhere, finding the ignored labels would synchronize with the device or break the graph.
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        loss, losses = _ChunkedCrossEntropy.apply(states, weight, flat, *options)
        return loss, losses.view(labels.shape)
    kept = (flat != IGNORED).nonzero().squeeze(1)
    loss, losses = _ChunkedCrossEntropy.apply(states[kept], weight, flat[kept], *options)
    token_losses = losses.new_zeros(flat.shape).index_copy(0, kept, losses)
    return loss, token_losses.view(labels.shape)


def dense_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same from existing [..., V] logits."""
    flat = logits.float().flatten(0, -2)
    losses = cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=IGNORED)
    objective = losses
    if z_loss:
        squares = flat.logsumexp(-1).square()
        objective = losses + z_loss * squares.masked_fill(labels.flatten() == IGNORED, 0.0)
    return objective.sum() / num_items, losses.detach().view(labels.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, chunk, z_loss):
        kind, classes = hidden.device.type, len(weight)
        dtype = compute_dtype(hidden)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        form_gradient = _gradient_function(kind)
        with torch.autocast(kind, enabled=False):
            matrix = _table(weight, dtype)
            losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            hidden_grad = torch.empty_like(hidden) if wants_hidden else None
            weight_grad = torch.zeros_like(matrix, dtype=torch.float32) if wants_weight else None
            # On a CPU, accumulating products that fit the cache takes a third of the time.
            rows = len(matrix) if hidden.is_cuda else 4096
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                states = hidden[part].to(dtype)
                logits = states @ matrix.T  # (C, V)
                losses[part], objective = form_gradient(
                    logits[:, :classes], labels[part], scale, z_loss
                )
                total += objective
                if hidden_grad is not None:
                    hidden_grad[part] = logits @ matrix
                if weight_grad is not None:
                    if dtype == torch.float32:
                        torch.addmm(weight_grad, logits.T, states, out=weight_grad)
                    else:
                        for begin in range(0, len(matrix), rows):
                            some = slice(begin, begin + rows)
                            weight_grad[some] += logits[:, some].T @ states
        if weight_grad is not None:
            # Not a view: autograd accumulates in place only if nothing else holds the storage.
            weight_grad = weight_grad[:classes].detach()
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return total * scale, losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * grad_loss.to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(grad_loss).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None


def _form_gradient(logits, labels, scale, z_loss: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite [C, V] logits with the gradient of the chunk's objective, times `scale`.

    The gradient is softmax (1 + 2 z log_sum) - one_hot.

    Returns:
        Token losses, [C] fp32 and 0 where ignored, and the sum of the objective.
    """
    kept = labels != IGNORED
    target = labels.masked_fill(~kept, 0)[:, None]
    logit = logits.gather(1, target).float()
    in_place = logits.dtype == torch.float32 and not torch.compiler.is_compiling()
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float32, out=logits if in_place else None)
    of_target = log_probs.gather(1, target)  # (C, 1)
    log_sum = logit - of_target
    losses = (-of_target).squeeze(1).masked_fill(~kept, 0.0)
    objective = losses + z_loss * log_sum.square().squeeze(1)
    objective = objective.masked_fill(~kept, 0.0).sum()

    weight = scale * kept[:, None]  # (C, 1)
    factor = weight * (1 + 2 * z_loss * log_sum)
    gradient = log_probs.exp_().mul_(factor)
    if not in_place:
        logits.copy_(gradient)
    gradient_of_target = of_target.exp() * factor - weight
    logits.scatter_(1, target, gradient_of_target.to(logits.dtype))
    return losses, objective


@cache
def _gradient_function(device_type: str) -> Any:
    compiles = device_type == "cuda" and find_spec("triton") is not None
    return torch.compile(_form_gradient, dynamic=True) if compiles else _form_gradient


def _table(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast the matrix; on CUDA, pad its rows to a multiple of 64 for the tensor cores."""
    if not weight.is_cuda:
        return weight.to(dtype)
    table = weight.new_zeros(len(weight) + -len(weight) % 64, weight.shape[1], dtype=dtype)
    table[: len(weight)] = weight
    return table


__all__ = ["IGNORED", "chunked_cross_entropy", "dense_cross_entropy"]
