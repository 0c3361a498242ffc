"""Loss gap versus model size: the gaps of a sweep's sizes, each to its own baseline, against active
parameters. NumPy only.

Owns: which comparisons differ in size, the slope and its error, the sentence. Does not own: the
gaps (`gap`), the plot (`plot.sizes`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemotron_train.config.schema import Config
from nemotron_train.plan.architecture.layers import parameters
from nemotron_train.report.gap.gap import gaps, student_quantile
from nemotron_train.report.gap.pairs import Comparison, config_of

MIN_SIZES = 3  # needed for a slope


@dataclass(frozen=True)
class Size:
    """A plan's gaps at one model size, in percent, one value per seed. `active`: active parameters
    per token, including embedding and output layer."""

    active: int
    validation: list[float]
    training: list[float]


@dataclass(frozen=True)
class Slope:
    """Least-squares slope of the seeds' gaps over log2 of the active parameters, in percentage
    points per doubling, with its 95 % interval."""

    value: float
    low: float
    high: float


def by_size(comparisons: Sequence[Comparison]) -> dict[str, list[Size]]:
    """Plan -> its sizes in ascending order, for plans measured at two or more sizes. Groups whose
    model differs from their baseline's are left out."""
    sizes_of: dict[str, list[Size]] = {}
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
            sizes_of.setdefault(config.precision.name, []).append(size)
    ordered = {
        plan: sorted(sizes, key=lambda size: size.active) for plan, sizes in sizes_of.items()
    }
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
    """Slope of the validation gaps or of the training gaps; None if there are fewer than MIN_SIZES
    sizes or fewer than three values."""
    values = [size.validation if validation else size.training for size in sizes]
    log_sizes = [math.log2(size.active) for size in sizes]
    x = np.repeat(log_sizes, [len(v) for v in values])
    y = np.concatenate([np.array(v, dtype=np.float64) for v in values])
    freedom = len(y) - 2
    if len(set(x)) < MIN_SIZES or freedom < 1:
        return None
    centered = x - x.mean()
    spread = float((centered**2).sum())
    value = float((centered * y).sum() / spread)
    residual = y - y.mean() - value * centered
    error = math.sqrt(float((residual**2).sum()) / freedom / spread)
    return Slope(
        value,
        value - student_quantile(freedom) * error,
        value + student_quantile(freedom) * error,
    )


def slope_sentence(plan: str, sizes: Sequence[Size]) -> str:
    """One sentence on how the gap changes with size; "" if there are too few sizes."""
    validation = is_final(sizes)
    fit = slope(sizes, validation=validation)
    if fit is None:
        return ""
    metric = "final validation loss" if validation else "training loss so far, last tenth"
    if fit.low > 0:
        words = "grows with the model"
    elif fit.high < 0:
        words = "shrinks as the model grows"
    else:
        words = "cannot be said to grow or shrink with the model"
    factor = sizes[-1].active / sizes[0].active
    return (
        f"{plan}: the gap of the {metric} {words}: {fit.value:+.3f} percentage points a doubling "
        f"of the active parameters (95 % interval {fit.low:+.3f} to {fit.high:+.3f}), over a "
        f"factor of {factor:.1f}, each size held to its own baseline."
    )
