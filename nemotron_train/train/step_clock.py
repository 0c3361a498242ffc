"""Measures the time of each part of a step, summed from one log step to the next.

Owns: the time marks and their sums. Does not own: where a part begins and ends (`train_step`,
`hooks`), the line that reports the times (`hooks.Log`). On a GPU, a mark is an event in the compute
stream: recording it does not synchronize. Work in other streams, such as an overlapped reduction,
is not counted.
"""

from typing import Any

from nemotron_train.platform.device import seconds_between, time_mark


class StepClock:
    """Stopwatch with named laps: `begin` starts a part, `lap` ends it and starts the next one."""

    def __init__(self) -> None:
        self._laps: list[tuple[str, Any, Any]] = []
        self._last: Any = None

    def begin(self) -> None:
        """Start a part. The time since the last mark is not counted."""
        self._last = time_mark()

    def lap(self, name: str) -> None:
        """End a part: add the time since the last mark to `name`."""
        now = time_mark()
        self._laps.append((name, self._last, now))
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds per part name since the last call, in the order of the first laps; then reset.

        SYNC: waits for the last mark. A log step has already waited for the device.
        """
        seconds: dict[str, float] = {}
        for name, start, end in self._laps:
            seconds[name] = seconds.get(name, 0.0) + seconds_between(start, end)
        self._laps.clear()
        return seconds
