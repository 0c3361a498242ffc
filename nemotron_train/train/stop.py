"""Ending early: signals and step limits, agreed on by all ranks. The only owner of signals."""

import signal
import types

import torch
import torch.distributed as dist

from nemotron_train.train.loop import Progress

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopOnRequest:
    """True once any rank was signalled, or after `after_steps` steps of this process.

    A first signal asks for a checkpoint and a clean end; the handlers then step aside, so that
    a second one ends the process at once.
    """

    def __init__(self, after_steps: int, device: str) -> None:
        self._remaining = after_steps
        self._limited = after_steps > 0
        self._device = device
        self._signal = 0
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def agreed(self, progress: Progress) -> bool:
        """COLLECTIVE. SYNC on a GPU: one number a step."""
        self._remaining -= 1
        wanted = self._signal > 0 or (self._limited and self._remaining <= 0)
        if dist.get_world_size() == 1:
            return wanted
        flag = torch.tensor([int(wanted)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
