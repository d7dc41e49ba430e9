# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""The decoder: Qwen3 whose one attention module does self- and cross-attention together.

Departures from transformers' Qwen3, after T5Gemma 2 (`modeling_t5gemma2.py` in transformers; arXiv
2512.14856):

- merged attention: the same q/k/v/o projections and one softmax over encoder and decoder keys;
- q_norm and k_norm apply to everything, RoPE to decoder queries and keys only. Encoder keys are not
  rotated: the source is a set of states whose order is already in them;
- keys are laid out encoder first. T5Gemma 2 puts the decoder first and needs a dense mask; with the
  encoder first the mask is exactly causal, aligned to the bottom right (S = 3 source tokens, T = 4
  target tokens):

              encoder   decoder
              0 1 2     0 1 2 3
    query 0   1 1 1     1 0 0 0
    query 1   1 1 1     1 1 0 0
    query 2   1 1 1     1 1 1 0
    query 3   1 1 1     1 1 1 1

Shapes: B batch, S source length, T target length, P target tokens in the cache before this call, N
target and M source tokens of a ragged batch, H query heads, K key/value heads, D head dimension, E
hidden size.
"""

import inspect
from typing import Unpack

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    rotate_half,
)
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from .modeling_qwen3_encoder import (
    CACHE_FIELD,
    Qwen3EncoderDecoderPreTrainedModel,
    RaggedLayout,
    Segments,
    attend,
    is_packed,
    is_ragged,
    move,
    one_cache,
    project,
    project_heads,
    project_keys,
    refuse_unknown,
)

# Not every option exists in every transformers from 5.2 on.
_CAUSAL_MASK_OPTIONS = inspect.signature(create_causal_mask).parameters


class MergedSegments:
    """How the keys of a ragged batch interleave: document by document, its M source then its N
    target tokens.

    Attributes:
        source, target: segments of the encoder and of the decoder tokens.
        key_order: reorders [all source tokens ; all target tokens] into document order.
        layout: bottom-right causal attention of the target tokens to the keys in that order.
    """

    def __init__(self, source: Segments, target: Segments):
        both = torch.cat([source.documents, target.documents])
        wanted = torch.isin(both, target.documents)  # a source without a target has no reader
        packed = bool((both & 0xFFFFFFFF > 1).any())
        if packed and not (wanted.all() and torch.isin(target.documents, source.documents).all()):
            counts = [len(side.documents.unique()) for side in (source, target)]
            raise ValueError(
                f"attention_mask holds {counts[0]} source documents and decoder_attention_mask {counts[1]} target "
                "documents; in packed rows every source needs its target"
            )
        self.source, self.target = source, target
        order = both.masked_fill(~wanted, both.max() + 1).argsort(stable=True)
        order = order[: int(wanted.sum())]
        device = target.index.device
        self.key_order = move(order, device)
        self.layout = RaggedLayout(target.documents, both[order], causal=True, device=device)


class MergedLayer(DynamicLayer):
    """The keys of one decoder layer behind those of the encoder in one buffer with room to grow.

    A decoding step writes one token and attends to a view, where concatenating the two caches would
    copy the whole source in every layer of every step. `keys` and `values` of this layer and of the
    encoder's are views into the buffer; whatever replaces them (reordering beams, cropping,
    selecting rows) is noticed by the next step.
    """

    # In a slot: transformers' exporters take every tensor in a layer's __dict__ for its state.
    __slots__ = ("buffers",)

    def extend(
        self, key: torch.Tensor, value: torch.Tensor, source: DynamicLayer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append decoder keys and values [B, K, T, D];

        returns all keys and values, [B, K, S + P + T, D].
        """
        begin, past = source.keys.shape[2], self.get_seq_length()
        end = begin + past + key.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        if not self._continues(source, begin, past, end):
            room = begin + max(64, 2 * (end - begin))
            held = ((source.keys, self.keys), (source.values, self.values))  # type: ignore[has-type]
            self.buffers = [
                new.new_empty(*new.shape[:2], room, new.shape[3]) for new in (key, value)
            ]
            for buffer, (encoded, decoded) in zip(self.buffers, held, strict=True):
                buffer[:, :, :begin] = encoded
                if past:
                    buffer[:, :, begin : begin + past] = decoded
            source.keys, source.values = (buffer[:, :, :begin] for buffer in self.buffers)
        for buffer, new in zip(self.buffers, (key, value), strict=True):
            buffer[:, :, begin + past : end] = new
        self.keys, self.values = (buffer[:, :, begin:end] for buffer in self.buffers)  # type: ignore[misc]
        return self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]

    def _continues(self, source: DynamicLayer, begin: int, past: int, end: int) -> bool:
        """Whether the buffer still is what both caches hold, with room up to `end`."""
        if not past or not hasattr(self, "buffers") or end > self.buffers[0].shape[2]:
            return False
        starts = [buffer[:, :, place].data_ptr() for buffer in self.buffers for place in (0, begin)]
        return starts == [
            held.data_ptr() for held in (source.keys, self.keys, source.values, self.values)
        ]


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
        # ablation
        encoder_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Attend to the source and to the target so far.

        Args:
            hidden_states: [B, T, E], or [1, N, E] with `segments`.
            position_embeddings: cos and sin of the decoder positions, each [B, T, D].
            encoder_hidden_states: [B, S, E], or [1, M, E] with `segments`; not read once the cache
                holds its keys.
            merged_mask: [B, 1, T, S + P + T] or what the backend takes instead; None is
                bottom-right causal.
            encoder_position_embeddings: rotates encoder keys too; None leaves them as they are.

        Returns:
            Output [B, T, E]; self-attention weights [B, H, T, P + T] and cross-attention weights
            [B, H, T, S], which sum to 1 together, or None where the backend does not return
            weights.
        """
        query, key, value = project_heads(self, hidden_states)  # (B, H, T, D), (B, K, T, D)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        source: tuple[torch.Tensor, torch.Tensor] | None = None
        if cache is None:
            source = self._encoder_keys(
                encoder_hidden_states, encoder_position_embeddings
            )  # (B, K, S, D)
        else:
            cross = cache.cross_attention_cache
            if not cache.is_updated.get(self.layer_idx):
                cross.update(
                    *self._encoder_keys(encoder_hidden_states, encoder_position_embeddings),
                    self.layer_idx,
                )
                cache.is_updated[self.layer_idx] = True
            source_layer = cross.layers[self.layer_idx]
            own = cache.self_attention_cache
            if _can_merge(own, self.layer_idx):
                key, value = own.layers[self.layer_idx].extend(
                    key, value, source_layer
                )  # (B, K, S + P + T, D)
            else:
                options = {}
                if (
                    "cache_position" in _CAUSAL_MASK_OPTIONS
                ):  # before transformers 5.4 a static cache does not count
                    places = torch.arange(key.shape[2], device=key.device) + own.get_seq_length(
                        self.layer_idx
                    )
                    options = {"cache_kwargs": {"cache_position": places}}
                key, value = own.update(key, value, self.layer_idx, **options)
                source = source_layer.keys, source_layer.values
        if source is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(source, (key, value), strict=True))

        layout = None
        if segments is not None:
            key, value, layout = (
                key[:, :, segments.key_order],
                value[:, :, segments.key_order],
                segments.layout,
            )
        output, weights = attend(self, query, key, value, merged_mask, layout, causal=True)
        output = project(self.o_proj, output.flatten(2))
        if weights is None:
            return output, None, None
        source_length = encoder_hidden_states.shape[1]
        return output, weights[..., source_length:], weights[..., :source_length]

    def _encoder_keys(self, states, position_embeddings) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = project_keys(self, states)
        if position_embeddings is not None:
            cos, sin = (part.unsqueeze(1) for part in position_embeddings)
            key = key * cos + rotate_half(key) * sin
        return key, value


def _can_merge(cache: DynamicCache, layer_idx: int) -> bool:
    """Whether a step may write into the buffer:

    not where a gradient or a graph would hold on to what was there.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return layer_idx < len(cache.layers) and isinstance(cache.layers[layer_idx], MergedLayer)


class Qwen3MergedDecoderLayer(GradientCheckpointingLayer):
    """Qwen3's pre-norm layer around merged attention. The parameter names are Qwen3's."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Qwen3MergedAttention(config, layer_idx)
        self.mlp = Qwen3MergedDecoderMLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        """[B, T, E] -> [B, T, E]; `kwargs` are those of `Qwen3MergedAttention.forward`."""
        attended, _, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            encoder_hidden_states=encoder_hidden_states,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Qwen3MergedDecoderMLP(Qwen3MLP):
    """Qwen3's gated MLP, its products by `project`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, E] -> [B, T, E]."""
        return project(
            self.down_proj, self.act_fn(project(self.gate_proj, x)) * project(self.up_proj, x)
        )


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
        self.embed_tokens = embed_tokens or nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id
        )
        self.layers = nn.ModuleList(
            Qwen3MergedDecoderLayer(config, i) for i in range(config.num_decoder_layers)
        )
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
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode a padded batch, or, with `segments`, ragged rows of target and source tokens.

        Args:
            input_ids: [B, T] int64, already shifted right.
            attention_mask: [B, P + T], 1 real and 0 padding; or [B, 1, T, P + T], used as it is.
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
        if isinstance(
            attention_mask, dict
        ):  # what generate() makes ahead for a static cache, by layer type
            attention_mask = attention_mask["full_attention"]
        if segments is None and (is_packed(attention_mask) or is_packed(encoder_attention_mask)):
            raise ValueError(
                "a mask holds several documents a row: pass labels to the whole model to keep them apart"
            )
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        refuse_unknown(kwargs)
        cache = one_cache(cache, past_key_values)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and self.gradient_checkpointing:
            use_cache = False
        if segments is not None or not use_cache:
            cache = None
        elif cache is None and not self.training:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if cache is not None:
            self._merge_layers(cache)

        if position_ids is None and segments is not None:
            position_ids = segments.target.position_ids
        elif position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(states.shape[1], device=states.device)[None] + seen
        mask = None
        if segments is None:
            mask = self._merged_mask(
                states, attention_mask, encoder_hidden_states, encoder_attention_mask, cache
            )
        else:
            segments.layout.prepare(self.config._attn_implementation)
        position_embeddings = self.rotary_emb(states, position_ids)
        encoder_position_embeddings = None
        if self.config.rope_on_encoder_keys:
            places = torch.arange(encoder_hidden_states.shape[1], device=states.device)[None]
            places = segments.source.position_ids if segments is not None else places
            encoder_position_embeddings = self.rotary_emb(encoder_hidden_states, places)
        for layer in self.layers:
            states = layer(
                states,
                encoder_hidden_states,
                position_embeddings=position_embeddings,
                encoder_position_embeddings=encoder_position_embeddings,
                merged_mask=mask,
                segments=segments,
                cache=cache,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(states), **{CACHE_FIELD: cache}
        )

    def _merge_layers(self, cache: EncoderDecoderCache) -> None:
        """Give an empty dynamic cache its merged layers."""
        own = cache.self_attention_cache
        empty = type(own) is DynamicCache and not own.offloading and own.get_seq_length() == 0
        if empty and not any(isinstance(layer, MergedLayer) for layer in own.layers):
            own.layers[:] = [MergedLayer() for _ in self.layers]

    def _merged_mask(self, states, attention_mask, encoder_states, encoder_mask, cache):
        """The mask of [encoder ; decoder] keys for the backend; None where bottom-right causal is
        all there is to say.

        It is an ordinary causal mask over a past that begins with the source, so transformers'
        builder makes it.
        """
        batch, length, _ = states.shape
        source = encoder_states.shape[1]
        if attention_mask is not None and attention_mask.dim() == 4:
            return self._before_own_mask(attention_mask, encoder_mask, source)
        past = _SourceThenPast(cache.self_attention_cache if cache is not None else None, source)
        backend = self.config._attn_implementation
        mask_free = (backend == "sdpa" or "flash" in backend) and not past.is_compileable
        mask_free = mask_free and not torch.compiler.is_compiling()  # which may not look at values
        if mask_free and not (is_ragged(attention_mask) or is_ragged(encoder_mask)):
            return None
        positions = torch.arange(length, device=states.device) + past.get_seq_length()
        if attention_mask is not None or encoder_mask is not None:
            if attention_mask is None:
                queries = positions if "cache_position" in _CAUSAL_MASK_OPTIONS else length
                keys = past.get_mask_sizes(queries)[0] - source
                attention_mask = states.new_ones(batch, keys, dtype=torch.long)
            if encoder_mask is None:
                encoder_mask = states.new_ones(batch, source, dtype=torch.long)
            attention_mask = torch.cat(
                [encoder_mask.expand(batch, -1), attention_mask.to(encoder_mask)], dim=1
            )
        options = {CACHE_FIELD: past, "allow_is_causal_skip": False, "cache_position": positions}
        options = {name: value for name, value in options.items() if name in _CAUSAL_MASK_OPTIONS}
        return create_causal_mask(self.config, states, attention_mask, position_ids=None, **options)

    def _before_own_mask(
        self, mask: torch.Tensor, encoder_mask: torch.Tensor | None, source: int
    ) -> torch.Tensor:
        """A caller's own [B, 1, T, P + T] mask, bool or additive, with the source before it."""
        seen = torch.ones(*mask.shape[:3], source, dtype=torch.bool, device=mask.device)
        if encoder_mask is not None:
            seen = seen & encoder_mask[:, None, None].bool()
        if mask.dtype != torch.bool:
            seen = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(
                ~seen, torch.finfo(mask.dtype).min
            )
        return torch.cat([seen, mask], dim=-1)


class _SourceThenPast:
    """A cache as the mask builder should see it:

    the source tokens come first and are past to every target token.
    """

    def __init__(self, cache: DynamicCache | None, source: int):
        self.cache, self.source = cache, source
        self.is_compileable = getattr(cache, "is_compileable", False)
        self.own_length = cache.get_seq_length() if cache is not None else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.source + self.own_length

    get_query_offset = get_seq_length

    def get_mask_sizes(self, queries, layer_idx: int = 0) -> tuple[int, int]:
        """Keys and their offset;

        `queries` is their number, or their positions before transformers 5.4.
        """
        if self.cache is None:
            return self.source + (queries if isinstance(queries, int) else queries.shape[0]), 0
        length, offset = self.cache.get_mask_sizes(queries, layer_idx)
        return self.source + length, offset


__all__ = ["Qwen3MergedDecoder"]
