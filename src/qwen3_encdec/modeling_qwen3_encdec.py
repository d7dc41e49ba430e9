"""Encoder, decoder and one embedding matrix: `Qwen3ForSeq2SeqLM`.

- One embedding module serves encoder input, decoder input and, as a plain matrix product, the LM head. It is one
  object, not two modules that share a parameter: FSDP2 shards it once and it is saved once.
- With labels, only real tokens are computed (padding costs nothing, packed rows stay apart), the right shift
  happens here and nowhere else, and the loss over the large vocabulary is taken chunk by chunk in fp32.

Shapes: B batch, S source length, T target length, N real target tokens, V vocabulary, E hidden size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import GenerationMixin
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import can_return_tuple

from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from .modeling_qwen3_decoder import MergedSegments, Qwen3MergedDecoder
from .modeling_qwen3_encoder import CACHE_FIELD, Qwen3Encoder, Qwen3EncoderDecoderPreTrainedModel, Segments, is_ragged

IGNORED = -100
LOSS_CHUNK = 512


@dataclass
class Qwen3Seq2SeqLMOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` and `token_losses`: [B, T] fp32 negative log-likelihoods in nats, detached, 0 where ignored."""

    token_losses: torch.Tensor | None = None


class Qwen3EncoderDecoderModel(Qwen3EncoderDecoderPreTrainedModel):
    """Encoder and merged-attention decoder around one embedding, without a head."""

    _tied_weights_keys = {  # noqa: RUF012
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: Qwen3EncoderDecoderConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.encoder = Qwen3Encoder(config, self.shared)
        self.decoder = Qwen3MergedDecoder(config, self.shared)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The one embedding module."""
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding everywhere it is used, keeping it one object."""
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    def get_encoder(self, modality: str | None = None) -> Qwen3Encoder:
        """The encoder."""
        return self.encoder

    def get_decoder(self) -> Qwen3MergedDecoder:
        """The decoder."""
        return self.decoder

    @can_return_tuple
    def forward(
        self,
        # encoder inputs
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        # decoder inputs
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        # cache inputs
        cache: EncoderDecoderCache | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """Padded batches in, padded states out; the arguments are those of the two stacks."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **kwargs,
            )
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            cache=cache,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE_FIELD: getattr(decoder_outputs, CACHE_FIELD)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def forward_ragged(
        self, input_ids: torch.Tensor, source: Segments, decoder_input_ids: torch.Tensor, target: Segments
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the real tokens only: [B, S] and [B, T] ids -> target states [1, N, E], source states [1, M, E]."""
        merged = MergedSegments(source, target)
        encoded = self.encoder(input_ids=source.gather(input_ids), segments=source).last_hidden_state
        decoded = self.decoder(
            input_ids=target.gather(decoder_input_ids),
            encoder_hidden_states=encoded,
            segments=merged,
            use_cache=False,
        )
        return decoded.last_hidden_state, encoded


class Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderPreTrainedModel, GenerationMixin):
    """The encoder-decoder with its language-model head, which is the embedding matrix itself."""

    _tied_weights_keys = {  # noqa: RUF012
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
    }

    def __init__(self, config: Qwen3EncoderDecoderConfig):
        super().__init__(config)
        self.model = Qwen3EncoderDecoderModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The one embedding module."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding everywhere it is used, keeping it one object."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        """None: the head has no module of its own, it is a product with the input embedding."""

    def get_encoder(self, modality: str | None = None) -> Qwen3Encoder:
        """The encoder."""
        return self.model.encoder

    def get_decoder(self) -> Qwen3MergedDecoder:
        """The decoder."""
        return self.model.decoder

    @can_return_tuple
    def forward(
        self,
        # encoder inputs
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        # decoder inputs
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        # cache inputs
        cache: EncoderDecoderCache | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        # loss inputs
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> Qwen3Seq2SeqLMOutput:
        """Loss and logits.

        Args:
            input_ids: [B, S] int64 source.
            attention_mask: [B, S]; 0 padding, 1 real. In packed rows, with labels, k is the k-th document of the row.
            labels: [B, T] int64 target, not shifted; -100 is ignored.
            decoder_attention_mask: [B, T] like `attention_mask`; without it, a row's target ends with its last label.
            num_items_in_batch: label tokens of the whole optimizer step, over micro-batches and ranks: the loss is
                the sum over label tokens divided by it. None divides by this call's own label tokens.
            return_logits: whether to compute [B, T, V] logits beside the loss; by default outside training only.
            logits_to_keep: logits of the last positions only; 0 keeps all.

        Returns:
            `loss` (fp32 scalar) and `token_losses` with labels; `logits`; cache, states and attentions as asked.

        Raises:
            ValueError: no decoder input, or rows with different numbers of source and target documents.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels, decoder_attention_mask)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("give labels, decoder_input_ids or decoder_inputs_embeds")
        target = None
        plain = (
            past_key_values is None
            and cache is None
            and position_ids is None
            and decoder_position_ids is None
            and not kwargs
        )
        if labels is not None and input_ids is not None and decoder_input_ids is not None and plain:
            target_mask = _target_mask(labels) if decoder_attention_mask is None else decoder_attention_mask
            if is_ragged(attention_mask) or is_ragged(target_mask):
                source = Segments.from_mask(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
                target = Segments.from_mask(target_mask)
                states, encoded = self.model.forward_ragged(input_ids, source, decoder_input_ids, target)
                outputs = Seq2SeqModelOutput(encoder_last_hidden_state=source.scatter(encoded))
        if target is None:
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
                cache=cache,
                past_key_values=past_key_values,
                use_cache=False if use_cache and labels is not None else use_cache,
                return_dict=True,
                **kwargs,
            )
            states = outputs.last_hidden_state

        loss = token_losses = None
        if labels is not None:
            flat_labels = labels if target is None else target.gather(labels)
            loss, token_losses = chunked_cross_entropy(
                states, self.model.shared.weight, flat_labels, num_items_in_batch
            )
            token_losses = token_losses if target is None else target.scatter(token_losses)
        logits = None
        if return_logits if return_logits is not None else labels is None or not self.training:
            states = states if target is None else target.scatter(states)
            logits = nn.functional.linear(states[:, -logits_to_keep:], self.model.shared.weight)
        return Qwen3Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            token_losses=token_losses,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """[B, T] labels -> [B, T] decoder input: the start token, then the labels but the last."""
        return self._shift_right(labels, None)

    def _shift_right(self, labels: torch.Tensor, segment_mask: torch.Tensor | None) -> torch.Tensor:
        """Shift each document of each row by one, putting the start token before it; ignored labels become padding."""
        shifted = labels.roll(1, dims=-1)
        shifted = shifted.masked_fill(shifted == IGNORED, self.config.pad_token_id or 0)
        first = torch.zeros_like(labels, dtype=torch.bool)
        first[:, 0] = True
        if segment_mask is not None:
            first[:, 1:] = segment_mask[:, 1:] != segment_mask[:, :-1]
        return shifted.masked_fill(first, self.config.decoder_start_token_id or 0)


def _target_mask(labels: torch.Tensor) -> torch.Tensor:
    """[B, T] labels -> 1 up to a row's last label and at its first place, so that no row is without a target."""
    real = (labels != IGNORED).long()
    mask = real.flip(-1).cummax(-1).values.flip(-1)
    mask[:, 0] = 1
    return mask


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    chunk: int = LOSS_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `hidden @ weight.T` without ever holding all the logits.

    Logits and log-sum-exp are fp32 whatever the dtype of the product; gradients are formed in the forward pass,
    chunk by chunk, as in Liger's and Apple's fused losses.

    Args:
        hidden: [..., E].
        weight: [V, E].
        labels: [...] int64, -100 is ignored.
        num_items: divisor of the sum; None takes the number of labels that are not ignored.
        chunk: tokens whose logits exist at a time.

    Returns:
        Loss (fp32 scalar, differentiable), and the detached fp32 loss of every token in the shape of `labels`, 0
        where ignored.
    """
    flat = labels.flatten()
    kept = (flat != IGNORED).nonzero().squeeze(1)
    total, losses = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2)[kept], weight, flat[kept], chunk)
    if num_items is None:
        num_items = max(kept.numel(), 1)
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.to(total.device)
    token_losses = losses.new_zeros(flat.shape).index_copy(0, kept, losses).view(labels.shape)
    return total / num_items, token_losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
            hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for start in range(0, hidden.shape[0], chunk):
                part = slice(start, start + chunk)
                states, target = hidden[part].to(dtype), labels[part, None]
                logits = (states @ matrix.T).float()  # (chunk, V)
                log_sum = logits.logsumexp(-1, keepdim=True)
                losses[part] = (log_sum - logits.gather(1, target)).squeeze(1)
                if hidden_grad is None and weight_grad is None:
                    continue
                # d loss / d logits = softmax - one-hot
                gradient = logits.sub_(log_sum).exp_()
                gradient.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                gradient = gradient.to(dtype)
                if hidden_grad is not None:
                    hidden_grad[part] = gradient @ matrix
                if weight_grad is not None:
                    # In slices: the product of a half-precision chunk would be a second matrix of V rows.
                    for rows, columns in zip(weight_grad.split(16_384), gradient.split(16_384, dim=1), strict=True):
                        rows += columns.T @ states
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * grad_total.to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(grad_total).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


__all__ = ["Qwen3EncoderDecoderModel", "Qwen3ForSeq2SeqLM"]
