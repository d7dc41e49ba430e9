"""Export an encoder-decoder to ONNX: two graphs, and greedy decoding with a cache between them.

    encoder.onnx   ids, mask [B, S]                     -> prefix.N.key, prefix.N.value [B, K, S, d]
    decoder.onnx   token, position [B, 1], mask [B, L],
                   past.N.key, past.N.value             -> logits [B, V], present.N.key, ...

Merged attention makes this plain: the source is a prefix of the decoder's cache, so the encoder
graph ends with every decoder layer's keys and values of the source, and the decoder graph is that
of any decoder-only model, L being the source and the target so far with the new token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_encdec.embedding.export import (
    ONNX_PACKAGES,
    check_packages,
    sample_texts,
    save_onnx,
    to_onnx,
)
from qwen3_encdec.folders import (
    InputError,
    check_output,
    copy_without_weights,
    load_model,
    load_tokenizer,
    new_folder,
)

PAIR = "pair-onnx"


@dataclass(frozen=True)
class PairReport:
    """Agreement of greedy decoding in onnxruntime with our own, token by token."""

    inputs: int
    tokens: int
    equal: int
    blind: int
    """The control: tokens that agree when the decoder's mask hides the source."""

    def __str__(self) -> str:
        return (
            f"{PAIR}: greedy decoding of {self.inputs} inputs, {self.tokens:,} tokens: "
            f"{self.equal:,} equal to ours; with the source hidden {self.blind:,}"
        )


class _Encoder(torch.nn.Module):
    """Ids and mask [B, S] to the source's keys and values in every decoder layer."""

    def __init__(self, model: Any):
        super().__init__()
        self.shared, self.encoder = model.model.shared, model.model.encoder
        self.layers = model.model.decoder.layers

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
        states = self.shared(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotary = self.encoder.rotary_emb(states, positions)
        seen = attention_mask[:, None, None, :].bool()
        for layer in self.encoder.layers:
            states = layer(states, seen, position_embeddings=rotary)
        states = self.encoder.norm(states)
        pairs = [layer.self_attn.source_key_value(states) for layer in self.layers]
        return [tensor for pair in pairs for tensor in pair]


class _Grown:
    """Keys and values of the past, and those that a step adds, by layer."""

    def __init__(self, past: list[torch.Tensor]):
        self.tensors = list(past)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple:
        for place, new in ((2 * layer, key), (2 * layer + 1, value)):
            self.tensors[place] = torch.cat([self.tensors[place], new], dim=2)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]


class _Decoder(torch.nn.Module):
    """One token [B, 1] behind a cache to logits [B, V] and the grown cache."""

    def __init__(self, model: Any):
        super().__init__()
        self.shared, self.decoder = model.model.shared, model.model.decoder

    def forward(
        self,
        token: torch.Tensor,
        position: torch.Tensor,
        mask: torch.Tensor,
        past: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        states = self.shared(token)
        rotary = self.decoder.rotary_emb(states, position)
        cache, seen = _Grown(past), mask[:, None, None, :].bool()
        for layer in self.decoder.layers:
            states = layer(states, None, position_embeddings=rotary, merged_mask=seen, cache=cache)
        logits = self.shared(self.decoder.norm(states))[:, 0]
        return [logits, *cache.tensors]


def export_pair(model: str | Path, output_dir: str | Path) -> PairReport:
    """Export an encoder-decoder to ONNX and verify greedy decoding token by token.

    Raises:
        InputError: `model` is not an encoder-decoder, a package
            is missing, or a token differs.
    """
    check_packages(PAIR, ONNX_PACKAGES, "onnx")
    check_output(output_dir, "exported pair")
    loaded = load_model(model).eval()
    tokenizer = load_tokenizer(model)
    with new_folder(output_dir, "exported pair", source=str(model)) as folder:
        copy_without_weights(Path(model), folder)
        write_pair(loaded, folder)
        texts = sample_texts(tokenizer, 32, 48)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        inputs = batch["input_ids"], batch["attention_mask"]
        expected = _ours(loaded, *inputs, steps=24)
        found = decode(folder, *map(np.asarray, inputs), config=loaded.config, steps=24)
        blind = decode(
            folder, *map(np.asarray, inputs), config=loaded.config, steps=24, hide_source=True
        )
        report = PairReport(
            len(texts),
            expected.size,
            int((found == expected).sum()),
            int((blind == expected).sum()),
        )
        if report.equal != report.tokens:
            raise InputError(f"{model} as ONNX does not decode as ours: {report}")
    return report


@torch.no_grad()
def write_pair(model: Any, folder: Path) -> None:
    """Write encoder.onnx and decoder.onnx of a model in fp32."""
    model.set_attn_implementation("eager")
    config = model.config
    batch, length, dim = (torch.export.Dim(name) for name in ("batch", "length", "past"))
    names = [
        f"{layer}.{part}" for layer in range(config.num_decoder_layers) for part in ("key", "value")
    ]
    mask = torch.ones(2, 5, dtype=torch.long)
    encoder = to_onnx(
        _Encoder(model),
        (torch.zeros_like(mask), mask),
        ["input_ids", "attention_mask"],
        [f"prefix.{name}" for name in names],
        ({0: batch, 1: length}, {0: batch, 1: length}),
    )
    save_onnx(encoder, folder / "encoder.onnx")
    shape = (2, config.num_key_value_heads, 4, config.head_dim)
    token, position = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)
    decoder = to_onnx(
        _Decoder(model),
        (token, position, mask, [torch.zeros(shape) for _ in names]),
        ["token", "position", "mask", *(f"past.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names)],
        ({0: batch}, {0: batch}, {0: batch, 1: dim + 1}, [{0: batch, 2: dim} for _ in names]),
    )
    save_onnx(decoder, folder / "decoder.onnx")


@torch.no_grad()
def _ours(model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> np.ndarray:
    """Greedy tokens, [B, steps], the end of a row filled with padding."""
    model.set_attn_implementation("sdpa")
    rows = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, num_beams=1
    )[:, 1:]
    padded = torch.full((len(rows), steps), model.config.pad_token_id or 0)
    padded[:, : rows.shape[1]] = rows
    return padded.numpy()


def decode(
    folder: Path,
    ids: np.ndarray,
    mask: np.ndarray,
    *,
    config: Any,
    steps: int,
    hide_source: bool = False,
) -> np.ndarray:
    """Decode greedily in onnxruntime.

    Args:
        folder: With encoder.onnx and decoder.onnx.
        ids, mask: [B, S] int64.
        config: Special ids of the model.
        steps: Tokens to decode.
        hide_source: The control: mask the source in the decoder.

    Returns:
        [B, steps] int64; behind a row's EOS there is padding.
    """
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    encoder, decoder = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=providers)
        for name in ("encoder", "decoder")
    )
    cache = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
    names = [value.name for value in decoder.get_inputs()][3:]
    seen = np.zeros_like(mask) if hide_source else mask
    rows, pad = len(ids), config.pad_token_id or 0
    ends = np.atleast_1d(config.eos_token_id)
    token = np.full((rows, 1), config.decoder_start_token_id, dtype=np.int64)
    finished = np.zeros(rows, dtype=bool)
    found = []
    for step in range(steps):
        seen = np.concatenate([seen, np.ones((rows, 1), dtype=mask.dtype)], axis=1)
        position = np.full((rows, 1), step, dtype=np.int64)
        inputs = {"token": token, "position": position, "mask": seen}
        logits, *cache = decoder.run(None, inputs | dict(zip(names, cache, strict=True)))
        best = np.where(finished, pad, logits.argmax(-1))
        finished |= np.isin(best, ends)
        found.append(best)
        token = best[:, None]
    return np.stack(found, axis=1)
