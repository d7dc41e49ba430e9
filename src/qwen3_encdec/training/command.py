"""Define the training command apart from the loop, so that ``--help`` and a bad config answer at
once.
"""

from pathlib import Path
from typing import Annotated

import typer

from qwen3_encdec.training.config import load_config

_Config = Annotated[
    Path | None, typer.Option(help="Training YAML; configs/training_config.yaml has all keys.")
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the config and the cost; write nothing.")
]
_Devices = Annotated[
    str | None,
    typer.Option(help="Dry run: COUNTxNAME with NAME of H100, H200, A100, or 4x8xH100 for HSDP."),
]
_Model = Annotated[
    str | None,
    typer.Option(help="Dry run: 0.6B to 32B, a folder or a hub id, instead of the model's folder."),
]
_Mfu = Annotated[float, typer.Option(help="Dry run: share of the devices' peak; measured: 0.29.")]
_Find = Annotated[
    bool,
    typer.Option("--find-batch-size", help="Print the largest batch_size that fits, by trying."),
]
_Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
]
_Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="The same, shorter.")
]


def train(
    config: _Config = None,
    dry_run: _DryRun = False,
    devices: _Devices = None,
    qwen3_model: _Model = None,
    mfu: _Mfu = 0.29,
    find_batch_size: _Find = False,
    settings: _Settings = None,
    overrides: _Overrides = None,
) -> None:
    """Train an encoder-decoder on UL2, alone or under `accelerate launch`."""
    resolved = load_config(config, [*(settings or ()), *(overrides or ())])
    from qwen3_encdec.training.loop import run_training

    run_training(
        resolved,
        dry_run=dry_run,
        devices=devices,
        qwen3_model=qwen3_model,
        mfu=mfu,
        find_batch_size=find_batch_size,
    )
