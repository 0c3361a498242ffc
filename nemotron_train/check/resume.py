"""`check resume`: steps in one go against half of them and a new process for the rest.

Owns which fields must agree, in every bit on the same layout, and the stamp that is left beside
the checkpoints. Does not own: what is shrunk (`plan.shrink`), ranks (`check.ranks`), what they
record (`check.worker`). No torch in this process.

A checkpoint of the first half is also loaded under another layout, where sums are taken in another
order: there the losses must agree within a tolerance, and the samples and their order exactly.
"""

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from nemotron_train.check.data import write_sources
from nemotron_train.check.parallel import (
    LIMITS,
    OWN_PRECISION_LIMITS,
    read_values,
    tell_shrunk,
)
from nemotron_train.check.ranks import Ranks
from nemotron_train.config.schema import Config, Dtype
from nemotron_train.plan.hardware import installed_versions
from nemotron_train.plan.shrink import Shrunk, another_layout, shrink

STAMP = "check_resume.json"
_LOSSES = ("loss", "mtp_loss", "validation_loss", "load_balance_loss")


@dataclass(frozen=True)
class ResumeCheck:
    """What is asked of a check besides the configuration. stamp_folder: the checkpoints of the run
    that the configuration is of, where there is one."""

    folder: Path
    max_ranks: int = 4
    steps: int = 8
    stamp_folder: Path | None = None


@dataclass(frozen=True)
class Field:
    """One thing a resumed run must agree in. same: how many values do, of how many; first: where
    the first one does not."""

    name: str
    same: int
    count: int
    first: str = ""

    @property
    def equal(self) -> bool:
        return self.same == self.count and self.count > 0


@dataclass(frozen=True)
class Resharded:
    """The second half under another layout: the largest relative difference of a loss against what
    is allowed, and whether every step took the same samples."""

    num_ranks: int
    difference: float
    tolerance: float
    same_samples: bool

    @property
    def equal(self) -> bool:
        return self.difference <= self.tolerance and self.same_samples


def check_resume(config: Config, asked: ResumeCheck, console: Console, ranks: Ranks) -> bool:
    """Whether a run of `config`, shrunk, goes on after a new start as if there had been none.

    Raises ConfigError for what cannot be shrunk, RanksFailed where a rank fails.
    """
    shrunk = shrink(
        config,
        asked.folder / "data",
        max_ranks=asked.max_ranks,
        steps=asked.steps,
        own_precision=True,
    )
    tell_shrunk(shrunk, console)
    write_sources(asked.folder / "data", shrunk.sources)
    fields, resharded = prove(shrunk, asked, ranks)
    _tell(fields, resharded, console)
    equal = all(field.equal for field in fields) and resharded.equal
    folders = [asked.folder / "cut" / "checkpoints", asked.stamp_folder]
    for folder in folders:
        if folder is not None and folder.is_dir():
            path = _stamp(folder, shrunk, asked, fields, resharded, equal)
            console.print(f"stamp: {path}", highlight=False, soft_wrap=True)
    console.print("exact" if equal else "differs", highlight=False)
    return equal


def prove(shrunk: Shrunk, asked: ResumeCheck, ranks: Ranks) -> tuple[list[Field], Resharded]:
    """Run the whole, the two halves and the other layout's second half, and compare."""
    for name in ("whole", "cut", "resharded"):
        shutil.rmtree(asked.folder / name, ignore_errors=True)

    def run(name: str, run_folder: str, config: Config, num_ranks: int, stop: int = 0) -> Path:
        config.train.stop_after_steps = stop
        path = asked.folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(config), path)
        folder = str(asked.folder / run_folder)
        task = {"kind": "training", "config": str(path), "run_folder": folder}
        return ranks.run(name, task, num_ranks)

    config, num_ranks = shrunk.config, shrunk.num_ranks
    half = max(1, asked.steps // 2)
    whole = read_values(run("in_one_go", "whole", config, num_ranks))
    first = read_values(run("first_half", "cut", config, num_ranks, half))
    shutil.copytree(asked.folder / "cut", asked.folder / "resharded")
    second = read_values(run("second_half", "cut", config, num_ranks))
    other, other_ranks = another_layout(config, num_ranks)
    again = read_values(run("other_layout", "resharded", other, other_ranks))
    own = config.precision.parameter_dtype == Dtype.bfloat16
    tolerance = (OWN_PRECISION_LIMITS if own else LIMITS)["output"]
    return compare(whole, first, second), _reshard(whole, again, half, other_ranks, tolerance)


def compare(
    whole: list[dict[str, Any]], first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> list[Field]:
    """Field by field, over all ranks, the run in one go against the two halves."""
    losses, rest, samples = [], [], []
    for rank, (one, before, after) in enumerate(zip(whole, first, second, strict=True)):
        rows = before["metrics"] + after["metrics"]
        if rank == 0:  # the others' are the same numbers
            losses = _steps(one["metrics"], rows, lambda name: name.startswith(_LOSSES))
            rest = _steps(one["metrics"], rows, lambda name: not name.startswith(_LOSSES))
        taken = before["batches"] + after["batches"]
        samples += _listed(f"rank {rank}, step", one["batches"], taken)
    ends = list(zip(whole, second, strict=True))
    fields = [
        _field("losses", losses),
        _field("other metrics", rest),
        _field("sample ids and tokens", samples),
    ]
    for name in ("data cursor", "schedule", "random states", "stochastic rounding"):
        pairs = []
        for rank, (one, after) in enumerate(ends):
            pairs += _parts(f"rank {rank}", one[name], after[name])
        fields.append(_field(name, pairs))
    saved = _named(whole[0]["checkpoint"], second[0]["checkpoint"])
    is_optimizer = [entry[0].startswith("optimizer") for entry in saved]
    is_bias = ["expert_bias" in entry[0] for entry in saved]
    parts = {"weights": [], "router biases": [], "optimizer state": []}
    for entry, optimizer, bias in zip(saved, is_optimizer, is_bias, strict=True):
        part = "optimizer state" if optimizer else "router biases" if bias else "weights"
        parts[part].append(entry)
    return fields + [_field(name, entries) for name, entries in parts.items() if entries]


# (where, in one go, resumed)
type _Pair = tuple[str, Any, Any]


def _steps(one: list[dict], other: list[dict], wanted: Any) -> list[_Pair]:
    pairs: list[_Pair] = []
    for row, ours in zip(one, other, strict=False):
        names = [name for name in {**row, **ours} if wanted(name)]
        pairs += [
            (f"{name} of step {row['step']}", row.get(name), ours.get(name)) for name in names
        ]
    if len(one) != len(other):
        pairs.append(("number of lines", len(one), len(other)))
    return pairs


def _listed(what: str, one: list, other: list) -> list[_Pair]:
    pairs = [(f"{what} {n}", a, b) for n, (a, b) in enumerate(zip(one, other, strict=False), 1)]
    return pairs if len(one) == len(other) else [*pairs, (f"{what}s", len(one), len(other))]


def _named(one: dict[str, Any], other: dict[str, Any]) -> list[_Pair]:
    return [(name, one.get(name), other.get(name)) for name in {**one, **other}]


def _parts(where: str, one: Any, other: Any) -> list[_Pair]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [(f"{where}: {name}", a, b) for name, a, b in _named(one, other)]
    return [(where, one, other)]


def _field(name: str, pairs: list[_Pair]) -> Field:
    """JSON kept every bit of every number, so equal means equal."""
    wrong = [where for where, one, other in pairs if one != other]
    return Field(name, len(pairs) - len(wrong), len(pairs), wrong[0] if wrong else "")


def _reshard(
    whole: list[dict[str, Any]],
    again: list[dict[str, Any]],
    half: int,
    num_ranks: int,
    tolerance: float,
) -> Resharded:
    expected, rows = whole[0]["metrics"][half:], again[0]["metrics"]
    difference = 0.0 if len(expected) == len(rows) else float("inf")
    for row, ours in zip(expected, rows, strict=False):
        for name in row:
            if name.startswith(_LOSSES):
                relative = abs(ours[name] - row[name]) / max(abs(row[name]), 1e-30)
                difference = max(difference, relative)
    steps = zip(_samples(whole)[half:], _samples(again), strict=False)
    same = all(one == other for one, other in steps)
    return Resharded(num_ranks, difference, tolerance, same)


def _samples(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Sample id -> digest of its tokens, of every step, over all ranks; ranks that share a row
    were given the same."""
    steps: list[dict[str, str]] = [{} for _ in records[0]["batches"]]
    for record in records:
        for step, taken in zip(steps, record["batches"], strict=True):
            step.update(taken["samples"])
    return steps


def _tell(fields: list[Field], resharded: Resharded, console: Console) -> None:
    table = Table(title="in one go against stopped and resumed", title_justify="left")
    for heading in ("field", "equal", "of", "first difference"):
        table.add_column(heading, justify="right" if heading in ("equal", "of") else "left")
    for field in fields:
        table.add_row(field.name, str(field.same), str(field.count), field.first or "-")
    console.print(table)
    samples = "the same samples" if resharded.same_samples else "OTHER SAMPLES"
    console.print(
        f"second half on another layout ({resharded.num_ranks} ranks): losses differ by "
        f"{resharded.difference:.1e} at most (allowed {resharded.tolerance:.0e}), {samples}",
        highlight=False,
    )


def _stamp(
    folder: Path,
    shrunk: Shrunk,
    asked: ResumeCheck,
    fields: list[Field],
    resharded: Resharded,
    equal: bool,
) -> Path:
    """What was proved, with what, when: beside the step folders, which hold only what they list."""
    stamp = {
        "exact": equal,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "proved_on": "the configuration, shrunk: see `shrunk`",
        "steps": asked.steps,
        "ranks": shrunk.num_ranks,
        "fields": {field.name: {"equal": field.same, "of": field.count} for field in fields},
        "resharded": {
            "ranks": resharded.num_ranks,
            "largest_loss_difference": resharded.difference,
            "allowed": resharded.tolerance,
            "same_samples": resharded.same_samples,
        },
        "shrunk": {knob: [str(was), str(now)] for knob, was, now in shrunk.changes},
        "versions": dict(installed_versions()),
    }
    path = folder / STAMP
    path.write_text(json.dumps(stamp, indent=1) + "\n")
    return path
