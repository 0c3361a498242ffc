"""`rollouts rescore`: judge stored rollouts again, without a model. No torch.

A verifier that was mended, or another one, gives other rewards; this shows which rollouts of a file
it changes, and how much of what was trained on them: the advantages.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nemotron_train.config.environments import ScoringConfig
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.grpo_knobs import AdvantageKnobs, check_advantage
from nemotron_train.platform.files import check_output
from nemotron_train.posttrain.advantage import compute_advantages
from nemotron_train.posttrain.environments.families import check_name
from nemotron_train.posttrain.environments.scoring import Scoring
from nemotron_train.posttrain.knobs import scoring_limits
from nemotron_train.posttrain.rollout import (
    Rollout,
    outcome_of,
    read_rollouts,
    write_rollouts,
)


@dataclass
class RescoreConfig(ScoringConfig, AdvantageKnobs):
    """Knobs of `rollouts rescore`."""

    environment: str = ""  # rollouts of this environment alone
    verifier: str = ""  # environment that judges in place of the rollout's own, as module:name
    output: str = ""  # .jsonl.gz file for the rollouts with their new scores; empty: none


def rescore(path: Path, knobs: RescoreConfig, console: Console) -> list[Rollout]:
    """Score the rollouts of a file again, print what changed and return them with new scores.

    Raises ConfigError if a knob is out of range, the file is none of rollouts, or an environment
    cannot be loaded.
    """
    check_advantage(knobs)
    limits = scoring_limits(knobs)
    if knobs.verifier:
        check_name(knobs.verifier)
    if knobs.output:
        check_output(Path(knobs.output), "output")
    before = [
        rollout
        for rollout in read_rollouts(path)
        if knobs.environment in ("", rollout.row.environment)
    ]
    if not before:
        raise ConfigError(f"{path}: has no rollout of environment={knobs.environment or 'any'}")
    with Scoring(limits) as scoring:
        episodes = [
            replace(
                rollout.episode,
                row=replace(rollout.row, environment=knobs.verifier or rollout.row.environment),
            )
            for rollout in before
        ]
        scoring.load(sorted({episode.row.environment for episode in episodes}))
        scores = scoring.score(episodes)
    after = [replace(old, score=score) for old, score in zip(before, scores, strict=True)]
    console.print(_table(before, after, knobs))
    _print_changes(before, after, console)
    if knobs.output:
        advantages = _advantages(after, knobs).tolist()
        write_rollouts(
            Path(knobs.output),
            [replace(r, advantage=value) for r, value in zip(after, advantages, strict=True)],
        )
        console.print(f"wrote {knobs.output}")
    return after


def _advantages(rollouts: Sequence[Rollout], knobs: AdvantageKnobs) -> np.ndarray:
    return compute_advantages([outcome_of(rollout) for rollout in rollouts], knobs).advantage


def _table(before: Sequence[Rollout], after: Sequence[Rollout], knobs: RescoreConfig) -> Table:
    table = Table("environment", "rollouts", "passed", "changed", "advantage", "sign")
    for column in table.columns[1:]:
        column.justify = "right"
    moved = _advantages(after, knobs) - _advantages(before, knobs)
    turned = np.sign(_advantages(after, knobs)) != np.sign(_advantages(before, knobs))
    names = np.array([rollout.row.environment for rollout in before])
    for name in sorted(set(names.tolist())):
        own = np.flatnonzero(names == name).tolist()
        changed = sum(before[n].score.verdict != after[n].score.verdict for n in own)
        rates = (sum(some[n].passed for n in own) / len(own) for some in (before, after))
        table.add_row(
            name,
            f"{len(own):,}",
            " → ".join(f"{rate:.1%}" for rate in rates),
            f"{changed:,}",
            f"{np.abs(moved[own]).mean():.4f}",
            f"{turned[own].mean():.1%}",
        )
    table.caption = "advantage: mean absolute change; sign: share whose advantage changed its sign"
    return table


def _print_changes(before: Sequence[Rollout], after: Sequence[Rollout], console: Console) -> None:
    changes = Counter(
        (str(old.score.verdict), str(new.score.verdict))
        for old, new in zip(before, after, strict=True)
        if old.score.verdict != new.score.verdict
    )
    for (old, new), count in changes.most_common():
        console.print(f"{old} → {new}: {count:,}")
    if not changes:
        console.print("no verdict changed")
