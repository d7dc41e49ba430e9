"""Arms of the experiment: ways to feed the source to the decoder, as changes of its attention.

SmolLM2's QK-norm is neutral, so its source keys are several times larger than the decoder's. A
scale per layer, measured on the keys, brings them to the decoder's size, as Qwen3's k_norm would.
With Qwen3's k_norm, the project's own decoder is the arm `scaled values, gate`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from qwen3_encdec.attention_qwen3_encdec import Varlen, attend, project_key_value, project_query
from qwen3_encdec.conversion.initialize import TEXTS
from qwen3_encdec.modeling_qwen3_decoder import Qwen3MergedAttention


@dataclass(frozen=True)
class Arm:
    """One way to feed the source to the decoder, and how it is trained."""

    keys: Literal["raw", "normalized"] = "normalized"
    """Normalized: scaled to the RMS of the decoder's own keys, layer by layer."""
    values: Literal["raw", "scaled", "one scale"] = "scaled"
    """Scaled to the RMS of the decoder's own, by layer or by one scale on the encoder's states."""
    gate: Literal["none", "head", "layer", "head, keys too"] = "none"
    """Learned factors on the source's values: per key head, or one per layer."""
    merge: Literal["softmax", "bias", "closing", "blend", "add"] = "softmax"
    """Combination of both attentions, with a learned b or g per key head in place of the gate:

    - softmax: merged attention as it is;
    - bias: b is added to the source's logits, which equals merging two attentions by their
      log-sum-exp with b added to the source's;
    - closing: g from 0 multiplies the source's keys and values, and (1 - g) start is added to its
      logits;
    - blend: (1 - g) attention to the target alone + g merged attention;
    - add: attention to the target alone + g attention to the source alone.
    """
    start: float = 0.0
    """Initial value of the gate, of b or of g."""
    gate_lr: float = 200.0
    """Learning rate of the gate, of b or of g as a multiple of the weights'."""
    rotated: bool = False
    """Rotate the source's keys by their positions."""
    frozen_tokens: int = 0
    """Tokens before the decoder's weights start to train."""
    mntp: float = 0.0
    """Weight of masked next-token prediction on the encoder."""


class ArmAttention(Qwen3MergedAttention):
    """Merged attention changed by an arm; merges other than softmax take packed batches only."""

    arm: Arm
    key_scale: float
    rotary: tuple[nn.Module]
    """The decoder's rotary embedding, in a tuple so that it is not a submodule of every layer."""
    packed: Varlen | None = None

    def source_key_value(self, states: torch.Tensor) -> Any:
        """Project encoder states [1, S, E] to key and value [1, K, S, d]."""
        key, value = project_key_value(self, states)
        if self.arm.rotated:
            positions = torch.arange(states.shape[1], device=states.device)
            if self.packed is not None:
                bounds = self.packed.keys - self.packed.queries
                document = torch.searchsorted(bounds, positions, right=True) - 1
                positions = positions - bounds[document]
            key, _ = apply_rotary_pos_emb(key, key, *self.rotary[0](states, positions[None]))
        key, value = key * self.key_scale, value * self.source_scale.to(value.dtype)
        gate = self.source_gate.to(value.dtype)[:, None, None]
        if self.arm.gate == "head, keys too" or self.arm.merge == "closing":
            key = key * gate
        return key, value * gate if self.arm.merge in ("softmax", "closing") else value

    def forward(self, hidden_states, position_embeddings, encoder_hidden_states, **kwargs) -> Any:  # type: ignore[override]
        """Attend like `Qwen3MergedAttention.forward`."""
        packed = self.packed = kwargs["packed"]
        if self.arm.merge == "softmax":
            options = {"encoder_hidden_states": encoder_hidden_states, **kwargs}
            return super().forward(hidden_states, position_embeddings, **options)
        query = project_query(self, hidden_states)  # (1, H, T, d)
        key, value = project_key_value(self, hidden_states)  # (1, K, T, d)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        source_key, source_value = self.source_key_value(encoder_hidden_states)
        targets, longest = packed.queries, packed.longest_query
        biased = self.arm.merge in ("bias", "closing")
        if biased:  # one more dimension: 1 / scaling in the queries, b in the source's keys
            query = torch.cat([query, torch.full_like(query[..., :1], 1 / self.scaling)], -1)
            bias = self.source_gate
            if self.arm.merge == "closing":
                bias = self.arm.start * (1 - bias)
            bias = bias[:, None, None].expand_as(source_key[..., :1])
            source_key, key = torch.cat([source_key, bias], -1), F.pad(key, (0, 1))
        if self.arm.merge == "add":
            sources = packed.keys - targets
            cross = Varlen(targets, sources, longest, packed.longest_key - longest)
            other, _ = attend(self, query, source_key, source_value, None, cross)
        else:
            both = torch.cat([source_key, key], 2), torch.cat([source_value, value], 2)
            merged = (packed.reorder(x) for x in both)
            other, _ = attend(self, query, *merged, None, packed)  # (1, T, H, d)
        if biased:
            return self.o_proj(other.flatten(2)), None, None
        own = Varlen(targets, targets, longest, longest, causal=True)
        alone, _ = attend(self, query, key, value, None, own)
        gate = self.source_gate.repeat_interleave(self.num_key_value_groups)[:, None]
        change = other if self.arm.merge == "add" else other - alone
        return self.o_proj((alone + gate.to(alone.dtype) * change).flatten(2)), None, None


def install(model: Any, tokenizer: Any, arm: Arm) -> None:
    """Change the decoder of an initialized model (closed gates, measured scales) to the arm's."""
    attentions = [layer.self_attn for layer in model.model.decoder.layers]
    key_scales = measure_key_scales(model, tokenizer)
    mean = torch.stack([attention.source_scale for attention in attentions]).log().mean().exp()
    gated = arm.gate != "none" or arm.merge != "softmax"
    for attention, key_scale in zip(attentions, key_scales, strict=True):
        attention.__class__ = ArmAttention
        attention.arm = arm
        attention.rotary = (model.model.decoder.rotary_emb,)
        attention.key_scale = key_scale if arm.keys == "normalized" else 1.0
        if arm.values != "scaled":
            attention.source_scale.fill_(1.0 if arm.values == "raw" else mean)
        gates = attention.source_gate.data[: 1 if arm.gate == "layer" else None]
        first = 0.0 if arm.merge == "closing" else arm.start
        gates = torch.full_like(gates, first if gated else 1.0)
        attention.source_gate = nn.Parameter(gates, requires_grad=gated)


@torch.no_grad()
def measure_key_scales(model: Any, tokenizer: Any) -> list[float]:
    """Measure the RMS of the decoder's own keys over the source's, by layer, on initialize's texts."""
    decoder = model.model.decoder
    squares = torch.zeros(len(decoder.layers), 2)
    for text in TEXTS:
        ids = tokenizer(text, split_special_tokens=True, return_tensors="pt")["input_ids"]
        source, target = ids.to(model.device).tensor_split(2, dim=1)
        encoded = model.model.encoder(source).last_hidden_state
        hidden = {"encoder_attention_mask": torch.zeros_like(source), "use_cache": False}
        states = decoder(
            target, encoder_hidden_states=encoded, output_hidden_states=True, **hidden
        ).hidden_states
        for i, layer in enumerate(decoder.layers):
            for j, x in enumerate((layer.input_layernorm(states[i]), encoded)):
                key, _ = project_key_value(layer.self_attn, x)
                squares[i, j] += key.float().square().mean().cpu()
    return (squares[:, 0] / squares[:, 1]).sqrt().tolist()
