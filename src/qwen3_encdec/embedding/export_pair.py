"""Export an encoder-decoder to ONNX as two graphs, and decode greedily with a cache between them.

    encoder.onnx   ids, mask [B, S]                     -> prefix.N.key, prefix.N.value [B, K, S, d]
    decoder.onnx   token, position [B, 1], mask [B, L],
                   past.N.key, past.N.value             -> logits [B, V], present.N.key, ...

In merged attention the source is a prefix of the decoder's cache. The encoder graph therefore
returns the source's keys and values for every decoder layer, and the decoder graph is that of any
decoder-only model. L counts the source and the target so far, including the new token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from qwen3_encdec.conversion.extract import checkpoints_to_average
from qwen3_encdec.embedding.export import ONNX, check_packages, sample_texts, save_onnx
from qwen3_encdec.folders import (
    InputError,
    check_output,
    copy_without_weights,
    load_model,
    load_tokenizer,
    new_folder,
)

PAIR = "pair-onnx"
INPUTS, STEPS = 32, 24


@dataclass(frozen=True)
class PairReport:
    """Number of tokens, how many equal ours, and how many with the source hidden (the control)."""

    tokens: int
    equal: int
    blind: int

    def __str__(self) -> str:
        return (
            f"{PAIR}: {self.equal:,} of {self.tokens:,} greedy tokens of {INPUTS} inputs equal "
            f"ours; with the source hidden {self.blind:,}"
        )


class _Graph(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model.model


class _Encoder(_Graph):
    """Map ids and mask [B, S] to the source's keys and values for every decoder layer."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
        states = self.model.encoder(input_ids, attention_mask).last_hidden_state
        layers = self.model.decoder.layers
        return [part for layer in layers for part in layer.self_attn.source_key_value(states)]


class _Decoder(_Graph):
    """Map one token [B, 1] and a cache to logits [B, V] and the extended cache."""

    def forward(self, token: Any, position: Any, mask: Any, past: Any) -> list[torch.Tensor]:
        decoder, states = self.model.decoder, self.model.shared(token)
        rotary = decoder.rotary_emb(states, position)
        cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
        seen = mask[:, None, None, :].bool()
        for layer in decoder.layers:
            states = layer(states, None, position_embeddings=rotary, merged_mask=seen, cache=cache)
        present = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return [self.model.shared(decoder.norm(states))[:, 0], *present]


def export_pair(model: str | Path, output_dir: str | Path) -> PairReport:
    """Export an encoder-decoder to ONNX and verify greedy decoding token by token.

    `model` is a folder, a checkpoint or a run, whose newest checkpoint is exported. Raises
    InputError if it is none of these, a package is missing, or a token differs.
    """
    check_output(output_dir, "exported pair", inputs=[model])
    check_packages(PAIR, ONNX)
    pair = checkpoints_to_average(Path(model), 1)[0]
    loaded: Any = load_model(pair).eval()
    tokenizer = load_tokenizer(pair)
    with new_folder(output_dir, "exported pair", source=str(model)) as folder:
        copy_without_weights(pair, folder)
        _write(loaded, folder)
        batch = tokenizer(sample_texts(tokenizer, INPUTS, 48), padding=True, return_tensors="pt")
        loaded.set_attn_implementation("sdpa")
        rows = loaded.generate(**batch, max_new_tokens=STEPS, do_sample=False, num_beams=1)[:, 1:]
        expected = np.full((INPUTS, STEPS), loaded.config.pad_token_id)
        expected[:, : rows.shape[1]] = rows.numpy()
        ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
        equal, blind = (
            int((decode(folder, ids, mask, loaded.config, hide_source=hidden) == expected).sum())
            for hidden in (False, True)
        )
        report = PairReport(expected.size, equal, blind)
        if report.equal != report.tokens:
            raise InputError(f"{model} exported as ONNX failed verification: {report}")
    return report


@torch.no_grad()
def _write(model: Any, folder: Path) -> None:
    """Write encoder.onnx and decoder.onnx of a model in fp32."""
    model.set_attn_implementation("eager")
    config, layers = model.config, range(model.config.num_decoder_layers)
    names = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    batch, length, past = (torch.export.Dim(name) for name in ("batch", "length", "past"))
    mask = torch.ones(2, 5, dtype=torch.long)
    save_onnx(
        folder / "encoder.onnx",
        _Encoder(model),
        (torch.zeros_like(mask), mask),
        input_names=["input_ids", "attention_mask"],
        output_names=[f"prefix.{name}" for name in names],
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
    )
    token, position = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)
    shape = (2, config.num_key_value_heads, 4, config.head_dim)
    cached = [{0: batch, 2: past} for _ in names]
    save_onnx(
        folder / "decoder.onnx",
        _Decoder(model),
        (token, position, mask, [torch.zeros(shape) for _ in names]),
        input_names=["token", "position", "mask", *(f"past.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=({0: batch}, {0: batch}, {0: batch, 1: past + 1}, cached),
    )


def decode(
    folder: Path, ids: Any, mask: Any, config: Any, steps: int = STEPS, hide_source: bool = False
) -> np.ndarray:
    """Decode greedily in onnxruntime from ids and mask, [B, S] int64.

    `config` has the special ids; `hide_source` is the control. Returns [B, steps] int64, padded
    after a row's EOS.
    """
    from onnxruntime import InferenceSession

    providers = ["CPUExecutionProvider"]
    encoder = InferenceSession(folder / "encoder.onnx", providers=providers)
    decoder = InferenceSession(folder / "decoder.onnx", providers=providers)
    cache = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
    names = [value.name for value in decoder.get_inputs()][3:]
    seen = np.zeros_like(mask) if hide_source else mask
    found = np.full((len(ids), steps), config.pad_token_id)
    token = np.full((len(ids), 1), config.decoder_start_token_id)
    running = np.ones(len(ids), dtype=bool)
    for step in range(steps):
        seen = np.pad(seen, ((0, 0), (0, 1)), constant_values=1)
        inputs = {"token": token, "position": np.full_like(token, step), "mask": seen}
        logits, *cache = decoder.run(None, inputs | dict(zip(names, cache, strict=True)))
        found[running, step] = logits.argmax(-1)[running]
        token = found[:, step : step + 1]
        running &= ~np.isin(found[:, step], config.eos_token_id)
    return found
