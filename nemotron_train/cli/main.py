"""The command line: verbs, help and exit codes.

Owns: `nemotron-train VERB ...`. Does not own: composing a configuration from overrides (`compose`),
deriving a plan (`plan.derive`), or the implementation of the verbs. Each verb imports its
implementation on use, so that `--help` and `plan` never load torch.
"""

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_train.cli.check import CHECK_VERBS
from nemotron_train.cli.convert import CONVERT_VERBS
from nemotron_train.cli.evaluate import EVALUATE_VERBS
from nemotron_train.cli.generate import GENERATE_VERBS
from nemotron_train.cli.posttrain import POSTTRAIN_VERBS
from nemotron_train.cli.report import REPORT_VERBS
from nemotron_train.cli.rollouts import ROLLOUT_VERBS
from nemotron_train.cli.slurm import SLURM_VERBS
from nemotron_train.cli.sweep import SWEEP_VERBS
from nemotron_train.cli.verbs import OVERRIDES_HELP, Verb, open_console, run_arguments
from nemotron_train.compose.compose import compose_config, nearest, to_typed
from nemotron_train.compose.overrides import parse_overrides
from nemotron_train.config.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.config.visible import one_line
from nemotron_train.platform.local_ranks import leave_refusal


def run_pretrain(arguments: argparse.Namespace) -> int:
    """Run `pretrain`; returns its exit code (docs/cli.md)."""
    config = compose_config(arguments.overrides, arguments.config)
    from nemotron_train.run import pretrain

    return pretrain(config)


def run_plan(arguments: argparse.Namespace) -> int:
    """Run `plan`: print the plan of a configuration or, with --why, the origin of one knob."""
    ranks_words = [text for text in arguments.overrides if text.startswith("ranks=")]
    overrides = [text for text in arguments.overrides if not text.startswith("ranks=")]
    if arguments.why:
        from nemotron_train.report.plan.why import explain, print_why

        print_why(explain(arguments.why, overrides, arguments.config), open_console())
        return EXIT_DONE
    config = compose_config(overrides, arguments.config)
    from nemotron_train.plan.backend import check_planned
    from nemotron_train.plan.derive import derive
    from nemotron_train.plan.switches import planned_switches
    from nemotron_train.report.plan.table import print_plan

    num_ranks = _parse_ranks(ranks_words[-1]) if ranks_words else _smallest_num_ranks(config)
    console, derived = open_console(), derive(config, num_ranks)
    warnings = check_planned(config, derived.plan)
    switches = planned_switches(config, derived.plan)
    print_plan(config, derived, console, layers=arguments.layers)
    console.print(switches, soft_wrap=True)
    for warning in warnings:
        console.print(warning, soft_wrap=True)
    return EXIT_DONE


def run_data_prepare(arguments: argparse.Namespace) -> int:
    """Run `data prepare`."""
    from nemotron_train.cli.data import run_prepare
    from nemotron_train.data.prepare import PrepareConfig

    run_prepare(to_typed(PrepareConfig, {}, parse_overrides(arguments.overrides, PrepareConfig)))
    return EXIT_DONE


def run_data_inspect(arguments: argparse.Namespace) -> int:
    """Run `data inspect`."""
    from nemotron_train.cli.data import run_inspect

    run_inspect(arguments.path)
    return EXIT_DONE


def run_propose(arguments: argparse.Namespace) -> int:
    """Run `precision propose`."""
    from nemotron_train.report.propose import ProposeConfig, propose

    knobs = to_typed(ProposeConfig, {}, parse_overrides(arguments.overrides, ProposeConfig))
    propose(arguments.run, knobs, open_console())
    return EXIT_DONE


def _parse_ranks(text: str) -> int:
    value = text.removeprefix("ranks=")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"ranks={value}: give the number of ranks, 1 or more")
    return int(value)


def _smallest_num_ranks(config: Config) -> int:
    """The smallest number of ranks that both the dense and the expert groups divide."""
    parallel = config.parallel
    dense = parallel.tensor * parallel.context
    return parallel.pipeline * math.lcm(dense, parallel.expert * parallel.expert_tensor)


# Parsing ------------------------------------------------------------------------------------


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("--layers", action="store_true", help="one row a layer")
    parser.add_argument("--why", metavar="KNOB", help="only show what set this knob, in order")


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="+", metavar="KNOB=VALUE")


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder of prepared data")


def _propose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder with telemetry")
    parser.add_argument("overrides", nargs="+", metavar="KNOB=VALUE")


VERBS: dict[str, Verb] = {
    "pretrain": Verb(
        "train a model; with no arguments, a small Nemotron-3-shaped one on this machine",
        run_pretrain,
        run_arguments,
        OVERRIDES_HELP
        + """
Examples:
  nemotron-train pretrain
  nemotron-train pretrain name=first train.total_tokens=1e6 precision=bf16
  nemotron-train pretrain resume=runs/first
  nemotron-train pretrain branch=runs/first@100 precision=bf16
  nemotron-train pretrain --config runs/first/config.yaml name=again train.seed=7

The run folder is runs/NAME. The same command again continues the run from its last checkpoint.
Exit codes: 0 done; 2 wrong configuration or input; 3 stopped on request, checkpoint saved;
4 not begun, since the last three starts crashed at the same step (docs/guard.md); 1 anything else.
""",
    ),
    "plan": Verb(
        "what a configuration means: layers, parameters, FLOPs, ranks; nothing is run",
        run_plan,
        _plan_arguments,
        OVERRIDES_HELP
        + """  ranks=N                        plan for N ranks (default: the fewest that fit)

Examples:
  nemotron-train plan
  nemotron-train plan model=super_120b_a12b --layers
  nemotron-train plan model=nano_30b_a3b parallel.expert=8 ranks=64
  nemotron-train plan --why optim.peak_learning_rate run=super_120b_a12b
""",
    ),
    "data prepare": Verb(
        "text, JSONL, Parquet or a Hugging Face data set -> Megatron .bin/.idx shards",
        run_data_prepare,
        _prepare_arguments,
        """\
Example:
  nemotron-train data prepare input=texts/ tokenizer=my_tokenizer/ output=data/mine workers=4

The knobs: PrepareConfig in nemotron_train/data/prepare.py; a mistyped one is refused by name.
The same command again continues where it stopped.
""",
    ),
    "data inspect": Verb(
        "counts, samples and checksum of a folder of prepared data",
        run_data_inspect,
        _inspect_arguments,
        "Example:\n  nemotron-train data inspect data/mine\n",
    ),
    "precision propose": Verb(
        "what to keep above NVFP4 under a budget of FLOPs, from a run's telemetry, as a plan",
        run_propose,
        _propose_arguments,
        """\
The knobs: budget=SHARE (of the FLOPs that a plan decides over; required), format=bf16|mxfp8,
error=noise|flush, by=kind|module, output=FILE.

Examples:
  nemotron-train pretrain precision=bf16 precision.telemetry.every=100 \\
      precision.telemetry.probe=nvfp4 name=probe
  nemotron-train precision propose runs/probe budget=0.1 output=mine.yaml
  nemotron-train pretrain precision=mine.yaml
""",
    ),
}


VERBS |= SWEEP_VERBS | REPORT_VERBS | CHECK_VERBS | CONVERT_VERBS | EVALUATE_VERBS
VERBS |= GENERATE_VERBS | SLURM_VERBS | POSTTRAIN_VERBS | ROLLOUT_VERBS


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: nemotron-train VERB ...",
            "",
            "Pretraining of Nemotron-3-style hybrid models.",
            "",
            *lines,
            "",
            "nemotron-train VERB --help tells the rest. To begin: nemotron-train pretrain",
        ]
    )


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return EXIT_DONE
    if words[0] == "--version":
        from nemotron_train import __version__

        print(f"nemotron-train {__version__}")
        return EXIT_DONE
    num_words = 1 if words[0] in VERBS and " ".join(words[:2]) not in VERBS else 2
    name = " ".join(words[:num_words])
    first_words = {verb_name.split()[0] for verb_name in VERBS if " " in verb_name} - set(VERBS)
    if name.removesuffix(" --help").removesuffix(" -h") in first_words:
        print(_overview())
        return EXIT_DONE
    if name not in VERBS:
        verb = name if words[0] in first_words else words[0]
        raise ConfigError(f"{verb}: no such verb{nearest(verb, list(VERBS))}")
    verb = VERBS[name]
    parser = _Parser(
        prog=f"nemotron-train {name}",
        description=verb.summary[0].upper() + verb.summary[1:] + ".",
        epilog=verb.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.arguments(parser)
    return verb.run(parser.parse_intermixed_args(words[num_words:]))


def _print_in_any_encoding() -> None:
    """Let a terminal or a pipe that is not UTF-8 show `?` instead of ending the verb."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code (docs/cli.md)."""
    _print_in_any_encoding()
    try:
        try:
            return _dispatch(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can still be handled
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except ConfigError as error:
        line = f"nemotron-train: {one_line(error)}"
        if not leave_refusal(line):
            print(line, file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print("nemotron-train: interrupted", file=sys.stderr)
        return EXIT_FAILED
