"""`rollouts show`: prints rollouts of a file. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.visible import visible
from nemotron_train.posttrain.rollout import Rollout, read_rollouts

_STYLES = {"passed": "green", "failed": "red"}


class Only(StrEnum):
    """Which rollouts are shown."""

    all = "all"
    passed = "passed"
    failed = "failed"  # any other verdict than passed
    malformed = "malformed"  # not in the chat format
    cut = "cut"  # ended by the length limit


@dataclass
class ShowConfig:
    """Knobs of `rollouts show`."""

    environment: str = ""  # of this environment alone
    only: Only = Only.all
    row: str = ""  # of the row with this id alone
    count: int = 5  # rollouts at most; 0: all


def show_rollouts(path: Path, knobs: ShowConfig, console: Console) -> None:
    """Print the first rollouts of a file that the knobs choose, in order.

    Raises ConfigError if the file is none of rollouts, or no rollout is chosen.
    """
    if knobs.count < 0:
        raise ConfigError(f"count={knobs.count}: give 0 (all) or a number of rollouts")
    shown = 0
    for rollout in _chosen(path, knobs):
        _print(rollout, console)
        shown += 1
        if shown == knobs.count:
            break
    if not shown:
        raise ConfigError(
            f"{path}: no rollout of environment={knobs.environment or 'any'} only={knobs.only} "
            f"row={knobs.row or 'any'}"
        )


def _chosen(path: Path, knobs: ShowConfig) -> Iterator[Rollout]:
    for rollout in read_rollouts(path):
        chosen = {
            Only.all: True,
            Only.passed: rollout.passed,
            Only.failed: not rollout.passed,
            Only.malformed: bool(rollout.episode.last.fault),
            Only.cut: rollout.cut,
        }[knobs.only]
        of_environment = knobs.environment in ("", rollout.row.environment)
        if chosen and of_environment and knobs.row in ("", rollout.row.id):
            yield rollout


def _print(rollout: Rollout, console: Console) -> None:
    score = rollout.score
    facts = [f"reward {rollout.reward:g}", f"{rollout.kinds.count('s')} tokens sampled"]
    if rollout.turns > 1:
        facts.append(f"{rollout.turns} turns")
    if rollout.forced_closes:
        facts.append("thinking closed by the budget")
    title = Text(f"── {rollout.row.id} #{rollout.sample}  ", style="bold")
    title.append(str(score.verdict), style=_STYLES.get(score.verdict, "yellow"))
    title.append(f"  {', '.join(facts)}", style="default")
    console.print(title, soft_wrap=True)
    for message in rollout.episode.prompt:
        console.print(Text(visible(f"{message.role}: {message.content}"), style="dim"))
    console.print(Text(visible(rollout.text)))
    if score.message:
        console.print(Text(visible(f"({score.message})"), style="dim"))
    if rollout.row.answer is not None and not rollout.passed:
        console.print(Text(visible(f"(answer: {rollout.row.answer})"), style="dim"))
