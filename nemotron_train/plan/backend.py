"""What computes a plan's block formats in a run: Transformer Engine's kernels, or emulation.

Owns the decision, a pure function of the configuration and of what is known about the machine, and
the line that says it. Does not own: what is known to be bad (`plan.guards`), the translation for
Megatron (`transformer_engine`), any module. No torch.
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
    """text: one line for the user, "" where there is nothing to choose; environment: what to set
    before Transformer Engine is imported, for it reads the variables then."""

    native: bool
    text: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def choose_backend(config: Config, plan: PrecisionPlan, surroundings: Surroundings) -> Choice:
    """Native or emulated, for a run on `surroundings.hardware`.

    `auto` is native on a data-center Blackwell GPU where no guard refuses it and Megatron's
    per-module file can say the plan. Raises ConfigError under `native` otherwise, in one line
    with the device, its capability, Transformer Engine's version and the emulated alternative.
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
    """What a run elsewhere would be warned of, one line each, as far as it is known here: the
    device is not, and packages are taken to be those installed here.

    Raises ConfigError where a guard refuses the run already, or where `precision.backend=native`
    asks for what Megatron's per-module file cannot say.
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
    """Transformer Engine's variables for this plan. Raises ConfigError where a guard refuses the
    native path or Megatron's per-module file cannot say the plan."""
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
