"""The verbs `evaluate loss`, `evaluate nll-by-position` and `evaluate harness`: what they take,
their help. Imports the work when asked."""

import argparse
from collections.abc import Sequence
from typing import Any

from nemotron_train.compose import parse_overrides, to_typed
from nemotron_train.config.schema import ConfigError
from nemotron_train.generate.commands import prepare
from nemotron_train.verbs import Verb

_PATHS = ("data",)  # taken as typed, and more than once


def _runs_and_knobs(schema: Any, words: Sequence[str], most: int) -> tuple[list[str], Any]:
    """The runs that are named and the typed knobs. Raises ConfigError."""
    paths: dict[str, list[str]] = {}
    runs, overrides = [], []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in _PATHS:
            paths.setdefault(name, []).append(value)
        elif equals:
            overrides.append(word)
        else:
            runs.append(word)
    if not 1 <= len(runs) <= most:
        asked = "one run is needed" if most == 1 else "name one run or more"
        given = f"{len(runs)} are given: {' '.join(runs)}" if runs else "none is given"
        raise ConfigError(f"{asked}, RUN_FOLDER or RUN_FOLDER@STEP; {given}")
    knobs = to_typed(schema, paths, parse_overrides(overrides))
    prepare(knobs)
    return runs, knobs


def run_loss(arguments: argparse.Namespace) -> int:
    from nemotron_train.evaluate.knobs import LossConfig

    (run,), knobs = _runs_and_knobs(LossConfig, arguments.words, 1)
    from nemotron_train.evaluate.loss import evaluate_loss

    evaluate_loss(run, knobs)
    return 0


def run_positions(arguments: argparse.Namespace) -> int:
    from nemotron_train.evaluate.knobs import PositionsConfig

    runs, knobs = _runs_and_knobs(PositionsConfig, arguments.words, 8)
    from nemotron_train.evaluate.positions import evaluate_positions

    evaluate_positions(runs, knobs)
    return 0


def run_harness(arguments: argparse.Namespace) -> int:
    from nemotron_train.evaluate.knobs import HarnessConfig

    (run,), knobs = _runs_and_knobs(HarnessConfig, arguments.words, 1)
    from nemotron_train.evaluate.harness import evaluate_harness

    evaluate_harness(run, knobs)
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="RUN | KNOB=VALUE")


EVALUATE_VERBS: dict[str, Verb] = {
    "evaluate loss": Verb(
        "loss, perplexity and bits a byte of a checkpoint on prepared data, folder by folder",
        run_loss,
        _arguments,
        """\
RUN is a run folder (its newest checkpoint) or RUN_FOLDER@STEP. The knobs are the fields of
LossConfig in nemotron_train/evaluate/knobs.py: data=FOLDER (more than once; default: the run's
validation data), split=, max_tokens= (of each folder), sequence_length=, output=FILE.json.

Example:
  nemotron-train evaluate loss runs/tiny data=data/code data=data/books
""",
    ),
    "evaluate nll-by-position": Verb(
        "negative log-likelihood against position in long documents, of one or more checkpoints",
        run_positions,
        _arguments,
        """\
Every document is cut to max_tokens and read in chunks, so memory grows with the attention layers'
cache alone. The knobs are the fields of PositionsConfig in nemotron_train/evaluate/knobs.py:
data=FOLDER (more than once), split=, documents=N, max_tokens=N, first_position=N (of the fit),
output=PATH.

Example:
  nemotron-train evaluate nll-by-position runs/short runs/extended data=data/packages
""",
    ),
    "evaluate harness": Verb(
        "tasks of the LM evaluation harness (extra `evaluate`)",
        run_harness,
        _arguments,
        """\
The knobs are the fields of HarnessConfig in nemotron_train/evaluate/knobs.py: tasks=NAME or
tasks=[A,B], include_path=FOLDER (with task files of your own), num_fewshot=N, limit=N (a task),
output=FILE.json. Tasks that the harness brings download their data.

Example:
  nemotron-train evaluate harness runs/tiny tasks=[lambada_openai,hellaswag] limit=100
""",
    ),
}
