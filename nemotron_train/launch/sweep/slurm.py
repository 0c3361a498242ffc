"""Runs a sweep on a cluster as a Slurm job array with one task per cell. No torch.

Owns: which cells are submitted, in which arrays, and their dependencies. Does not own: the cells
(`launch.sweep.plan`), a cell's job (`launch.slurm.job`: the same script, requeues and checks as for
a single run), the array's script (`slurm/array.sh`). docs/decisions/0007 gives the reasons.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.visible import one_line
from nemotron_train.launch.slurm import job as slurm_job
from nemotron_train.launch.slurm.checks import branch_problems, check_memory, local_problems
from nemotron_train.launch.slurm.job import (
    Job,
    make_job,
    refuse_unsafe,
    requested_cluster,
    write_links,
)
from nemotron_train.launch.slurm.status import job_numbers, last_end, read_queue
from nemotron_train.launch.sweep.plan import Sweep, is_finished
from nemotron_train.platform.files import write_atomically
from nemotron_train.run_folder.folder import refuse_another_run

ARRAY_FOLDER = "array"  # in a sweep's folder: job.sh and the logs of its tasks


@dataclass(frozen=True)
class Array:
    """A sweep and the jobs of its cells in the same order; a cell's index is its task number."""

    sweep: Sweep
    jobs: list[Job]


def plan_array(sweep: Sweep) -> Array:
    """Plan the job of every cell on all its ranks. Prints memory warnings to stderr.

    Raises ConfigError for the first cell that cannot run.
    """
    cluster, nodes = requested_cluster(sweep.job_words)
    if cluster.chain_links > 1:
        raise ConfigError(
            f"cluster.chain_links={cluster.chain_links}: a sweep's cells requeue themselves; set 1"
        )
    jobs = []
    for cell in sweep.cells:
        refuse_unsafe(cell.overrides)
        words = list(cell.overrides)
        if not any(word.startswith("train.threads=") for word in words):
            # Several cells may share a node, so each uses only its allocated cores.
            words.append(f"train.threads={cluster.cpus_per_rank}")
        job = make_job(cell.config, cluster, nodes, words)
        refuse_another_run(cell.config, job.derived.plan)
        warning = check_memory(job.config, job.derived, cluster, nodes)
        if warning:
            print("nemotron-train:", one_line(f"{cell.name}: {warning}"), file=sys.stderr)
        jobs.append(job)
    return Array(sweep, jobs)


def render_array(array: Array) -> str:
    """The array's complete script."""
    sweep = array.sweep
    names = [cell.name for cell in sweep.cells]
    return slurm_job.render_array(sweep.folder.name, sweep.folder, names, array.jobs[0])


def submit_array(array: Array, console: Any) -> bool:
    """Submit the cells that are neither finished nor queued; branches depend on their parents.

    Returns whether any cell is unfinished. Raises ConfigError if data is missing, a run folder
    holds another run, or Slurm rejects a job.
    """
    slurm_job.need_sbatch()
    sweep = array.sweep
    to_submit, is_queued = _cells_to_submit(array, console)
    if not to_submit:
        return is_queued
    for index in to_submit:
        cell, job = sweep.cells[index], array.jobs[index]
        problems = local_problems(job.config, job.derived.plan, job.cluster)
        if not cell.after or is_finished(sweep.folder / cell.after):
            problems += branch_problems(job.config)
        for problem in problems:
            raise ConfigError(f"{cell.name}: {problem}")
    sweep.write_description()
    for index in to_submit:
        slurm_job.write_script(array.jobs[index])
    script = sweep.folder / ARRAY_FOLDER / "job.sh"
    script.parent.mkdir(exist_ok=True)
    write_atomically(script, render_array(array))
    for parent, indices in _by_parent(sweep, to_submit).items():
        tasks = _ranges(indices) + (f"%{sweep.at_once}" if sweep.at_once else "")
        options = [f"--array={tasks}"]
        if parent:
            # If the parent fails, Slurm cancels its branches instead of keeping them pending.
            number = job_numbers(sweep.folder / parent)[-1]
            options += [f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"]
        number = slurm_job.sbatch(array.jobs[indices[0]], script, "job_%A_%a.log", *options)
        for index in indices:
            write_links(array.jobs[index], [f"{number}_{index}"])
        condition = f", after {parent}" if parent else ""
        console.print(
            f"submitted array {number}: {len(indices)} cells{condition}",
            soft_wrap=True,
        )
    console.print(
        f"script {script}; nemotron-train slurm status {sweep.folder} tells how it goes",
        soft_wrap=True,
    )
    return True


def _cells_to_submit(array: Array, console: Any) -> tuple[list[int], bool]:
    """The indices of the cells to submit, and whether other cells are queued.

    Prints which cells are finished, queued or failed before.
    """
    sweep = array.sweep
    queue = {queued.number for queued in read_queue()}
    finished = 0
    queued_names, to_submit = [], []
    for index, cell in enumerate(sweep.cells):
        folder = sweep.folder / cell.name
        if is_finished(folder):
            finished += 1
        elif queue.intersection(job_numbers(folder)):
            queued_names.append(cell.name)
        else:
            to_submit.append(index)
            end = last_end(folder)
            if end:
                console.print(f"{cell.name} ended before: {end}", soft_wrap=True)
    if finished:
        console.print(f"{finished} of {len(sweep.cells)} runs are finished already")
    if queued_names:
        console.print(f"in the queue: {', '.join(queued_names)}", soft_wrap=True)
    return to_submit, bool(queued_names)


def _by_parent(sweep: Sweep, indices: Sequence[int]) -> dict[str, list[int]]:
    """Cell indices by the parent that they wait for ("": none). Cells without a parent come
    first."""
    indices_by_parent: dict[str, list[int]] = {}
    for index in indices:
        cell = sweep.cells[index]
        is_waiting = bool(cell.after) and not is_finished(sweep.folder / cell.after)
        indices_by_parent.setdefault(cell.after if is_waiting else "", []).append(index)
    return dict(sorted(indices_by_parent.items(), key=lambda item: item[0] != ""))


def _ranges(numbers: Sequence[int]) -> str:
    """Format task numbers for sbatch: 0, 2, 3 and 4 become "0,2-4"."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ",".join(
        str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups
    )
