"""The console script ``discovr-monai``.

A command's parser stands beside the function that it calls, in one module for each group of
commands. Every function imports what it needs when it is called, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from discovr_monai.cli import data, label, mlflow, model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="discovr-monai",
        description="Self-supervised learning from heart ultrasound. Training and evaluation are "
        "bundle configs: cd bundles/discovr && python -m monai.bundle run training "
        "--config_file configs/train.yaml",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for group in (data, model, label, mlflow):  # --help lists the commands in this order
        group.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the command line's words behind ``discovr-monai``; None takes the process's own.

    Returns:
        What the command returns: 0 if it did its work, 1 if not. A ValueError or OSError is
        printed as one line of explanation and gives 1.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return status
