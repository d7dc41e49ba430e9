# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""The decoder: Qwen3 with self- and cross-attention merged into one attention module.

Differences from transformers' Qwen3, following T5Gemma 2 (arXiv 2512.14856):

- merged attention: the same q/k/v/o projections and one softmax over encoder and decoder keys;
- q_norm and k_norm apply to everything, RoPE to decoder queries and keys only. Encoder keys are not
  rotated: encoder states already contain the order of the source;
- the source is a prefix: encoder keys come first, so the mask is exactly causal, aligned
  bottom-right (S = 3 source tokens, T = 4 target tokens):

              encoder   decoder
              0 1 2     0 1 2 3
    query 0   1 1 1     1 0 0 0
    query 1   1 1 1     1 1 0 0
    query 2   1 1 1     1 1 1 0
    query 3   1 1 1     1 1 1 1

  The cache is that of a decoder-only model. Its first S entries are the encoder's keys and values,
  written once, together with the first target tokens;
- optionally (`source_gate`), encoder states are scaled so their values match the decoder's own in
  size, and the values are multiplied by a learned gate per key head that starts at 0. A pretrained
  decoder then starts close to the language model it was.

Shapes: B batch, S source length, T target length, P target tokens in the cache before this call, M
source and N target tokens of a packed batch of D documents, H query heads, K key/value heads, d
head dimension, E hidden size.
"""

from typing import Any, Unpack

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    apply_rotary_pos_emb,
)
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_qwen3_encdec import Varlen, attend, project_key_value, project_query
from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from .modeling_qwen3_encoder import Qwen3Stack, check_packed, check_shape


class SourcePrefix:
    """A cache whose first `source_length` entries are the source's; its length is the target's.

    `generate` counts target tokens with `get_seq_length`; mask builders use `get_query_offset` to
    place queries after everything in the cache.
    """

    source_length = 0

    @classmethod
    def around(cls, cache: Cache, source_length: int) -> Any:
        """Return a view of an ordinary cache, sharing its layers, for a source of this length."""
        filled = bool(cache.get_query_offset() > 0)
        cache.source_length = getattr(cache, "source_length", 0) if filled else source_length
        view = cls.__new__(cls)
        view.__dict__.update(cache.__dict__)
        view.source_length = cache.source_length if filled else 0
        return view

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Count the entries of the source and the target."""
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Count the entries of the target."""
        return super().get_seq_length(layer_idx) - self.source_length  # type: ignore[misc]

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()  # type: ignore[misc]
        self.source_length = 0


class SourceDynamicCache(SourcePrefix, DynamicCache):
    """A growing cache that begins with the source."""


class SourceStaticCache(SourcePrefix, StaticCache):
    """A fixed-size cache that begins with the source."""


class Qwen3MergedAttention(Qwen3Attention):
    """One softmax over `[encoder keys ; decoder keys]`, with Qwen3's own parameters."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.source_gate:
            self.source_gate = nn.Parameter(torch.zeros(config.num_key_value_heads))
            self.register_buffer("source_scale", torch.ones(1))

    def forward(
        self,
        # decoder inputs
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        # encoder inputs
        encoder_hidden_states: torch.Tensor | None,
        source_length: int = 0,
        # masks
        merged_mask: Any = None,
        packed: Varlen | None = None,
        # cache inputs
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Attend to the source and to the target so far.

        Args:
            hidden_states: [B, T, E]; packed, [1, N, E].
            position_embeddings: cos and sin of the decoder positions, each [B, T, d].
            encoder_hidden_states: [B, S, E]; packed, [1, M, E]; None if the cache already
                holds them.
            source_length: S.
            merged_mask: [B, 1, T, S + P + T] or its equivalent for the backend; None is
                bottom-right causal.

        Returns:
            Output [B, T, E]; self-attention weights [B, H, T, P + T] and cross-attention weights
            [B, H, T, S], which together sum to 1, or None if the backend returns none.
        """
        query = project_query(self, hidden_states)  # (B, H, T, d)
        key, value = project_key_value(self, hidden_states)  # (B, K, T, d)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if encoder_hidden_states is not None:
            source = self.source_key_value(encoder_hidden_states)
            key, value = (torch.cat(pair, 2) for pair in zip(source, (key, value), strict=True))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # (B, K, S + P + T, d)
        if packed is not None:
            key, value = packed.reorder(key), packed.reorder(value)
        output, weights = attend(self, query, key, value, merged_mask, packed, causal=True)
        output = self.o_proj(output.flatten(2))
        if weights is None:
            return output, None, None
        return output, weights[..., source_length:], weights[..., :source_length]

    def source_key_value(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project [B, S, E] encoder states to key and value, each [B, K, S, d]."""
        if not self.config.source_gate:
            return project_key_value(self, states)
        key, value = project_key_value(self, states * self.source_scale.to(states.dtype))
        return key, value * self.source_gate.to(value.dtype)[:, None, None]


class Qwen3MergedDecoderLayer(GradientCheckpointingLayer):
    """Qwen3's pre-norm layer with merged attention and Qwen3's parameter names."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Qwen3MergedAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map [B, T, E] to [B, T, E]; `kwargs` are those of `Qwen3MergedAttention.forward`."""
        normalized = self.input_layernorm(hidden_states)
        attended, _, _ = self.self_attn(
            normalized, encoder_hidden_states=encoder_hidden_states, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Qwen3MergedDecoder(Qwen3Stack):
    """Decoder stack: target ids and encoder states to decoder states after the final norm."""

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": Qwen3MergedDecoderLayer,
        "attentions": OutputRecorder(Qwen3MergedAttention, index=1),
        "cross_attentions": OutputRecorder(Qwen3MergedAttention, index=2),
    }

    def __init__(self, config: Qwen3EncoderDecoderConfig, owner: nn.Module | None = None):
        super().__init__(config, Qwen3MergedDecoderLayer, config.num_decoder_layers, owner)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        # decoder inputs
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        # encoder inputs
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        # cache inputs
        cache: Cache | None = None,
        use_cache: bool | None = None,
        # packed form
        packed: Varlen | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode a padded batch or, with `packed`, target and source tokens without padding.

        Args:
            input_ids: [B, T] int64, already shifted right; packed, [1, N].
            attention_mask: [B, P + T], 1 real and 0 padding; or a mask [B, 1, T, S + P + T] of
                all keys, used as is.
            position_ids: [B, T]; by default counted from the first real token of the row and
                continued from the cache.
            inputs_embeds: [B, T, E] in place of `input_ids`.
            encoder_hidden_states: [B, S, E], the encoder's output after its final norm.
            encoder_attention_mask: [B, S], 1 real and 0 padding.
            cache: Keys and values to read and extend; created if `use_cache` is set. Ordinary
                dynamic and static caches work too.

        Returns:
            `last_hidden_state` [B, T, E] and the cache.

        Raises:
            ValueError: no encoder states, both or neither of ids and embeddings, a mask that does
                not fit, a cache of another source, or a cache with a packed batch or gradient
                checkpointing.
        """
        states = self.embed(input_ids, inputs_embeds, "decoder_")
        if encoder_hidden_states is None:
            raise ValueError("the decoder needs encoder_hidden_states")
        batch, length, width = states.shape
        source_length = encoder_hidden_states.shape[1]
        check_shape("encoder_hidden_states", encoder_hidden_states, (batch, source_length, width))
        cache = self._cache(cache, use_cache, packed)
        own: Any = getattr(cache, "self_attention_cache", cache)
        holds_source = own is not None and _holds_source(own)
        held = getattr(own, "source_length", 0)
        if holds_source and held != source_length:
            raise ValueError(f"the cache holds a source of {held} tokens, not of {source_length}")
        past = own.get_query_offset() - source_length if holds_source else 0

        mask = None
        if packed is None:
            check_shape("decoder_position_ids", position_ids, (batch, length), (1, length))
            new = length if holds_source else source_length + length
            keys = _MergedKeys(own, source_length, past, new)
            mask = self._merged_mask(states, attention_mask, encoder_attention_mask, keys)
        else:
            bounds = packed.queries, packed.longest_query
            check_packed(length, attention_mask, position_ids, *bounds, "decoder_")
            check_shape("key_order", packed.order, (source_length + length,))
            packed.prepare(self.config._attn_implementation, states, source_length + length)
        if position_ids is None:
            position_ids = _positions(states, attention_mask, past)
        position_embeddings = self.rotary_emb(states, position_ids)
        for layer in self.layers:
            states = layer(
                states,
                None if holds_source else encoder_hidden_states,
                position_embeddings=position_embeddings,
                source_length=source_length,
                merged_mask=mask,
                packed=packed,
                cache=own,
            )
        if own is not None:
            own.source_length = source_length
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(states), cache=cache
        )

    def _cache(self, cache: Cache | None, use_cache: bool | None, packed: Any) -> Cache | None:
        """Return the given cache, or create one if wanted; raise if a given one cannot be used."""
        recomputing = self.training and self.gradient_checkpointing and torch.is_grad_enabled()
        unusable = packed is not None or recomputing
        if cache is not None and unusable:
            raise ValueError("a cache cannot be used with a packed batch or gradient checkpointing")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        return SourceDynamicCache() if cache is None and use_cache and not unusable else cache

    def _merged_mask(self, states, attention_mask, encoder_mask, keys: "_MergedKeys") -> Any:
        """Make the mask of `[encoder ; decoder]` keys; None means bottom-right causal.

        It is an ordinary causal mask over a past that begins with the source, so transformers'
        builder makes it for the backend.
        """
        batch, length, _ = states.shape
        source, past = keys.source, keys.past
        known = not isinstance(past, torch.Tensor)  # as it is of a static cache
        if attention_mask is not None and len(attention_mask.shape) == 4:
            if known and attention_mask.shape[-1] < source + past + length:
                needed = f"{source} source and {past + length} target keys"
                raise ValueError(f"the 4D decoder_attention_mask must cover {needed}")
            return attention_mask
        check_shape("attention_mask", encoder_mask, (batch, source))
        if known:
            check_shape("decoder_attention_mask", attention_mask, (batch, past + length))
        implementation = self.config._attn_implementation
        # Flash attention learns from the mask's length how much of a static cache is written.
        by_length = "flash" in implementation and keys.is_compileable
        if attention_mask is None and (encoder_mask is not None or by_length):
            total = int(past) + length if by_length else keys.get_mask_sizes(length)[0] - source
            attention_mask = states.new_ones(batch, total, dtype=torch.long)
        if attention_mask is not None:
            if encoder_mask is None:
                encoder_mask = states.new_ones(batch, source, dtype=torch.long)
            attention_mask = torch.cat([encoder_mask.to(attention_mask), attention_mask], dim=1)
        elif implementation == "sdpa" and not keys.is_compileable:
            return None
        # Skipped, a static cache's mask would be causal over the whole length of the cache.
        options: Any = {"cache": keys, "allow_is_causal_skip": not keys.is_compileable}
        return create_causal_mask(self.config, states, attention_mask, **options)


def _positions(states: torch.Tensor, attention_mask: Any, past: Any) -> torch.Tensor:
    """Return [B, T] positions, counted over the real tokens if there is a padding mask."""
    length = states.shape[1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(length, device=states.device)[None] + past


def _holds_source(cache: Cache) -> bool:
    """Return True if the cache already holds the source's keys and values."""
    if torch.compiler.is_compiling():  # static cache lengths are tensors: use the stored one
        return bool(getattr(cache, "source_length", 0))
    return bool(cache.get_query_offset() > 0)


class _MergedKeys:
    """Numbers of source, past and new keys, which mask builders ask a cache for.

    The length of a static cache is a tensor that every layer adds to; `past` is a copy.
    """

    def __init__(self, cache: Cache | None, source: int, past: Any, new: int):
        self.cache, self.source, self.past, self.new = cache, source, past, new
        self.is_compileable = cache is not None and cache.is_compileable

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.source + self.past

    def get_mask_sizes(self, queries: int, layer_idx: int = 0) -> tuple[int, int]:
        if self.cache is None:
            return self.new, 0
        return self.cache.get_mask_sizes(self.new, layer_idx)


__all__ = ["Qwen3MergedDecoder"]
