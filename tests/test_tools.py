"""transformers' own tools on every public class, with T5 beside ours: right is what T5 does.

Trainer, Seq2SeqTrainer, the collators, accelerate's offloading, PEFT and quantization are used as
their documentation shows them; nothing here knows how the model is built.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Qwen3ForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    T5ForTokenClassification,
    T5Model,
    TorchAoConfig,
    Trainer,
    pipeline,
)
from transformers.utils.generic import find_labels

from qwen3_encdec import (
    Qwen3EncoderDecoderModel,
    Qwen3EncoderForSequenceClassification,
    Qwen3EncoderForTokenClassification,
    Qwen3EncoderModel,
    Qwen3ForSeq2SeqLM,
)
from tests.conftest import tiny_config, tiny_qwen3_config, tiny_t5_config

VOCABULARY, PAD, EOS = 395, 300, 302


def ours() -> Qwen3ForSeq2SeqLM:
    torch.manual_seed(0)
    return Qwen3ForSeq2SeqLM(tiny_config(vocab_size=VOCABULARY, num_hidden_layers=2))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(tiny_t5_config(vocab_size=VOCABULARY))


beside_t5 = pytest.mark.parametrize("build", [t5, ours])


def pairs(count: int = 8, labels: bool = True) -> list[dict[str, list[int]]]:
    """Sources of 2 to 8 and targets of 2 to 7 tokens."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        source = random.integers(0, 290, random.integers(2, 9)).tolist()
        target = random.integers(0, 290, random.integers(1, 7)).tolist()
        rows.append({"input_ids": source} | ({"labels": [*target, EOS]} if labels else {}))
    return rows


def eval_batches(tokenizer) -> list:
    """The two batches that trainers make of six pairs."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    return [collate(pairs(6)[:3]), collate(pairs(6)[3:])]


def source_of(batch) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def loss_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def arguments(folder, **changes) -> Seq2SeqTrainingArguments:
    options = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "max_steps": 4,
        "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [],
        "disable_tqdm": True,
    }  # fmt: skip
    return Seq2SeqTrainingArguments(output_dir=folder, **{**options, **changes})


def seq2seq_trainer(model, tokenizer, folder, collate_model=None, **changes) -> Seq2SeqTrainer:
    return Seq2SeqTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=pairs(),
        eval_dataset=pairs(6),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=collate_model),
        processing_class=tokenizer,
    )


HEADS = {
    T5ForTokenClassification: tiny_t5_config,
    Qwen3EncoderForTokenClassification: tiny_config,
    Qwen3ForSequenceClassification: tiny_qwen3_config,
    Qwen3EncoderForSequenceClassification: tiny_config,
}
heads = pytest.mark.parametrize("head", HEADS)


def build_head(head):
    torch.manual_seed(0)
    return head(HEADS[head](vocab_size=VOCABULARY, pad_token_id=PAD, num_labels=3))


def head_trainer(head, tokenizer, folder, **changes) -> Trainer:
    of_tokens = "Token" in head.__name__
    rows = pairs(labels=False)
    for row in rows:
        classes = [token % 3 for token in row["input_ids"]]
        row["labels"] = classes if of_tokens else classes[0]
    collator = DataCollatorForTokenClassification if of_tokens else DataCollatorWithPadding

    def accuracy(prediction):
        kept = prediction.label_ids != -100
        hits = prediction.predictions.argmax(-1) == prediction.label_ids
        return {"accuracy": float(hits[kept].mean())}

    return Trainer(
        model=build_head(head),
        args=arguments(folder, **changes),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator(tokenizer),
        compute_metrics=accuracy,
    )


def trainer_of(build, tokenizer, folder, **changes) -> Trainer:
    if build in HEADS:
        return head_trainer(build, tokenizer, folder, **changes)
    return seq2seq_trainer(build(), tokenizer, folder, **changes)


def assert_same_weights(model, other, **tolerance) -> None:
    mine, its = model.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], its[name], msg=name, **tolerance)


# --- what transformers asks a class about itself


def test_no_argument_but_labels_is_taken_for_a_label():
    heads = Qwen3EncoderForSequenceClassification, Qwen3EncoderForTokenClassification
    for model_class in (T5ForConditionalGeneration, Qwen3ForSeq2SeqLM, *heads):
        assert find_labels(model_class) == ["labels"]
    for model_class in (T5Model, Qwen3EncoderDecoderModel, Qwen3EncoderModel):
        assert find_labels(model_class) == []


# --- Trainer


def token_accuracy(prediction) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    labels = prediction.label_ids
    assert logits.shape == (*labels.shape, VOCABULARY)
    return {"accuracy": float((logits.argmax(-1) == labels)[labels != -100].mean())}


@beside_t5
def test_trainer_evaluates_and_loads_the_best(build, tokenizer, tmp_path):
    model = build()
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # the first step's, which is not the last
        ),
        train_dataset=pairs(),
        eval_dataset=pairs(6),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=token_accuracy,
    )
    trainer.train()
    history = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(history) == len(set(history)) == 3
    assert max(history) != history[-1]
    best = build().from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_weights(model, best, rtol=0, atol=0)

    # evaluate() against the same by hand
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(max(history), rel=1e-5)
    losses, hits = [], []
    model.eval()
    for batch in eval_batches(tokenizer):
        logits = model(**batch).logits
        losses.append(loss_by_hand(logits, batch["labels"]).item())
        hits += (logits.argmax(-1) == batch["labels"])[batch["labels"] != -100].tolist()
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(hits))


everything = pytest.mark.parametrize("build", [t5, ours, *HEADS])


@everything
def test_resumed_is_the_straight_run(build, tokenizer, tmp_path):
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    straight = trainer_of(build, tokenizer, tmp_path / "straight", **options)
    straight.train()
    stopped = trainer_of(build, tokenizer, tmp_path / "a", **options, max_steps=2)
    stopped.train()
    resumed = trainer_of(build, tokenizer, tmp_path / "a", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, straight.model, rtol=0, atol=0)
    with pytest.raises(AssertionError):  # the control: two steps are not four
        assert_same_weights(stopped.model, straight.model)


@everything
def test_accumulated_micro_batches_are_one_batch(build, tokenizer, tmp_path):
    """Theirs take no num_items_in_batch, and lose count of unequal batches: the control."""
    step = {"max_steps": 1, "learning_rate": 1.0}
    whole = trainer_of(build, tokenizer, tmp_path, **step, per_device_train_batch_size=8)
    parts = trainer_of(build, tokenizer, tmp_path, **step, gradient_accumulation_steps=4)
    whole.train()
    parts.train()
    theirs = build is t5 or HEADS.get(build, tiny_config) is not tiny_config
    with pytest.raises(AssertionError) if theirs else nullcontext():
        assert_same_weights(parts.model, whole.model, atol=1e-5, rtol=1e-4)


# --- label smoothing


@beside_t5
def test_label_smoothing_of_the_trainer(build, tokenizer, tmp_path):
    model = build()
    options = {"label_smoothing_factor": 0.5, "max_steps": 1, "per_device_train_batch_size": 8}
    trainer = seq2seq_trainer(model, tokenizer, tmp_path, collate_model=model, **options)
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)(pairs())
    logits = build().eval()(**batch).logits
    log_probs, kept = logits.log_softmax(-1), batch["labels"] != -100
    right = log_probs.gather(-1, batch["labels"].clamp(min=0)[..., None]).squeeze(-1)
    by_hand = -(0.5 * right + 0.5 * log_probs.mean(-1))[kept].mean()
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(by_hand.item(), rel=1e-4)
    assert abs(logged + right[kept].mean().item()) > 1e-3  # the control: without smoothing
    assert trainer.evaluate()["eval_loss"] > 0


# --- Seq2SeqTrainer


@beside_t5
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("prepared", [False, True], ids=["labels", "decoder_input_ids"])
def test_predict_with_generate(build, beams, prepared, tokenizer, tmp_path):
    model = build()
    trainer = seq2seq_trainer(
        model,
        tokenizer,
        tmp_path,
        collate_model=model if prepared else None,
        predict_with_generate=True,
        generation_max_length=7,
        generation_num_beams=beams,
        max_steps=1,
    )
    trainer.train()
    losses, expected = [], []
    model.eval()
    for batch in eval_batches(tokenizer):
        tokens = model.generate(**source_of(batch), max_length=7, num_beams=beams)
        width = 20  # the trainer pads to the generation config's own max_length
        expected += nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=PAD).tolist()
        losses.append(loss_by_hand(model(**batch).logits, batch["labels"]).item())
    output = trainer.predict(pairs(6))
    assert output.predictions.tolist() == expected
    assert output.label_ids.shape == (6, width)
    assert output.metrics["test_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@beside_t5
def test_predict_with_generate_without_labels(build, tokenizer, tmp_path):
    trainer = Seq2SeqTrainer(
        model=build(),
        args=arguments(tmp_path, predict_with_generate=True, generation_max_length=7),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    sources = pairs(3, labels=False)
    output = trainer.predict(sources)
    assert output.label_ids is None
    assert "test_loss" not in output.metrics
    batch = DataCollatorWithPadding(tokenizer)(sources)
    tokens = trainer.model.generate(**batch, max_length=7)
    assert output.predictions[:, : tokens.shape[1]].tolist() == tokens.tolist()


# --- the collator's two sides


@beside_t5
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_labels_and_prepared_decoder_input_are_one(build, side, training, tokenizer):
    """Without a mask over the target, what lies left of a label is read as decoder input."""
    model = build().train(training)
    tokenizer.padding_side = side
    try:
        plain = DataCollatorForSeq2Seq(tokenizer)(pairs())
        prepared = DataCollatorForSeq2Seq(tokenizer, model=model)(pairs())
    finally:
        tokenizer.padding_side = "right"
    assert (plain["labels"][:, 0] == -100).any() == (side == "left")
    losses = model(**plain).loss, model(**prepared).loss
    torch.testing.assert_close(*losses)
    labels = prepared.pop("labels")
    torch.testing.assert_close(loss_by_hand(model(**prepared).logits, labels), losses[0])


# --- offloading and device maps


def numbers(model) -> dict[str, torch.Tensor]:
    """Losses, logits and tokens of a batch with padding, in eval mode and in training."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 290, (3, 9), generator=random)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.randint(0, 290, (3, 6), generator=random)
    labels[2, 4:] = -100
    batch = {"input_ids": ids, "attention_mask": mask}
    found = {}
    with torch.no_grad():
        for mode in ("train", "eval"):
            model.train(mode == "train")
            found[f"{mode} loss"] = model(**batch, labels=labels).loss
            found[f"{mode} logits"] = model(**batch, decoder_input_ids=ids[:, :4]).logits
        found["eval logits beside the loss"] = model(**batch, labels=labels).logits
        found["tokens"] = model.generate(**batch, max_new_tokens=5, do_sample=False)
        found["beams"] = model.generate(**batch, max_new_tokens=5, num_beams=2)
    return found


def assert_same_numbers(found, expected, **tolerance) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, msg=lambda text, name=name: name + text, **tolerance
        )


@beside_t5
def test_offload(build, tmp_path):
    expected, cpu = numbers(build()), torch.device("cpu")
    assert_same_numbers(numbers(cpu_offload(build(), cpu)), expected)
    assert_same_numbers(numbers(disk_offload(build(), str(tmp_path), cpu)), expected)
    other = build()
    nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(AssertionError):
        assert_same_numbers(numbers(other), expected)


@beside_t5
@pytest.mark.parametrize("stacks", [None, "cpu", "disk"])
def test_device_map(build, stacks, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "saved")
    if stacks is None:
        device_map = "auto"
    elif build is t5:
        # T5's own KeyError when the tied table lies on the disk too is not ours to copy
        device_map = {"shared": "cpu", "lm_head": "cpu"}
        for stack in ("encoder", "decoder"):
            device_map |= {f"{stack}.block": stacks, f"{stack}.final_layer_norm": stacks}
            device_map |= {f"{stack}.embed_tokens": "cpu"}
    else:
        device_map = {"model.shared": "cpu", "model.encoder": stacks, "model.decoder": stacks}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert_same_numbers(numbers(loaded), numbers(model))


# --- heads on the encoder


@heads
def test_heads_learn_under_the_trainer(head, tokenizer, tmp_path):
    options = {"max_steps": 40, "learning_rate": 3e-3, "optim": "adamw_torch"}
    trainer = head_trainer(head, tokenizer, tmp_path, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_accuracy"] > max(0.8, before["eval_accuracy"])


@pytest.mark.parametrize(
    ("head", "task"),
    [
        (Qwen3EncoderForSequenceClassification, "text-classification"),
        (Qwen3EncoderForTokenClassification, "token-classification"),
    ],
)
def test_pipelines_over_saved_heads(head, task, tokenizer, tmp_path):
    model = build_head(head).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = pipeline(task, model=str(tmp_path), device="cpu")
    assert type(loaded.model) is head
    assert_same_weights(loaded.model, model, rtol=0, atol=0)
    texts = ["One text", "and another, which is longer."]
    for text, answer in zip(texts, loaded(texts, batch_size=2), strict=True):
        scores = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        parts = [answer] if task == "text-classification" else answer
        found = [part["score"] for part in parts]
        assert found == pytest.approx(scores.amax(-1).reshape(-1).tolist(), rel=1e-4)


# --- adapters

PROJECTIONS = {
    t5: ["q", "k", "v", "o", "wi", "wo"],
    ours: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def adapted(build, **changes):
    peft = pytest.importorskip("peft")
    options = {"r": 3, "target_modules": PROJECTIONS[build], "task_type": "SEQ_2_SEQ_LM"}
    config = peft.LoraConfig(**options, **changes)
    torch.manual_seed(1)
    return peft.get_peft_model(build(), config)


def merge_and_reload(model, build, folder) -> None:
    """A saved adapter gives the same numbers on a fresh base, merged ones too."""
    peft = pytest.importorskip("peft")
    expected, base = numbers(model), numbers(build())
    for name in ("train loss", "eval loss", "eval logits"):
        assert not torch.allclose(expected[name], base[name], rtol=1e-3), name
    model.save_pretrained(folder)
    assert_same_numbers(numbers(peft.PeftModel.from_pretrained(build(), folder)), expected)
    merged = model.merge_and_unload()
    assert_same_numbers(numbers(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(folder / "merged")
    again = type(merged).from_pretrained(folder / "merged")
    assert_same_numbers(numbers(again), numbers(merged))


@beside_t5
def test_lora_on_both_stacks(build, tokenizer, tmp_path):
    model = adapted(build)
    trainable = [name for name, part in model.named_parameters() if part.requires_grad]
    # A and B of each projection; T5's decoder has four more for its attention to the source
    each_layer = 2 * 6 + 4 if build is t5 else 2 * 7
    assert len(trainable) == 2 * 2 * each_layer
    trainer = seq2seq_trainer(
        model, tokenizer, tmp_path, max_steps=2, learning_rate=1.0, gradient_checkpointing=True
    )
    trainer.label_names = ["labels"]
    trainer.train()
    assert all(part.grad is None or part.requires_grad for part in model.parameters())
    merge_and_reload(model, build, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("name", ["shared", "embed_tokens", "lm_head"])
def test_lora_with_a_trained_embedding(name, tying, tokenizer, tmp_path):
    """The copy's gradient is that of full finetuning: from source, target and head.

    Ours is one module, `shared`; of a name that no module has PEFT trains nothing. No T5 here: its
    four modules get four copies, or none, and with `ensure_weight_tying` PEFT 0.21 breaks it.
    """
    full = ours()
    batch = DataCollatorForSeq2Seq(tokenizer)(pairs())
    full(**batch).loss.backward()
    expected = full.get_input_embeddings().weight.grad

    model = adapted(ours, modules_to_save=[name], ensure_weight_tying=tying).train()
    model(**batch).loss.backward()
    trained = [part for part in model.parameters() if part.requires_grad]
    copies = [part for part in trained if part.shape == expected.shape]
    assert len(copies) == 1 or (name != "shared" and not copies)
    for copy in copies:
        torch.testing.assert_close(copy.grad, expected, atol=1e-6, rtol=1e-4)
        copy.data -= 5.0 * copy.grad
    labels = batch["labels"]
    prepared = source_of(batch)
    prepared["decoder_input_ids"] = full.prepare_decoder_input_ids_from_labels(labels)
    for training in (True, False):
        model.train(training)
        by_hand = loss_by_hand(model(**prepared).logits, labels)
        torch.testing.assert_close(model(**batch).loss, by_hand)
    if copies:
        assert (by_hand - full(**batch).loss).abs() > 0.01
        merge_and_reload(model, ours, tmp_path)


# --- quantization


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "similar"), [(8, 0.998), (4, 0.9)])
def test_weight_only_quantization(bits, similar, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "initializer_range": 0.05}
    model = Qwen3ForSeq2SeqLM(tiny_config(vocab_size=VOCABULARY, **sizes)).eval()
    model.save_pretrained(tmp_path / "full")
    if bits == 8:
        how = quantization.Int8WeightOnlyConfig()
    else:
        group = quantization.PerGroup(32)
        how = quantization.IntxWeightOnlyConfig(torch.int4, granularity=group)
    quantized = Qwen3ForSeq2SeqLM.from_pretrained(
        tmp_path / "full", quantization_config=TorchAoConfig(how)
    )
    assert type(quantized.model.encoder.layers[0].mlp.up_proj.weight) is not nn.Parameter
    # shared with the head: left whole
    assert type(quantized.get_input_embeddings().weight) is nn.Parameter
    found, expected = (numbers(part)["eval logits"] for part in (quantized, model))
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), 0) > similar
    assert not torch.equal(found, expected)
