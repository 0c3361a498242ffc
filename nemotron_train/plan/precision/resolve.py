"""The precision plan: which format every linear's three matrix products are computed in, and when.

Owns the resolution of a configuration to one format per module, product and phase, and its text
(`precision.txt` in the run folder, the precision part of `plan`). Does not own: what a rule matches
(rules.py), sizes against blocks (blocking.py), arithmetic, or any module. No torch.

A linear has three products: `fprop` y = x W^T, `dgrad` dx = dy W, `wgrad` dW = dy^T x.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import (
    AtLeast,
    Config,
    FormatConfig,
    GemmFormat,
    PrecisionPhase,
    ProbeFormat,
)
from nemotron_train.plan.architecture.layers import forward_flops, linears
from nemotron_train.plan.precision.blocking import BLOCK, EXPERT_ROWS, paddings
from nemotron_train.plan.precision.rules import (
    NVFP4_OPTIONS,
    ROLES,
    check_dtype,
    check_used,
    claims,
)


@dataclass(frozen=True)
class LinearFormats:
    """The format of each product (`nvfp4`, `mxfp8`, `bf16` or `float32`) and NVFP4's options,
    which are False where no product of the linear is concerned."""

    fprop: str
    dgrad: str
    wgrad: str
    weight_2d: bool
    hadamard: bool
    stochastic_rounding: bool


@dataclass(frozen=True)
class LinearPrecision:
    """One linear module under the plan. rule: the name of what decided, its condition in
    parentheses. `flops` is the forward cost a token: each of the three products costs as much."""

    path: str
    formats: LinearFormats
    rule: str
    flops: int


def resolve(config: Config, tokens: int = 0) -> list[LinearPrecision]:
    """One entry for every linear of the model, in forward order (see `shape.linears`), as the
    optimizer step computes that starts after `tokens` trained tokens."""
    phases = config.precision.phases
    current = bisect_right(_phase_starts(config), tokens) - 1
    return _resolve(config, phases[current].at_least if current >= 0 else None)


def formats_at(config: Config, tokens: int) -> dict[str, LinearFormats]:
    """Module path, with layer numbers of the whole model -> formats, as `resolve` has them."""
    return {entry.path: entry.formats for entry in resolve(config, tokens)}


def phase_boundaries(config: Config) -> list[int]:
    """Trained tokens at which `formats_at` changes, in order; the first is 0. The first step that
    starts at or after a boundary is the first under the new formats."""
    return sorted({0, *_phase_starts(config)})


def check_plan(config: Config) -> None:
    """Raises ConfigError, one line with the knob and the names or sizes, for a rule, an option or
    a phase that has no effect or is out of range, and for blocks that ranks would cut through."""
    dtype = config.precision.parameter_dtype
    plan = _resolve(config, None)
    padding_lines(config, plan)
    _check_telemetry(config, plan)
    phases = config.precision.phases
    for number, (start, phase) in enumerate(zip(_phase_starts(config), phases, strict=True)):
        knob = f"precision.phases[{number}].at_least"
        bounds = {role: getattr(phase.at_least, role) for role in ROLES}
        check_dtype(knob, bounds, dtype)
        common = phase.at_least.format
        if common != GemmFormat.nvfp4:  # which raises nothing anyway
            check_used(f"{knob}.format={common}", common, bounds)
        before, plan = plan, _resolve(config, phase.at_least)
        if [entry.formats for entry in before] == [entry.formats for entry in plan]:
            raise ConfigError(
                f"{knob}: changes nothing at {start} tokens; every product already has the "
                f"format that fprop={bounds['fprop']}, dgrad={bounds['dgrad']}, "
                f"wgrad={bounds['wgrad']} would give it"
            )
        padding_lines(config, plan)


def _check_telemetry(config: Config, plan: Iterable[LinearPrecision]) -> None:
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
    formats = {getattr(entry.formats, role) for entry in plan for role in ROLES}
    measures = telemetry.probe != ProbeFormat.none or formats & set(BLOCK)
    if telemetry.every > 0 and not measures:
        raise ConfigError(
            f"precision.telemetry.every={telemetry.every}: precision={config.precision.name} "
            "quantizes nothing to measure; precision.telemetry.probe=nvfp4 measures what NVFP4 "
            "would lose"
        )


def share_of_flops(
    plan: Iterable[LinearPrecision], roles: Sequence[str] = ROLES
) -> dict[str, float]:
    """Format -> its share of the FLOPs of all linears in these products, largest first; the
    shares sum to 1. Attention, scan and convolution are no linears (`linears_share`)."""
    flops: dict[str, int] = {}
    for entry in plan:
        for role in roles:
            name = getattr(entry.formats, role)
            flops[name] = flops.get(name, 0) + entry.flops
    total = sum(flops.values())
    ordered = sorted(flops.items(), key=lambda item: -item[1])
    return {name: count / total for name, count in ordered}


def linears_share(config: Config) -> float:
    """The linears' share of all FLOPs of the model; forward or training, it is the same."""
    flops = sum(linear.flops for linear in linears(config.model))
    return flops / forward_flops(config.model, config.train.sequence_length)


# Phases -------------------------------------------------------------------------------------


def _phase_starts(config: Config) -> list[int]:
    """Start of each phase in trained tokens; ConfigError unless they increase within the run."""
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
    given = {
        name: getattr(phase, name)
        for name in ("from_tokens", "from_fraction", "with_decay")
        if getattr(phase, name)
    }
    if len(given) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(f"{knob}: {both} give its start twice; keep one")
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


def _resolve(config: Config, at_least: AtLeast | None) -> list[LinearPrecision]:
    found = {
        linear.path: LinearPrecision(
            path=linear.path,
            formats=_formats(claim.format, at_least),
            rule=claim.text,
            flops=linear.flops,
        )
        for claim in claims(config)
        for linear in claim.linears
    }
    return [found[linear.path] for linear in linears(config.model)]


def _formats(asked: FormatConfig, at_least: AtLeast | None) -> LinearFormats:
    order = list(GemmFormat)  # from the lowest precision up
    chosen = {role: getattr(asked, role) for role in ROLES}
    if at_least is not None:
        chosen = {
            role: max(value, getattr(at_least, role), key=order.index)
            for role, value in chosen.items()
        }
    options = {
        option: getattr(asked, option) and any(chosen[r] == GemmFormat.nvfp4 for r in roles)
        for option, roles in NVFP4_OPTIONS.items()
    }
    fprop, dgrad, wgrad = (chosen[role].value for role in ROLES)
    return LinearFormats(fprop, dgrad, wgrad, **options)


# Text ---------------------------------------------------------------------------------------


def options_text(formats: LinearFormats) -> str:
    """What the linear leaves out of NVFP4's recipe: `without hadamard`, or nothing."""
    missing = [
        option
        for option, roles in NVFP4_OPTIONS.items()
        if not getattr(formats, option) and any(getattr(formats, r) == "nvfp4" for r in roles)
    ]
    return f"without {', '.join(missing)}" if missing else ""


def rule_text(entry: LinearPrecision) -> str:
    """What chose the formats, and what is left out of NVFP4's recipe."""
    return "; ".join(filter(None, (entry.rule, options_text(entry.formats))))


def phase_text(config: Config, tokens: int) -> str:
    """One line about the phase in force after `tokens` trained tokens."""
    boundaries = phase_boundaries(config)
    current = bisect_right(boundaries, tokens) - 1
    reach = f"from {boundaries[current]:,}"
    if current + 1 < len(boundaries):
        reach += f" to {boundaries[current + 1]:,}"
    started = bisect_right(_phase_starts(config), tokens)
    if not started:
        return f"{reach} tokens: the rules as they are"
    at_least = config.precision.phases[started - 1].at_least
    bounds = {role: getattr(at_least, role) for role in ROLES}
    if len(set(bounds.values())) == 1:
        bounds = {"all three products": at_least.fprop}
    raised = [f"{value} in {role}" for role, value in bounds.items() if value != GemmFormat.nvfp4]
    bound = f"at least {', '.join(raised)}" if raised else "the rules as they are"
    return f"{reach} tokens: {bound}"


def padding_lines(config: Config, plan: list[LinearPrecision]) -> list[str]:
    """One line for every sum that is padded with zeros to whole blocks, and one for the tokens
    of routed experts. Raises ConfigError where ranks cut through blocks."""
    formats = [entry.formats for entry in plan]
    padded = paddings(config, zip(linears(config.model), formats, strict=True))
    found = [
        f"{p.path}: {p.role} in {p.format} sums over {p.size}, padded to {p.padded}" for p in padded
    ]
    in_experts = {e.formats.wgrad for e in plan if ".mlp.experts." in e.path}
    if in_experts.intersection(BLOCK):
        found.append(
            "routed experts: wgrad sums over an expert's tokens, padded to a multiple of "
            f"{EXPERT_ROWS}, whole blocks in either format"
        )
    return found


def plan_text(config: Config) -> str:
    """The whole plan as aligned plain text: what `precision.txt` in the run folder holds."""
    precision = config.precision
    lines = [f"precision plan {precision.name}, model {config.model.name}", ""]
    lines += ["Rules; the first that matches a linear chooses its formats."]
    lines += _aligned(
        [
            ("rule", "matches", *ROLES, "linears"),
            *(
                (
                    claim.name,
                    claim.condition or "what no rule matches",
                    *(getattr(claim.format, role).value for role in ROLES),
                    str(len(claim.linears)),
                )
                for claim in claims(config)
            ),
        ]
    )
    lines += [
        "NVFP4 has 16x16 weight blocks, a Hadamard transform of wgrad's operands and stochastic",
        "rounding of gradients, unless a linear says without.",
        f"Shares are of the linears' training FLOPs, {linears_share(config):.1%} of the model's.",
    ]
    for tokens in phase_boundaries(config):
        plan = resolve(config, tokens)
        lines += ["", f"Phase {phase_text(config, tokens)}"]
        lines += _aligned([("share of FLOPs", *ROLES, "all three"), *share_rows(plan)])
        lines += padding_lines(config, plan)
        rows = [
            (e.path, e.formats.fprop, e.formats.dgrad, e.formats.wgrad, rule_text(e)) for e in plan
        ]
        lines += ["", *_aligned([("linear", *ROLES, "rule"), *rows])]
    return "\n".join(lines) + "\n"


def share_rows(plan: list[LinearPrecision]) -> list[tuple[str, ...]]:
    """Format and its share of FLOPs in fprop, dgrad, wgrad and all three, largest first."""
    columns = [share_of_flops(plan, roles) for roles in (*((role,) for role in ROLES), ROLES)]
    return [(name, *(f"{shares.get(name, 0):.3%}" for shares in columns)) for name in columns[-1]]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
