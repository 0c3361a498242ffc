"""`check parallel`: one training step of the asked layout against one rank, gradient by gradient.

Owns the order of the proof, its verdict and its text. Does not own: what is shrunk
(`plan.shrink`), ranks (`check.ranks`), what they record (`check.worker`), arithmetic
(`check.compare`). No torch in this process.

Where the whole layout differs, its dimensions are checked alone, then in pairs, and the smallest
combination that differs is named.
"""

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

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

# Relative differences that sums in another order explain, by kind of comparison; "output": of
# losses and of modules. What a step changed is a quotient of two moments, and steps may cancel.
LIMITS = {"initial weight": 0.0, "output": 1e-4, "gradient": 1e-4, "update": 2e-3}
# Under the plan's own formats one rounding more or less begins a cascade: NVFP4 under tensor
# parallelism was measured at 2e-4, 0.25 and 0.5. Only what is missing or doubled is seen.
OWN_PRECISION_LIMITS = {"initial weight": 0.0, "output": 5e-2, "gradient": 0.4, "update": 0.9}
_ROWS = 12
# AdamW's first step is the gradient's sign, and rounding would decide it for vanishing elements; an
# epsilon above these keeps their steps small.
_EPSILON = 1e-6
# At the rates of large models a step would be lost in the rounding of weights of size one.
_RATE = 1e-3
# The load-balance loss must weigh enough for a wrong factor before it to be seen beside the rest.
_LOAD_BALANCE = 1e-2


@dataclass(frozen=True)
class ParallelCheck:
    """What is asked of a check besides the configuration."""

    folder: Path
    max_ranks: int = 4
    steps: int = 2
    own_precision: bool = False

    @property
    def limits(self) -> dict[str, float]:
        return OWN_PRECISION_LIMITS if self.own_precision else LIMITS


@dataclass(frozen=True)
class Outcome:
    """A layout against one rank. losses: name -> largest relative difference over the steps."""

    modules: list[ModuleDifference]
    losses: dict[str, float]
    first_output: str  # the first module, in the order of the forward pass, whose output differs
    limits: dict[str, float]
    failed: str = ""  # why there is nothing to compare

    @property
    def differing(self) -> list[ModuleDifference]:
        return [
            row
            for row in self.modules
            if any(not worst.relative <= self.limits[kind] for kind, worst in row.worst.items())
        ]

    @property
    def equal(self) -> bool:
        losses = all(value <= self.limits["output"] for value in self.losses.values())
        return losses and not (self.failed or self.differing or self.first_output)

    @property
    def culprit(self) -> str:
        """Where the difference begins: in the forward pass, or else, as a wrong gradient spreads
        towards the embedding, in the module nearest to the loss."""
        if self.first_output:
            return self.first_output
        return max((row.module for row in self.differing), key=depth, default="")


def check_parallel(config: Config, asked: ParallelCheck, console: Console, ranks: Ranks) -> bool:
    """Whether the layout of `config`, shrunk, trains as one rank does; tells what differs.

    Raises ConfigError for a layout that cannot be shrunk, RanksFailed where one rank alone fails.
    """
    shrunk = shrink_for_proof(config, asked)
    tell_shrunk(shrunk, console)
    names = dimensions(shrunk.config, shrunk.num_ranks)
    if not names:
        console.print("the layout is one rank: there is nothing to compare")
        return True
    proof = Proof(asked, ranks, shrunk)
    outcome = proof.outcome("layout", shrunk.config, shrunk.num_ranks)
    _tell(outcome, console)
    label = _label(shrunk.config, names, shrunk.num_ranks)
    if outcome.equal:
        console.print(f"equal: {label} trains as one rank does", highlight=False)
        return True
    console.print(f"differs: {label}, first in {outcome.culprit or 'the loss'}", highlight=False)
    _bisect(proof, names, console)
    return False


def shrink_for_proof(config: Config, asked: ParallelCheck) -> Shrunk:
    """`config` shrunk, with what lets a fault be told from rounding."""
    shrunk = shrink(
        config,
        asked.folder / "data",
        max_ranks=asked.max_ranks,
        steps=asked.steps,
        own_precision=asked.own_precision,
    )
    optim = shrunk.config.optim
    optim.epsilon = max(optim.epsilon, _EPSILON)
    optim.peak_learning_rate = max(optim.peak_learning_rate, _RATE)
    moe = shrunk.config.model.moe
    if moe.load_balance_loss_coefficient > 0:
        moe.load_balance_loss_coefficient = max(moe.load_balance_loss_coefficient, _LOAD_BALANCE)
    return shrunk


class Proof:
    """Runs layouts and holds each against one rank, which is run once, at the start."""

    def __init__(self, asked: ParallelCheck, ranks: Ranks, shrunk: Shrunk) -> None:
        self.asked, self.shrunk, self.ranks = asked, shrunk, ranks
        write_sources(asked.folder / "data", shrunk.sources)
        self._reference = self._run("one_rank", one_rank(shrunk.config), 1)

    def _run(self, name: str, config: Config, num_ranks: int) -> Path:
        path = self.asked.folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(config), path)
        task = {
            "kind": "layout",
            "config": str(path),
            "run_folder": str(self.asked.folder / name),
            "steps": self.asked.steps,
        }
        return self.ranks.run(name, task, num_ranks)

    def outcome(self, name: str, config: Config, num_ranks: int) -> Outcome:
        try:
            folder = self._run(name, config, num_ranks)
        except RanksFailed as error:
            return Outcome([], {}, "", self.asked.limits, str(error))
        return _compare(self._reference, folder, self.asked.limits)


def _compare(reference: Path, folder: Path, limits: dict[str, float]) -> Outcome:
    expected, ours = read_shards(reference), read_shards(folder)
    kinds: dict[str, dict[str, Difference]] = {
        "initial weight": differences(expected["initial"], ours["initial"]),
        "gradient": differences(expected["gradient"], ours["gradient"]),
        "update": differences(expected["final"], ours["final"], expected["initial"]),
    }
    records, (one,) = read_values(folder), read_values(reference)
    losses = {
        name: max(
            _relative(mine[name], theirs[name])
            for record in records
            for mine, theirs in zip(record["losses"], one["losses"], strict=True)
        )
        for name in one["losses"][0]
        if name.startswith(("loss", "mtp_loss", "load_balance_loss", "grad_norm"))
    }
    first = _first_output(one, records, limits["output"])
    return Outcome(by_module(kinds), losses, first, limits)


def _relative(ours: float, expected: float) -> float:
    if ours == expected:
        return 0.0
    difference = abs(ours - expected) / max(abs(expected), 1e-30)
    return difference if np.isfinite(difference) else float("inf")


def _first_output(one: Any, records: list[Any], tolerance: float) -> str:
    """The first module whose output, added up over the ranks, is not that of one rank. A sum along
    a direction may cancel, so it is held against the size of what it adds up."""
    for path, expected in sorted(one["trace"].items(), key=lambda entry: order_of_output(entry[0])):
        sums = [record["trace"][path] for record in records if path in record["trace"]]
        ours = np.sum(sums, axis=0) if sums else np.zeros(2)
        size = expected[0]
        squares = abs(ours[0] - size) / max(size, 1e-30)
        along = abs(ours[1] - expected[1]) / max(abs(expected[1]), np.sqrt(size), 1e-30)
        if not max(squares, along) <= tolerance:
            return path
    return ""


def order_of_output(path: str) -> tuple[Any, ...]:
    """Sorts modules by when their output is complete: what lies inside a layer before the layer."""
    return (*depth(path), -path.count("."), path)


def _bisect(proof: Proof, names: list[str], console: Console) -> None:
    """The dimensions alone, then in pairs, until a combination differs."""
    config = proof.shrunk.config
    parallel = config.parallel
    replicas = proof.shrunk.num_ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    sizes = [size for size in (1, 2) if size < len(names)]
    for size in sizes:
        found = []
        for chosen in combinations(names, size):
            part, num_ranks = alone(config, chosen, max(2, replicas))
            if num_ranks > proof.asked.max_ranks:
                continue
            outcome = proof.outcome("_and_".join(chosen) + "_alone", part, num_ranks)
            if not outcome.equal:
                found.append((chosen, outcome))
        for chosen, outcome in found:
            console.print(
                f"differs already with {' and '.join(chosen)} alone"
                + (f", first in {outcome.culprit}" if outcome.culprit else ""),
                highlight=False,
            )
        if found:
            return
    if len(names) > 1:
        console.print(f"only {' and '.join(names)} together differ", highlight=False)


# What is read and told ----------------------------------------------------------------------


def read_shards(folder: Path) -> dict[str, list[Shard]]:
    """Kind of record -> the shards of all ranks."""
    found: dict[str, list[Shard]] = {}
    for path in sorted(folder.glob("rank_*.json")):
        rank = int(path.stem.removeprefix("rank_"))
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            for entry in json.loads(path.read_text())["shards"]:
                shape, offset = tuple(entry["shape"]), tuple(entry["offset"])
                shard = Shard(entry["name"], shape, offset, arrays[entry["array"]], rank)
                found.setdefault(entry["kind"], []).append(shard)
    return found


def read_values(folder: Path) -> list[dict[str, Any]]:
    """The plain values of every rank, in order."""
    paths = sorted(folder.glob("rank_*.json"), key=lambda path: int(path.stem[5:]))
    return [json.loads(path.read_text())["values"] for path in paths]


def tell_shrunk(shrunk: Shrunk, console: Console) -> None:
    """What the configuration was shrunk to, one line a part of it."""
    parts: dict[str, list[str]] = {}
    for knob, was, now in shrunk.changes:
        part, _, name = knob.rpartition(".")
        parts.setdefault(part or knob, []).append(f"{name} {_short(was)} -> {now}")
    for part, changes in parts.items():
        console.print(f"shrunk {part}: " + ", ".join(changes), highlight=False, soft_wrap=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}... ({len(text)})"


def _label(config: Config, names: list[str], num_ranks: int) -> str:
    parts = [f"{name}={getattr(config.parallel, name)}" for name in names if name != "data"]
    parts += ["data=2"] if "data" in names else []
    return f"{' '.join(parts)} on {num_ranks} ranks"


def _tell(outcome: Outcome, console: Console) -> None:
    if outcome.failed:
        console.print(outcome.failed, markup=False, highlight=False)
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
    rest = outcome.modules[len(shown) :]
    if rest:
        console.print(f"{len(rest)} more modules, none above {rest[0].relative:.1e}")
    losses = [f"{name} {value:.1e}" for name, value in outcome.losses.items()]
    console.print("of the losses: " + ", ".join(losses), highlight=False, soft_wrap=True)
    if outcome.first_output:
        console.print(
            f"forward: the output of {outcome.first_output} is the first that differs",
            highlight=False,
        )


def _number(difference: Difference | None, limit: float) -> str:
    if difference is None:
        return "-"
    text = f"{difference.relative:.1e}"
    return f"[bold red]{text}[/]" if not difference.relative <= limit else text
