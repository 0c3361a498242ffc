"""The weight of each checkpoint in a merge: uniform, linear, or emulating a learning-rate decay.

Pure functions of token counts. No torch.

The emulation (arXiv 2507.17634, section 3): training at a constant learning rate changes the
weights step by step; a decayed rate would have scaled each step by s in [0, 1]. Let theta_0 …
theta_n be the checkpoints over the decay period, and d_k the mean of s between theta_(k-1) and
theta_k. Scaling the change from theta_(k-1) to theta_k by d_k gives

    theta = theta_0 + sum_k d_k (theta_k - theta_(k-1)) = sum_k w_k theta_k
    w_0 = 1 - d_1,  w_k = d_k - d_(k+1),  w_n = d_n

This is a weighted mean, since d decreases. It is exact only if the gradients under the decay would
have been the same, which holds approximately for a real run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from math import pi, sin

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import DecayStyle


class Weights(StrEnum):
    """How checkpoints are weighted in a merge."""

    uniform = "uniform"  # all equal
    linear = "linear"  # proportional to 1, 2, … from the earliest to the latest
    wsd = "wsd"  # emulates a learning-rate decay over the checkpoints


@dataclass
class MergeConfig:
    """Knobs of `convert merge`."""

    output: str = ""  # run folder to create; it must not exist
    weights: Weights = Weights.uniform
    decay_style: DecayStyle = DecayStyle.minus_sqrt  # of weights=wsd


def merge_weights(
    kind: Weights, tokens: Sequence[int], style: DecayStyle = DecayStyle.minus_sqrt
) -> list[float]:
    """One weight per checkpoint, in the order of `tokens` (ascending token counts); they sum to 1.

    Raises ConfigError for weights=wsd with fewer than two checkpoints.
    """
    count = len(tokens)
    assert count > 0 and all(a < b for a, b in pairwise(tokens)), "ascending"
    if kind == Weights.uniform:
        return [1 / count] * count
    if kind == Weights.linear:
        return [2 * place / (count * (count + 1)) for place in range(1, count + 1)]
    if count < 2:
        raise ConfigError("weights=wsd: a decay needs two checkpoints or more, one at its start")
    length = tokens[-1] - tokens[0]
    positions = [(count - tokens[0]) / length for count in tokens]
    scales = [1.0, *(mean_scale(a, b, style) for a, b in pairwise(positions)), 0.0]
    return [before - after for before, after in pairwise(scales)]


def mean_scale(start: float, end: float, style: DecayStyle) -> float:
    """Mean of s(x) for x from `start` to `end` (fractions of the decay). s is the decay factor of
    `optim.schedule`."""
    width = end - start
    match style:
        case DecayStyle.linear:
            return 1 - (start + end) / 2
        case DecayStyle.minus_sqrt:
            return 1 - 2 / 3 * (end**1.5 - start**1.5) / width
        case DecayStyle.cosine:
            return 0.5 + (sin(pi * end) - sin(pi * start)) / (2 * pi * width)
