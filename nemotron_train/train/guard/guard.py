"""Judges each step before its update: may these gradients touch the weights?

Owns: the decision (update, skip, roll back, stop), the same on every rank at the same step, and the
line that tells of it. Does not own: what is measured (`step`, `diagnose`), the rule for spikes
(`spikes`), the way back to a checkpoint (`roll_back`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist

from nemotron_train.config.errors import TrainingFailed
from nemotron_train.config.schema import GuardConfig, NonFinitePolicy, SpikePolicy
from nemotron_train.data.batches import DataState
from nemotron_train.train.guard.spikes import SpikeWindow


class Action(StrEnum):
    update = "update"
    skip = "skip"
    roll_back = "roll_back"


class RollBack(Exception):
    """The step's batch is not to be trained on, nor those since the last checkpoint: `data` is the
    cursor after them. Every rank raises it at the same step."""

    def __init__(self, step: int, data: DataState, reason: str) -> None:
        super().__init__(reason)
        self.step, self.data, self.reason = step, data, reason


@dataclass(frozen=True)
class Findings:
    """What one rank saw that is not finite. modules: (place in the order of the forward pass, path)
    of those whose gradient is not finite; weights: paths whose weight was not even before."""

    loss: bool
    gradient: bool
    modules: Sequence[tuple[Any, str]]
    weights: Sequence[str]


def _ranks(found: Sequence[Findings], field: str) -> str:
    ranks = [str(rank) for rank, each in enumerate(found) if getattr(each, field)]
    shown = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" if ranks else ""


def describe(loss: float, grad_norm: float, found: Sequence[Findings]) -> str:
    """One line: what is not finite, on which ranks, and where the gradients went wrong first."""
    if ranks := _ranks(found, "loss"):
        text = f"loss not finite on {ranks}"
    elif ranks := _ranks(found, "gradient"):
        text = f"gradient not finite on {ranks} (loss {loss:.4f})"
    else:
        text = f"loss {loss:.4f}, gradient norm {grad_norm}"
    modules = dict(sorted({(place, name) for each in found for place, name in each.modules}))
    if modules:
        text += f"; first module in the backward pass: {list(modules.values())[-1]}"
        text += f" ({len(modules)} module{'s' * (len(modules) > 1)} with such gradients)"
    weights = sorted({name for each in found for name in each.weights})
    if weights:
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        text += f"; weights not finite before the step: {weights[0]}{more}"
    return text


class Guard:
    """Holds what was seen of the run so far. `events` are lines for metrics.jsonl that somebody
    takes away; `skipped` counts the updates dropped by this process."""

    def __init__(self, config: GuardConfig, device: str) -> None:
        self._config, self._device = config, device
        self._windows = {
            name: SpikeWindow(config.spike_window, config.spike_sigmas)
            for name in ("loss", "grad_norm")
        }
        self._in_a_row = self._roll_backs = 0
        self.skipped = 0
        self.events: list[dict[str, Any]] = []

    def judge(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        own_loss_is_finite: bool,
        find: Callable[[], Findings],
    ) -> Action:
        """What to do with the gradients of `step`, which no weight has seen yet.

        `find` looks closer, on all ranks, where something is not finite on any. Raises
        TrainingFailed where the policy is to stop. COLLECTIVE: one number over all ranks. SYNC.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        is_finite = own_loss_is_finite and all(math.isfinite(value) for value in values.values())
        deviations = {name: self._windows[name].deviations(values[name]) for name in values}
        high = any(self._windows[name].is_spike(deviations[name]) for name in values)
        worst = self._agree(2 if not is_finite else int(high))
        if self._config.spike == SpikePolicy.ignore and worst < 2:
            worst = 0
        for name, value in values.items():
            self._windows[name].add(value, is_spike=worst == 1 and high)
        if worst == 0:
            self._in_a_row = 0
            return Action.update
        if worst == 2:
            found, policy = _gather(find()), self._config.non_finite
            if policy == NonFinitePolicy.skip and any(each.weights for each in found):
                policy = NonFinitePolicy.stop  # no other batch heals a weight; saving would keep it
            return self._act(step, "non_finite", describe(loss, grad_norm, found), policy)
        numbers = [
            f"{name} {values[name]:.4f}, {deviations[name]:.1f} deviations above the mean"
            for name in values
            if self._windows[name].is_spike(deviations[name])
        ]
        reason = " and ".join(numbers) or "another rank's numbers"
        return self._act(step, "spike", reason, self._config.spike)

    def report(self, kind: str, step: int, reason: str) -> None:
        """Something to tell of that asks for no action."""
        self.events.append({"kind": kind, "step": step, "policy": "report", "reason": reason})

    def _agree(self, verdict: int) -> int:
        """The gravest of all ranks' verdicts. COLLECTIVE."""
        if dist.get_world_size() == 1:
            return verdict
        verdicts = torch.tensor([verdict], device=self._device)
        dist.all_reduce(verdicts, op=dist.ReduceOp.MAX)
        return int(verdicts.item())

    def _act(
        self, step: int, kind: str, reason: str, policy: NonFinitePolicy | SpikePolicy
    ) -> Action:
        self.events.append({"kind": kind, "step": step, "policy": str(policy), "reason": reason})
        if policy == SpikePolicy.report:
            return Action.update
        if policy == NonFinitePolicy.skip:
            self._in_a_row += 1
            if self._in_a_row > self._config.max_skips:
                raise TrainingFailed(
                    f"step {step}: {reason}; {self._config.max_skips} updates in a row were "
                    "skipped before it (guard.max_skips); the last checkpoint stands"
                )
            self.skipped += 1
            return Action.skip
        if policy == NonFinitePolicy.roll_back:
            self._roll_backs += 1
            if self._roll_backs > self._config.max_roll_backs:
                raise TrainingFailed(
                    f"step {step}: {reason}; the run was rolled back "
                    f"{self._config.max_roll_backs} times before (guard.max_roll_backs); the last "
                    "checkpoint stands"
                )
            return Action.roll_back
        raise TrainingFailed(
            f"step {step}: {reason}; no weight was touched and the last checkpoint stands: resume "
            "from it with guard.non_finite=skip or roll_back, or with another learning rate in a "
            "branch"
        )


def _gather(own: Findings) -> list[Findings]:
    """All ranks' findings, by rank. COLLECTIVE."""
    if dist.get_world_size() == 1:
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
