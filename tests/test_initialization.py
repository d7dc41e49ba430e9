import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM, Qwen3Model

from qwen3_encdec import Qwen3EncoderDecoderTokenizer, Qwen3ForSeq2SeqLM
from qwen3_encdec.conversion import initialize as module
from qwen3_encdec.conversion.initialize import initialize, pick_layers, verify_initialization
from qwen3_encdec.folders import InputError, read_tensors
from tests.conftest import save_qwen_tokenizer, tiny_qwen3_config


@pytest.fixture
def parent_copy(parent_folder, tmp_path):
    return shutil.copytree(parent_folder, tmp_path / "parent")


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_tensor_is_copied_and_only_sentinels_are_new(parent_folder, init_folder):
    source = load_file(parent_folder / "model.safetensors")
    target = load_file(init_folder / "model.safetensors")
    for name, tensor in source.items():
        if name == "model.embed_tokens.weight":
            assert torch.equal(target["model.shared.weight"][:640], tensor)
            continue
        for stack in ("encoder", "decoder"):
            assert torch.equal(target[name.replace("model.", f"model.{stack}.", 1)], tensor)
    gates = {name for name in target if name.endswith((".source_gate", ".source_scale"))}
    assert len(gates) == 2 * 3  # of three decoder layers
    assert len(target) == 2 * (len(source) - 1) + 1 + len(gates)
    # control tokens and bytes were trained, rows 538 ... 639 are spare
    trained = source["model.embed_tokens.weight"][:538]
    sentinels = target["model.shared.weight"][640:]
    assert sentinels.shape == (11, 40)
    assert (sentinels - trained.mean(0)).abs().max() < trained.std(0).max()
    assert len({tuple(row.tolist()) for row in sentinels}) == 11


@torch.no_grad()
def test_the_gate_is_closed_and_the_scale_is_of_the_decoders_own_values(parent_folder, tmp_path):
    """The scale against hooks on the projections while the parent reads the texts by itself."""
    report = initialize(parent_folder, tmp_path / "gated", num_sentinel_tokens=7)
    model = Qwen3ForSeq2SeqLM.from_pretrained(tmp_path / "gated").eval()
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(tmp_path / "gated")
    parent = Qwen3ForCausalLM.from_pretrained(parent_folder).eval().model
    own, source = [[] for _ in range(3)], [[] for _ in range(3)]

    def collect(values):
        return lambda _, __, output: values.append(output[0])

    for text in module.TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        half = ids.shape[1] // 2
        encoded = model.get_encoder()(ids[:, :half]).last_hidden_state
        projections = [layer.self_attn.v_proj for layer in parent.layers]
        for values, project in zip(source, projections, strict=True):
            values.append(project(encoded)[0])
        hooks = [
            project.register_forward_hook(collect(values))
            for values, project in zip(own, projections, strict=True)
        ]
        parent(ids[:, half:])
        for hook in hooks:
            hook.remove()
    for i, layer in enumerate(model.model.decoder.layers):
        sizes = [torch.cat(side[i]).square().mean().sqrt() for side in (own, source)]
        expected = float(sizes[0] / sizes[1])
        assert layer.self_attn.source_scale.item() == pytest.approx(expected, rel=1e-4)
        assert report.source_scales[i] == pytest.approx(expected, rel=1e-4)
        assert layer.self_attn.source_gate.eq(0).all()
    plain = initialize(parent_folder, tmp_path / "plain", num_sentinel_tokens=7, source_gate=False)
    assert plain.source_scales == []
    assert not Qwen3ForSeq2SeqLM.from_pretrained(tmp_path / "plain").config.source_gate
    raw, gated = plain.verification, report.verification
    assert gated.alone == pytest.approx(raw.alone, abs=1e-4)
    assert gated.with_source != pytest.approx(raw.with_source, abs=1e-2)


def test_report_counts_what_the_folder_holds(parent_folder, tmp_path):
    report = initialize(parent_folder, tmp_path / "out", num_sentinel_tokens=7)
    model = Qwen3ForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.untied_parameters - report.parameters == 2 * 647 * 40
    assert report.new_rows == 7
    proof = report.verification
    assert proof.passed
    assert max(proof.encoder, proof.decoder) < 1e-5
    assert min(proof.encoder_control, proof.decoder_control) > 1e-2
    assert "verified on the saved folder" in str(report)
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == model.config.vocab_size == 647
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.decoder_start_token_id == tokenizer.pad_token_id


def test_the_noise_on_sentinels_is_the_seeds(parent_folder, tmp_path):
    rows = []
    for seed in (0, 0, 1):
        initialize(parent_folder, tmp_path / "out", seed=seed, verify=False)
        rows.append(load_file(tmp_path / "out/model.safetensors")["model.shared.weight"])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0][640:], rows[2][640:])


def test_bfloat16_and_fewer_decoder_layers(parent_folder, tmp_path):
    report = initialize(parent_folder, tmp_path / "out", dtype="bfloat16", num_decoder_layers=2)
    assert report.verification.passed
    source, target = (load_file(f / "model.safetensors") for f in (parent_folder, tmp_path / "out"))
    assert {tensor.dtype for tensor in target.values()} == {torch.bfloat16}
    name = "layers.{}.mlp.up_proj.weight"
    last = target["model.decoder." + name.format(1)]
    assert torch.equal(last, source["model." + name.format(2)].bfloat16())


@pytest.mark.parametrize(
    ("available", "wanted", "picks"),
    [(3, 3, [0, 1, 2]), (28, 2, [0, 27]), (7, 4, [0, 2, 4, 6]), (5, 1, [4])],
)
def test_picked_layers_are_spread_evenly(available, wanted, picks):
    assert pick_layers(available, wanted) == picks


def test_an_untied_head_is_dropped_aloud_and_biases_are_copied(tmp_path):
    torch.manual_seed(0)
    parent = Qwen3ForCausalLM(tiny_qwen3_config(tie_word_embeddings=False, attention_bias=True))
    for name, bias in parent.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias)
    # In shards, as large checkpoints come.
    parent.save_pretrained(tmp_path / "parent", max_shard_size="100KB")
    assert len(list((tmp_path / "parent").glob("*.safetensors"))) > 1
    save_qwen_tokenizer(tmp_path / "parent")
    report = initialize(tmp_path / "parent", tmp_path / "out")
    assert report.dropped == ["lm_head.weight"]
    assert report.verification.passed


def test_a_wrong_map_is_refused_and_leaves_nothing(parent_folder, tmp_path, monkeypatch):
    """The gate against a real bug: gate and up projections exchanged, shapes all fitting."""

    def exchanged(folder):
        for name, tensor in read_tensors(folder):
            up, gate = name.replace("gate_proj", "up_proj"), name.replace("up_proj", "gate_proj")
            yield (up if "gate_proj" in name else gate), tensor

    monkeypatch.setattr(module, "read_tensors", exchanged)
    with pytest.raises(InputError, match="verification failed, nothing was written"):
        initialize(parent_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_verification_reads_the_saved_folder(parent_folder, init_folder, tmp_path):
    folder = shutil.copytree(init_folder, tmp_path / "edited")
    edit_tensors(folder, lambda t: t["model.decoder.layers.1.self_attn.q_norm.weight"].mul_(1.1))
    edited = verify_initialization(parent_folder, folder, [0, 1, 2], torch.float32)
    assert not edited.passed
    assert edited.encoder < 1e-5 < 1e-4 < edited.decoder


def test_nan_does_not_pass(parent_copy, tmp_path):
    """In either stack: `max` of a number and NaN depends on their order."""
    numbers = {"encoder": 0.0, "decoder": 0.0, "encoder_control": 1.0, "decoder_control": 1.0}
    assert module.Verification(**numbers, alone=6.0, with_source=6.0).passed
    for name in numbers:
        wrong = module.Verification(**numbers | {name: math.nan}, alone=6.0, with_source=6.0)
        assert not wrong.passed
    # a layer that was pruned to zeros has a scale all the same
    edit_tensors(parent_copy, lambda t: t["model.layers.1.self_attn.v_proj.weight"].zero_())
    report = initialize(parent_copy, tmp_path / "out")
    assert report.source_scales[1] == 1
    assert report.verification.passed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.update({"score.weight": torch.zeros(2)}), "score.weight .* is not one of a"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(1)}), r"\(1,\) does not fit model"),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.zeros(900, 40)}),
            r"\(900, 40\) does not fit model.shared.weight",
        ),
        (lambda t: t["model.norm.weight"].fill_(math.nan), "model.norm.weight contains NaN"),
        (lambda t: t.pop("model.norm.weight"), "no tensor for model.decoder.norm.weight"),
    ],
)
def test_the_key_map_is_strict_both_ways(parent_copy, tmp_path, change, sentence):
    edit_tensors(parent_copy, change)
    with pytest.raises(InputError, match=sentence):
        initialize(parent_copy, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"parent"}


def test_a_folder_saved_from_qwen3model_has_names_without_their_prefix(
    parent_copy, init_folder, tmp_path
):
    """Qwen3-Embedding's checkpoints are such folders."""
    Qwen3Model.from_pretrained(parent_copy).save_pretrained(parent_copy)
    assert "norm.weight" in load_file(parent_copy / "model.safetensors")
    assert initialize(parent_copy, tmp_path / "out", num_sentinel_tokens=11).verification.passed
    found, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "out", init_folder))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bad_sources_are_named(parent_copy, tmp_path):
    def refused(sentence, base=parent_copy, **options):
        with pytest.raises(InputError, match=sentence):
            initialize(base, tmp_path / "out", **options)

    refused(r"checkpoint \./nowhere does not exist", "./nowhere")
    refused("dtype 'float16' is not one of", dtype="float16")
    weights, file = parent_copy / "model.safetensors", parent_copy / "config.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("model.safetensors is truncated, damaged or missing")
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_type": "qwen3_moe"}))
    refused("has model_type 'qwen3_moe', which is not a dense Qwen3")
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(config | quantized))
    refused(r"is quantized \(gptq\); use the unquantized checkpoint")
    assert {path.name for path in tmp_path.iterdir()} == {"parent"}
