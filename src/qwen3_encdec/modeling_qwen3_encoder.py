"""The encoder: Qwen3 with its causal mask removed and nothing else changed.

Departures from transformers' Qwen3:

- attention is bidirectional: a token sees every token of its document;
- there is no key/value cache;
- a batch may be ragged: its real tokens laid out as one row, so that padding costs nothing and several documents
  can share a row without seeing each other (`Segments`).

Shapes: B batch, S source length, N real tokens of a ragged batch, H query heads, K key/value heads, D head
dimension, E hidden size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig

# transformers 5.24 renamed `past_key_values` to `cache`, in arguments and in outputs; both names are understood here.
_OUTPUT_FIELDS = BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__
CACHE_FIELD = "cache" if "cache" in _OUTPUT_FIELDS else "past_key_values"
_PASSED_BY_TRANSFORMERS = {"cache_position", "output_attentions", "output_hidden_states", "return_dict", "use_cache"}


@dataclass(frozen=True)
class Segments:
    """Where the documents of a [B, L] batch lie, for computing on its real tokens only.

    Built from a segment mask: 0 is padding, k >= 1 the k-th document of that row; an ordinary 0/1 attention mask is
    the case of one document a row. Positions restart with every document:

        mask       1 1 1 2 2 0        index      0 1 2 3 4 6 7
                   1 1 0 0 0 0        lengths    3 2 2
                                      positions  0 1 2 0 1 0 1

    Attributes:
        index: [N] int64, place of each real token in the flattened [B * L] batch.
        lengths: tokens of each document, in order of row and segment.
        position_ids: [1, N] int64.
        shape: (B, L) of the batch.
    """

    index: torch.Tensor
    lengths: list[int]
    position_ids: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> "Segments":
        """The segments of a [B, L] integer or bool mask. A document's tokens must be contiguous up to padding."""
        mask = mask.long()
        batch, length = mask.shape
        rows, columns = mask.nonzero(as_tuple=True)  # (N,)
        document = rows * (mask.max() + 1) + mask[rows, columns]
        _, inverse, counts = torch.unique_consecutive(document, return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts  # place in the row of N where each document begins
        positions = columns - columns[first][inverse]
        return cls(rows * length + columns, counts.tolist(), positions[None], (batch, length))

    def gather(self, batch: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [1, N, ...]: the real tokens as one row."""
        return batch.flatten(0, 1)[self.index][None]

    def scatter(self, row: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] -> [B, L, ...]: the exact inverse, with zeros where there is padding."""
        batch = row.new_zeros(self.shape[0] * self.shape[1], *row.shape[2:])
        return batch.index_copy(0, self.index, row[0]).view(*self.shape, *row.shape[2:])


def is_ragged(mask: torch.Tensor | None) -> bool:
    """Whether a [B, L] mask holds padding or several documents a row."""
    return mask is not None and mask.dim() == 2 and not bool((mask == 1).all())


def refuse_unknown(arguments: dict) -> None:
    """Raise TypeError for arguments that nothing reads: a renamed one must not be dropped in silence."""
    if unknown := sorted(arguments.keys() - _PASSED_BY_TRANSFORMERS):
        raise TypeError(f"unexpected argument {unknown[0]!r}")


def is_packed(mask: torch.Tensor | None) -> bool:
    """Whether a [B, L] mask holds several documents a row. Never asked while compiling: it reads the values."""
    if mask is None or mask.dim() != 2 or mask.dtype == torch.bool or torch.compiler.is_compiling():
        return False
    return bool((mask > 1).any())


def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
    scaling: float,
    dropout: float = 0.0,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of each document to itself alone.

    Args:
        query: [1, H, N, D], documents one after the other.
        key, value: [1, K, M, D], in the same order of documents.
        query_lengths, key_lengths: tokens of each document on both sides.
        causal: bottom-right aligned: the last query of a document sees all of its keys.

    Returns:
        [1, N, H, D].
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        return _varlen_attention(query, key, value, query_lengths, key_lengths, scaling, causal)
    masks: dict[tuple[int, int], torch.Tensor | None] = {}
    outputs = []
    for q, k, v in zip(
        query.split(query_lengths, dim=2),
        key.split(key_lengths, dim=2),
        value.split(key_lengths, dim=2),
        strict=True,
    ):
        shape = (q.shape[2], k.shape[2])
        if shape not in masks:
            masks[shape] = bottom_right_causal_mask(*shape, query) if causal and shape[0] > 1 else None
        outputs.append(F.scaled_dot_product_attention(q, k, v, masks[shape], dropout, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2)  # (1, N, H, D)


def bottom_right_causal_mask(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """[queries, keys] additive mask in which query i sees keys 0 ... keys - queries + i."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill(~seen, float("-inf"))


def _varlen_attention(query, key, value, query_lengths, key_lengths, scaling, causal):
    from torch.nn.attention.varlen import varlen_attn

    def starts(lengths: list[int]) -> torch.Tensor:
        total = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return total.to(query.device, non_blocking=True)

    output = varlen_attn(
        query[0].transpose(0, 1),  # (N, H, D)
        key[0].transpose(0, 1),  # (M, K, D)
        value[0].transpose(0, 1),
        starts(query_lengths),
        starts(key_lengths),
        max(query_lengths),
        max(key_lengths),
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=True,
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


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
        """[B, S, E] -> [B, S, E]; with `segments`, [1, N, E] -> [1, N, E]."""
        if segments is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        query, key, value = project_heads(self, hidden_states)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        output = ragged_attention(
            query, key, value, segments.lengths, segments.lengths, self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        return self.o_proj(output.flatten(2)), None


def project_heads(attention: Qwen3Attention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, L, E] -> normalized query [B, H, L, D] and key [B, K, L, D], and value [B, K, L, D]; none is rotated."""
    heads = (*states.shape[:-1], -1, attention.head_dim)
    query = attention.q_norm(attention.q_proj(states).view(heads)).transpose(1, 2)
    return query, *project_keys(attention, states)


def project_keys(attention: Qwen3Attention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L, E] -> normalized key and value, each [B, K, L, D]."""
    heads = (*states.shape[:-1], -1, attention.head_dim)
    key = attention.k_norm(attention.k_proj(states).view(heads)).transpose(1, 2)
    return key, attention.v_proj(states).view(heads).transpose(1, 2)


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
    _supports_attention_backend = False


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
        self.embed_tokens = embed_tokens or nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Qwen3EncoderLayer(config, i) for i in range(config.num_hidden_layers))
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
        **kwargs,
    ) -> BaseModelOutput:
        """Encode a padded batch, or, with `segments`, the ragged row that `Segments.gather` makes of one.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S], 1 real and 0 padding; or a [B, 1, S, S] mask that is used as it is.
            position_ids: [B, S]; counted from 0 along the row by default (rotary embeddings are relative, so left
                padding needs no other).
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
                segments.position_ids if segments else torch.arange(states.shape[1], device=states.device)[None]
            )
        mask = None
        if segments is None:
            mask = create_bidirectional_mask(self.config, states, attention_mask)
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


__all__ = ["Qwen3Encoder", "Qwen3EncoderDecoderPreTrainedModel"]
