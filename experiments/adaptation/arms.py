"""The arms of the experiment: what the decoder makes of the source, as changes of its attention.

The project's own decoder is the arm `scaled values, gate` apart from the keys: SmolLM2's QK-norm is
neutral, so that its source keys are brought to the decoder's size by a scale, as Qwen3's k_norm
would bring them.

Shapes: T target and S source tokens of a packed batch, H query and K key heads, d head dimension.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from qwen3_encdec.attention_qwen3_encdec import (
    Varlen,
    attend,
    project_key_value,
    project_query,
    reorder_keys,
)
from qwen3_encdec.conversion.initialize import TEXTS
from qwen3_encdec.modeling_qwen3_decoder import PackedKeys, Qwen3MergedAttention


@dataclass(frozen=True)
class Arm:
    """One way for the source into the decoder, and how it is trained."""

    keys: Literal["raw", "normalized"] = "normalized"
    """Normalized: scaled to the RMS of the decoder's own keys, layer by layer."""
    values: Literal["raw", "scaled", "one scale"] = "scaled"
    """Scaled to the RMS of the decoder's own, by layer or by one scale on the encoder's states."""
    gate: Literal["none", "head", "layer", "head, keys too"] = "none"
    """Learned factors on the source's values: per key head, or one per layer."""
    merge: Literal["softmax", "bias", "blend", "add"] = "softmax"
    """How the source enters, with a learned b or g per key head in place of the gate on values:

    - softmax: merged attention as it is;
    - bias: b is added to the source's logits. The same as two attentions merged by their
      log-sum-exp with b added to the source's;
    - blend: (1 - g) attention to the target alone + g merged attention;
    - add: attention to the target alone + g attention to the source alone.
    """
    start: float = 0.0
    """First value of the gate, of b or of g."""
    gate_lr: float = 200.0
    """Learning rate of the gate, of b or of g as a multiple of the weights'."""
    rotated: bool = False
    """Rotate the source's keys by their positions."""
    frozen_tokens: int = 0
    """Tokens before the decoder's weights begin to learn."""
    mntp: float = 0.0
    """Weight of masked next-token prediction on the encoder."""


class ArmAttention(Qwen3MergedAttention):
    """Merged attention as an arm has it; put in place by `install`."""

    arm: Arm
    key_scale: float

    def source_key_value(
        self, states: torch.Tensor, position_embeddings: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, S, E] encoder states -> key and value [1, K, S, d]."""
        key, value = project_key_value(self, states)
        if position_embeddings is not None:
            key, _ = apply_rotary_pos_emb(key, key, *position_embeddings)
        key, value = key * self.key_scale, value * self.source_scale.to(value.dtype)
        gate = self.source_gate.to(value.dtype)[:, None, None]
        if self.arm.merge == "softmax":
            value = value * gate
        if self.arm.gate == "head, keys too":
            key = key * gate
        return key, value

    def forward(self, hidden_states, position_embeddings, encoder_hidden_states, **kwargs) -> Any:  # type: ignore[override]
        """As `Qwen3MergedAttention.forward`; other merges take packed batches only."""
        if self.arm.merge == "softmax":
            return super().forward(
                hidden_states, position_embeddings, encoder_hidden_states, **kwargs
            )
        query = project_query(self, hidden_states)  # (1, H, T, d)
        key, value = project_key_value(self, hidden_states)  # (1, K, T, d)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        source = self.source_key_value(
            encoder_hidden_states, kwargs.get("encoder_position_embeddings")
        )
        packed: PackedKeys = kwargs["packed"]
        output = getattr(self, f"_{self.arm.merge}")(query, key, value, *source, packed)
        return self.o_proj(output.flatten(2)), None, None

    def _bias(self, query, key, value, source_key, source_value, packed) -> torch.Tensor:
        """Add b to the source's logits by one more dimension: b in its keys, 1 in the queries."""
        one = torch.full_like(query[..., :1], 1 / self.scaling)
        bias = self.source_gate[:, None, None].expand_as(source_key[..., :1]).to(source_key.dtype)
        query, source_key = torch.cat([query, one], -1), torch.cat([source_key, bias], -1)
        query, source_key = F.pad(query, (0, 7)), F.pad(source_key, (0, 7))
        key, value, source_value = (F.pad(x, (0, 8)) for x in (key, value, source_value))
        output = self._merged(query, key, value, source_key, source_value, packed)
        return output[..., : self.head_dim]

    def _blend(self, query, key, value, source_key, source_value, packed) -> torch.Tensor:
        alone = self._alone(query, key, value, packed)
        merged = self._merged(query, key, value, source_key, source_value, packed)
        return alone + self._gate(alone) * (merged - alone)

    def _add(self, query, key, value, source_key, source_value, packed) -> torch.Tensor:
        alone = self._alone(query, key, value, packed)
        layout = packed.layout
        cross = Varlen(
            queries=layout.queries,
            keys=layout.keys - layout.queries,
            longest_query=layout.longest_query,
            longest_key=layout.longest_key - layout.longest_query,
        )
        seen, _ = attend(self, query, source_key, source_value, None, cross)
        return alone + self._gate(alone) * seen

    def _gate(self, like: torch.Tensor) -> torch.Tensor:
        """Return g of each query head, [H, 1]."""
        return self.source_gate.repeat_interleave(self.num_key_value_groups)[:, None].to(like.dtype)

    def _alone(self, query, key, value, packed) -> torch.Tensor:
        """[1, T, H, d] attention to the target alone: the language model's."""
        bounds, longest = packed.layout.queries, packed.layout.longest_query
        own = Varlen(bounds, bounds, longest, longest, causal=True)
        return attend(self, query, key, value, None, own, causal=True)[0]

    def _merged(self, query, key, value, source_key, source_value, packed) -> torch.Tensor:
        pairs = (source_key, key.to(source_key.dtype)), (source_value, value)
        key, value = (
            reorder_keys(torch.cat(pair, 2), packed.order, packed.inverse) for pair in pairs
        )
        return attend(self, query, key, value, None, packed.layout, causal=True)[0]


def install(model: Any, tokenizer: Any, arm: Arm) -> None:
    """Change the decoder of an initialized model (closed gates, measured scales) to the arm's."""
    model.config.rope_on_encoder_keys = arm.rotated
    attentions = [layer.self_attn for layer in model.model.decoder.layers]
    key_scales = measure_key_scales(model, tokenizer)
    mean = torch.stack([attention.source_scale for attention in attentions]).log().mean().exp()
    gated = arm.gate != "none" or arm.merge != "softmax"
    for attention, key_scale in zip(attentions, key_scales, strict=True):
        attention.__class__ = ArmAttention
        attention.arm = arm
        attention.key_scale = key_scale if arm.keys == "normalized" else 1.0
        if arm.values != "scaled":
            attention.source_scale.fill_(1.0 if arm.values == "raw" else mean)
        gates = attention.source_gate.data[: 1 if arm.gate == "layer" else None]
        gates = torch.full_like(gates, arm.start if gated else 1.0)
        attention.source_gate = nn.Parameter(gates, requires_grad=gated)


@torch.no_grad()
def measure_key_scales(model: Any, tokenizer: Any) -> list[float]:
    """RMS of the decoder's own keys over that of the source's, by layer, on initialize's texts."""
    decoder = model.model.decoder
    squares = torch.zeros(len(decoder.layers), 2)
    for text in TEXTS:
        ids = tokenizer(text, split_special_tokens=True, return_tensors="pt")["input_ids"]
        source, target = ids.to(model.device).tensor_split(2, dim=1)
        encoded = model.model.encoder(source).last_hidden_state
        states = decoder(
            target,
            encoder_hidden_states=encoded,
            encoder_attention_mask=torch.zeros_like(source),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        for i, layer in enumerate(decoder.layers):
            for j, x in enumerate((layer.input_layernorm(states[i]), encoded)):
                key, _ = project_key_value(layer.self_attn, x)
                squares[i, j] += key.float().square().mean().cpu()
    return (squares[:, 0] / squares[:, 1]).sqrt().tolist()
