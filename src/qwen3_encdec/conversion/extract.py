"""Encoder-decoder checkpoint -> a plain `Qwen3Model` folder that stock tools load bidirectionally.

The folder needs neither this package nor remote code. Each reader wants its own spelling of "not
causal", and an old reader that knows none of them must refuse rather than embed causally:

- `"is_causal": false` for transformers >= 5.2, vLLM and llama.cpp;
- `"use_bidirectional_attention": true` for Text Embeddings Inference;
- `"requirements"` in `config_sentence_transformers.json`, which stops sentence-transformers on
transformers < 5.2;
- `rope_theta` at the top level beside `rope_parameters`, and one `eos_token_id`, for older readers;
- the legacy sentence-transformers layout, which every version of it and of Text Embeddings
  Inference reads.

The tokenizer appends `<|im_end|>`, as every source ended in training.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from qwen3_encdec.conversion.card import LANGUAGE, LICENSE, base_of, write_card
from qwen3_encdec.folders import (
    TRAIN_COMMAND,
    InputError,
    check_output,
    load_config,
    load_tokenizer,
    new_folder,
    read_averages,
    read_json,
    read_tensors,
    write_json,
)
from qwen3_encdec.modeling_qwen3_encoder import Qwen3EncoderModel

# As sentence-transformers calls them, and the flags by which its older versions and other readers
# know them.
POOLING = {"mean": "mean", "last": "lasttoken", "cls": "cls"}
POOLING_FLAGS = {
    "cls": "cls_token",
    "mean": "mean_tokens",
    "max": "max_tokens",
    "sqrt": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}
_SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "rope_parameters", "attention_bias", "attention_dropout", "pad_token_id",
)  # fmt: skip
# Largest difference allowed to our own encoder, relative to the largest state, in fp32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExtractionReport:
    """Largest relative differences of the extracted folder to our own encoder on a padded batch.

    `transformers` is the worst of eager and sdpa, `sentence_transformers` that of the pooled
    embeddings (None: not installed), `causal_control` what reading the folder causally would give.
    """

    averaged: list[str]
    parameters: int
    transformers: float
    sentence_transformers: float | None
    causal_control: float

    def __str__(self) -> str:
        pooled = (
            "not run" if self.sentence_transformers is None else f"{self.sentence_transformers:.1e}"
        )
        return (
            f"encoder of {', '.join(self.averaged)}: {self.parameters:,} parameters\n"
            f"stock transformers differs by {self.transformers:.1e}, sentence-transformers by "
            f"{pooled}; read causally it would differ by {self.causal_control:.1e} (limit {TOLERANCE:.0e})"
        )


def extract_encoder(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    pooling: str = "mean",
    average_last: int = 1,
    ema: bool = False,
    max_seq_length: int | None = None,
    license: str = LICENSE,
    language: str = LANGUAGE,
) -> ExtractionReport:
    """Write the encoder of a checkpoint as a standalone text-embedding model.

    Args:
        checkpoint: An encoder-decoder folder, one `step-*` checkpoint of a run, or a run folder
            (its newest).
        output_dir: Written beside and renamed into place.
        pooling: `"mean"`, `"last"` or `"cls"`, what sentence-transformers makes a sentence of.
        average_last: Average the weights of the newest N checkpoints of the run, up to
            `checkpoint`.
        ema: Take the running average that training kept, not the weights.
        max_seq_length: Tokens after which a text is cut; by default 512, or the model's positions
            if there are fewer.
        license: For the model card, an identifier of the hub.
        language: For the model card, codes by commas.

    Raises:
        InputError: no encoder-decoder checkpoint there, too few to average, damaged files, an
            unknown pooling, a length out of range, or a folder that stock transformers or
            sentence-transformers does not read as our encoder.
    """
    if pooling not in POOLING:
        raise InputError(f"pooling {pooling!r} is not one of {', '.join(POOLING)}")
    output_dir = check_output(output_dir, "encoder")
    folders = checkpoints_to_average(Path(checkpoint), average_last)
    config = load_config(folders[-1])
    longest = config.max_position_embeddings
    max_seq_length = min(512, longest) if max_seq_length is None else max_seq_length
    if not 2 <= max_seq_length <= longest:
        raise InputError(f"max-seq-length {max_seq_length} must lie in 2 ... {longest}")
    names = [f"{folder.name} (ema)" if ema else folder.name for folder in folders]
    with new_folder(
        output_dir, "encoder", source=str(checkpoint), averaged=names, pooling=pooling
    ) as folder:
        encoder = _stock_encoder(
            config, _average_encoder(folders, read_averages if ema else read_tensors)
        )
        encoder.save_pretrained(folder)
        _write_config(folder, config)
        _write_tokenizer(folder, folders[-1], max_seq_length)
        _write_sentence_transformers_layout(folder, config, pooling, max_seq_length)
        base = base_of(folders[-1])
        made = {"base": base, "checkpoints": ", ".join(names), "pooling": pooling}
        write_card(
            folder,
            name=output_dir.resolve().name,
            base_model=base,
            license=license,
            language=language,
            sections=[("How it was made", made)],
        )
        parameters = sum(p.numel() for p in encoder.parameters())
        report = ExtractionReport(names, parameters, *_verify(folder, config, encoder.state_dict()))
        worst = max(report.transformers, report.sentence_transformers or 0.0)
        if not (worst < TOLERANCE < report.causal_control):
            raise InputError(
                f"{checkpoint}: stock tools do not read the extracted encoder: {asdict(report)}"
            )
    return report


def checkpoints_to_average(checkpoint: Path, average_last: int) -> list[Path]:
    """The newest `average_last` checkpoint folders up to `checkpoint`, oldest first.

    Raises:
        InputError: there is no checkpoint, or fewer than asked for.
    """
    if average_last < 1:
        raise InputError(f"average-last {average_last} is not at least 1")
    if not checkpoint.is_dir():
        raise InputError(f"checkpoint {checkpoint} does not exist; train one with: {TRAIN_COMMAND}")
    if (checkpoint / "config.json").exists():
        parent, last = checkpoint.parent, checkpoint
    else:
        parent = checkpoint / "checkpoints" if (checkpoint / "checkpoints").is_dir() else checkpoint
        if not _steps(parent):
            raise InputError(f"{checkpoint} holds neither a config.json nor checkpoints/step-*")
        last = max(_steps(parent), key=_step)
    if average_last == 1:
        return [last]
    found = sorted((folder for folder in _steps(parent) if _step(folder) <= _step(last)), key=_step)
    if len(found) < average_last:
        raise InputError(
            f"average-last {average_last}: there are only {len(found)} checkpoints up to {last}"
        )
    return found[-average_last:]


def _steps(parent: Path) -> list[Path]:
    return [folder for folder in parent.glob("step-*") if re.fullmatch(r"step-\d+", folder.name)]


def _step(folder: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match[1]) if match else -1


def _average_encoder(
    folders: list[Path], read: Callable[[Path], Iterator[tuple[str, torch.Tensor]]]
) -> dict[str, torch.Tensor]:
    """Mean of the encoders' tensors, in fp32 where there are several."""
    mean: dict[str, torch.Tensor] = {}
    for folder in folders:
        for name, tensor in read(folder):
            target = (
                "embed_tokens.weight"
                if name == "model.shared.weight"
                else name.removeprefix("model.encoder.")
            )
            if target == name:
                continue
            if len(folders) == 1:
                mean[target] = tensor
            else:
                mean[target] = mean.get(target, 0) + tensor.float() / len(folders)
    return mean


def _stock_encoder(
    config: Qwen3EncoderDecoderConfig, tensors: dict[str, torch.Tensor]
) -> Qwen3Model:
    stock = Qwen3Config(
        **{name: getattr(config, name) for name in _SHARED_FIELDS}, is_causal=False, use_cache=False
    )
    with torch.device("meta"):
        encoder = Qwen3Model(stock)
    expected = {name for name, _ in encoder.named_parameters()}
    if expected != set(tensors):
        raise InputError(
            f"the checkpoint lacks tensors of the encoder: {sorted(expected ^ set(tensors))[:3]}"
        )
    encoder.load_state_dict(tensors, assign=True)
    return encoder


def _write_config(folder: Path, config: Qwen3EncoderDecoderConfig) -> None:
    eos = config.eos_token_id
    written = read_json(folder / "config.json")
    written.update(
        architectures=["Qwen3Model"],
        model_type="qwen3",
        is_causal=False,
        use_bidirectional_attention=True,
        use_cache=False,
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        rope_theta=written["rope_parameters"]["rope_theta"],
        tie_word_embeddings=True,
    )
    write_json(folder / "config.json", written)


def _write_tokenizer(folder: Path, source: Path, max_seq_length: int) -> None:
    tokenizer = load_tokenizer(source)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}",
        pair=f"$A {tokenizer.eos_token} $B {tokenizer.eos_token}",
        special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        model_max_length=max_seq_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def _write_sentence_transformers_layout(
    folder: Path, config: Qwen3EncoderDecoderConfig, pooling: str, max_seq_length: int
) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": max_seq_length, "do_lower_case": False},
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "requirements": {"transformers": ">=5.2.0"},
        },
    )
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode": POOLING[pooling],
            **{
                f"pooling_mode_{flag}": mode == POOLING[pooling]
                for mode, flag in POOLING_FLAGS.items()
            },
            "include_prompt": True,
        },
    )
    write_json(folder / "2_Normalize" / "config.json", {})


@torch.no_grad()
def _verify(
    folder: Path, config: Qwen3EncoderDecoderConfig, tensors: dict[str, torch.Tensor]
) -> tuple[float, float | None, float]:
    """Differences of stock transformers, of sentence-transformers, and of the causal control, on a
    padded batch.
    """
    ours = Qwen3EncoderModel(config).eval()
    own = {f"encoder.{name}": tensor.float() for name, tensor in tensors.items()}
    own["shared.weight"] = own.pop("encoder.embed_tokens.weight")
    ours.load_state_dict(own)
    texts = [
        "One.",
        "A sentence of a few more words, to be padded against.",
        "def f(x):\n    return x + 1",
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    kept = batch["attention_mask"].bool()
    reference = ours(**batch).last_hidden_state

    def stock(implementation: str, **changes) -> torch.Tensor:
        model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=implementation, **changes
        )
        return model.eval()(**batch).last_hidden_state

    def difference(states: torch.Tensor) -> float:
        return float(((states - reference)[kept]).abs().max() / reference[kept].abs().max())

    transformers = max(difference(stock(implementation)) for implementation in ("eager", "sdpa"))
    causal = difference(stock("sdpa", is_causal=True))
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return transformers, None, causal
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    pooled = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    pooling = read_json(folder / "1_Pooling" / "config.json")["pooling_mode"]
    expected = pool(reference, batch["attention_mask"], pooling)
    return transformers, float((pooled - expected).abs().max()), causal


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """[B, S, E] states under a [B, S] mask, padded on the right -> [B, E], normalized.

    `pooling` is `"mean"`, `"lasttoken"` or `"cls"`, as sentence-transformers spells it.
    """
    if pooling == "mean":
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        last = (
            mask.sum(1) - 1 if pooling == "lasttoken" else torch.zeros(len(mask), dtype=torch.long)
        )
        pooled = states[torch.arange(len(mask)), last]
    return torch.nn.functional.normalize(pooled, dim=-1)
