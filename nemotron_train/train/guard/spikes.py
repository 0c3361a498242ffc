"""Spike rule: is a value far above the recent values? Works on plain numbers; no torch.

The rule is OLMo's (SkipStepOptimizer of OLMo-core; arXiv 2501.00656, section 3): more than six
standard deviations above the mean of the last 128 steps, for the loss and the gradient norm. Two
differences. A non-finite value never enters the window: in OLMo it once did, made the deviation NaN
and dropped the next 128 updates. A spike does not enter the window either, so it cannot raise the
threshold for the next spike.
"""

import math
from collections import deque

# Lower limit of the deviation, as a share of the mean: otherwise rounding could count as a spike.
_SMALLEST_DEVIATION = 1e-3


class SpikeWindow:
    """The last `size` values of one metric, without spikes. A spike exceeds `sigmas` deviations."""

    def __init__(self, size: int, sigmas: float) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._size, self._limit = size, sigmas
        self._high_in_a_row = 0

    def deviations(self, value: float) -> float:
        """How many standard deviations `value` lies above the mean of the window.

        NaN while the window is less than half full, for a non-finite value, and if the deviation
        is zero.
        """
        count = len(self._values)
        if count < max(2, self._size // 2) or not math.isfinite(value):
            return math.nan
        mean = math.fsum(self._values) / count
        variance = math.fsum((x - mean) ** 2 for x in self._values) / (count - 1)
        deviation = max(math.sqrt(variance), _SMALLEST_DEVIATION * abs(mean))
        return (value - mean) / deviation if deviation > 0 else math.nan

    def is_spike(self, deviations: float) -> bool:
        """Whether a value `deviations` above the mean is a spike. False for NaN."""
        return deviations > self._limit

    def add(self, value: float, is_spike: bool) -> None:
        """Add a judged value to the window, unless it is a spike or not finite.

        After half a window of consecutive spikes, the window is cleared: the metric has reached a
        new level.
        """
        if not math.isfinite(value):
            return
        self._high_in_a_row = self._high_in_a_row + 1 if is_spike else 0
        if self._high_in_a_row >= max(2, self._size // 2):
            self._values.clear()
            self._high_in_a_row = 0
        elif not is_spike:
            self._values.append(value)
