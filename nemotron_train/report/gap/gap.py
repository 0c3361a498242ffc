"""Loss gaps: each group of runs compared with the baseline of the same seed. NumPy only.

Owns: the gaps, their curves over tokens, the noise, the trend. Does not own: the pairing of runs
(`pairs`), the verdict in words (`verdict`), the table (`table`), the plots.

The relative gap is (loss - baseline's loss) / baseline's loss, as in the Nemotron 3 and NVFP4
reports. The difference within a pair is free of the spread between seeds. The standard error is
that of the mean over pairs. Intervals use Student's t because a comparison has few seeds.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nemotron_train.report.gap.pairs import Comparison
from nemotron_train.report.runs.read import Run
from nemotron_train.report.runs.thin import smoothed

TAIL = 0.1  # the training loss compared is the mean over this share of the steps, at the end
SMOOTH = 16  # the smoothed gap is a mean over 1/SMOOTH of the steps on each side (an eighth in all)
TREND_BLOCKS = 32  # the trend is fitted to this many block means over the last half of the tokens
MIN_TREND_BLOCKS = 8

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
_STUDENT += (2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


@dataclass(frozen=True)
class Trend:
    """Change of the gap over the last half of the tokens: one slope per seed, in percentage points
    per doubling of the tokens."""

    slopes: list[float]
    from_tokens: float  # where the fit begins


@dataclass(frozen=True)
class Curve:
    """The gap of the training loss over tokens, in percent; every array is [n]. `raw` and `smooth`
    are means over seeds, `error` is the standard error of `smooth` (NaN for one seed). `by_seed`:
    the smoothed gap of each seed."""

    tokens: np.ndarray
    raw: np.ndarray
    smooth: np.ndarray
    error: np.ndarray
    by_seed: dict[int, np.ndarray]


@dataclass(frozen=True)
class Noise:
    """The noise level that a gap must exceed to be meaningful, in percent of the loss.

    source: "sums" (repeats of the baseline with another summation order), "seeds" (the spread of
    the baseline's seeds) or "none". tokens, band: the noise of the smoothed training loss over
    tokens, [n]."""

    source: str = "none"
    validation: float = math.nan
    training: float = math.nan
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0))
    band: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Gap:
    """A group's relative gaps to the baseline, one per seed, ordered by seed; fractions, not
    percent.

    `validation` compares the last validation losses of pairs in which both runs are finished,
    `training` the mean training loss over the last tenth of the steps that both runs have.
    """

    group: str
    seeds: list[int]
    loss: float  # mean validation loss of finished runs, nats per token; NaN if there is none
    validation: list[float]
    training: list[float]
    trend: Trend | None = None


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean (NaN for no values) and its standard error (NaN for fewer than two values)."""
    if not values:
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t for `freedom` degrees of freedom."""
    # Beyond the table, 1.96 + 2.4 / freedom is correct to three digits.
    known = 0 < freedom <= len(_STUDENT)
    return _STUDENT[freedom - 1] if known else 1.96 + 2.4 / max(freedom, 1)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval (low, high) of the mean, by Student's t; NaN for fewer than two
    values."""
    mean, error = mean_and_error(values)
    factor = student_quantile(len(values) - 1)
    return mean - factor * error, mean + factor * error


def gaps(comparison: Comparison) -> list[Gap]:
    """The gaps of every group that has a pair, the baseline first (its gaps are zero)."""
    baseline = comparison.baseline
    ordered = [baseline, *(group for group in comparison.groups if group != baseline)]
    results = []
    for group in ordered:
        pairs = comparison.pairs(group) if group in comparison.groups else {}
        if not pairs:
            continue
        losses = [_validation(run) for run, _ in pairs.values()]
        known_losses = [loss for loss in losses if loss is not None]
        validation = [
            (ours - theirs) / theirs
            for ours, theirs in ((_validation(a), _validation(b)) for a, b in pairs.values())
            if ours is not None and theirs is not None
        ]
        training = [value for a, b in pairs.values() if (value := _tail_gap(a, b)) is not None]
        loss = statistics.fmean(known_losses) if known_losses else math.nan
        trend = trend_of(list(pairs.values())) if group != baseline else None
        results.append(Gap(group, list(pairs), loss, validation, training, trend))
    return results


def relative(run: Run, twin: Run) -> tuple[np.ndarray, np.ndarray]:
    """Token counts that both runs logged, and the gap of the training loss there in percent: [n]
    each. `twin` is the baseline."""
    (tokens, losses), (twin_tokens, twin_losses) = run.series("loss"), twin.series("loss")
    common, ours, theirs = np.intersect1d(tokens, twin_tokens, return_indices=True)
    reference = twin_losses[theirs]
    return common, 100 * (losses[ours] - reference) / reference


def curve(pairs: dict[int, tuple[Run, Run]]) -> Curve | None:
    """The gap over the token counts that all pairs share; None if no pair shares any. `pairs`: seed
    -> (run, its baseline twin)."""
    by_seed = {seed: relative(run, twin) for seed, (run, twin) in pairs.items()}
    by_seed = {seed: points for seed, points in by_seed.items() if len(points[0])}
    if not by_seed:
        return None
    tokens = _common([tokens for tokens, _ in by_seed.values()])
    raw = {seed: values[np.isin(where, tokens)] for seed, (where, values) in by_seed.items()}
    smooth = {seed: smoothed(values, len(tokens) // SMOOTH) for seed, values in raw.items()}
    stacked = np.array(list(smooth.values()))
    error = np.full(len(tokens), np.nan)
    if len(stacked) > 1:
        error = stacked.std(axis=0, ddof=1) / math.sqrt(len(stacked))
    means = np.array(list(raw.values())).mean(axis=0)
    return Curve(tokens, means, stacked.mean(axis=0), error, smooth)


def noise(comparison: Comparison) -> Noise:
    """The noise, estimated from the repeats if there are any, else from the baseline's seeds."""
    pairs = [pair for group in comparison.repeats for pair in comparison.pairs(group).values()]
    curves = [relative(run, twin) for run, twin in pairs]
    if curves and len(tokens := _common([where for where, _ in curves])):
        # The expected gap of a repeat is zero, so the standard deviation is the root mean square.
        rows = [values[np.isin(where, tokens)] for where, values in curves]
        band = np.sqrt(np.mean([smoothed(row, len(tokens) // SMOOTH) ** 2 for row in rows], axis=0))
        losses = [(_validation(a), _validation(b)) for a, b in pairs]
        ends = [(a - b) / b for a, b in losses if a is not None and b is not None]
        tails = [value for a, b in pairs if (value := _tail_gap(a, b)) is not None]
        return Noise("sums", _root_mean_square(ends), _root_mean_square(tails), tokens, band)
    runs = list(comparison.groups.get(comparison.baseline, {}).values())
    series = [run.series("loss") for run in runs]
    tokens = _common([where for where, _ in series]) if len(runs) > 1 else np.empty(0)
    if not len(tokens):
        return Noise()
    losses = np.array(
        [smoothed(v[np.isin(where, tokens)], len(tokens) // SMOOTH) for where, v in series]
    )
    band = 100 * losses.std(axis=0, ddof=1) / losses.mean(axis=0)
    ends = [loss for run in runs if (loss := _validation(run)) is not None]
    tails = [float(values[-_tail_length(values) :].mean()) for _, values in series]
    return Noise("seeds", _spread(ends), _spread(tails), tokens, band)


def trend_of(pairs: Sequence[tuple[Run, Run]]) -> Trend | None:
    """Theil-Sen slopes over log2 of the tokens, one per pair; None if a pair has fewer than
    MIN_TREND_BLOCKS steps in its last half."""
    slopes, start = [], math.nan
    for run, twin in pairs:
        tokens, values = relative(run, twin)
        late = tokens >= tokens[-1] / 2 if len(tokens) else np.empty(0, bool)
        tokens, values = tokens[late], values[late]
        blocks = min(TREND_BLOCKS, len(tokens))
        if blocks < MIN_TREND_BLOCKS:
            return None
        parts = np.array_split(np.arange(len(tokens)), blocks)
        x = np.array([np.log2(tokens[part]).mean() for part in parts])
        y = np.array([values[part].mean() for part in parts])
        slopes.append(theil_sen(x, y))
        start = float(tokens[0])
    if not slopes:
        return None
    return Trend(slopes, start)


def theil_sen(x: np.ndarray, y: np.ndarray) -> float:
    """The median slope over all pairs of points; robust to a few outliers."""
    first, second = np.triu_indices(len(x), k=1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def _validation(run: Run) -> float | None:
    """The last validation loss of a finished run."""
    loss = run.summary.get("validation_loss")
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        return None
    return float(loss) if run.summary.get("finished") else None


def _tail_length(*values: np.ndarray) -> int:
    """Number of steps in the last TAIL of the longest array."""
    return max(1, round(TAIL * max(map(len, values))))


def _tail_gap(run: Run, twin: Run) -> float | None:
    """Relative gap of the mean loss over the last steps that both runs have. Their number is a
    tenth of the longer run's steps: a branch is shorter than its parent run."""
    (tokens, losses), (twin_tokens, twin_losses) = run.series("loss"), twin.series("loss")
    _, ours, theirs = np.intersect1d(tokens, twin_tokens, return_indices=True)
    if not len(ours):
        return None
    last = _tail_length(tokens, twin_tokens)
    mean, reference = losses[ours[-last:]].mean(), twin_losses[theirs[-last:]].mean()
    return float((mean - reference) / reference)


def _common(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The values that all arrays contain, ascending."""
    common = arrays[0] if arrays else np.empty(0)
    for array in arrays[1:]:
        common = np.intersect1d(common, array)
    return common


def _root_mean_square(values: Sequence[float]) -> float:
    """In percent, of fractions; NaN for no values."""
    return 100 * math.sqrt(statistics.fmean(v * v for v in values)) if values else math.nan


def _spread(losses: Sequence[float]) -> float:
    """Standard deviation in percent of the mean; NaN for fewer than two losses."""
    if len(losses) < 2:
        return math.nan
    return 100 * statistics.stdev(losses) / statistics.fmean(losses)
