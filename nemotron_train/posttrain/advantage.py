"""Advantages: how much better a sample is than its group. NumPy, no torch.

Owns: the length reward of low effort, the baseline by group id, the filter of cut-off samples, the
advantage of malformed ones. Does not own: rewards (`environments`), weights of single tokens
(`correction`), the loss (`objective`).

For the reward R of a sample in a group of n rewards with mean m and sample deviation s:

    group           A = R - m                      (times (n-1)/n the gradient of E[R])
    leave_one_out   A = R - mean of the others = n/(n-1) (R - m)
    deviation=group A / s

The deviation is that of the whole group in both cases. Leaving the sample out of it, too, gives a
lone winner a deviation of 0 and no group the sum 0 (NVIDIA-NeMo/RL issues 1518, 4158).

A group whose rewards are all equal gives exactly 0. This is decided by comparing rewards, not by a
small deviation: the rounding of a mean is never divided by itself.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from nemotron_train.config.grpo_knobs import AdvantageKnobs, Baseline, Deviation

LOW_EFFORT = "low"  # `Row.effort` of prompts whose short answers gain


@dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    group: id of the samples that share one prompt, unique over the ranks. Two rows of equal text
    are two groups. reward: finite, or None if no reward applies. tokens: sampled ones. effort: that
    of the row.
    """

    group: Hashable
    reward: float | None
    tokens: int = 0
    truncated: bool = False
    malformed_thinking: bool = False
    malformed_call: bool = False
    effort: str = ""


@dataclass(frozen=True)
class Advantages:
    """One entry a sample, FP64 [n] each, in the order of the outcomes.

    weight: 1 if the sample is trained and counted, else 0. reward: with the length reward; NaN
    where none applies.
    """

    advantage: np.ndarray
    weight: np.ndarray
    reward: np.ndarray


def compute_advantages(outcomes: Sequence[Outcome], knobs: AdvantageKnobs) -> Advantages:
    """The advantage and the weight of each sample.

    All samples of a group must be among the outcomes. The result depends on neither their order nor
    on other groups, not even in rounding. Raises ValueError for a reward that is not finite.
    """
    reward = np.array([_shaped_reward(outcome, knobs) for outcome in outcomes], dtype=np.float64)
    advantage, has_signal = np.zeros(len(outcomes)), np.zeros(len(outcomes), dtype=bool)
    for places in _groups(outcomes):
        values = reward[places]
        if values.min() != values.max():
            advantage[places] = _group_advantages(values, knobs)
            has_signal[places] = True
    weight = np.array([outcome.reward is not None for outcome in outcomes], dtype=np.float64)
    for place, outcome in enumerate(outcomes):
        penalty = _penalty(outcome, knobs)
        if penalty:
            advantage[place] = penalty
        if knobs.drop_trivial and not has_signal[place] and not penalty:
            weight[place] = 0.0
        if knobs.overlong_filter and outcome.truncated:
            weight[place] = 0.0
    advantage[weight == 0] = 0.0
    return Advantages(
        np.clip(advantage, -knobs.advantage_clip, knobs.advantage_clip), weight, reward
    )


def advantage_metrics(outcomes: Sequence[Outcome], advantages: Advantages) -> dict[str, float]:
    """Mean reward, shares of groups, and the advantages of trained samples, by name.

    groups_zero, groups_full: all rewards are 0, or 1. groups_mixed: neither. groups_trivial: all
    equal, to whatever number. They are those of the rewards without length reward. NaN where there
    is nothing to count.
    """
    rewards = [outcome.reward for outcome in outcomes if outcome.reward is not None]
    groups = [[outcomes[place].reward for place in places] for places in _groups(outcomes)]
    trained = advantages.advantage[advantages.weight > 0]
    zero = [all(value == 0 for value in group) for group in groups]
    full = [all(value == 1 for value in group) for group in groups]
    mixed = [not (a or b) for a, b in zip(zero, full, strict=True)]
    return {
        "reward": _mean(rewards),
        "groups_zero": _mean(zero),
        "groups_full": _mean(full),
        "groups_mixed": _mean(mixed),
        "groups_trivial": _mean([len(set(group)) == 1 for group in groups]),
        "advantage_sum": math.fsum(trained),
        "advantage_mean": _mean(trained),
        "advantage_min": float(trained.min()) if trained.size else math.nan,
        "advantage_max": float(trained.max()) if trained.size else math.nan,
    }


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return math.fsum(values) / len(values) if len(values) else math.nan


def _groups(outcomes: Sequence[Outcome]) -> list[list[int]]:
    """The places of each group's samples that have a reward."""
    groups: dict[Hashable, list[int]] = {}
    for place, outcome in enumerate(outcomes):
        if outcome.reward is not None:
            groups.setdefault(outcome.group, []).append(place)
    return list(groups.values())


def _shaped_reward(outcome: Outcome, knobs: AdvantageKnobs) -> float:
    """The reward with the length reward of low effort; NaN if none applies.

    A right answer gains the share low_effort_weight (1 - tokens / low_effort_tokens) of its reward,
    at least 0. A wrong one gains nothing by being short, and a long right one loses nothing.
    """
    if outcome.reward is None:
        return math.nan
    if not math.isfinite(outcome.reward):
        raise ValueError(f"reward {outcome.reward} in group {outcome.group}")
    if outcome.effort != LOW_EFFORT:
        return float(outcome.reward)
    saved = max(0.0, 1 - outcome.tokens / knobs.low_effort_tokens)
    return outcome.reward + max(outcome.reward, 0.0) * knobs.low_effort_weight * saved


def _group_advantages(values: np.ndarray, knobs: AdvantageKnobs) -> np.ndarray:
    """Advantages of the rewards of one group, which are not all equal."""
    count = len(values)
    # fsum rounds once, whatever the order of the values.
    difference = values - math.fsum(values) / count
    scale = count / (count - 1) if knobs.baseline is Baseline.leave_one_out else 1.0
    if knobs.deviation is Deviation.none:
        return scale * difference
    # In units of the largest difference, so that squares of large rewards do not overflow.
    unit = difference / np.abs(difference).max()
    return scale * unit / math.sqrt(math.fsum(unit**2) / (count - 1))


def _penalty(outcome: Outcome, knobs: AdvantageKnobs) -> float:
    """The advantage that a malformed sample gets in place of its own; 0 if it keeps its own."""
    penalties = [0.0]
    if outcome.malformed_thinking:
        penalties.append(knobs.malformed_thinking_advantage)
    if outcome.malformed_call:
        penalties.append(knobs.malformed_call_advantage)
    return min(penalties)
