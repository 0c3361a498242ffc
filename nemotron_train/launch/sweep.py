"""A grid of runs: its cells, and running them on this machine. No torch.

Owns: recipes/sweep/, the grid in Hydra's multirun grammar (`train.seed=1,2,3`), processes and what
is kept of them. Does not own: a run (each cell is one `nemotron-train pretrain`), nor what the
runs show (`report`).

A cell is named after its swept values, seed last; its run folder lies in runs/SWEEP/. A finished
cell is not run again, an interrupted one goes on from its checkpoint, a failed one is named at the
end and does not stop the others.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_train.compose import compose_config, nearest, parse_overrides, recipes_folder
from nemotron_train.config.derive import derive
from nemotron_train.config.schema import ConfigError, TrainConfig
from nemotron_train.train.run_folder import refuse_another_run

SEED = "train.seed"
# Knobs of the sweep itself; every other override goes to the cells.
KNOBS = ("sweep", "name", "folder", "at_once", "baseline")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. `group` names what is compared; its members differ in the seed only."""

    name: str
    group: str
    seed: int
    overrides: list[str]


@dataclass(frozen=True)
class Sweep:
    """`folder` holds the cells' run folders; `baseline` is the group that others are held to."""

    folder: Path
    baseline: str
    at_once: int
    cells: list[Cell] = field(default_factory=list)


def plan_sweep(overrides: Sequence[str]) -> Sweep:
    """The sweep that `sweep=RECIPE` and overrides ask for. Every cell's configuration is composed
    and derived, so that the last one's mistake shows before the first one runs. Raises
    ConfigError, also where a cell's folder holds another run."""
    parsed = parse_overrides(overrides, sweeps=True)
    own = {o.key_or_group: str(o.value()) for o in parsed if o.key_or_group in KNOBS}
    given = [o.input_line for o in parsed if o.key_or_group not in KNOBS]
    recipe = _load_recipe(own["sweep"]) if "sweep" in own else {}
    grid = _laid_over(recipe.get("overrides", []), given)
    name = own.get("name", own.get("sweep", "sweep"))
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (".", ".."):
        raise ConfigError(f"name={name}: use letters, digits, _ . and -")
    at_once = own.get("at_once", "1")
    if not at_once.isdecimal() or int(at_once) < 1:
        raise ConfigError(f"at_once={at_once}: give the number of runs at a time, 1 or more")
    folder = Path(own.get("folder", "runs")) / name
    cells = _cells(grid, "", folder)
    for label, extra in recipe.get("extra", {}).items():
        cells += _cells(_laid_over(grid, extra), label, folder)
    names = [cell.name for cell in cells]
    for cell in cells:
        if names.count(cell.name) > 1:
            raise ConfigError(
                f"two cells of the sweep are called {cell.name}: give each value once"
            )
        config = compose_config(cell.overrides)
        derive(config)
        refuse_another_run(config)  # or a finished run of another kind would count as this cell
    groups = list(dict.fromkeys(cell.group for cell in cells))
    baseline = own["baseline"] if "baseline" in own else recipe.get("baseline", groups[0])
    if baseline not in groups:
        raise ConfigError(
            f"baseline={baseline}: no such group{nearest(baseline, groups)}; "
            f"there are {', '.join(groups)}"
        )
    return Sweep(folder, baseline, int(at_once), cells)


def run_sweep(sweep: Sweep, console: Any) -> list[str]:
    """Run what is not finished, `at_once` runs at a time with the cores divided among them; the
    names of the cells that failed. An interrupt stops the runs with their checkpoints saved."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    description = dataclasses.asdict(sweep) | {"folder": str(sweep.folder)}
    (sweep.folder / "sweep.json").write_text(json.dumps(description, indent=1) + "\n")
    waiting = [cell for cell in sweep.cells if not is_finished(sweep.folder / cell.name)]
    num_done, failed = len(sweep.cells) - len(waiting), []
    if num_done:
        console.print(f"{num_done} of {len(sweep.cells)} runs are finished already")
    threads = max(1, len(os.sched_getaffinity(0)) // sweep.at_once)
    running: dict[subprocess.Popen, Cell] = {}
    try:
        while waiting or running:
            while waiting and len(running) < sweep.at_once:
                cell = waiting.pop(0)
                running[_start(cell, sweep.folder, threads)] = cell
                console.print(f"started {cell.name}", highlight=False)
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                cell = running.pop(process)
                num_done += 1
                outcome = f"{num_done}/{len(sweep.cells)}"
                if process.returncode != 0:
                    failed.append(cell.name)
                    outcome += f", exit {process.returncode}: see {_log(cell, sweep.folder)}"
                console.print(f"ended {cell.name} ({outcome})", highlight=False)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
    return failed


def is_finished(run_folder: Path) -> bool:
    """Whether summary.json says that the run reached its last token."""
    try:
        return bool(json.loads((run_folder / "summary.json").read_text())["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _start(cell: Cell, folder: Path, threads: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "nemotron_train", "pretrain", *cell.overrides]
    if not any(o.startswith("train.threads=") for o in cell.overrides):
        command.append(f"train.threads={threads}")
    with open(_log(cell, folder), "ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _log(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.name}.log"


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


def _laid_over(base: Sequence[str], given: Sequence[str]) -> list[str]:
    """`base` with each knob of `given` replaced where it stands, the new ones last."""
    merged = {text.partition("=")[0]: text for text in base}
    return list((merged | {text.partition("=")[0]: text for text in given}).values())


def _cells(grid: Sequence[str], label: str, folder: Path) -> list[Cell]:
    """Every combination of the grid's values; the first swept knob changes slowest."""
    combinations: list[tuple[list[str], list[str], int]] = [([], [], TrainConfig().seed)]
    for override in parse_overrides(grid, sweeps=True):
        knob, swept = override.key_or_group, override.is_sweep_override()
        values = list(override.sweep_string_iterator()) if swept else [override.get_value_string()]
        combinations = [
            (
                [*chosen, f"{knob}={value}"],
                [*parts, _name_part(value)] if swept and knob != SEED else parts,
                int(value) if knob == SEED else seed,
            )
            for chosen, parts, seed in combinations
            for value in values
        ]
    cells = []
    for chosen, parts, seed in combinations:
        group = label or "-".join(parts) or "run"
        name = f"{group}-seed{seed}"
        own = [f"name={name}", f"folder={folder}", f"logging.wandb_group={folder.name}"]
        cells.append(Cell(name, group, seed, [*chosen, *own]))
    return cells


def _name_part(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", value.rpartition("/")[2].removesuffix(".yaml"))
