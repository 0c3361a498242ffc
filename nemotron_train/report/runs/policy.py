"""Runs of `posttrain grpo` among others: which they are, and the numbers that sum one up. No torch.

Owns: the means over the last steps. Does not own: the metrics (docs/grpo.md), their display.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemotron_train.config.schema import Config
from nemotron_train.report.runs.read import Run

LAST_STEPS = 20  # means are over so many logged steps, since single steps are noisy
# Shares of the groups, which are the samples of a prompt, by their rewards.
GROUPS = {"groups_full": "all rewards 1", "groups_mixed": "mixed", "groups_zero": "all rewards 0"}
# What `policy_numbers` reads.
METRICS = ("reward", "pass", "rollouts_per_second", "masked_tokens", "logprob_gap_max")


def is_policy(run: Run, config: Config | None) -> bool:
    """Whether the run trained on rollouts. config: None if this version cannot read it; then a
    logged reward tells."""
    return config.grpo.steps > 0 if config is not None else "reward" in run.columns.numbers


@dataclass(frozen=True)
class Course:
    """A metric over a run: at its first and last logged step, and the mean of the last LAST_STEPS.
    NaN if it was never logged."""

    first: float = math.nan
    last: float = math.nan
    mean: float = math.nan


@dataclass(frozen=True)
class PolicyNumbers:
    """reward, and the share of rollouts that passed; rollouts_per_second: the median, of the time
    in which rollouts were sampled; masked: share of the sampled tokens that a correction left out,
    mean of the last steps; largest_gap: nats, of all steps. NaN where nothing was logged."""

    reward: Course
    passed: Course
    rollouts_per_second: float
    masked: float
    largest_gap: float


def policy_numbers(run: Run) -> PolicyNumbers:
    """The numbers of a run, from its logged steps."""
    _, speeds = run.series("rollouts_per_second", along="step")
    _, gaps = run.series("logprob_gap_max", along="step")
    return PolicyNumbers(
        reward=course(run, "reward"),
        passed=course(run, "pass"),
        rollouts_per_second=float(np.median(speeds)) if len(speeds) else math.nan,
        masked=course(run, "masked_tokens").mean,
        largest_gap=float(gaps.max()) if len(gaps) else math.nan,
    )


def course(run: Run, metric: str) -> Course:
    """The course of one metric."""
    _, values = run.series(metric, along="step")
    if not len(values):
        return Course()
    return Course(float(values[0]), float(values[-1]), float(values[-LAST_STEPS:].mean()))


def environments_of(run: Run) -> list[str]:
    """The environments whose reward or pass rate was logged, by name."""
    prefixes = ("reward/", "pass/")
    return sorted({n.partition("/")[2] for prefix in prefixes for n in run.names(prefix)})


def closing_line(run: Run) -> str:
    """What is said at the end of a run: the reward at its first and last logged step."""
    steps, rewards = run.series("reward", along="step")
    if not len(rewards):
        return "no reward was logged"
    return (
        f"reward {rewards[0]:.3f} at step {steps[0]:,.0f}, "
        f"{rewards[-1]:.3f} at step {steps[-1]:,.0f}"
    )


def split(policies: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Indices of the runs that train on data, and of those that train on rollouts."""
    numbers = range(len(policies))
    return [n for n in numbers if not policies[n]], [n for n in numbers if policies[n]]
