"""The precision plan: the format of each matrix product of every linear, in each phase.

Owns: `PrecisionPlan`, resolved once from a configuration, and its phases. Does not own: the
matching of rules (`rules`), block sizes (`blocking`), the printed text (`text`), arithmetic, or
modules. No torch.

A linear has three products: `fprop` y = x W^T, `dgrad` dx = dy W, `wgrad` dW = dy^T x.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import (
    AtLeast,
    Config,
    Dtype,
    FormatConfig,
    GemmFormat,
    PrecisionPhase,
    ProbeFormat,
)
from nemotron_train.plan.architecture.layers import forward_flops, linears
from nemotron_train.plan.precision.blocking import Padding, paddings
from nemotron_train.plan.precision.rules import (
    NVFP4_OPTIONS,
    ROLES,
    Claim,
    check_dtype,
    check_used,
    claims,
)


@dataclass(frozen=True)
class LinearFormats:
    """The formats of a linear's products, and its NVFP4 options. An option is False if it affects
    no product of the linear."""

    fprop: GemmFormat
    dgrad: GemmFormat
    wgrad: GemmFormat
    weight_2d: bool
    hadamard: bool
    stochastic_rounding: bool

    @property
    def products(self) -> tuple[GemmFormat, GemmFormat, GemmFormat]:
        """The formats of fprop, dgrad and wgrad."""
        return self.fprop, self.dgrad, self.wgrad

    @property
    def is_quantized(self) -> bool:
        """Whether any product is in a block-scaled format."""
        return any(product.is_block_scaled for product in self.products)


@dataclass(frozen=True)
class LinearPrecision:
    """One linear module under the plan. rule: name of the rule that decided, with its condition in
    parentheses; flops: forward FLOPs per token, which is the cost of each of the three products."""

    path: str
    formats: LinearFormats
    rule: str
    flops: int


@dataclass(frozen=True)
class PlanPhase:
    """The plan from `from_tokens` trained tokens until the next phase. linears: every linear of the
    model, in forward order (`plan.architecture.layers.linears`); at_least: the lower bound of the
    phase, None if there is none; paddings: products that are padded to whole blocks."""

    from_tokens: int
    linears: tuple[LinearPrecision, ...]
    at_least: AtLeast | None
    paddings: tuple[Padding, ...]

    @cached_property
    def formats(self) -> Mapping[str, LinearFormats]:
        """Module path (with global layer numbers) -> formats."""
        return {linear.path: linear.formats for linear in self.linears}


@dataclass(frozen=True)
class PrecisionPlan:
    """The resolved precision of a configuration. phases: in order, the first starts at 0 tokens;
    linears_share: share of the linears in the FLOPs of the model, equal in the forward pass and in
    training."""

    name: str
    model_name: str
    parameter_dtype: Dtype
    claims: tuple[Claim, ...]
    phases: tuple[PlanPhase, ...]
    linears_share: float

    @property
    def boundaries(self) -> list[int]:
        """Numbers of trained tokens at which phases start, in order; the first is 0. The first step
        that starts at or after a boundary uses the new formats."""
        return [phase.from_tokens for phase in self.phases]

    def at(self, tokens: int) -> PlanPhase:
        """The phase of the optimizer step that starts after `tokens` trained tokens."""
        return self.phases[bisect_right(self.boundaries, tokens) - 1]

    @cached_property
    def formats_used(self) -> frozenset[GemmFormat]:
        """The formats of all products in all phases, including routers and the output layer."""
        return frozenset(
            product
            for phase in self.phases
            for linear in phase.linears
            for product in linear.formats.products
        )

    @property
    def is_quantized(self) -> bool:
        """Whether any product of any phase is in a block-scaled format."""
        return any(used.is_block_scaled for used in self.formats_used)


def resolve_plan(config: Config) -> PrecisionPlan:
    """Resolve and check the plan of `config`. The composition root calls this once (through
    `plan.derive.derive`) and passes the plan on.

    Raises ConfigError, one line with the knob and the names or sizes, if a rule, an option or a
    phase has no effect or is out of range, or if a shard boundary lies inside a block.
    """
    precision = config.precision
    rules = tuple(claims(config))
    base = _phase(config, rules, 0, None)
    _check_telemetry(config, base.linears)
    starts = _phase_starts(config)
    phases = [] if 0 in starts else [base]
    before = base
    for number, (start, phase) in enumerate(zip(starts, precision.phases, strict=True)):
        knob = f"precision.phases[{number}].at_least"
        bounds = {role: getattr(phase.at_least, role) for role in ROLES}
        check_dtype(knob, bounds, precision.parameter_dtype)
        common = phase.at_least.format
        if common != GemmFormat.nvfp4:  # as a lower bound, nvfp4 has no effect anyway
            check_used(f"{knob}.format={common}", common, bounds)
        resolved = _phase(config, rules, start, phase.at_least)
        if resolved.formats == before.formats:
            raise ConfigError(
                f"{knob}: changes nothing at {start} tokens; every product already has the "
                f"format that fprop={bounds['fprop']}, dgrad={bounds['dgrad']}, "
                f"wgrad={bounds['wgrad']} would give it"
            )
        phases.append(resolved)
        before = resolved
    flops = sum(linear.flops for linear in linears(config.model))
    return PrecisionPlan(
        name=precision.name,
        model_name=config.model.name,
        parameter_dtype=precision.parameter_dtype,
        claims=rules,
        phases=tuple(phases),
        linears_share=flops / forward_flops(config.model, config.train.sequence_length),
    )


def share_of_flops(
    linears: Iterable[LinearPrecision], roles: Sequence[str] = ROLES
) -> dict[GemmFormat, float]:
    """Format -> share of FLOPs, over these linears and these products. Largest first; the shares
    sum to 1."""
    flops: dict[GemmFormat, int] = {}
    for linear in linears:
        for role in roles:
            product: GemmFormat = getattr(linear.formats, role)
            flops[product] = flops.get(product, 0) + linear.flops
    total = sum(flops.values())
    ordered = sorted(flops.items(), key=lambda item: -item[1])
    return {product: count / total for product, count in ordered}


def _phase(
    config: Config, rules: Sequence[Claim], from_tokens: int, at_least: AtLeast | None
) -> PlanPhase:
    """Every linear's formats under the rules and a lower bound. Raises ConfigError if a shard
    boundary lies inside a block."""
    by_path = {
        linear.path: LinearPrecision(
            path=linear.path,
            formats=_formats(claim.format, at_least),
            rule=claim.text,
            flops=linear.flops,
        )
        for claim in rules
        for linear in claim.linears
    }
    model_linears = linears(config.model)
    resolved = tuple(by_path[linear.path] for linear in model_linears)
    formats = [linear.formats for linear in resolved]
    padded = paddings(config, zip(model_linears, formats, strict=True))
    return PlanPhase(from_tokens, resolved, at_least, tuple(padded))


def _formats(rule: FormatConfig, at_least: AtLeast | None) -> LinearFormats:
    order = list(GemmFormat)  # from the lowest precision up
    chosen = {role: getattr(rule, role) for role in ROLES}
    if at_least is not None:
        chosen = {
            role: max(value, getattr(at_least, role), key=order.index)
            for role, value in chosen.items()
        }
    options = {
        option: getattr(rule, option) and any(chosen[r] == GemmFormat.nvfp4 for r in roles)
        for option, roles in NVFP4_OPTIONS.items()
    }
    return LinearFormats(chosen["fprop"], chosen["dgrad"], chosen["wgrad"], **options)


def _check_telemetry(config: Config, linears: Iterable[LinearPrecision]) -> None:
    telemetry = config.precision.telemetry
    if telemetry.every < 0:
        raise ConfigError(
            f"precision.telemetry.every={telemetry.every}: give a number of steps, or 0 for never"
        )
    if telemetry.every == 0 and telemetry.probe != ProbeFormat.none:
        raise ConfigError(
            f"precision.telemetry.probe={telemetry.probe} has no effect without a number of steps "
            "in precision.telemetry.every"
        )
    is_quantized = any(linear.formats.is_quantized for linear in linears)
    measures = telemetry.probe != ProbeFormat.none or is_quantized
    if telemetry.every > 0 and not measures:
        raise ConfigError(
            f"precision.telemetry.every={telemetry.every}: precision={config.precision.name} "
            "quantizes nothing to measure; precision.telemetry.probe=nvfp4 measures what NVFP4 "
            "would lose"
        )


def _phase_starts(config: Config) -> list[int]:
    """Start of each phase in trained tokens. Raises ConfigError unless the starts increase and lie
    within the run."""
    total = config.train.total_tokens
    starts: list[int] = []
    for number, phase in enumerate(config.precision.phases):
        knob = f"precision.phases[{number}]"
        start = _phase_start(config, phase, knob)
        if start >= total:
            raise ConfigError(
                f"{knob} starts at {start} tokens, but train.total_tokens={total}: the run ends "
                "before it begins"
            )
        if starts and start <= starts[-1]:
            raise ConfigError(
                f"{knob} starts at {start} tokens and the phase before it at {starts[-1]}: phases "
                "must be written in the order they begin, each later than the last"
            )
        starts.append(start)
    return starts


def _phase_start(config: Config, phase: PrecisionPhase, knob: str) -> int:
    start_knobs = {
        name: getattr(phase, name)
        for name in ("from_tokens", "from_fraction", "with_decay")
        if getattr(phase, name)
    }
    if len(start_knobs) > 1:
        settings = " and ".join(f"{name}={value}" for name, value in start_knobs.items())
        raise ConfigError(f"{knob}: {settings} give its start twice; keep one")
    if phase.from_tokens < 0:
        raise ConfigError(f"{knob}.from_tokens={phase.from_tokens}: must be 0 or more")
    if not 0 <= phase.from_fraction < 1:
        raise ConfigError(
            f"{knob}.from_fraction={phase.from_fraction}: must be at least 0 and below 1"
        )
    if not phase.with_decay:
        return phase.from_tokens + round(phase.from_fraction * config.train.total_tokens)
    if config.optim.decay_tokens == 0:
        raise ConfigError(
            f"{knob}.with_decay=true, but optim.decay_tokens=0: the learning rate never decays"
        )
    return config.train.total_tokens - config.optim.decay_tokens
