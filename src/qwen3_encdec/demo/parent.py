"""Pre-train a nano causal Qwen3, the parent to adapt if no checkpoint can be downloaded."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_with_min_lr_schedule_with_warmup,
    set_seed,
)

from qwen3_encdec.folders import InputError, default_device, new_folder
from qwen3_encdec.tokenization_qwen3_encdec import CONTROL_TOKENS, EOS_TOKEN, qwen3_backend


def parent_tokenizer(num_ranks: int | None = None) -> Qwen2Tokenizer:
    """Build Qwen3's own tokenizer without sentinels, its BPE cut after `num_ranks` entries."""
    bpe = json.loads(qwen3_backend(num_ranks).to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    tokenizer.add_tokens(list(CONTROL_TOKENS), special_tokens=True)
    tokenizer.eos_token = EOS_TOKEN
    return tokenizer


def nano_config(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 192, num_hidden_layers: int = 4
) -> Qwen3Config:
    """Configure a small Qwen3 with a real one's traits: wide heads, GQA, spare embedding rows."""
    return Qwen3Config(
        vocab_size=-(-len(tokenizer) // 128) * 128,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 128),
        head_dim=96,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )


def train_causal_parent(
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    hidden_size: int = 192,
    num_hidden_layers: int = 4,
    steps: int = 1000,
    batch_size: int = 4,
    block_size: int = 256,
    lr: float = 3e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Pre-train a nano Qwen3 on next-token prediction and save it as an ordinary Qwen3 folder.

    Returns:
        `loss` (mean of the last tenth of the steps, nats per token), `tokens` and `parameters`.

    Raises:
        InputError: `texts` holds less than one block.
    """
    set_seed(seed)
    model = Qwen3ForCausalLM(nano_config(tokenizer, hidden_size, num_hidden_layers))
    blocks = token_blocks(texts, tokenizer, steps * batch_size, block_size, seed)
    losses = fit(model, blocks, blocks, steps=steps, batch_size=batch_size, lr=lr)
    result = {
        "loss": float(np.mean(losses[-max(1, steps // 10) :])),
        "tokens": steps * batch_size * block_size,
        "parameters": model.num_parameters(),
    }
    with new_folder(output_dir, "causal parent", seed=seed, steps=steps, **result) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return result


def fit(
    model: Qwen3ForCausalLM,
    input_ids: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    lr: float,
) -> list[float]:
    """Train on rows (N, T) in order and return each step's loss; labels of -100 are ignored.

    Uses Adam with linear warm-up and cosine decay to a tenth. The model ends on the CPU.
    """
    model.to(default_device()).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95))
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, steps // 20, steps, min_lr_rate=0.1
    )
    inputs, targets = (torch.from_numpy(ids).long().to(model.device) for ids in (input_ids, labels))
    losses = []
    for step in tqdm(range(steps), desc="causal parent", disable=None):
        rows = torch.arange(step * batch_size, (step + 1) * batch_size) % len(inputs)
        loss = model(input_ids=inputs[rows], labels=targets[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.to("cpu")
    return losses


def token_blocks(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, most: int, size: int, seed: int
) -> np.ndarray:
    """Cut shuffled texts, separated by `<|endoftext|>`, into blocks (at most `most`, size)."""
    ids: list[int] = []
    for text in np.random.default_rng(seed).permutation(np.array(list(texts), dtype=object)):
        ids += [*tokenizer.encode(text, split_special_tokens=True), tokenizer.pad_token_id]
        if len(ids) >= most * size:
            break
    count = min(most, len(ids) // size)
    if not count:
        raise InputError(f"the corpus has {len(ids)} tokens, fewer than one block of {size}")
    return np.array(ids[: count * size], np.int32).reshape(count, size)


def causal_embedder(parent: str | Path, output_dir: str | Path) -> None:
    """Save the unchanged parent, mean-pooled, as a sentence-transformers folder."""
    right, fp32 = {"padding_side": "right"}, {"dtype": torch.float32}
    transformer = Transformer(str(parent), model_kwargs=fp32, processor_kwargs=right)
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()])
    with new_folder(output_dir, "causal embedder", source=str(parent)) as folder:
        model.save_pretrained(str(folder), create_model_card=False)
