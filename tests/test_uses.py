"""Heads on the encoder, export, and a folder that carries its own code."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

from qwen3_encdec import (
    Qwen3EncoderForSequenceClassification,
    Qwen3EncoderForTokenClassification,
    Qwen3EncoderModel,
    Qwen3ForSeq2SeqLM,
)
from tests.conftest import tiny_config


def test_the_encoder_loads_alone_out_of_the_encoder_decoder(model, source, tmp_path):
    model.save_pretrained(tmp_path)
    encoder, info = Qwen3EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    reference = model.get_encoder()(**source).last_hidden_state
    assert torch.equal(encoder.eval()(**source).last_hidden_state, reference)
    # the control: a folder that lacks a tensor says so
    state = model.state_dict()
    del state["model.encoder.norm.weight"]
    model.save_pretrained(tmp_path / "torn", state_dict=state)
    _, info = Qwen3EncoderModel.from_pretrained(tmp_path / "torn", output_loading_info=True)
    assert info["missing_keys"] == {"encoder.norm.weight"}


@pytest.mark.parametrize(
    "head", [Qwen3EncoderForSequenceClassification, Qwen3EncoderForTokenClassification]
)
def test_heads_load_out_of_the_encoder_decoder_and_ignore_padding(model, source, head, tmp_path):
    model.save_pretrained(tmp_path)
    classifier, info = head.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight", "score.bias"}
    classifier.eval()
    alone = classifier(source["input_ids"][1:2, :6]).logits
    padded = classifier(**source).logits[1:2]
    if head is Qwen3EncoderForTokenClassification:
        padded = padded[:, :6]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


def test_text_classification_refuses_a_batch_that_it_would_average_as_one_text(source):
    model = Qwen3EncoderForSequenceClassification(tiny_config()).eval()
    packed = {"input_ids": source["input_ids"].view(1, -1), "max_seqlen": 9}
    packed["position_ids"] = torch.arange(9).repeat(3)[None]
    packed["cu_seqlens"] = torch.arange(0, 28, 9, dtype=torch.int32)
    square = source | {"attention_mask": torch.ones(3, 1, 9, 9, dtype=torch.bool)}
    for batch in (packed, square):
        with pytest.raises(ValueError, match=r"takes padded batches with a mask \[B, S\]"):
            model(**batch)


def test_classification_returns_a_tuple_if_asked_to(source):
    model = Qwen3EncoderForSequenceClassification(tiny_config()).eval()
    expected = model(**source).logits
    assert torch.equal(model(**source, return_dict=False)[0], expected)
    model.config.return_dict = False
    assert torch.equal(model(**source)[0], expected)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (torch.tensor([0, 3, 1]), "single_label_classification"),
        (torch.tensor([[0.5], [3.0], [1.0]]), "regression"),
        (torch.eye(4)[:3], "multi_label_classification"),
    ],
)
def test_losses_of_micro_batches_add_up(source, labels, problem):
    config = tiny_config(num_labels=1 if problem == "regression" else 4, problem_type=problem)
    model = Qwen3EncoderForSequenceClassification(config).eval()
    inputs = source | {"labels": labels}
    parts = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(3)]
    found = sum(model(**part, num_items_in_batch=labels.numel()).loss for part in parts)
    torch.testing.assert_close(found, model(**inputs).loss)


AUTO = torch.export.Dim.AUTO


@torch.no_grad()
def test_export_of_the_encoder(model, source):
    exported = torch.export.export(
        model.get_encoder(), tuple(source.values()), dynamic_shapes=({0: AUTO, 1: AUTO},) * 2
    ).module()  # fmt: skip
    ids = torch.randint(0, 300, (2, 13))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    for inputs in (tuple(source.values()), (ids, mask)):
        expected = model.get_encoder()(*inputs).last_hidden_state
        torch.testing.assert_close(exported(*inputs).last_hidden_state, expected, atol=1e-5, rtol=0)


class DecoderStep(torch.nn.Module):
    """One decoding step as a function of tensors: what a runtime without Python needs."""

    def __init__(self, model: Qwen3ForSeq2SeqLM):
        super().__init__()
        self.decoder, self.shared = model.model.decoder, model.model.shared

    def forward(self, token, encoder_states, encoder_mask, past):
        cache = DynamicCache(past)
        cache.source_length = encoder_states.shape[1]
        source = {"encoder_hidden_states": encoder_states, "encoder_attention_mask": encoder_mask}
        states = self.decoder(token, **source, cache=cache).last_hidden_state
        return self.shared(states), [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def test_export_of_a_decoder_step(model, source):
    states = model.get_encoder()(**source).last_hidden_state
    tokens = source["input_ids"]

    def full(length: int) -> torch.Tensor:
        return model(**source, decoder_input_ids=tokens[:, :length]).logits[:, -1:]

    cache = model(**source, decoder_input_ids=tokens[:, :4], use_cache=True).cache
    past = [(layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers]
    layers = [({0: AUTO, 2: AUTO},) * 2] * 3
    shapes = ({0: AUTO}, {0: AUTO, 1: AUTO}, {0: AUTO, 1: AUTO}, layers)
    inputs = (tokens[:, 4:5], states, source["attention_mask"], past)
    exported = torch.export.export(DecoderStep(model), inputs, dynamic_shapes=shapes).module()
    logits, past = exported(*inputs)
    torch.testing.assert_close(logits, full(5), atol=1e-5, rtol=1e-5)
    logits, _ = exported(tokens[:, 5:6], states, source["attention_mask"], past)
    torch.testing.assert_close(logits, full(6), atol=1e-5, rtol=1e-5)
    assert (logits - full(5)).abs().max() > 1e-3


REMOTE = """
import sys
sys.modules["qwen3_encdec"] = None  # not installed
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, again = sys.argv[1:]
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert tokenizer.num_sentinel_tokens == 11
for name in ("Model", "ModelForSequenceClassification", "ModelForTokenClassification"):
    auto = getattr(transformers, f"Auto{name}")
    other = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(other).__module__.startswith("transformers_modules."), type(other)
    same = other.get_input_embeddings().weight == model.get_input_embeddings().weight
    assert same.all(), name
print(model.fill("Hello <extra_id_0>.", tokenizer, max_new_tokens=5))
model.save_pretrained(again)
tokenizer.save_pretrained(again)
"""


def test_a_saved_folder_carries_its_code(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(tiny_config(vocab_size=len(tokenizer))).eval()
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "first")
    code = {
        "configuration_qwen3_encdec.py", "modeling_qwen3_encoder.py", "modeling_qwen3_decoder.py",
        "modeling_qwen3_encdec.py", "tokenization_qwen3_encdec.py", "attention_qwen3_encdec.py",
        "loss_qwen3_encdec.py",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "first").glob("*.py")} == code
    expected = model.fill("Hello <extra_id_0>.", tokenizer, max_new_tokens=5)
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}

    def load(program: str, folder: str, again: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", program, tmp_path / folder, tmp_path / again],
            capture_output=True, text=True, env=os.environ | environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    for folder, again in (("first", "second"), ("second", "third")):  # what it saves carries it on
        done = load(REMOTE, folder, again)
        assert done.returncode == 0, done.stderr
        assert done.stdout.removesuffix("\n") == expected
    assert {path.name for path in (tmp_path / "third").glob("*.py")} == code
    # the control: without leave to run code it does not load there
    done = load(REMOTE.replace(", trust_remote_code=True", ""), "first", "no")
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr
