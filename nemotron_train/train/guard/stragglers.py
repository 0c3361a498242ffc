"""Which rank do the others wait for? Seconds of work by rank, gathered now and then.

A rank's work is what it does from a step's start until it enters the reduction of gradients over
the data-parallel ranks: loading, forward and backward pass. Ranks of one tensor-, context-,
pipeline- or expert-parallel group wait for each other inside these passes and so look alike; a slow
one shows as a slow group. Does not own: when a step is measured (`step`), who reads the line.
"""

import socket
import statistics
from typing import Any

import torch
import torch.distributed as dist

MEASURES_IN_A_ROW = 3  # before a rank is named: one slow step may be anything


class Stragglers:
    """Measures every `every` steps (0: never) and names a rank whose work took more than `ratio`
    times the median in MEASURES_IN_A_ROW of them. COLLECTIVE where there are several ranks."""

    def __init__(self, every: int, ratio: float, device: str) -> None:
        self._every = every if dist.get_world_size() > 1 else 0
        self._ratio, self._device = ratio, device
        self._slowest, self._in_a_row = -1, 0
        self._hosts: list[Any] = [""] * dist.get_world_size()
        if self._every:
            dist.all_gather_object(self._hosts, socket.gethostname())

    def is_due(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def measure(self, own_seconds: float) -> tuple[dict[str, float], str]:
        """All ranks' seconds: metrics, the same everywhere, and what to say, mostly "".
        COLLECTIVE. SYNC."""
        own = torch.tensor([own_seconds], dtype=torch.float64, device=self._device)
        gathered = [torch.empty_like(own) for _ in self._hosts]
        dist.all_gather(gathered, own)
        return self.judge([float(seconds) for seconds in gathered])

    def judge(self, seconds: list[float]) -> tuple[dict[str, float], str]:
        """The same from the seconds by rank."""
        median = statistics.median_low(seconds)
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        ratio = seconds[slowest] / median
        metrics = {"slowest_rank": slowest, "straggler_ratio": ratio}
        if ratio <= self._ratio:
            self._slowest, self._in_a_row = -1, 0
            return metrics, ""
        self._in_a_row = self._in_a_row + 1 if slowest == self._slowest else 1
        self._slowest = slowest
        if self._in_a_row < MEASURES_IN_A_ROW:
            return metrics, ""
        self._in_a_row = 0  # said once; again after as many measures more
        return metrics, (
            f"rank {slowest} on {self._hosts[slowest]} keeps the others waiting: its passes took "
            f"{seconds[slowest]:.2f} s, the median rank's {median:.2f} s, and as long in the "
            f"{MEASURES_IN_A_ROW - 1} measures before"
        )
