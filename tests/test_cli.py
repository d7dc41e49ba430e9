"""The command line: results, and one sentence with exit code 2 for errors a user can mend."""

import json
import os
import runpy
import shutil
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase
from typer.main import get_command
from typer.testing import CliRunner

from qwen3_encdec import __version__, cli
from qwen3_encdec.conversion.extract import extract_encoder
from qwen3_encdec.folders import PROVENANCE_FILE

ROOT = Path(__file__).parent.parent


@pytest.fixture
def refused(command, tmp_path):
    """Run a command that must be refused: code 2, one sentence, nothing new in `tmp_path`."""

    def call(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = command(*arguments)
        message = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2, (out, err)
        assert len(message) == 1, err
        assert "Traceback" not in out + err
        assert sorted(tmp_path.rglob("*")) == before
        return message[0]

    return call


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_scripts_are_thin_and_answer_help(script, run_script):
    path = ROOT / "scripts" / script
    assert len(path.read_text().splitlines()) < 20
    code, out, _ = run_script(path, "--help")
    assert code == 0
    assert "Usage" in out


def test_tokenizer_then_prepare_data(command, tmp_path):
    folder = tmp_path / "tokenizer"
    code, out, _ = command(
        "tokenizer", "--output", folder, "--num-ranks", 512, "--num-sentinel-tokens", 100
    )
    assert code == 0
    assert "740 tokens, the last 100 are sentinels" in out
    corpus = tmp_path / "corpus.jsonl"
    lines = [
        json.dumps({"text": f"Document {i} tells of {'many ' * (i % 50)}things."})
        for i in range(200)
    ]
    corpus.write_text("\n".join(lines))
    prepare = ("prepare-data", "--tokenizer", folder, "--input", corpus, "--analyze-only")
    prepare += ("--output", tmp_path / "page", "--num-examples", 100)
    code, out, _ = command(*prepare, "--show", 1)
    assert code == 0
    for expected in ("R1", "X2", "S", "filled", "<extra_id_0>", "things"):
        assert expected in out
    figures = json.loads(command(*prepare, "--json")[1])
    assert [row["Denoiser"] for row in figures["denoisers"]] == ["R1", "R2", "X1", "X2", "S"]
    own = tmp_path / "own.yaml"
    own.write_text(
        "- {name: far apart, mean_span: 2, corruption: 0.1}\n- {name: tail, mean_span: null, corruption: 0.5}"
    )
    code, out, _ = command(*prepare, "--preset", own, "--show", 1)
    assert code == 0
    assert "far apart" in out
    assert "R1" not in out
    for text, expected in (
        ("R1", "is not a list"),
        ("- {name: [", "own.yaml"),
        ("- {name: a, span: 3}", "span"),
    ):
        own.write_text(text)
        code, _, error = command(*prepare, "--preset", own)
        assert code == 2
        assert expected in error
        assert "Traceback" not in error


def test_initialize_then_extract_by_present_and_former_names(command, parent_folder, tmp_path):
    init, encoder = tmp_path / "init", tmp_path / "encoder"
    code, out, _ = command("initialize", "--qwen3-model", parent_folder, "--output-dir", init)
    assert code == 0
    assert "verified on the saved folder" in out
    code, out, _ = command("initialize", "--model", parent_folder, "--output", init, "--json")
    assert (code, json.loads(out)["verification"]["encoder"] < 1e-4) == (0, True)
    code, out, _ = command("extract", "--checkpoint", init, "--output-dir", encoder)
    assert code == 0
    assert "with causal attention the difference is" in out
    assert (encoder / "modules.json").exists()
    code, out, _ = command("extract", "--model", init, "--output", encoder, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["transformers"] < 1e-4 < report["causal_control"]
    texts = ("--model", "--model", "--checkpoint")  # texts here, whatever they are elsewhere
    cosines = json.loads(command("similarity", "--model", encoder, "--json", "--", *texts)[1])
    assert cosines[0] == pytest.approx([1, 1, cosines[2][0]], abs=1e-5)
    assert cosines[2][0] < 0.999
    options = (f"--checkpoint={init}", f"--output-dir={encoder}", "--max-tokens=0")
    code, _, error = command("extract", *options)
    assert (code, "Invalid value for '--max-length'" in error) == (2, True)


def test_the_package_runs_as_a_module_and_tells_its_version(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["qwen3_encdec", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("qwen3_encdec", run_name="__main__")
    assert capsys.readouterr().out == f"qwen3-encdec {__version__}\n"


def test_options_of_another_mode_are_refused(refused, init_folder):
    for option in ("--devices=8xH100", "--qwen3-model=0.6B", "--mfu=0.4", "--json"):
        assert "are for --dry-run" in refused("train", option)
    assert "exclude each other" in refused("train", "--dry-run", "--find-batch-size")
    for option in ("--deduplicate=exact", "--processes=2"):
        assert "a corpus that is written" in refused(
            "prepare-data", "--tokenizer", init_folder, option
        )


def test_missing_checkpoints_name_the_command_that_makes_them(refused, init_folder, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert "qwen3-encdec initialize" in refused("train", f"model={nowhere}")
    assert "encdec train" in refused("extract", "--model", nowhere, "--output", tmp_path / "x")
    assert "does not exist" in refused("initialize", "--model", nowhere, "--output", tmp_path / "x")
    assert "does not exist" in refused("evaluate", "--model", nowhere, "--output", tmp_path / "x")
    assert "does not exist" in refused("demo", "--model", nowhere, "--output", tmp_path / "x")
    assert "qwen3-encdec tokenizer --output" in refused("prepare-data", "--tokenizer", nowhere)


def test_folders_with_files_that_are_not_what_they_should_be(refused, init_folder, tmp_path):
    folder, out = shutil.copytree(init_folder, tmp_path / "model"), ("--output", tmp_path / "out")
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    commands = {name: (name, "--model", folder, *out) for name in ("initialize", "extract")}
    commands |= {"similarity": ("similarity", "--model", folder, "a", "b")}
    commands |= {"train": ("train", f"model={folder}")}
    file.write_text("[]")
    for arguments in commands.values():
        assert "config.json holds a JSON list, not a dict" in refused(*arguments)
    file.write_text(json.dumps(fields | {"quantization_config": {"quant_method": "gptq"}}))
    for arguments in commands.values():
        assert f"{folder} is quantized (gptq)" in refused(*arguments)
    assert f"{file} is a file, not a folder" in refused("train", f"model={file}")
    file.write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")
    message = refused("tokenizer", "--base", folder, *out)
    assert message.startswith(f"error: tokenizer {folder}: ")
    (folder / "tokenizer.json").unlink()
    assert "qwen3-encdec initialize" in refused("extract", "--model", folder, *out)


def test_output_folder_that_is_not_ours(
    monkeypatch, refused, command, parent_folder, init_folder, tmp_path
):
    monkeypatch.setattr(
        "qwen3_encdec.demo.pipeline.train_causal_parent", None
    )  # refused before any work begins
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.txt").write_text("years of work")
    lengths = ("data.source_length=64", "data.target_length=64")
    for arguments in (
        ("tokenizer", "--num-ranks", 300, "--output", thesis),
        ("initialize", "--model", parent_folder, "--output", thesis),
        ("extract", "--model", init_folder, "--output", thesis),
        ("evaluate", "--model", init_folder, "--output", thesis),
        ("prepare-data", "--tokenizer", init_folder, "--output", thesis),
        ("train", f"model={init_folder}", f"output_dir={thesis}", *lengths),
        ("demo", "--output", thesis),
    ):
        assert "was not written by qwen3-encdec" in refused(*arguments)
    assert (thesis / "chapter1.txt").read_text() == "years of work"
    # a folder of ours is not replaced by another kind
    assert command("tokenizer", "--num-ranks", 300, "--output", tmp_path / "ours")[0] == 0
    assert "holds a tokenizer" in refused("demo", "--output", tmp_path / "ours")


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--timeout", "inf"),
        ("evaluate", "--output", "x", "--seed", -1),
        ("initialize", "--output", "x", "--seed", 2**32),
    ],
)
def test_numbers_that_libraries_cannot_take_are_refused(command, init_folder, arguments):
    code, _, error = command(*arguments, "--model", init_folder)
    assert (code, "Invalid value for" in error) == (2, True)


def test_an_interrupted_command_says_so(monkeypatch, command, tmp_path):
    def interrupt(self, folder, **_):
        (folder / "tokenizer.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupt)
    code, _, error = command("tokenizer", "--num-ranks", 300, "--output", tmp_path / "new")
    assert (code, error) == (130, "interrupted; no output is half-written\n")
    assert list(tmp_path.iterdir()) == []


def test_printing_in_an_encoding_of_few_characters(monkeypatch, tmp_path):
    stdout = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    arguments = ["--num-ranks", "300", "--output", str(tmp_path / "語")]
    monkeypatch.setattr("sys.argv", ["qwen3-encdec", "tokenizer", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    stdout.flush()
    assert rb"\u8a9e: 484 tokens" in stdout.buffer.getvalue()


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch, command):
    monkeypatch.setattr(cli, "new_folder", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("tokenizer", "--output", "unused", "--num-ranks", 300)


def test_help_shows_every_help_text_whole():
    """Markup would swallow words in brackets."""
    group = get_command(cli.app)
    for name, command in group.commands.items():
        shown = "".join(CliRunner().invoke(cli.app, [name, "--help"]).output.split())
        texts = [parameter.help for parameter in command.params if getattr(parameter, "help", None)]
        assert texts or name == "train"
        for text in texts:
            assert "".join(text.split()) in shown, (name, text)


def test_threads_of_the_demo_do_not_spin_while_they_wait(command, monkeypatch):
    from qwen3_encdec.demo import pipeline

    seen: dict[str, str] = {}
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(pipeline, "run_demo", lambda *args, **kwargs: seen.update(os.environ))
    assert command("demo")[0] == 0
    assert seen["OMP_WAIT_POLICY"] == "passive"


def test_output_that_cannot_be_a_folder(refused, tmp_path):
    (tmp_path / "file").touch()
    for output in ("file", "file/below", "file/far/below"):
        message = refused("tokenizer", "--num-ranks", 300, "--output", tmp_path / output)
        assert f"{tmp_path / 'file'} is a file; choose another folder" in message
    message = refused("tokenizer", "--num-ranks", 300, "--output", tmp_path / ("long" * 99))
    assert message.endswith("cannot be written: File name too long")


def test_output_is_written_through_a_link(command, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    for _ in range(2):
        assert command("tokenizer", "--num-ranks", 300, "--output", tmp_path / "link")[0] == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk/target/tokenizer.json").is_file()
    folders = {path.name for path in tmp_path.rglob("*") if path.is_dir()}
    assert folders == {"disk", "target", "link"}


def test_output_that_would_replace_the_input(refused, init_folder, tmp_path):
    encoder = tmp_path / "encoder"
    extract_encoder(init_folder, encoder)
    soup = ("soup", "--model", encoder, "--model", encoder)
    for arguments in (("finetune", "--model", encoder), soup):
        assert f"would replace {encoder}" in refused(*arguments, "--output", encoder)
    output = tmp_path / "output"
    within = output / "input"
    within.mkdir(parents=True)
    for kind, arguments in {
        "demo": ("demo", "--model", within),
        "report": ("report", within),
        "evaluation": ("evaluate", "--model", encoder, "--pairs", within),
        "exported encoder": ("export", "--to", "onnx", "--model", within),
        "encoder-decoder": ("initialize", "--model", within),
        "encoder": ("extract", "--model", within),
        "tokenizer": ("tokenizer", "--base", within),
        "prepared corpus": ("prepare-data", "--tokenizer", init_folder, "--input", f"{output}/i*"),
        "data report": ("prepare-data", "--tokenizer", init_folder, "--input", f"{output}/in*"),
    }.items():
        arguments += ("--analyze-only",) if kind == "data report" else ()
        (output / PROVENANCE_FILE).write_text(json.dumps({"kind": kind}))
        assert f"would replace {within}" in refused(*arguments, "--output", output)
