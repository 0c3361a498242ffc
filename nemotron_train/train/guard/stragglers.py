"""Finds stragglers: gathers each rank's seconds of work and names a rank that is too slow.

The work of a rank lasts from the start of a step until the rank enters the gradient reduction over
data-parallel ranks: data loading, forward and backward passes. Ranks of the same tensor-, context-,
pipeline- or expert-parallel group wait for each other during these passes, so their times are
similar: a slow rank shows up as a slow group.

Owns: the comparison of the ranks. Does not own: the measurement (`train_step`), the output of the
message (`guard`).
"""

import socket
import statistics
from typing import Any

import torch
import torch.distributed as dist

MEASURES_IN_A_ROW = 3  # before a rank is named: a single slow step may have any cause


class Stragglers:
    """Names a rank whose work took more than `ratio` times the median MEASURES_IN_A_ROW times.

    Measures every `every` steps (0: never; never with one rank). Construction is COLLECTIVE.
    """

    def __init__(self, every: int, ratio: float, device: str) -> None:
        self._every = every if dist.get_world_size() > 1 else 0
        self._ratio, self._device = ratio, device
        self._slowest, self._in_a_row = -1, 0  # the last slow rank and its number of measures
        self._hosts: list[Any] = [""] * dist.get_world_size()
        if self._every:
            dist.all_gather_object(self._hosts, socket.gethostname())

    def is_due(self, step: int) -> bool:
        """Whether step `step` is measured."""
        return self._every > 0 and step % self._every == 0

    def measure(self, local_seconds: float) -> tuple[dict[str, float], str]:
        """Gather the seconds of all ranks and judge them. COLLECTIVE. SYNC.

        Returns metrics and a message ("" if no rank is named), both the same on every rank.
        """
        local = torch.tensor([local_seconds], dtype=torch.float64, device=self._device)
        gathered = [torch.empty_like(local) for _ in self._hosts]
        dist.all_gather(gathered, local)
        return self.judge([float(seconds) for seconds in gathered])

    def judge(self, seconds: list[float]) -> tuple[dict[str, float], str]:
        """Metrics and message, as `measure` returns them, from the seconds of each rank."""
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
        self._in_a_row = 0  # named again only after MEASURES_IN_A_ROW more measures
        return metrics, (
            f"rank {slowest} on {self._hosts[slowest]} keeps the others waiting: its passes took "
            f"{seconds[slowest]:.2f} s, the median rank's {median:.2f} s, and as long in the "
            f"{MEASURES_IN_A_ROW - 1} measures before"
        )
