"""A nano Qwen3, pre-trained causally, so that the road has a parent to adapt where no checkpoint
can be downloaded.
"""

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
    Qwen3Model,
)
from transformers import set_seed as seed_everything

from qwen3_encdec.folders import InputError, default_device, new_folder
from qwen3_encdec.loss_qwen3_encdec import chunked_cross_entropy
from qwen3_encdec.tokenization_qwen3_encdec import CONTROL_TOKENS, EOS_TOKEN, qwen3_backend
from qwen3_encdec.training import optimization
from qwen3_encdec.training.config import TrainingConfig


def parent_tokenizer(num_ranks: int | None = None) -> Qwen2Tokenizer:
    """Qwen3's own tokenizer without sentinels, as its folders hold it, the BPE cut after
    `num_ranks` entries.
    """
    bpe = json.loads(qwen3_backend(num_ranks).to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    tokenizer.add_tokens(list(CONTROL_TOKENS), special_tokens=True)
    tokenizer.eos_token = EOS_TOKEN
    return tokenizer


def nano_config(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 192, num_hidden_layers: int = 4
) -> Qwen3Config:
    """A small Qwen3 with the traits that break careless code: heads wider than hidden / heads,
    spare rows, grouped KV.

    As in a real checkpoint the matrix is padded to a multiple of 128 rows beyond the tokenizer's
    entries.
    """
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
    """Pre-train a nano Qwen3 on next tokens and save it as an ordinary Qwen3 folder with its
    tokenizer.

    Documents are joined by `<|endoftext|>`, cut into blocks of `block_size` tokens and read once in an order that
    depends on `seed` alone. fp32: at this size casting costs a CPU more than bf16 products save.

    Returns:
        `loss` (mean nats per token of the last tenth of the steps), `tokens` read and number of
        `parameters`.

    Raises:
        InputError: `texts` holds less than one block.
    """
    seed_everything(seed)
    model = Qwen3ForCausalLM(nano_config(tokenizer, hidden_size, num_hidden_layers))
    blocks = token_blocks(texts, tokenizer, steps * batch_size, block_size, seed)
    losses = fit(model.model, blocks, steps=steps, batch_size=batch_size, lr=lr)
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
    body: Qwen3Model,
    blocks: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    mask_id: int | None = None,
    mask_share: float = 0.2,
) -> list[float]:
    """Train a Qwen3 body, whose head is its embedding, on token blocks (N, block_size) in their
    order.

    Without `mask_id` the loss is that of each next token; with it masked next-token prediction
    (arXiv 2404.05961): a share of the tokens is masked, and the state before each of them predicts
    it. AdamW, linear warm-up, cosine to a tenth. Returns the loss of each step, in nats per
    predicted token; the body is on the CPU again.
    """
    schedule = TrainingConfig(lr=lr, max_steps=steps, warmup_steps=steps // 20, schedule="cosine")
    body.to(default_device()).train()
    optimizer = optimization.build_optimizer(body, schedule)
    losses = []
    for step in tqdm(range(steps), desc="causal" if mask_id is None else "masked", disable=None):
        rows = np.arange(step * batch_size, (step + 1) * batch_size) % len(blocks)
        input_ids = torch.from_numpy(blocks[rows]).long().to(body.device)  # (B, block_size)
        asked = torch.ones_like(input_ids, dtype=torch.bool)
        if mask_id is not None:
            asked = torch.from_numpy(
                np.random.default_rng(step).random(input_ids.shape) < mask_share
            ).to(body.device)
        seen = input_ids if mask_id is None else input_ids.masked_fill(asked, mask_id)
        states = body(input_ids=seen, use_cache=False).last_hidden_state
        asked = asked[:, 1:]
        loss, _ = chunked_cross_entropy(
            states[:, :-1][asked], body.embed_tokens.weight, input_ids[:, 1:][asked]
        )
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = optimization.learning_rate(step + 1, schedule)
        torch.nn.utils.clip_grad_norm_(body.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    body.to("cpu")
    return losses


def token_blocks(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    num_blocks: int,
    block_size: int,
    seed: int,
) -> np.ndarray:
    """Token blocks (at most num_blocks, block_size) int32;

    no more text is tokenised than they need.
    """
    documents = list(texts)
    order = np.random.default_rng(seed).permutation(len(documents))
    needed, pieces, count = num_blocks * block_size, [], 0
    for start in range(0, len(order), 1000):
        batch = [documents[i] for i in order[start : start + 1000]]
        for ids in tokenizer(batch, split_special_tokens=True)["input_ids"]:
            pieces.append(np.array([*ids, tokenizer.pad_token_id], dtype=np.int32))
            count += len(ids) + 1
        if count >= needed:
            break
    available = min(num_blocks, count // block_size)
    if not available:
        raise InputError(f"the corpus has {count} tokens, less than one block of {block_size}")
    return np.concatenate(pieces)[: available * block_size].reshape(available, block_size)


def causal_embedder(parent: str | Path, output_dir: str | Path) -> None:
    """The parent as it is, mean-pooled, as a sentence-transformers folder:

    the control of the contrastive stage.
    """
    transformer = Transformer(
        str(parent),
        model_kwargs={"dtype": torch.float32},
        processor_kwargs={"padding_side": "right"},
    )
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    with new_folder(output_dir, "causal embedder", source=str(parent)) as folder:
        SentenceTransformer(modules=[transformer, pooling, Normalize()]).save_pretrained(
            str(folder), create_model_card=False
        )
