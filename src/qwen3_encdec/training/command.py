"""Define the training command apart from the loop, so that ``--help`` responds immediately."""

from pathlib import Path
from typing import Annotated

import typer

from qwen3_encdec.training.config import load_config


def train(
    config: Annotated[
        Path | None, typer.Option(help="Training YAML; configs/training_config.yaml has all keys.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the config and the cost; write nothing.")
    ] = False,
    devices: Annotated[
        str | None, typer.Option(help="Dry run: COUNTxNAME as in 8xH100, or 4x8xH100 for HSDP.")
    ] = None,
    qwen3_model: Annotated[
        str | None, typer.Option(help="Dry run: 0.6B to 32B, or a folder or hub id of a Qwen3.")
    ] = None,
    mfu: Annotated[
        float, typer.Option(help="Dry run: share of the devices' peak; measured: 0.29.")
    ] = 0.29,
    as_json: Annotated[bool, typer.Option("--json", help="Dry run: print JSON.")] = False,
    find_batch_size: Annotated[
        bool, typer.Option("--find-batch-size", help="Print the largest batch_size that fits.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Override a key.")
    ] = None,
) -> None:
    """Train an encoder-decoder on UL2, alone or under `accelerate launch`."""
    resolved = load_config(config, overrides or ())
    if dry_run:
        from qwen3_encdec.training import plan

        plan.dry_run(resolved, devices, qwen3_model, mfu, as_json)
    elif find_batch_size:
        from qwen3_encdec.training import start

        start.find_batch_size(resolved)
    else:
        from qwen3_encdec.training import loop

        loop.run_training(resolved)
