"""Where the time of a step goes: seconds of each of its parts, added up from log step to log step.

Owns: the marks and their sums. Does not own: where a part ends (`step`, `hooks`), the line they are
written to (`hooks.Log`). On a GPU the marks are events in the stream that computes: taking one
waits for nothing, and what runs beside that stream (an overlapped reduction) is not counted.
"""

from typing import Any

from nemotron_train.platform.device import seconds_between, time_mark


class StepClock:
    """`begin` starts a part, `lap` ends it under a name and starts the next one."""

    def __init__(self) -> None:
        self._laps: list[tuple[str, Any, Any]] = []
        self._last: Any = None

    def begin(self) -> None:
        """The time since the last mark belongs to nobody."""
        self._last = time_mark()

    def lap(self, name: str) -> None:
        """The time since the last mark went to `name`."""
        now = time_mark()
        self._laps.append((name, self._last, now))
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call, in the order of their first lap. SYNC: waits for the
        last mark; a log step has waited for the device already."""
        seconds: dict[str, float] = {}
        for name, start, end in self._laps:
            seconds[name] = seconds.get(name, 0.0) + seconds_between(start, end)
        self._laps.clear()
        return seconds
