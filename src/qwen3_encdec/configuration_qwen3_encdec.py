# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""Configuration of the Qwen3 encoder-decoder.

One flat configuration serves both stacks: encoder and decoder come from the same Qwen3 checkpoint
and differ only in their attention and, if asked for, in their number of layers. The defaults are
Qwen3-0.6B with 100 sentinels.
"""

import copy
import difflib
import inspect
from typing import Any

from transformers import PreTrainedConfig

# Written by transformers itself around any configuration; not ours to judge.
_TRANSFORMERS_FIELDS = {
    "_name_or_path", "_attn_implementation", "_commit_hash", "_experts_implementation", "_attn_implementation_internal",
    "_experts_implementation_internal", "_output_attentions", "_output_router_logits", "attn_implementation",
    "auto_map", "dtype", "experts_implementation", "is_decoder", "model_type", "name_or_path", "num_labels",
    "output_attentions", "quantization_config", "torch_dtype", "transformers_version", "use_return_dict",
    "return_dict", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "architectures", "rope_theta", "rope_scaling",
}  # fmt: skip

_PAD, _EOS = 151_643, 151_645


class Qwen3EncoderDecoderConfig(PreTrainedConfig):
    """Sizes and token ids of a `Qwen3ForSeq2SeqLM`.

    Args:
        vocab_size: Rows of the one shared embedding matrix, sentinels included.
        num_sentinel_tokens: `<extra_id_0>` ... are the last `num_sentinel_tokens` ids of the
            vocabulary.
        hidden_size: Width E of the residual stream, the same in encoder and decoder.
        intermediate_size: Width of the gated MLP.
        num_hidden_layers: Encoder layers.
        num_decoder_layers: Decoder layers; None means as many as the encoder has.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads; must divide `num_attention_heads`.
        head_dim: Width D of one head. Not `hidden_size / num_attention_heads` in Qwen3.
        hidden_act: Activation of the gated MLP.
        max_position_embeddings: Longest position the rotary embedding was trained for.
        initializer_range: Standard deviation of randomly initialized matrices.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope_parameters: As in transformers; `{"rope_type": "default", "rope_theta": 1e6}` in Qwen3.
        attention_bias: Biases in the attention projections; off in Qwen3.
        attention_dropout: Dropout on the attention weights while training.
        rope_on_encoder_keys: Rotate encoder keys in merged attention by their source positions; an
            ablation.
        source_gate: Scale the values that the decoder makes of encoder states, and multiply them by
            a learned gate per key head; off, the decoder is T5Gemma 2's.
        use_cache: Whether the decoder returns its key/value cache outside training.
        pad_token_id: `<|endoftext|>`; None in a vocabulary too small to have it.
        eos_token_id: `<|im_end|>`; differs from the padding, so that masking labels never hides an EOS. None like it.
        decoder_start_token_id: What the decoder sees before its first target token; the padding
            token.
        bos_token_id: None, Qwen3 has no BOS; accepted so that transformers can pass it.
        tie_word_embeddings: Always True: encoder input, decoder input and LM head are one matrix.
        is_encoder_decoder: Always True.

    Raises:
        ValueError: a field that no code reads, sizes that do not fit, or token ids outside the
            vocabulary.
    """

    model_type = "qwen3_encdec"
    keys_to_ignore_at_inference = ["cache", "token_losses"]  # noqa: RUF012
    default_theta = 1_000_000.0
    base_model_tp_plan = {  # noqa: RUF012
        f"{stack}.layers.*.{module}": style
        for stack in ("encoder", "decoder")
        for module, style in {
            "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
            "self_attn.q_norm": "replicated_with_grad_allreduce", "self_attn.k_norm": "replicated_with_grad_allreduce",
            "self_attn.o_proj": "rowwise", "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise",
            "mlp.down_proj": "rowwise",
        }.items()
    }  # fmt: skip

    def __init__(
        self,
        # vocabulary
        vocab_size: int = 152_036,
        num_sentinel_tokens: int = 100,
        # sizes
        hidden_size: int = 1024,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 28,
        num_decoder_layers: int | None = None,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        # details
        hidden_act: str = "silu",
        max_position_embeddings: int = 40_960,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        rope_on_encoder_keys: bool = False,
        source_gate: bool = False,
        use_cache: bool = True,
        # special tokens
        pad_token_id: int | None = _PAD,
        eos_token_id: int | list[int] | None = _EOS,
        decoder_start_token_id: int | None = None,
        bos_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        is_encoder_decoder: bool = True,
        **kwargs: Any,
    ):
        fields = {name for name in locals() if name not in ("self", "kwargs", "__class__")}
        self._reject_unknown(set(kwargs), fields)
        # A small vocabulary made by hand has neither; ids that somebody gave are checked instead.
        pad_token_id = None if pad_token_id == _PAD >= vocab_size else pad_token_id
        eos_token_id = None if eos_token_id == _EOS >= vocab_size else eos_token_id
        self.vocab_size = vocab_size
        self.num_sentinel_tokens = num_sentinel_tokens
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_decoder_layers = (
            num_hidden_layers if num_decoder_layers is None else num_decoder_layers
        )
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.rope_on_encoder_keys = rope_on_encoder_keys
        self.source_gate = source_gate
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id
        self.bos_token_id = bos_token_id
        self.decoder_start_token_id = (
            pad_token_id if decoder_start_token_id is None else decoder_start_token_id
        )
        self.tie_word_embeddings = tie_word_embeddings
        self.is_encoder_decoder = is_encoder_decoder
        self._check()
        super().__init__(
            pad_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            bos_token_id=bos_token_id,
            decoder_start_token_id=self.decoder_start_token_id,
            tie_word_embeddings=tie_word_embeddings,
            is_encoder_decoder=is_encoder_decoder,
            **kwargs,
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration of a saved one; another model's is refused by name."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"this is a {kind!r} model, not an encoder-decoder; make one of a dense Qwen3 with: "
                "python scripts/initialize_from_qwen3.py --qwen3-model FOLDER_OR_HUB_ID "
                "--output-dir ./qwen3-encdec-init"
            )
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> "Qwen3EncoderDecoderConfig":
        """This configuration; for `decoder`, with the decoder's number of layers, which sizes its
        cache.
        """
        if not decoder or encoder or self.num_decoder_layers == self.num_hidden_layers:
            return self
        config = copy.copy(self)
        config.num_hidden_layers = self.num_decoder_layers
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: fields of this model and of transformers, not others set on the
        object.
        """
        known = set(inspect.signature(type(self).__init__).parameters) | _known_to_transformers()
        saved = {name: value for name, value in super().to_dict().items() if name in known}
        return saved | {"tie_word_embeddings": True}

    @staticmethod
    def _reject_unknown(given: set[str], fields: set[str]) -> None:
        for name in sorted(given - fields - _known_to_transformers()):
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"configuration field {name!r} is not read by any code of this model{hint}"
            )

    def _check(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary embeddings turn pairs of dimensions"
            )
        if not self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=False: encoder input, decoder input and LM head are one matrix here"
            )
        if not self.is_encoder_decoder:
            raise ValueError(
                "is_encoder_decoder=False: the encoder alone is the class Qwen3EncoderModel"
            )
        if not 0 <= self.num_sentinel_tokens < self.vocab_size:
            raise ValueError(
                f"num_sentinel_tokens={self.num_sentinel_tokens} in a vocabulary of {self.vocab_size}"
            )
        for name in ("pad_token_id", "decoder_start_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}={token} is outside the vocabulary of {self.vocab_size}")

    @property
    def layer_types(self) -> list[str]:
        """Full attention in every layer; transformers' Qwen3 layers ask for it."""
        return ["full_attention"] * self.num_hidden_layers

    @property
    def sentinel_token_ids(self) -> range:
        """Ids of `<extra_id_0>` ... in order: the last ids of the vocabulary."""
        return range(self.vocab_size - self.num_sentinel_tokens, self.vocab_size)

    @classmethod
    def from_qwen3_config(
        cls, config: PreTrainedConfig, **changes: Any
    ) -> "Qwen3EncoderDecoderConfig":
        """The encoder-decoder configuration of a dense Qwen3 `config` (0.6B to 32B).

        Sentinels are appended to the source vocabulary: `vocab_size` grows by
        `num_sentinel_tokens`. `changes` override single fields (`num_sentinel_tokens`,
        `num_decoder_layers`, token ids, ...).

        Raises:
            ValueError: `config` is not a dense Qwen3, or it has sliding-window layers.
        """
        if config.model_type != "qwen3":
            raise ValueError(
                f"model_type {config.model_type!r} is not a dense Qwen3 (model_type 'qwen3')"
            )
        if "sliding_attention" in (getattr(config, "layer_types", None) or []):
            raise ValueError(
                "this Qwen3 has sliding-window layers; merged attention needs full attention in every layer"
            )
        fields: dict[str, Any] = {
            name: getattr(config, name)
            for name in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
                "attention_bias", "attention_dropout",
            )
        }  # fmt: skip
        fields["rope_parameters"] = dict(config.rope_parameters)
        fields.update({key: value for key, value in changes.items() if value is not None})
        fields.setdefault("num_sentinel_tokens", cls().num_sentinel_tokens)
        fields.setdefault("vocab_size", config.vocab_size + fields["num_sentinel_tokens"])
        return cls(**fields)


def _known_to_transformers() -> set[str]:
    return _TRANSFORMERS_FIELDS | set(PreTrainedConfig().to_dict())


__all__ = ["Qwen3EncoderDecoderConfig"]
