"""An attention backend of one's own, spelled out in four lines of mathematics, beside the default
one.

    python examples/own_backend.py

Encoder, decoder, padded batches, packed rows and decoding all go through it.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM


def spelled_out(module, query, key, value, mask, scaling, dropout=0.0, is_causal=False, **_):
    """Attention of [B, H, T, D] to [B, K, L, D]; a bool mask is True where a query sees a key."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, L)
    if mask is None and is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(
            scores.shape[-1] - scores.shape[-2]
        )
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def main() -> None:
    """Print the largest difference to SDPA on a padded and on a packed batch."""
    AttentionInterface.register("spelled_out", spelled_out)
    AttentionMaskInterface.register("spelled_out", sdpa_mask)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3EncoderDecoderConfig(**sizes, **heads)
    model = Qwen3ForSeq2SeqLM(config).eval()
    source = torch.randint(0, 1000, (2, 9))
    labels = torch.randint(0, 1000, (2, 6))
    masks = {
        "padded": {"attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4])},
        "packed": {
            "attention_mask": torch.tensor([[1] * 4 + [2] * 5, [1] * 9]),
            "decoder_attention_mask": torch.tensor([[1] * 2 + [2] * 4, [1] * 6]),
        },
    }
    for name, mask in masks.items():
        losses = []
        for backend in ("sdpa", "spelled_out"):
            model.set_attn_implementation(backend)
            with torch.no_grad():
                losses.append(model(input_ids=source, labels=labels, **mask).token_losses)
        print(f"{name}: {(losses[0] - losses[1]).abs().max():.1e} apart")
        assert torch.allclose(*losses, atol=1e-4)


if __name__ == "__main__":
    main()
