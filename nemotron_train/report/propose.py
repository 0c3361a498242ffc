"""Proposes a precision plan from a run's telemetry: which linears to keep above NVFP4 within a
FLOP budget.

Owns: the candidates, the selection, the plan file. Does not own: the measurement
(`precision.telemetry`), the meaning of a plan (`plan.precision.resolve`). No torch.

The selection is greedy by error removed per FLOP. Exempting one linear does not change the measured
error of another, so this is a knapsack problem: take candidates in descending order of that ratio
and skip those that do not fit. If every candidate is small relative to the budget, the result is
near-optimal. Unlike an exact solution, every line has its own reason: a larger budget only adds
lines, except when a large candidate fits for the first time. The selection stops at the first
candidate whose ratio is at or below the model's average: beyond it, a linear picked at random would
do as well, and the list should be short.

The error of a product is the sum over its two operands, because independent relative errors of the
factors add up in the product. The error of a linear is the sum over fprop, dgrad and wgrad.
`error=noise` is the squared error over the squared values; large values dominate it. `error=flush`
is the share of values flushed to zero; the many small values dominate it. Nemotron 3 uses the
latter to exempt the Mamba output projection, whose noise is no larger than its neighbours'.
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
from nemotron_train.platform.files import write_atomically
from nemotron_train.precision.telemetry_record import OPERANDS, OPERANDS_OF
from nemotron_train.report.runs.read import read_run
from nemotron_train.report.runs.telemetry import (
    KINDS,
    TelemetryRecord,
    kind_of,
    layer_of,
    telemetry_records,
)


class ErrorMeasure(StrEnum):
    """The error that candidates are ranked by."""

    noise = "noise"  # squared error over squared values
    flush = "flush"  # share of values flushed to zero


class Unit(StrEnum):
    """What one line of the exemption list covers."""

    kind = "kind"  # all linears of one kind; decoder and multi-token prediction separately
    module = "module"  # a single linear


@dataclass
class ProposeConfig:
    """The knobs of `precision propose`."""

    budget: float = MISSING  # share of the FLOPs of the linears that a plan covers
    format: GemmFormat = GemmFormat.bf16  # of the exempted linears: bf16, or mxfp8 if measured
    error: ErrorMeasure = ErrorMeasure.noise
    by: Unit = Unit.kind
    output: str = ""  # plan file; "": proposed_precision.yaml in the run folder


@dataclass(frozen=True)
class Candidate:
    """One possible line of the exemption list.

    flops, error: shares of the total over all linears that a plan covers. worst: name, share
    flushed to zero and signal-to-noise ratio (dB) of the operand with the largest share flushed.
    """

    name: str
    match: str
    flops: float
    error: float
    worst: tuple[str, float, float | None]

    @property
    def ratio(self) -> float:
        """Error removed per FLOP, relative to the whole model's (1)."""
        return self.error / self.flops


def propose(run_folder: Path, knobs: ProposeConfig, console: Console) -> Path:
    """Writes the plan file, prints the candidates and returns the file's path. Raises ConfigError
    if the run lacks the required telemetry or a knob is out of range."""
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
    records = records[len(records) // 2 :]  # skip early steps: not representative of later ones
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
        soft_wrap=True,
    )
    return output


def candidates(
    config: Config, records: Sequence[TelemetryRecord], knobs: ProposeConfig, run_name: str
) -> list[Candidate]:
    """All candidates, best first. Raises ConfigError, naming `run_name`, if a linear was not
    measured in the compared formats."""
    paths = list(records[-1].modules)
    flops = {
        linear.path: linear.flops
        for linear in resolve_plan(config).at(0).linears
        if linear.path in set(paths)
    }
    errors = {path: _removed_error(records, path, knobs, run_name) for path in paths}
    groups: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        groups.setdefault(_rule_of(path, knobs.by), []).append(path)
    all_flops, all_errors = sum(flops.values()), sum(errors.values())
    unsorted = [
        Candidate(
            name,
            match,
            sum(flops[path] for path in group) / all_flops,
            sum(errors[path] for path in group) / all_errors if all_errors else 0.0,
            _worst_operand(records, group),
        )
        for (name, match), group in groups.items()
    ]
    return sorted(unsorted, key=lambda candidate: -candidate.ratio)


def choose(listed: Sequence[Candidate], budget: float) -> list[Candidate]:
    """Greedy selection within `budget` (share of FLOPs). `listed`: candidates, best first."""
    chosen: list[Candidate] = []
    left = budget + 1e-12  # tolerance for the rounding of the shares
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
    run_name: str,
) -> str:
    """The plan as YAML recipe text. A comment above each rule gives its reason."""
    kept, removed = sum(c.flops for c in chosen), sum(c.error for c in chosen)
    steps = f"step {records[0].step}" + (f" to {records[-1].step}" if records[1:] else "")
    options = f"budget={knobs.budget} format={knobs.format} error={knobs.error} by={knobs.by}"
    lines = [
        f"# nemotron-train precision propose {run_name} {options}",
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
    records: Sequence[TelemetryRecord], path: str, knobs: ProposeConfig, run_name: str
) -> float:
    """Error of a linear in NVFP4, minus its error in the exemption format (BF16: zero)."""
    error = _error(records, path, GemmFormat.nvfp4, knobs.error, run_name)
    if knobs.format == GemmFormat.mxfp8:
        error -= _error(records, path, GemmFormat.mxfp8, knobs.error, run_name)
    return max(error, 0.0)


def _error(
    records: Sequence[TelemetryRecord], path: str, form: str, measure: ErrorMeasure, run_name: str
) -> float:
    """Sum over the products and their operands of the mean over the records."""
    name = "relative_error" if measure == ErrorMeasure.noise else "flush_to_zero"
    total = 0.0
    for operands in OPERANDS_OF.values():
        for operand in operands:
            numbers = [record.number(path, form, operand, name) for record in records]
            known = [number for number in numbers if number is not None]
            if not known:
                raise ConfigError(
                    f"{run_name}: {operand} of {path} was not measured in {form}; train with "
                    f"precision.telemetry.probe={form}"
                )
            power = 2 if measure == ErrorMeasure.noise else 1
            total += fmean(number**power for number in known)
    return total


def _worst_operand(
    records: Sequence[TelemetryRecord], paths: Sequence[str]
) -> tuple[str, float, float | None]:
    """The operand with the largest share flushed: (name, share flushed, SNR in dB), as means over
    the group's linears in the last record."""
    means: list[tuple[str, float, float | None]] = []
    for operand in OPERANDS:
        measured: dict[str, list[float]] = {"flush_to_zero": [], "snr_db": []}
        for name, numbers in measured.items():
            for path in paths:
                number = records[-1].number(path, GemmFormat.nvfp4, operand, name)
                if number is not None:
                    numbers.append(number)
        snr = fmean(measured["snr_db"]) if measured["snr_db"] else None
        means.append((operand, fmean(measured["flush_to_zero"] or [0.0]), snr))
    return max(means, key=lambda mean: mean[1])


def _rule_of(path: str, unit: Unit) -> tuple[str, str]:
    """Name and glob of the rule that exempts a linear."""
    kind = kind_of(path)
    if unit == Unit.module:
        layer = layer_of(path).split()
        number = [word for word in layer if word.isdecimal()]
        return "_".join([*(["mtp"] if "mtp" in layer and number else []), kind, *number]), path
    end = next(end for end, known in KINDS.items() if known == kind)
    prefix, _, _ = path.partition(".")
    name = f"mtp_{kind}" if prefix == "mtp" and not kind.startswith("mtp") else kind
    return name, f"{prefix}.*.{end}"


def _check(config: Config, text: str, kept_flops: float) -> None:
    """Asserts that the plan text keeps exactly the selected share of FLOPs. Raises ConfigError if
    the plan does not resolve under the run's layout."""
    plain: dict[str, Any] = yaml.safe_load(text)
    proposed = replace(config, precision=to_typed(PrecisionConfig, plain, []))
    linears = resolve_plan(proposed).at(0).linears
    decided = [linear for linear in linears if not linear.rule.startswith("fixed (")]
    share = 1 - share_of_flops(decided).get(GemmFormat.nvfp4, 0.0)
    assert abs(share - kept_flops) < 1e-9, (share, kept_flops)


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
