"""Corpus text to token ids, fast, with control tokens in the text staying text.

`tiktoken` over the tokenizer's own vocabulary gives the same ids as `tokenizers` at several times the speed. Whether
it does is checked on a sample before use; if not, or if the tokenizer is of another kind, `tokenizers` does the work.
"""

import json
import logging
import random
import unicodedata
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qwen3_encdec.tokenization_qwen3_encdec import _byte_alphabet

logger = logging.getLogger(__name__)

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
    """Encodes corpus text; call it with a text to get its ids, int32, without EOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tiktoken: Any = None
        self._normalize = False
        self.fallback_reason: str | None = None
        """Why `tokenizers` is used, None if `tiktoken` is."""
        try:
            self._build()
            for text in (*_SAMPLE, *_fuzz()):
                if not np.array_equal(self(text), self._slow(text)):
                    raise ValueError(f"tiktoken and tokenizers differ on {text[:40]!r}")
        except (ImportError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._tiktoken, self.fallback_reason = None, str(error)
            logger.warning("encoding with tokenizers, several times slower than tiktoken: %s", error)

    def __call__(self, text: str) -> np.ndarray:
        """Ids of a text."""
        if self._tiktoken is None:
            return self._slow(text)
        if self._normalize:
            text = unicodedata.normalize("NFC", text)
        return self._tiktoken.encode_to_numpy(text, disallowed_special=()).astype(np.int32)

    def _slow(self, text: str) -> np.ndarray:
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def _build(self) -> None:
        """Read ranks and pattern out of tokenizer.json. Raises for anything but a byte-level BPE of Qwen's shape."""
        import tiktoken

        spec = json.loads(self._tokenizer.backend_tokenizer.to_str())
        model, normalizer, steps = spec["model"], spec["normalizer"], spec["pre_tokenizer"]
        if model["type"] != "BPE" or steps["type"] != "Sequence":
            raise ValueError("the tokenizer is not a byte-level BPE")
        split, byte_level = steps["pretokenizers"]
        if split["type"] != "Split" or split["behavior"] != "Isolated" or byte_level["type"] != "ByteLevel":
            raise ValueError("the tokenizer splits text in another way than Qwen's")
        if normalizer is not None and normalizer["type"] != "NFC":
            raise ValueError(f"the tokenizer normalizes with {normalizer['type']}")
        self._normalize = normalizer is not None
        byte_of = {letter: byte for byte, letter in _byte_alphabet().items()}
        ranks = {bytes(byte_of[letter] for letter in token): rank for token, rank in model["vocab"].items()}
        pattern = split["pattern"]["Regex"]
        self._tiktoken = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _fuzz(texts: int = 200) -> list[str]:
    """Random strings over blocks of Unicode that tokenizers trip on; always the same."""
    rng = random.Random(0)
    starts = [0x20, 0x80, 0x300, 0x400, 0x5D0, 0x900, 0xE00, 0x1100, 0x1E00, 0x2000, 0x3040, 0x4E00, 0xAC00, 0x1F600]
    return [
        "".join(chr(rng.choice(pair) + rng.randrange(96)) for _ in range(rng.randrange(1, 60)))
        for pair in (rng.sample(starts, 2) for _ in range(texts))
    ]
