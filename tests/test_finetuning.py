"""Finetuning: every objective learns, settings reach the libraries, and errors are sentences."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import metadata_load, metadata_save
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from qwen3_encdec.embedding import finetune as finetuning
from qwen3_encdec.embedding.encoder import TextEncoder
from qwen3_encdec.embedding.finetune import FinetuneConfig, finetune, read_examples
from qwen3_encdec.folders import PROVENANCE_FILE, InputError, read_json, write_json
from qwen3_encdec.training.config import config_to_dict, load_dataclass

ROOT = Path(__file__).parent.parent
NOUNS = (
    *("river", "window", "bread", "teacher", "market", "silver", "garden", "engine", "letter"),
    *("winter", "bridge", "doctor", "music", "paper", "summer", "stone", "kitchen", "island"),
    *("captain", "forest", "mirror", "pocket"),
)
PAIRS = [
    (f"about the {a} and the {b}", f"Here {b} comes first, then {a}.")
    for a, b in itertools.combinations(NOUNS, 2)
]
TRIPLETS = [(a, b, f"Nothing of it, only {i}.") for i, (a, b) in enumerate(PAIRS)]
QUICK = {"steps": 2, "batch_size": 8, "max_length": 32}


@pytest.fixture
def encoder(encoder_folder):
    return encoder_folder


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def differ(first, second) -> bool:
    others = weights(second)
    return any(not torch.equal(value, others[name]) for name, value in weights(first).items())


def hits(folder, dimensions: int | None = None) -> float:
    """Share of 60 queries whose own document is the nearest."""
    encoder = TextEncoder(folder, dtype=torch.float32)
    sides = zip(*PAIRS[-60:], strict=True)
    queries, documents = (encoder.encode(side, dimensions=dimensions) for side in sides)
    return float(((queries @ documents.T).argmax(1) == np.arange(60)).mean())


@pytest.fixture
def told(monkeypatch):
    """Arguments of the trainer and of losses, instead of training."""
    found = {}

    class Trainer:
        def __init__(self, **arguments):
            found.update(arguments)
            raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "SentenceTransformerTrainer", Trainer)

    def call(encoder, output, examples=PAIRS, **changes):
        with pytest.raises(KeyboardInterrupt):
            finetune(encoder, output, examples, **{**QUICK, **changes})
        return found

    return call


@pytest.mark.parametrize("name", ["finetune", "finetune-0.6b"])
def test_shipped_configs_have_every_field_and_no_other(name):
    config = load_dataclass(FinetuneConfig, ROOT / f"configs/{name}.yaml")
    text = (ROOT / f"configs/{name}.yaml").read_text()
    for key in config_to_dict(config):
        assert f"\n{key}: " in text, key
    with pytest.raises(InputError, match=r"unknown key batchsize; did you mean batch_size\?"):
        load_dataclass(FinetuneConfig, None, ["batchsize=3"])
    with pytest.raises(ValueError, match="batchsize"):
        replace(FinetuneConfig(), batchsize=3)
    with pytest.raises(InputError, match="temperature: Input should be a valid number"):
        load_dataclass(FinetuneConfig, None, ["temperature=yes"])


def test_the_shipped_config_fits_any_width(encoder, tmp_path, told):
    """Width 40 here; the learning rate of a wide encoder is a fine-tuning's."""
    config = load_dataclass(FinetuneConfig, ROOT / "configs/finetune.yaml")
    found = told(encoder, tmp_path / "x", config=config)
    assert found["loss"].matryoshka_dims == (40, 20, 10, 5)
    assert found["args"].learning_rate == 1e-3
    model = SimpleNamespace(get_embedding_dimension=lambda: 1024, prompts={"query": None})
    fitted = finetuning._fitted(config, model)
    assert (fitted.lr, fitted.matryoshka_dims) == (2e-5, [512, 256, 128])
    model.get_embedding_dimension = lambda: 192
    assert 1e-4 < finetuning._fitted(config, model).lr < 1e-3


def test_batches_are_full_of_distinct_texts_or_refused(encoder, tmp_path, capsys):
    few = [(f"question {i}", f"answer {i % 4}") for i in range(200)]
    with pytest.raises(InputError, match="column positive has 4 distinct texts, and a batch of 8"):
        finetune(encoder, tmp_path / "out", few, **QUICK)
    # Each text is a query once and a document once: no eight pairs share none.
    chain = [(f"text {i}", f"text {i + 1}") for i in range(9)]
    with pytest.raises(InputError, match="training ended at step 0 of 2: too few pairs"):
        finetune(encoder, tmp_path / "out", chain, **QUICK)
    assert not list(tmp_path.iterdir())
    # The ninth pair is no batch of its own, whose loss would be 0.
    assert finetune(encoder, tmp_path / "out", PAIRS[:9], **QUICK)["loss"] > 0.1
    skewed = [(f"q {i}", f"d {max(0, i - 160)}") for i in range(200)]
    finetune(encoder, tmp_path / "out", skewed, **QUICK | {"steps": 12})
    finetuning._split(FinetuneConfig(), finetuning._dataset(skewed[150:] + PAIRS))
    warnings = capsys.readouterr().err
    assert "examples share a text with held-out ones, left out" in warnings
    assert "no pairs held out; 20 are needed" in warnings  # of the nine
    assert "no pairs held out; texts repeat in too many of them" in warnings
    assert "column positive has 40 distinct texts in 200 pairs" in warnings


def test_a_value_that_is_not_finite_ends_it_without_a_folder(encoder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="lower lr"):
        finetune(encoder, tmp_path / "out", PAIRS, **QUICK | {"steps": 12}, lr=1e30)
    train = finetuning.SentenceTransformerTrainer.train

    def train_and_poison(self, **options):
        train(self, **options)
        next(iter(self.model.parameters())).data[0] = float("nan")

    monkeypatch.setattr(finetuning.SentenceTransformerTrainer, "train", train_and_poison)
    with pytest.raises(InputError, match=r"weight .*embed_tokens.weight is not finite"):
        finetune(encoder, tmp_path / "out", PAIRS, **QUICK, heldout_pairs=0)
    assert not list(tmp_path.iterdir())


def test_scores_before_during_and_after_and_no_heldout_text_is_trained_on(
    encoder, tmp_path, capsys
):
    options = QUICK | {"steps": 20, "batch_size": 32, "lr": 3e-3, "eval_every": 8}
    result = finetune(encoder, tmp_path / "tuned", PAIRS, **options)
    lines = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").open()]
    scores = {line["step"]: line[finetuning.SCORE] for line in lines if finetuning.SCORE in line}
    assert list(scores) == [0, 8, 16, 20]
    expected = {"before": scores[0], "after": scores[20], "best": max(scores.values())}
    assert result["heldout"] == expected
    assert len([line for line in lines if "loss" in line]) == 10
    assert "step 20 of 20: eval_ndcg@10" in capsys.readouterr().err
    train, heldout = finetuning._split(FinetuneConfig(**QUICK), finetuning._dataset(PAIRS))
    assert len(heldout) == len(PAIRS) // 10
    assert not {*train["anchor"], *train["positive"]} & {*heldout["anchor"], *heldout["positive"]}


def test_the_best_weights_stay(encoder, tmp_path, monkeypatch):
    def tuned(name, scores):
        given = iter(scores)
        evaluator = finetuning.HeldoutRetrieval
        monkeypatch.setattr(evaluator, "__call__", lambda *_, **__: {"ndcg@10": next(given)})
        options = QUICK | {"steps": 4, "eval_every": 1, "lr": 1e-3}
        return finetune(encoder, tmp_path / name, PAIRS, **options)["heldout"]

    assert tuned("first", [0.1, 0.9, 0.5, 0.4, 0.3]) == {"before": 0.1, "after": 0.3, "best": 0.9}
    tuned("last", [0.1, 0.2, 0.3, 0.4, 0.9])
    tuned("none", [0.9, 0.1, 0.2, 0.3, 0.4])
    assert differ(tmp_path / "first", tmp_path / "last")
    assert differ(tmp_path / "first", encoder)
    assert not differ(tmp_path / "none", encoder)


def test_the_folder_has_new_weights_prompts_and_a_card(encoder, tmp_path):
    options = {**QUICK, "query_prompt": "query: ", "seed": 3}
    heldout = finetune(encoder, tmp_path / "tuned", PAIRS, **options)["heldout"]
    record = read_json(tmp_path / "tuned" / PROVENANCE_FILE)
    assert record["finetuned_from"] == str(encoder)
    used = FinetuneConfig(**options, document_prompt="", lr=1e-3)
    assert FinetuneConfig(**record["config"]) == used
    assert metadata_load(tmp_path / "tuned/README.md") == metadata_load(encoder / "README.md")
    text = (tmp_path / "tuned/README.md").read_text()
    assert f"{heldout['before']:.4f}" in text
    assert "/tmp" not in text
    file = "config_sentence_transformers.json"
    before, after = (read_json(folder / file) for folder in (encoder, tmp_path / "tuned"))
    assert after == {**before, "prompts": {"query": "query: ", "document": ""}}
    ours = TextEncoder(tmp_path / "tuned", dtype=torch.float32)
    theirs = SentenceTransformer(str(tmp_path / "tuned"), device="cpu")
    prompted = theirs.encode_query(["a river"])
    assert np.allclose(prompted, ours.encode(["a river"], prompt_name="query"), atol=1e-5)
    assert not np.allclose(prompted, ours.encode(["a river"]), atol=1e-3)


def test_a_base_keeps_its_prompts_and_no_other_form_of_its_weights(
    encoder, tmp_path, told, monkeypatch
):
    base = shutil.copytree(encoder, tmp_path / "base")
    file = "config_sentence_transformers.json"
    prompts = {"query": "find: ", "document": "text: ", "web": "site: "}
    changes = {"prompts": prompts, "default_prompt_name": "web", "truncate_dim": 8}
    write_json(base / file, read_json(base / file) | changes)
    metadata_save(base / "README.md", {"license": "mit", "metrics": ["ndcg_at_10"]})
    for name in ("pytorch_model.bin", "onnx/model.onnx"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).touch()
    arguments = told(base, tmp_path / "x")["args"]
    assert arguments.prompts == {"anchor": "find: ", "positive": "text: "}
    found = told(base, tmp_path / "y", query_prompt="", document_prompt="", matryoshka_dims=[0.5])
    assert not found["args"].prompts
    assert found["loss"].matryoshka_dims == (40, 20)  # of whole embeddings
    monkeypatch.undo()
    finetune(base, tmp_path / "tuned", PAIRS, **QUICK, document_prompt="doc: ")
    changes["prompts"]["document"] = "doc: "
    assert read_json(tmp_path / "tuned" / file) == read_json(encoder / file) | changes
    card = metadata_load(tmp_path / "tuned/README.md")
    assert (card["license"], "metrics" in card) == ("mit", False)  # the scores were the base's
    SentenceTransformer(str(tmp_path / "tuned"), device="cpu")  # knows its default prompt
    assert not [*(tmp_path / "tuned").glob("*.bin"), *(tmp_path / "tuned").rglob("*.onnx")]


@pytest.mark.parametrize("distilled", [False, True])
def test_an_interrupted_finetuning_resumes_to_the_same_weights(
    encoder, tmp_path, monkeypatch, distilled
):
    """A teacher of another width has a projection, which is trained too."""
    options = QUICK | {"steps": 8, "eval_every": 2, "lr": 1e-3}
    other = shutil.copytree(encoder, tmp_path / "other")
    if distilled:
        options["teacher"] = str(wider(other))
    straight = finetune(encoder, tmp_path / "straight", PAIRS, **options)
    log = finetuning._Watch.on_log

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt
        log(self, args, state, control, **kwargs)

    monkeypatch.setattr(finetuning._Watch, "on_log", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(encoder, tmp_path / "out", PAIRS, **options)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    # Nothing of a checkpoint outlives it.
    assert distilled is bool(list((tmp_path / "out.training").glob("*/projection.safetensors")))
    assert not list((tmp_path / "out.training").glob("*.safetensors"))
    (tmp_path / "out.training/checkpoint-6").mkdir()  # killed while it was written
    with pytest.raises(InputError, match="holds an interrupted run: resume or delete it"):
        finetune(encoder, tmp_path / "out", PAIRS, **options)
    for base, examples, lr, sentence in (
        (encoder, PAIRS, 1e-4, "was started with lr 0.001: resume with the same"),
        (other, PAIRS, 1e-3, f"was started with encoder {encoder}"),
        (encoder, PAIRS[1:], 1e-3, f"was started with examples {len(PAIRS)}"),
    ):
        with pytest.raises(InputError, match=sentence):
            finetune(base, tmp_path / "out", examples, resume=True, **options | {"lr": lr})
    resumed = finetune(encoder, tmp_path / "out", PAIRS, resume=True, **options)
    assert resumed == straight
    assert not differ(tmp_path / "out", tmp_path / "straight")
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").open()]
    assert steps == sorted(steps)
    assert not (tmp_path / "out.training").exists()
    with pytest.raises(InputError, match="holds no checkpoint: start again without resuming"):
        finetune(encoder, tmp_path / "out", PAIRS, resume=True, **options)


def test_a_finished_training_whose_folder_could_not_be_written_resumes(
    encoder, tmp_path, monkeypatch
):
    options = QUICK | {"eval_every": 1, "heldout_pairs": 0}
    straight = finetune(encoder, tmp_path / "straight", PAIRS, **options)
    monkeypatch.setattr(finetuning, "write_card", mock.Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        finetune(encoder, tmp_path / "out", PAIRS, **options)
    monkeypatch.undo()
    assert finetune(encoder, tmp_path / "out", PAIRS, resume=True, **options) == straight
    assert not differ(tmp_path / "out", tmp_path / "straight")


def test_the_current_folder_can_be_the_output(encoder, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    finetune(encoder, ".", PAIRS, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/metrics.jsonl").exists()


def test_matryoshka_training_raises_retrieval_at_full_and_small_width(encoder, tmp_path):
    options = {"steps": 30, "batch_size": 32, "lr": 3e-3, "max_length": 32, "matryoshka_dims": [10]}
    result = finetune(encoder, tmp_path / "tuned", PAIRS[:-60], **options, heldout_pairs=0)
    assert result["pairs"] == len(PAIRS) - 60
    assert "heldout" not in result
    assert hits(tmp_path / "tuned") > hits(encoder) + 0.2
    assert hits(tmp_path / "tuned", 10) > hits(encoder, 10) + 0.2
    # Control: the same budget on pairs that do not belong together.
    queries, documents = zip(*PAIRS[:-60], strict=True)
    shuffled = list(zip(queries, documents[7:] + documents[:7], strict=True))
    finetune(encoder, tmp_path / "control", shuffled, **options)
    assert hits(tmp_path / "tuned") > hits(tmp_path / "control") + 0.2


def test_gradcache_and_gradient_checkpointing_change_nothing(encoder, tmp_path, monkeypatch):
    forward = mock.Mock(side_effect=Qwen3MLP.forward)
    monkeypatch.setattr(Qwen3MLP, "forward", lambda *arguments: forward(*arguments))

    def tuned(**changes):
        forward.reset_mock()
        finetune(encoder, tmp_path / "out", PAIRS, **{**QUICK, "heldout_pairs": 0, **changes})
        return weights(tmp_path / "out"), forward.call_count

    plain, once = tuned()
    cached, _ = tuned(mini_batch_size=3)
    checkpointed, twice = tuned(gradient_checkpointing=True)
    other, _ = tuned(batch_size=7)
    assert twice == 2 * once
    for name, expected in plain.items():
        assert torch.allclose(cached[name], expected, atol=2e-5)
        assert torch.allclose(checkpointed[name], expected, atol=2e-5)
    assert not all(torch.allclose(plain[name], other[name], atol=2e-5) for name in plain)


def test_spread_out_regulariser_lowers_the_cosines_of_strangers(encoder, tmp_path):
    def mean_square_cosine(weight):
        options = {"steps": 12, "batch_size": 16, "lr": 2e-3, "max_length": 32}
        options |= {"mini_batch_size": 8, "spread_weight": weight, "heldout_pairs": 0}
        finetune(encoder, tmp_path / "out", PAIRS, **options)
        texts = [document for _, document in PAIRS[:40]]
        embeddings = TextEncoder(tmp_path / "out", dtype=torch.float32).encode(texts)
        return float(((embeddings @ embeddings.T) ** 2).mean())

    assert mean_square_cosine(20.0) < 0.8 * mean_square_cosine(0.0)


def test_distillation_approaches_its_teacher(encoder, tmp_path):
    """The teacher is the encoder after other training; the student begins where it began."""
    options = {"batch_size": 32, "max_length": 32}
    finetune(encoder, tmp_path / "teacher", PAIRS, steps=10, lr=3e-3, **options)

    def distance(folder):
        models = [SentenceTransformer(str(f), device="cpu") for f in (tmp_path / "teacher", folder)]
        texts = [text for pair in PAIRS[:60] for text in pair]
        first, second = (model.encode(texts) for model in models)
        return float(np.square(first - second).mean())

    teaching = {"teacher": str(tmp_path / "teacher")}
    finetune(encoder, tmp_path / "student", PAIRS, steps=20, lr=1e-3, **options, **teaching)
    assert distance(tmp_path / "student") < 0.7 * distance(encoder)


def wider(folder):
    """Append a layer of 56 dimensions to an encoder folder, in the place of its normalization."""
    model = SentenceTransformer(str(folder), device="cpu")
    torch.manual_seed(0)
    model[2] = Dense(40, 56)
    model.save_pretrained(str(folder))
    return folder


def test_a_wider_teacher_teaches_no_leading_dimensions(encoder, tmp_path):
    teacher = wider(shutil.copytree(encoder, tmp_path / "teacher"))
    with pytest.raises(InputError, match="matryoshka_dims need a teacher of width 40, not 56"):
        finetune(encoder, tmp_path / "x", PAIRS, teacher=str(teacher), matryoshka_dims=[10])


def test_prompts_and_contrastive_options_reach_the_libraries(encoder, tmp_path, told):
    prompts = {"query_prompt": "query: ", "document_prompt": "text: "}
    arguments = told(encoder, tmp_path / "x", TRIPLETS, columns=["a", "b", "c"], **prompts)["args"]
    assert arguments.prompts == {"anchor": "query: ", "positive": "text: ", "negative_1": "text: "}
    assert arguments.n_gpu == 1  # else a batch for every GPU of the machine
    assert not told(encoder, tmp_path / "x")["args"].prompts
    loss = told(encoder, tmp_path / "x", temperature=0.02, mini_batch_size=4)["loss"]
    assert (loss.scale, loss.mini_batch_size) == (50.0, 4)
    assert loss.directions == ("query_to_doc", "doc_to_query")
    assert told(encoder, tmp_path / "x", symmetric=False)["loss"].directions == ("query_to_doc",)
    loss = told(encoder, tmp_path / "x", matryoshka_dims=[10, 20])["loss"]
    assert loss.matryoshka_dims == (40, 20, 10)


def test_bfloat16_is_used_only_where_it_is_native(encoder, tmp_path, told, monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("mps")
    )
    assert not told(encoder, tmp_path / "x")["args"].bf16


@pytest.mark.parametrize("suffix", [".JSONL", ".parquet", ".csv"])
def test_examples_of_files(tmp_path, suffix, capsys):
    """Cells that look like numbers or missing values are texts; empty ones leave the row out."""
    rows = [*TRIPLETS[:4], ("007", "NA", "1.0"), ("no document", " ", "x"), ("none", None, "x")]
    columns = dict(zip(("q", "d", "n"), map(list, zip(*rows, strict=True)), strict=True))
    path, table = tmp_path / f"pairs{suffix}", Dataset.from_dict(columns)
    {".JSONL": table.to_json, ".parquet": table.to_parquet, ".csv": table.to_csv}[suffix](path)
    dataset = read_examples(FinetuneConfig(inputs=[str(path)], columns=["q", "d", "n"]))
    assert [tuple(row.values()) for row in dataset] == rows[:5]
    assert dataset.column_names == ["anchor", "positive", "negative_1"]
    assert f"input {path}: 2 examples lack a text, left out" in capsys.readouterr().err
    both = read_examples(FinetuneConfig(inputs=[str(path), str(path)], columns=["q", "n"]))
    assert len(both) == 2 * len(rows)


def test_examples_of_package_docs():
    dataset = read_examples(FinetuneConfig())
    assert dataset.column_names == ["anchor", "positive"]
    assert len(dataset) > 1000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps\n.* greater than or equal to 1"),
        ({"seed": 2**32}, "seed\n.* less than 4294967296"),
        ({"inputs": []}, "inputs\n.* at least 1 item"),
        ({"lr": math.inf}, "lr\n.* finite"),
        ({"columns": ["text"]}, "columns\n.* at least 2 items"),
        ({"teacher": "x", "spread_weight": 1.0}, "cannot be used with a teacher"),
        (
            {"matryoshka_dims": [64]},
            r"\[64.0\] must be shares below 1 or integers from 2 to the width 40",
        ),
        ({"matryoshka_dims": [1.0]}, r"\[1.0\] must be shares"),
        ({"examples": []}, "there are no examples"),
        ({"examples": [("a", "b"), ("c",)]}, "tuples of two or more texts, all of one length"),
        (
            {"examples": [("a", None)]},
            "anchor has 0 distinct texts, and a batch of 8 needs 8: add texts",
        ),
        ({"teacher": "nowhere"}, "nowhere is not a sentence-transformers folder"),
    ],
)
def test_bad_settings(encoder, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        finetune(encoder, tmp_path / "out", **{"examples": PAIRS, **QUICK, **changes})
    assert not list(tmp_path.iterdir())


def test_several_processes_would_write_one_folder(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process: start it without a launcher"):
        finetune(encoder, tmp_path / "out", PAIRS, **QUICK)


def test_bad_inputs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"q": "a", "n": [3], "mixed": "a"}\n{"q": "a", "n": [3], "mixed": 4}\n')
    for column in ("d", "n", "mixed"):
        with pytest.raises(InputError, match=rf"pairs.jsonl cannot be read: .*{column}"):
            read_examples(FinetuneConfig(inputs=[str(path)], columns=["q", column]))
    path.write_text("")
    with pytest.raises(InputError, match="pairs.jsonl has no rows"):
        read_examples(FinetuneConfig(inputs=[str(path)]))
    path.write_text("{broken\n")
    for name in (str(path), "nowhere.jsonl", str(tmp_path / "pairs.csv")):
        with pytest.raises(InputError, match=f"input {name} cannot be read"):
            read_examples(FinetuneConfig(inputs=[name]))
    (tmp_path / "pairs.tsv").write_text("anchor\tpositive\n")
    with pytest.raises(InputError, match="pairs.tsv must be one of .jsonl"):  # no hub is asked
        read_examples(FinetuneConfig(inputs=[str(tmp_path / "pairs.tsv")]))
    with pytest.raises(InputError, match="package-docs has pairs"):
        read_examples(FinetuneConfig(columns=["q", "d", "n"]))


def test_the_command_prints_its_scores(command, encoder, tmp_path):
    lines = [json.dumps({"anchor": a, "positive": b}) for a, b in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    settings = {**QUICK, "inputs": f"[{tmp_path / 'pairs.jsonl'}]", "steps": 3}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]

    def printed(output, *more: str) -> str:
        code, out, err = command("finetune", "--model", encoder, "--output", output, *words, *more)
        assert code == 0, err
        return out

    result = json.loads(printed(tmp_path / "one", "--json"))
    lines = printed(tmp_path / "two").splitlines()
    assert lines[0] == f"loss {result['loss']:.4f} over {result['pairs']} examples"
    assert lines[1].startswith(
        f"nDCG@10 of held-out pairs: before {result['heldout']['before']:.4f}, "
    )
    assert lines[2:] == [f"wrote {tmp_path / 'two'}"]
