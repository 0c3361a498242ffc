"""Translation of the precision plan for Megatron-Core and Transformer Engine's kernels.

Owns: the translation into `TransformerConfig` fields and Megatron's per-module precision file
(megatron/core/quantization/quant_config.py, 0.19), and the check that Megatron would give every
linear the plan's format. The check simulates Megatron's rules. Does not own: devices and versions,
modules, reading the formats back from a built model. No torch, no Transformer Engine.

Not tested on a Blackwell GPU: this module relies on Megatron's source code only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, Dtype, GemmFormat, LinearKind, PrecisionRule
from nemotron_train.plan.architecture.layers import Linear, linears, parse_pattern
from nemotron_train.plan.architecture.stages import stages
from nemotron_train.plan.precision.blocking import shard, tokens_per_product
from nemotron_train.plan.precision.resolve import PrecisionPlan
from nemotron_train.plan.precision.rules import NVFP4_OPTIONS, ROLES, Claim, last_layers

# Required multiple of the sizes of quantized products: cuBLAS requires summed dimensions in
# multiples of 32 in four bits, and Transformer Engine's NVFP4 and MXFP8 tensors require whole
# blocks along both dimensions.
_SIZE_MULTIPLE = 32

# Default format -> the multiple of rows to which Megatron pads each expert's tokens
# (moe_utils.get_align_size_for_quantization).
_EXPERT_TOKENS = {GemmFormat.bf16: 1, GemmFormat.nvfp4: 128, GemmFormat.mxfp8: 32}

# Environment variables that turn an NVFP4 option off for the whole process. Transformer Engine
# reads them when it is imported (transformer_engine/common/recipe/__init__.py, NVFP4BlockScaling).
_OPTION_OFF = {
    "weight_2d": "NVTE_NVFP4_DISABLE_2D_QUANTIZATION",
    "hadamard": "NVTE_NVFP4_DISABLE_RHT",
    "stochastic_rounding": "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING",
}

_BASE = {
    GemmFormat.bf16: {},
    GemmFormat.mxfp8: {"fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_param": False},
    GemmFormat.nvfp4: {"fp4": "e2m1", "fp4_recipe": "nvfp4", "fp4_param": False},
}
_RECIPE = {
    GemmFormat.bf16: {},
    GemmFormat.mxfp8: {"fp8_quantization_recipe": "mxfp8"},
    GemmFormat.nvfp4: {"fp4_quantization_recipe": "nvfp4"},
}
_KIND_GLOB = {
    LinearKind.mamba: "*.mixer.*",
    LinearKind.attention: "*.self_attention.*",
    LinearKind.moe: "*.mlp.*",
    LinearKind.mtp_projection: "mtp.*.eh_proj",
}
_MTP_PROJECTION = "mtp.layers.0.eh_proj"


@dataclass(frozen=True)
class _Matcher:
    """One entry of the per-module file. forced: quantize even outside Megatron's quantized
    contexts."""

    name: str
    pattern: str
    format: GemmFormat
    forced: bool

    @property
    def config_name(self) -> str:
        return f"{self.format}_forced" if self.forced else self.format


def to_transformer_engine(config: Config, plan: PrecisionPlan) -> dict[str, Any]:
    """The plan as four plain dictionaries.

    `configs` and `matchers`: the per-module file, for `RecipeConfig.from_config_dict`.
    `transformer_config`: fields of Megatron's TransformerConfig other than `quant_recipe`.
    `environment`: variables to set before Transformer Engine is imported.

    Raises ConfigError with the rule, phase or module if Megatron cannot express the plan: formats
    that differ between fprop, dgrad and wgrad; phases; NVFP4 options that differ between modules;
    quantized formats chosen by layer number; sizes that the kernels reject.
    """
    _refuse_other_dtypes_and_phases(config)
    chosen = [claim for claim in plan.claims if claim.name != "fixed"]
    for claim in chosen:
        _refuse_different_products(claim)
    _refuse_sizes(config, chosen)
    base = config.precision.default.format
    start, end = _bf16_layers(config, chosen)
    matchers = _matchers(config, chosen, base)
    _refuse_difference(config, chosen, matchers, base, (start, end))
    transformer_config: dict[str, Any] = dict(_BASE[base])
    if base != GemmFormat.bf16 and (start or end):
        transformer_config |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": start,
            "num_layers_at_end_in_bf16": end,
        }
    if _experts_quantized(chosen):
        if base == GemmFormat.bf16:
            raise ConfigError(
                "precision.default.format=bf16 with quantized routed experts: Megatron pads the "
                "tokens of experts only under a quantized default; exempt the other linears instead"
            )
        transformer_config["moe_router_padding_for_quantization"] = True
    return {
        "transformer_config": transformer_config,
        "environment": _environment(chosen),
        "configs": {matcher.config_name: _recipe(matcher) for matcher in matchers},
        "matchers": {
            matcher.name: {
                "config": matcher.config_name,
                "type": "glob",
                "pattern": matcher.pattern,
                "enabled": True,
            }
            for matcher in matchers
        },
    }


def _recipe(matcher: _Matcher) -> dict[str, Any]:
    recipe: dict[str, Any] = dict(_RECIPE[matcher.format])
    if matcher.forced:
        recipe["override_nonquantized_autocast"] = True
    return {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": recipe}


def _matchers(config: Config, chosen: Sequence[Claim], base: GemmFormat) -> list[_Matcher]:
    """One matcher or more per rule, in order, without the layer-number rules (see
    `_bf16_layers`)."""
    matchers = []
    for claim in chosen:
        rule = claim.format
        is_default = not isinstance(rule, PrecisionRule)
        if is_default or not claim.linears or _is_layer_rule(rule, config):
            continue
        patterns = _patterns(rule, claim.linears)
        for number, pattern in enumerate(patterns):
            name = claim.name if len(patterns) == 1 else f"{claim.name}_{number}"
            forced = base == GemmFormat.bf16 and rule.format != GemmFormat.bf16
            matchers.append(_Matcher(name, pattern, rule.format, forced))
    projection = {p.path: c.format.format for c in chosen for p in c.linears}.get(
        _MTP_PROJECTION, GemmFormat.bf16
    )
    if base == GemmFormat.nvfp4 and projection != GemmFormat.bf16:
        # Megatron enters its FP4 context layer by layer, and this projection is in no layer.
        matchers.insert(0, _Matcher("mtp_projection", _MTP_PROJECTION, projection, forced=True))
    return matchers


def _patterns(rule: PrecisionRule, chosen: Sequence[Linear]) -> list[str]:
    """The rule's condition as one glob, or, if it has several, one glob per matching module."""
    conditions = [rule.match] if rule.match != "*" else []
    if rule.layer_type != LinearKind.any:
        conditions.append(_KIND_GLOB[rule.layer_type])
    if rule.mtp:
        conditions.append("mtp.*")
    if rule.experts:
        conditions.append("*.mlp.experts.*")
    if len(conditions) == 1:
        return conditions
    return list(dict.fromkeys(re.sub(r"layers\.\d+\.", "layers.*.", c.path) for c in chosen))


def _bf16_layers(config: Config, chosen: Sequence[Claim]) -> tuple[int, int]:
    """The numbers of first and last layers in BF16, from the layer-number rules. Raises ConfigError
    if such a rule has other conditions or another format."""
    num_layers = _num_layers(config)
    start, end = 0, 0
    for claim in chosen:
        rule = claim.format
        if not isinstance(rule, PrecisionRule) or not _is_layer_rule(rule, config):
            continue
        at_end = last_layers(rule, num_layers)
        has_other_conditions = (
            rule.match != "*" or rule.layer_type != LinearKind.any or rule.mtp or rule.experts
        )
        if rule.format != GemmFormat.bf16 or has_other_conditions or (at_end and rule.first_layers):
            raise ConfigError(
                f"precision.rules.{claim.text}: Megatron chooses by layer number only whole first "
                "or last layers, and only BF16 for them; emulation can do this"
            )
        start, end = max(start, rule.first_layers), max(end, at_end)
    return start, end


def _is_layer_rule(rule: PrecisionRule, config: Config) -> bool:
    return bool(rule.first_layers or last_layers(rule, _num_layers(config)))


def _num_layers(config: Config) -> int:
    return sum(map(len, parse_pattern(config.model.pattern)))


def _experts_quantized(chosen: Sequence[Claim]) -> bool:
    return any(
        claim.format.format != GemmFormat.bf16 and ".mlp.experts." in linear.path
        for claim in chosen
        for linear in claim.linears
    )


def _environment(chosen: Sequence[Claim]) -> dict[str, str]:
    """The variables that turn NVFP4 options off. They apply to the whole process. Raises
    ConfigError if the NVFP4 linears have different options."""
    in_nvfp4 = [
        claim for claim in chosen if claim.linears and claim.format.format == GemmFormat.nvfp4
    ]
    environment = {}
    for option in NVFP4_OPTIONS:
        names = {getattr(claim.format, option): claim.name for claim in in_nvfp4}
        if len(names) > 1:
            raise ConfigError(
                f"{option} is true for {names[True]} and false for {names[False]}: Transformer "
                "Engine's NVFP4 options hold for the whole process; emulation can do this"
            )
        if False in names:
            environment[_OPTION_OFF[option]] = "1"
    return environment


# Simulation of Megatron's choice of formats -------------------------------------------------


def _refuse_difference(
    config: Config,
    chosen: Sequence[Claim],
    matchers: Sequence[_Matcher],
    base: GemmFormat,
    bf16_layers: tuple[int, int],
) -> None:
    """Raises ConfigError at the first linear whose format in Megatron would differ from the
    plan."""
    layers_per_stage = [len(stage.pattern) for stage in stages(config)]
    for claim in chosen:
        for linear in claim.linears:
            got = _megatron_format(linear.path, matchers, base, bf16_layers, layers_per_stage)
            if got != claim.format.format:
                raise ConfigError(
                    f"{linear.path}: {claim.text} asks for {claim.format.format}, but Megatron's "
                    f"per-module file would give {got}: it numbers layers from each pipeline "
                    "stage's first, and leaves its first and last BF16 layers in BF16; emulation "
                    "can do this"
                )


def _megatron_format(
    path: str,
    matchers: Sequence[_Matcher],
    base: GemmFormat,
    bf16_layers: tuple[int, int],
    layers_per_stage: Sequence[int],
) -> GemmFormat:
    """The format that Megatron-Core 0.19 chooses for a linear.

    The context of a layer quantizes if the layer is between the first and last BF16 layers, counted
    over the decoder; layers of the MTP block are counted from 0 (fp4_utils.get_fp4_context,
    HybridStack.forward). The MTP projection is inside an FP8 context, but not inside an FP4 context
    (MultiTokenPredictionLayer). Inside a context, the first matching recipe replaces the format;
    outside, only a forced recipe does (extensions/transformer_engine.py,
    _get_fp8_autocast_for_quant_recipe).
    """
    layer_match = re.search(r"(?:^decoder|mtp_model_layer)\.layers\.(\d+)\.", path)
    number = int(layer_match[1]) if layer_match else -1
    start, end = bf16_layers
    if number < 0:
        in_context = base == GemmFormat.mxfp8
    else:
        in_context = base != GemmFormat.bf16 and start <= number < sum(layers_per_stage) - end
    stage_path = path
    if path.startswith("decoder."):
        offsets = [0, *accumulate(layers_per_stage)]
        offset = max(offset for offset in offsets if offset <= number)
        stage_path = path.replace(f".{number}.", f".{number - offset}.", 1)
    for matcher in matchers:
        if fnmatchcase(stage_path, matcher.pattern):
            return matcher.format if in_context or matcher.forced else GemmFormat.bf16
    return base if in_context else GemmFormat.bf16


# Plans that Megatron cannot express ---------------------------------------------------------


def _refuse_other_dtypes_and_phases(config: Config) -> None:
    precision = config.precision
    if precision.parameter_dtype != Dtype.bfloat16:
        raise ConfigError(
            f"precision.parameter_dtype={precision.parameter_dtype}: Transformer Engine's "
            "quantized linears take bfloat16"
        )
    if precision.phases:
        raise ConfigError(
            f"precision.phases has {len(precision.phases)} phase(s): Megatron reads its precision "
            "once, when the model is built; end the run at the boundary and resume it under the "
            "next plan, or use emulation"
        )


def _refuse_different_products(claim: Claim) -> None:
    formats = {role: getattr(claim.format, role) for role in ROLES}
    if claim.linears and len(set(formats.values())) > 1:
        texts = ", ".join(f"{role}={value}" for role, value in formats.items())
        raise ConfigError(
            f"precision rule {claim.text}: {texts}: Megatron's per-module file has one format for "
            "all three products; emulation can do this"
        )


def _refuse_sizes(config: Config, chosen: Sequence[Claim]) -> None:
    formats = {linear.path: c.format.format for c in chosen for linear in c.linears}
    for linear in linears(config.model):
        if formats.get(linear.path, GemmFormat.bf16) == GemmFormat.bf16:
            continue
        local = shard(linear, config.parallel)
        sizes = {
            "input features": local.in_size,
            "output features": local.out_size,
            "tokens": tokens_per_product(linear, config),
        }
        for name, size in sizes.items():
            if size % _SIZE_MULTIPLE:
                raise ConfigError(
                    f"{linear.path} in {formats[linear.path]}: {size} {name} on a rank are no "
                    f"multiple of {_SIZE_MULTIPLE}, which Transformer Engine's kernels need; "
                    "emulation pads them"
                )
    if _experts_quantized(chosen):
        _refuse_few_tokens(config)


def _refuse_few_tokens(config: Config) -> None:
    """Megatron pads an expert's tokens with other tokens of the same rank, which it sends with a
    routing weight of zero. So the tokens of a rank must be whole blocks
    (moe_utils.pad_routing_map). Raises ConfigError if they are not."""
    train, parallel = config.train, config.parallel
    tokens = train.micro_batch_sequences * train.sequence_length // parallel.context
    tokens //= parallel.tensor if parallel.sequence else 1
    multiple = _EXPERT_TOKENS[config.precision.default.format]
    if tokens % multiple:
        raise ConfigError(
            f"routed experts: {tokens} tokens of a micro-batch on a rank are no multiple of "
            f"{multiple}, to which Megatron pads every expert's; emulation pads with zeros"
        )
