"""Corpus text to token ids, fast, with control tokens in the text staying text.

`gigatoken` and `tiktoken` over the tokenizer's own vocabulary give the same ids as `tokenizers` at
30 and 4 times the speed. Whether they do is checked on a sample before use; if not, if neither is
installed, or if the tokenizer is of another kind, `tokenizers` does the work.
"""

import hashlib
import json
import logging
import os
import random
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.tokenization_qwen3_encdec import byte_alphabet

logger = logging.getLogger(__name__)

# gigatoken keeps every word that it has met: half a second for a new one, now and then, bounds its
# memory.
_CACHED_CHARACTERS = 2**30
_SAMPLE = (
    "The quick brown fox's 12,345 jumps -- isn't it?  \n\n\tdef f(x):\r\n    return x**2 # ok\n",
    "Ünïcödé cafe\u0301 A\u030a ﬁ ½ … “quoted” naïve\u00a0space\u200bzero\u3000wide",
    "Съешь ещё этих мягких французских булок, да выпей чаю. Ελληνικά, עברית שָׁלוֹם, العربية ١٢٣",
    "天地玄黃，宇宙洪荒。日本語のテキスト、한국어 문장 각, ภาษาไทย, हिन्दी में परीक्षण",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0323\u0307 \U0001d54f \ue000 \ufeff\x00\x07 http://a.b/c?d=e&f=%20",
    "<|im_end|><extra_id_0> <|endoftext|>text<extra_id_3>.<think>",
    "a" * 300 + " " * 70 + "\n" * 9 + "ab" * 90 + "!?" * 40,
    "",
)


class Encoder:
    """Encodes corpus text: a text by calling it, many by `batch`; ids are int32, without EOS."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, refused: str | None = None, checked: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._spec = tokenizer.backend_tokenizer.to_str()
        self.fingerprint = hashlib.sha256(self._spec.encode()).hexdigest()[:16]
        """Changes with anything that the tokenizer does."""
        self.name = "tokenizers"
        """Which library encodes."""
        self.fallback_reason: str | None = None
        """Why none that is faster does, None if one does."""
        self._characters = 0
        self._encode: Callable[[str], np.ndarray]
        if refused is not None:
            self._encode, self.fallback_reason = self._slow, refused
            return
        reasons = []
        for name, build in (("gigatoken", self._gigatoken), ("tiktoken", self._tiktoken)):
            try:
                self._encode = build()
                for text in () if checked else (*_SAMPLE, *_fuzz()):
                    self._compare(name, text)
                self.name = name
                return
            except (
                ImportError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RuntimeError,
            ) as error:
                reasons.append(str(error))
        self._encode, self.fallback_reason = self._slow, "; ".join(reasons)
        _warn_once(f"encoding with tokenizers, several times slower: {self.fallback_reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        # The libraries' objects cannot travel to another process; what was found about them can.
        return type(self), (self._tokenizer, self.fallback_reason, True)

    def _compare(self, name: str, text: str) -> None:
        """Raise ValueError, with the part of a text that is encoded differently and both ids."""
        fast, slow = self._encode(text).tolist(), self._slow(text).tolist()
        if fast == slow:
            return
        fast, slow = _different_part(fast, slow)
        decoder = self._tokenizer.backend_tokenizer.get_added_tokens_decoder()
        ordinary = [token.content for token in decoder.values() if not token.special]
        remedy = "tokenize the corpus once with prepare-data and train on the result"
        if ordinary:
            remedy = (
                f"{ordinary[0]} and {len(ordinary) - 1} more added tokens are not special, so that "
                "corpus text becomes control tokens: initialize again, or make the tokenizer again "
                "with `qwen3-encdec tokenizer`"
            )
        part = self._tokenizer.decode(slow)
        raise ValueError(f"{part!r} is {fast} to {name} and {slow} to tokenizers; {remedy}")

    def __call__(self, text: str) -> np.ndarray:
        """Ids of a text."""
        self._characters += len(text)
        if self.name == "gigatoken" and self._characters > _CACHED_CHARACTERS:
            self._encode, self._characters = self._gigatoken(), 0
        try:
            return self._encode(text)
        except ValueError:  # tiktoken's regular expressions give up on millions of spaces
            return self._slow(text)

    def batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after another (int32), and how many each has (int64)."""
        parts = [self(text) for text in texts]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        return np.concatenate([np.empty(0, dtype=np.int32), *parts]), lengths

    def _slow(self, text: str) -> np.ndarray:
        ids = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def _gigatoken(self) -> Callable[[str], np.ndarray]:
        from gigatoken import Tokenizer

        # Without its added tokens it cannot take their spelling for them.
        encode = Tokenizer.from_json(
            json.dumps({**json.loads(self._spec), "added_tokens": []})
        ).encode
        return lambda text: encode(text).view(np.int32)

    def _tiktoken(self) -> Callable[[str], np.ndarray]:
        """Ranks and pattern out of tokenizer.json.

        Raises for anything but a byte-level BPE of Qwen's shape.
        """
        import tiktoken

        spec = json.loads(self._spec)
        model, normalizer, steps = spec["model"], spec["normalizer"], spec["pre_tokenizer"]
        if model["type"] != "BPE" or steps["type"] != "Sequence":
            raise ValueError("the tokenizer is not a byte-level BPE")
        split, byte_level = steps["pretokenizers"]
        if (
            split["type"] != "Split"
            or split["behavior"] != "Isolated"
            or byte_level["type"] != "ByteLevel"
        ):
            raise ValueError("the tokenizer splits text in another way than Qwen's")
        if normalizer is not None and normalizer["type"] != "NFC":
            raise ValueError(f"the tokenizer normalizes with {normalizer['type']}")
        byte_of = {letter: byte for byte, letter in byte_alphabet().items()}
        ranks = {
            bytes(byte_of[letter] for letter in token): rank
            for token, rank in model["vocab"].items()
        }
        pattern = split["pattern"]["Regex"]
        encode = tiktoken.Encoding(
            "corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        ).encode_to_numpy

        def encode_text(text: str) -> np.ndarray:
            if normalizer is not None and not text.isascii():
                text = unicodedata.normalize("NFC", text)
            return encode(text, disallowed_special=()).view(np.int32)

        return encode_text


@cache
def _warn_once(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(sentence)


def _different_part(first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    """Both lists without their common beginning and end; at least one id of the second is left."""
    shortest = min(len(first), len(second) - 1)
    start = 0
    while start < shortest and first[start] == second[start]:
        start += 1
    end = 0
    while end < shortest - start and first[-end - 1] == second[-end - 1]:
        end += 1
    return first[start : len(first) - end], second[start : len(second) - end]


def _fuzz(texts: int = 200) -> list[str]:
    """Random strings over blocks of Unicode that tokenizers trip on; always the same."""
    rng = random.Random(0)
    starts = [
        0x20,
        0x80,
        0x300,
        0x400,
        0x5D0,
        0x900,
        0xE00,
        0x1100,
        0x1E00,
        0x2000,
        0x3040,
        0x4E00,
        0xAC00,
        0x1F600,
    ]
    return [
        "".join(chr(rng.choice(pair) + rng.randrange(96)) for _ in range(rng.randrange(1, 60)))
        for pair in (rng.sample(starts, 2) for _ in range(texts))
    ]
