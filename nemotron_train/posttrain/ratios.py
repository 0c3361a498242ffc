"""Ratios of environments: which of its rows each environment gives to a step. No torch.

Owns: ratios and counts, as pure functions of their arguments, so that a resumed run needs no state.
Does not own: the rows (`tasks`).
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import cache

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.permutation import key64
from nemotron_train.posttrain.environments.families import check_name

_BLOCK = 256  # steps between two places that the cache keeps


def check_ratios(ratios: Mapping[str, float]) -> None:
    """Raises ConfigError for an unknown environment, a ratio that is negative or not finite, or
    when no ratio is above 0."""
    for name, ratio in ratios.items():
        check_name(name)
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not number or not math.isfinite(ratio) or ratio < 0:
            raise ConfigError(f"ratio of environment {name}: {ratio}; give a number of 0 or more")
    if not any(ratios.values()):
        named = ", ".join(ratios) or "no environment is named"
        raise ConfigError(f"environments: no ratio is above 0 ({named}); give one at least")


def step_counts(ratios: Mapping[str, float], total: int, seed: int, step: int) -> dict[str, int]:
    """How many of the `total` prompts of a step each environment gives, by largest remainder.

    Every step takes at least the whole part of each share. The places that are left go to the
    environments that are owed most by all steps so far, so that a small ratio gets its turn and
    after any number of steps every count is within a few prompts of its share. Depends on the
    arguments alone; ties are broken by `seed`. Raises ConfigError as `check_ratios`.
    """
    ranges = step_ranges(ratios, total, seed, step)
    return {name: len(numbers) for name, numbers in ranges.items()}


def step_ranges(ratios: Mapping[str, float], total: int, seed: int, step: int) -> dict[str, range]:
    """The numbers of the rows that each environment gives to a step: its rows 0, 1, 2, … in order
    over the steps, each once. Counts and errors are those of `step_counts`."""
    check_ratios(ratios)
    if total < 1 or step < 0:
        raise ConfigError(f"prompts={total}, step={step}: give 1 or more, and 0 or more")
    fractions = [Fraction(str(float(ratio))) for ratio in ratios.values()]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    weights = tuple(int(fraction * denominator) for fraction in fractions)
    ranks = tuple(key64("ratio", name, seed) for name in ratios)
    unit = sum(weights)
    period = unit // math.gcd(unit, total)  # then nothing is owed
    owed = _owed(weights, ranks, total, step % period)
    counts = _after_step(weights, ranks, total, owed)[0]
    ranges = {}
    for name, weight, debt, count in zip(ratios, weights, owed, counts, strict=True):
        first = (step * total * weight - debt) // unit  # given so far: exactly what was not owed
        ranges[name] = range(first, first + count)
    return ranges


@cache
def _start_of_block(
    weights: tuple[int, ...], ranks: tuple[int, ...], total: int, block: int
) -> tuple[int, ...]:
    """What each environment is owed before step `block` * _BLOCK, times the sum of weights."""
    if block == 0:
        return (0,) * len(weights)
    owed = _start_of_block(weights, ranks, total, block - 1)
    for _ in range(_BLOCK):
        owed = _after_step(weights, ranks, total, owed)[1]
    return owed


def _owed(
    weights: tuple[int, ...], ranks: tuple[int, ...], total: int, step: int
) -> tuple[int, ...]:
    """What each environment is owed before a step, times the sum of weights."""
    for block in range(step // _BLOCK):  # fills the cache from below: no deep recursion
        _start_of_block(weights, ranks, total, block)
    owed = _start_of_block(weights, ranks, total, step // _BLOCK)
    for _ in range(step % _BLOCK):
        owed = _after_step(weights, ranks, total, owed)[1]
    return owed


def _after_step(
    weights: tuple[int, ...], ranks: tuple[int, ...], total: int, owed: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The counts of one step, and what is owed after it."""
    unit = sum(weights)
    counts = [total * weight // unit for weight in weights]
    due = [
        debt + total * weight - count * unit
        for debt, weight, count in zip(owed, weights, counts, strict=True)
    ]
    left = total - sum(counts)  # fewer than there are environments with a ratio above 0
    places = [place for place, weight in enumerate(weights) if weight]
    places.sort(key=lambda place: (-due[place], ranks[place]))
    for place in places[:left]:
        counts[place] += 1
        due[place] -= unit
    return tuple(counts), tuple(due)
