"""Selection of the backend for block-scaled formats: Transformer Engine kernels, or emulation.

Owns: the selection, a pure function of the configuration and of the known facts about the machine,
and the line that reports it. Does not own: known-bad combinations (`plan.guards`), the translation
for Megatron (`plan.precision.transformer_engine`). No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Backend, Config
from nemotron_train.plan.guards import (
    DATA_CENTER_BLACKWELL,
    Effect,
    Surroundings,
    enforce,
    findings,
)
from nemotron_train.plan.hardware import installed_versions
from nemotron_train.plan.precision.resolve import PrecisionPlan
from nemotron_train.plan.precision.transformer_engine import to_transformer_engine


@dataclass(frozen=True)
class Choice:
    """The selected backend. native: Transformer Engine, not emulation; text: one line for the user,
    "" if the plan has no block-scaled formats; environment: variables to set before Transformer
    Engine is imported, because it reads them then."""

    native: bool
    text: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def choose_backend(config: Config, plan: PrecisionPlan, surroundings: Surroundings) -> Choice:
    """Select the native or the emulated backend for a run on `surroundings.hardware`.

    `auto` selects native on a data-center Blackwell GPU if no guard refuses it and Megatron's
    per-module file can express the plan. In all other cases `auto` selects emulation, and `native`
    raises ConfigError: one line with the device, its capability, Transformer Engine's version and
    the emulated alternative.
    """
    hardware, backend = surroundings.hardware, config.precision.backend
    assert hardware is not None, "the machine of a run is known"
    if not plan.is_quantized:
        return Choice(native=False)
    if backend == Backend.emulated:
        return Choice(False, _text(config, "emulated", "precision.backend=emulated"))
    if backend == Backend.auto and not hardware.cuda:
        return Choice(False, _text(config, "emulated", hardware.device_name))
    try:
        if backend == Backend.auto and hardware.capability not in DATA_CENTER_BLACKWELL:
            raise ConfigError("no Blackwell data-center GPU, compute capability 10.0 or 10.3")
        environment = _native_environment(config, plan, surroundings)
    except ConfigError as error:
        reason = f"{hardware.describe()}: {error}"
        if backend == Backend.native:
            raise ConfigError(
                f"precision.backend=native: {reason}; precision.backend=emulated computes the same "
                "formats here"
            ) from None
        return Choice(False, _text(config, "emulated", reason))
    return Choice(True, _text(config, "native", hardware.describe()), environment)


def check_planned(config: Config, plan: PrecisionPlan) -> list[str]:
    """Warnings, one line each, for a run on another machine. Its device is unknown, and its
    packages are assumed to be those installed here.

    Raises ConfigError if a guard refuses the run, or if `precision.backend=native` needs what
    Megatron's per-module file cannot express.
    """
    native = config.precision.backend == Backend.native
    native = native and plan.is_quantized
    if native:
        try:
            _native_environment(config, plan, Surroundings())
        except ConfigError as error:
            raise ConfigError(f"precision.backend=native: {error}") from None
    warnings: list[str] = []
    surroundings = Surroundings(packages=installed_versions(), native=native)
    enforce(config, plan, surroundings, warnings.append)
    return warnings


def _native_environment(
    config: Config, plan: PrecisionPlan, surroundings: Surroundings
) -> Mapping[str, str]:
    """Transformer Engine's environment variables for this plan. Raises ConfigError if a guard
    refuses the native backend, if telemetry is on, or if Megatron's per-module file cannot express
    the plan."""
    for finding in findings(config, plan, replace(surroundings, native=True)):
        if finding.effect is Effect.refuse:
            raise ConfigError(finding.text)
    if config.precision.telemetry.every > 0:
        raise ConfigError(
            f"precision.telemetry.every={config.precision.telemetry.every}: telemetry looks at "
            "emulated products"
        )
    return to_transformer_engine(config, plan)["environment"]


def _text(config: Config, backend: str, reason: str) -> str:
    return f"precision {config.precision.name}: {backend} ({reason})"
