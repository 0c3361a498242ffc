"""The guard: decides, before each weight update, whether the step's gradients may be applied.

Owns: the decision (update, skip, roll back, stop), which is the same on every rank, and the line
that reports it. Does not own: what is measured (`train_step`, `diagnose`), the rule for spikes
(`spikes`), the return to a checkpoint (`roll_back`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist

from nemotron_train.config.errors import TrainingFailed
from nemotron_train.config.guard import GuardConfig, NonFinitePolicy, SpikePolicy
from nemotron_train.data.batches import DataState
from nemotron_train.train.guard.spikes import SpikeWindow


class Action(StrEnum):
    """What to do with the gradients of a step."""

    update = "update"
    skip = "skip"
    roll_back = "roll_back"


class RollBack(Exception):
    """Raised on every rank at the same step: return to the last checkpoint and skip data.

    The batches since that checkpoint, and the batch of this step, are not trained on. data: the
    cursor after them.
    """

    def __init__(self, step: int, data: DataState, reason: str) -> None:
        super().__init__(reason)
        self.step = step
        self.data = data
        self.reason = reason


@dataclass(frozen=True)
class Findings:
    """The non-finite values that one rank found."""

    loss: bool  # the rank's loss is not finite
    gradient: bool  # the rank's gradient, before the reduction, is not finite
    # Modules whose gradient is not finite: (position in the forward pass, module path).
    modules: Sequence[tuple[Any, str]]
    weights: Sequence[str]  # paths of modules with a weight that was not finite before the step


def _ranks(findings: Sequence[Findings], field: str) -> str:
    """`rank 3` or `ranks 0, 1`: the ranks whose `field` is true; "" if there are none."""
    ranks = [str(rank) for rank, finding in enumerate(findings) if getattr(finding, field)]
    shown = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" if ranks else ""


def describe(loss: float, grad_norm: float, findings: Sequence[Findings]) -> str:
    """One line: what is not finite, on which ranks, and in which module it began.

    findings: by rank. The first module of the backward pass is the last one of the forward pass.
    """
    if ranks := _ranks(findings, "loss"):
        text = f"loss not finite on {ranks}"
    elif ranks := _ranks(findings, "gradient"):
        text = f"gradient not finite on {ranks} (loss {loss:.4f})"
    else:
        text = f"loss {loss:.4f}, gradient norm {grad_norm}"
    modules = dict(
        sorted({(place, name) for finding in findings for place, name in finding.modules})
    )
    if modules:
        text += f"; first module in the backward pass: {list(modules.values())[-1]}"
        text += f" ({len(modules)} module{'s' * (len(modules) > 1)} with such gradients)"
    weights = sorted({name for finding in findings for name in finding.weights})
    if weights:
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        text += f"; weights not finite before the step: {weights[0]}{more}"
    return text


class Guard:
    """Judges the steps of a run; keeps the recent losses and gradient norms.

    events: lines for metrics.jsonl; `GuardedStep` writes and clears them. skipped: number of
    updates that this process has skipped.
    """

    def __init__(self, config: GuardConfig, device: str) -> None:
        self._config, self._device = config, device
        self._windows = {
            name: SpikeWindow(config.spike_window, config.spike_sigmas)
            for name in ("loss", "grad_norm")
        }
        self._skips_in_a_row = self._roll_backs = 0
        self.skipped = 0
        self.events: list[dict[str, Any]] = []

    def judge(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        local_loss_is_finite: bool,
        find: Callable[[], Findings],
    ) -> Action:
        """Decide what to do with the gradients of `step`, before they change a weight.

        find: returns this rank's non-finite values. Called on all ranks if any rank has some.
        Raises TrainingFailed if the policy is to stop, or if there were too many skips or
        roll-backs. COLLECTIVE: one number over all ranks. SYNC.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        is_finite = local_loss_is_finite and all(math.isfinite(value) for value in values.values())
        deviations = {name: self._windows[name].deviations(values[name]) for name in values}
        is_high = any(self._windows[name].is_spike(deviations[name]) for name in values)
        verdict = self._worst_verdict(2 if not is_finite else int(is_high))
        if self._config.spike == SpikePolicy.ignore and verdict < 2:
            verdict = 0
        for name, value in values.items():
            self._windows[name].add(value, is_spike=verdict == 1 and is_high)
        if verdict == 0:
            self._skips_in_a_row = 0
            return Action.update
        if verdict == 2:
            findings, policy = _gather(find()), self._config.non_finite
            if policy == NonFinitePolicy.skip and any(finding.weights for finding in findings):
                # Another batch cannot repair a weight, and the next save would store it.
                policy = NonFinitePolicy.stop
            return self._act(step, "non_finite", describe(loss, grad_norm, findings), policy)
        numbers = [
            f"{name} {values[name]:.4f}, {deviations[name]:.1f} deviations above the mean"
            for name in values
            if self._windows[name].is_spike(deviations[name])
        ]
        reason = " and ".join(numbers) or "another rank's numbers"
        return self._act(step, "spike", reason, self._config.spike)

    def report(self, kind: str, step: int, reason: str) -> None:
        """Add an event that needs no action, for metrics.jsonl and the terminal."""
        self.events.append({"kind": kind, "step": step, "policy": "report", "reason": reason})

    def _worst_verdict(self, verdict: int) -> int:
        """Maximum over all ranks. 0: fine, 1: spike, 2: not finite. COLLECTIVE."""
        if dist.get_world_size() == 1:
            return verdict
        verdicts = torch.tensor([verdict], device=self._device)
        dist.all_reduce(verdicts, op=dist.ReduceOp.MAX)
        return int(verdicts.item())

    def _act(
        self, step: int, kind: str, reason: str, policy: NonFinitePolicy | SpikePolicy
    ) -> Action:
        """Record the event and turn the policy into an action. Raises TrainingFailed."""
        self.events.append({"kind": kind, "step": step, "policy": str(policy), "reason": reason})
        if policy == SpikePolicy.report:
            return Action.update
        if policy == NonFinitePolicy.skip:
            self._skips_in_a_row += 1
            if self._skips_in_a_row > self._config.max_skips:
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


def _gather(local_findings: Findings) -> list[Findings]:
    """The findings of all ranks, by rank. COLLECTIVE."""
    if dist.get_world_size() == 1:
        return [local_findings]
    findings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, local_findings)
    return findings
