"""The training loop against a plain one written out here, and the inputs it refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3EncoderDecoderTokenizer, Qwen3ForSeq2SeqLM
from qwen3_encdec.data.collate import collate, collate_masked, mask_token_id
from qwen3_encdec.data.stream import build_stream
from qwen3_encdec.folders import InputError
from qwen3_encdec.training import plan as budget
from qwen3_encdec.training.config import TrainingConfig, load_config
from qwen3_encdec.training.loop import run_training
from qwen3_encdec.training.optimization import build_optimizer, learning_rate

WORDS = [
    "the",
    "loss",
    "of",
    "an",
    "optimizer",
    "step",
    "is",
    "a",
    "sum",
    "over",
    "its",
    "target",
    "tokens",
]


def write_corpus(path: Path, documents: int = 120) -> Path:
    """Documents of different lengths, so that micro-batches and ranks hold different numbers of
    tokens.
    """
    generator = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(documents):
            length = int(torch.randint(5, 60, (), generator=generator))
            words = [WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def small_run(folder: Path, corpus: Path, **changes) -> TrainingConfig:
    settings = {
        "model": folder, "max_steps": 4, "warmup_steps": 1, "lr": 3e-3, "batch_size": 2, "log_every": 1,
        "save_every": 2, "keep_last": 0, "eval_every": 2, "eval_examples_per_denoiser": 2, "trackers": "[]",
        "data.inputs": f"[{corpus}]", "data.heldout_every": 10, "data.source_length": 64, "data.target_length": 64,
        "max_grad_norm": 0.5, "output_dir": corpus.parent / "run",
    }  # fmt: skip
    return load_config(None, [f"{key}={value}" for key, value in {**settings, **changes}.items()])


def read_metrics(run_dir: Path, *names: str) -> list[tuple]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines if names[0] in line]


def plain_trace(
    config: TrainingConfig, world_size: int, per_micro_batch: bool = False
) -> Iterator[tuple[float, float]]:
    """(loss, gradient norm) by step, from one process and one backward pass over all rows of an
    optimizer step.

    ``per_micro_batch`` is the common mistake: a mean over micro-batches of each one's mean.
    """
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(config.model)
    model = Qwen3ForSeq2SeqLM.from_pretrained(config.model, dtype=torch.float32).train()
    optimizer = build_optimizer(model, config)
    streams = [
        iter(build_stream(config.data, tokenizer, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    options = {"z_loss": config.z_loss, "label_smoothing": config.label_smoothing}
    make_batch = partial(collate, pad_id=tokenizer.pad_token_id)
    if config.mntp_weight:
        kept = np.array([tokenizer.eos_token_id, *tokenizer.sentinel_token_ids])
        make_batch = partial(
            collate_masked, pad_id=tokenizer.pad_token_id, mask_id=mask_token_id(tokenizer), kept_ids=kept,
            probability=config.mntp_probability,
        )  # fmt: skip
        options["encoder_loss_weight"] = config.mntp_weight
    for step in range(1, config.max_steps + 1):
        parts = [
            list(islice(s, config.batch_size))
            for _ in range(config.gradient_accumulation_steps)
            for s in streams
        ]
        parts = parts if per_micro_batch else [[row for part in parts for row in part]]
        loss = torch.zeros(())
        for part in parts:
            batch = make_batch(part)
            batch.pop("denoiser")
            output = model(**batch, **options)
            loss = loss + output.loss / len(parts)
            likelihood = output.token_losses.sum() / (batch["labels"] != -100).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        # The log has the negative log-likelihood, whatever the loss adds to it.
        yield float(loss.detach()) if per_micro_batch else float(likelihood), float(norm)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.mark.parametrize("recompute", [False, True], ids=["", "gradient checkpointing"])
def test_trace_is_that_of_a_plain_loop(init_folder, corpus, tmp_path, recompute):
    config = small_run(
        init_folder,
        corpus,
        output_dir=tmp_path / "run",
        gradient_accumulation_steps=3,
        gradient_checkpointing=recompute,
    )
    checkpoint = run_training(config)
    assert checkpoint == tmp_path / "run/checkpoints/step-000004"
    trace = read_metrics(tmp_path / "run", "loss", "grad_norm")
    assert len(trace) == 4
    torch.testing.assert_close(trace, list(plain_trace(config, 1)), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            trace, list(plain_trace(config, 1, per_micro_batch=True)), rtol=1e-5, atol=1e-5
        )

    rates = [learning_rate(step, config) for step in range(1, 5)]
    assert read_metrics(tmp_path / "run", "lr") == [(rate,) for rate in rates]
    evaluated = read_metrics(tmp_path / "run", "eval_loss/S", "step")
    assert [step for _, step in evaluated] == [0, 2, 4]
    assert evaluated[-1][0] < evaluated[0][0]


@pytest.mark.parametrize("signal", ["z_loss=0.01", "label_smoothing=0.1", "mntp_weight=0.5"])
def test_optional_signals_train_as_in_a_plain_loop(init_folder, corpus, tmp_path, signal):
    name, value = signal.split("=")
    options = {
        "output_dir": tmp_path / "run",
        "gradient_accumulation_steps": 2,
        "eval_every": 0,
        name: value,
    }
    config = small_run(init_folder, corpus, **options)
    run_training(config)
    trace = read_metrics(tmp_path / "run", "loss", "grad_norm")
    torch.testing.assert_close(trace, list(plain_trace(config, 1)), rtol=1e-5, atol=1e-5)
    # the control: without the signal it is another run
    plain = list(plain_trace(small_run(init_folder, corpus, **{**options, name: 0.0}), 1))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trace, plain, rtol=1e-5, atol=1e-5)


def test_masked_sources(init_folder, corpus):
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(init_folder)
    stream = build_stream(small_run(init_folder, corpus).data, tokenizer)
    rows = list(islice(stream, 40))
    kept = np.array([tokenizer.eos_token_id, *tokenizer.sentinel_token_ids])
    options = {
        "pad_id": tokenizer.pad_token_id,
        "mask_id": mask_token_id(tokenizer),
        "kept_ids": kept,
    }
    plain = collate(rows, pad_id=tokenizer.pad_token_id)
    masked = collate_masked(rows, probability=0.3, **options)
    labels = masked.pop("encoder_labels")
    chosen = labels != -100
    assert torch.equal(torch.where(chosen, labels, masked["input_ids"]), plain["input_ids"])
    assert (masked["input_ids"][chosen] == mask_token_id(tokenizer)).all()
    assert not np.isin(labels.numpy(), kept).any()
    can_be = (plain["attention_mask"] > 0) & torch.from_numpy(
        ~np.isin(plain["input_ids"].numpy(), kept)
    )
    assert not (chosen & ~can_be).any()
    assert (chosen.sum() / can_be.sum()).item() == pytest.approx(0.3, abs=0.04)
    for name in set(plain) - {"input_ids"}:
        assert torch.equal(masked[name], plain[name])
    # in whatever batch a row comes
    alone = collate_masked(rows[7:8], probability=0.3, **options)["encoder_labels"][0]
    assert torch.equal(alone, labels[7, : len(alone)])


def test_schedules():
    config = load_config(None, ["max_steps=100", "warmup_steps=10", "lr=1.0", "min_lr_ratio=0.1"])
    assert [learning_rate(step, config) for step in (1, 5, 10, 80)] == [0.1, 0.5, 1.0, 1.0]
    assert learning_rate(90, config) == pytest.approx(0.55)
    for schedule in ("wsd", "cosine", "linear"):
        changed = load_config(
            None, ["max_steps=100", "warmup_steps=10", "lr=1.0", f"schedule={schedule}"]
        )
        rates = [learning_rate(step, changed) for step in range(1, 101)]
        assert max(rates) == 1.0
        assert rates[-1] == pytest.approx(0.1)
        assert rates[9:] == sorted(rates[9:], reverse=True)


def test_norms_and_embedding_are_not_decayed(model):
    decayed, undecayed = build_optimizer(model, TrainingConfig()).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(map(id, decayed["params"] + undecayed["params"])) == sorted(names)
    assert all(names[id(parameter)].endswith("proj.weight") for parameter in decayed["params"])
    assert any(names[id(parameter)] == "model.shared.weight" for parameter in undecayed["params"])


def test_a_loss_that_is_not_finite_stops_before_the_step(init_folder, corpus, tmp_path):
    broken = shutil.copytree(init_folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.decoder.norm.weight"].fill_(float("inf"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = small_run(broken, corpus, output_dir=tmp_path / "run", eval_every=0)
    with pytest.raises(InputError, match=r"step 1: loss nan .*stopped before the update"):
        run_training(config)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_diverging_run_keeps_its_last_good_checkpoint(init_folder, corpus, tmp_path):
    config = small_run(
        init_folder,
        corpus,
        output_dir=tmp_path / "run",
        lr=1e30,
        warmup_steps=0,
        save_every=1,
        eval_every=0,
    )
    with pytest.raises(InputError, match=r"step [23]: .*not both finite"):
        run_training(config)
    assert (tmp_path / "run/checkpoints/latest/config.json").exists()


def test_bad_folders_are_refused_in_a_sentence(init_folder, corpus, tmp_path):
    with pytest.raises(InputError, match=r"initialize_from_qwen3\.py --qwen3-model"):
        run_training(small_run(tmp_path / "nowhere", corpus))
    other = shutil.copytree(init_folder, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**settings, "vocab_size": settings["vocab_size"] + 64})
    )
    with pytest.raises(InputError, match="the tokenizer has 651 entries and the model 715 rows"):
        run_training(small_run(other, corpus))
    (other / "config.json").write_text(json.dumps({**settings, "model_type": "qwen3"}))
    with pytest.raises(InputError, match="holds a 'qwen3' model"):
        run_training(small_run(other, corpus))
    (other / "config.json").write_text(json.dumps(settings))
    (other / "model.safetensors").write_bytes(
        (init_folder / "model.safetensors").read_bytes()[:1000]
    )
    with pytest.raises(InputError, match="is truncated, damaged or missing"):
        run_training(small_run(other, corpus))
    (other / "tokenizer.json").unlink()
    with pytest.raises(
        InputError, match="holds no tokenizer.json; make it with: python scripts/initialize"
    ):
        run_training(small_run(other, corpus))
    with pytest.raises(InputError, match=r"R1 needs up to \d+ sentinels"):
        run_training(
            small_run(init_folder, corpus, **{"data.source_length": 512, "data.target_length": 512})
        )
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="was not written by qwen3-encdec"):
        run_training(small_run(init_folder, corpus, output_dir=foreign))


def test_dry_run_writes_nothing(init_folder, corpus, tmp_path, capsys):
    config = small_run(init_folder, corpus, output_dir=tmp_path / "run")
    run_training(config, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    model = Qwen3ForSeq2SeqLM.from_pretrained(init_folder)
    assert f"parameters        {sum(p.numel() for p in model.parameters()):,}" in printed
    assert "tokens per step   256" in printed
    assert "max_steps: 4" in printed


def test_flops_formula_against_a_counter():
    config = Qwen3EncoderDecoderConfig(
        vocab_size=331, num_sentinel_tokens=11, hidden_size=40, intermediate_size=56, num_hidden_layers=3,
        num_decoder_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=14, pad_token_id=300,
        eos_token_id=302, attn_implementation="eager",
    )  # fmt: skip
    model, source, target = Qwen3ForSeq2SeqLM(config).train(), 19, 11
    ids = torch.randint(290, (5, source)), torch.randint(290, (5, target))
    with FlopCounterMode(display=False) as counter:
        model(
            input_ids=ids[0], attention_mask=torch.ones_like(ids[0]), labels=ids[1]
        ).loss.backward()
    sizes = budget.count_parameters(config)
    expected = budget.flops(config, sizes, source, target, 5)
    # eager attention computes the half of T^2 that the causal mask hides
    hidden_half = 5 * 12 * 4 * 14 * config.num_decoder_layers * target**2 / 2
    assert counter.get_total_flops() == pytest.approx(expected + hidden_half, rel=0.01)
    assert counter.get_total_flops() != pytest.approx(
        budget.flops(config, sizes, target, source, 5), rel=0.01
    )


def test_the_script_answers_bad_input_with_one_sentence(tmp_path):
    script = Path(__file__).parents[1] / "scripts/train.py"
    done = subprocess.run(
        [sys.executable, script, "bacth_size=3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr == "error: the command line: unknown key bacth_size; did you mean batch_size?\n"
    )
