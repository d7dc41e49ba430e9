"""Tokenize a corpus like `qwen3-encdec prepare-data`, as a datatrove pipeline.

    python examples/prepare_with_datatrove.py TOKENIZER OUTPUT INPUT... [--tasks 64] [--workers 8]

Needs the extra `datatrove`. Each task writes its share of the parts; a restarted task writes only
the missing ones. On several machines, which must share OUTPUT and INPUT, use datatrove's
SlurmPipelineExecutor or RayPipelineExecutor instead of the local one. They take the same pipeline,
and `depends` makes the last step wait for all tasks. Only the local executor is tested.
"""

import argparse
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor

from qwen3_encdec.data.config import DataConfig
from qwen3_encdec.data.prepare import Preparation
from qwen3_encdec.folders import load_tokenizer


def prepare(
    tokenizer: Path, output: Path, inputs: list[str], deduplicate: str, tasks: int, workers: int
) -> None:
    """Run the steps of a `Preparation`: the middle one in parallel tasks, then the last one."""
    config = DataConfig(inputs=inputs)
    preparation = Preparation(config, load_tokenizer(tokenizer), output, deduplicate)
    preparation.begin()
    logs = str(output.with_name(output.name + ".logs"))
    # Existing parts are skipped, so the executor need not track completed tasks.
    options = {"skip_completed": False}
    tokenize = LocalPipelineExecutor(
        [preparation.run], tasks=tasks, workers=workers, logging_dir=f"{logs}/tokenize", **options
    )
    tokenize.run()
    finish = LocalPipelineExecutor([preparation.finish], logging_dir=f"{logs}/finish", **options)
    finish.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tokenizer", type=Path, help="folder of a model or tokenizer")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("inputs", nargs="+", help="files, folders, globs or hub datasets")
    parser.add_argument("--deduplicate", choices=("no", "exact", "minhash"), default="no")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time; -1 is all")
    options = parser.parse_args()
    prepare(**vars(options))
