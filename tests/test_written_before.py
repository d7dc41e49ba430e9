"""Folders that commit 95a6fa2 wrote load and give the numbers that it computed of them."""

import json
from pathlib import Path

import pytest
import torch

from qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.embedding.encoder import TextEncoder

FOLDER = Path(__file__).parent / "data" / "written_by_95a6fa2"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@torch.no_grad()
def test_a_checkpoint_gives_the_same_numbers():
    model, info = Qwen3ForSeq2SeqLM.from_pretrained(FOLDER / "checkpoint", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[3, 9, 4, 250, 17], [8, 2, 1, 0, 0]])
    source = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
    labels = torch.tensor([[3, 6, 11], [5, 7, -100]])
    output = model.eval()(**source, labels=labels)
    assert output.loss.item() == pytest.approx(EXPECTED["loss"], abs=1e-6)
    expected = torch.tensor(EXPECTED["logits"])
    torch.testing.assert_close(output.logits[0], expected, atol=1e-5, rtol=1e-5)
    assert model.generate(**source, max_new_tokens=6).tolist() == EXPECTED["generated"]
    # the control: one tensor exchanged
    first, second = (layer.self_attn for layer in model.model.decoder.layers)
    first.v_proj.weight.data, second.v_proj.weight.data = (
        second.v_proj.weight.data,
        first.v_proj.weight.data,
    )
    assert abs(model(**source, labels=labels).loss.item() - EXPECTED["loss"]) > 1e-3


def test_an_extracted_encoder_gives_the_same_embeddings():
    found = TextEncoder(FOLDER / "encoder", dtype=torch.float32)
    embeddings = torch.from_numpy(found.encode(["One text.", "Another, which is longer."]))
    torch.testing.assert_close(embeddings, torch.tensor(EXPECTED["embeddings"]), atol=1e-5, rtol=0)
