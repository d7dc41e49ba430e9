"""Checkpoints: ordinary model folders, exact resume, and damage that is noticed."""

import json
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qwen3_encdec import Qwen3EncoderDecoderTokenizer, Qwen3ForSeq2SeqLM
from qwen3_encdec.conversion.card import base_of
from qwen3_encdec.data.stream import RowLoader
from qwen3_encdec.folders import InputError
from qwen3_encdec.training import checkpoint, distributed
from qwen3_encdec.training.checkpoint import Checkpointer
from qwen3_encdec.training.config import TrainingConfig
from qwen3_encdec.training.loop import run_training
from tests.conftest import small_run
from tests.test_training import read_metrics

ONE = "00001-of-00001"
SHARD = "state/shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="session")
def straight(init_folder, corpus, tmp_path_factory) -> Path:
    """A run of four steps with checkpoints after the second and the last."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run_training(small_run(init_folder, corpus, output_dir=run_dir))
    return run_dir


@pytest.fixture
def run(straight, tmp_path) -> Path:
    """A copy of that run where `train` goes on with it."""
    return shutil.copytree(straight, tmp_path / "run", symlinks=True)


@pytest.fixture
def cut(run) -> Path:
    """The copy as an interruption between its two checkpoints leaves it."""
    shutil.rmtree(run / "checkpoints/step-000004")
    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.name}/{name}": value for name, value in load_file(file).items()}
    return found


def same_run(one: Path, other: Path) -> bool:
    traces = [
        read_metrics(run, "loss", "grad_norm", "lr", "target_tokens", "examples")
        + read_metrics(run, "eval_loss/R1", "eval_loss/S", "step")
        for run in (one, other)
    ]
    last, other_last = (tensors(run / "checkpoints/step-000004") for run in (one, other))
    assert last.keys() == other_last.keys()
    return traces[0] == traces[1] and all(torch.equal(last[n], other_last[n]) for n in last)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_is_the_straight_run(
    train, straight, cut, tmp_path, workers, monkeypatch, capsys
):
    wrong = shutil.copytree(cut, tmp_path / "wrong", symlinks=True)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a line that a crash has torn does not block
    train(num_workers=workers)
    assert f"resuming from {cut}/checkpoints/step-000002" in capsys.readouterr().out
    assert same_run(straight, cut)
    # the control: a position that is forgotten is seen
    rows = RowLoader.__init__
    forget = lambda self, *args, **options: rows(self, *args, **options | {"state": None})  # noqa: E731
    monkeypatch.setattr(RowLoader, "__init__", forget)
    train(output_dir=wrong, num_workers=workers)
    assert not same_run(straight, wrong)


def changed_model(init_folder: Path, folder: Path, file: str, **changes) -> Path:
    """A copy of the model with other settings in one of its files."""
    shutil.copytree(init_folder, folder)
    settings = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(settings))
    return folder


def test_a_dropout_goes_on_as_it_would_have(train, init_folder, tmp_path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    model = changed_model(init_folder, tmp_path / "model", "config.json", attention_dropout=0.3)
    train(model, attention="eager")
    shutil.copytree(run, straight, symlinks=True)
    shutil.rmtree(run / "checkpoints/step-000004")
    train(model, attention="eager")
    assert same_run(run, straight)


@pytest.mark.parametrize("part", ["optimizer_state", "weights"])
def test_each_part_of_the_state_matters(train, straight, cut, monkeypatch, part):
    read = distributed.read_tensors

    def skip(values, folder):
        if (folder.name == "state") == (part == "optimizer_state"):
            for value in values.values():
                value.fill_(0.01)
        else:
            read(values, folder)

    monkeypatch.setattr(distributed, "read_tensors", skip)
    monkeypatch.setattr(distributed, "verify", lambda *_: None)
    train()
    assert not same_run(straight, cut)


def test_checkpoint_is_an_ordinary_model_folder(init_folder, straight):
    folder = straight / "checkpoints/latest"
    model = Qwen3ForSeq2SeqLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["Qwen3ForSeq2SeqLM"]
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    before = Qwen3ForSeq2SeqLM.from_pretrained(init_folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        with safe_open(init_folder / "model.safetensors", "pt") as begun:
            assert set(file.keys()) == set(begun.keys())  # the tied matrix once
        for name, parameter in model.named_parameters():
            assert torch.equal(file.get_tensor(name), parameter)
    assert not torch.equal(before.model.shared.weight, model.model.shared.weight)
    # no pickle, and the model's own code, for where this package is not installed
    suffixes = {".json", ".safetensors", ".jinja", ".py"}
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= suffixes
    code = {path.stem for path in folder.glob("*.py")}
    assert {"configuration_qwen3_encdec", "modeling_qwen3_encdec"} <= code
    assert all("_qwen3_" in name for name in code)


def test_large_models_are_written_in_several_files(train, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 100_000)
    folder = train(eval_every=0)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert len(list(folder.glob("state/shard-*.safetensors"))) > 6
    whole = Qwen3ForSeq2SeqLM.from_pretrained(folder)
    shutil.rmtree(folder)
    train(eval_every=0)
    again = Qwen3ForSeq2SeqLM.from_pretrained(folder)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("part", "how", "named"),
    [
        ("model.safetensors", "cut", "model.safetensors has changed"),
        ("model.safetensors", "flipped", ".weight does not match its checksum"),
        (SHARD, "flipped", "does not match its checksum"),
        (f"state/rank-{ONE}.json", "flipped", f"rank-{ONE}.json has changed"),
        ("config.json", "missing", "config.json is missing"),  # half copied
        (f"state/rank-{ONE}.json", "missing", f"rank-{ONE}.json is missing"),
        ("state/checks.json", "missing", "checks.json cannot be read"),
        ("state/checks.json", "cut", "checks.json is not valid JSON"),
        ("foreign.safetensors", "added", "foreign.safetensors does not belong to it"),
    ],
)
def test_damage_falls_back_aloud(train, straight, run, capsys, part, how, named):
    file = run / "checkpoints/step-000004" / part
    content = bytearray(file.read_bytes() if how != "added" else 100)
    content[-100] ^= 1
    file.write_bytes(content[: -100 if how == "cut" else None])
    if how == "missing":
        file.unlink()
    train()
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert f"checkpoint {run}/checkpoints/step-000004 is damaged: " in printed
    assert named in printed
    assert same_run(straight, run)
    assert (run / "checkpoints/damaged-step-000004/state").exists()


def test_a_damaged_checkpoint_that_cannot_be_renamed_stops_it(train, run, monkeypatch):
    forbidden = Mock(side_effect=PermissionError(13, "Permission denied"))
    (run / "checkpoints/step-000004" / SHARD).unlink()
    monkeypatch.setattr("qwen3_encdec.training.checkpoint.os.rename", forbidden)
    with pytest.raises(InputError, match="run/checkpoints cannot be written: Permission denied"):
        train()


def test_without_a_whole_checkpoint_it_stops(train, run):
    for step in ("000002", "000004"):
        (run / f"checkpoints/step-{step}" / SHARD).unlink()
    with pytest.raises(InputError, match=r"shard-.*\.safetensors is missing.*no older checkpoint"):
        train()


def test_a_run_written_by_95a6fa2_is_resumed(train, tmp_path, capsys, monkeypatch):
    before, run = Path(__file__).parent / "data/written_by_95a6fa2/checkpoint", tmp_path / "run"
    shutil.copytree(before, run / "checkpoints/step-000003")
    (run / "qwen3_encdec.json").write_text('{"kind": "training run"}')
    with pytest.raises(InputError, match="the saved position belongs to another.*accept_changes"):
        train(before, max_steps=5, eval_every=0)
    found, optimizer_state = {}, distributed.TrainingState.optimizer_state

    def keep(state):
        found.update(optimizer_state(state))
        return found

    monkeypatch.setattr(distributed.TrainingState, "optimizer_state", keep)
    monkeypatch.setattr(distributed.TrainingState, "step", lambda *_: None)
    train(before, max_steps=5, eval_every=0, **{"data.accept_changes": True})
    assert "continuing with it at epoch 1" in capsys.readouterr().out
    written = load_file(before / f"state/optimizer-{ONE}.safetensors")
    assert found
    assert all(torch.equal(tensor, written[name]) for name, tensor in found.items())
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] == 4


def test_a_checkpoint_leads_to_its_model_from_any_folder(train, init_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(init_folder.parent)
    checkpoint = train(Path(init_folder.name), max_steps=1)
    monkeypatch.chdir(tmp_path)
    assert base_of(checkpoint) == base_of(init_folder)


def test_settings_may_change_at_a_resume_and_are_said(train, init_folder, corpus, cut, capsys):
    with pytest.raises(InputError, match="the saved position belongs to another"):
        train(**{"data.seed": 7})
    assert "data.seed 0 -> 7" in capsys.readouterr().out
    changes = {"lr": 1e-4, "batch_size": 4, "eval_examples_per_denoiser": 3}
    config = small_run(init_folder, corpus, output_dir=cut, **changes)
    run_training(config)
    said = capsys.readouterr().out
    assert "batch_size 2 -> 4; lr 0.003 -> 0.0001" in said
    assert "eval_examples_per_denoiser 2 -> 3 (heldout.json decides)" in said
    examples = read_metrics(cut, "examples", "target_tokens")
    assert examples[2][0] - examples[1][0] > 1.3 * (examples[1][0] - examples[0][0])
    state = json.loads((cut / "checkpoints/latest/state/training.json").read_text())
    assert checkpoint.changes_since(state, config, 2)[-1] == "processes 1 -> 2"


def test_fewer_steps_than_are_done_are_refused(train, run):
    with pytest.raises(InputError, match=r"step-000004 is beyond max_steps=2; raise it"):
        train(max_steps=2)


def test_prolonging_a_decayed_run_is_said(train, run, capsys):
    train(max_steps=8)
    assert "warning: the learning rate rises from 3.00e-04 to 3.00e-03" in capsys.readouterr().out
    for step in (4, 6, 8):
        shutil.rmtree(run / f"checkpoints/step-00000{step}")
    train(max_steps=8)  # from the constant part nothing rises
    assert "rises" not in capsys.readouterr().out


def test_a_finished_run_without_a_decay_ends_at_once(train, run):
    assert train(decay_fraction=0).name == "step-000004"


def test_what_is_kept(train, tmp_path, monkeypatch, capsys):
    losses = iter([9.0, 5.0, 1.0, 6.0, 4.0])
    monkeypatch.setattr(
        "qwen3_encdec.training.steps.mean_losses", lambda *a, **o: {"R1": next(losses)}
    )
    stuck = shutil.rmtree

    def cannot(path, ignore_errors=False):
        if Path(path).name == "step-000001":
            if not ignore_errors:
                raise PermissionError(path)
            return
        stuck(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", cannot)
    run_dir = tmp_path / "run"
    train(save_every=1, keep_last=1, eval_every=1)
    found = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert found == ["best", "latest", "step-000001", "step-000002", "step-000004"]
    assert (run_dir / "checkpoints/latest").resolve().name == "step-000004"
    assert (run_dir / "checkpoints/best").resolve().name == "step-000002"
    # one that cannot be deleted costs room and not the run
    assert f"{run_dir}/checkpoints/step-000001 could not be deleted" in capsys.readouterr().out


def test_a_damaged_best_checkpoint_stops_nothing(train, run):
    best = run / "checkpoints/best"
    best.unlink()
    best.symlink_to("step-000002")
    (best / "state/training.json").write_text("{")
    train(max_steps=6)
    assert best.resolve().name == "step-000006"


def test_a_full_disk_at_start_up_leaves_the_run_as_it_was(train, run, tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    before = (run / "metrics.jsonl").read_text()
    monkeypatch.setattr("qwen3_encdec.folders.os.replace", full)
    for run_dir in (run, tmp_path / "new"):
        with pytest.raises(InputError, match=f"{run_dir} cannot be written: No space left"):
            train(output_dir=run_dir, max_steps=6)
    assert (run / "metrics.jsonl").read_text() == before
    assert list(run.glob(".*.tmp")) == []
    assert not (tmp_path / "new").exists()


def test_tensorboard_shows_each_step_once(train, tmp_path):
    for _ in range(2):
        shutil.rmtree(train(trackers="[tensorboard]", eval_every=0))
    events = EventAccumulator(str(tmp_path / "run/trackers/qwen3-encdec")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_the_writer_thread_uses_its_rank_s_device(tmp_path, monkeypatch):
    device, used = torch.device("cuda", 3), []
    accelerator = SimpleNamespace(device=device, num_processes=1, is_main_process=False)
    config = TrainingConfig(output_dir=str(tmp_path))
    monkeypatch.setattr(Checkpointer, "_write_small_files", lambda *_: None)
    monkeypatch.setattr(Checkpointer, "_write_tensors", lambda *_: used.append("written"))
    in_turn = lambda index: used.append(index) or nullcontext()  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "device_index", in_turn)
    training = {"step": 1, "heldout_loss": None}
    saver = Checkpointer(config, SimpleNamespace(accelerator=accelerator), None, None)
    saver._write({}, {}, {}, training)
    assert used == [3, "written"]


def test_no_writer_thread_outlives_its_checkpoint(train, monkeypatch):
    """As long as it lives, so do its OpenMP threads, and CPU steps take a third longer."""
    threads, write = [], Checkpointer._write

    def watched(*arguments):
        for thread in threads:
            thread.join(10)  # RuntimeError if it is this one
            assert not thread.is_alive()
        threads.append(threading.current_thread())
        return write(*arguments)

    monkeypatch.setattr(Checkpointer, "_write", watched)
    train(save_every=2)
    assert len(threads) == 2


@pytest.mark.parametrize("part", ["dcp.save", "os.rename"])
def test_a_failed_save_leaves_no_checkpoint(train, tmp_path, monkeypatch, part):
    full = Mock(side_effect=OSError("No space left on device"))
    monkeypatch.setattr(f"qwen3_encdec.training.checkpoint.{part}", full)
    sentence = "No space left.*training stopped, the last checkpoint is none"
    with pytest.raises(InputError, match=sentence):
        train(eval_every=0)
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_generation_settings_survive_a_resume(train, init_folder, tmp_path):
    file = "generation_config.json"
    model = changed_model(init_folder, tmp_path / "model", file, num_beams=3)
    for steps in (1, 2):
        saved = json.loads((train(model, max_steps=steps, eval_every=0) / file).read_text())
        assert saved["num_beams"] == 3
