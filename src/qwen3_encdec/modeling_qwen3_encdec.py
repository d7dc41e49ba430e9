# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""Encoder, decoder and one embedding matrix: `Qwen3ForSeq2SeqLM`.

- One embedding module serves encoder input, decoder input and LM head. It has one name and is
  always called, so FSDP2 shards it once, it is saved once, and wrappers see every use.
- Labels are shifted right here and nowhere else. The loss over the large vocabulary is computed in
  chunks, in fp32.
- A batch is padded (`[B, S]` with masks) or packed (`[1, M]` with cumulative lengths, made by
  `data.collate.collate_packed`). Outputs have the form of the inputs.

Shapes: B batch, S source length, T target length, M source and N target tokens of a packed batch of
D documents, V vocabulary, E hidden size.
"""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .attention_qwen3_encdec import Varlen
from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from .loss_qwen3_encdec import IGNORED, dense_cross_entropy
from .modeling_qwen3_decoder import Qwen3MergedDecoder, SourceDynamicCache, SourceStaticCache
from .modeling_qwen3_encoder import (
    Qwen3Encoder,
    Qwen3EncoderDecoderPreTrainedModel,
    Qwen3SharedEmbedding,
    check_shape,
)

# Arguments that transformers passes to any model.
_TOLERATED = {"cache_position", "output_attentions", "output_hidden_states", "return_dict"}


@dataclass
class Qwen3Seq2SeqLMOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` and `token_losses`: [B, T] fp32 in nats, detached, 0 where ignored."""

    token_losses: torch.Tensor | None = None


class Qwen3EncoderDecoderModel(Qwen3EncoderDecoderPreTrainedModel):
    """Encoder and merged-attention decoder around one embedding, without a head."""

    def __init__(self, config: Qwen3EncoderDecoderConfig):
        super().__init__(config)
        self.shared = Qwen3SharedEmbedding(config)
        self.encoder = Qwen3Encoder(config, self)
        self.decoder = Qwen3MergedDecoder(config, self)
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        # encoder inputs
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        # decoder inputs
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: Any = None,
        decoder_position_ids: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        # packed form
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        decoder_cu_seqlens: torch.Tensor | None = None,
        decoder_max_seqlen: int | None = None,
        key_order: torch.Tensor | None = None,
        # cache inputs
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> Seq2SeqModelOutput:
        """Encode and decode; the arguments are those of `Qwen3ForSeq2SeqLM`."""
        self.encoder.owner = self.decoder.owner = (self,)  # DataParallel copies the original's
        packed = _packed_keys(
            cu_seqlens, max_seqlen, decoder_cu_seqlens, decoder_max_seqlen, key_order
        )
        if packed is not None and getattr(self, "_is_replica", False):
            raise ValueError("DataParallel cuts packed batches apart; launch a process per GPU")
        encoder_output: Any = encoder_outputs
        if encoder_outputs is None:
            encoder_output = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                return_dict=True,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_output = BaseModelOutput(*encoder_outputs)
        encoded = encoder_output.last_hidden_state
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoded,
            encoder_attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            packed=packed,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            cache=decoder_outputs.cache,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoded,
            encoder_hidden_states=encoder_output.hidden_states,
            encoder_attentions=encoder_output.attentions,
        )


class Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderPreTrainedModel, GenerationMixin):
    """The encoder-decoder with its language-model head, which is the embedding itself.

    Arguments of `forward`:
        input_ids: [B, S] int64 source; packed, [1, M].
        attention_mask: [B, S], 1 real and 0 padding; none in a packed batch.
        position_ids: [B, S], from 0 along the row by default; packed, [1, M].
        encoder_outputs: Precomputed encoder output, used instead of encoding.
        decoder_input_ids: [B, T] int64; by default `labels` shifted right.
        decoder_attention_mask: [B, P + T], 1 real and 0 padding, required for left-padded
            targets. Or a 4D mask, see `Qwen3MergedDecoder.forward`.
        decoder_position_ids: [B, T], by default counted over the real tokens of the row.
        cu_seqlens, decoder_cu_seqlens: [D + 1] int32, cumulative lengths of the documents'
            sources and targets, for a packed batch.
        max_seqlen, decoder_max_seqlen: Longest source and longest target.
        key_order: [M + N] int64, sorts [all sources ; all targets] document by document.
        cache: Keys and values to read and extend.
        labels: [B, T] int64 target, not shifted, -100 is ignored; packed, [1, N].
        num_items_in_batch: Label tokens in the whole optimizer step, over micro-batches and
            ranks. The loss is the sum over label tokens divided by this number; None uses the
            label tokens of this call.
        encoder_targets: [B, S] int64, for an auxiliary masked next-token loss on the encoder
            (MNTP, arXiv 2404.05961): the original id where `input_ids` has a mask, else -100.
            As in a causal model, the state before a token predicts it, so the first token of
            a document cannot be a target.
        encoder_loss_weight: Weight of the sum over encoder targets in the total loss.
        z_loss: Weight of the squared log-sum-exp of each token's logits.
        return_logits: Return logits; by default, without labels or outside training.
        logits_to_keep: Number of last positions, or the positions, to keep; 0 keeps all.

    Returns:
        `loss` (fp32 scalar) and `token_losses` with labels; `logits` [B, T, V]; cache, states
        and attentions as asked.

    Raises:
        ValueError: missing or duplicate inputs, or shapes that do not fit.
        TypeError: an unknown argument.
    """

    def __init__(self, config: Qwen3EncoderDecoderConfig):
        super().__init__(config)
        self.model = Qwen3EncoderDecoderModel(config)
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        # encoder inputs
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        # decoder inputs
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: Any = None,
        decoder_position_ids: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        # packed form
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        decoder_cu_seqlens: torch.Tensor | None = None,
        decoder_max_seqlen: int | None = None,
        key_order: torch.Tensor | None = None,
        # cache inputs
        cache: Cache | None = None,
        use_cache: bool | None = None,
        # loss and logits
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        encoder_targets: torch.Tensor | None = None,
        encoder_loss_weight: float = 1.0,
        z_loss: float = 0.0,
        return_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> Qwen3Seq2SeqLMOutput:
        """Compute loss and logits; the arguments are documented on the class."""
        if unknown := sorted(kwargs.keys() - _TOLERATED):
            raise TypeError(f"unexpected argument {unknown[0]!r}")
        if labels is not None:
            use_cache = False if use_cache is None else use_cache
            if num_items_in_batch is None:
                num_items_in_batch = (labels != IGNORED).sum()
            elif not isinstance(num_items_in_batch, torch.Tensor):  # a copy would wait for the GPU
                num_items_in_batch = torch.full((), num_items_in_batch, device=labels.device)
            num_items_in_batch = num_items_in_batch.clamp(min=1).reshape(())  # DataParallel: [1]
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(
                    labels, decoder_attention_mask, decoder_cu_seqlens
                )
        elif encoder_targets is not None:
            raise ValueError("encoder_targets adds an auxiliary loss and requires labels")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_outputs=encoder_outputs,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            decoder_inputs_embeds=decoder_inputs_embeds,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            decoder_cu_seqlens=decoder_cu_seqlens,
            decoder_max_seqlen=decoder_max_seqlen,
            key_order=key_order,
            cache=cache,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        states = outputs.last_hidden_state
        loss = token_losses = logits = None
        last_only = isinstance(logits_to_keep, int)
        if return_logits is None:
            return_logits = labels is None or not self.training
        if return_logits:
            kept = slice(-logits_to_keep, None) if last_only else logits_to_keep
            logits = self.model.shared(states[:, kept])
        options: Any = {"num_items": num_items_in_batch, "z_loss": z_loss}
        if labels is not None:
            check_shape("labels", labels, states.shape[:2])
            if logits is not None and last_only and logits.shape[1] == labels.shape[1]:
                loss, token_losses = dense_cross_entropy(logits, labels, **options)
            else:
                losses = self.model.shared(states, labels=labels, **options)
                loss, token_losses = losses[0], losses[1:].detach().view(labels.shape)
            if encoder_targets is not None:
                encoded = outputs.encoder_last_hidden_state
                asked = _next_tokens(encoder_targets, encoded, position_ids)
                loss = loss + encoder_loss_weight * self.model.shared(encoded, asked, **options)[0]
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Qwen3Seq2SeqLMOutput(loss=loss, token_losses=token_losses, logits=logits, **rest)

    def prepare_decoder_input_ids_from_labels(
        self, labels: torch.Tensor, mask: Any = None, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Shift the labels of each row or packed document by one, the start token first.

        With a padding mask, the start token stands at the first real token. Ignored labels become
        padding.
        """
        shifted = labels.roll(1, dims=-1)
        shifted = shifted.masked_fill(shifted == IGNORED, self.config.pad_token_id or 0)
        places = torch.arange(labels.shape[1], device=labels.device)
        if cu_seqlens is not None:
            # Without `assume_unique`, many documents would be sorted by a synchronizing unique().
            first = torch.isin(places, cu_seqlens[:-1], assume_unique=True)[None]
        elif isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
            first = (mask.cumsum(-1) == 1) & (mask != 0)
        else:
            first = (places == 0)[None]
        return shifted.masked_fill(first, self.config.decoder_start_token_id or 0)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """Make room for the source, which is a prefix of the only cache."""
        source_length = model_kwargs["encoder_outputs"][0].shape[1]
        one_step = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        unset = model_kwargs.get("cache") is None and generation_config.cache_implementation is None
        # The steps of flash and Flex attention do not compile whole.
        compiles = self.device.type == "cuda" and self.config._attn_implementation == "sdpa"
        if compiles and one_step and unset and generation_config.use_cache:
            generation_config.cache_implementation = "static"  # compiled, as CUDA graphs
        length = source_length + max_cache_length
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, length
        )
        cache = model_kwargs.get("cache")
        own = getattr(cache, "self_attention_cache", cache)
        if isinstance(own, StaticCache) and (room := own.get_max_length()) < length:
            raise ValueError(
                f"the static cache holds {room} tokens, but source and target need {length}"
            )
        if own is not None and not isinstance(own, SourceDynamicCache | SourceStaticCache):
            kind = SourceStaticCache if isinstance(own, StaticCache) else SourceDynamicCache
            model_kwargs["cache"] = kind.around(own, source_length)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs: Any) -> Any:
        """Return the decoder's mask unchanged; `forward` prepends the source's."""
        return attention_mask

    @torch.no_grad()
    def fill(self, text: str | list[str], tokenizer: Any, **generate_options: Any) -> Any:
        """Fill each `<extra_id_N>` of a text with the span that the model generates for it.

        The model generates `<extra_id_0> first span <extra_id_1> second span ...`, in any order. Of
        a repeated sentinel the first span counts; an omitted one stays in the text. Any other
        control token spelled in the text is treated as text.

        Args:
            text: One text or a list of texts.
            tokenizer: A `Qwen3EncoderDecoderTokenizer`.
            generate_options: As for `generate`; unless they set a length or a generation config,
                `max_new_tokens` is 256.

        Returns:
            The filled text, or a list of them.

        Raises:
            ValueError: a text has no `<extra_id_N>`, or one that is not in the tokenizer, or the
                tokenizer is larger than the model.
        """
        if len(tokenizer) > (limit := self.config.vocab_size):
            raise ValueError(f"the tokenizer has {len(tokenizer)} entries, the model {limit} rows")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            return []
        device = "cpu" if self.device.type == "meta" else self.device  # offloaded: hooks move it
        batch = tokenizer.encode_with_sentinels(texts).to(device)
        if not generate_options.keys() & {"max_length", "generation_config"}:
            generate_options.setdefault("max_new_tokens", 256)
        generated = self.generate(**batch, **generate_options)
        sequences = getattr(generated, "sequences", generated)
        copies = len(sequences) // len(texts)
        rows = enumerate(sequences.tolist())
        filled = [tokenizer.put_spans(texts[n // copies], ids) for n, ids in rows]
        return filled[0] if isinstance(text, str) and copies == 1 else filled


def _packed_keys(sources, longest_source, targets, longest_target, order) -> Varlen | None:
    """Describe the merged keys of a packed batch; the sums are computed on the device."""
    bounds = sources, longest_source, targets, longest_target, order
    if all(bound is None for bound in bounds):
        return None
    if any(bound is None for bound in bounds):
        needed = "cu_seqlens, max_seqlen, decoder_cu_seqlens, decoder_max_seqlen, key_order"
        raise ValueError(f"a packed batch needs {needed}")
    if sources.shape != targets.shape:
        numbers = f"{len(sources) - 1} sources and {len(targets) - 1} targets"
        raise ValueError(f"a packed batch has {numbers}; pass one target per source")
    return Varlen(
        queries=targets,
        keys=sources + targets,
        longest_query=longest_target,
        longest_key=longest_source + longest_target,
        causal=True,
        order=order,
        inverse=order.argsort(),
    )


def _next_tokens(targets, encoded, position_ids) -> torch.Tensor:
    """Shift encoder targets so that the state before a token predicts it.

    The first token of a document has no state before it.
    """
    check_shape("encoder_targets", targets, encoded.shape[:2])
    if position_ids is None:
        position_ids = torch.arange(targets.shape[1], device=targets.device)[None]
    return targets.masked_fill(position_ids == 0, IGNORED).roll(-1, dims=-1)


__all__ = ["Qwen3EncoderDecoderModel", "Qwen3ForSeq2SeqLM"]
