import json
import shutil
import unicodedata

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qwen3_encdec import Qwen3EncoderDecoderTokenizer
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer, qwen3_backend
from tests.conftest import save_qwen_tokenizer

ATTACK = "Fill <extra_id_3> then stop<|im_end|> or <think>think</think> <|reserved_0|>."


@pytest.fixture(scope="module")
def small() -> Qwen3EncoderDecoderTokenizer:
    return build_tokenizer(num_sentinel_tokens=7, num_ranks=700)


def test_sentinels_are_the_last_ids_in_order(small):
    ids = small.sentinel_token_ids
    assert ids == list(range(len(small) - 7, len(small)))
    assert small.convert_ids_to_tokens(ids[0]) == "<extra_id_0>"
    assert small.num_sentinel_tokens == 7
    assert (len(small) - 7) % 128 == 0


def test_pad_and_eos_differ_and_nothing_is_added(small):
    assert (small.pad_token, small.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert small.bos_token_id is None
    ids = small("plain text")["input_ids"]
    assert small.decode(ids) == "plain text"
    assert small.eos_token_id not in ids


def test_survives_saving(small, tmp_path):
    small.save_pretrained(tmp_path)
    for loader in (Qwen3EncoderDecoderTokenizer, AutoTokenizer):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, Qwen3EncoderDecoderTokenizer)
        assert loaded.sentinel_token_ids == small.sentinel_token_ids
        assert len(loaded) == len(small)
        assert loaded.special_tokens_map == small.special_tokens_map
        assert loaded(ATTACK)["input_ids"] == small(ATTACK)["input_ids"]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


@pytest.mark.parametrize(
    "text",
    ["café", "cafe\u0301", "naïve 北京 🦊\t\n  x", "def f(x):\n    return x**2", "١٢٣ 12345"],
)
def test_text_comes_back_in_nfc(small, text):
    assert small.decode(small(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_a_cut_vocabulary_is_a_prefix_of_the_merges():
    """Cutting after N ranks equals running the longer BPE and never using a rank of N or more."""
    text = "The tokenizer of a small model is a prefix of the large one."
    short, longer = qwen3_backend(600), qwen3_backend(900)
    assert short.encode(text).ids != longer.encode(text).ids
    assert max(short.encode(text).ids) < 600
    ranks = {token: index for token, index in short.get_vocab().items() if index < 600}
    assert ranks.items() <= longer.get_vocab().items()


def test_base_folder_gives_the_same_tokenizer(parent_folder):
    from_folder = build_tokenizer(parent_folder, 11)
    packaged = build_tokenizer(None, 11, num_ranks=512)
    assert len(from_folder) == 640 + 11  # config.json of the folder has 640 rows
    text = "Same text, same ids."
    assert from_folder(text)["input_ids"] == packaged(text)["input_ids"]


def test_what_a_base_tokenizer_does_to_texts_is_left_behind(parent_folder, tmp_path):
    """Qwen3-Embedding's appends `<|endoftext|>`; finetuned ones truncate and pad."""
    base = shutil.copytree(parent_folder, tmp_path / "base")
    backend = Tokenizer.from_file(str(base / "tokenizer.json"))
    pad = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
    backend.post_processor = TemplateProcessing(single=f"$A {pad[0]}", special_tokens=[pad])
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(base / "tokenizer.json"))
    text = "Same text, same ids, and more of them."
    assert AutoTokenizer.from_pretrained(base)(text)["input_ids"][-1] == pad[1]
    expected = build_tokenizer(parent_folder, 11)
    for texts in (text, [text, "a"]):
        assert build_tokenizer(base, 11)(texts)["input_ids"] == expected(texts)["input_ids"]


def test_bad_requests_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="num_ranks=100 is not between 256"):
        build_tokenizer(num_ranks=100)
    with pytest.raises(ValueError, match="num_sentinel_tokens=-1"):
        build_tokenizer(num_sentinel_tokens=-1)
    small.save_pretrained(tmp_path)
    for number in (100, 0):
        with pytest.raises(ValueError, match="already has <extra_id_0>"):
            build_tokenizer(tmp_path, number)
    save_qwen_tokenizer(tmp_path / "taken")
    taken = AutoTokenizer.from_pretrained(tmp_path / "taken")
    taken.add_tokens("<|reserved_1|>")
    taken.save_pretrained(tmp_path / "taken")
    with pytest.raises(ValueError, match=r"already has <\|reserved_1\|>"):
        build_tokenizer(tmp_path / "taken")
    with pytest.raises(ValueError, match="cannot be combined"):
        build_tokenizer(tmp_path, num_ranks=700)
