# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""The encoder: Qwen3 with its causal mask removed and nothing else changed.

Departures from transformers' Qwen3:

- attention is bidirectional: a token sees every token of its document;
- there is no key/value cache;
- a batch may be ragged: its real tokens laid out as one row, so that padding costs nothing and
  several documents can share a row without seeing each other (`Segments`).

Shapes: B batch, S source length, N real tokens of a ragged batch, H query heads, K key/value heads,
D head dimension, E hidden size.
"""

import inspect
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig

# transformers 5.24 renamed `past_key_values` to `cache`, in arguments and in outputs; both names
# are understood here.
_OUTPUT_FIELDS = BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__
CACHE_FIELD = "cache" if "cache" in _OUTPUT_FIELDS else "past_key_values"
# torch 2.11 takes fewer key heads than query heads without being told.
_VARLEN_OPTIONS: Any = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
_HAS_MKL = torch.backends.mkl.is_available()
_PASSED_BY_TRANSFORMERS = {
    "cache_position", "logits_to_keep", "output_attentions", "output_hidden_states", "return_dict", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Segments:
    """Where the documents of a [B, L] batch lie, for computing on its real tokens only.

    Built from a segment mask: 0 is padding, k >= 1 the k-th document of that row; an ordinary 0/1
    attention mask is the case of one document a row. Positions restart with every document:

        mask       1 1 1 2 2 0        index      0 1 2 3 4 6 7
                   1 1 0 0 0 0        documents  1 1 1 2 2 4 4
                                      positions  0 1 2 0 1 0 1

    Attributes:
        index: [N] int64, place of each real token in the flattened [B * L] batch.
        documents: [N] int64, ascending; the same number for the same (row, segment) on both sides
            of a batch. Where the mask is: on a CPU, nobody waits for a GPU to read from it.
        position_ids: [1, N] int64.
        shape: (B, L) of the batch.
    """

    index: torch.Tensor
    documents: torch.Tensor
    position_ids: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: torch.Tensor, device: torch.device | None = None) -> "Segments":
        """The segments of a [B, L] integer or bool mask, for tensors on `device` (the mask's own by
        default).

        A document's tokens must be contiguous up to padding.
        """
        mask = mask.long()
        batch, length = mask.shape
        rows, columns = mask.nonzero(as_tuple=True)  # (N,)
        documents = (rows << 32) + mask[rows, columns]
        _, inverse, counts = torch.unique_consecutive(
            documents, return_inverse=True, return_counts=True
        )
        first = counts.cumsum(0) - counts  # place in the row of N where each document begins
        positions = columns - columns[first][inverse]
        device = mask.device if device is None else device
        index, positions = move(rows * length + columns, device), move(positions[None], device)
        return cls(index, documents, positions, (batch, length))

    @cached_property
    def layout(self) -> "RaggedLayout":
        """For attention of every document to all of itself."""
        return RaggedLayout(self.documents, self.documents, causal=False, device=self.index.device)

    def gather(self, batch: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [1, N, ...]: the real tokens as one row."""
        return batch.flatten(0, 1)[self.index][None]

    def scatter(self, row: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] -> [B, L, ...]: the exact inverse, with zeros where there is padding."""
        batch = row.new_zeros(self.shape[0] * self.shape[1], *row.shape[2:])
        return batch.index_copy(0, self.index, row[0]).view(*self.shape, *row.shape[2:])


class RaggedLayout:
    """Which keys each query of a ragged row sees: those of its own document, an interval of the
    keys.

    Args:
        query_documents: [N] int64, the document of each query, ascending.
        key_documents: [M] int64, the same for the keys; every document of the queries is there.
        causal: aligned to the bottom right: the last query of a document sees all of its keys, the
            one before it all but the last, and so on. False lets every query see all keys of its
            document.
        device: where attention is computed; by default where the documents are.
    """

    def __init__(
        self,
        query_documents: torch.Tensor,
        key_documents: torch.Tensor,
        causal: bool,
        device: torch.device | None = None,
    ):
        self.causal = causal
        device = query_documents.device if device is None else device
        documents, lengths = torch.unique_consecutive(query_documents, return_counts=True)
        starts = torch.searchsorted(key_documents, documents)
        ends = torch.searchsorted(key_documents, documents, right=True)
        self._starts, self._ends, self._lengths = (
            move(bounds, device) for bounds in (starts, ends, lengths)
        )
        # A compiled layer reads what is here already, so that nothing in it depends on how the row
        # is divided.
        self.query_lengths: list[int] = lengths.tolist()
        self.key_lengths: list[int] = (ends - starts).tolist()
        self.longest_query, self.longest_key = max(self.query_lengths), max(self.key_lengths)
        queries, keys = (
            F.pad(part.cumsum(0), (1, 0)).to(torch.int32) for part in (lengths, ends - starts)
        )
        # Where documents begin and end, each [documents + 1].
        self.cumulative = move(queries, device), move(keys, device)
        self.mask: Any = None

    def prepare(self, backend: str) -> Any:
        """Make `mask`, once, for a backend that wants one:

        FlexAttention's block mask, or [1, 1, N, M] bool.
        """
        if self.mask is not None or backend == "sdpa" or "flash" in backend:
            return self.mask
        first, last = self.interval()
        if backend == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            self.mask = create_block_mask(
                lambda batch, head, query, key: (key >= first[query]) & (key < last[query]),
                B=None, H=None, Q_LEN=len(first), KV_LEN=sum(self.key_lengths), device=first.device,
            )  # fmt: skip
        else:
            keys = torch.arange(sum(self.key_lengths), device=first.device)
            self.mask = ((keys >= first[:, None]) & (keys < last[:, None]))[None, None]
        return self.mask

    def interval(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First key that each query sees, and the first after them that it does not, each [N]
        int64.
        """
        first, last = (
            bound.repeat_interleave(self._lengths) for bound in (self._starts, self._ends)
        )
        if self.causal:
            query_end = self._lengths.cumsum(0).repeat_interleave(self._lengths)
            last = last - (query_end - 1 - torch.arange(len(query_end), device=last.device))
        return first, last


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`, if it is not there already, that does not wait for what the device is
    doing.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def is_ragged(mask: torch.Tensor | None) -> bool:
    """Whether a [B, L] mask holds padding or several documents a row."""
    return mask is not None and mask.dim() == 2 and not bool((mask == 1).all())


def is_packed(mask: torch.Tensor | None) -> bool:
    """Whether a [B, L] mask holds several documents a row.

    Never asked while compiling: it reads the values.
    """
    if mask is None or mask.dim() != 2 or mask.dtype == torch.bool or torch.compiler.is_compiling():
        return False
    return bool((mask > 1).any())


def refuse_unknown(arguments: dict) -> None:
    """Raise TypeError for arguments that nothing reads:

    a renamed one must not be dropped in silence.
    """
    if unknown := sorted(arguments.keys() - _PASSED_BY_TRANSFORMERS):
        raise TypeError(f"unexpected argument {unknown[0]!r}")


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, under either of its names."""
    if past_key_values is None:
        return cache
    if CACHE_FIELD == "cache":
        warnings.warn(
            "`past_key_values` is deprecated, use `cache` instead", FutureWarning, stacklevel=3
        )
    return past_key_values if cache is None else cache


def attend(
    module: Qwen3Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any = None,
    layout: RaggedLayout | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the configured backend: the one place where encoder and decoder meet a kernel.

    | `_attn_implementation` | a padded batch                   | a ragged row (`layout`)                            |
    |------------------------|----------------------------------|----------------------------------------------------|
    | eager                  | additive mask, returns weights   | `RaggedLayout.mask`                                |
    | sdpa                   | bool mask or none                | CUDA half precision: torch's varlen kernel; else   |
    |                        |                                  | document by document                               |
    | flash_attention_*      | unpadded by transformers         | varlen with cumulative lengths                     |
    | flex_attention         | block mask                       | `RaggedLayout.mask`, a block mask                  |
    | registered elsewhere   | as transformers masks it         | `RaggedLayout.mask`                                |

    A backend that is not installed is refused by transformers when the model is made or told to use
    it.

    Args:
        module: knows `config`, `scaling`, `attention_dropout`, `num_key_value_groups`, `training`.
        query: [B, H, T, D].
        key, value: [B, K, L, D] with L >= T.
        mask: what transformers' mask builders make for the backend; None with `causal` is aligned
            to the bottom right, query i seeing keys 0 ... L - T + i.
        layout: B is 1 and the row is ragged; `mask` and `causal` are not read.

    Returns:
        [B, T, H, D], and the weights [B, H, T, L] where the backend returns them.
    """
    backend = module.config._attn_implementation
    query, key = (
        query.to(value.dtype),
        key.to(value.dtype),
    )  # under autocast, the norms and rotation left them in fp32
    dropout = module.attention_dropout if module.training else 0.0
    options: dict[str, Any] = {"scaling": module.scaling, "dropout": dropout, "is_causal": causal}
    if backend == "sdpa":
        if layout is not None:
            return _ragged_sdpa(query, key, value, layout, module.scaling, dropout), None
        if mask is None and causal and query.shape[2] > 1:
            mask = bottom_right_causal_bias(query.shape[2], key.shape[2], query)
        if query.shape[2] == 1:
            # Heads that share a key as queries of one head: each key is then read once, and by a
            # matrix kernel.
            grouped = query.view(*key.shape[:2], -1, query.shape[-1])
            if (
                mask is None
                and not dropout
                and query.device.type == "cpu"
                and query.dtype == torch.float32
            ):
                # Products read a long past faster than the fused kernel. Half precision would round
                # before the softmax.
                output = (key @ (grouped * module.scaling).mT).mT.softmax(-1) @ value
            else:
                output = F.scaled_dot_product_attention(
                    grouped, key, value, mask, dropout, scale=module.scaling
                )
            return output.reshape(query.shape).transpose(1, 2), None
        output = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, scale=module.scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None
    if "flash" in backend and layout is not None:
        queries, keys = layout.cumulative
        options |= {
            "is_causal": layout.causal,
            "cu_seq_lens_q": queries, "max_length_q": layout.longest_query,
            "cu_seq_lens_k": keys, "max_length_k": layout.longest_key,
        }  # fmt: skip
    elif layout is not None:
        mask = layout.prepare(backend)
    if backend == "eager" and mask is not None and mask.dtype == torch.bool:
        mask = _additive(mask, query.dtype)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
    return attention(module, query, key, value, mask, **options)


def bottom_right_causal_bias(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """What makes scaled_dot_product_attention causal with query i seeing keys 0 ... keys - queries
    + i.

    On CUDA no tensor is made, the flash kernel is told; on a CPU an additive matrix is the fastest
    form.
    """
    if like.is_cuda:
        return causal_lower_right(queries, keys)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
    return _additive(seen, like.dtype)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~seen, float("-inf")
    )


def _ragged_sdpa(
    query, key, value, layout: RaggedLayout, scaling: float, dropout: float
) -> torch.Tensor:
    """[1, H, N, D] -> [1, N, H, D]."""
    if _has_varlen(query, dropout):
        queries, keys = layout.cumulative
        output = varlen_attn(
            query[0].transpose(0, 1),  # (N, H, D)
            key[0].transpose(0, 1),  # (M, K, D)
            value[0].transpose(0, 1),
            queries,
            keys,
            layout.longest_query,
            layout.longest_key,
            scale=scaling,
            window_size=(-1, 0) if layout.causal else (-1, -1),
            **_VARLEN_OPTIONS,
        )
        assert isinstance(output, torch.Tensor)
        return output[None]
    return _by_document(query, key, value, layout, scaling, dropout)


def _has_varlen(query: torch.Tensor, dropout: float) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout


@torch.compiler.disable  # a graph of its own for every division of the row
def _by_document(
    query, key, value, layout: RaggedLayout, scaling: float, dropout: float
) -> torch.Tensor:
    biases: dict[tuple[int, int], torch.Tensor | None] = {}
    outputs = []
    for q, k, v in zip(
        query.split(layout.query_lengths, dim=2),
        key.split(layout.key_lengths, dim=2),
        value.split(layout.key_lengths, dim=2),
        strict=True,
    ):
        shape = (q.shape[2], k.shape[2])
        if shape not in biases:
            biases[shape] = (
                bottom_right_causal_bias(*shape, query) if layout.causal and shape[0] > 1 else None
            )
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, biases[shape], dropout, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


class Qwen3EncoderAttention(Qwen3Attention):
    """Qwen3's attention without its causal mask."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        segments: Segments | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, E] -> [B, S, E] and weights [B, H, S, S] or None;

        with `segments`, [1, N, E] -> [1, N, E].
        """
        query, key, value = project_heads(self, hidden_states)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        layout = None if segments is None else segments.layout
        output, weights = attend(self, query, key, value, attention_mask, layout)
        return self.o_proj(output.flatten(2)), weights


def are_few_rows(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether [..., E] states and `weight` are a decoding step's on an x86 CPU: 1 to 8 rows, no
    gradient, no autocast.

    Their product costs what reading the weight costs, and the ordinary form of it reads on one core
    or twice.
    """
    return (
        not (
            torch.compiler.is_compiling() or torch.jit.is_tracing()
        )  # what is recorded must do for many rows
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        and 0 < states.numel() <= 8 * states.shape[-1]
        and states.device.type == "cpu"
        and _HAS_MKL
        and type(weight) is nn.Parameter  # not quantized, not sharded
    )


def multiply_few_rows(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[..., E] states and the [O, E] weight -> [..., O]: the ordinary product in the form that is
    fastest on a CPU.

    In fp32 that depends on the number of rows; otherwise, with AMX, it is weight times rows. Not
    always contiguous.
    """
    rows, size = states.flatten(0, -2), 64  # (R, E)
    if weight.dtype != torch.float32 or 1 < len(rows) <= 4 or len(weight) < size:
        output = (weight @ rows.t()).t()
    else:
        blocks = len(weight) // size
        head, rest = weight[: blocks * size], weight[blocks * size :]
        output = torch.bmm(
            rows.expand(blocks, -1, -1), head.view(blocks, size, -1).transpose(1, 2)
        )  # (O / 64, R, 64)
        output = output.transpose(0, 1).reshape(len(rows), -1)
        if len(rest):
            output = torch.cat([output, F.linear(rows, rest)], dim=1)
    return output.reshape(*states.shape[:-1], -1)


def project(linear: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`linear(states)`, [..., E] -> [..., O], by `multiply_few_rows` where that is the same and
    faster.

    It is the same for an `nn.Linear` in fp32 without bias that nobody has wrapped, quantized or
    hooked.
    """
    if (
        states.dtype != torch.float32
        or type(linear) is not nn.Linear
        or linear.bias is not None
        or linear.weight.dtype != torch.float32
        or not are_few_rows(states, linear.weight)
        or linear._forward_hooks
        or linear._forward_pre_hooks
        or "forward" in vars(linear)  # as accelerate replaces it
    ):
        return linear(states)
    # Contiguous, since attention is slower with a query that is not than it is with the ordinary
    # product.
    return multiply_few_rows(states, linear.weight).contiguous()


def project_heads(
    attention: Qwen3Attention, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, L, E] -> normalized query [B, H, L, D] and key [B, K, L, D], and value [B, K, L, D];

    none is rotated.
    """
    heads = (*states.shape[:-1], -1, attention.head_dim)
    query = attention.q_norm(project(attention.q_proj, states).view(heads)).transpose(1, 2)
    return query, *project_keys(attention, states)


def project_keys(
    attention: Qwen3Attention, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L, E] -> normalized key and value, each [B, K, L, D]."""
    heads = (*states.shape[:-1], -1, attention.head_dim)
    key = attention.k_norm(project(attention.k_proj, states).view(heads)).transpose(1, 2)
    return key, project(attention.v_proj, states).view(heads).transpose(1, 2)


class Qwen3EncoderLayer(Qwen3DecoderLayer):
    """Qwen3's layer around the bidirectional attention."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = Qwen3EncoderAttention(config, layer_idx)


class Qwen3EncoderDecoderPreTrainedModel(PreTrainedModel):
    """What encoder, decoder and the whole model share for transformers' loading and saving."""

    config_class = Qwen3EncoderDecoderConfig
    config: Qwen3EncoderDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen3EncoderLayer", "Qwen3MergedDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def init_parallel_plans(self) -> None:
        """The configuration's plan is for the whole model:

        keep what is said of the stacks that this one has.
        """
        super().init_parallel_plans()
        stacks = {
            name for name, module in self.named_modules() if isinstance(module, PreTrainedModel)
        }
        self._tp_plan: dict[str, str] = {
            name: style
            for name, style in self._tp_plan.items()
            if name.partition(".layers.")[0] in stacks
        }

    def _wants_more(self, arguments: dict) -> bool:
        """Whether a call asks for more than the last states, such as those of every layer or
        attention weights.
        """
        return bool(arguments or self.config.output_hidden_states or self.config.output_attentions)

    def mark_tied_weights_as_initialized(self, loading_info: Any = None) -> None:
        """The tied names are one parameter here: none is missing once it is loaded, all are to be
        initialized if not.

        transformers would mark the copies of an untied model, and so the matrix itself, missing or
        not.
        """
        if loading_info is not None:
            loading_info.missing_keys = {
                name
                for name in loading_info.missing_keys
                if not getattr(self.get_parameter_or_buffer(name), "_is_hf_initialized", False)
            }


class Qwen3Encoder(Qwen3EncoderDecoderPreTrainedModel):
    """Token ids -> bidirectional states after the final norm.

    Args:
        embed_tokens: The embedding to share; None makes one of its own (an encoder alone).
    """

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": Qwen3EncoderLayer,
        "attentions": OutputRecorder(Qwen3EncoderAttention, index=1),
    }

    def __init__(self, config: Qwen3EncoderDecoderConfig, embed_tokens: nn.Embedding | None = None):
        super().__init__(config)
        self.embed_tokens = embed_tokens or nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id
        )
        self.layers = nn.ModuleList(
            Qwen3EncoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        segments: Segments | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutput:
        """Encode a padded batch, or, with `segments`, the ragged row that `Segments.gather` makes
        of one.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S], 1 real and 0 padding; or a [B, 1, S, S] mask that is used as it
                is.
            position_ids: [B, S]; counted from 0 along the row by default (rotary embeddings are
                relative, so left padding needs no other).
            inputs_embeds: [B, S, E] in place of `input_ids`.

        Returns:
            `last_hidden_state` [B, S, E]; with `segments`, [1, N, E].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        refuse_unknown(kwargs)
        if segments is None and is_packed(attention_mask):
            raise ValueError(
                "attention_mask holds several documents a row: pass labels to the whole model, or `segments` "
                "(Segments.from_mask) to the encoder, to keep them apart"
            )
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = (
                segments.position_ids
                if segments
                else torch.arange(states.shape[1], device=states.device)[None]
            )
        mask = None
        if segments is None:
            mask = create_bidirectional_mask(self.config, states, attention_mask)
        else:
            segments.layout.prepare(self.config._attn_implementation)
        position_embeddings = self.rotary_emb(states, position_ids)
        for layer in self.layers:
            states = layer(
                states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                segments=segments,
                **kwargs,
            )
        return BaseModelOutput(last_hidden_state=self.norm(states))


class Qwen3EncoderModel(Qwen3EncoderDecoderPreTrainedModel):
    """The encoder of an encoder-decoder on its own;

    loads from its folder and leaves the decoder there.
    """

    _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"decoder\."]  # noqa: RUF012

    def __init__(self, config: Qwen3EncoderDecoderConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.encoder = Qwen3Encoder(config, self.shared)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding, keeping it one object."""
        self.shared = self.encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutput:
        """[B, S] -> `last_hidden_state` [B, S, E]; in training, padding is not computed."""
        if (
            self.training
            and input_ids is not None
            and attention_mask is not None
            and not self._wants_more(kwargs)
        ):
            segments = Segments.from_mask(attention_mask)
            states = self.encoder(segments.gather(input_ids), segments=segments).last_hidden_state
            return BaseModelOutput(last_hidden_state=segments.scatter(states))
        return self.encoder(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)


class _Qwen3EncoderClassifier(Qwen3EncoderDecoderPreTrainedModel):
    _tied_weights_keys = {"model.encoder.embed_tokens.weight": "model.shared.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"decoder\."]  # noqa: RUF012

    def __init__(self, config: Qwen3EncoderDecoderConfig):
        super().__init__(config)
        self.model = Qwen3EncoderModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.model.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding, keeping it one object."""
        self.model.set_input_embeddings(value)


class Qwen3EncoderForSequenceClassification(_Qwen3EncoderClassifier):
    """One linear layer on the mean of a text's states."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> SequenceClassifierOutput:
        """`logits` [B, num_labels];

        `labels` [B] int64, or float for regression and for several labels a text.
        """
        output = self.model(input_ids, attention_mask, inputs_embeds, return_dict=True, **kwargs)
        states = output.last_hidden_state
        if attention_mask is None:
            mean = states.mean(1)
        else:
            kept = attention_mask.to(states.dtype)[..., None]
            mean = (states * kept).sum(1) / kept.sum(1).clamp(min=1)
        logits = self.score(mean)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss, logits, output.hidden_states, output.attentions)


class Qwen3EncoderForTokenClassification(_Qwen3EncoderClassifier):
    """One linear layer on every state."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> TokenClassifierOutput:
        """`logits` [B, S, num_labels]; `labels` [B, S] int64, -100 is ignored."""
        output = self.model(input_ids, attention_mask, inputs_embeds, return_dict=True, **kwargs)
        logits = self.score(output.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss, logits, output.hidden_states, output.attentions)


__all__ = [
    "Qwen3Encoder",
    "Qwen3EncoderDecoderPreTrainedModel",
    "Qwen3EncoderForSequenceClassification",
    "Qwen3EncoderForTokenClassification",
    "Qwen3EncoderModel",
]
