# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""The encoder: Qwen3 with its causal mask removed and nothing else changed.

Differences from transformers' Qwen3:

- attention is bidirectional: a token sees every token of its text;
- there is no key/value cache;
- a batch may be packed: texts are concatenated without padding and kept apart by their
  cumulative lengths;
- embedding and output head are one module (`Qwen3SharedEmbedding`) that is always called, so
  the hooks of FSDP2, DeepSpeed, accelerate and PEFT see every use.

Shapes: B batch, S source length, M tokens of a packed batch of D texts, E hidden size, V
vocabulary.
"""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_qwen3_encdec import Varlen, attend, project_key_value, project_query
from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from .loss_qwen3_encdec import chunked_cross_entropy


class Qwen3SharedEmbedding(nn.Embedding):
    """One matrix for encoder input, decoder input and LM head. Every use calls the module."""

    def __init__(self, config: Qwen3EncoderDecoderConfig):
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)

    def forward(
        self, input: torch.Tensor, labels: torch.Tensor | None = None, **loss_options: Any
    ) -> Any:
        """Embed ids, or turn states into logits or a loss.

        Args:
            input: [...] int64 ids, or [..., E] states.
            labels: [...] int64, with states only: compute `chunked_cross_entropy`.

        Returns:
            Embeddings [..., E]; logits [..., V]; or the loss followed by the token losses,
            [1 + tokens] fp32. Always one tensor, as hooks on an embedding expect.
        """
        if not input.is_floating_point():
            return super().forward(input)
        if self.training and getattr(self, "neftune_noise_alpha", None):
            raise ValueError("neftune_noise_alpha is not supported: it would reach the LM head")
        if labels is None:
            return F.linear(input, self.weight)
        loss, token_losses = chunked_cross_entropy(input, self.weight, labels, **loss_options)
        return torch.cat([loss[None], token_losses.flatten()])


class Qwen3EncoderAttention(Qwen3Attention):
    """Qwen3's attention without its causal mask."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        packed: Varlen | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map [B, S, E] to [B, S, E], and the weights [B, H, S, S] if the backend returns them."""
        query = project_query(self, hidden_states)
        key, value = project_key_value(self, hidden_states)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        output, weights = attend(self, query, key, value, attention_mask, packed)
        return self.o_proj(output.flatten(2)), weights


class Qwen3EncoderLayer(Qwen3DecoderLayer):
    """Qwen3's layer with bidirectional attention."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = Qwen3EncoderAttention(config, layer_idx)


class Qwen3EncoderDecoderPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization shared by encoder, decoder and the whole model."""

    config: Qwen3EncoderDecoderConfig
    base_model_prefix = "model"
    _input_embed_layer = "shared"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen3EncoderLayer", "Qwen3MergedDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "source_gate", None) is not None:
            init.zeros_(module.source_gate)
            init.ones_(module.source_scale)


class Qwen3Stack(Qwen3EncoderDecoderPreTrainedModel):
    """Layers, final norm and rotary embedding of either stack.

    The embedding belongs to the enclosing model and is looked up there, under the name `shared`, at
    each call, so a wrapper that replaces it takes effect everywhere.

    Args:
        owner: The module whose `shared` embeds ids; without it the stack takes only embeddings.
    """

    def __init__(
        self,
        config: Qwen3EncoderDecoderConfig,
        layer_class: type[nn.Module],
        num_layers: int,
        owner: nn.Module | None,
    ):
        super().__init__(config)
        self.layers = nn.ModuleList(layer_class(config, i) for i in range(num_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.owner: Any = (owner,)  # in a tuple, so it is not registered as a submodule

    def get_input_embeddings(self) -> Any:
        """Return the embedding of the enclosing model."""
        return None if self.owner[0] is None else self.owner[0].shared

    def embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, prefix: str = ""
    ) -> torch.Tensor:
        """Return [B, L, E] embeddings, given exactly one of [B, L] ids and [B, L, E] embeddings."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"pass exactly one of {prefix}input_ids and {prefix}inputs_embeds")
        if inputs_embeds is not None:
            return inputs_embeds
        if self.owner[0] is None:
            raise ValueError(f"this stack has no embedding; pass {prefix}inputs_embeds")
        return self.owner[0].shared(input_ids)


class Qwen3Encoder(Qwen3Stack):
    """Encoder stack: token ids to bidirectional states after the final norm."""

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": Qwen3EncoderLayer,
        "attentions": OutputRecorder(Qwen3EncoderAttention, index=1),
    }

    def __init__(self, config: Qwen3EncoderDecoderConfig, owner: nn.Module | None = None):
        super().__init__(config, Qwen3EncoderLayer, config.num_hidden_layers, owner)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        # padded form
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        # packed form
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutput:
        """Encode a padded or a packed batch.

        Args:
            input_ids: [B, S] int64; packed, [1, M].
            attention_mask: [B, S], 1 real and 0 padding; or a [B, 1, S, S] mask, used as is.
            position_ids: [B, S]; counted from 0 along the row by default (rotary embeddings are
                relative, so left padding needs no other). Packed, [1, M], from 0 in every text.
            inputs_embeds: [B, S, E] in place of `input_ids`.
            cu_seqlens: [D + 1] int32, cumulative lengths of the texts of a packed batch.
            max_seqlen: Longest of them.

        Returns:
            `last_hidden_state` [B, S, E]; packed, [1, M, E].

        Raises:
            ValueError: both or neither of ids and embeddings, a mask of the wrong shape, or an
                incomplete packed batch.
        """
        states = self.embed(input_ids, inputs_embeds)
        batch, length = states.shape[:2]
        packed = mask = None
        if cu_seqlens is None and max_seqlen is None:
            if getattr(attention_mask, "ndim", 2) != 4:
                check_shape("attention_mask", attention_mask, (batch, length))
            check_shape("position_ids", position_ids, (batch, length), (1, length))
            mask = create_bidirectional_mask(self.config, states, attention_mask)
        else:
            ends, most = check_packed(length, attention_mask, position_ids, cu_seqlens, max_seqlen)
            packed = Varlen(ends, ends, most, most)
            packed.prepare(self.config._attn_implementation, states, length)
        if position_ids is None:
            position_ids = torch.arange(length, device=states.device)[None]
        position_embeddings = self.rotary_emb(states, position_ids)
        for layer in self.layers:
            states = layer(
                states, mask, position_embeddings=position_embeddings, packed=packed, **kwargs
            )
        return BaseModelOutput(last_hidden_state=self.norm(states))


def check_shape(name: str, tensor: Any, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError if a tensor has none of the `shapes`; None is not checked."""
    if isinstance(tensor, torch.Tensor) and tensor.shape not in shapes:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but these inputs require {tuple(shapes[0])}"
        )


def check_packed(
    tokens: int, mask: Any, position_ids: Any, cu_seqlens: Any, max_seqlen: Any, prefix: str = ""
) -> tuple[torch.Tensor, int]:
    """Return the bounds; raise ValueError unless one side of a packed batch is complete."""
    if mask is not None:
        raise ValueError(f"a packed batch has no padding; omit {prefix}attention_mask")
    if position_ids is None or cu_seqlens is None or max_seqlen is None:
        needed = ", ".join(prefix + name for name in ("position_ids", "cu_seqlens", "max_seqlen"))
        raise ValueError(f"a packed batch needs {needed}")
    check_shape(f"{prefix}position_ids", position_ids, (1, tokens))
    # Elsewhere, reading values would synchronize with the device or break the graph.
    readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and (end := int(cu_seqlens[-1])) != tokens:
        raise ValueError(
            f"{prefix}cu_seqlens ends at {end}, but the packed batch has {tokens} tokens"
        )
    return cu_seqlens, max_seqlen


class Qwen3EncoderModel(Qwen3EncoderDecoderPreTrainedModel):
    """The encoder alone; loads from an encoder-decoder's folder and ignores its decoder."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\."]  # noqa: RUF012

    def __init__(self, config: Qwen3EncoderDecoderConfig):
        super().__init__(config)
        self.shared = Qwen3SharedEmbedding(config)
        self.encoder = Qwen3Encoder(config, self)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> BaseModelOutput:
        """Encode a batch; the arguments are those of `Qwen3Encoder.forward`."""
        self.encoder.owner = (self,)  # a replica of DataParallel has the original's
        return self.encoder(input_ids, attention_mask, return_dict=True, **inputs)


class Qwen3EncoderClassifier(Qwen3EncoderDecoderPreTrainedModel):
    """The encoder with one linear layer on its states, which a subclass may pool first."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\."]  # noqa: RUF012
    output_class: type[ModelOutput] = TokenClassifierOutput

    def __init__(self, config: Qwen3EncoderDecoderConfig):
        super().__init__(config)
        self.model = Qwen3EncoderModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def pool(self, states: torch.Tensor, mask: torch.Tensor | None, **inputs: Any) -> torch.Tensor:
        """Return what is classified: here the [B, S, E] states."""
        return states

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> ModelOutput:
        """Classify texts or tokens.

        Args:
            labels: int64, [B] for texts and [B, S] for tokens (-100 is ignored); float for
                regression and for multi-label classification.
            num_items_in_batch: Labels in the whole optimizer step; divides the summed loss.

        Returns:
            `logits` [B, num_labels] or [B, S, num_labels] and, with labels, `loss`.
        """
        output = self.model(input_ids, attention_mask, return_dict=True, **kwargs)
        logits = self.score(self.pool(output.last_hidden_state, attention_mask, **kwargs))
        loss = None
        if labels is not None:
            pair = (labels, logits) if logits.dim() == 2 else (logits, labels)
            loss = self.loss_function(*pair, self.config, num_items_in_batch=num_items_in_batch)
            if labels.is_floating_point() and num_items_in_batch is not None:
                loss = loss * labels.numel() / num_items_in_batch  # it is a mean over this call
        return self.output_class(loss, logits, output.hidden_states, output.attentions)


class Qwen3EncoderForSequenceClassification(Qwen3EncoderClassifier):
    """One linear layer on the mean of a text's states, in a padded batch."""

    output_class = SequenceClassifierOutput

    def pool(self, states: torch.Tensor, mask: torch.Tensor | None, **inputs: Any) -> torch.Tensor:
        """Average [B, S, E] states over the real tokens to [B, E]."""
        if "cu_seqlens" in inputs or (mask is not None and mask.dim() != 2):
            raise ValueError("a text classifier takes padded batches with a mask [B, S]")
        if mask is None:
            return states.mean(1)
        kept = mask.float()[..., None]  # a sum in fp16 overflows
        return ((states * kept).sum(1) / kept.sum(1).clamp(min=1)).to(states.dtype)


class Qwen3EncoderForTokenClassification(Qwen3EncoderClassifier):
    """One linear layer on every state."""


__all__ = [
    "Qwen3Encoder",
    "Qwen3EncoderDecoderPreTrainedModel",
    "Qwen3EncoderForSequenceClassification",
    "Qwen3EncoderForTokenClassification",
    "Qwen3EncoderModel",
]
