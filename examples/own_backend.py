"""Register your own attention backend, in four lines of math, and compare it with the default.

    python examples/own_backend.py

Encoder, decoder and generation use it.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM


def spelled_out(module, query, key, value, mask, scaling, dropout=0.0, is_causal=False, **_):
    """Attend from [B, H, T, D] to [B, K, L, D]; a bool mask is True where a query sees a key."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, L)
    if mask is None and is_causal:
        mask = torch.ones_like(scores, dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def main() -> None:
    """Print how far its losses are from SDPA's, and whether both generate the same tokens."""
    AttentionInterface.register("spelled_out", spelled_out)
    AttentionMaskInterface.register("spelled_out", sdpa_mask)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 1100, "pad_token_id": 1000, "eos_token_id": 1001}
    config = Qwen3EncoderDecoderConfig(**sizes, **heads, **tokens, initializer_range=0.2)
    model = Qwen3ForSeq2SeqLM(config).eval()
    source = {
        "input_ids": torch.randint(0, 1000, (2, 9)),
        "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4]),
    }
    labels = torch.randint(0, 1000, (2, 6))
    losses, generated = [], []
    for backend in ("sdpa", "spelled_out"):
        model.set_attn_implementation(backend)
        with torch.no_grad():
            losses.append(model(**source, labels=labels).token_losses)
        generated.append(model.generate(**source, max_new_tokens=8, do_sample=False))
    difference = (losses[0] - losses[1]).abs().max()
    print(f"largest difference of losses: {difference:.1e}")
    print(f"generated: {'equal' if torch.equal(*generated) else 'different'}")


if __name__ == "__main__":
    main()
