"""The training command, apart from the loop so that ``--help`` and a bad config answer at once."""

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
        str | None,
        typer.Option(
            help="Dry run: plan for COUNTxNAME, NAME of H100, H200, A100, not for those at hand."
        ),
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(
            help="Dry run: refuse what needs more on a device; default: the device's own."
        ),
    ] = None,
    mfu: Annotated[
        float, typer.Option(help="Dry run: share of the devices' peak to expect.")
    ] = 0.4,
    find_batch_size: Annotated[
        bool,
        typer.Option(
            "--find-batch-size", help="Print the largest batch_size that fits; write nothing."
        ),
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="The same, shorter.")
    ] = None,
) -> None:
    """Train an encoder-decoder on UL2, alone or under `accelerate launch`."""
    resolved = load_config(config, [*(settings or ()), *(overrides or ())])
    from qwen3_encdec.training.loop import run_training

    run_training(resolved, dry_run, devices, memory_gib, mfu, find_batch_size)
