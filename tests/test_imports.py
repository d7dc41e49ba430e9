"""The package loads torch and transformers late, and registers with the Auto classes in time."""

import subprocess
import sys

import pytest

import qwen3_encdec
from qwen3_encdec import cli


def run(code: str) -> str:
    """Last line that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_every_public_name_is_there():
    for name in qwen3_encdec.__all__:
        assert getattr(qwen3_encdec, name).__name__ == name
    assert set(qwen3_encdec.__all__) <= set(dir(qwen3_encdec))
    with pytest.raises(AttributeError, match="has no attribute 'Qwen3Decoderr'"):
        qwen3_encdec.Qwen3Decoderr  # noqa: B018


def test_help_and_wrong_settings_load_neither_torch_nor_transformers(tmp_path):
    commands = [
        (command.name or command.callback.__name__).replace("_", "-")
        for command in cli.app.registered_commands
    ]
    (tmp_path / "file").touch()
    right = [["--help"], ["--version"], *([name, "--help"] for name in commands)]
    wrong = [
        ["train", "lrr=1"],
        ["train", "--config", str(tmp_path / "none.yaml")],
        ["train", "max_steps=many"],
        ["tokenizer", "--output", str(tmp_path / "file")],
    ]
    code = f"""
import sys
from qwen3_encdec import cli
codes = []
for call in {right + wrong!r}:
    sys.argv = ["qwen3-encdec", *call]
    try:
        cli.main()
    except SystemExit as stop:
        codes.append(stop.code or 0)
    loaded = sys.modules.keys() & {{"torch", "transformers"}}
    assert not loaded, (call, loaded)
print(codes)
"""
    assert run(code) == str([0] * len(right) + [2] * len(wrong))


CHECK = """
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer
config = AutoConfig.for_model("qwen3_encdec", vocab_size=200, num_sentinel_tokens=3,
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, head_dim=8, pad_token_id=1, eos_token_id=2)
names = [type(AutoModelForSeq2SeqLM.from_config(config)).__name__]
names.append(type(AutoModel.from_config(config)).__name__)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
import qwen3_encdec
assert TOKENIZER_MAPPING[type(config)] is qwen3_encdec.Qwen3EncoderDecoderTokenizer
assert type(config) is qwen3_encdec.Qwen3EncoderDecoderConfig
assert qwen3_encdec.Qwen3EncoderDecoderConfig._auto_class == "AutoConfig"
print(*names)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import qwen3_encdec",
        "from transformers import AutoModel; import qwen3_encdec",
        "import qwen3_encdec; import transformers.generation.utils",
        "from qwen3_encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig",
        "from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer",
        "from qwen3_encdec.attention_qwen3_encdec import attend",
    ],
)
def test_auto_classes_know_the_model_whatever_is_imported_first(first):
    assert run(first + CHECK) == "Qwen3ForSeq2SeqLM Qwen3EncoderDecoderModel"


def test_without_the_package_they_do_not():
    """The control: transformers itself has no such model."""
    code = "from transformers import AutoConfig\nAutoConfig.for_model('qwen3_encdec')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Unrecognized model identifier: qwen3_encdec" in done.stderr
