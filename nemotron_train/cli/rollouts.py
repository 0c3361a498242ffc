"""The `rollouts` verbs: arguments and help. Imports the implementation on use."""

import argparse
from pathlib import Path

from nemotron_train.cli.verbs import Verb, open_console
from nemotron_train.compose.compose import to_typed
from nemotron_train.compose.overrides import parse_overrides


def run_show(arguments: argparse.Namespace) -> int:
    """Run `rollouts show`."""
    from nemotron_train.posttrain.show import ShowConfig, show_rollouts

    knobs = to_typed(ShowConfig, {}, parse_overrides(arguments.overrides, ShowConfig))
    show_rollouts(Path(arguments.file), knobs, open_console())
    return 0


def run_rescore(arguments: argparse.Namespace) -> int:
    """Run `rollouts rescore`."""
    from nemotron_train.posttrain.rescore import RescoreConfig, rescore

    knobs = to_typed(RescoreConfig, {}, parse_overrides(arguments.overrides, RescoreConfig))
    rescore(Path(arguments.file), knobs, open_console())
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.jsonl.gz")
    parser.add_argument("overrides", nargs="*", metavar="KNOB=VALUE")


ROLLOUT_VERBS: dict[str, Verb] = {
    "rollouts show": Verb(
        "print rollouts of a file: prompt, what the policy wrote, verdict",
        run_show,
        _arguments,
        """\
Special tokens are shown as their text. The knobs: environment=NAME, row=ID,
only=passed|failed|malformed|cut, count=5 (0: all).

Example:
  nemotron-train rollouts show environments.0.jsonl.gz environment=tools only=failed
""",
    ),
    "rollouts rescore": Verb(
        "judge the rollouts of a file again, without a model, and show what changed",
        run_rescore,
        _arguments,
        """\
The knobs: environment=NAME (its rollouts alone), verifier=module:name (judges in place of each
rollout's own environment), output=FILE.jsonl.gz, those of scoring and of advantages (baseline=,
deviation=, ...).

Example:
  nemotron-train rollouts rescore runs/policy/rollouts/step_00000003.jsonl.gz \\
      environment=arithmetic verifier=rewards.py:exact
""",
    ),
}
