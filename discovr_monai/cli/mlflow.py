"""The command that shows MLflow's pages."""

from __future__ import annotations

import argparse

from discovr_monai.cli.types import Commands


def add(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("mlflow", help="MLflow's pages over a store, on this machine")
    parser.add_argument("store", nargs="?", default="output/mlruns.db", help="(output/mlruns.db)")
    parser.add_argument("--port", type=int, default=5000, help="of the address (5000)")
    parser.set_defaults(run=_mlflow)


def _mlflow(arguments: argparse.Namespace) -> int:
    from discovr_monai.base.tracking import serve

    serve(arguments.store, arguments.port)
    return 0
