"""The type that the modules of commands share."""

from __future__ import annotations

import argparse
from typing import TypeAlias

# what `ArgumentParser.add_subparsers` returns
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
