"""Watchdog: ends a rank that no longer finishes steps, and writes the stacks of its threads.

Owns: a thread that watches the time since the last step, and the file `ranks/rank_0003.stacks`.
Does not own: when the watchdog is reset (the trainer calls it after each step and each long hook).

Every rank has its own watchdog and needs no communication. If one rank hangs, is stopped or is
gone, all other ranks wait for it in a collective. Their watchdogs expire within a second of each
other, before the collective times out (`collective_timeout`). A rank that a signal has stopped
cannot end itself; its launcher ends it (torchrun; `srun --kill-on-bad-exit`). A rank that hangs in
code that holds the GIL writes no stacks; the other ranks do.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from nemotron_train.config.guard import GuardConfig
from nemotron_train.config.visible import one_line
from nemotron_train.run_folder.progress import Progress, StepResult

_POLLS_PER_LIMIT = 50
_MAX_POLL_SECONDS = 1.0
_TIMEOUT_WITHOUT_WATCHDOG = timedelta(minutes=10)


def collective_timeout(guard: GuardConfig) -> timedelta:
    """Timeout of a collective: a minute more than the watchdog's limits.

    The watchdog should expire first, because its message tells more.
    """
    if guard.hang_minutes == 0:
        return _TIMEOUT_WITHOUT_WATCHDOG
    return timedelta(minutes=max(guard.hang_minutes, guard.first_step_minutes) + 1)


def end_process() -> None:
    """End the process at once with exit code 1, without clean-up: other threads may hang."""
    os._exit(1)


class Watchdog:
    """Context manager and hook of the loop; `beat` resets the watchdog of this rank.

    Limits in seconds: `first_limit` until the first beat (kernels are compiled, memory pools are
    filled), `limit` between beats. Time during which the whole process was suspended with its job
    does not count. limit 0: disabled. end: called when a limit is exceeded.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        limit: float,
        first_limit: float,
        end: Callable[[], None] = end_process,
    ) -> None:
        self._path = folder / "ranks" / f"rank_{rank:04d}.stacks"
        self._rank = rank
        self._limit = limit
        self._end = end
        self._current_limit = max(limit, first_limit)
        self._seconds_since_beat = 0.0
        self._step = -1
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._limit > 0:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()

    def due(self, progress: Progress) -> bool:
        """Always."""
        return True

    def run(self, progress: Progress, result: StepResult) -> None:
        """Reset the watchdog."""
        self.beat(progress.step)

    def beat(self, step: int) -> None:
        """Reset the watchdog: this rank has just finished `step`, or a hook after it."""
        self._step = step
        self._current_limit = self._limit
        self._seconds_since_beat = 0.0

    def _watch(self) -> None:
        poll = min(self._limit / _POLLS_PER_LIMIT, _MAX_POLL_SECONDS)
        before = time.monotonic()
        while not self._closed.wait(poll):
            now = time.monotonic()
            # At most two polls: a longer gap means that the whole process was suspended.
            self._seconds_since_beat += min(now - before, 2 * poll)
            before = now
            if self._seconds_since_beat > self._current_limit:
                self._expire()
                return

    def _expire(self) -> None:
        """Write the stacks of all threads, print one line and end the process."""
        last = f"since step {self._step}" if self._step >= 0 else "yet"
        line = f"rank {self._rank}: no step {last} for {format_minutes(self._seconds_since_beat)}"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "w", encoding="utf-8") as file:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                file.write(f"{now} {socket.gethostname()} pid {os.getpid()}: {line}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            line += f"; stacks in {self._path}"
        except OSError as error:
            line += f"; its stacks could not be written ({error})"
        line = one_line(f"nemotron-train: {line} (guard.hang_minutes)")
        print(line, file=sys.stderr, flush=True)
        self._end()


def format_minutes(seconds: float) -> str:
    """`12 s` below a minute, else `10.0 min`."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
