"""The `convert` verbs: what they take, their help, exit codes. Imports the work when asked."""

import argparse

from nemotron_train.compose import parse_overrides, to_typed
from nemotron_train.verbs import Verb, open_console


def run_convert_merge(arguments: argparse.Namespace) -> int:
    from nemotron_train.convert.weights import MergeConfig

    knobs = [word for word in arguments.words if "=" in word]
    checkpoints = [word for word in arguments.words if "=" not in word]
    config = to_typed(MergeConfig, {}, parse_overrides(knobs))
    from nemotron_train.convert.merge import merge

    merge(checkpoints, config, open_console())
    return 0


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="RUN@STEP | KNOB=VALUE")


CONVERT_VERBS: dict[str, Verb] = {
    "convert merge": Verb(
        "the weighted mean of checkpoints, as a run folder to branch from",
        run_convert_merge,
        _merge_arguments,
        """\
The knobs: output=RUN_FOLDER (required), weights=uniform|linear|wsd (default uniform),
decay_style=linear|cosine|minus_sqrt (of weights=wsd, default minus_sqrt).

weights=wsd emulates a decay of the learning rate from the earliest checkpoint to the latest. The
optimizer is dropped; the result stands at the latest checkpoint's step and data position.

Example:
  nemotron-train convert merge runs/a@600 runs/a@800 runs/a@1000 weights=wsd output=runs/merged
  nemotron-train pretrain branch=runs/merged@1000 name=annealed
""",
    ),
}
