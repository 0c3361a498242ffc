"""Starts what a run or a generation computes on: the device, the backend of its formats, the ranks.

Owns: the order in which that happens. The device comes first, because Megatron-Core can be imported
only then; the backend's environment next, because Transformer Engine reads it when imported; then
the guards, which know both. Does not own: any decision (`plan.backend`, `plan.guards`), the device
(`device`), the grid of ranks (`groups`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from nemotron_train.config.schema import Config, ParallelConfig
from nemotron_train.plan.backend import Choice, choose_backend
from nemotron_train.plan.guards import Surroundings, enforce
from nemotron_train.plan.hardware import installed_versions
from nemotron_train.plan.precision.resolve import PrecisionPlan
from nemotron_train.platform import device
from nemotron_train.platform.device import Platform


@dataclass(frozen=True)
class Runtime:
    """The device of this process and what computes the plan's formats on it. `start_ranks` joins
    it to the others; `stop_ranks` ends that."""

    platform: Platform
    backend: Choice

    @property
    def is_first_rank(self) -> bool:
        """Whether this process speaks for all: rank 0, or the only one."""
        return os.environ.get("RANK", "0") == "0"

    def start_ranks(
        self,
        parallel: ParallelConfig,
        rendezvous_seconds: int = 300,
        timeout: timedelta | None = None,
    ) -> Any:
        """The process groups of `parallel`, a megatron.core ProcessGroupCollection; COLLECTIVE.
        timeout: of a collective. Raises RendezvousFailed where the ranks do not meet."""
        from nemotron_train.platform import groups

        limits = {} if timeout is None else {"timeout": timeout}
        return groups.start(parallel, self.platform.backend, rendezvous_seconds, **limits)

    def stop_ranks(self) -> None:
        """Tear the process groups down; does nothing where none runs."""
        from nemotron_train.platform import groups

        groups.stop()


def start_runtime(
    config: Config,
    plan: PrecisionPlan,
    threads: int,
    say: Callable[[str], None],
    show: Callable[[str], None] | None = None,
) -> Runtime:
    """Prepare this process to compute `config` under `plan`; Megatron-Core may be imported after.

    threads: CPU threads of torch, 0 for this rank's share of the cores. say: takes one line for
    each warning; show: takes the lines that describe the device and the backend. Raises ConfigError
    where a guard refuses the combination, or `precision.backend=native` cannot be had.
    """
    platform = device.prepare(threads)
    surroundings = Surroundings(
        device.hardware(platform), installed_versions(), dict(os.environ), native=False
    )
    backend = choose_backend(config, plan, surroundings)
    os.environ.update(backend.environment)
    for line in filter(None, (platform.describe(), backend.text)):
        if show is not None:
            show(line)
    enforce(config, plan, replace(surroundings, native=backend.native), say)
    return Runtime(platform, backend)
