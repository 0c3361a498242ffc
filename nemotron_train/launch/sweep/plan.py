"""A sweep: its recipe, its cells, and what is wrong with them before any of them runs. No torch.

Owns: recipes/sweep/, the grid in Hydra's multirun grammar (`train.seed=1,2,3`), names, the order
between cells, what each is compared with. Does not own: running the cells (`launch.sweep.local`,
`launch.sweep.slurm`), a run (each cell is one `nemotron-train pretrain`), nor what the runs show
(`report`).

A recipe holds, all optional but the first:

    overrides   the grid: overrides of `pretrain`, several values where all are wanted
    variants    name -> overrides that belong together (a size and its tokens), crossed with the
                grid
    extra       name -> overrides laid over the grid: cells beside it
    branches    name -> {of, step, overrides}: a cell for each cell called `of`, which begins from
                that one's checkpoint of `step`
    baseline    a group's name, or a value: each group is held to the one with this value instead
                of its own
    at_once     runs at a time on this machine

A cell is named after its variant and its swept values, seed last; its run folder lies in
runs/SWEEP/.
"""

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.compose.compose import compose_config, nearest, parse_overrides, recipes_folder
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, TrainConfig
from nemotron_train.launch.slurm.job import is_job_knob, refuse_unsafe
from nemotron_train.plan.derive import derive
from nemotron_train.run_folder.folder import refuse_another_run, write_atomically

SEED = "train.seed"
# Knobs of the sweep itself; cluster= and its knobs too. Every other override goes to the cells.
KNOBS = ("sweep", "name", "folder", "variant", "baseline", "at_once", "launcher", "nodes")
LAUNCHERS = ("local", "slurm")
DESCRIPTION = "sweep.json"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. `group` names what is compared: its members differ in the seed only and
    are held to those of the group `baseline`. A branch waits for the cell `after`."""

    name: str
    group: str
    seed: int
    overrides: list[str]
    baseline: str
    after: str
    config: Config


@dataclass(frozen=True)
class Sweep:
    """`folder` holds the cells' run folders; a cell stands behind the one that it waits for."""

    folder: Path
    cells: list[Cell]
    launcher: str
    at_once: int  # 0: as many as there is room for
    job_words: list[str]  # cluster=, its knobs and nodes=, for launcher=slurm

    def write_description(self) -> None:
        """sweep.json: what `report` needs to know of the cells."""
        cells = [
            {field.name: getattr(cell, field.name) for field in dataclasses.fields(cell)}
            for cell in self.cells
        ]
        for cell in cells:
            del cell["config"]
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"folder": str(self.folder), "cells": cells}, indent=1)
        write_atomically(self.folder / DESCRIPTION, text + "\n")


@dataclass(frozen=True)
class _Draft:
    """A cell before it is composed. `parts`: swept knob -> its value's word in the name."""

    parts: dict[str, str]
    seed: int
    overrides: list[str]
    parent: "_Draft | None" = None
    step: int = 0

    @property
    def group(self) -> str:
        return "-".join(self.parts.values()) or "run"

    @property
    def name(self) -> str:
        return f"{self.group}-seed{self.seed}"


def plan_sweep(overrides: Sequence[str]) -> Sweep:
    """The sweep that `sweep=RECIPE` and overrides ask for. Every cell's configuration is composed
    and, for this machine, derived, so that the last one's mistake shows before the first one runs.
    Raises ConfigError, also where a cell's folder holds another run."""
    own, job_words, given = _sort_out(overrides)
    recipe = _load_recipe(own["sweep"]) if "sweep" in own else {}
    name = own.get("name", own.get("sweep", "sweep"))
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (".", ".."):
        raise ConfigError(f"name={name}: use letters, digits, _ . and -")
    launcher = own.get("launcher", "local")
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher={launcher}: use {' or '.join(LAUNCHERS)}")
    if job_words and launcher == "local":
        raise ConfigError(f"{job_words[0]}: is for launcher=slurm")
    at_once = own.get("at_once", str(recipe.get("at_once", 1)) if launcher == "local" else "0")
    if not at_once.isdecimal() or (int(at_once) < 1 and "at_once" in own):
        raise ConfigError(f"at_once={at_once}: give the number of runs at a time, 1 or more")
    folder = Path(own.get("folder", "runs")) / name
    drafts = _drafts(recipe, own.get("variant", ""), given)
    groups = list(dict.fromkeys(draft.group for draft in drafts))
    baselines = _baselines(drafts, str(own.get("baseline", recipe.get("baseline", groups[0]))))
    cells = _compose(drafts, baselines, folder)
    for cell in cells if launcher == "local" else []:  # `plan_array` does it on a job's ranks
        plan = derive(cell.config).plan
        refuse_another_run(cell.config, plan)  # or a finished run of another kind would count as it
    return Sweep(folder, cells, launcher, int(at_once), job_words)


def is_finished(run_folder: Path) -> bool:
    """Whether summary.json says that the run reached its last token."""
    try:
        return bool(json.loads((run_folder / "summary.json").read_text())["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


# What was asked -----------------------------------------------------------------------------


def _sort_out(overrides: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Knobs of the sweep, words for the job, and what goes to the cells."""
    own: dict[str, str] = {}
    job_words, given = [], []
    for override in parse_overrides(overrides, sweeps=True):
        knob = override.key_or_group
        is_job = is_job_knob(knob)
        if override.is_sweep_override() and knob != "variant" and (knob in KNOBS or is_job):
            raise ConfigError(f"{override.input_line}: give one value, for all cells alike")
        if is_job:
            job_words.append(override.input_line)
        elif knob == "variant" and override.is_sweep_override():
            own[knob] = ",".join(override.sweep_string_iterator())
        elif knob in KNOBS:
            own[knob] = str(override.value())
        else:
            given.append(override.input_line)
    refuse_unsafe(given)  # they are kept in sweep.json, and in scripts
    return own, job_words, given


def _load_recipe(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    names = sorted(path.stem for path in (recipes_folder() / "sweep").glob("*.yaml"))
    if name not in names:
        raise ConfigError(
            f"sweep={name}: no such sweep{nearest(name, names)}; there are {', '.join(names)}"
        )
    loaded = OmegaConf.to_container(OmegaConf.load(recipes_folder() / "sweep" / f"{name}.yaml"))
    assert isinstance(loaded, dict)
    return {str(key): value for key, value in loaded.items()}


# The cells ----------------------------------------------------------------------------------


def _drafts(recipe: Mapping[str, Any], chosen: str, given: Sequence[str]) -> list[_Draft]:
    """The grid of each variant, the cells beside it, then the branches."""
    variants: dict[str, list[str]] = recipe.get("variants", {"": []})
    names = chosen.split(",") if chosen else list(variants)
    for name in names:
        if name not in variants or (not name and chosen):
            there = ", ".join(filter(None, variants)) or "none"
            raise ConfigError(
                f"variant={name}: no such variant{nearest(name, list(variants))}; there are {there}"
            )
    drafts = []
    for name in names:
        grid = _laid_over(_laid_over(recipe.get("overrides", []), variants[name]), given)
        parts = {"variant": name} if name else {}
        drafts += _product(grid, parts)
        for label, extra in recipe.get("extra", {}).items():
            drafts += [
                dataclasses.replace(draft, parts=_with_label(draft.parts, label, grid, extra))
                for draft in _product(_laid_over(grid, extra), parts)
            ]
    for label, branch in recipe.get("branches", {}).items():
        parents = [d for d in drafts if branch["of"] in (d.group, *d.parts.values())]
        if not parents:
            raise ConfigError(
                f"the sweep's branches are of {branch['of']}, and there is no such cell; there "
                f"are {', '.join(dict.fromkeys(draft.group for draft in drafts))}"
            )
        drafts += [_branch(parent, label, branch) for parent in parents]
    _refuse_twins(drafts)
    return drafts


def _product(grid: Sequence[str], parts: dict[str, str]) -> list[_Draft]:
    """Every combination of the grid's values; the first swept knob changes slowest."""
    drafts = [_Draft(parts, TrainConfig().seed, [])]
    for override in parse_overrides(grid, sweeps=True):
        knob, swept = override.key_or_group, override.is_sweep_override()
        key = override.input_line.partition("=")[0]  # with the + of an entry that is added
        values = list(override.sweep_string_iterator()) if swept else [override.get_value_string()]
        if knob == SEED and not all(value.isdecimal() for value in values):
            raise ConfigError(f"{override.input_line}: seeds are whole numbers, 0 or more")
        drafts = [
            _Draft(
                draft.parts | ({knob: _word(value)} if swept and knob != SEED else {}),
                int(value) if knob == SEED else draft.seed,
                [*draft.overrides, f"{key}={value}"],
            )
            for draft in drafts
            for value in values
        ]
    return drafts


def _with_label(
    parts: dict[str, str], label: str, grid: Sequence[str], extra: Sequence[str]
) -> dict[str, str]:
    """The name of a cell beside the grid: the label stands where the first swept knob did that
    `extra` has fixed, or else at the end."""
    swept = [o.key_or_group for o in parse_overrides(grid, sweeps=True) if o.is_sweep_override()]
    fixed = {text.partition("=")[0] for text in extra}
    place = next((knob for knob in swept if knob in fixed), "extra")
    order = ["variant", *swept, "extra"]
    return {k: label if k == place else parts[k] for k in order if k == place or k in parts}


def _branch(parent: _Draft, label: str, branch: Mapping[str, Any]) -> _Draft:
    words = list(branch["overrides"])
    fixed = [knob for knob in (text.partition("=")[0] for text in words) if knob in parent.parts]
    place = fixed[0] if fixed else "branch"
    parts = {k: v for k, v in (parent.parts | {place: label}).items() if k not in fixed[1:]}
    return _Draft(parts, parent.seed, words, parent, int(branch["step"]))


def _refuse_twins(drafts: Sequence[_Draft]) -> None:
    names = [draft.name for draft in drafts]
    for draft in drafts:
        if names.count(draft.name) > 1:
            raise ConfigError(
                f"two cells of the sweep are called {draft.name}: give each value once"
            )


def _baselines(drafts: Sequence[_Draft], asked: str) -> dict[str, str]:
    """Group -> the group that it is held to."""
    groups = {draft.group: draft.parts for draft in drafts}
    if asked in groups:
        return dict.fromkeys(groups, asked)
    knobs = [k for parts in groups.values() for k, word in parts.items() if word == asked]
    if not knobs:
        raise ConfigError(
            f"baseline={asked}: no such group{nearest(asked, list(groups))}; "
            f"there are {', '.join(groups)}"
        )
    found = {}
    for group, parts in groups.items():
        common = {k: v for k, v in parts.items() if k not in ("extra", "branch")}
        found[group] = "-".join((common | {knobs[0]: asked}).values())
        if found[group] not in groups:
            raise ConfigError(
                f"baseline={asked}: {group} would be held to {found[group]}, and there is no such "
                f"group; there are {', '.join(groups)}"
            )
    return found


def _compose(drafts: Sequence[_Draft], baselines: Mapping[str, str], folder: Path) -> list[Cell]:
    cells: dict[str, Cell] = {}
    for draft in drafts:
        words = list(draft.overrides)
        if draft.parent is not None:
            parent = folder / draft.parent.name
            words.insert(0, f"branch={_quoted(f'{parent}@{draft.step}')}")
        words += [f"name={draft.name}", f"folder={_quoted(str(folder))}"]
        words.append(f"logging.wandb_group={folder.name}")
        if draft.parent is None:
            config = compose_config(words)
        else:
            config = _compose_branch(words, cells[draft.parent.name].config, draft.step)
        after = draft.parent.name if draft.parent else ""
        cells[draft.name] = Cell(
            draft.name, draft.group, draft.seed, words, baselines[draft.group], after, config
        )
    return list(cells.values())


def _compose_branch(words: list[str], parent: Config, step: int) -> Config:
    """A branch's configuration before its parent has begun: composed as if it lay there."""
    _check_saved(parent, step)
    folder = Path(parent.folder) / parent.name
    if (folder / "config.yaml").exists():
        return compose_config(words)
    from omegaconf import OmegaConf

    with tempfile.TemporaryDirectory() as elsewhere:
        stand_in = Path(elsewhere) / parent.name
        stand_in.mkdir()
        OmegaConf.save(OmegaConf.structured(parent), stand_in / "config.yaml")
        others = [word for word in words if not word.startswith("branch=")]
        composed = compose_config([f"branch={_quoted(f'{stand_in}@{step}')}", *others])
    return dataclasses.replace(composed, branch=f"{folder}@{step}")


def _check_saved(parent: Config, step: int) -> None:
    """Raises ConfigError where the parent will not have a checkpoint of `step` at its end."""
    train = parent.train
    last, every = -(-train.total_tokens // train.global_batch_tokens), train.save_every_steps
    if not 0 < step < last:
        raise ConfigError(
            f"a branch begins from step {step} of {parent.name}, which has {last} steps: give a "
            "step in between"
        )
    if every == 0 or step % every:
        raise ConfigError(
            f"a branch begins from step {step} of {parent.name}, which saves every {every}: set "
            "train.save_every_steps to a divisor of it"
        )
    later = len(range(step, last, every)) + 1
    if train.keep_checkpoints < later:
        raise ConfigError(
            f"train.keep_checkpoints={train.keep_checkpoints}: {parent.name} would drop its "
            f"checkpoint of step {step} before it ends; give {later} or more"
        )


# Words --------------------------------------------------------------------------------------


def _laid_over(base: Sequence[str], given: Sequence[str]) -> list[str]:
    """`base` with each knob of `given` replaced where it stands, the new ones last."""
    merged = {text.partition("=")[0]: text for text in base}
    return list((merged | {text.partition("=")[0]: text for text in given}).values())


def _word(value: str) -> str:
    """A value as part of a name."""
    bare = value.rpartition("/")[2].removesuffix(".yaml")
    return re.sub(r"[^A-Za-z0-9_.]+", "_", bare)


def _quoted(value: str) -> str:
    """A value as Hydra's grammar takes it back."""
    if re.fullmatch(r"[A-Za-z0-9_./@-]+", value) and "/" in value:  # and so is no number
        return value
    # Backslashes stand for themselves but before a quote.
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + m[2].replace('"', '\\"'), value)
    return f'"{escaped}"'
