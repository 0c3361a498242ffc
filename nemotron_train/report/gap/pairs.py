"""Which runs are held against which: the groups of a sweep, or the twins among plain run folders.
No torch.

Owns: finding the baseline, the groups and the repeats. Does not own: the numbers (`gap`).

A pair shares its seed, hence initial weights and data order. Groups differ in the precision plan,
or in what a sweep's folder says. A repeat is a group that computes what the baseline does with its
sums in another order: its gap is what rounding alone does to a run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.knobs import is_free, to_plain
from nemotron_train.config.schema import Config, Dtype
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.report.plan.diff import flatten
from nemotron_train.report.runs.read import Run, read_run
from nemotron_train.run_folder.folder import read_config

# Knobs that leave the mathematics alone and change the order of sums.
SUMS_ONLY = ("train.micro_batch_sequences", "parallel.")


@dataclass(frozen=True)
class Comparison:
    """groups: name -> seed -> run, in the order shown, the baseline's too. repeats: groups that
    are the baseline with its sums in another order."""

    name: str
    baseline: str
    groups: dict[str, dict[int, Run]]
    repeats: tuple[str, ...] = ()

    def pairs(self, group: str) -> dict[int, tuple[Run, Run]]:
        """Seed -> (run, its twin of the baseline), by seed."""
        twins = self.groups.get(self.baseline, {})
        runs = self.groups[group]
        return {seed: (runs[seed], twins[seed]) for seed in sorted(runs) if seed in twins}


def is_sweep(folder: Path) -> bool:
    """Whether `folder` is a sweep's rather than a run's."""
    return (folder / "sweep.json").is_file()


def read_sweep(folder: Path, read: Callable[[Path], Run] = read_run) -> list[Comparison]:
    """The runs of a sweep that have logged a step, going ones too, each by `read`: a comparison for
    each baseline, for the groups of a sweep may have baselines of their own. Raises ConfigError."""
    groups: dict[str, dict[int, Run]] = {}
    baselines: dict[str, list[str]] = {}
    for name, group, seed, baseline in _cells(folder):
        members = baselines.setdefault(baseline, [])
        if group not in members:
            members.append(group)
        try:
            groups.setdefault(group, {})[seed] = read(folder / name)
        except ConfigError:
            continue  # not begun yet
    found = []
    for baseline, members in baselines.items():
        ordered = [baseline, *(group for group in members if group != baseline)]
        present = {group: groups[group] for group in ordered if groups.get(group)}
        found.append(_with_repeats(Comparison(folder.resolve().name, baseline, present)))
    return found


def cell_folders(sweep: Path) -> list[Path]:
    """Where a sweep's runs lie, in the order in which `read_sweep` reads them, begun or not."""
    return [sweep / name for name, *_ in _cells(sweep)]


def _cells(folder: Path) -> list[tuple[str, str, int, str]]:
    """(name, group, seed, baseline) of each run that sweep.json lists."""
    try:
        sweep = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        shared = str(sweep.get("baseline", ""))
        cells = [
            (str(c["name"]), str(c["group"]), int(c["seed"]), str(c.get("baseline", shared)))
            for c in sweep["cells"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder}: no sweep, its sweep.json cannot be read ({error})") from None
    for name, *_ in cells:
        if name != Path(name).name or name in (".", ".."):
            raise ConfigError(f"{folder}: sweep.json names {name!r}, which is no run in the folder")
    return cells


def find_pairs(runs: Sequence[Run]) -> list[Comparison]:
    """Comparisons among plain run folders: runs that differ in nothing but the precision plan, the
    seed and the order of sums. The baseline is the plan without block formats, BF16 before FP32."""
    clusters: dict[str, list[tuple[Run, Config]]] = {}
    for run in runs:
        config = config_of(run)
        if config is not None:
            clusters.setdefault(_alike(config), []).append((run, config))
    found = []
    for members in clusters.values():
        groups, kinds = _grouped(members)
        plain = [name for name, config in kinds.items() if _is_plain(config)]
        plain.sort(key=lambda name: kinds[name].precision.parameter_dtype != Dtype.bfloat16)
        if not plain:
            continue
        ordered = {name: groups[name] for name in [plain[0], *(g for g in groups if g != plain[0])]}
        comparison = _with_repeats(Comparison(kinds[plain[0]].model.name, plain[0], ordered))
        others = set(groups) - {plain[0], *comparison.repeats}
        if any(comparison.pairs(group) for group in others):
            found.append(comparison)
    return found


def config_of(run: Run) -> Config | None:
    """The run's configuration; None where this version cannot read it."""
    try:
        return read_config(run.path)
    except ConfigError:
        return None


def is_repeat(config: Config, other: Config) -> bool:
    """Whether two configurations of one seed ask for the same mathematics."""
    ours, theirs = flatten(to_plain(config)), flatten(to_plain(other))
    return all(
        ours.get(knob) == theirs.get(knob) or is_free(knob) or knob.startswith(SUMS_ONLY)
        for knob in ours | theirs
    )


def _with_repeats(comparison: Comparison) -> Comparison:
    repeats = []
    for group in comparison.groups:
        pairs = list(comparison.pairs(group).values())
        if group != comparison.baseline and pairs:
            ours, theirs = (config_of(run) for run in pairs[0])
            if ours is not None and theirs is not None and is_repeat(ours, theirs):
                repeats.append(group)
    return Comparison(comparison.name, comparison.baseline, comparison.groups, tuple(repeats))


def _alike(config: Config) -> str:
    """What runs of one comparison share, as text."""
    knobs = flatten(to_plain(config))
    own = ("precision.", "train.seed", "branch")
    shared: dict[str, Any] = {
        knob: value
        for knob, value in knobs.items()
        if not (is_free(knob) or knob.startswith((*own, *SUMS_ONLY)))
    }
    return json.dumps(shared, sort_keys=True, default=str)


def _grouped(
    members: Sequence[tuple[Run, Config]],
) -> tuple[dict[str, dict[int, Run]], dict[str, Config]]:
    """Runs by plan and seed, and a configuration of each group. A second run of one plan and seed
    goes into a group of its own."""
    groups: dict[str, dict[int, Run]] = {}
    kinds: dict[str, Config] = {}
    for run, config in members:
        name = config.precision.name
        if config.train.seed in groups.get(name, {}):
            name = f"{name} ({run.path})"
        groups.setdefault(name, {})[config.train.seed] = run
        kinds.setdefault(name, config)
    return groups, kinds


def _is_plain(config: Config) -> bool:
    return not resolve_plan(config).is_quantized
