"""Startup of a training or generation process: device, precision backend, process groups.

Owns: the order of these steps. The device comes first, because Megatron-Core can be imported only
after it. The backend's environment variables come next, because Transformer Engine reads them when
it is imported. The guards come last, because they check both. Does not own: the decisions
(`plan.backend`, `plan.guards`), the device (`device`), the process groups (`groups`).
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
from nemotron_train.platform.cores import PROCESS_START, sharing_text
from nemotron_train.platform.device import Platform


@dataclass(frozen=True)
class Runtime:
    """The device of this process and the backend for the plan's block-scaled formats. `start_ranks`
    connects the process to the other ranks; `stop_ranks` disconnects it."""

    platform: Platform
    backend: Choice

    @property
    def is_first_rank(self) -> bool:
        """Whether this process is rank 0 or the only one; it prints for all ranks."""
        return os.environ.get("RANK", "0") == "0"

    def start_ranks(
        self,
        parallel: ParallelConfig,
        rendezvous_seconds: int = 300,
        timeout: timedelta | None = None,
    ) -> Any:
        """Start the process groups of `parallel`; COLLECTIVE. Returns a megatron.core
        ProcessGroupCollection. timeout: limit of one collective. Raises RendezvousFailed if the
        ranks cannot connect within `rendezvous_seconds`."""
        from nemotron_train.platform import groups

        limits = {} if timeout is None else {"timeout": timeout}
        return groups.start(parallel, self.platform.backend, rendezvous_seconds, **limits)

    def stop_ranks(self) -> None:
        """Destroy the process groups. Does nothing if none are initialized."""
        from nemotron_train.platform import groups

        groups.stop()


def start_runtime(
    config: Config,
    plan: PrecisionPlan,
    threads: int,
    say: Callable[[str], None],
    show: Callable[[str], None] | None = None,
) -> Runtime:
    """Prepare this process to compute `config` under `plan`, before Megatron-Core is imported.

    threads: CPU threads of torch; 0 for this rank's share of the cores. say: called with each
    warning, one line; show: called with each line that describes the device or the backend. Raises
    ConfigError if a guard rejects the combination, or if `precision.backend=native` is not
    available.
    """
    platform = device.prepare(threads)
    surroundings = Surroundings(
        device.hardware(platform), installed_versions(), dict(os.environ), native=False
    )
    backend = choose_backend(config, plan, surroundings)
    os.environ.update(backend.environment)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first_line = " · ".join(
        filter(None, (platform.describe(), sharing_text(PROCESS_START, local_ranks)))
    )
    for line in filter(None, (first_line, backend.text)):
        if show is not None:
            show(line)
    enforce(config, plan, replace(surroundings, native=backend.native), say)
    return Runtime(platform, backend)
