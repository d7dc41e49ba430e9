# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""Attention for encoder and decoder: projections, packed batches, and the call into a kernel.

Shapes: B batch, T query length, L key length, N query and M key tokens of a packed batch of D
documents, H query heads, K key/value heads, d head dimension, E hidden size.
"""

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, eager_attention_forward

# torch 2.11 supports GQA without this argument.
_NEEDS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
_GQA: Any = {"enable_gqa": True} if _NEEDS_GQA else {}


@dataclass
class Varlen:
    """Document bounds of a packed batch, in the form that varlen attention kernels take.

    A query sees the keys of its own document: all of them, or with `causal` only those up to its
    own position, aligned bottom-right: the last query sees every key.

    Attributes:
        queries, keys: [D + 1] int32, cumulative lengths.
        longest_query, longest_key: Upper bounds on the lengths of a document.
        causal: Bottom-right causal within each document.
        order, inverse: [M] int64, permutation of the keys from [all sources ; all targets] to
            document order, each document's source before its target, and its inverse.
        mask: Dense or block mask for the backends that have no varlen kernel.
        biases: On CPUs, bottom-right masks by (queries, keys), made once for all layers.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool = False
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    mask: Any = None
    biases: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys per document. Used on CPUs only: on a GPU it would synchronize."""
        return self.queries.diff().tolist(), self.keys.diff().tolist()

    def bias(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """Return the bottom-right mask of one document, or None if it needs no mask."""
        shape = query.shape[2], key.shape[2]
        if not self.causal or shape[0] == 1:
            return None
        if shape not in self.biases:
            self.biases[shape] = _bottom_right(*shape, query)
        return self.biases[shape]

    def prepare(self, backend: str, states: torch.Tensor, key_length: int) -> None:
        """Build the mask, once per forward, if `backend` needs one for [1, N, E] `states`."""
        if states.device.type == "cpu":
            needless = not torch.compiler.is_compiling()  # document by document
        else:
            needless = states.is_cuda and compute_dtype(states) in (torch.float16, torch.bfloat16)
        if "flash" in backend or (backend == "sdpa" and needless):
            return
        # The first key that each query sees, and the end of its keys, both [N].
        places = torch.arange(states.shape[1], device=states.device)
        document = torch.searchsorted(self.queries, places, right=True) - 1
        first, last = self.keys[document].long(), self.keys[document + 1].long()
        if self.causal:
            last = last - (self.queries[document + 1] - 1 - places)
        if backend == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            self.mask = create_block_mask(
                lambda batch, head, query, key: (key >= first[query]) & (key < last[query]),
                B=None,
                H=None,
                Q_LEN=states.shape[1],
                KV_LEN=key_length,
                device=states.device,
            )
            return
        keys = torch.arange(key_length, device=states.device)
        self.mask = ((keys >= first[:, None]) & (keys < last[:, None]))[None, None]  # (1, 1, N, M)

    def reorder(self, keys: torch.Tensor) -> torch.Tensor:
        """Permute [1, K, M, d] by `order`; the gradient is a gather by `inverse`."""
        return _Reorder.apply(keys, self.order, self.inverse)


def project_query(attention: Qwen3Attention, states: torch.Tensor) -> torch.Tensor:
    """Project [B, T, E] to normalized queries [B, H, T, d], before RoPE."""
    query = attention.q_proj(states).unflatten(-1, (-1, attention.head_dim))
    return attention.q_norm(query).transpose(1, 2)


def project_key_value(
    attention: Qwen3Attention, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project [B, L, E] to normalized keys, before RoPE, and values, each [B, K, L, d]."""
    key = attention.k_proj(states).unflatten(-1, (-1, attention.head_dim))
    value = attention.v_proj(states).unflatten(-1, (-1, attention.head_dim))
    return attention.k_norm(key).transpose(1, 2), value.transpose(1, 2)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, order, inverse):
        ctx.save_for_backward(inverse)
        return tensor.index_select(2, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(2, inverse), None, None


def attend(
    module: Qwen3Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any = None,
    packed: Varlen | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with the configured backend. Every attention kernel is called from here.

    | `_attn_implementation` | padded form                    | packed form                        |
    |------------------------|--------------------------------|------------------------------------|
    | eager                  | additive mask, returns weights | dense mask                         |
    | sdpa                   | bool mask, or none             | CUDA in half precision: torch's    |
    |                        |                                | varlen kernel; CPU: by document;   |
    |                        |                                | CUDA in fp32, compiled on a CPU:   |
    |                        |                                | dense mask                         |
    | flash_attention_*      | unpadded by transformers       | cumulative lengths                 |
    | flex_attention         | block mask                     | block mask                         |
    | registered elsewhere   | as transformers masks it       | dense mask                         |

    Args:
        module: Has `config`, `scaling`, `attention_dropout`, `num_key_value_groups`, `training`.
        query: [B, H, T, d].
        key, value: [B, K, L, d] with L >= T.
        mask: What transformers' mask builders make for the backend; None with `causal` means
            bottom-right causal: query i sees keys 0 ... L - T + i.
        packed: Document bounds of a packed batch (B is 1); `mask` and `causal` are then ignored.

    Returns:
        [B, T, H, d], and the weights [B, H, T, L] where the backend returns them.
    """
    backend = module.config._attn_implementation
    # Under autocast, norms and rotation leave query and key in fp32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    dropout = module.attention_dropout if module.training else 0.0
    options: dict[str, Any] = {"scaling": module.scaling, "dropout": dropout, "is_causal": causal}
    if packed is not None:
        mask, options["is_causal"] = packed.mask, packed.causal
    if backend == "sdpa":
        if packed is not None and mask is None:
            packed_sdpa = _varlen if query.is_cuda else _by_document
            return packed_sdpa(query, key, value, packed, module.scaling, dropout), None
        return _sdpa(query, key, value, mask, causal, module.scaling, dropout), None
    if packed is not None and "flash" in backend:
        options |= {
            "cu_seq_lens_q": packed.queries,
            "cu_seq_lens_k": packed.keys,
            "max_length_q": packed.longest_query,
            "max_length_k": packed.longest_key,
        }
    if backend == "eager" and mask is not None and mask.dtype == torch.bool:
        mask = _additive(mask, query.dtype)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
    output, weights = attention(module, query, key, value, mask, **options)
    if packed is not None or backend == "flex_attention":  # on GPUs, Flex returns a log-sum-exp
        return output, None
    return output, weights


def _sdpa(query, key, value, mask, causal: bool, scaling: float, dropout: float) -> torch.Tensor:
    """Map [B, H, T, d] queries to [B, T, H, d] with SDPA."""
    group = query.shape[1] // key.shape[1]
    if query.shape[2] == 1:
        # GQA with a single query: fold the group into the query dimension so each KV head is read
        # once.
        grouped = query.view(*key.shape[:2], group, query.shape[-1])
        output = F.scaled_dot_product_attention(grouped, key, value, mask, dropout, scale=scaling)
        return output.reshape(query.shape).transpose(1, 2)
    if mask is None and causal:
        mask = _bottom_right(query.shape[2], key.shape[2], query)
    # On CUDA only the flash kernel takes groups, and it takes neither a mask tensor nor fp32. The
    # fallback for groups materializes the scores.
    flash = query.dtype != torch.float32 and (mask is None or isinstance(mask, CausalBias))
    if query.is_cuda and not flash:
        key, value = repeat_kv(key, group), repeat_kv(value, group)
    output = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return output.transpose(1, 2)


def _varlen(query, key, value, packed: Varlen, scaling: float, dropout: float) -> torch.Tensor:
    """Map packed [1, H, N, d] queries to [1, N, H, d] with torch's varlen kernel."""
    if dropout:
        raise ValueError("attention_dropout must be 0: torch's varlen attention has no dropout")
    output: Any = varlen_attn(
        query[0].transpose(0, 1),  # (N, H, d)
        key[0].transpose(0, 1),  # (M, K, d)
        value[0].transpose(0, 1),
        packed.queries,
        packed.keys,
        packed.longest_query,
        packed.longest_key,
        scale=scaling,
        window_size=(-1, 0) if packed.causal else (-1, -1),
        **_GQA,
    )
    return output[None]


def _by_document(query, key, value, packed: Varlen, scaling: float, dropout: float) -> torch.Tensor:
    """Call SDPA once per document, for CPUs."""
    queries, keys = packed.lengths
    parts = zip(
        query.split(queries, dim=2),
        key.split(keys, dim=2),
        value.split(keys, dim=2),
        strict=True,
    )
    outputs = [
        _sdpa(q, k, v, packed.bias(q, k), False, scaling, dropout)
        for q, k, v in parts
        if q.shape[2]
    ]
    return torch.cat(outputs, dim=1) if outputs else query.transpose(1, 2)


def _bottom_right(queries: int, keys: int, like: torch.Tensor) -> Any:
    """Make SDPA's bottom-right causal mask: a flag to the kernel on CUDA, else a matrix."""
    if like.is_cuda and not torch.compiler.is_compiling():  # torch cannot trace the flag
        return causal_lower_right(queries, keys)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
    return _additive(seen, like.dtype)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return hidden.masked_fill(~seen, torch.finfo(dtype).min)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of matmuls with `tensor`: its own, or autocast's."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


__all__ = ["Varlen", "attend", "compute_dtype", "project_key_value", "project_query"]
