"""A sweep on a cluster: a Slurm job array, one task a cell. No torch.

Owns: which cells are submitted, in which arrays, what each waits for. Does not own: the cells
(`launch.sweep.plan`), a cell's job (`launch.slurm.job`: the same script as for a single run, with
its requeues and its refusals), the array's script (`slurm/array.sh`). docs/decisions/0007 has the
reasons.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.launch.slurm import job as slurm_job
from nemotron_train.launch.slurm.checks import branch_problem, check_memory, problems_here
from nemotron_train.launch.slurm.job import Job, cluster_asked, job_of, refuse_unsafe, write_links
from nemotron_train.launch.slurm.status import job_numbers, last_end, read_queue
from nemotron_train.launch.sweep.plan import Sweep, is_finished
from nemotron_train.run_folder.folder import refuse_another_run, write_atomically

ARRAY_FOLDER = "array"  # inside a sweep's folder: job.sh and what its tasks print


@dataclass(frozen=True)
class Array:
    """A sweep and the job of each cell, in the same order: a cell's place is its task's number."""

    sweep: Sweep
    jobs: list[Job]


def plan_array(sweep: Sweep) -> Array:
    """Every cell planned on all of its job's ranks. Raises ConfigError at the first that cannot
    work."""
    cluster, nodes = cluster_asked(sweep.job_words)
    if cluster.chain_links > 1:
        raise ConfigError(
            f"cluster.chain_links={cluster.chain_links}: a sweep's cells requeue themselves; set 1"
        )
    jobs = []
    for cell in sweep.cells:
        refuse_unsafe(cell.overrides)
        words = list(cell.overrides)
        if not any(word.startswith("train.threads=") for word in words):
            # Several cells may share a node: each takes the cores that it asked for.
            words.append(f"train.threads={cluster.cpus_per_rank}")
        job = job_of(cell.config, cluster, nodes, words)
        refuse_another_run(cell.config, job.derived.plan)
        warning = check_memory(job.config, job.derived, cluster, nodes)
        if warning:
            print(f"nemotron-train: {cell.name}: {warning}", file=sys.stderr)
        jobs.append(job)
    return Array(sweep, jobs)


def render_array(array: Array) -> str:
    """The script of the whole array."""
    sweep = array.sweep
    names = [cell.name for cell in sweep.cells]
    return slurm_job.render_array(sweep.folder.name, sweep.folder, names, array.jobs[0])


def submit_array(array: Array, console: Any) -> bool:
    """Submit what is neither finished nor in the queue; branches wait for their parents. Whether
    anything is not finished. Raises ConfigError for data that is missing, and with Slurm's own
    words where it refuses."""
    slurm_job.need_sbatch()
    sweep = array.sweep
    rest, is_going = _say_what_is_there(array, console)
    if not rest:
        return is_going
    for index in rest:
        cell, job = sweep.cells[index], array.jobs[index]
        problems = problems_here(job.config, job.derived.plan, job.cluster)
        if not cell.after or is_finished(sweep.folder / cell.after):
            problems += branch_problem(job.config)
        for problem in problems:
            raise ConfigError(f"{cell.name}: {problem}")
    sweep.write_description()
    for index in rest:
        slurm_job.write_script(array.jobs[index])
    script = sweep.folder / ARRAY_FOLDER / "job.sh"
    script.parent.mkdir(exist_ok=True)
    write_atomically(script, render_array(array))
    for parent, indices in _by_parent(sweep, rest).items():
        tasks = _ranges(indices) + (f"%{sweep.at_once}" if sweep.at_once else "")
        options = [f"--array={tasks}"]
        if parent:
            # A branch whose parent failed does not wait for ever.
            number = job_numbers(sweep.folder / parent)[-1]
            options += [f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"]
        number = slurm_job.sbatch(array.jobs[indices[0]], script, "job_%A_%a.log", *options)
        for index in indices:
            write_links(array.jobs[index], [f"{number}_{index}"])
        waits = f", after {parent}" if parent else ""
        console.print(
            f"submitted array {number}: {len(indices)} cells{waits}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"script {script}; nemotron-train slurm status {sweep.folder} tells how it goes",
        highlight=False,
        soft_wrap=True,
    )
    return True


def _say_what_is_there(array: Array, console: Any) -> tuple[list[int], bool]:
    """The numbers of the cells to submit, and whether others are in the queue. What is finished,
    under way or failed before is said."""
    sweep = array.sweep
    queue = {queued.number for queued in read_queue()}
    finished, going, rest = 0, [], []
    for index, cell in enumerate(sweep.cells):
        folder = sweep.folder / cell.name
        if is_finished(folder):
            finished += 1
        elif queue.intersection(job_numbers(folder)):
            going.append(cell.name)
        else:
            rest.append(index)
            end = last_end(folder)
            if end:
                console.print(f"{cell.name} ended before: {end}", highlight=False, soft_wrap=True)
    if finished:
        console.print(f"{finished} of {len(sweep.cells)} runs are finished already")
    if going:
        console.print(f"in the queue: {', '.join(going)}", highlight=False, soft_wrap=True)
    return rest, bool(going)


def _by_parent(sweep: Sweep, indices: Sequence[int]) -> dict[str, list[int]]:
    """The cells to submit by what they wait for ("": nothing), a parent's array before its
    branches'."""
    found: dict[str, list[int]] = {}
    for index in indices:
        cell = sweep.cells[index]
        waits = bool(cell.after) and not is_finished(sweep.folder / cell.after)
        found.setdefault(cell.after if waits else "", []).append(index)
    return dict(sorted(found.items(), key=lambda item: item[0] != ""))


def _ranges(numbers: Sequence[int]) -> str:
    """0,2-4 for 0, 2, 3 and 4, as sbatch takes them."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ",".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)
