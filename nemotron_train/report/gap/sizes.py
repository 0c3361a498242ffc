"""Does a gap grow or shrink with the model? The gaps of a sweep's sizes, each to its own baseline,
against active parameters. NumPy only.

Owns: which comparisons differ in size, the slope and its error, the sentence. Does not own: the
gaps (`gap`), the picture (`plot_sizes`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemotron_train.config.schema import Config
from nemotron_train.plan.architecture.layers import parameters
from nemotron_train.report.gap.gap import gaps, student
from nemotron_train.report.gap.pairs import Comparison, config_of

MIN_SIZES = 3  # for a slope


@dataclass(frozen=True)
class Size:
    """A plan's gaps at one size, percent, a value a seed. `active`: parameters that a token uses,
    embedding and output layer counted."""

    active: int
    validation: list[float]
    training: list[float]


@dataclass(frozen=True)
class Slope:
    """Least squares through the seeds' gaps over log2 of the active parameters: percentage points
    a doubling, and its 95 % interval."""

    value: float
    low: float
    high: float


def by_size(comparisons: Sequence[Comparison]) -> dict[str, list[Size]]:
    """Plan -> its sizes in order, of plans that are there at two sizes or more; a group counts
    where it has its baseline's model."""
    found: dict[str, list[Size]] = {}
    for comparison in comparisons:
        baseline = _config(comparison, comparison.baseline)
        for gap in gaps(comparison):
            config = _config(comparison, gap.group)
            if gap.group == comparison.baseline or gap.group in comparison.repeats:
                continue
            if config is None or baseline is None or config.model != baseline.model:
                continue
            size = Size(
                parameters(config.model).active_with_embeddings,
                [100 * value for value in gap.validation],
                [100 * value for value in gap.training],
            )
            found.setdefault(config.precision.name, []).append(size)
    ordered = {plan: sorted(sizes, key=lambda size: size.active) for plan, sizes in found.items()}
    return {
        plan: sizes for plan, sizes in ordered.items() if len({size.active for size in sizes}) > 1
    }


def _config(comparison: Comparison, group: str) -> Config | None:
    runs = comparison.groups.get(group, {})
    return config_of(next(iter(runs.values()))) if runs else None


def is_final(sizes: Sequence[Size]) -> bool:
    """Whether every seed has a final validation loss."""
    return all(len(size.validation) == len(size.training) for size in sizes)


def slope(sizes: Sequence[Size], *, validation: bool) -> Slope | None:
    """Of the validation gaps or the training gaps; None for too few sizes or values."""
    values = [size.validation if validation else size.training for size in sizes]
    places = [math.log2(size.active) for size in sizes]
    x = np.repeat(places, [len(v) for v in values])
    y = np.concatenate([np.array(v, dtype=np.float64) for v in values])
    freedom = len(y) - 2
    if len(set(x)) < MIN_SIZES or freedom < 1:
        return None
    away = x - x.mean()
    spread = float((away**2).sum())
    value = float((away * y).sum() / spread)
    left = y - y.mean() - value * away
    error = math.sqrt(float((left**2).sum()) / freedom / spread)
    return Slope(value, value - student(freedom) * error, value + student(freedom) * error)


def sentence(plan: str, sizes: Sequence[Size]) -> str:
    """What the sizes say, in words; "" where there are too few."""
    validation = is_final(sizes)
    found = slope(sizes, validation=validation)
    if found is None:
        return ""
    what = "final validation loss" if validation else "training loss so far, last tenth"
    if found.low > 0:
        words = "grows with the model"
    elif found.high < 0:
        words = "shrinks as the model grows"
    else:
        words = "cannot be said to grow or shrink with the model"
    factor = sizes[-1].active / sizes[0].active
    return (
        f"{plan}: the gap of the {what} {words}: {found.value:+.3f} percentage points a doubling "
        f"of the active parameters (95 % interval {found.low:+.3f} to {found.high:+.3f}), over a "
        f"factor of {factor:.1f}, each size held to its own baseline."
    )
