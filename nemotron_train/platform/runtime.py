"""Startup of a training or generation process: device, precision backend, process groups.

Owns: the order of these steps. CUDA's environment variables come first, because CUDA reads them
when it starts. The device comes next, because Megatron-Core can be imported only after it; then the
backend's environment variables, because Transformer Engine reads them when it is imported; then the
import of the optional packages. The guards come last, because they check all of it. Does not own:
the decisions (`plan.backend`, `plan.switches`, `plan.guards`), the device (`device`), the packages
(`packages`), the process groups (`groups`).
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from nemotron_train.config.gpu import Dispatcher, Switch
from nemotron_train.config.schema import Config, ParallelConfig
from nemotron_train.plan.backend import Choice, choose_backend
from nemotron_train.plan.guards import Surroundings, enforce
from nemotron_train.plan.hardware import Hardware, installed_versions
from nemotron_train.plan.precision.resolve import PrecisionPlan
from nemotron_train.plan.switches import (
    CAUSAL_CONV1D,
    MAMBA_SSM,
    PACKAGES,
    TRANSFORMER_ENGINE,
    Facts,
    choose_switches,
    for_inference,
)
from nemotron_train.platform import device, packages
from nemotron_train.platform.cores import PROCESS_START, sharing_text
from nemotron_train.platform.device import Platform


@dataclass(frozen=True)
class Runtime:
    """The device of this process, the backend for the plan's block-scaled formats, and the optional
    packages that cannot be used on this GPU, with the reason. `start_ranks` connects the process to
    the other ranks; `stop_ranks` disconnects it."""

    platform: Platform
    backend: Choice
    unusable: Mapping[str, str] = field(default_factory=dict)

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
    trains: bool = True,
) -> Runtime:
    """Prepare this process to compute `config` under `plan`, before Megatron-Core is imported.

    threads: CPU threads of torch; 0 for this rank's share of the cores. say: called with each
    warning, one line; show: called with each line that describes the device, the backend or the
    switches. trains: False for a process that evaluates or generates: it has the switches of a
    forward pass (`switches.for_inference`), and what a run demands with `on` is `auto` for it.
    Raises ConfigError if a guard rejects the combination, if `precision.backend=native` is not
    available, or if a knob of `gpu` asks for what cannot work here.
    """
    os.environ.update(cuda_environment(config.parallel, os.environ))
    platform = device.prepare(threads)
    hardware = device.hardware(platform)
    if config.gpu.transformer_engine == Switch.off:
        hardware = replace(hardware, transformer_engine=None)
    surroundings = Surroundings(hardware, installed_versions(), dict(os.environ), native=False)
    backend = choose_backend(config, plan, surroundings)
    os.environ.update(backend.environment)
    problems = _problems(config, platform)
    is_found = platform.device != "cpu" and hardware.transformer_engine is not None
    if is_found and TRANSFORMER_ENGINE in problems:
        for name in backend.environment:
            os.environ.pop(name)
        surroundings = replace(surroundings, hardware=replace(hardware, transformer_engine=None))
        backend = choose_backend(config, plan, surroundings)
    platform = device.with_packages(platform, problems)
    versions = dict(surroundings.packages)
    if MAMBA_SSM in problems:  # its faults do not matter where it is not used
        versions.pop("mamba-ssm", None)
    surroundings = replace(surroundings, packages=versions, native=backend.native)
    capability = hardware.capability or (0, 0)
    facts = Facts(platform.device != "cpu", problems, backend.native, capability)
    switches = choose_switches(config if trains else _without_options(config), plan, facts)
    if not trains:
        switches = for_inference(switches)
    platform = replace(platform, switches=switches)
    for line in packages.unusable_lines(problems) if platform.device != "cpu" else []:
        say(f"warning: {line}")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first_line = " · ".join(
        filter(None, (platform.describe(), sharing_text(PROCESS_START, local_ranks)))
    )
    for line in filter(None, (first_line, backend.text, switches.text)):
        if show is not None:
            show(line)
    for line in filter(None, [queue_warning(config.parallel, hardware, os.environ)]):
        say(f"warning: {line}")
    enforce(config, plan, surroundings, say)
    return Runtime(platform, backend, problems if platform.device != "cpu" else {})


def usable_platform(threads: int) -> Platform:
    """The platform of a process without a run's configuration, such as a benchmark: every package
    that can be used, every switch off. Before Megatron-Core is imported."""
    platform = device.prepare(threads)
    if platform.device == "cpu":
        return platform
    return device.with_packages(platform, packages.problems())


def _without_options(config: Config) -> Config:
    """The configuration without the demands of training: what a run insists on may not work, and
    is not needed, where its checkpoint is read."""
    knobs = {name: Switch.auto for name, value in vars(config.gpu).items() if value == Switch.on}
    gpu = replace(
        config.gpu, **knobs, moe_token_dispatcher=Dispatcher.alltoall, tp_comm_overlap=False
    )
    return replace(config, gpu=gpu)


def cuda_environment(parallel: ParallelConfig, environment: Mapping[str, str]) -> Mapping[str, str]:
    """Variables to set before CUDA starts. What the user has set stays.

    With one hardware queue, kernels run in the order in which they are queued. Megatron's
    tensor-parallel linears queue the communication first, so that it runs beside the product
    (tensor_parallel/layers.py); context parallelism's exchanges do, too. mamba_ssm's backward pass
    adds atomically, in any order, unless it is told to be deterministic; a resumed run would then
    not equal the uninterrupted one in every bit.
    """
    wanted = {"MAMBA_DETERMINISTIC": "1"}
    if parallel.tensor > 1 or parallel.context > 1:
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return {name: value for name, value in wanted.items() if name not in environment}


def queue_warning(
    parallel: ParallelConfig, hardware: Hardware, environment: Mapping[str, str]
) -> str:
    """A warning if the user's number of hardware queues prevents the overlap of `cuda_environment`;
    "" if not, and for GPUs since Blackwell, for which Megatron no longer asks for one queue."""
    value = environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    needs_one = parallel.tensor > 1 or parallel.context > 1
    if value == "1" or not needs_one or hardware.capability is None:
        return ""
    if hardware.capability >= (10, 0):
        return ""
    return (
        f"CUDA_DEVICE_MAX_CONNECTIONS={value} in the environment: with "
        f"parallel.tensor={parallel.tensor} and parallel.context={parallel.context} on "
        f"{hardware.device_name}, communication overlaps with products only with 1"
    )


def _problems(config: Config, platform: Platform) -> dict[str, str]:
    """The packages that cannot be used, and why. Imports none on a CPU."""
    if platform.device == "cpu":
        return dict.fromkeys(PACKAGES, "there is no CUDA device")
    gpu = config.gpu
    knobs = {
        TRANSFORMER_ENGINE: gpu.transformer_engine,
        MAMBA_SSM: gpu.mamba_ssm,
        CAUSAL_CONV1D: gpu.causal_conv1d,
    }
    return packages.problems([name for name, value in knobs.items() if value == Switch.off])
