"""Runs a sweep on this machine, `at_once` runs at a time, with the cores split among them.

Owns: the processes and their logs. Does not own: the cells (`launch.sweep.plan`). No torch.

A finished cell is not run again. An interrupted cell resumes from its checkpoint. A failed cell
stops only its branches and is reported at the end.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nemotron_train.launch.sweep.plan import Cell, Sweep, is_finished
from nemotron_train.platform.cores import usable_cores


def run_here(sweep: Sweep, console: Any) -> list[str]:
    """Run the unfinished cells and return the names of those that failed or could not start.

    On an interrupt, all runs get SIGTERM, save a checkpoint and stop.
    """
    sweep.write_description()
    waiting = [cell for cell in sweep.cells if not is_finished(sweep.folder / cell.name)]
    num_done, failed = len(sweep.cells) - len(waiting), []
    if num_done:
        console.print(f"{num_done} of {len(sweep.cells)} runs are finished already")
    at_once, threads = cores_for(sweep, usable_cores())
    if at_once < sweep.at_once:
        console.print(
            f"at_once={sweep.at_once}: {at_once} at a time, for {usable_cores()} cores",
        )
    running: dict[subprocess.Popen, Cell] = {}
    try:
        while waiting or running:
            ready = _ready(waiting, list(running.values()), sweep.folder)
            for cell in [cell for cell in waiting if ready[cell.name] is None]:
                waiting.remove(cell)
                failed.append(cell.name)
                console.print(f"not started {cell.name}: {cell.after} is not finished")
            for cell in [cell for cell in waiting if ready[cell.name]]:
                if len(running) < at_once:
                    waiting.remove(cell)
                    running[_start(cell, sweep.folder, threads)] = cell
                    console.print(f"started {cell.name}")
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                cell = running.pop(process)
                num_done += 1
                outcome = f"{num_done}/{len(sweep.cells)}"
                if process.returncode != 0:
                    failed.append(cell.name)
                    outcome += f", exit {process.returncode}: see {_log(cell, sweep.folder)}"
                console.print(f"ended {cell.name} ({outcome})")
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
    return failed


def cores_for(sweep: Sweep, cores: int) -> tuple[int, int]:
    """(runs at a time, threads of each that does not set `train.threads`): as many of `at_once` as
    there are cores for. More would take longer than one after the other."""
    most_threads = max(cell.config.train.threads or 1 for cell in sweep.cells)
    at_once = max(1, min(sweep.at_once, cores // most_threads))
    return at_once, max(1, cores // at_once)


def _ready(waiting: list[Cell], running: list[Cell], folder: Path) -> dict[str, bool | None]:
    """Whether each waiting cell can start; None: never, because its parent failed."""
    unfinished = {cell.name for cell in [*waiting, *running]}
    ready: dict[str, bool | None] = {}
    for cell in waiting:
        if cell.after in unfinished:
            ready[cell.name] = False
        else:
            ready[cell.name] = True if not cell.after or is_finished(folder / cell.after) else None
    return ready


def _start(cell: Cell, folder: Path, threads: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "nemotron_train", "pretrain", *cell.overrides]
    if not any(override.startswith("train.threads=") for override in cell.overrides):
        command.append(f"train.threads={threads}")
    with open(_log(cell, folder), "ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _log(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.name}.log"
