"""The `check` verbs: arguments, help and exit codes. Imports the implementation on use."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemotron_train.cli.verbs import Verb, open_console, run_arguments
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.schema import Config
from nemotron_train.config.visible import visible

EQUAL, DIFFERS = 0, 1


def _exit_code(
    name: str, arguments: argparse.Namespace, check: Callable[[Config, Path, Any, Any], bool]
) -> int:
    """Run `check(configuration, folder, console, ranks)` in a locked folder; return its exit code.

    check: returns whether everything is equal.
    """
    from nemotron_train.check.ranks import Ranks, RanksFailed
    from nemotron_train.platform.lock import exclusive

    config = compose_config(arguments.overrides, arguments.config)
    folder, console = Path(config.folder) / "checks" / config.name / name, open_console()
    try:
        with exclusive(folder, wait=False):
            equal = check(config, folder, console, Ranks(folder, console))
    except RanksFailed as error:
        print("nemotron-train:", visible(str(error)), file=sys.stderr)
        return DIFFERS
    return EQUAL if equal else DIFFERS


def run_check_parallel(arguments: argparse.Namespace) -> int:
    """Run `check parallel`; returns EQUAL or DIFFERS."""
    from nemotron_train.check.parallel import ParallelCheck, check_parallel

    def check(config: Config, folder: Path, console: Any, ranks: Any) -> bool:
        options = ParallelCheck(folder, arguments.ranks, arguments.steps, arguments.own_precision)
        return check_parallel(config, options, console, ranks)

    return _exit_code("parallel", arguments, check)


def run_check_resume(arguments: argparse.Namespace) -> int:
    """Run `check resume`; returns EQUAL or DIFFERS."""
    from nemotron_train.check.resume import ResumeCheck, check_resume

    def check(config: Config, folder: Path, console: Any, ranks: Any) -> bool:
        stamp_folder = Path(config.resume) / "checkpoints" if config.resume else None
        options = ResumeCheck(folder, arguments.ranks, arguments.steps, stamp_folder)
        return check_resume(config, options, console, ranks)

    return _exit_code("resume", arguments, check)


def run_check_precision(arguments: argparse.Namespace) -> int:
    """Run `check precision`; returns EQUAL or DIFFERS."""
    from nemotron_train.check.precision import check_precision

    def check(config: Config, folder: Path, console: Any, ranks: Any) -> bool:
        return check_precision(config, folder, arguments.ranks, console, ranks)

    return _exit_code("precision", arguments, check)


def run_check_environment(arguments: argparse.Namespace) -> int:
    """Run `check environment`."""
    from nemotron_train.check.environment import check_environment
    from nemotron_train.compose.compose import to_typed
    from nemotron_train.compose.overrides import parse_overrides
    from nemotron_train.posttrain.knobs import CheckEnvironmentConfig

    overrides = parse_overrides(arguments.overrides, CheckEnvironmentConfig)
    knobs = to_typed(CheckEnvironmentConfig, {}, overrides)
    check_environment(arguments.environment, knobs, open_console())
    return EQUAL


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _ranks_and_steps(parser: argparse.ArgumentParser, steps: int) -> None:
    run_arguments(parser)
    for name, default, meaning in (("ranks", 4, "processes at most"), ("steps", steps, "of AdamW")):
        text = f"{meaning} (default {default})"
        parser.add_argument(f"--{name}", type=_whole_number, default=default, help=text)


def _check_precision_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument(
        "--ranks", type=_whole_number, default=4, help="processes at most (default 4)"
    )


def _check_resume_arguments(parser: argparse.ArgumentParser) -> None:
    _ranks_and_steps(parser, steps=8)


def _check_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    _ranks_and_steps(parser, steps=2)
    parser.add_argument(
        "--own-precision",
        action="store_true",
        help="keep the precision plan, with wide limits; otherwise FP32, which is a proof",
    )


def _check_environment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("environment", metavar="ENVIRONMENT")
    parser.add_argument("overrides", nargs="*", metavar="KNOB=VALUE")


CHECK_VERBS: dict[str, Verb] = {
    "check parallel": Verb(
        "does your layout train as one rank does? gradient by gradient, shrunk, on this machine",
        run_check_parallel,
        _check_parallel_arguments,
        """\
Takes any configuration, of any number of ranks. Shrinks it (every parallel dimension above 1
becomes 2), runs the same steps on one rank and in the layout on CPU processes, and compares
initial weights, losses, gradients and updates by name. Names the module that differs and the
parallel dimension that brings it. Exit code 0: equal; 1: it differs.

Examples:
  nemotron-train check parallel parallel.tensor=2 parallel.sequence=true
  nemotron-train check parallel run=super_120b_a12b
  nemotron-train check parallel resume=runs/mine      # the configuration of a run folder
""",
    ),
    "check environment": Verb(
        "may a policy be paid by this environment? hack canaries, determinism, time-outs",
        run_check_environment,
        _check_environment_arguments,
        """\
ENVIRONMENT is a family (arithmetic, strings, instructions, structure, tools, python_code),
mathematics, or your own as module:name or file.py:name. Exit code 0: nothing found; 2: refused,
with the completion that shows why. The knobs are the fields of CheckEnvironmentConfig in
nemotron_train/posttrain/knobs.py: rows=FILE.jsonl (your own rows; default: generated), samples=N,
level=N, most_reward=X (that a canary may get; default 0), scoring_seconds=X, sandbox=...

Examples:
  nemotron-train check environment tools level=3
  nemotron-train check environment my_rewards:exact rows=rows.jsonl
""",
    ),
    "check precision": Verb(
        "do the built modules carry the formats of your precision plan, in every phase?",
        run_check_precision,
        _check_precision_arguments,
        """\
Takes any configuration, shrinks it with its plan and layout, builds the model on CPU processes and
reads back from each linear what it carries. Formats are emulated here; what Transformer Engine's
modules carry on a GPU is read back by each run itself. Exit code 0: as planned; 1: not.

Example:
  nemotron-train check precision run=super_120b_a12b precision=nvfp4_then_mxfp8
""",
    ),
    "check resume": Verb(
        "does your run resume exactly? steps in one go against half, a new process, and the rest",
        run_check_resume,
        _check_resume_arguments,
        """\
Takes any configuration, shrinks it as `check parallel` does (the precision plan stays), and
compares field by field: losses, samples, data cursor, learning rates, random states, weights,
router biases, optimizer state, all in every bit. Then loads the same checkpoint under another
layout. Leaves check_resume.json beside the checkpoints: its own, and with resume=RUN that run's.
Exit code 0: exact; 1: it differs.

Examples:
  nemotron-train check resume precision=nvfp4_nemotron3
  nemotron-train check resume run=super_120b_a12b
  nemotron-train check resume resume=runs/mine      # the configuration of a run folder
""",
    ),
}
