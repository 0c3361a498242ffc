"""Plans a sweep: composes and checks all its cells before any of them runs. No torch.

Owns: recipes/sweep/, the grid in Hydra's multirun grammar (`train.seed=1,2,3`), cell names, order
and baselines. Does not own: running the cells (`launch.sweep.local`, `launch.sweep.slurm`), a run
(each cell is one `nemotron-train pretrain`), evaluating the runs (`report`).

A recipe has these keys; all except the first are optional:

    overrides   the grid: overrides of `pretrain`, with several values for a swept knob
    variants    name -> overrides that belong together (a size and its tokens), crossed with the
                grid
    extra       name -> overrides that replace those of the grid: additional cells
    branches    name -> {of, step, overrides}: for each cell named `of`, a cell that branches from
                its checkpoint of `step`
    baseline    a group's name, or a value: each group is compared with the group that has this
                value instead of its own
    at_once     number of concurrent runs on this machine

A cell is named after its variant and its swept values, seed last. Its run folder is in runs/SWEEP/.
"""

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.compose.compose import compose_config, nearest, recipes_folder
from nemotron_train.compose.overrides import parse_overrides, value_texts
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.schema import Config, TrainConfig
from nemotron_train.launch.slurm.job import JobConfig, is_job_knob, refuse_unsafe
from nemotron_train.plan.derive import derive
from nemotron_train.platform.files import write_atomically
from nemotron_train.run_folder.folder import refuse_another_run

SEED = "train.seed"
# Knobs of the sweep itself, besides cluster= and cluster.KNOB=. Other overrides go to the cells.
KNOBS = ("sweep", "name", "folder", "variant", "baseline", "at_once", "launcher", "nodes")
LAUNCHERS = ("local", "slurm")
DESCRIPTION = "sweep.json"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    group: cells that differ only in the seed. baseline: the group that this group is compared
    with. after: the parent cell of a branch, which must finish first; "" for other cells.
    """

    name: str
    group: str
    seed: int
    overrides: list[str]
    baseline: str
    after: str
    config: Config


@dataclass(frozen=True)
class Sweep:
    """A planned sweep. folder: parent of the run folders. cells: parents come before branches."""

    folder: Path
    cells: list[Cell]
    launcher: str
    at_once: int  # 0: no limit
    job_words: list[str]  # cluster=, its knobs and nodes=, for launcher=slurm

    def write_description(self) -> None:
        """Write sweep.json, which `report` reads: the cells without their configurations."""
        cells = [
            {field.name: getattr(cell, field.name) for field in dataclasses.fields(cell)}
            for cell in self.cells
        ]
        for cell in cells:
            del cell["config"]
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json_text({"folder": str(self.folder), "cells": cells}, indent=1)
        write_atomically(self.folder / DESCRIPTION, text + "\n")


@dataclass(frozen=True)
class _Draft:
    """A cell before it is composed. parts: swept knob -> the part of the name for its value."""

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
    """Plan the sweep of `sweep=RECIPE` and overrides.

    Composes the configuration of every cell and, for launcher=local, derives it, so that an error
    in any cell shows before the first one runs. Raises ConfigError if a cell is invalid or its
    folder holds another run.
    """
    sweep_knobs, job_words, cell_overrides = _split_overrides(overrides)
    recipe = _load_recipe(sweep_knobs["sweep"]) if "sweep" in sweep_knobs else {}
    name = sweep_knobs.get("name", sweep_knobs.get("sweep", "sweep"))
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (".", ".."):
        raise ConfigError(f"name={name}: use letters, digits, _ . and -")
    launcher = sweep_knobs.get("launcher", "local")
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher={launcher}: use {' or '.join(LAUNCHERS)}")
    if job_words and launcher == "local":
        raise ConfigError(f"{job_words[0]}: is for launcher=slurm")
    at_once = sweep_knobs.get(
        "at_once", str(recipe.get("at_once", 1)) if launcher == "local" else "0"
    )
    if not at_once.isdecimal() or (int(at_once) < 1 and "at_once" in sweep_knobs):
        raise ConfigError(f"at_once={at_once}: give the number of runs at a time, 1 or more")
    folder = Path(sweep_knobs.get("folder", "runs")) / name
    drafts = _drafts(recipe, sweep_knobs.get("variant", ""), cell_overrides)
    groups = list(dict.fromkeys(draft.group for draft in drafts))
    baselines = _baselines(
        drafts, str(sweep_knobs.get("baseline", recipe.get("baseline", groups[0])))
    )
    cells = _compose(drafts, baselines, folder)
    if launcher == "local":  # for Slurm, `plan_array` does this with the ranks of the job
        for cell in cells:
            # A finished run of another configuration would otherwise count as this cell.
            refuse_another_run(cell.config, derive(cell.config).plan)
    return Sweep(folder, cells, launcher, int(at_once), job_words)


def is_finished(run_folder: Path) -> bool:
    """Whether the run trained to its last token, according to its summary.json."""
    try:
        return bool(json.loads((run_folder / "summary.json").read_text())["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


# Overrides and recipe -----------------------------------------------------------------------


def _split_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Split into knobs of the sweep, overrides of the Slurm job, and overrides of the cells."""
    sweep_knobs: dict[str, str] = {}
    job_words, cell_overrides = [], []
    for override in parse_overrides(overrides, JobConfig, sweeps=True):
        knob = override.key_or_group
        is_job = is_job_knob(knob)
        if override.is_sweep_override() and knob != "variant" and (knob in KNOBS or is_job):
            raise ConfigError(f"{override.input_line}: give one value, for all cells alike")
        if is_job:
            job_words.append(override.input_line)
        elif knob == "variant" and override.is_sweep_override():
            sweep_knobs[knob] = ",".join(override.sweep_string_iterator())
        elif knob in KNOBS:
            sweep_knobs[knob] = str(override.value())
        else:
            cell_overrides.append(override.input_line)
    refuse_unsafe(cell_overrides)  # they are written to sweep.json and to scripts
    return sweep_knobs, job_words, cell_overrides


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


def _drafts(recipe: Mapping[str, Any], variant: str, overrides: Sequence[str]) -> list[_Draft]:
    """The drafts of all cells: for each variant its grid and extra cells, then the branches."""
    variants: dict[str, list[str]] = recipe.get("variants", {"": []})
    names = variant.split(",") if variant else list(variants)
    for name in names:
        if name not in variants or (not name and variant):
            available = ", ".join(filter(None, variants)) or "none"
            raise ConfigError(
                f"variant={name}: no such variant{nearest(name, list(variants))}; "
                f"there are {available}"
            )
    drafts = []
    for name in names:
        grid = _merge_overrides(
            _merge_overrides(recipe.get("overrides", []), variants[name]), overrides
        )
        parts = {"variant": name} if name else {}
        drafts += _product(grid, parts)
        for label, extra in recipe.get("extra", {}).items():
            drafts += [
                dataclasses.replace(draft, parts=_with_label(draft.parts, label, grid, extra))
                for draft in _product(_merge_overrides(grid, extra), parts)
            ]
    for label, branch in recipe.get("branches", {}).items():
        parents = [d for d in drafts if branch["of"] in (d.group, *d.parts.values())]
        if not parents:
            raise ConfigError(
                f"the sweep's branches are of {branch['of']}, and there is no such cell; there "
                f"are {', '.join(dict.fromkeys(draft.group for draft in drafts))}"
            )
        drafts += [_branch(parent, label, branch) for parent in parents]
    _refuse_duplicates(drafts)
    return drafts


def _product(grid: Sequence[str], parts: dict[str, str]) -> list[_Draft]:
    """All combinations of the grid's values. The first swept knob changes slowest."""
    drafts = [_Draft(parts, TrainConfig().seed, [])]
    for override in parse_overrides(grid, JobConfig, sweeps=True):
        knob, is_swept = override.key_or_group, override.is_sweep_override()
        key = override.input_line.partition("=")[0]  # includes the + prefix of an added entry
        values = value_texts(override, JobConfig)
        if knob == SEED and not all(value.isdecimal() for value in values):
            raise ConfigError(f"{override.input_line}: seeds are whole numbers, 0 or more")
        drafts = [
            _Draft(
                draft.parts | ({knob: _word(value)} if is_swept and knob != SEED else {}),
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
    """The name parts of an extra cell. The label replaces the first swept knob that `extra` fixes,
    or comes last if it fixes none."""
    swept = [
        override.key_or_group
        for override in parse_overrides(grid, JobConfig, sweeps=True)
        if override.is_sweep_override()
    ]
    fixed = {text.partition("=")[0] for text in extra}
    label_knob = next((knob for knob in swept if knob in fixed), "extra")
    order = ["variant", *swept, "extra"]
    return {
        k: label if k == label_knob else parts[k] for k in order if k == label_knob or k in parts
    }


def _branch(parent: _Draft, label: str, branch: Mapping[str, Any]) -> _Draft:
    words = list(branch["overrides"])
    fixed = [knob for knob in (text.partition("=")[0] for text in words) if knob in parent.parts]
    label_knob = fixed[0] if fixed else "branch"
    parts = {k: v for k, v in (parent.parts | {label_knob: label}).items() if k not in fixed[1:]}
    return _Draft(parts, parent.seed, words, parent, int(branch["step"]))


def _refuse_duplicates(drafts: Sequence[_Draft]) -> None:
    names = [draft.name for draft in drafts]
    for draft in drafts:
        if names.count(draft.name) > 1:
            raise ConfigError(
                f"two cells of the sweep are called {draft.name}: give each value once"
            )


def _baselines(drafts: Sequence[_Draft], baseline: str) -> dict[str, str]:
    """Group -> the group that it is compared with."""
    groups = {draft.group: draft.parts for draft in drafts}
    if baseline in groups:
        return dict.fromkeys(groups, baseline)
    knobs = [k for parts in groups.values() for k, word in parts.items() if word == baseline]
    if not knobs:
        raise ConfigError(
            f"baseline={baseline}: no such group{nearest(baseline, list(groups))}; "
            f"there are {', '.join(groups)}"
        )
    baselines = {}
    for group, parts in groups.items():
        common = {k: v for k, v in parts.items() if k not in ("extra", "branch")}
        baselines[group] = "-".join((common | {knobs[0]: baseline}).values())
        if baselines[group] not in groups:
            raise ConfigError(
                f"baseline={baseline}: {group} would be held to {baselines[group]}, and there is "
                f"no such group; there are {', '.join(groups)}"
            )
    return baselines


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
    """A branch's configuration, also before its parent has started.

    If the parent has no config.yaml yet, a temporary one replaces it.
    """
    _check_saved(parent, step)
    folder = Path(parent.folder) / parent.name
    if (folder / "config.yaml").exists():
        return compose_config(words)
    from omegaconf import OmegaConf

    with tempfile.TemporaryDirectory() as temporary:
        stand_in = Path(temporary) / parent.name
        stand_in.mkdir()
        OmegaConf.save(OmegaConf.structured(parent), stand_in / "config.yaml")
        other_words = [word for word in words if not word.startswith("branch=")]
        composed = compose_config([f"branch={_quoted(f'{stand_in}@{step}')}", *other_words])
    return dataclasses.replace(composed, branch=f"{folder}@{step}")


def _check_saved(parent: Config, step: int) -> None:
    """Raises ConfigError if the parent will not have the checkpoint of `step` when it ends."""
    train = parent.train
    num_steps, save_every = (
        -(-train.total_tokens // train.global_batch_tokens),
        train.save_every_steps,
    )
    if not 0 < step < num_steps:
        raise ConfigError(
            f"a branch begins from step {step} of {parent.name}, which has {num_steps} steps: give "
            "a step in between"
        )
    if save_every == 0 or step % save_every:
        raise ConfigError(
            f"a branch begins from step {step} of {parent.name}, which saves every {save_every}: "
            "set train.save_every_steps to a divisor of it"
        )
    num_checkpoints = len(range(step, num_steps, save_every)) + 1
    if train.keep_checkpoints < num_checkpoints:
        raise ConfigError(
            f"train.keep_checkpoints={train.keep_checkpoints}: {parent.name} would drop its "
            f"checkpoint of step {step} before it ends; give {num_checkpoints} or more"
        )


# Words --------------------------------------------------------------------------------------


def _merge_overrides(base: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Replace the knobs of `base` by those of `overrides` in place; append new knobs."""
    merged = {text.partition("=")[0]: text for text in base}
    return list((merged | {text.partition("=")[0]: text for text in overrides}).values())


def _word(value: str) -> str:
    """A value as part of a cell name."""
    bare = value.rpartition("/")[2].removesuffix(".yaml")
    return re.sub(r"[^A-Za-z0-9_.]+", "_", bare)


def _quoted(value: str) -> str:
    """Quote a value for Hydra's override grammar."""
    if (
        re.fullmatch(r"[A-Za-z0-9_./@-]+", value) and "/" in value
    ):  # with a / it cannot be parsed as a number
        return value
    # Backslashes are literal except before a quote.
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + m[2].replace('"', '\\"'), value)
    return f'"{escaped}"'
