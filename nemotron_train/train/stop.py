"""Early stop of a run: signals, the STOP file, limits of steps and time; all ranks agree on it.

Owns: the signal handlers of the process. Does not own: the final checkpoint (`trainer`).
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
    """Stops the run on a signal to any rank, on the existence of `file`, or at a limit.

    Limits: `after_steps` steps of this process, or `after_minutes` since `started`, a value of
    `time.monotonic()`. 0 means no limit.

    The first signal requests a checkpoint and a clean end. It also restores the default signal
    handlers, so a second signal ends the process at once. Only the first rank checks for the file:
    one file system access per step. `reason` is the same on every rank once they have agreed.
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
        for handled in SIGNALS:
            signal.signal(handled, signal.SIG_DFL)

    def agreed(self, progress: Progress) -> bool:
        """Whether the run stops after this step. Call once per step.

        COLLECTIVE. SYNC on a GPU: one number per step.
        """
        self._remaining -= 1
        # 0: go on; 101 to 103: a limit or the file; otherwise a signal number.
        cause = 0
        if self._limited and self._remaining <= 0:
            cause = 101
        if time.monotonic() >= self._deadline:
            cause = 102
        if dist.get_rank() == 0 and self._file.exists():
            cause = 103
        if self._signal:
            cause = self._signal
        if dist.get_world_size() > 1:
            # The largest cause of all ranks counts.
            reduced = torch.tensor([cause], device=self._device)
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
            cause = int(reduced.item())
        if cause:
            self.reason = self._text(cause)
        return cause > 0

    def _text(self, cause: int) -> str:
        if cause == 101:
            return "train.stop_after_steps"
        if cause == 102:
            return f"train.stop_after_minutes={self._after_minutes:g}"
        return str(self._file) if cause == 103 else signal.Signals(cause).name
