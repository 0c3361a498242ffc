"""Ends a rank whose steps have stopped coming, and leaves the stacks of its threads behind.

Owns: one thread that watches the clock, `ranks/rank_0003.stacks`. Does not own: what counts as a
sign of life (the trainer beats after each step and each long side job). Every rank has its own, and
needs no other: where one rank hangs, is stopped or is gone, all others wait for it in a collective,
so all of their watchdogs bite, within a second of each other, before the collective itself gives up
(`collective_timeout`). A rank that was stopped by a signal cannot end itself: its launcher does
(torchrun; `srun --kill-on-bad-exit`). A rank stuck in code that never lets go of the interpreter's
lock writes no stacks; the others do.
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

from nemotron_train.config.schema import GuardConfig
from nemotron_train.run_folder.progress import Progress, StepResult

_POLLS_IN_A_LIMIT = 50
_LONGEST_POLL_SECONDS = 1.0
_WITHOUT_WATCHDOG = timedelta(minutes=10)


def collective_timeout(guard: GuardConfig) -> timedelta:
    """How long a collective may wait: a little longer than any watchdog, which tells more."""
    if guard.hang_minutes == 0:
        return _WITHOUT_WATCHDOG
    return timedelta(minutes=max(guard.hang_minutes, guard.first_step_minutes) + 1)


def end_process() -> None:
    """At once, exit code 1, no clean-up: other threads may hang for ever."""
    os._exit(1)


class Watchdog:
    """Watches from `with` to its end; `beat` says that this rank is alive.

    Before the first beat `first_limit` seconds may pass (kernels are compiled, pools filled), after
    it `limit` seconds from each beat to the next. Time during which the whole process stood still,
    suspended with its job, does not count. limit 0: watches nothing.
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
        self._rank, self._limit, self._end = rank, limit, end
        self._allowed = max(limit, first_limit)
        self._silent = 0.0  # seconds since the last beat
        self._step = -1
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._limit > 0:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def due(self, progress: Progress) -> bool:
        return True

    def run(self, progress: Progress, result: StepResult) -> None:
        """As a hook of the loop: a beat."""
        self.beat(progress.step)

    def beat(self, step: int) -> None:
        """This rank has just finished `step`, or a side job after it."""
        self._step, self._allowed, self._silent = step, self._limit, 0.0

    def _watch(self) -> None:
        poll = min(self._limit / _POLLS_IN_A_LIMIT, _LONGEST_POLL_SECONDS)
        before = time.monotonic()
        while not self._over.wait(poll):
            now = time.monotonic()
            self._silent += min(now - before, 2 * poll)
            before = now
            if self._silent > self._allowed:
                self._bite()
                return

    def _bite(self) -> None:
        last = f"since step {self._step}" if self._step >= 0 else "yet"
        line = f"rank {self._rank}: no step {last} for {format_minutes(self._silent)}"
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
        print(f"nemotron-train: {line} (guard.hang_minutes)", file=sys.stderr, flush=True)
        self._end()


def format_minutes(seconds: float) -> str:
    """`12 s` or `10.0 min`."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
