"""The training config: strict, complete, and clear about what is wrong."""

import re
from pathlib import Path

import pytest
import yaml

from qwen3_encdec.folders import InputError
from qwen3_encdec.training.config import TrainingConfig, config_to_dict, flatten, load_config

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "configs/training_config.yaml"


def test_shipped_config_is_complete():
    written = flatten(yaml.safe_load(SHIPPED.read_text()))
    assert set(written) == set(flatten(config_to_dict(TrainingConfig())))
    assert flatten(config_to_dict(load_config(SHIPPED))) == written


def test_config_survives_a_round_trip(tmp_path):
    changes = ["lr=3e-5", "data.source_length=96", "trackers=[wandb, trackio]"]
    config = load_config(SHIPPED, changes)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    assert load_config(tmp_path / "config.yaml") == config
    assert (config.lr, config.data.source_length) == (3e-5, 96)
    assert config.betas == (0.9, 0.95)


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(None, ["output_dir=~/run", "model=~/init"])
    assert (config.output_dir, config.model) == ("/home/me/run", "/home/me/init")


def test_the_traps_of_yaml_1_1(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-4\nmixed_precision: no\n")
    assert yaml.safe_load(path.read_text())["lr"] == "1e-4"
    config = load_config(path)
    assert (config.lr, config.mixed_precision) == (1e-4, "no")
    load_config(SHIPPED)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bacth_size: 3", "unknown key bacth_size; did you mean batch_size?"),
        ("data: {sorce_length: 3}", "key data.sorce_length; did you mean data.source_length?"),
        ("lr: fast", "lr: Input should be a valid number, "),
        ("lr: .nan", "lr: Input should be a finite number, got nan"),
        ("lr: yes", "lr: Input should be a valid number, "),
        ("betas: [0.9, 1]", "betas.1: Input should be less than 1, got 1"),
        ("seed: 4294967296", "seed: Input should be less than 4294967296, got 4294967296"),
        ("stall_seconds: 1e12", "stall_seconds: Input should be less than or equal to 1000000000"),
        ("max_steps: true", "max_steps: Input should be a valid integer, got True"),
        ("batch_size: 0", "batch_size: Input should be greater than or equal to 1, got 0"),
        ("compile: maybe", "compile: Input should be False, True or 'auto', got 'maybe'"),
        ("betas: [0.9]", "betas.1: Field required, got [0.9]"),
        ("trackers: [abacus]", "'trackio' or 'wandb', got 'abacus'"),
        ("warmup_steps: 2000", "warmup_steps must be at most max_steps 1000, got 2000"),
        ("data: []", "data: Input should be a dictionary or an instance of DataConfig, got []"),
        ("data: {source_length: x}", "data.source_length: Input should be a valid integer, "),
        ("data: {inputs: []}", "data.inputs is empty"),
        ("- 1", "config: Input should be a dictionary "),
        ("a: [", "not valid YAML"),
        ("lr: 1e-3\ndata: {}\nlr: 1e-4", 'key lr occurs twice in "<unicode string>", line 3'),
    ],
)
def test_bad_values_are_named(tmp_path, text, sentence):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(path)
    assert "mine.yaml" in str(error.value)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("max_step=3", "the command line: unknown key max_step; did you mean max_steps"),
        ("max_steps", "key=value"),
        ("lr.peak=3", r"data\.key=value"),
        ("adam.lr=3", "unknown key adam"),
    ],
)
def test_bad_overrides_name_the_command_line(override, sentence):
    with pytest.raises(InputError, match=sentence):
        load_config(SHIPPED, [override])


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_every_setting_has_its_comment():
    lines = SHIPPED.read_text().splitlines()
    keys = [line for line in lines if re.match(r" *\w+:", line)]
    assert [line for line in keys if "#" not in line] == ["data:"]
