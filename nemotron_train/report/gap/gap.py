"""Loss gaps: each group of runs held to the baseline, seed by seed. NumPy only.

Owns: the gaps, their curves over tokens, the noise, the trend, the verdict in words. Does not own:
who is paired with whom (`pairs`), the table (`gap_table`), the pictures.

The relative gap is (loss - baseline's loss) / baseline's loss, as the Nemotron 3 and NVFP4 reports
give it. A pair's difference carries none of the spread between seeds; the standard error is that of
the mean over pairs, and intervals are Student's, for a comparison has few seeds.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nemotron_train.report.gap.pairs import Comparison
from nemotron_train.report.runs.read import Run
from nemotron_train.report.runs.thin import smoothed

TAIL = 0.1  # share of the steps, at the end, whose mean training loss is compared
SMOOTH = 16  # the smoothed gap is a mean over an eighth of the steps: 1/SMOOTH to each side
TREND_BLOCKS = 32  # means of the last half of the tokens through which the trend is laid
MIN_TREND_BLOCKS = 8

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
_STUDENT += (2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


@dataclass(frozen=True)
class Trend:
    """Change of the gap over the last half of the tokens, percentage points a doubling of the
    tokens, one slope a seed."""

    slopes: list[float]
    from_tokens: float


@dataclass(frozen=True)
class Curve:
    """The gap of the training loss over tokens, percent: [n] each. `raw` and `smooth` are means
    over seeds, `error` the standard error of `smooth` (NaN for one seed)."""

    tokens: np.ndarray
    raw: np.ndarray
    smooth: np.ndarray
    error: np.ndarray
    by_seed: dict[int, np.ndarray]


@dataclass(frozen=True)
class Noise:
    """What a gap must exceed to mean something, percent of the loss. `source`: "sums" (the baseline
    again, with its sums in another order), "seeds" (the spread of the baseline's own seeds) or
    "none". tokens, band: the same for the smoothed training loss over tokens: [n]."""

    source: str = "none"
    validation: float = math.nan
    training: float = math.nan
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0))
    band: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Gap:
    """A group's relative gaps to the baseline, one a seed, by seed; fractions, not percent.

    `validation` compares the last validation losses of pairs that are both finished, `training`
    the mean training loss over the last tenth of the steps that both have.
    """

    group: str
    seeds: list[int]
    loss: float  # mean validation loss of finished runs, nats a token; NaN without one
    validation: list[float]
    training: list[float]
    trend: Trend | None = None


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for fewer than two values)."""
    if not values:
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    # Beyond the table it is 1.96 + 2.4 / freedom to three digits.
    known = 0 < freedom <= len(_STUDENT)
    return _STUDENT[freedom - 1] if known else 1.96 + 2.4 / max(freedom, 1)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean, after Student; NaN for fewer than two values."""
    mean, error = mean_and_error(values)
    factor = student(len(values) - 1)
    return mean - factor * error, mean + factor * error


def gaps(comparison: Comparison) -> list[Gap]:
    """Of every group that has a pair, the baseline first (its gaps are zero)."""
    baseline = comparison.baseline
    ordered = [baseline, *(group for group in comparison.groups if group != baseline)]
    found = []
    for group in ordered:
        pairs = comparison.pairs(group) if group in comparison.groups else {}
        if not pairs:
            continue
        losses = [_validation(run) for run, _ in pairs.values()]
        known = [loss for loss in losses if loss is not None]
        validation = [
            (ours - theirs) / theirs
            for ours, theirs in ((_validation(a), _validation(b)) for a, b in pairs.values())
            if ours is not None and theirs is not None
        ]
        training = [value for a, b in pairs.values() if (value := _tail_gap(a, b)) is not None]
        loss = statistics.fmean(known) if known else math.nan
        trend = trend_of(list(pairs.values())) if group != baseline else None
        found.append(Gap(group, list(pairs), loss, validation, training, trend))
    return found


def relative(run: Run, twin: Run) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that both have logged, and the gap of the training loss there, percent."""
    (tokens, losses), (twin_tokens, twin_losses) = run.series("loss"), twin.series("loss")
    common, ours, theirs = np.intersect1d(tokens, twin_tokens, return_indices=True)
    reference = twin_losses[theirs]
    return common, 100 * (losses[ours] - reference) / reference


def curve(pairs: dict[int, tuple[Run, Run]]) -> Curve | None:
    """Over the tokens that all pairs have; None where there are none."""
    by_seed = {seed: relative(run, twin) for seed, (run, twin) in pairs.items()}
    by_seed = {seed: found for seed, found in by_seed.items() if len(found[0])}
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
    """From the repeats where there are any, else from the baseline's seeds."""
    pairs = [pair for group in comparison.repeats for pair in comparison.pairs(group).values()]
    curves = [relative(run, twin) for run, twin in pairs]
    if curves and len(tokens := _common([where for where, _ in curves])):
        # The mean is known to be zero, so the root of the mean square is the deviation.
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
    """Theil-Sen slopes over the logarithm of the tokens, one a seed; None where a pair has too few
    steps in its last half."""
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
    """The median slope of all pairs of points: a spike or two do not move it."""
    first, second = np.triu_indices(len(x), k=1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def _validation(run: Run) -> float | None:
    """The last validation loss of a finished run."""
    loss = run.summary.get("validation_loss")
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        return None
    return float(loss) if run.summary.get("finished") else None


def _tail_length(*values: np.ndarray) -> int:
    return max(1, round(TAIL * max(map(len, values))))


def _tail_gap(run: Run, twin: Run) -> float | None:
    """Mean loss over the same steps, the last that both have, held to the twin's: a tenth of the
    longer one's, for a branch is shorter than the run it began from."""
    (tokens, losses), (twin_tokens, twin_losses) = run.series("loss"), twin.series("loss")
    _, ours, theirs = np.intersect1d(tokens, twin_tokens, return_indices=True)
    if not len(ours):
        return None
    last = _tail_length(tokens, twin_tokens)
    mean, reference = losses[ours[-last:]].mean(), twin_losses[theirs[-last:]].mean()
    return float((mean - reference) / reference)


def _common(places: Sequence[np.ndarray]) -> np.ndarray:
    common = places[0] if places else np.empty(0)
    for place in places[1:]:
        common = np.intersect1d(common, place)
    return common


def _root_mean_square(values: Sequence[float]) -> float:
    return 100 * math.sqrt(statistics.fmean(v * v for v in values)) if values else math.nan


def _spread(losses: Sequence[float]) -> float:
    if len(losses) < 2:
        return math.nan
    return 100 * statistics.stdev(losses) / statistics.fmean(losses)
