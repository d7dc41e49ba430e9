# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""Encoder, decoder and one embedding matrix: `Qwen3ForSeq2SeqLM`.

- One embedding module serves encoder input, decoder input and, as a plain matrix product, the LM
  head. It is one object, not two modules that share a parameter: FSDP2 shards it once and it is
  saved once.
- With labels, only real tokens are computed (padding costs nothing, packed rows stay apart), the
  right shift happens here and nowhere else, and the loss over the large vocabulary is taken chunk
  by chunk in fp32.

Shapes: B batch, S source length, T target length, N real target tokens, V vocabulary, E hidden
size.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Unpack

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import GenerationMixin
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from .modeling_qwen3_decoder import MergedSegments, Qwen3MergedDecoder
from .modeling_qwen3_encoder import (
    CACHE_FIELD,
    Qwen3Encoder,
    Qwen3EncoderDecoderPreTrainedModel,
    Segments,
    are_few_rows,
    is_ragged,
    move,
    multiply_few_rows,
    one_cache,
)

IGNORED = -100


@dataclass
class Qwen3Seq2SeqLMOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` and `token_losses`:

    [B, T] fp32 negative log-likelihoods in nats, detached, 0 where ignored.
    """

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
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
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
            cache=one_cache(cache, past_key_values),
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

    def look_up(self, *ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Embeddings [..., E] of each [...] int64, and last the [V, E] matrix that the head is to
        multiply by.

        The gradients of embeddings taken here are added to that of the head's product, row by row,
        where autograd makes a matrix of zeros for each. Not on CUDA, where it has not been
        measured, nor where somebody has wrapped, hooked or sharded the embedding.
        """
        shared = self.shared
        touched = shared._forward_hooks or shared._forward_pre_hooks or "forward" in vars(shared)
        touched = touched or type(shared) is not nn.Embedding or torch.compiler.is_compiling()
        if touched or shared.weight.device.type != "cpu" or not torch.is_grad_enabled():
            return *(shared(part) for part in ids), shared.weight
        return _LookUp.apply(shared.weight, shared.padding_idx, *ids)

    def forward_ragged(
        self,
        inputs_embeds: torch.Tensor,
        source: Segments,
        decoder_inputs_embeds: torch.Tensor,
        target: Segments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute rows of real tokens:

        [1, M, E] and [1, N, E] -> target states [1, N, E], source states [1, M, E].
        """
        merged = MergedSegments(source, target)
        encoded = self.encoder(inputs_embeds=inputs_embeds, segments=source).last_hidden_state
        decoded = self.decoder(
            inputs_embeds=decoder_inputs_embeds,
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
        encoder_labels: torch.Tensor | None = None,
        encoder_loss_weight: float = 1.0,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        loss_implementation: str = "chunked",
        return_logits: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> Qwen3Seq2SeqLMOutput:
        """Loss and logits.

        Args:
            input_ids: [B, S] int64 source.
            attention_mask: [B, S]; 0 padding, 1 real. In packed rows, with labels, k is the k-th
                document of the row. Masks may stay on the CPU: then, in training, no step waits for
                the GPU to say how rows are divided.
            labels: [B, T] int64 target, not shifted; -100 is ignored.
            decoder_attention_mask: [B, T] like `attention_mask`; without it, a row's target ends
                with its last label.
            num_items_in_batch: label tokens of the whole optimizer step, over micro-batches and
                ranks: the loss is the sum over label tokens divided by it. None divides by this
                call's own label tokens.
            encoder_labels: [B, S] int64, for an auxiliary masked next-token loss on the encoder
                (MNTP, arXiv 2404.05961): the original id where `input_ids` has a mask, else -100.
                As in a causal model, the state before a token predicts it, and the first token of a
                document cannot be asked for.
            encoder_loss_weight: of the sum over encoder labels, which is added to the sum over
                labels.
            z_loss: coefficient of the squared log-sum-exp of a token's logits (PaLM, arXiv
                2204.02311, section 5).
            label_smoothing: share of the target spread over the whole vocabulary.
            loss_implementation: "chunked"; on CUDA also "liger" or "cce", where that package is
                installed.
            return_logits: whether to compute [B, T, V] logits beside the loss; by default outside
                training only.
            logits_to_keep: logits of the last positions only; 0 keeps all.

        Returns:
            `loss` (fp32 scalar) and `token_losses` with labels (none with "liger"); `logits`;
                cache, states and attentions as asked. Where logits are returned, the loss is taken from
                them.

        Raises:
            ValueError: no decoder input, or rows with different numbers of source and target
                documents.
        """
        cache = one_cache(cache, past_key_values)
        given = attention_mask, decoder_attention_mask
        if device := next(
            (part.device for part in (labels, decoder_input_ids, input_ids) if part is not None),
            None,
        ):
            attention_mask, decoder_attention_mask = (
                move(mask, device) if isinstance(mask, torch.Tensor) else mask for mask in given
            )
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels, decoder_attention_mask)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("give labels, decoder_input_ids or decoder_inputs_embeds")
        source = target = None
        matrix: torch.Tensor | None = None
        if labels is not None and input_ids is not None and decoder_input_ids is not None:
            plain = cache is None and position_ids is None and decoder_position_ids is None
            if plain and not self._wants_more(kwargs):
                source_mask, target_mask = given
                if target_mask is None:
                    source_mask, target_mask = attention_mask, _target_mask(labels)
                if is_ragged(source_mask) or is_ragged(target_mask):
                    if source_mask is None:
                        source_mask = torch.ones_like(input_ids, device=target_mask.device)
                    source = Segments.from_mask(source_mask, device)
                    target = Segments.from_mask(target_mask, device)
                    labels = labels.masked_fill(move(target_mask == 0, labels.device), IGNORED)
                    input_ids, decoder_input_ids = (
                        source.gather(input_ids),
                        target.gather(decoder_input_ids),
                    )
            # The same calls whatever the rows of a rank are like, since those of a sharded
            # embedding are collective.
            inputs_embeds, decoder_inputs_embeds, matrix = self.model.look_up(
                input_ids, decoder_input_ids
            )
            input_ids = decoder_input_ids = None
            if source is not None and target is not None:
                states, encoded = self.model.forward_ragged(
                    inputs_embeds, source, decoder_inputs_embeds, target
                )
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
                use_cache=False if use_cache and labels is not None else use_cache,
                return_dict=True,
                **kwargs,
            )
            states, encoded = outputs.last_hidden_state, outputs.encoder_last_hidden_state
        matrix = self.model.shared.weight if matrix is None else matrix

        loss: torch.Tensor | None = None
        token_losses = logits = None
        if return_logits if return_logits is not None else labels is None or not self.training:
            padded = states if target is None else target.scatter(states)
            logits = vocabulary_logits(padded[:, -logits_to_keep:], matrix)
        options: dict[str, Any] = {"z_loss": z_loss, "label_smoothing": label_smoothing}
        if labels is not None:
            if num_items_in_batch is None:
                num_items_in_batch = (labels != IGNORED).sum().clamp(min=1)
            if logits is not None and not logits_to_keep:
                loss, token_losses = dense_cross_entropy(
                    logits, labels, num_items_in_batch, **options
                )
            else:
                flat_labels = labels if target is None else target.gather(labels)
                loss, token_losses = linear_cross_entropy(
                    loss_implementation, states, matrix, flat_labels, num_items_in_batch, **options
                )
                if target is not None and token_losses is not None:
                    token_losses = target.scatter(token_losses)
        if loss is not None and encoder_labels is not None:
            wanted = encoder_labels if source is None else source.gather(encoder_labels)
            places = (
                torch.arange(wanted.shape[1], device=wanted.device)
                if source is None
                else source.position_ids
            )
            wanted = wanted.masked_fill(places == 0, IGNORED).roll(-1, dims=-1)
            kept = wanted != IGNORED  # few of them
            encoder_loss, _ = linear_cross_entropy(
                loss_implementation,
                encoded[kept],
                matrix,
                wanted[kept],
                num_items_in_batch,
                **options,
            )
            loss = loss + encoder_loss_weight * encoder_loss
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

    @torch.no_grad()
    def fill(self, text: str | list[str], tokenizer: Any, **generate_options: Any) -> Any:
        """Fill the `<extra_id_N>` of a text with what the model generates for them.

        The model answers `<extra_id_0> first span <extra_id_1> second span ...`; spans may come in
        any order, one that it repeats counts the first time, one that it leaves out stays as it is
        in the text. Every other control token that the text spells is text.

        Args:
            text: One text or a list of texts.
            tokenizer: A `Qwen3EncoderDecoderTokenizer`.
            generate_options: As for `generate`; `max_new_tokens` is 256 by default.

        Returns:
            The filled text, or a list of them.

        Raises:
            ValueError: a text has no `<extra_id_N>`, or one that the tokenizer does not have.
        """
        texts = [text] if isinstance(text, str) else list(text)
        batch = tokenizer.encode_with_sentinels(texts).to(self.device)
        generated = self.generate(**batch, **{"max_new_tokens": 256, **generate_options})
        copies = len(generated) // len(texts)
        filled = [
            tokenizer.put_spans(texts[n // copies], ids) for n, ids in enumerate(generated.tolist())
        ]
        return filled[0] if isinstance(text, str) and copies == 1 else filled

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """[B, T] labels -> [B, T] decoder input: the start token, then the labels but the last."""
        return self._shift_right(labels, None)

    def _shift_right(self, labels: torch.Tensor, segment_mask: torch.Tensor | None) -> torch.Tensor:
        """Shift each document of each row by one, putting the start token before it;

        ignored labels become padding.
        """
        shifted = labels.roll(1, dims=-1)
        shifted = shifted.masked_fill(shifted == IGNORED, self.config.pad_token_id or 0)
        first = torch.zeros_like(labels, dtype=torch.bool)
        first[:, 0] = True
        if segment_mask is not None:
            first[:, 1:] = segment_mask[:, 1:] != segment_mask[:, :-1]
        return shifted.masked_fill(first, self.config.decoder_start_token_id or 0)


class _LookUp(torch.autograd.Function):
    """`Qwen3EncoderDecoderModel.look_up` with gradients."""

    @staticmethod
    def forward(ctx, weight, padding_idx, *ids):
        ctx.save_for_backward(*ids)
        ctx.padding_idx = padding_idx
        return *(nn.functional.embedding(part, weight) for part in ids), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        weight_grad = grads[-1]
        ids = torch.cat([part.flatten() for part in ctx.saved_tensors])
        rows, place = ids.unique(return_inverse=True)
        of_tokens = torch.cat([grad.flatten(0, -2) for grad in grads[:-1]])
        of_tokens = of_tokens.to(torch.promote_types(of_tokens.dtype, torch.float32))
        sums = of_tokens.new_zeros(len(rows), of_tokens.shape[1]).index_add_(0, place, of_tokens)
        if ctx.padding_idx is not None:
            sums[rows == ctx.padding_idx] = 0
        weight_grad.index_add_(0, rows, sums.to(weight_grad.dtype))  # in place: nobody else has it
        return weight_grad, None, *(None for _ in ctx.saved_tensors)


def _target_mask(labels: torch.Tensor) -> torch.Tensor:
    """[B, T] labels -> 1 up to a row's last label and at its first place, so that no row is without
    a target.
    """
    real = (labels != IGNORED).long()
    mask = real.flip(-1).cummax(-1).values.flip(-1)
    mask[:, 0] = 1
    return mask


def vocabulary_logits(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, T, E] states and the [V, E] embedding -> [B, T, V] logits.

    A decoding step has a few rows for a matrix of a gigabyte, so reading it is what it costs. On a
    CPU the ordinary product reads it about twice, in fp32 and with AMX; other forms of it do so
    once.
    """
    if are_few_rows(states, weight):
        several = states.numel() > states.shape[-1]
        if weight.dtype == torch.float32 or (
            several and torch.cpu.get_capabilities().get("amx_bf16")
        ):
            return multiply_few_rows(states, weight)
    return nn.functional.linear(states, weight)


def linear_cross_entropy(
    implementation: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of `hidden @ weight.T` by `chunked_cross_entropy` or by another project's CUDA
    kernel.

    Raises:
        ValueError: the implementation is not known, not installed, needs CUDA, or cannot do what is
            asked for.
    """
    if implementation == "chunked":
        return chunked_cross_entropy(hidden, weight, labels, num_items, z_loss, label_smoothing)
    packages = {"liger": "liger-kernel", "cce": "cut-cross-entropy"}
    if implementation not in packages:
        raise ValueError(
            f"loss_implementation={implementation!r} is not one of chunked, {', '.join(packages)}"
        )
    if not hidden.is_cuda:
        raise ValueError(
            f"loss_implementation={implementation!r} runs on CUDA only; 'chunked' runs everywhere"
        )
    dtype = _compute_dtype(hidden)
    flat, flat_labels = hidden.flatten(0, -2).to(dtype), labels.flatten()
    weight = weight.to(dtype)
    if num_items is None:
        num_items = (labels != IGNORED).sum().clamp(min=1)
    try:
        if implementation == "liger":
            loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
                ignore_index=IGNORED,
                reduction="sum",
                lse_square_scale=z_loss,
                label_smoothing=label_smoothing,
            )
            return loss(weight, flat, flat_labels).float() / num_items, None
        cut_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError:
        raise ValueError(
            f"loss_implementation={implementation!r} needs the package {packages[implementation]}"
        ) from None
    if z_loss or label_smoothing:
        raise ValueError("loss_implementation='cce' has neither z_loss nor label_smoothing")
    losses = cut_cross_entropy(
        flat, weight, flat_labels, ignore_index=IGNORED, reduction="none"
    ).float()
    return losses.sum() / num_items, losses.detach().view(labels.shape)


def dense_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from logits [..., V] that exist anyway; see `chunked_cross_entropy`."""
    kept = labels != IGNORED
    logits = logits.float()
    log_sum = logits.logsumexp(-1)
    target = logits.gather(-1, labels.masked_fill(~kept, 0)[..., None]).squeeze(-1)
    objective = log_sum - (1 - label_smoothing) * target + z_loss * log_sum.square()
    if label_smoothing:
        objective = objective - label_smoothing * logits.mean(-1)
    token_losses = (log_sum - target).detach().masked_fill(~kept, 0.0)
    return objective.masked_fill(~kept, 0.0).sum() / num_items, token_losses


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `hidden @ weight.T` without ever holding all the logits.

    Logits and log-sum-exp are fp32 whatever the dtype of the product; gradients are formed in the
    forward pass, chunk by chunk, as in Liger's and Apple's fused losses, and become that of the
    weight in place: a second backward pass through the same loss (`retain_graph`) raises
    RuntimeError.

    Args:
        hidden: [..., E].
        weight: [V, E].
        labels: [...] int64, -100 is ignored.
        num_items: divisor of the sum; None takes the number of labels that are not ignored.
        z_loss: adds this times the squared log-sum-exp of every token.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        chunk: tokens whose logits exist at a time; by default what suits the device.

    Returns:
        Loss (fp32 scalar, differentiable), and the detached fp32 negative log-likelihood of every
        token in the shape of `labels`, without z-loss and smoothing, 0 where ignored.
    """
    states, flat = hidden.flatten(0, -2), labels.flatten()
    if num_items is None:
        num_items = (flat != IGNORED).sum().clamp(min=1)
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.to(hidden.device)
    chunk = chunk or loss_chunk(hidden.device.type)
    if hidden.is_cuda:  # to know which are ignored, the CPU would have to wait
        total, losses = _ChunkedCrossEntropy.apply(
            states, weight, flat, chunk, z_loss, label_smoothing
        )
        return total / num_items, losses.view(labels.shape)
    kept = (flat != IGNORED).nonzero().squeeze(1)
    total, losses = _ChunkedCrossEntropy.apply(
        states[kept], weight, flat[kept], chunk, z_loss, label_smoothing
    )
    token_losses = losses.new_zeros(flat.shape).index_copy(0, kept, losses).view(labels.shape)
    return total / num_items, token_losses


def loss_chunk(device_type: str) -> int:
    """Tokens whose logits exist at a time.

    A chunk reads and writes the whole matrix' gradient, which a GPU notices.
    """
    return 2048 if device_type == "cuda" else 512


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _form_gradient(
    logits: torch.Tensor, labels: torch.Tensor, z_loss: float, smoothing: float, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a chunk, [C] fp32 and 0 where ignored, and the sum of z-loss and smoothing.

    The [C, V] logits become the gradient of all of these:
    softmax (1 + 2 z log_sum) - (1 - smoothing) one-hot - smoothing / V.
    """
    kept = labels != IGNORED
    target = labels.masked_fill(~kept, 0)[:, None]
    logit = logits.gather(1, target).float()
    place = logits if logits.dtype == torch.float32 and not torch.compiler.is_compiling() else None
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float32, out=place)
    of_target = log_probs.gather(1, target)
    losses = (-of_target.squeeze(1)).masked_fill(~kept, 0.0)
    extra = losses.new_zeros(())
    log_sum = logit - of_target
    if z_loss:
        extra = extra + z_loss * log_sum.square().masked_fill(~kept[:, None], 0.0).sum()
    if smoothing:
        extra = (
            extra
            + smoothing * (of_target.squeeze(1) - log_probs.mean(1)).masked_fill(~kept, 0.0).sum()
        )
    if not gradients:
        return losses, extra
    if torch.compiler.is_compiling():  # one pass over the logits, another to write the gradient
        gradient = log_probs.exp() * (1 + 2 * z_loss * log_sum) - smoothing / logits.shape[1]
        chosen = torch.arange(logits.shape[1], device=logits.device) == target
        gradient = torch.where(chosen, gradient - (1 - smoothing), gradient)
        logits.copy_(torch.where(kept[:, None], gradient, 0.0))
        return losses, extra
    gradient = log_probs.exp_()
    if z_loss:
        gradient *= 1 + 2 * z_loss * log_sum
    if smoothing:
        gradient -= smoothing / gradient.shape[1]
    gradient.scatter_add_(1, target, torch.full_like(of_target, smoothing - 1.0))
    gradient[~kept] = 0.0
    if gradient is not logits:
        logits.copy_(gradient)
    return losses, extra


@cache
def _compiled_form_gradient() -> Any:
    return torch.compile(_form_gradient, dynamic=True)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, z_loss, smoothing):
        kind, classes = hidden.device.type, len(weight)
        dtype = _compute_dtype(hidden)
        gradients = any(ctx.needs_input_grad[:2])
        with torch.autocast(kind, enabled=False):
            if hidden.is_cuda:  # tensor cores want a multiple of 8 classes; more are never chosen, nor have a gradient
                matrix = weight.new_zeros(classes + -classes % 64, weight.shape[1], dtype=dtype)
                matrix[:classes] = weight
            else:
                matrix = weight.to(dtype)
            losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
            extra = torch.zeros(
                (), dtype=torch.float32, device=hidden.device
            )  # of z-loss and smoothing
            hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            weight_grad = (
                torch.zeros_like(matrix, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            )
            # On a CPU in slices that stay in cache while they are added; on a GPU at once.
            rows = 4096 if kind == "cpu" else len(matrix)
            form_gradient = (
                _compiled_form_gradient()
                if hidden.is_cuda and find_spec("triton")
                else _form_gradient
            )
            for start in range(0, hidden.shape[0], chunk):
                part = slice(start, start + chunk)
                states = hidden[part].to(dtype)
                logits = states @ matrix.T  # (chunk, V)
                losses[part], more = form_gradient(
                    logits[:, :classes], labels[part], z_loss, smoothing, gradients
                )
                extra += more
                if hidden_grad is not None:
                    hidden_grad[part] = logits @ matrix
                if weight_grad is not None and dtype == torch.float32:
                    torch.addmm(weight_grad, logits.T, states, out=weight_grad)
                elif weight_grad is not None:
                    for total, columns in zip(
                        weight_grad.split(rows), logits.split(rows, dim=1), strict=True
                    ):
                        total += columns.T @ states
        if (
            weight_grad is not None
        ):  # no view: autograd adds to it in place only if nothing else holds its storage
            weight_grad = weight_grad[:classes].detach()
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum() + extra, losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * grad_total.to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(grad_total).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None


__all__ = ["Qwen3EncoderDecoderModel", "Qwen3ForSeq2SeqLM"]
