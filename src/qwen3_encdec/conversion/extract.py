"""Extraction of the encoder to a plain `Qwen3Model` folder that stock tools load bidirectionally.

The folder needs neither this package nor remote code. Each reader has its own setting for "not
causal", and an old reader that knows none of them must fail rather than embed causally:

- `"is_causal": false` for transformers >= 5.2, vLLM and llama.cpp;
- `"use_bidirectional_attention": true` for Text Embeddings Inference;
- `"requirements"` in `config_sentence_transformers.json`, which makes sentence-transformers fail
  on transformers < 5.2;
- `rope_theta` at the top level beside `rope_parameters`, and one `eos_token_id`, for older readers;
- the legacy sentence-transformers layout, which every version of sentence-transformers and of Text
  Embeddings Inference reads.

The tokenizer appends `<|im_end|>`, because every source ended with it in training.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model
from transformers.initialization import no_init_weights

from qwen3_encdec.configuration_qwen3_encdec import SHARED_WITH_QWEN3, Qwen3EncoderDecoderConfig
from qwen3_encdec.conversion.card import base_of, write_card
from qwen3_encdec.folders import (
    InputError,
    check_finite,
    check_output,
    load_config,
    load_tokenizer,
    new_folder,
    read_json,
    read_tensors,
    write_json,
)
from qwen3_encdec.modeling_qwen3_encoder import Qwen3EncoderModel

# Their names in sentence-transformers, and the flags that older readers use.
POOLING = {"mean": "mean", "last": "lasttoken", "cls": "cls"}
POOLING_FLAGS = {
    "cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "sqrt": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken",
}  # fmt: skip
# Largest difference allowed from our own encoder, relative to the largest state, in fp32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExtractionReport:
    """Largest differences between the extracted folder and our own encoder on a padded batch:
    of the states, relative to the largest; of pooled embeddings; and of the states read causally.
    """

    averaged: list[str]
    parameters: int
    transformers: float
    sentence_transformers: float
    causal_control: float

    def __str__(self) -> str:
        return (
            f"encoder of {', '.join(self.averaged)}: {self.parameters:,} parameters\n"
            f"stock transformers differs by {self.transformers:.1e}, sentence-transformers by "
            f"{self.sentence_transformers:.1e}; with causal attention the difference is "
            f"{self.causal_control:.1e} (limit {TOLERANCE:.0e})"
        )


def extract_encoder(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    pooling: str = "mean",
    average_last: int = 1,
    max_seq_length: int | None = None,
) -> ExtractionReport:
    """Write the encoder of a checkpoint as a standalone text-embedding model.

    Args:
        checkpoint: An encoder-decoder folder, a `step-*` checkpoint, or a run folder (its newest).
        output_dir: Folder to write; built beside it and renamed into place.
        pooling: `"mean"`, `"last"` or `"cls"`.
        average_last: Average the weights of the newest N checkpoints, up to `checkpoint`.
        max_seq_length: Tokens to which a text is truncated; by default at most 512.

    Raises:
        InputError: missing checkpoints, damaged files, an unknown pooling, a length out of range,
            or stock tools that disagree with our encoder on the folder.
    """
    if pooling not in POOLING:
        raise InputError(f"pooling {pooling!r} is not one of {', '.join(POOLING)}")
    output_dir = check_output(output_dir, "encoder", inputs=[checkpoint])
    folders = checkpoints_to_average(Path(checkpoint).absolute(), average_last)  # "." has no name
    config = load_config(folders[-1])
    longest = config.max_position_embeddings
    length = min(512, longest) if max_seq_length is None else max_seq_length
    if not 2 <= length <= longest:
        raise InputError(f"max_seq_length={length} is not between 2 and {longest}")
    names = [folder.name for folder in folders]
    facts = {"source": str(checkpoint), "averaged": names, "pooling": pooling}
    with new_folder(output_dir, "encoder", **facts) as folder:
        encoder = _stock_encoder(config, _average(folders), folders[-1])
        encoder.save_pretrained(folder)
        _write_tokenizer(folder, folders[-1], length)
        _write_small_files(folder, config, POOLING[pooling], length)
        made = {"base": base_of(folders[-1]), "checkpoints": ", ".join(names), "pooling": pooling}
        head = {"base_model": made["base"]}
        write_card(folder, output_dir.resolve().name, head, {"How it was made": made})
        parameters = sum(p.numel() for p in encoder.parameters())
        report = ExtractionReport(names, parameters, *_verify(folder, config, encoder.state_dict()))
        worst = max(report.transformers, report.sentence_transformers)
        if not worst < TOLERANCE < report.causal_control:
            raise InputError(f"{checkpoint}: stock tools do not reproduce the encoder: {report}")
    return report


def checkpoints_to_average(checkpoint: Path, average_last: int) -> list[Path]:
    """Return the newest `average_last` checkpoint folders up to `checkpoint`, oldest first.

    Raises InputError if there is no checkpoint, or fewer than requested.
    """
    if not checkpoint.is_dir():
        command = "qwen3-encdec train --config FILE"
        raise InputError(f"checkpoint {checkpoint} does not exist; train one with: {command}")
    parent, last = checkpoint, math.inf
    if (checkpoint / "config.json").exists():
        if average_last == 1:
            return [checkpoint]
        parent, last = checkpoint.parent, _step(checkpoint)
    elif (checkpoint / "checkpoints").is_dir():
        parent = checkpoint / "checkpoints"
    found = sorted((path for path in parent.iterdir() if 0 <= _step(path) <= last), key=_step)
    if not found and math.isinf(last):
        raise InputError(f"{checkpoint} has neither a config.json nor checkpoints/step-*")
    if not 1 <= average_last <= len(found):
        there = f"{len(found)} step-* checkpoints in {parent}"
        raise InputError(f"average_last={average_last} is impossible with the {there}")
    return found[-average_last:]


def _step(folder: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match[1]) if match else -1


def _average(folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Average the encoders' tensors under stock names, in fp32 if there are several."""
    mean: dict[str, torch.Tensor] = {}
    for folder in folders:
        for name, tensor in read_tensors(folder):
            stock = name.replace("model.shared.", "model.encoder.embed_tokens.")
            if not stock.startswith("model.encoder."):
                continue
            check_finite(folder, [(name, tensor)])
            stock = stock.removeprefix("model.encoder.")
            if len(folders) > 1:
                tensor = mean.get(stock, 0) + tensor.float() / len(folders)
            mean[stock] = tensor
    return mean


def _stock_encoder(
    config: Qwen3EncoderDecoderConfig, tensors: dict[str, torch.Tensor], source: Path
) -> Qwen3Model:
    names = "vocab_size", *SHARED_WITH_QWEN3, "rope_parameters", "pad_token_id"
    fields = {name: getattr(config, name) for name in names}
    eos = config.eos_token_id
    stock = Qwen3Config(
        **fields,
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        is_causal=False,
        use_bidirectional_attention=True,
        use_cache=False,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        encoder = Qwen3Model(stock)
    if unfit := sorted(encoder.state_dict().keys() ^ tensors.keys()):
        raise InputError(f"{source}: missing or unexpected tensors: {', '.join(unfit[:3])}")
    encoder.load_state_dict(tensors, assign=True)
    return encoder


def _write_tokenizer(folder: Path, source: Path, length: int) -> None:
    tokenizer = load_tokenizer(source)
    eos = tokenizer.eos_token
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}",
        pair=f"$A {eos} $B {eos}",
        special_tokens=[(eos, tokenizer.eos_token_id)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=tokenizer.pad_token,
        eos_token=eos,
        model_max_length=length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def _write_small_files(
    folder: Path, config: Qwen3EncoderDecoderConfig, pooling: str, length: int
) -> None:
    """Complete config.json, and add the legacy sentence-transformers layout."""
    stock = read_json(folder / "config.json")
    flags = {f"pooling_mode_{flag}": name == pooling for name, flag in POOLING_FLAGS.items()}
    modules = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    files = {
        "config.json": stock | {"rope_theta": stock["rope_parameters"]["rope_theta"]},
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(modules.items())
        ],
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "requirements": {"transformers": ">=5.2.0"},
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode": pooling,
            **flags,
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)


@torch.no_grad()
def _verify(
    folder: Path, config: Qwen3EncoderDecoderConfig, tensors: dict[str, torch.Tensor]
) -> tuple[float, float, float]:
    """Measure the differences of transformers, sentence-transformers and a causal control."""
    from sentence_transformers import SentenceTransformer

    with no_init_weights():
        ours = Qwen3EncoderModel(config).eval()
    own = {f"encoder.{name}": tensor.float() for name, tensor in tensors.items()}
    own["shared.weight"] = own.pop("encoder.embed_tokens.weight")
    ours.load_state_dict(own, assign=True)
    texts = ["One.", "A sentence of a few more words, to be padded.", "def f(x):\n    return x + 1"]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    kept = batch["attention_mask"].bool()
    reference = ours(**batch).last_hidden_state

    def difference(backend: str, **changes) -> float:
        options = {"dtype": torch.float32, "attn_implementation": backend, **changes}
        model = AutoModel.from_pretrained(folder, **options)
        states = model.eval()(**batch).last_hidden_state
        return float(((states - reference)[kept]).abs().max() / reference[kept].abs().max())

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    pooled = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    mode = read_json(folder / "1_Pooling/config.json")["pooling_mode"]
    del model  # each model is as large as the encoder
    error = float((pooled - pool(reference, batch["attention_mask"], mode)).abs().max())
    worst = max(difference("eager"), difference("sdpa"))
    return worst, error, difference("sdpa", is_causal=True)


def pooling_mode(settings: Mapping[str, Any]) -> str:
    """Return the mode in a folder's pooling settings, or several joined by `+`."""
    # Versions of sentence-transformers before 5.3 have one flag per mode.
    flags = [mode for mode, flag in POOLING_FLAGS.items() if settings.get(f"pooling_mode_{flag}")]
    return settings.get("pooling_mode") or "+".join(flags)


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool right-padded [B, S, E] states under a [B, S] mask to normalized [B, E].

    `pooling` is `"mean"`, `"lasttoken"` or `"cls"`, as sentence-transformers spells it.
    """
    lengths = mask.sum(1)
    if pooling == "mean":
        pooled = (states * mask[..., None]).sum(1) / lengths[:, None]
    else:
        index = lengths - 1 if pooling == "lasttoken" else torch.zeros_like(lengths)
        pooled = states[torch.arange(len(mask)), index]
    return torch.nn.functional.normalize(pooled, dim=-1)
