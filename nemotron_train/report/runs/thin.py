"""Thins curves of any length to screen resolution. NumPy only.

A curve of 100,000 steps has about a hundred points per column of pixels. Keeping every hundredth
point would lose the spikes, which readers look for. So neighbouring points form a bucket, which
keeps its mean, minimum and maximum.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Thinned:
    """A curve in buckets; every array is [buckets]: the mean of the x values in a bucket, and the
    mean, minimum and maximum of its y values. `size`: points per bucket, 1 if not thinned."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    size: int


def thin(x: np.ndarray, y: np.ndarray, max_points: int) -> Thinned:
    """Thins a curve to at most `max_points` buckets of equal size (the last may be smaller). x, y:
    float64 [n], finite, x ascending. Means of equal buckets can be averaged again without error."""
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
    """Centred moving mean over 2 x half_width + 1 values: [n] -> [n]. Near the ends the window
    shrinks symmetrically, so the curve neither lags a falling loss nor bends at its ends."""
    array = np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], np.cumsum(array)])
    indices = np.arange(len(array))
    half = np.minimum(half_width, np.minimum(indices, len(array) - 1 - indices))
    return (sums[indices + half + 1] - sums[indices - half]) / (2 * half + 1)


def rounded(values: np.ndarray | list[float], digits: int = 5) -> list[float | None]:
    """Python floats with `digits` significant digits, None for non-finite values. This cuts the
    text to a third without a visible difference."""
    array = np.asarray(values, dtype=np.float64).tolist()
    short = [float(f"%.{digits}g" % value) for value in array]
    return [value if value - value == 0 else None for value in short]
