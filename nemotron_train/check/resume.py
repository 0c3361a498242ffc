"""`check resume`: compares an uninterrupted run with a run that is stopped halfway and resumed.

Owns: which fields must agree bit for bit on the same layout, and the stamp file beside the
checkpoints. Does not own: how the configuration is shrunk (`plan.shrink`), starting ranks
(`check.ranks`), what they record (`check.worker`). No torch in this process.

The checkpoint of the first half is also loaded under another layout, where the summation order
differs. There the losses must agree within a tolerance, and each step must take exactly the same
samples.
"""

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
    print_shrunk,
    read_values,
)
from nemotron_train.check.ranks import Ranks
from nemotron_train.config.json_text import json_text
from nemotron_train.config.schema import Config, Dtype
from nemotron_train.plan.hardware import installed_versions
from nemotron_train.plan.shrink import Shrunk, another_layout, shrink

STAMP = "check_resume.json"
_LOSSES = ("loss", "mtp_loss", "validation_loss", "load_balance_loss")


@dataclass(frozen=True)
class ResumeCheck:
    """Options of `check resume` besides the configuration.

    steps: of the uninterrupted run. stamp_folder: checkpoint folder of the run whose configuration
    is checked; it gets a stamp too. None if the configuration belongs to no run.
    """

    folder: Path
    max_ranks: int = 4
    steps: int = 8
    stamp_folder: Path | None = None


@dataclass(frozen=True)
class Field:
    """One field that a resumed run must reproduce.

    same: number of equal values, of `count`. first: location of the first value that differs.
    """

    name: str
    same: int
    count: int
    first: str = ""

    @property
    def equal(self) -> bool:
        """Whether all values agree, and there is at least one."""
        return self.same == self.count and self.count > 0


@dataclass(frozen=True)
class Resharded:
    """Result of the second half under another layout of `num_ranks` ranks.

    difference: largest relative difference of a loss. same_samples: whether every step took the
    same samples.
    """

    num_ranks: int
    difference: float
    tolerance: float
    same_samples: bool

    @property
    def equal(self) -> bool:
        """Whether the losses are within the tolerance and the samples are the same."""
        return self.difference <= self.tolerance and self.same_samples


def check_resume(config: Config, options: ResumeCheck, console: Console, ranks: Ranks) -> bool:
    """Whether a run of `config`, shrunk, resumes exactly. Prints the comparison, writes the stamp.

    Raises ConfigError if the configuration cannot be shrunk, RanksFailed if a rank fails.
    """
    shrunk = shrink(
        config,
        options.folder / "data",
        max_ranks=options.max_ranks,
        steps=options.steps,
        own_precision=True,
    )
    print_shrunk(shrunk, console)
    write_sources(options.folder / "data", shrunk.sources)
    fields, resharded = prove(shrunk, options, ranks)
    _print_result(fields, resharded, console)
    equal = all(field.equal for field in fields) and resharded.equal
    folders = [options.folder / "cut" / "checkpoints", options.stamp_folder]
    for folder in folders:
        if folder is not None and folder.is_dir():
            path = _stamp(folder, shrunk, options, fields, resharded, equal)
            console.print(f"stamp: {path}", soft_wrap=True)
    console.print("exact" if equal else "differs")
    return equal


def prove(shrunk: Shrunk, options: ResumeCheck, ranks: Ranks) -> tuple[list[Field], Resharded]:
    """Run and compare: all steps, the two halves, and the second half under another layout.

    Raises RanksFailed if a rank fails.
    """
    for name in ("whole", "cut", "resharded"):
        shutil.rmtree(options.folder / name, ignore_errors=True)

    def run(name: str, run_folder: str, config: Config, num_ranks: int, stop: int = 0) -> Path:
        config.train.stop_after_steps = stop
        path = options.folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(config), path)
        folder = str(options.folder / run_folder)
        task = {"kind": "training", "config": str(path), "run_folder": folder}
        return ranks.run(name, task, num_ranks)

    config, num_ranks = shrunk.config, shrunk.num_ranks
    half = max(1, options.steps // 2)
    whole = read_values(run("in_one_go", "whole", config, num_ranks))
    first = read_values(run("first_half", "cut", config, num_ranks, half))
    shutil.copytree(options.folder / "cut", options.folder / "resharded")
    second = read_values(run("second_half", "cut", config, num_ranks))
    other_config, other_ranks = another_layout(config, num_ranks)
    resharded = read_values(run("other_layout", "resharded", other_config, other_ranks))
    is_bfloat16 = config.precision.parameter_dtype == Dtype.bfloat16
    tolerance = (OWN_PRECISION_LIMITS if is_bfloat16 else LIMITS)["output"]
    return compare(whole, first, second), _compare_resharded(
        whole, resharded, half, other_ranks, tolerance
    )


def compare(
    whole: list[dict[str, Any]], first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> list[Field]:
    """Compare the uninterrupted run with the two halves, field by field, over all ranks.

    whole, first, second: the recorded values of every rank.
    """
    losses, other_metrics = [], []
    samples = []
    for rank, (uninterrupted, first_half, second_half) in enumerate(
        zip(whole, first, second, strict=True)
    ):
        rows = first_half["metrics"] + second_half["metrics"]
        if rank == 0:  # all ranks log the same metrics
            losses = _metric_pairs(
                uninterrupted["metrics"], rows, lambda name: name.startswith(_LOSSES)
            )
            other_metrics = _metric_pairs(
                uninterrupted["metrics"], rows, lambda name: not name.startswith(_LOSSES)
            )
        batches = first_half["batches"] + second_half["batches"]
        samples += _list_pairs(f"rank {rank}, step", uninterrupted["batches"], batches)
    ends = list(zip(whole, second, strict=True))
    fields = [
        _field("losses", losses),
        _field("other metrics", other_metrics),
        _field("sample ids and tokens", samples),
    ]
    for name in ("data cursor", "schedule", "random states", "stochastic rounding"):
        pairs = []
        for rank, (uninterrupted, second_half) in enumerate(ends):
            pairs += _value_pairs(f"rank {rank}", uninterrupted[name], second_half[name])
        fields.append(_field(name, pairs))
    checkpoint_pairs = _dict_pairs(whole[0]["checkpoint"], second[0]["checkpoint"])
    is_optimizer = [entry[0].startswith("optimizer") for entry in checkpoint_pairs]
    is_bias = ["expert_bias" in entry[0] for entry in checkpoint_pairs]
    parts = {"weights": [], "router biases": [], "optimizer state": []}
    for entry, optimizer, bias in zip(checkpoint_pairs, is_optimizer, is_bias, strict=True):
        part = "optimizer state" if optimizer else "router biases" if bias else "weights"
        parts[part].append(entry)
    return fields + [_field(name, entries) for name, entries in parts.items() if entries]


# (location, value of the uninterrupted run, value of the resumed run)
type _Pair = tuple[str, Any, Any]


def _metric_pairs(
    expected_rows: list[dict], resumed_rows: list[dict], is_included: Any
) -> list[_Pair]:
    pairs: list[_Pair] = []
    for expected, resumed in zip(expected_rows, resumed_rows, strict=False):
        names = [name for name in {**expected, **resumed} if is_included(name)]
        pairs += [
            (f"{name} of step {expected['step']}", expected.get(name), resumed.get(name))
            for name in names
        ]
    if len(expected_rows) != len(resumed_rows):
        pairs.append(("number of lines", len(expected_rows), len(resumed_rows)))
    return pairs


def _list_pairs(label: str, expected: list, resumed: list) -> list[_Pair]:
    pairs = [
        (f"{label} {number}", a, b)
        for number, (a, b) in enumerate(zip(expected, resumed, strict=False), 1)
    ]
    return (
        pairs
        if len(expected) == len(resumed)
        else [*pairs, (f"{label}s", len(expected), len(resumed))]
    )


def _dict_pairs(expected: dict[str, Any], resumed: dict[str, Any]) -> list[_Pair]:
    return [(name, expected.get(name), resumed.get(name)) for name in {**expected, **resumed}]


def _value_pairs(location: str, expected: Any, resumed: Any) -> list[_Pair]:
    if isinstance(expected, dict) and isinstance(resumed, dict):
        return [(f"{location}: {name}", a, b) for name, a, b in _dict_pairs(expected, resumed)]
    return [(location, expected, resumed)]


def _field(name: str, pairs: list[_Pair]) -> Field:
    """Count the equal pairs. JSON keeps every bit of a number, so `==` means bit-equal."""
    differing = [location for location, expected, resumed in pairs if expected != resumed]
    return Field(name, len(pairs) - len(differing), len(pairs), differing[0] if differing else "")


def _compare_resharded(
    whole: list[dict[str, Any]],
    resharded: list[dict[str, Any]],
    half: int,
    num_ranks: int,
    tolerance: float,
) -> Resharded:
    expected, resharded_rows = whole[0]["metrics"][half:], resharded[0]["metrics"]
    difference = 0.0 if len(expected) == len(resharded_rows) else float("inf")
    for expected_row, row in zip(expected, resharded_rows, strict=False):
        for name in expected_row:
            if name.startswith(_LOSSES):
                relative = abs(row[name] - expected_row[name]) / max(abs(expected_row[name]), 1e-30)
                difference = max(difference, relative)
    steps = zip(_samples(whole)[half:], _samples(resharded), strict=False)
    same_samples = all(expected_samples == samples for expected_samples, samples in steps)
    return Resharded(num_ranks, difference, tolerance, same_samples)


def _samples(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For every step, sample id -> digest of its tokens, merged over all ranks.

    Ranks that share a row record the same sample.
    """
    steps: list[dict[str, str]] = [{} for _ in records[0]["batches"]]
    for record in records:
        for step, batch in zip(steps, record["batches"], strict=True):
            step.update(batch["samples"])
    return steps


def _print_result(fields: list[Field], resharded: Resharded, console: Console) -> None:
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
    )


def _stamp(
    folder: Path,
    shrunk: Shrunk,
    options: ResumeCheck,
    fields: list[Field],
    resharded: Resharded,
    equal: bool,
) -> Path:
    """Write the result, the versions and the time to STAMP, beside the step folders.

    It cannot go into a step folder: that may hold only the files in its manifest.
    """
    stamp = {
        "exact": equal,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "proved_on": "the configuration, shrunk: see `shrunk`",
        "steps": options.steps,
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
    path.write_text(json_text(stamp, indent=1) + "\n")
    return path
