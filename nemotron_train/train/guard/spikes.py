"""When is a number far above those before it? Plain numbers in, plain numbers out; no torch.

OLMo's rule (SkipStepOptimizer of OLMo-core; arXiv 2501.00656, section 3): six standard deviations
above the mean of the last 128 steps, of the loss and of the gradient norm. Two differences: a
number that is not finite never enters the window (theirs once did, made the deviation NaN and
dropped the next 128 updates), nor does one that was found too high, so that a spike cannot widen
the band for the next.
"""

import math
from collections import deque

# A band narrower than this share of the mean would call rounding a spike.
_SMALLEST_DEVIATION = 1e-3


class SpikeWindow:
    """The last `size` ordinary values of one number."""

    def __init__(self, size: int, sigmas: float) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._size, self._limit = size, sigmas
        self._high_in_a_row = 0

    def deviations(self, value: float) -> float:
        """Standard deviations of `value` above the mean; NaN while half the window is empty."""
        count = len(self._values)
        if count < max(2, self._size // 2) or not math.isfinite(value):
            return math.nan
        mean = math.fsum(self._values) / count
        variance = math.fsum((x - mean) ** 2 for x in self._values) / (count - 1)
        deviation = max(math.sqrt(variance), _SMALLEST_DEVIATION * abs(mean))
        return (value - mean) / deviation if deviation > 0 else math.nan

    def is_spike(self, deviations: float) -> bool:
        """Whether a value that many `deviations` above the mean is too high (NaN is not)."""
        return deviations > self._limit

    def add(self, value: float, is_spike: bool) -> None:
        """The value was judged; an ordinary one joins the window.

        After half a window of spikes in a row the window begins anew: this is the new level.
        """
        if not math.isfinite(value):
            return
        self._high_in_a_row = self._high_in_a_row + 1 if is_spike else 0
        if self._high_in_a_row >= max(2, self._size // 2):
            self._values.clear()
            self._high_in_a_row = 0
        elif not is_spike:
            self._values.append(value)
