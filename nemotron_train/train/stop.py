"""Ending early: signals, a file, limits of steps and time, agreed on by all ranks. The only owner
of signals.
"""

import signal
import time
import types
from pathlib import Path

import torch
import torch.distributed as dist

from nemotron_train.run_folder.progress import Progress

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopOnRequest:
    """True once any rank was signalled or finds `file`, after `after_steps` steps of this process,
    or after `after_minutes` since `started` (of `time.monotonic`); 0: no such limit.

    A first signal asks for a checkpoint and a clean end; the handlers then step aside, so that
    a second one ends the process at once. Only the first rank looks for the file: one look at the
    file system a step. `reason` is the same on every rank, once they agreed.
    """

    def __init__(
        self, after_steps: int, after_minutes: float, started: float, file: Path, device: str
    ) -> None:
        self._remaining = after_steps
        self._limited = after_steps > 0
        self._after_minutes = after_minutes
        self._deadline = started + 60 * after_minutes if after_minutes > 0 else float("inf")
        self._file, self._device = file, device
        self._signal = 0
        self.reason = ""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def agreed(self, progress: Progress) -> bool:
        """COLLECTIVE. SYNC on a GPU: one number a step."""
        self._remaining -= 1
        wanted = 0  # the largest that any rank wants: a signal's number, or one of these
        if self._limited and self._remaining <= 0:
            wanted = 101
        if time.monotonic() >= self._deadline:
            wanted = 102
        if dist.get_rank() == 0 and self._file.exists():
            wanted = 103
        if self._signal:
            wanted = self._signal
        if dist.get_world_size() > 1:
            wanteds = torch.tensor([wanted], device=self._device)
            dist.all_reduce(wanteds, op=dist.ReduceOp.MAX)
            wanted = int(wanteds.item())
        if wanted:
            self.reason = self._text(wanted)
        return wanted > 0

    def _text(self, wanted: int) -> str:
        if wanted == 101:
            return "train.stop_after_steps"
        if wanted == 102:
            return f"train.stop_after_minutes={self._after_minutes:g}"
        return str(self._file) if wanted == 103 else signal.Signals(wanted).name
