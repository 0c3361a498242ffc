"""The rules of a precision plan: which linears each rule applies to, and whether it has an effect.

Owns: the meaning of `precision.default` and `precision.rules`, and all errors about them. Does not
own: phases (`resolve`), the printed text (`text`), whether blocks fit the sizes (`blocking`). No
torch.

The first enabled rule whose conditions a linear meets decides. Two kinds of linears are excluded
from all rules, because no recipe or kernel quantizes them. Routers: a wrong choice of experts does
not average out, and the product is small (arXiv 2512.20856; Megatron-Core's moe_router_dtype). The
output layer: Megatron-Core keeps it out of its quantized contexts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import (
    Config,
    Dtype,
    FormatConfig,
    GemmFormat,
    LinearKind,
    ModelConfig,
    PrecisionRule,
)
from nemotron_train.plan.architecture.layers import LayerKind, Linear, layers, linears

ROLES = ("fprop", "dgrad", "wgrad")

# Each NVFP4 option and the products whose operands it changes.
NVFP4_OPTIONS = {
    "weight_2d": ("fprop", "dgrad"),
    "hadamard": ("wgrad",),
    "stochastic_rounding": ("dgrad", "wgrad"),
}

HIGH_PRECISION = {Dtype.bfloat16: GemmFormat.bf16, Dtype.float32: GemmFormat.float32}

_KIND_OF_LAYER = {
    LayerKind.mamba: LinearKind.mamba,
    LayerKind.attention: LinearKind.attention,
    LayerKind.moe: LinearKind.moe,
}
_ROUTER, _OUTPUT_LAYER = ".mlp.router", "output_layer"


@dataclass(frozen=True)
class Claim:
    """A rule (or the default) and the linears that it decides. `linears` is empty for an optional
    rule that matches none, and for a rule whose linears already got the same formats from earlier
    rules."""

    name: str
    condition: str
    format: FormatConfig
    linears: tuple[Linear, ...]

    @property
    def text(self) -> str:
        """The name, followed by the condition in parentheses if there is one."""
        return f"{self.name} ({self.condition})" if self.condition else self.name


@dataclass(frozen=True)
class _Place:
    """The properties of a linear that rules test. number: of its decoder layer, or -1 outside the
    decoder."""

    linear: Linear
    kind: LinearKind
    number: int
    in_mtp: bool


def claims(config: Config) -> list[Claim]:
    """All linears of the model, grouped by the rule that decides their formats: the rules in order,
    then the default, then the linears that are excluded from all rules.

    Raises ConfigError for a rule that matches no linear, for a rule or default that earlier rules
    override everywhere with other formats, and for a setting without effect.
    """
    precision = config.precision
    check_format("precision.default", precision.default, precision.parameter_dtype)
    places = list(_places(config.model))
    num_layers = sum(not layer.in_mtp for layer in layers(config.model))
    owner: dict[str, Claim] = {}
    result: list[Claim] = []
    for name, rule in precision.rules.items():
        if not rule.enabled:
            continue
        knob = f"precision.rules.{name}"
        check_format(knob, rule, precision.parameter_dtype)
        _check_layer_counts(knob, rule, num_layers)
        matched = [p.linear for p in places if _matches(rule, p, num_layers)]
        condition = _condition(rule, num_layers)
        if not matched and not rule.optional:
            raise ConfigError(_matches_nothing(knob, condition, rule, config.model))
        unclaimed_matches = tuple(linear for linear in matched if linear.path not in owner)
        if not unclaimed_matches:
            remedy = "move it before them or leave it out"
            _check_not_overridden(knob, rule, matched, owner, remedy)
        claim = Claim(name, condition, rule, unclaimed_matches)
        owner |= {linear.path: claim for linear in unclaimed_matches}
        result.append(claim)
    unclaimed = tuple(p.linear for p in places if p.linear.path not in owner)
    if not unclaimed:
        all_linears = [place.linear for place in places]
        remedy = "put the format of one of them here"
        _check_not_overridden("precision.default", precision.default, all_linears, owner, remedy)
    result.append(Claim("default", "", precision.default, unclaimed))
    return result + _fixed_claims(config)


def check_format(knob: str, format_config: FormatConfig, dtype: Dtype) -> None:
    """Raises ConfigError if a setting of one rule is invalid or has no effect."""
    formats = {role: getattr(format_config, role) for role in ROLES}
    check_used(f"{knob}.format={format_config.format}", format_config.format, formats)
    check_dtype(knob, formats, dtype)
    for option, roles in NVFP4_OPTIONS.items():
        is_used = any(formats[role] == GemmFormat.nvfp4 for role in roles)
        if not getattr(format_config, option) and not is_used:
            raise ConfigError(
                f"{knob}.{option}=false has no effect: it is an option of nvfp4, and "
                + " and ".join(f"{role}={formats[role]}" for role in roles)
            )


def check_used(setting: str, value: GemmFormat, formats: dict[str, GemmFormat]) -> None:
    """Raises ConfigError if all three products override the common format `value`."""
    if value not in formats.values():
        own_formats = ", ".join(f"{role}={formats[role]}" for role in ROLES)
        raise ConfigError(
            f"{setting} has no effect: all three products have their own, {own_formats}"
        )


def check_dtype(knob: str, formats: dict[str, GemmFormat], dtype: Dtype) -> None:
    """Raises ConfigError for an unquantized format that differs from the parameters' dtype."""
    high = HIGH_PRECISION[dtype]
    for role, value in formats.items():
        if value in HIGH_PRECISION.values() and value != high:
            raise ConfigError(
                f"{knob}: {role}={value} contradicts precision.parameter_dtype={dtype}; "
                f"unquantized products are in {high} here"
            )


def _places(model: ModelConfig) -> Iterator[_Place]:
    """Every linear to which rules can apply, in forward order."""
    inside = {
        linear.path: _Place(
            linear, _KIND_OF_LAYER[layer.kind], -1 if layer.in_mtp else layer.number, layer.in_mtp
        )
        for layer in layers(model)
        for linear in layer.linears
    }
    for linear in linears(model):
        if not _is_fixed(linear):
            outside = _Place(linear, LinearKind.mtp_projection, -1, in_mtp=True)
            yield inside.get(linear.path, outside)


def _is_fixed(linear: Linear) -> bool:
    return linear.path == _OUTPUT_LAYER or linear.path.endswith(_ROUTER)


def _fixed_claims(config: Config) -> list[Claim]:
    """The linears that are excluded from all rules."""
    fixed = [linear for linear in linears(config.model) if _is_fixed(linear)]
    routers = tuple(linear for linear in fixed if linear.path != _OUTPUT_LAYER)
    output = tuple(linear for linear in fixed if linear.path == _OUTPUT_LAYER)
    in_float32 = _uniform(GemmFormat.float32)
    in_high = _uniform(HIGH_PRECISION[config.precision.parameter_dtype])
    result = [Claim("fixed", "never quantized", in_high, output)]
    if routers:
        result.insert(0, Claim("fixed", "routers are float32", in_float32, routers))
    return result


def _uniform(value: GemmFormat) -> FormatConfig:
    return FormatConfig(format=value, fprop=value, dgrad=value, wgrad=value)


def _matches(rule: PrecisionRule, place: _Place, num_layers: int) -> bool:
    """Whether all conditions hold. Like Megatron's GlobMatcher on Linux, uses `fnmatchcase`."""
    if not fnmatchcase(place.linear.path, rule.match):
        return False
    if rule.layer_type not in (LinearKind.any, place.kind):
        return False
    if rule.mtp and not place.in_mtp:
        return False
    if rule.experts and ".mlp.experts." not in place.linear.path:
        return False
    num_last = last_layers(rule, num_layers)
    if rule.first_layers and not 0 <= place.number < rule.first_layers:
        return False
    return not num_last or place.number >= num_layers - num_last


def last_layers(rule: PrecisionRule, num_layers: int) -> int:
    """The number of last layers in the rule's condition; 0 without such a condition.

    A fraction is rounded to whole pairs of layers (a mixer and its experts), at least one pair. So
    0.15 gives 14 of Super's 88 layers and 16 of Ultra's 108 (arXiv 2604.12374, Table 3; arXiv
    2606.15007, section 2.2), and 8 of the 52 layers of the 8B hybrid in arXiv 2509.25149. No other
    rounding (to single layers, or always up or down) gives both 14 and 16.
    """
    if rule.last_fraction == 0:
        return rule.last_layers
    num_pairs = max(1, round(rule.last_fraction * num_layers / 2))
    return min(num_layers, 2 * num_pairs)


def _condition(rule: PrecisionRule, num_layers: int) -> str:
    parts = [rule.match] if rule.match != "*" else []
    if rule.layer_type != LinearKind.any:
        parts.append(f"layer_type {rule.layer_type}")
    if rule.mtp:
        parts.append("MTP block")
    if rule.experts:
        parts.append("routed experts")
    if rule.first_layers:
        parts.append(f"first {rule.first_layers} of {num_layers} layers")
    num_last = last_layers(rule, num_layers)
    if num_last:
        parts.append(f"last {num_last} of {num_layers} layers")
    return ", ".join(parts) or "every linear"


# Errors -------------------------------------------------------------------------------------


def _check_layer_counts(knob: str, rule: PrecisionRule, num_layers: int) -> None:
    for name in ("first_layers", "last_layers"):
        value = getattr(rule, name)
        if not 0 <= value <= num_layers:
            raise ConfigError(
                f"{knob}.{name}={value}: the decoder has {num_layers} layers; give 1 to "
                f"{num_layers}, or 0 for no condition"
            )
    if not 0 <= rule.last_fraction <= 1:
        raise ConfigError(
            f"{knob}.last_fraction={rule.last_fraction}: give a share of the decoder's "
            f"{num_layers} layers above 0 and up to 1, or 0 for no condition"
        )
    if rule.last_layers and rule.last_fraction:
        raise ConfigError(
            f"{knob}: last_layers={rule.last_layers} and last_fraction={rule.last_fraction} "
            "exclude each other; set one of them to 0"
        )


def _matches_nothing(knob: str, condition: str, rule: PrecisionRule, model: ModelConfig) -> str:
    fixed = [p.path for p in linears(model) if _is_fixed(p) and fnmatchcase(p.path, rule.match)]
    if fixed:
        return (
            f"{knob} ({condition}) matches only {fixed[0]}, which no rule can change: routers are "
            "always float32, and the output layer is never quantized"
        )
    return (
        f"{knob} ({condition}) matches no linear of model.name={model.name}; their paths are in "
        f"precision.txt or `plan`; {knob}.enabled=false leaves the rule out"
    )


def _check_not_overridden(
    knob: str, requested: FormatConfig, matched: list[Linear], owner: dict[str, Claim], remedy: str
) -> None:
    """For a rule without remaining linears: raises ConfigError unless the earlier rules gave all
    its linears the formats and options that it sets."""
    for linear in matched:
        earlier = owner[linear.path]
        if any(
            getattr(earlier.format, r) != getattr(requested, r) for r in (*ROLES, *NVFP4_OPTIONS)
        ):
            raise ConfigError(
                f"{knob} has no effect: all {len(matched)} linears it is for belong to earlier "
                f"rules ({linear.path} to precision.rules.{earlier.name}: {_text(earlier.format)}, "
                f"not {_text(requested)}); {remedy}"
            )


def _text(format_config: FormatConfig) -> str:
    formats = [getattr(format_config, role).value for role in ROLES]
    return formats[0] if len(set(formats)) == 1 else "/".join(formats)
