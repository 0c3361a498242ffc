"""Pairs runs for comparison: the groups of a sweep, or matching runs among plain run folders. No
torch.

Owns: finding the baseline, the groups and the repeats. Does not own: the numbers (`gap`).

The two runs of a pair share the seed, and so the initial weights and the data order. Groups differ
in the precision plan, or as defined in the sweep folder. A repeat is a group that computes the same
as the baseline with another summation order: its gap is the effect of rounding alone.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.knobs import is_free, to_plain
from nemotron_train.config.schema import Config, Dtype
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.report.plan.diff import flatten
from nemotron_train.report.runs.policy import is_policy
from nemotron_train.report.runs.read import Run, read_run
from nemotron_train.run_folder.folder import read_config

# Knobs that change only the order of summation, not the mathematics.
SUMS_ONLY = ("train.micro_batch_sequences", "parallel.")


@dataclass(frozen=True)
class Comparison:
    """Groups of runs and their common baseline.

    groups: name -> seed -> run, in display order, including the baseline. repeats: groups that
    equal the baseline except for the summation order."""

    name: str
    baseline: str
    groups: dict[str, dict[int, Run]]
    repeats: tuple[str, ...] = ()

    def pairs(self, group: str) -> dict[int, tuple[Run, Run]]:
        """Seed -> (run, baseline run of that seed), ascending by seed."""
        twins = self.groups.get(self.baseline, {})
        runs = self.groups[group]
        return {seed: (runs[seed], twins[seed]) for seed in sorted(runs) if seed in twins}


def is_sweep(folder: Path) -> bool:
    """Whether `folder` is a sweep folder (it has a sweep.json)."""
    return (folder / "sweep.json").is_file()


def read_sweep(folder: Path, read: Callable[[Path], Run] = read_run) -> list[Comparison]:
    """Reads the runs of a sweep that have logged a step, unfinished ones included. Returns one
    comparison per baseline, since groups of a sweep can have different baselines. `read` reads one
    run folder. Raises ConfigError if sweep.json is missing or invalid."""
    groups: dict[str, dict[int, Run]] = {}
    baselines: dict[str, list[str]] = {}
    for name, group, seed, baseline in _cells(folder):
        members = baselines.setdefault(baseline, [])
        if group not in members:
            members.append(group)
        try:
            groups.setdefault(group, {})[seed] = read(folder / name)
        except ConfigError:
            continue  # not started yet
    comparisons = []
    for baseline, members in baselines.items():
        ordered = [baseline, *(group for group in members if group != baseline)]
        present = {group: groups[group] for group in ordered if groups.get(group)}
        comparisons.append(_with_repeats(Comparison(folder.resolve().name, baseline, present)))
    return comparisons


def cell_folders(sweep: Path) -> list[Path]:
    """The run folders of a sweep, started or not, in the order in which `read_sweep` reads them.
    Raises ConfigError if sweep.json is missing or invalid."""
    return [sweep / name for name, *_ in _cells(sweep)]


def _cells(folder: Path) -> list[tuple[str, str, int, str]]:
    """(name, group, seed, baseline) of each run that sweep.json lists. Raises ConfigError for an
    invalid file or a name that is not a plain folder name."""
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
    """Comparisons among plain run folders: runs that differ only in the precision plan, the seed
    and the summation order. The baseline is the plan without block formats; BF16 is preferred to
    FP32. Runs that train on rollouts are left out."""
    clusters: dict[str, list[tuple[Run, Config]]] = {}
    for run in runs:
        config = config_of(run)
        if config is not None and not is_policy(run, config):  # the loss of a policy is no loss
            clusters.setdefault(_shared_knobs(config), []).append((run, config))
    comparisons = []
    for members in clusters.values():
        groups, configs = _grouped(members)
        plain = [name for name, config in configs.items() if _is_plain(config)]
        plain.sort(key=lambda name: configs[name].precision.parameter_dtype != Dtype.bfloat16)
        if not plain:
            continue
        ordered = {name: groups[name] for name in [plain[0], *(g for g in groups if g != plain[0])]}
        comparison = _with_repeats(Comparison(configs[plain[0]].model.name, plain[0], ordered))
        others = set(groups) - {plain[0], *comparison.repeats}
        if any(comparison.pairs(group) for group in others):
            comparisons.append(comparison)
    return comparisons


def config_of(run: Run) -> Config | None:
    """The run's configuration; None if this version cannot read it."""
    return config_in(run.path)


def config_in(folder: Path) -> Config | None:
    """The configuration in a run folder; None if this version cannot read it."""
    try:
        return read_config(folder)
    except ConfigError:
        return None


def is_repeat(config: Config, other: Config) -> bool:
    """Whether two configurations of the same seed define the same mathematics."""
    ours, theirs = flatten(to_plain(config)), flatten(to_plain(other))
    return all(
        ours.get(knob) == theirs.get(knob) or is_free(knob) or knob.startswith(SUMS_ONLY)
        for knob in ours | theirs
    )


def _with_repeats(comparison: Comparison) -> Comparison:
    """The comparison with `repeats` filled in."""
    repeats = []
    for group in comparison.groups:
        pairs = list(comparison.pairs(group).values())
        if group != comparison.baseline and pairs:
            ours, theirs = (config_of(run) for run in pairs[0])
            if ours is not None and theirs is not None and is_repeat(ours, theirs):
                repeats.append(group)
    return Comparison(comparison.name, comparison.baseline, comparison.groups, tuple(repeats))


def _shared_knobs(config: Config) -> str:
    """The knobs that all runs of one comparison share, as JSON text."""
    knobs = flatten(to_plain(config))
    varying = ("precision.", "train.seed", "branch")
    shared: dict[str, Any] = {
        knob: value
        for knob, value in knobs.items()
        if not (is_free(knob) or knob.startswith((*varying, *SUMS_ONLY)))
    }
    return json_text(shared, sort_keys=True, default=str)


def _grouped(
    members: Sequence[tuple[Run, Config]],
) -> tuple[dict[str, dict[int, Run]], dict[str, Config]]:
    """Runs by plan and seed, and one configuration per group. A second run of the same plan and
    seed gets its own group."""
    groups: dict[str, dict[int, Run]] = {}
    configs: dict[str, Config] = {}
    for run, config in members:
        name = config.precision.name
        if config.train.seed in groups.get(name, {}):
            name = f"{name} ({run.path})"
        groups.setdefault(name, {})[config.train.seed] = run
        configs.setdefault(name, config)
    return groups, configs


def _is_plain(config: Config) -> bool:
    return not resolve_plan(config).is_quantized
