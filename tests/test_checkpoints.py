"""Checkpoints: ordinary model folders, exact resume, and damage that is noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torchdata.stateful_dataloader import StatefulDataLoader

from qwen3_encdec import Qwen3EncoderDecoderTokenizer, Qwen3ForSeq2SeqLM
from qwen3_encdec.folders import InputError
from qwen3_encdec.training import checkpoint as checkpoints
from qwen3_encdec.training.loop import run_training
from tests.test_training import read_metrics, small_run, write_corpus

ONE = "00001-of-00001"
STATES = ("model.safetensors", f"state/optimizer-{ONE}.safetensors", f"state/rank-{ONE}.json")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="session")
def straight(init_folder, corpus, tmp_path_factory) -> Path:
    """A run of four steps with checkpoints after the second and the last."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run_training(small_run(init_folder, corpus, output_dir=run_dir))
    return run_dir


def interrupted(run_dir: Path, copy: Path) -> Path:
    """The run as an interruption between its two checkpoints leaves it."""
    shutil.copytree(run_dir, copy, symlinks=True)
    shutil.rmtree(copy / "checkpoints/step-000004")
    (copy / "checkpoints/latest").unlink()
    (copy / "checkpoints/latest").symlink_to("step-000002")
    return copy


def same_run(one: Path, other: Path) -> bool:
    traces = [
        read_metrics(run, "loss", "grad_norm", "lr", "target_tokens", "examples")
        + read_metrics(run, "eval_loss/R1", "eval_loss/S", "step")
        for run in (one, other)
    ]
    latest = [run / "checkpoints/latest" for run in (one, other)]
    return traces[0] == traces[1] and all(
        (latest[0] / name).read_bytes() == (latest[1] / name).read_bytes() for name in STATES
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_is_the_straight_run(
    init_folder, corpus, tmp_path, workers, monkeypatch, capsys
):
    config = small_run(init_folder, corpus, output_dir=tmp_path / "run", num_workers=workers)
    run_training(config)
    saved = shutil.copytree(
        interrupted(tmp_path / "run", tmp_path / "cut"), tmp_path / "wrong", symlinks=True
    )
    run_training(small_run(init_folder, corpus, output_dir=tmp_path / "cut", num_workers=workers))
    assert "step-000002" in capsys.readouterr().out
    assert same_run(tmp_path / "run", tmp_path / "cut")

    monkeypatch.setattr(StatefulDataLoader, "load_state_dict", lambda self, state: None)
    run_training(small_run(init_folder, corpus, output_dir=saved, num_workers=workers))
    assert not same_run(tmp_path / "run", saved)


def test_optimizer_state_matters(init_folder, corpus, straight, tmp_path, monkeypatch):
    cut = interrupted(straight, tmp_path / "cut")
    monkeypatch.setattr(checkpoints, "load_optimizer_state", lambda *arguments, **options: None)
    run_training(small_run(init_folder, corpus, output_dir=cut))
    assert not same_run(straight, cut)


def test_a_finished_run_is_left_as_it_is(init_folder, corpus, straight, tmp_path):
    copy = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    assert (
        run_training(small_run(init_folder, corpus, output_dir=copy))
        == copy / "checkpoints/step-000004"
    )
    assert same_run(straight, copy)


def test_checkpoint_is_an_ordinary_model_folder(init_folder, straight):
    folder = straight / "checkpoints/latest"
    model = Qwen3ForSeq2SeqLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert (
        model.model.encoder.embed_tokens is model.model.decoder.embed_tokens is model.model.shared
    )
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "Qwen3ForSeq2SeqLM"
    ]
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {
            name for name, _ in model.named_parameters()
        }  # the tied matrix once
    before = Qwen3ForSeq2SeqLM.from_pretrained(init_folder)
    assert not torch.equal(before.model.shared.weight, model.model.shared.weight)
    files = [path for path in straight.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {
        ".json",
        ".jsonl",
        ".yaml",
        ".safetensors",
        ".jinja",
        ".py",
        ".txt",
    }
    assert {path.stem.split("_")[0] for path in files if path.suffix == ".py"} <= {
        "configuration", "modeling", "tokenization",  # the model's own code, for where this package is not installed
    }  # fmt: skip


def test_damage_falls_back_aloud(init_folder, corpus, straight, tmp_path, capsys):
    copy = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    weights = copy / "checkpoints/step-000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run_training(small_run(init_folder, corpus, output_dir=copy))
    assert "step-000004 is damaged: model.safetensors has" in capsys.readouterr().out
    assert same_run(straight, copy)
    assert (copy / "checkpoints/damaged-step-000004/config.json").exists()

    for step in ("000002", "000004"):
        (copy / f"checkpoints/step-{step}/state/optimizer-{ONE}.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"optimizer-.*\.safetensors is missing.*no older checkpoint"
    ):
        run_training(small_run(init_folder, corpus, output_dir=copy))


def test_resume_refuses_what_would_change_the_data(init_folder, corpus, straight, tmp_path, capsys):
    cut = interrupted(straight, tmp_path / "cut")
    for name, value in [("batch_size", 3), ("data.seed", 7), ("seed", 1)]:
        with pytest.raises(InputError, match=f"cannot resume .* with {name}={value}"):
            run_training(small_run(init_folder, corpus, output_dir=cut, **{name: value}))
    with pytest.raises(InputError, match="already holds step-000002"):
        run_training(small_run(init_folder, corpus, output_dir=cut, resume=False))
    with pytest.raises(InputError, match="holds no checkpoint"):
        run_training(small_run(init_folder, corpus, output_dir=tmp_path / "new", resume=True))
    state = json.loads((cut / "checkpoints/step-000002/state/training.json").read_text())
    _, notes = checkpoints.read_training_state(cut / "checkpoints/step-000002", state["config"], 2)
    assert notes == ["1 processes -> 2"]
    run_training(small_run(init_folder, corpus, output_dir=cut, lr=1e-4))
    assert "lr 0.003 -> 0.0001" in capsys.readouterr().out


def test_old_checkpoints_are_deleted(init_folder, corpus, tmp_path):
    run_training(
        small_run(
            init_folder,
            corpus,
            output_dir=tmp_path / "run",
            save_every=1,
            keep_last=2,
            eval_every=0,
        )
    )
    found = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert found == ["latest", "step-000003", "step-000004"]
    assert (tmp_path / "run/checkpoints/latest").resolve().name == "step-000004"


def test_a_failed_save_leaves_no_checkpoint(init_folder, corpus, tmp_path, monkeypatch):
    def full_disk(*arguments, **keywords):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(
        InputError, match="No space left.*training stopped, the last checkpoint is none"
    ):
        run_training(small_run(init_folder, corpus, output_dir=tmp_path / "run", eval_every=0))
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
