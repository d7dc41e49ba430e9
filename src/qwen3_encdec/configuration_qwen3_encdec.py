# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""Configuration of the Qwen3 encoder-decoder.

One flat configuration serves both stacks: encoder and decoder come from the same Qwen3 checkpoint
and differ only in attention and, optionally, in the number of layers. The defaults are
Qwen3-0.6B with 100 sentinels.
"""

import copy
import dataclasses
import difflib
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

_PAD, _EOS = 151_643, 151_645

# Fields that transformers writes around any configuration without declaring them.
_WRITTEN_BY_TRANSFORMERS = {"_name_or_path", "auto_map", "model_type", "quantization_config"}

# Auto classes for a folder that includes its code, whichever class was saved.
_CLASSES = {
    "AutoModel": "modeling_qwen3_encdec.Qwen3EncoderDecoderModel",
    "AutoModelForSeq2SeqLM": "modeling_qwen3_encdec.Qwen3ForSeq2SeqLM",
    "AutoModelForSequenceClassification": (
        "modeling_qwen3_encoder.Qwen3EncoderForSequenceClassification"
    ),
    "AutoModelForTokenClassification": "modeling_qwen3_encoder.Qwen3EncoderForTokenClassification",
}

SHARED_WITH_QWEN3 = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
)


@strict
class Qwen3EncoderDecoderConfig(PreTrainedConfig):
    """Sizes and token ids of a `Qwen3ForSeq2SeqLM`.

    Args:
        vocab_size: Rows of the one shared embedding matrix, sentinels included.
        num_sentinel_tokens: `<extra_id_0>` ... are the last `num_sentinel_tokens` ids of the
            vocabulary.
        hidden_size: Width E of the residual stream, the same in encoder and decoder.
        intermediate_size: Width of the gated MLP.
        num_hidden_layers: Encoder layers.
        num_decoder_layers: Decoder layers, at most as many as the encoder has; None means as many.
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
        source_gate: Scale the encoder states in each decoder layer, and multiply their values by a
            learned gate per key head. If False, the decoder is T5Gemma 2's.
        use_cache: Return the decoder's key/value cache outside training.
        pad_token_id: `<|endoftext|>`; None in a vocabulary too small to have it.
        eos_token_id: `<|im_end|>`, so masking padded labels never hides an EOS; None likewise.
        decoder_start_token_id: Decoder input before the first target token; the padding token by
            default.
        bos_token_id: None: Qwen3 has no BOS. Accepted because transformers passes it.
        tie_word_embeddings: Always True: encoder input, decoder input and LM head are one matrix.
        is_encoder_decoder: Always True.

    Raises:
        ValueError: a field that no code reads, sizes that do not fit, or a padding or start token
            outside the vocabulary.
    """

    model_type = "qwen3_encdec"
    keys_to_ignore_at_inference = ["cache", "token_losses"]  # noqa: RUF012
    default_theta = 1_000_000.0

    vocab_size: int = 152_036
    num_sentinel_tokens: int = 100
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_decoder_layers: Any = None  # an int once constructed
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 40_960
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    source_gate: bool = False
    use_cache: bool = True
    pad_token_id: int | None = _PAD
    eos_token_id: int | list[int] | None = _EOS
    decoder_start_token_id: int | None = None
    bos_token_id: int | None = None
    tie_word_embeddings: bool = True
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_hidden_layers
        # A small hand-made vocabulary has neither.
        if self.pad_token_id == _PAD >= self.vocab_size:
            self.pad_token_id = None
        if self.eos_token_id == _EOS >= self.vocab_size:
            self.eos_token_id = None
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id
        self._check()
        super().__post_init__(**kwargs)
        fields = _field_names()
        for name in sorted(vars(self).keys() & kwargs.keys() - fields):
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"configuration field {name!r} is not used by this model{hint}")

    def _check(self) -> None:
        layers, most = self.num_decoder_layers, self.num_hidden_layers
        if not isinstance(layers, int) or not 1 <= layers <= most:
            raise ValueError(
                f"num_decoder_layers={layers!r} is not between 1 and num_hidden_layers={most}"
            )
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary embeddings rotate pairs of dimensions"
            )
        if not self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=False is not supported: inputs and LM head share one matrix"
            )
        if not self.is_encoder_decoder:
            raise ValueError(
                "is_encoder_decoder=False is not supported; use Qwen3EncoderModel for the encoder"
            )
        size = self.vocab_size
        if not 0 <= self.num_sentinel_tokens < size:
            raise ValueError(
                f"num_sentinel_tokens={self.num_sentinel_tokens} is not between 0 and {size - 1}"
            )
        for name in ("pad_token_id", "decoder_start_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < size:
                raise ValueError(f"{name}={token} is outside the vocabulary of {size}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a saved configuration. Raises ValueError for another model type."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"this is a {kind!r} model, not an encoder-decoder; create one from a Qwen3 with: "
                "qwen3-encdec initialize --model FOLDER_OR_HUB_ID --output ./qwen3-encdec-init"
            )
        # Field of an early ablation, False in all folders but those of the ablation.
        if config_dict.get("rope_on_encoder_keys") is False:
            config_dict = {k: v for k, v in config_dict.items() if k != "rope_on_encoder_keys"}
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{error.__cause__ or error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the declared fields, without other attributes that were set on the object."""
        saved = super().to_dict()
        if "auto_map" in saved:
            saved["auto_map"] = _CLASSES | saved["auto_map"]
        saved |= {"tie_word_embeddings": True, "is_encoder_decoder": True}
        return {name: value for name, value in saved.items() if name in _field_names()}

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> "Qwen3EncoderDecoderConfig":
        """Return this configuration; for `decoder`, with its layer count, which sizes the cache."""
        if not decoder or encoder or self.num_decoder_layers == self.num_hidden_layers:
            return self
        config = copy.copy(self)
        config.num_hidden_layers = self.num_decoder_layers
        return config

    @property
    def layer_types(self) -> list[str]:
        """Full attention in every layer; transformers' Qwen3 layers read it."""
        return ["full_attention"] * self.num_hidden_layers

    @classmethod
    def from_qwen3_config(
        cls, config: PreTrainedConfig, **changes: Any
    ) -> "Qwen3EncoderDecoderConfig":
        """Derive the encoder-decoder's configuration from a dense Qwen3's (0.6B to 32B).

        Sentinels are appended to the source vocabulary: `vocab_size` grows by
        `num_sentinel_tokens`. `changes` override single fields unless they are None.

        Raises:
            ValueError: `config` is not a dense Qwen3, or it has sliding-window layers.
        """
        if config.model_type != "qwen3":
            raise ValueError(
                f"model_type {config.model_type!r} is not a dense Qwen3 (model_type 'qwen3')"
            )
        if "sliding_attention" in (getattr(config, "layer_types", None) or []):
            raise ValueError(
                "this Qwen3 has sliding-window layers; "
                "merged attention needs full attention in every layer"
            )
        fields: dict[str, Any] = {name: getattr(config, name) for name in SHARED_WITH_QWEN3}
        fields["rope_parameters"] = dict(config.rope_parameters)
        fields.update({key: value for key, value in changes.items() if value is not None})
        fields.setdefault("num_sentinel_tokens", cls.num_sentinel_tokens)
        fields.setdefault("vocab_size", config.vocab_size + fields["num_sentinel_tokens"])
        return cls(**fields)


def _field_names() -> set[str]:
    declared = {field.name for field in dataclasses.fields(Qwen3EncoderDecoderConfig)}
    return declared | _WRITTEN_BY_TRANSFORMERS


__all__ = ["Qwen3EncoderDecoderConfig"]
