"""Fast encoding of corpus text, which treats control tokens in the text as text.

`tiktoken` with the tokenizer's own vocabulary gives the same ids as `tokenizers` at several times
the speed. This is checked on a sample before use. If the ids differ, or tiktoken is not installed,
`tokenizers` is used.
"""

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

logger = logging.get_logger(__name__)

_PIECE = 2**15
# Qwen's pattern always ends a word between a letter or digit and anything else.
_BORDER = re.compile(r"(?<=[^\W_])(?=[ \n。，、！？])")
_SAMPLE = (
    "The quick brown fox's 12,345 jumps -- isn't it?  \n\n\tdef f(x):\r\n    return x**2 # ok\n",
    "Ünïcödé cafe\u0301 A\u030a ﬁ ½ … “quoted” naïve\u00a0space\u200bzero\u3000wide",
    "<|im_end|><extra_id_0> <|endoftext|>text<extra_id_3>.<think>",
    "a" * 300 + " " * 70 + "\n" * 9 + "ab" * 90 + "!?" * 40,
    "",
)
_ALPHABETS = (0x20, 0x80, 0x300, 0x400, 0x5D0, 0x900, 0xE00, 0x1100, 0x2000, 0x4E00, 0x1F600)
"""Unicode blocks that tokenizers often get wrong."""


class Encoder:
    """Callable that encodes corpus text to int32 ids, without EOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Left by the tokenizer's last call; its next one sets them anew.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        spec = tokenizer.backend_tokenizer.to_str()
        self.fingerprint = hashlib.sha256(spec.encode()).hexdigest()[:16]
        """Changes with any change to the tokenizer."""
        self.fallback_reason: str | None = None
        """Reason for encoding with tokenizers instead of tiktoken, if there is one."""
        try:
            self._encode = _tiktoken(spec)
            self._compare()
        except (ImportError, ValueError, KeyError) as error:
            self._encode, self.fallback_reason = self._slow, str(error)
            about = "encoding with tokenizers, several times slower than tiktoken: %s"
            logger.warning_once(about, self.fallback_reason)

    def __reduce__(self) -> tuple[Any, ...]:
        # The libraries' objects cannot be sent to another process.
        return type(self), (self._tokenizer,)

    def __call__(self, text: str | np.ndarray) -> np.ndarray:
        """Return the ids of a text; ids are returned as they are."""
        if not isinstance(text, str):
            return text
        ids = []
        for piece in _pieces(text):
            try:
                ids.append(self._encode(piece))
            except ValueError:  # tiktoken's regex engine gives up on millions of spaces
                ids.append(self._slow(piece))
        return np.concatenate(ids) if len(ids) > 1 else ids[0]

    def _slow(self, text: str) -> np.ndarray:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return np.asarray(self._tokenizer(text, **options)["input_ids"], dtype=np.int32)

    def _compare(self) -> None:
        """Raise ValueError, naming text, ids and remedy, if the two libraries differ."""
        rng = random.Random(0)
        texts = [*_SAMPLE]
        for _ in range(200):
            pair = rng.sample(_ALPHABETS, 2)
            texts.append("".join(chr(rng.choice(pair) + rng.randrange(96)) for _ in range(40)))
        for text in texts:
            fast, slow = self._encode(text).tolist(), self._slow(text).tolist()
            if fast != slow:
                same = takewhile(lambda pair: pair[0] == pair[1], zip(fast, slow, strict=False))
                at = len(list(same))
                raise ValueError(
                    f"tiktoken and tokenizers differ on {text[:60]!r}: {fast[at : at + 8]} and "
                    f"{slow[at : at + 8]} from token {at} on; rebuild the tokenizer with "
                    "initialize, which marks all added tokens as special"
                )


def _pieces(text: str) -> Iterator[str]:
    """Split a long text at certain word ends, so that time stays linear in its length."""
    start = 0
    while len(text) - start > _PIECE:
        border = _BORDER.search(text, start + _PIECE // 2)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def _tiktoken(spec_text: str) -> Callable[[str], np.ndarray]:
    """Build an encoder from the ranks and the pattern in tokenizer.json.

    Raises ValueError if it does not normalize and split like Qwen3's, KeyError for a token that is
    not spelled in bytes.
    """
    import tiktoken

    match json.loads(spec_text):
        case {
            "model": {"type": "BPE", "vocab": vocabulary},
            "normalizer": None | {"type": "NFC"} as normalizer,
            "pre_tokenizer": {
                "pretokenizers": [
                    {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}},
                    {"type": "ByteLevel"},
                ]
            },
        }:
            pass
        case _:
            raise ValueError("the tokenizer does not normalize and split text as Qwen3's does")
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranks = {bytes(byte_of[letter] for letter in token): vocabulary[token] for token in vocabulary}
    encoding = tiktoken.Encoding(
        "corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )

    def encode(text: str) -> np.ndarray:
        if normalizer is not None and not text.isascii():
            text = unicodedata.normalize("NFC", text)
        return encoding.encode_to_numpy(text, disallowed_special=()).view(np.int32)

    return encode
