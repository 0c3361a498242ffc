"""Brings a precision plan to the modules of a built model, phase by phase, and reads it back.

Owns: which module carries which path of the plan, the switch at a phase's start, the clock of the
random words. Does not own: the plan (`plan`), the arithmetic (`linear`, `experts`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.model.moe.experts import ExpertWeights
from nemotron_train.optim.gradients import count_zeros
from nemotron_train.plan.precision.resolve import LinearFormats, PlanPhase, PrecisionPlan
from nemotron_train.precision.linear import (
    Attached,
    Cut,
    EmulatedColumnParallelLinear,
    EmulatedReplicatedLinear,
    EmulatedRowParallelLinear,
    RoundingClock,
)
from nemotron_train.precision.telemetry import Telemetry


def emulates(config: Config, plan: PrecisionPlan) -> bool:
    """Whether the run needs the linears that a plan can be attached to: it quantizes something, or
    telemetry looks at what that would cost."""
    return plan.is_quantized or config.precision.telemetry.every > 0


def global_modules(model: Any) -> dict[str, torch.nn.Module]:
    """Modules by path, decoder layers numbered from 0 over all pipeline stages."""
    modules = {}
    for name, module in model.named_modules():
        match = re.match(r"decoder\.layers\.(\d+)(.*)", name)
        if match:
            number = model.decoder.layers[int(match[1])].layer_number - 1
            name = f"decoder.layers.{number}{match[2]}"
        modules[name] = module
    return modules


def modules_of(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """`global_modules` of all chunks of this rank. Layers are apart; containers, which every chunk
    has under the same name, are the last chunk's."""
    return {name: module for chunk in chunks for name, module in global_modules(chunk).items()}


@dataclass(frozen=True)
class _Slot:
    """A linear on this rank, how it is cut and which of the step's calls are its own; the fields
    of `Attached`."""

    path: str
    module: torch.nn.Module
    shards: torch.distributed.ProcessGroup | None
    cut: Cut
    context: torch.distributed.ProcessGroup | None
    first_call: int
    part: int = 0


class PrecisionControl:
    """Holds the model of this rank, one chunk or several, to the plan as training goes on."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        config: Config,
        plan: PrecisionPlan,
        groups: ProcessGroupCollection,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._plan = plan
        self._telemetry = telemetry
        self._phase = plan.at(0)
        self.clock = RoundingClock(seed=config.train.seed)
        self._slots = _slots(chunks, config, plan, groups)
        self._enter(self._phase)

    def before_step(self, step: int, tokens: int) -> bool:
        """Prepare optimizer step `step`, which starts after `tokens` trained tokens; True when a
        new phase begins with it."""
        self.clock.step = step
        phase = self._plan.at(tokens)
        is_new = phase is not self._phase
        if is_new:
            self._enter(phase)
        if self._telemetry is not None and self._telemetry.is_due(step + 1):
            self._telemetry.begin(tokens)
            self._observe(self._telemetry)
        return is_new

    def gradients_ready(self, chunks: Sequence[DistributedDataParallel]) -> None:
        """The step's gradients are complete: the last thing that telemetry looks at. What runs
        through the model after it, such as validation, is not measured."""
        if self._telemetry is not None and self._telemetry.is_due(self.clock.step + 1):
            weights: list[tuple[str, Any]] = [(s.path, s.module.weight) for s in self._slots]
            self._telemetry.add_zero_gradients(
                (path, count_zeros(chunks, weight)) for path, weight in weights
            )
            self._observe(None)

    def _observe(self, observer: Telemetry | None) -> None:
        for slot in self._slots:
            attached: Any = slot.module.attached
            attached.observer = observer

    def scale_tokens_apart(self, apart: bool) -> None:
        """From now on forward products quantize each token by itself (`RoundingClock`)."""
        self.clock.tokens_apart = apart

    def weights_changed(self) -> None:
        """The optimizer stepped or a checkpoint was loaded: quantized weights are stale."""
        self.clock.weights_version += 1

    def attached(self) -> dict[str, LinearFormats]:
        """What this rank's modules carry, read from the modules."""
        found = {}
        for slot in self._slots:
            carried = getattr(slot.module, "attached", None)
            if carried is not None:
                found[carried.path] = carried.formats
        return found

    def _enter(self, phase: PlanPhase) -> None:
        formats = phase.formats
        for slot in self._slots:
            slot.module.attached = Attached(  # type: ignore[assignment]
                slot.path,
                formats[slot.path],
                self.clock,
                slot.shards,
                slot.cut,
                slot.context,
                slot.first_call,
                slot.part,
            )
        self._phase = phase
        self.weights_changed()
        found = self.attached()
        for slot in self._slots:
            if found.get(slot.path) != formats[slot.path]:
                raise RuntimeError(
                    f"{slot.path} carries {found.get(slot.path)}, the plan says "
                    f"{formats[slot.path]}: the run stops rather than train in another precision"
                )


def _calls_per_rank(path: str, config: Config, groups: ProcessGroupCollection) -> int:
    """Forward calls of a module within a training step on one data-parallel rank."""
    train = config.train
    sequences = train.global_batch_tokens // train.sequence_length
    micro_batches = sequences // (train.micro_batch_sequences * groups.dp.size())
    return micro_batches * (config.model.mtp.depths if path.startswith("mtp.") else 1)


def _slots(
    chunks: Sequence[torch.nn.Module],
    config: Config,
    plan: PrecisionPlan,
    groups: ProcessGroupCollection,
) -> list[_Slot]:
    """The linears of this rank that a plan can quantize. Raises ConfigError for one that the plan
    quantizes and that has no emulated form."""
    slots = []
    present = modules_of(chunks)
    for path, module in present.items():
        first = groups.dp.rank() * _calls_per_rank(path, config, groups)
        if isinstance(module, EmulatedColumnParallelLinear):
            slots.append(_Slot(path, module, groups.tp, "outputs", groups.cp, first))
        elif isinstance(module, EmulatedRowParallelLinear):
            slots.append(_Slot(path, module, groups.tp, "inputs", groups.cp, first))
        elif isinstance(module, EmulatedReplicatedLinear):
            cut: Cut = "tokens" if config.parallel.sequence else ""
            slots.append(_Slot(path, module, groups.tp, cut, groups.cp, first))
        elif isinstance(module, ExpertWeights):
            # Ranks that hold the same experts see other tokens, tensor-parallel ranks among them
            # where sequence parallelism cuts the tokens and experts are not cut, and
            # context-parallel ranks.
            first = groups.expt_dp.rank() * _calls_per_rank(path, config, groups)
            cut = "outputs" if path.endswith("fc1") else "inputs"
            part = groups.ep.rank()
            slots.append(_Slot(path, module, groups.expt_tp, cut, None, first, part))
    known = {slot.path for slot in slots}
    for phase in plan.phases:
        for path, formats in phase.formats.items():
            if path in present and path not in known and formats.is_quantized:
                products = ", ".join(formats.products)
                raise ConfigError(
                    f"precision: {path} has no emulated form, but the plan asks for {products}"
                )
    return slots
