"""From a run's precision telemetry to a plan: what to keep above NVFP4 when not all can be.

Owns: the candidates, the choice among them, the plan's file. Does not own: the measurement
(`precision.telemetry`), what a plan means (`plan.precision.resolve`). No torch.

The choice is greedy by error removed per FLOP. Exempting one linear changes no other's measured
error, so it is a knapsack: take the candidates in the order of that ratio, and leave out what no
longer fits. For candidates that are small against the budget this is the best there is, and unlike
an exact solution it gives a list whose every line has a reason of its own: a larger budget only
adds lines, except where a large candidate fits at last. It ends early, at the first candidate whose
ratio is below the model's average: from there on exempting a linear chosen by lot would do as well,
and a short list is the aim.

The error of a product is the sum over its two operands, since independent relative errors of the
factors add up in the product; a linear's is the sum over fprop, dgrad and wgrad. `error=noise`
counts squared errors over squares, which large numbers decide. `error=flush` counts the share of
numbers made zero, which the many small ones decide: the measure by which Nemotron 3 exempts the
Mamba output projection, whose noise is no larger than its neighbours'.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from omegaconf import MISSING
from rich.console import Console
from rich.table import Table

from nemotron_train.compose.compose import compose_config, to_typed
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, GemmFormat, PrecisionConfig
from nemotron_train.plan.precision.resolve import resolve_plan, share_of_flops
from nemotron_train.precision.telemetry_record import OPERANDS, OPERANDS_OF
from nemotron_train.report.runs.read import read_run
from nemotron_train.report.runs.telemetry import (
    KINDS,
    TelemetryRecord,
    kind_of,
    layer_of,
    telemetry_records,
)
from nemotron_train.run_folder.folder import write_atomically


class ErrorMeasure(StrEnum):
    noise = "noise"
    flush = "flush"


class Unit(StrEnum):
    """What a line of the list exempts."""

    kind = "kind"  # all linears of a kind, decoder and multi-token prediction apart
    module = "module"


@dataclass
class ProposeConfig:
    """The knobs of `precision propose`."""

    budget: float = MISSING  # share of FLOPs, of the linears that a plan decides over
    format: GemmFormat = GemmFormat.bf16  # of what is exempted: bf16, or mxfp8 where measured
    error: ErrorMeasure = ErrorMeasure.noise
    by: Unit = Unit.kind
    output: str = ""  # the plan's file; proposed_precision.yaml in the run folder


@dataclass(frozen=True)
class Candidate:
    """One possible line of the exemption list.

    flops, error: shares of those of all linears that a plan decides over. worst: of its operands,
    the name, share flushed to zero and signal-to-noise ratio of the one with most flushed.
    """

    name: str
    match: str
    flops: float
    error: float
    worst: tuple[str, float, float | None]

    @property
    def ratio(self) -> float:
        """Error removed per FLOP; 1 for the model as a whole."""
        return self.error / self.flops


def propose(run_folder: Path, knobs: ProposeConfig, console: Console) -> Path:
    """Writes the plan and shows how it was chosen. Raises ConfigError for a run without the
    telemetry it needs and for a knob out of range."""
    if not 0 <= knobs.budget <= 1:
        raise ConfigError(f"budget={knobs.budget}: give a share of the FLOPs, from 0 to 1")
    if knobs.format not in (GemmFormat.bf16, GemmFormat.mxfp8):
        raise ConfigError(f"format={knobs.format}: exemptions are in bf16 or mxfp8")
    run = read_run(run_folder)
    records = telemetry_records(run)
    if not records:
        raise ConfigError(
            f"{run_folder}: no precision telemetry; train with precision.telemetry.every=STEPS"
        )
    records = records[len(records) // 2 :]  # early steps say little about the rest of a training
    config = compose_config([], run_folder / "config.yaml")
    listed = candidates(config, records, knobs, str(run_folder))
    chosen = choose(listed, knobs.budget)
    output = Path(knobs.output) if knobs.output else run_folder / "proposed_precision.yaml"
    text = plan_text(chosen, knobs, records, str(run_folder))
    _check(config, text, sum(c.flops for c in chosen))
    write_atomically(output, text)
    _show(listed, chosen, console)
    console.print(
        f"wrote {output}; to use it: nemotron-train pretrain precision={output}",
        highlight=False,
        soft_wrap=True,
    )
    return output


def candidates(
    config: Config, records: Sequence[TelemetryRecord], knobs: ProposeConfig, asked: str
) -> list[Candidate]:
    """Every line that a list could have, best first. Raises ConfigError naming `asked`, the run,
    if a linear was not measured in the formats that are compared."""
    paths = list(records[-1].modules)
    flops = {e.path: e.flops for e in resolve_plan(config).at(0).linears if e.path in set(paths)}
    errors = {path: _removed_error(records, path, knobs, asked) for path in paths}
    groups: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        groups.setdefault(_line_of(path, knobs.by), []).append(path)
    all_flops, all_errors = sum(flops.values()), sum(errors.values())
    found = [
        Candidate(
            name,
            match,
            sum(flops[path] for path in group) / all_flops,
            sum(errors[path] for path in group) / all_errors if all_errors else 0.0,
            _worst_operand(records, group),
        )
        for (name, match), group in groups.items()
    ]
    return sorted(found, key=lambda candidate: -candidate.ratio)


def choose(listed: Sequence[Candidate], budget: float) -> list[Candidate]:
    """The greedy choice among candidates that are sorted, best first."""
    chosen: list[Candidate] = []
    left = budget + 1e-12
    for candidate in listed:
        if candidate.ratio <= 1:
            break
        if candidate.flops <= left:
            chosen.append(candidate)
            left -= candidate.flops
    return chosen


def plan_text(
    chosen: Sequence[Candidate],
    knobs: ProposeConfig,
    records: Sequence[TelemetryRecord],
    asked: str,
) -> str:
    """The plan as a recipe file, the reason of each line in a comment above it."""
    kept, removed = sum(c.flops for c in chosen), sum(c.error for c in chosen)
    steps = f"step {records[0].step}" + (f" to {records[-1].step}" if records[1:] else "")
    options = f"budget={knobs.budget} format={knobs.format} error={knobs.error} by={knobs.by}"
    lines = [
        f"# nemotron-train precision propose {asked} {options}",
        f"# From {len(records)} telemetry record(s), {steps}. Of the linears that a plan decides",
        f"# over, {kept:.1%} of the FLOPs stay above NVFP4, and {removed:.1%} of the error goes.",
        "name: proposed",
        "parameter_dtype: bfloat16",
        "default: {format: nvfp4}",
        "rules:" if chosen else "rules: {}",
    ]
    for c in chosen:
        operand, flushed, snr = c.worst
        noise = f", {snr:.1f} dB" if snr is not None else ""
        lines.append(
            f"  # {c.flops:.1%} of the FLOPs, {c.error:.1%} of the error ({c.ratio:.1f} times the "
            f"average); {operand}: {flushed:.0%} flushed{noise}"
        )
        optional = ", optional: true" if c.name.startswith(("mtp", "latent")) else ""
        rule = f'{{match: "{c.match}", format: {knobs.format}{optional}}}'
        lines.append(f"  {c.name}: {rule}")
    return "\n".join(lines) + "\n"


def _removed_error(
    records: Sequence[TelemetryRecord], path: str, knobs: ProposeConfig, asked: str
) -> float:
    """The error of a linear in NVFP4, less what it has in the exemptions' format (BF16: none)."""
    error = _error(records, path, "nvfp4", knobs.error, asked)
    if knobs.format == GemmFormat.mxfp8:
        error -= _error(records, path, "mxfp8", knobs.error, asked)
    return max(error, 0.0)


def _error(
    records: Sequence[TelemetryRecord], path: str, form: str, measure: ErrorMeasure, asked: str
) -> float:
    """Mean over the records of the sum over the products and their operands."""
    name = "relative_error" if measure == ErrorMeasure.noise else "flush_to_zero"
    total = 0.0
    for operands in OPERANDS_OF.values():
        for operand in operands:
            numbers = [record.number(path, form, operand, name) for record in records]
            known = [number for number in numbers if number is not None]
            if not known:
                raise ConfigError(
                    f"{asked}: {operand} of {path} was not measured in {form}; train with "
                    f"precision.telemetry.probe={form}"
                )
            power = 2 if measure == ErrorMeasure.noise else 1
            total += fmean(number**power for number in known)
    return total


def _worst_operand(
    records: Sequence[TelemetryRecord], paths: Sequence[str]
) -> tuple[str, float, float | None]:
    """Means over a group's linears in the last record."""
    means: list[tuple[str, float, float | None]] = []
    for operand in OPERANDS:
        found: dict[str, list[float]] = {"flush_to_zero": [], "snr_db": []}
        for name, numbers in found.items():
            for path in paths:
                number = records[-1].number(path, "nvfp4", operand, name)
                if number is not None:
                    numbers.append(number)
        snr = fmean(found["snr_db"]) if found["snr_db"] else None
        means.append((operand, fmean(found["flush_to_zero"] or [0.0]), snr))
    return max(means, key=lambda mean: mean[1])


def _line_of(path: str, unit: Unit) -> tuple[str, str]:
    """Name and glob of the line that exempts a linear."""
    kind = kind_of(path)
    if unit == Unit.module:
        layer = layer_of(path).split()
        number = [word for word in layer if word.isdecimal()]
        return "_".join([*(["mtp"] if "mtp" in layer and number else []), kind, *number]), path
    end = next(end for end, known in KINDS.items() if known == kind)
    prefix, _, _ = path.partition(".")
    name = f"mtp_{kind}" if prefix == "mtp" and not kind.startswith("mtp") else kind
    return name, f"{prefix}.*.{end}"


def _check(config: Config, text: str, kept: float) -> None:
    """The file must be a plan that keeps just what was chosen. Raises ConfigError where the run's
    own layout cannot have it."""
    plain: dict[str, Any] = yaml.safe_load(text)
    proposed = replace(config, precision=to_typed(PrecisionConfig, plain, []))
    linears = resolve_plan(proposed).at(0).linears
    decided = [linear for linear in linears if not linear.rule.startswith("fixed (")]
    share = 1 - share_of_flops(decided).get(GemmFormat.nvfp4, 0.0)
    assert abs(share - kept) < 1e-9, (share, kept)


def _show(listed: Sequence[Candidate], chosen: Sequence[Candidate], console: Console) -> None:
    table = Table(header_style="bold")
    table.add_column("linears", overflow="fold")
    for heading in ("FLOPs", "error", "per FLOP", "most flushed", "", "exempt"):
        table.add_column(heading, justify="right")
    for c in listed:
        operand, flushed, _ = c.worst
        table.add_row(
            c.name,
            f"{c.flops:.1%}",
            f"{c.error:.1%}",
            f"{c.ratio:.2f}",
            operand,
            f"{flushed:.0%}",
            "yes" if c in chosen else "",
        )
    console.print(table)
