"""Output of `nemotron-train plan`: layers, parameters, precision, training, ranks, memory.

Owns: the layout of these tables. Does not own: any number in them (`plan.architecture.layers`,
`plan.precision.resolve`, `plan.derive`, `plan.cost.memory`). Imports neither torch nor matplotlib.
"""

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemotron_train.config.quantities import exact, format_bytes, format_count
from nemotron_train.config.schema import Config, ModelConfig
from nemotron_train.plan.architecture.layers import (
    LayerKind,
    LayerShape,
    Linear,
    Tensor,
    embedding_tensors,
    expert_width,
    forward_flops,
    head_tensors,
    layers,
    linears,
    mtp_tensors,
    parameters,
)
from nemotron_train.plan.derive import Derived
from nemotron_train.plan.precision.resolve import PlanPhase, PrecisionPlan
from nemotron_train.plan.precision.text import padding_lines, phase_text, rule_text, share_rows
from nemotron_train.report.plan.communication import (
    TRAFFIC_SIZES,
    traffic_columns,
    traffic_lines,
    traffic_rows,
)
from nemotron_train.report.plan.memory import MEMORY_COLUMNS, memory_lines, memory_rows
from nemotron_train.report.plan.ranks import GROUP_COLUMNS, group_rows
from nemotron_train.report.plan.stages import STAGE_COLUMNS, balance_lines, stage_rows

_KIND_NAMES = {
    LayerKind.mamba: "Mamba-2",
    LayerKind.attention: "attention",
    LayerKind.moe: "mixture of experts",
}
NUMERIC = {
    "parameters",
    "active",
    "FLOPs",
    "share",
    "count",
    *MEMORY_COLUMNS[1:],
    *TRAFFIC_SIZES,
}
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def print_plan(config: Config, derived: Derived, console: Console, *, layers: bool = False) -> None:
    """Prints the whole plan; with `layers`, also a table with one row per layer.

    Uses colours and rules only on a terminal. Works at any width: long cells are wrapped, never
    truncated, so a log loses nothing.
    """
    _print_pattern(config, console)
    _print_table(console, "Layers", _KIND_COLUMNS, _kind_rows(config))
    if layers:
        _print_table(console, "Every layer", _LAYER_COLUMNS, _layer_rows(config, derived))
    _print_facts(console, "Parameters", _parameter_facts(config.model))
    _print_precision(derived.plan, console)
    _print_facts(console, "Training", _training_facts(config, derived))
    _print_facts(console, "Ranks", _rank_facts(config, derived))
    if derived.num_ranks > 1:
        _print_table(console, "Groups of ranks", GROUP_COLUMNS, group_rows(config, derived))
    if config.parallel.pipeline > 1:
        _print_table(console, "Pipeline stages", STAGE_COLUMNS, stage_rows(config))
        for line in balance_lines(config):
            _print_line(console, f"  {line}")
    _print_table(console, "Memory a rank", MEMORY_COLUMNS, memory_rows(config, derived))
    for line in memory_lines(config, derived):
        _print_line(console, f"  {line}")
    if derived.num_ranks > 1:
        title, columns = "Bytes a rank hands to collectives in a step", traffic_columns(config)
        _print_table(console, title, columns, traffic_rows(config, derived))
        for line in traffic_lines(config, derived):
            _print_line(console, f"  {line}")


# Layers -------------------------------------------------------------------------------------

_KIND_COLUMNS = ("layers", "kind", "shapes (in→out)", "parameters", "active", "FLOPs", "share")
_LAYER_COLUMNS = ("layer", "stage", "kind", "module", "parameters", "active", "FLOPs", "share")


def _print_pattern(config: Config, console: Console) -> None:
    model = config.model
    decoder = [layer for layer in layers(model) if not layer.in_mtp]
    counts = ", ".join(
        f"{sum(layer.kind == kind for layer in decoder)} {kind} {name}"
        for kind, name in _KIND_NAMES.items()
    )
    _print_line(console, f"{model.name}: {len(decoder)} layers ({counts})", style="bold")
    _print_line(console, f"  {model.pattern}")
    if model.mtp.depths > 0:
        _print_line(
            console,
            f"  multi-token prediction: one block {model.mtp.pattern}, applied to "
            f"{model.mtp.depths} depth(s) with shared weights",
        )


def _kind_rows(config: Config) -> Iterable[Sequence[str]]:
    """One row per kind, because all layers of a kind are alike. `FLOPs`: forward, per token."""
    model, length = config.model, config.train.sequence_length
    total_flops = forward_flops(model, length)
    shapes = layers(model)
    head = linears(model)[-1]
    yield _tensor_row("", "embedding", embedding_tensors(model), total_flops)
    for kind in LayerKind:
        group = [layer for layer in shapes if layer.kind == kind and not layer.in_mtp]
        if group:
            yield _group_row(model, f"{len(group)} x", group, length, total_flops)
    if model.mtp.depths > 0:
        times = f"mtp x {model.mtp.depths}"
        projection = next(line for line in linears(model) if line.path == "mtp.layers.0.eh_proj")
        yield _tensor_row(times, "projection, norms", mtp_tensors(model), total_flops, projection)
        for layer in shapes:
            if layer.in_mtp:
                yield _group_row(model, times, [layer], length, total_flops)
    times = f"x {head.applications}" if head.applications > 1 else ""
    yield _tensor_row(times, "final norm, output", head_tensors(model), total_flops, head)
    total = format_count(parameters(model).total_with_mtp)
    yield "", "together", "", total, "", format_count(total_flops), "100.0%"


def _layer_rows(config: Config, derived: Derived) -> Iterable[Sequence[str]]:
    """One row per layer, including those of the multi-token-prediction block."""
    total_flops = forward_flops(config.model, config.train.sequence_length)
    # A layer of the multi-token-prediction block is on the last stage.
    stage_of = [n for n, count in enumerate(derived.layers_per_stage) for _ in range(count)]
    for layer in layers(config.model):
        stage = stage_of[-1] if layer.in_mtp else stage_of[layer.number]
        yield (
            str(layer.number),
            str(stage),
            f"{layer.kind} {_KIND_NAMES[layer.kind]}",
            layer.path,
            *_costs([layer], config.train.sequence_length, total_flops),
        )


def _group_row(
    model: ModelConfig, label: str, group: list[LayerShape], length: int, total_flops: int
) -> Sequence[str]:
    first = group[0]
    return (
        label,
        f"{first.kind} {_KIND_NAMES[first.kind]}",
        "\n".join([*map(_linear_text, first.linears), *_mixing_text(model, first)]),
        *_costs(group, length, total_flops),
    )


def _costs(group: list[LayerShape], length: int, total_flops: int) -> Sequence[str]:
    """Cells for a group of layers: parameters, active, FLOPs, share of `total_flops`."""
    flops = sum(layer.forward_flops(length) for layer in group)
    return (
        format_count(sum(layer.parameters for layer in group)),
        format_count(sum(layer.active_parameters for layer in group)),
        format_count(flops),
        f"{flops / total_flops:.1%}",
    )


def _tensor_row(
    label: str, kind: str, tensors: list[Tensor], total_flops: int, linear: Linear | None = None
) -> Sequence[str]:
    rows, columns = tensors[0].shape[0], tensors[0].shape[-1]
    flops = linear.flops if linear else 0
    return (
        label,
        kind,
        _linear_text(linear) if linear else f"lookup {rows} x {columns}",
        format_count(sum(tensor.parameters for tensor in tensors)),
        format_count(sum(tensor.active for tensor in tensors)),
        format_count(flops),
        f"{flops / total_flops:.1%}",
    )


def _linear_text(linear: Linear) -> str:
    name = linear.path.split(".mlp.")[-1] if ".mlp." in linear.path else linear.path.split(".")[-1]
    experts = f", {linear.active_copies} of {linear.copies}" if linear.copies > 1 else ""
    return f"{name} {linear.in_size}→{linear.out_size}{experts}"


def _mixing_text(model: ModelConfig, layer: LayerShape) -> list[str]:
    """Sizes of a layer that its linears do not show."""
    mamba, attention = model.mamba, model.attention
    if layer.kind == LayerKind.mamba:
        return [
            f"{mamba.heads} heads of {mamba.head_dim}, state {mamba.state_size}, "
            f"{mamba.groups} groups"
        ]
    if layer.kind == LayerKind.attention:
        return [
            f"{attention.heads} query and {attention.key_value_heads} key-value heads of "
            f"{attention.head_dim}"
        ]
    return []


# Parameters and precision -------------------------------------------------------------------


def _parameter_facts(model: ModelConfig) -> Iterable[tuple[str, str]]:
    counts = parameters(model)
    yield "total", exact(counts.total)
    if counts.mtp > 0:
        yield "multi-token prediction", exact(counts.mtp)
        yield "total with it", exact(counts.total_with_mtp)
    if counts.expert_bias > 0:
        yield (
            "with the routers' biases",
            f"{exact(counts.published)}: {counts.expert_bias:,} buffers, not trained",
        )
    yield "active a token", exact(counts.active_with_embeddings)
    yield "  without embedding", exact(counts.active_with_head_only)
    yield "  nor output layer", exact(counts.active_without_embeddings)


_PRECISION_COLUMNS = ("count", "linears", "fprop", "dgrad", "wgrad", "FLOPs", "rule")
_SHARE_COLUMNS = ("FLOPs in", "fprop", "dgrad", "wgrad", "all three")


def _print_precision(plan: PrecisionPlan, console: Console) -> None:
    """Prints, for each phase, the linears, shares of FLOPs and paddings; then the rules that match
    no linear."""
    for phase in plan.phases:
        which = f", {phase_text(plan, phase)}" if len(plan.phases) > 1 else ""
        title = f"Precision ({plan.name}{which})"
        _print_table(console, title, _PRECISION_COLUMNS, _precision_rows(phase))
        title = f"Share of the linears' FLOPs, which are {plan.linears_share:.1%} of all"
        _print_table(console, title, _SHARE_COLUMNS, share_rows(phase))
        for line in _without_layers(padding_lines(phase)):
            _print_line(console, f"  {line}")
    for claim in plan.claims:
        if not claim.linears:
            _print_line(console, f"  no linear is left for {claim.text}")


def _precision_rows(phase: PlanPhase) -> Iterable[Sequence[str]]:
    """One row per group of linears that differ only in their layer, with a glob that matches
    them."""
    total_flops = sum(linear.flops for linear in phase.linears)
    groups: dict[tuple[str, ...], list[int]] = {}
    for linear in phase.linears:
        (modules,) = _without_layers([linear.path])
        row = (modules, *linear.formats.products, rule_text(linear))
        groups.setdefault(row, []).append(linear.flops)
    for (modules, fprop, dgrad, wgrad, rule), flops in groups.items():
        share = f"{sum(flops) / total_flops:.1%}"
        yield str(len(flops)), modules, fprop, dgrad, wgrad, share, rule


def _without_layers(lines: list[str]) -> list[str]:
    """Replaces the layer with * in lines that begin with a module path, and drops duplicates."""
    layer = re.compile(r"^(decoder|mtp)\..*layers\.\d+\.")
    return list(dict.fromkeys(layer.sub(r"\1.*.", line) for line in lines))


# Training, ranks, memory --------------------------------------------------------------------


def _training_facts(config: Config, derived: Derived) -> Iterable[tuple[str, str]]:
    train, optim = config.train, config.optim
    yield (
        "a step",
        f"{derived.tokens_per_step:,} tokens = {derived.sequences_per_step:,} sequences of "
        f"{train.sequence_length:,}",
    )
    overshoot = derived.total_steps * derived.tokens_per_step - train.total_tokens
    steps = f"{derived.total_steps:,} for {format_count(train.total_tokens)} tokens"
    if overshoot > 0:
        steps += f" (the last is a whole batch too: {overshoot:,} beyond)"
    yield "steps", steps
    yield (
        "learning rate",
        f"{optim.peak_learning_rate:g} after {derived.warmup_steps:,} steps of warm-up "
        f"({format_count(optim.warmup_tokens)} tokens)",
    )
    yield (
        "",
        f"{optim.min_learning_rate:g} after {derived.decay_steps:,} steps of {optim.decay_style} "
        f"decay (the last {format_count(optim.decay_tokens)} tokens)",
    )
    yield (
        "FLOPs",
        f"{format_count(derived.training_flops_per_token)} a trained token, "
        f"{derived.training_flops_per_token * train.total_tokens:.3g} the whole run",
    )
    yield (
        "validation",
        f"{train.validation_tokens:,} tokens = {derived.validation_sequences:,} sequences",
    )


def _rank_facts(config: Config, derived: Derived) -> Iterable[tuple[str, str]]:
    parallel, model = config.parallel, config.model
    tensor = f"{parallel.tensor} tensor" + (" (sequence too)" if parallel.sequence else "")
    yield (
        "dense layers",
        f"{derived.num_ranks:,} = {tensor} x {parallel.pipeline} pipeline x "
        f"{parallel.context} context x {derived.data_parallel} data",
    )
    yield (
        "experts",
        f"{derived.num_ranks:,} = {parallel.expert_tensor} expert tensor x {parallel.expert} "
        f"expert x {parallel.pipeline} pipeline x {derived.expert_data_parallel} data",
    )
    yield (
        "a rank holds",
        f"{derived.attention_heads_per_rank} query and {derived.key_value_heads_per_rank} "
        f"key-value heads, {derived.mamba_heads_per_rank} Mamba heads in "
        f"{derived.mamba_groups_per_rank} groups, {derived.experts_per_rank} experts a layer",
    )
    yield (
        "a step",
        f"{derived.micro_batches_per_step:,} micro batches of "
        f"{config.train.micro_batch_sequences} sequence(s)",
    )
    num_moe_layers = sum(layer.kind == LayerKind.moe for layer in layers(model) if not layer.in_mtp)
    if num_moe_layers > 0:
        elements = model.moe.experts_per_token * expert_width(model)
        size = elements * _ELEMENT_BYTES[derived.parameter_dtype]
        remark = "" if parallel.expert > 1 else "; one rank holds every expert: nothing is sent"
        yield (
            "all-to-all a token",
            f"{model.moe.experts_per_token} experts x {expert_width(model)} wide = {elements:,} "
            f"elements, {format_bytes(size)}\neach way, in each of {num_moe_layers} layers, "
            f"forward and again backward{remark}",
        )


# Printing -----------------------------------------------------------------------------------


def _print_line(console: Console, line: str, style: str = "") -> None:
    """Prints one line without wrapping or markup, because it contains names from the
    configuration."""
    console.print(Text(line, style=style), soft_wrap=True)


def _print_table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    _print_line(console, f"\n{title}", style="bold")
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in columns:
        numeric = column in NUMERIC
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _print_facts(console: Console, title: str, facts: Iterable[tuple[str, str]]) -> None:
    _print_line(console, f"\n{title}", style="bold")
    table = Table.grid(padding=(0, 2))
    for name, value in facts:
        table.add_row(Text(f"  {name}"), Text(value))
    console.print(table)
