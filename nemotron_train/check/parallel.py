"""`check parallel`: compares training in the configured layout with training on one rank.

Owns: the order of the comparisons, the verdict and the printed text. Does not own: how the
configuration is shrunk (`plan.shrink`), starting ranks (`check.ranks`), what they record
(`check.worker`), arithmetic (`check.compare`). No torch in this process.

If the full layout differs, the check runs each parallel dimension alone, then pairs of dimensions,
and names the smallest combination that differs.
"""

import json
import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemotron_train.check.compare import (
    Difference,
    ModuleDifference,
    Shard,
    by_module,
    depth,
    differences,
)
from nemotron_train.check.data import write_sources
from nemotron_train.check.ranks import Ranks, RanksFailed
from nemotron_train.config.schema import Config
from nemotron_train.plan.shrink import Shrunk, alone, dimensions, one_rank, shrink

# Largest relative differences that a different summation order explains, by kind of comparison.
# "output" covers losses and module outputs. An update is a quotient of two moments, and the updates
# of several steps may cancel, so its limit is wider.
LIMITS = {"initial weight": 0.0, "output": 1e-4, "gradient": 1e-4, "update": 2e-3}
# Limits under the precision plan's own formats, where one different rounding starts a cascade:
# NVFP4 with tensor parallelism was measured at 2e-4, 0.25 and 0.5 (output, gradient, update). These
# limits only detect missing or doubled contributions.
OWN_PRECISION_LIMITS = {"initial weight": 0.0, "output": 5e-2, "gradient": 0.4, "update": 0.9}
_ROWS = 12  # modules in the printed table, or more if more differ
# AdamW's first step is the sign of the gradient, so rounding decides it for near-zero elements. An
# epsilon above their size keeps those steps small.
_EPSILON = 1e-6
# With the learning rate of a large model, rounding would hide the update of weights of size one.
_RATE = 1e-3
# The load-balance loss needs enough weight for a wrong factor in it to be visible.
_LOAD_BALANCE = 1e-2


@dataclass(frozen=True)
class ParallelCheck:
    """Options of `check parallel` besides the configuration.

    own_precision: keep the precision plan and use wide limits; otherwise train in FP32.
    """

    folder: Path
    max_ranks: int = 4
    steps: int = 2
    own_precision: bool = False

    @property
    def limits(self) -> dict[str, float]:
        """Largest allowed relative difference by kind of comparison."""
        return OWN_PRECISION_LIMITS if self.own_precision else LIMITS


@dataclass(frozen=True)
class Outcome:
    """Result of comparing a layout with one rank.

    losses: name -> largest relative difference over the steps.
    """

    modules: list[ModuleDifference]
    losses: dict[str, float]
    first_output: str  # first module in forward order whose output differs; "" if none
    limits: dict[str, float]
    failed: str = ""  # error of the run; "" if it finished

    @property
    def differing(self) -> list[ModuleDifference]:
        """The modules with at least one difference above its limit."""
        return [
            row
            for row in self.modules
            if any(not worst.relative <= self.limits[kind] for kind, worst in row.worst.items())
        ]

    @property
    def equal(self) -> bool:
        """Whether the run finished and all its differences are within the limits."""
        losses = all(value <= self.limits["output"] for value in self.losses.values())
        return losses and not (self.failed or self.differing or self.first_output)

    @property
    def culprit(self) -> str:
        """The module where the difference starts; "" if no module differs.

        This is the first module whose forward output differs. If all outputs agree, it is the
        differing module nearest to the loss, because a wrong gradient propagates towards the
        embedding.
        """
        if self.first_output:
            return self.first_output
        return max((row.module for row in self.differing), key=depth, default="")


def check_parallel(config: Config, options: ParallelCheck, console: Console, ranks: Ranks) -> bool:
    """Whether `config`, shrunk, trains in its layout as on one rank. Prints what differs.

    Raises ConfigError if the layout cannot be shrunk, RanksFailed if the one-rank run fails.
    """
    shrunk = shrink_for_proof(config, options)
    print_shrunk(shrunk, console)
    names = dimensions(shrunk.config, shrunk.num_ranks)
    if not names:
        console.print("the layout is one rank: there is nothing to compare")
        return True
    proof = Proof(options, ranks, shrunk)
    outcome = proof.outcome("layout", shrunk.config, shrunk.num_ranks)
    _print_outcome(outcome, console)
    label = _label(shrunk.config, names, shrunk.num_ranks)
    if outcome.equal:
        console.print(f"equal: {label} trains as one rank does")
        return True
    console.print(f"differs: {label}, first in {outcome.culprit or 'the loss'}")
    _bisect(proof, names, console)
    return False


def shrink_for_proof(config: Config, options: ParallelCheck) -> Shrunk:
    """Shrink `config` and raise the knobs that make an error distinguishable from rounding.

    Raises ConfigError if the layout cannot be shrunk.
    """
    shrunk = shrink(
        config,
        options.folder / "data",
        max_ranks=options.max_ranks,
        steps=options.steps,
        own_precision=options.own_precision,
    )
    optim = shrunk.config.optim
    optim.epsilon = max(optim.epsilon, _EPSILON)
    optim.peak_learning_rate = max(optim.peak_learning_rate, _RATE)
    moe = shrunk.config.model.moe
    if moe.load_balance_loss_coefficient > 0:
        moe.load_balance_loss_coefficient = max(moe.load_balance_loss_coefficient, _LOAD_BALANCE)
    return shrunk


class Proof:
    """Runs layouts and compares each with the one-rank run, which the constructor runs once."""

    def __init__(self, options: ParallelCheck, ranks: Ranks, shrunk: Shrunk) -> None:
        self.options = options
        self.shrunk = shrunk
        self.ranks = ranks
        write_sources(options.folder / "data", shrunk.sources)
        self._reference = self._run("one_rank", one_rank(shrunk.config), 1)

    def _run(self, name: str, config: Config, num_ranks: int) -> Path:
        path = self.options.folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(config), path)
        task = {
            "kind": "layout",
            "config": str(path),
            "run_folder": str(self.options.folder / name),
            "steps": self.options.steps,
        }
        return self.ranks.run(name, task, num_ranks)

    def outcome(self, name: str, config: Config, num_ranks: int) -> Outcome:
        """Run `config` on `num_ranks` ranks in the subfolder `name` and compare it with one rank.

        If a rank fails, returns an Outcome whose `failed` holds the error.
        """
        try:
            folder = self._run(name, config, num_ranks)
        except RanksFailed as error:
            return Outcome([], {}, "", self.options.limits, str(error))
        return _compare(self._reference, folder, self.options.limits)


def _compare(reference: Path, folder: Path, limits: dict[str, float]) -> Outcome:
    expected, ours = read_shards(reference), read_shards(folder)
    kinds: dict[str, dict[str, Difference]] = {
        "initial weight": differences(expected["initial"], ours["initial"]),
        "gradient": differences(expected["gradient"], ours["gradient"]),
        "update": differences(expected["final"], ours["final"], expected["initial"]),
    }
    records, (reference_record,) = read_values(folder), read_values(reference)
    losses = {
        name: max(
            _relative(mine[name], theirs[name])
            for record in records
            for mine, theirs in zip(record["losses"], reference_record["losses"], strict=True)
        )
        for name in reference_record["losses"][0]
        if name.startswith(("loss", "mtp_loss", "load_balance_loss", "grad_norm"))
    }
    first_output = _first_output(reference_record, records, limits["output"])
    return Outcome(by_module(kinds), losses, first_output, limits)


def _relative(ours: float, expected: float) -> float:
    if ours == expected:
        return 0.0
    difference = abs(ours - expected) / max(abs(expected), 1e-30)
    return difference if np.isfinite(difference) else float("inf")


def _first_output(reference: Any, records: list[Any], tolerance: float) -> str:
    """The first module whose fingerprint, summed over the ranks, differs from one rank's; or "".

    A projection on a direction may cancel to near zero, so its difference is relative to at least
    the root of the sum of squares.
    """
    for path, expected in sorted(
        reference["trace"].items(), key=lambda entry: order_of_output(entry[0])
    ):
        sums = [record["trace"][path] for record in records if path in record["trace"]]
        ours = np.sum(sums, axis=0) if sums else np.zeros(2)
        square_sum = expected[0]
        squares = abs(ours[0] - square_sum) / max(square_sum, 1e-30)
        projection = abs(ours[1] - expected[1]) / max(abs(expected[1]), np.sqrt(square_sum), 1e-30)
        if not (squares <= tolerance and projection <= tolerance):  # also if one is NaN
            return path
    return ""


def order_of_output(path: str) -> tuple[Any, ...]:
    """Sort key of a module by when its output is complete: submodules before their layer."""
    return (*depth(path), -path.count("."), path)


def _bisect(proof: Proof, names: list[str], console: Console) -> None:
    """Check the dimensions alone, then in pairs. Stop at the first size at which some differ."""
    config = proof.shrunk.config
    parallel = config.parallel
    replicas = proof.shrunk.num_ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    sizes = [size for size in (1, 2) if size < len(names)]
    for size in sizes:
        differing = []
        for chosen in combinations(names, size):
            reduced, num_ranks = alone(config, chosen, max(2, replicas))
            if num_ranks > proof.options.max_ranks:
                continue
            outcome = proof.outcome("_and_".join(chosen) + "_alone", reduced, num_ranks)
            if not outcome.equal:
                differing.append((chosen, outcome))
        for chosen, outcome in differing:
            console.print(
                f"differs already with {' and '.join(chosen)} alone"
                + (f", first in {outcome.culprit}" if outcome.culprit else ""),
            )
        if differing:
            return
    if len(names) > 1:
        console.print(f"only {' and '.join(names)} together differ")


# Reading and printing -----------------------------------------------------------------------


def read_shards(folder: Path) -> dict[str, list[Shard]]:
    """Read the shards of all ranks from `folder`, by kind of record."""
    shards: dict[str, list[Shard]] = {}
    for path in sorted(folder.glob("rank_*.json")):
        rank = int(path.stem.removeprefix("rank_"))
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            for entry in json.loads(path.read_text())["shards"]:
                shape, offset = tuple(entry["shape"]), tuple(entry["offset"])
                shard = Shard(entry["name"], shape, offset, arrays[entry["array"]], rank)
                shards.setdefault(entry["kind"], []).append(shard)
    return shards


def read_values(folder: Path) -> list[dict[str, Any]]:
    """Read the recorded values of every rank from `folder`, in rank order.

    In losses and fingerprints, null is a number that was not finite: NaN here.
    """
    paths = sorted(folder.glob("rank_*.json"), key=lambda path: int(path.stem[5:]))
    records = [json.loads(path.read_text())["values"] for path in paths]
    for record in records:
        for name in {"losses", "trace"} & set(record):
            record[name] = _with_nan(record[name])
    return records


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_nan(entry) for entry in value]
    return math.nan if value is None else value


def print_shrunk(shrunk: Shrunk, console: Console) -> None:
    """Print what shrinking changed, one line for each section of the configuration."""
    parts: dict[str, list[str]] = {}
    for knob, was, now in shrunk.changes:
        part, _, name = knob.rpartition(".")
        parts.setdefault(part or knob, []).append(f"{name} {_short(was)} -> {now}")
    for part, changes in parts.items():
        console.print(f"shrunk {part}: " + ", ".join(changes), soft_wrap=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}... ({len(text)})"


def _label(config: Config, names: list[str], num_ranks: int) -> str:
    parts = [f"{name}={getattr(config.parallel, name)}" for name in names if name != "data"]
    parts += ["data=2"] if "data" in names else []
    return f"{' '.join(parts)} on {num_ranks} ranks"


def _print_outcome(outcome: Outcome, console: Console) -> None:
    if outcome.failed:
        console.print(outcome.failed)
        return
    kinds = ("initial weight", "gradient", "update")
    table = Table(title="relative difference to one rank, worst module first", title_justify="left")
    for heading in ("module", *kinds, "worst tensor", "rank"):
        table.add_column(heading, justify="right" if heading in kinds else "left", overflow="fold")
    shown = outcome.modules[: max(_ROWS, len(outcome.differing))]
    for row in shown:
        worst = max(row.worst.values(), key=lambda difference: difference.relative)
        numbers = [_number(row.worst.get(kind), outcome.limits[kind]) for kind in kinds]
        note = f" ({worst.note})" if worst.note else ""
        name = worst.name.removeprefix(f"{row.module}.") + note
        table.add_row(row.module, *numbers, name, str(worst.rank))
    console.print(table)
    hidden = outcome.modules[len(shown) :]
    if hidden:
        console.print(f"{len(hidden)} more modules, none above {hidden[0].relative:.1e}")
    losses = [f"{name} {value:.1e}" for name, value in outcome.losses.items()]
    console.print("of the losses: " + ", ".join(losses), soft_wrap=True)
    if outcome.first_output:
        console.print(
            f"forward: the output of {outcome.first_output} is the first that differs",
        )


def _number(difference: Difference | None, limit: float) -> Text:
    if difference is None:
        return Text("-")
    text = f"{difference.relative:.1e}"
    return Text(text, style="" if difference.relative <= limit else "bold red")
