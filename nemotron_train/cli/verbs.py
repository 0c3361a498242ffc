"""The `Verb` type and helpers that several verbs share. Imports no implementation."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OVERRIDES_HELP = """\
Overrides are KNOB=VALUE, as many as you like:
  model=tiny                     pick a recipe (a file under recipes/model/)
  train.total_tokens=1e6         set one knob
  'model.pattern=ME*E'           quote what your shell would expand
The knobs and their defaults: nemotron_train/config/schema.py; a mistyped one is refused by name.
"""


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    summary: its line in the overview. run: executes it and returns the exit code. arguments:
    declares its arguments. epilog: text after the options in its help.
    """

    summary: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None]
    epilog: str


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of a verb that composes a run's configuration."""
    parser.add_argument("overrides", nargs="*", metavar="KNOB=VALUE")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="start from this config.yaml (of a run folder) instead of the recipes",
    )


def open_console() -> Any:
    """A console on stdout, wide enough for tables if stdout is a pipe. rich is only imported now:
    `--help` needs none."""
    from nemotron_train.platform import terminal

    return terminal.open_console()
