"""The training config: strict, complete, and clear about what is wrong."""

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest
import yaml

from qwen3_encdec.folders import InputError
from qwen3_encdec.training.config import TrainingConfig, config_to_dict, flatten, load_config

SHIPPED = Path(__file__).parents[1] / "configs/training_config.yaml"


def test_shipped_config_is_complete():
    written = flatten(yaml.safe_load(SHIPPED.read_text()))
    assert set(written) == set(flatten(config_to_dict(TrainingConfig())))
    assert flatten(config_to_dict(load_config(SHIPPED))) == written


def test_config_survives_a_round_trip(tmp_path):
    config = load_config(
        SHIPPED, ["lr=3e-5", "data.source_length=96", "resume=false", "trackers=[wandb, trackio]"]
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    assert load_config(tmp_path / "config.yaml") == config
    assert (config.lr, config.data.source_length, config.resume, config.betas) == (
        3e-5,
        96,
        False,
        (0.9, 0.95),
    )


def test_the_traps_of_yaml_1_1(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-4\nmixed_precision: no\n")
    assert yaml.safe_load(path.read_text()) == {"lr": "1e-4", "mixed_precision": False}
    config = load_config(path)
    assert (config.lr, config.mixed_precision) == (1e-4, "no")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("bacth_size: 3", ["unknown key bacth_size", "did you mean batch_size"]),
        (
            "data: {sorce_length: 3}",
            ["unknown key data.sorce_length", "did you mean data.source_length"],
        ),
        ("lr: fast", ["lr must be a number", "'fast'"]),
        ("lr: .nan", ["lr must be above 0", "nan"]),
        ("max_steps: 10.5", ["max_steps must be an integer", "10.5"]),
        ("max_steps: true", ["max_steps must be an integer", "True"]),
        ("batch_size: 0", ["batch_size must be at least 1", "0"]),
        ("schedule: cos", ["schedule must be one of wsd, cosine, linear", "'cos'"]),
        ("resume: maybe", ["resume must be true or false or one of auto", "'maybe'"]),
        ("betas: [0.9]", ["betas", "[0.9]"]),
        ("trackers: [abacus]", ["trackers must be among", "abacus"]),
        ("warmup_steps: 2000", ["warmup_steps must be at most max_steps 1000", "2000"]),
        ("data: []", ["data must be a mapping", "[]"]),
        ("data: {inputs: []}", ["data.inputs is empty"]),
        ("- 1", ["must be a mapping"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_bad_values_are_named(tmp_path, text, parts):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(path)
    for part in ["mine.yaml", *parts]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_overrides_name_the_command_line():
    with pytest.raises(
        InputError, match="the command line: unknown key max_step; did you mean max_steps"
    ):
        load_config(SHIPPED, ["max_step=3"])
    with pytest.raises(InputError, match="key=value"):
        load_config(SHIPPED, ["max_steps"])
    with pytest.raises(InputError, match=r"data\.key=value"):
        load_config(SHIPPED, ["lr.peak=3"])
    with pytest.raises(InputError, match="unknown key adam"):
        load_config(SHIPPED, ["adam.lr=3"])
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_every_field_has_its_docstring():
    body = ast.parse(inspect.getsource(TrainingConfig)).body[0].body
    documented = {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert documented == {field.name for field in dataclasses.fields(TrainingConfig)}
