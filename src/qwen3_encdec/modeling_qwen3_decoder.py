"""The decoder: Qwen3 whose one attention module does self- and cross-attention together.

Departures from transformers' Qwen3, after T5Gemma 2 (`modeling_t5gemma2.py` in transformers; arXiv 2512.14856):

- merged attention: the same q/k/v/o projections and one softmax over encoder and decoder keys;
- q_norm and k_norm apply to everything, RoPE to decoder queries and keys only. Encoder keys are not rotated: the
  source is a set of states whose order is already in them;
- keys are laid out encoder first. T5Gemma 2 puts the decoder first and needs a dense mask; with the encoder first
  the mask is exactly causal, aligned to the bottom right (S = 3 source tokens, T = 4 target tokens):

              encoder   decoder
              0 1 2     0 1 2 3
    query 0   1 1 1     1 0 0 0
    query 1   1 1 1     1 1 0 0
    query 2   1 1 1     1 1 1 0
    query 3   1 1 1     1 1 1 1

Shapes: B batch, S source length, T target length, P target tokens in the cache before this call, N target and M
source tokens of a ragged batch, H query heads, K key/value heads, D head dimension, E hidden size.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from .modeling_qwen3_encoder import (
    CACHE_FIELD,
    Qwen3EncoderDecoderPreTrainedModel,
    Segments,
    bottom_right_causal_mask,
    is_packed,
    project_heads,
    project_keys,
    ragged_attention,
    refuse_unknown,
)

# Not every option exists in every transformers from 5.2 on.
_CAUSAL_MASK_OPTIONS = inspect.signature(create_causal_mask).parameters


class MergedSegments:
    """How the keys of a ragged batch interleave: document by document, its M source then its N target tokens.

    Attributes:
        target: segments of the decoder tokens.
        key_lengths: source plus target tokens of each document.
        key_order: [M + N] int64, reorders [all source tokens ; all target tokens] into document order.
    """

    def __init__(self, source: Segments, target: Segments):
        if len(source.lengths) != len(target.lengths):
            raise ValueError(
                f"attention_mask holds {len(source.lengths)} source documents and decoder_attention_mask "
                f"{len(target.lengths)} target documents; every source needs its target"
            )
        self.target = target
        self.key_lengths = [s + t for s, t in zip(source.lengths, target.lengths, strict=True)]
        document = torch.arange(len(target.lengths)).repeat(2)
        document = document.repeat_interleave(torch.tensor(source.lengths + target.lengths))
        self.key_order = document.argsort(stable=True).to(target.index.device)


class Qwen3MergedAttention(Qwen3Attention):
    """One softmax over `[encoder keys ; decoder keys]`, with Qwen3's own parameters."""

    def forward(
        self,
        # decoder inputs
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        # encoder inputs
        encoder_hidden_states: torch.Tensor,
        # masks
        merged_mask: torch.Tensor | None = None,
        segments: MergedSegments | None = None,
        # cache inputs
        cache: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Attend to the source and to the target so far.

        Args:
            hidden_states: [B, T, E], or [1, N, E] with `segments`.
            position_embeddings: cos and sin of the decoder positions, each [B, T, D].
            encoder_hidden_states: [B, S, E], or [1, M, E] with `segments`; not read once the cache holds its keys.
            merged_mask: [B, 1, T, S + P + T] additive or bool; None is bottom-right causal.

        Returns:
            Output [B, T, E]; self-attention weights [B, H, T, P + T] and cross-attention weights [B, H, T, S], which
            sum to 1 together, or None where the backend does not return weights.
        """
        query, key, value = project_heads(self, hidden_states)  # (B, H, T, D), (B, K, T, D)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is None:
            encoder_key, encoder_value = project_keys(self, encoder_hidden_states)  # (B, K, S, D)
        else:
            key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
            encoder_key, encoder_value = self._cached_encoder_keys(encoder_hidden_states, cache)
        eager = self.config._attn_implementation == "eager"
        if query.shape[2] == 1 and cache is not None and not eager:
            output = one_token_attention(query, (encoder_key, key), (encoder_value, value), merged_mask, self.scaling)
            return self.o_proj(output), None, None
        source_length = encoder_key.shape[2]
        key = torch.cat([encoder_key, key], dim=2)  # (B, K, S + P + T, D)
        value = torch.cat([encoder_value, value], dim=2)

        dropout = self.attention_dropout if self.training else 0.0
        weights = None
        if segments is not None:
            key, value = key[:, :, segments.key_order], value[:, :, segments.key_order]
            output = ragged_attention(
                query,
                key,
                value,
                segments.target.lengths,
                segments.key_lengths,
                self.scaling,
                dropout,
                causal=True,
            )  # (1, N, H, D)
        elif eager:
            output, weights = eager_attention_forward(self, query, key, value, merged_mask, self.scaling, dropout)
        else:
            if merged_mask is None and query.shape[2] > 1:
                merged_mask = bottom_right_causal_mask(query.shape[2], key.shape[2], query)
            output = F.scaled_dot_product_attention(
                query, key, value, merged_mask, dropout, scale=self.scaling, enable_gqa=True
            ).transpose(1, 2)  # (B, T, H, D)
        output = self.o_proj(output.flatten(2))
        if weights is None:
            return output, None, None
        return output, weights[..., source_length:], weights[..., :source_length]

    def _cached_encoder_keys(self, encoder_hidden_states: torch.Tensor, cache: EncoderDecoderCache):
        cross = cache.cross_attention_cache
        if cache.is_updated.get(self.layer_idx):
            return cross.layers[self.layer_idx].keys, cross.layers[self.layer_idx].values
        cache.is_updated[self.layer_idx] = True
        return cross.update(*project_keys(self, encoder_hidden_states), self.layer_idx)


def one_token_attention(
    query: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Merged attention of one decoding step, without copying the two caches into one tensor.

    Args:
        query: [B, H, 1, D].
        keys, values: of encoder and decoder, [B, K, S, D] and [B, K, P, D].
        mask: [B, 1, 1, S + P], bool or additive.

    Returns:
        [B, 1, H * D].
    """
    batch, heads, _, dim = query.shape
    source = keys[0].shape[2]
    query = query.reshape(batch, keys[0].shape[1], -1, dim) * scaling  # (B, K, H / K, D)
    scores = torch.cat([query @ key.transpose(2, 3) for key in keys], dim=-1).float()  # (B, K, H / K, S + P)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(query.dtype)
    output = weights[..., :source] @ values[0] + weights[..., source:] @ values[1]
    return output.reshape(batch, 1, heads * dim)


class Qwen3MergedDecoderLayer(GradientCheckpointingLayer):
    """Qwen3's pre-norm layer around merged attention. The parameter names are Qwen3's."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Qwen3MergedAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """[B, T, E] -> [B, T, E]; `kwargs` are those of `Qwen3MergedAttention.forward`."""
        attended, _, _ = self.self_attn(
            self.input_layernorm(hidden_states), encoder_hidden_states=encoder_hidden_states, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Qwen3MergedDecoder(Qwen3EncoderDecoderPreTrainedModel):
    """Target ids and encoder states -> decoder states after the final norm.

    Args:
        embed_tokens: The embedding to share; None makes one of its own.
    """

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": Qwen3MergedDecoderLayer,
        "attentions": OutputRecorder(Qwen3MergedAttention, index=1),
        "cross_attentions": OutputRecorder(Qwen3MergedAttention, index=2),
    }

    def __init__(self, config: Qwen3EncoderDecoderConfig, embed_tokens: nn.Embedding | None = None):
        super().__init__(config)
        self.embed_tokens = embed_tokens or nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Qwen3MergedDecoderLayer(config, i) for i in range(config.num_decoder_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        # decoder inputs
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        # encoder inputs
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        segments: MergedSegments | None = None,
        # cache inputs
        cache: EncoderDecoderCache | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode a padded batch, or, with `segments`, ragged rows of target and source tokens.

        Args:
            input_ids: [B, T] int64, already shifted right.
            attention_mask: [B, P + T], 1 real and 0 padding.
            position_ids: [B, T]; continues from the cache by default.
            inputs_embeds: [B, T, E] in place of `input_ids`.
            encoder_hidden_states: [B, S, E], the encoder's output after its final norm.
            encoder_attention_mask: [B, S], 1 real and 0 padding.
            cache: keys and values to read and extend; made if `use_cache` asks for one.
            past_key_values: the same under its name before transformers 5.24.

        Returns:
            `last_hidden_state` [B, T, E] and the cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of decoder input ids and decoder input embeddings")
        if encoder_hidden_states is None:
            raise ValueError("the decoder needs encoder_hidden_states")
        if segments is None and (is_packed(attention_mask) or is_packed(encoder_attention_mask)):
            raise ValueError("a mask holds several documents a row: pass labels to the whole model to keep them apart")
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        refuse_unknown(kwargs)
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and self.gradient_checkpointing:
            use_cache = False
        if segments is not None or not use_cache:
            cache = None
        elif cache is None and not self.training:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

        if position_ids is None and segments is not None:
            position_ids = segments.target.position_ids
        elif position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(states.shape[1], device=states.device)[None] + seen
        mask = None
        if segments is None:
            mask = self._merged_mask(
                states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                cache,
                position_ids,
            )
        position_embeddings = self.rotary_emb(states, position_ids)
        for layer in self.layers:
            states = layer(
                states,
                encoder_hidden_states,
                position_embeddings=position_embeddings,
                merged_mask=mask,
                segments=segments,
                cache=cache,
            )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.norm(states), **{CACHE_FIELD: cache})

    def _merged_mask(self, states, attention_mask, encoder_states, encoder_mask, cache, position_ids):
        """[B, 1, T, S + P + T], or None where bottom-right causal is all there is to say."""
        cache = cache.self_attention_cache if cache is not None else None
        seen = cache.get_seq_length() if cache is not None else 0
        options = {
            CACHE_FIELD: cache,
            # An empty static cache is longer than the target: there "no mask" would not mean bottom-right causal.
            "allow_is_causal_skip": not getattr(cache, "is_compileable", False),
            "cache_position": torch.arange(states.shape[1], device=states.device) + seen,
        }
        causal = create_causal_mask(
            self.config,
            states,
            attention_mask,
            position_ids=position_ids,
            **{name: value for name, value in options.items() if name in _CAUSAL_MASK_OPTIONS},
        )
        cross = create_bidirectional_mask(self.config, states, encoder_mask, encoder_hidden_states=encoder_states)
        if causal is None and cross is None:
            return None
        batch, length, source = states.shape[0], states.shape[1], encoder_states.shape[1]
        if causal is None:
            own = torch.ones(length, seen + length, dtype=torch.bool, device=states.device).tril(seen)
            causal = _as_kind_of(cross, own)
        if cross is None:
            cross = _as_kind_of(causal, torch.ones(length, source, dtype=torch.bool, device=states.device))
        return torch.cat([part.expand(batch, -1, -1, -1) for part in (cross, causal)], dim=-1)


def _as_kind_of(mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The bool matrix `seen` [T, L] as a [1, 1, T, L] mask of the kind, bool or additive, that `mask` is."""
    if mask.dtype == torch.bool:
        return seen[None, None]
    blocked = torch.finfo(mask.dtype).min
    return torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(~seen, blocked)[None, None]


__all__ = ["Qwen3MergedDecoder"]
