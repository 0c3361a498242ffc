"""Curves of any length cut down to what a screen shows. NumPy only.

A curve of 100,000 steps has a hundred points in each column of pixels. Taking every hundredth loses
the spikes, which is what people look for: here a bucket of neighbouring points keeps its mean, its
least and its greatest value.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Thinned:
    """A curve in buckets, [buckets] each: where a bucket lies (the mean of its places), and the
    mean, least and greatest value in it. `size`: points a bucket, 1 if nothing was cut."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    size: int


def thin(x: np.ndarray, y: np.ndarray, max_points: int) -> Thinned:
    """x, y: float64 [n], finite, x ascending. At most `max_points` buckets of equal size, but for
    the last one; the means of equal buckets can be averaged further without error."""
    assert len(x) == len(y) and max_points > 0
    size = max(1, -(-len(x) // max_points))
    if size == 1:
        return Thinned(x, y, y, y, 1)
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    return Thinned(
        np.add.reduceat(x, starts) / counts,
        np.add.reduceat(y, starts) / counts,
        np.minimum.reduceat(y, starts),
        np.maximum.reduceat(y, starts),
        size,
    )


def smoothed(values: np.ndarray | list[float], half_width: int) -> np.ndarray:
    """Centred moving mean over 2 x half_width + 1 values. The window shrinks on both sides at once
    towards the ends, so the curve neither lags a falling loss nor bends at its ends."""
    array = np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], np.cumsum(array)])
    places = np.arange(len(array))
    reach = np.minimum(half_width, np.minimum(places, len(array) - 1 - places))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def rounded(values: np.ndarray | list[float], digits: int = 5) -> list[float | None]:
    """Plain numbers of so many significant digits, None for what is not finite: a third of the
    text, and no eye sees the rest."""
    array = np.asarray(values, dtype=np.float64).tolist()
    short = [float(f"%.{digits}g" % value) for value in array]
    return [value if value - value == 0 else None for value in short]
