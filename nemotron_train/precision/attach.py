"""Attaches a precision plan to the modules of a built model, phase by phase, and verifies it.

Owns: the module for each path of the plan, the switch at the start of a phase, the rounding clock.
Does not own: the plan (`plan`), the arithmetic (`linear`, `experts`).
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
    """Whether the run needs linears that a plan can be attached to: the plan quantizes something,
    or telemetry is on."""
    return plan.is_quantized or config.precision.telemetry.every > 0


def global_modules(model: Any) -> dict[str, torch.nn.Module]:
    """Modules by path. Decoder layers are numbered from 0 over all pipeline stages."""
    modules = {}
    for name, module in model.named_modules():
        match = re.match(r"decoder\.layers\.(\d+)(.*)", name)
        if match:
            number = model.decoder.layers[int(match[1])].layer_number - 1
            name = f"decoder.layers.{number}{match[2]}"
        modules[name] = module
    return modules


def modules_of(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """`global_modules` of all chunks of this rank. Layer paths are unique; for containers, which
    every chunk has under the same path, the last chunk's module is returned."""
    return {name: module for chunk in chunks for name, module in global_modules(chunk).items()}


@dataclass(frozen=True)
class _Slot:
    """A linear on this rank, its sharding and the number of its first call in a step. For the
    fields see `Attached`."""

    path: str
    module: torch.nn.Module
    shards: torch.distributed.ProcessGroup | None
    cut: Cut
    context: torch.distributed.ProcessGroup | None
    first_call: int
    part: int = 0


class PrecisionControl:
    """Applies the plan to the model of this rank (one chunk or several) during training.

    Raises ConfigError if the plan quantizes a linear that has no emulated form.
    """

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
        """Prepare optimizer step `step` (from 0), which starts after `tokens` trained tokens.

        Returns True if a new phase of the plan begins with this step.
        """
        self.clock.step = step
        is_new = self.enter_phase(tokens)
        if self._telemetry is not None and self._telemetry.is_due(step + 1):
            self._telemetry.begin(tokens)
            self._observe(self._telemetry)
        return is_new

    def enter_phase(self, tokens: int) -> bool:
        """Give every linear the formats of the phase that `tokens` trained tokens are in. Returns
        whether it is another phase than before."""
        phase = self._plan.at(tokens)
        is_new = phase is not self._phase
        if is_new:
            self._enter(phase)
        return is_new

    def gradients_ready(self, chunks: Sequence[DistributedDataParallel]) -> None:
        """Call when the gradients of the step are complete. Telemetry counts their zeros and stops
        measuring, so a later forward pass, such as validation, is not measured."""
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

    def set_per_token_scales(self, enabled: bool) -> None:
        """Whether forward products scale each token separately from now on (`RoundingClock`)."""
        self.clock.per_token_scales = enabled

    def weights_changed(self) -> None:
        """Call after an optimizer step or a checkpoint load: invalidates quantized weights."""
        self.clock.weights_version += 1

    def attached(self) -> dict[str, LinearFormats]:
        """Path -> formats, read from the modules of this rank."""
        formats = {}
        for slot in self._slots:
            attached = getattr(slot.module, "attached", None)
            if attached is not None:
                formats[attached.path] = attached.formats
        return formats

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
        actual = self.attached()
        for slot in self._slots:
            if actual.get(slot.path) != formats[slot.path]:
                raise RuntimeError(
                    f"{slot.path} carries {actual.get(slot.path)}, the plan says "
                    f"{formats[slot.path]}: the run stops rather than train in another precision"
                )


def _calls_per_rank(path: str, config: Config, groups: ProcessGroupCollection) -> int:
    """Number of forward calls of a module in a training step on one data-parallel rank."""
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
    """The linears of this rank that a plan can quantize. Raises ConfigError if the plan quantizes a
    linear that has no emulated form."""
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
            # Ranks that hold the same experts have different tokens. They include context-parallel
            # ranks, and tensor-parallel ranks if sequence parallelism shards the tokens and the
            # experts are not sharded.
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
