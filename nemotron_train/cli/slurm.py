"""The `slurm` verbs: arguments, help and exit codes. Imports the implementation on use."""

import argparse
import sys
from pathlib import Path

from nemotron_train.cli.verbs import Verb, open_console, run_arguments
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.visible import one_line

_DONE = 0


def run_slurm(arguments: argparse.Namespace) -> int:
    """Run `slurm`: submit a job, or print its script with --dry-run.

    Raises ConfigError for the first problem; with --dry-run, prints problems as warnings.
    """
    from nemotron_train.launch.slurm.checks import branch_problems, check_memory, local_problems
    from nemotron_train.launch.slurm.job import plan_job, render, submit
    from nemotron_train.launch.sweep.plan import is_finished

    job = plan_job(arguments.overrides, arguments.config)
    warning = check_memory(job.config, job.derived, job.cluster, job.nodes)
    if warning:
        print("nemotron-train:", one_line(warning), file=sys.stderr)
    problems = local_problems(job.config, job.derived.plan, job.cluster) + branch_problems(
        job.config
    )
    if arguments.dry_run:
        for problem in problems:
            print("nemotron-train: would be refused here:", one_line(problem), file=sys.stderr)
        sys.stdout.write(render(job))
        return _DONE
    for problem in problems:
        raise ConfigError(problem)
    console = open_console()
    if is_finished(job.run_folder):
        console.print(f"{job.run_folder} is finished; nothing was submitted", soft_wrap=True)
        return _DONE
    submit(job, console)
    return _DONE


def run_slurm_status(arguments: argparse.Namespace) -> int:
    """Run `slurm status`."""
    from nemotron_train.launch.slurm.status import print_status

    print_status(arguments.folders or [Path("runs")], open_console())
    return _DONE


def _slurm_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="run folders, sweeps, or a folder of them (default: runs)",
    )


SLURM_VERBS: dict[str, Verb] = {
    "slurm": Verb(
        "train on several nodes: check, render and submit a Slurm job",
        run_slurm,
        _slurm_arguments,
        """\
Overrides are those of pretrain; knobs of the job itself:
  cluster=NAME                   a file under recipes/cluster/, or the path of one of your own
  cluster.KNOB=VALUE             one of its knobs (nemotron_train/config/cluster.py)
  nodes=N                        how many nodes (default 1)

Examples:
  nemotron-train slurm cluster=local_lab nodes=2 name=first
  nemotron-train slurm run=nano_30b_a3b cluster=h100_8x nodes=4 cluster.account=mine --dry-run
  nemotron-train slurm run=super_120b_a12b cluster=gb200_nvl72 nodes=64 cluster.chain_links=8

What cannot work is refused before it waits in the queue: a layout that does not divide the ranks,
a model that does not fit, data that is missing, a run folder that holds another run. The job's
script stands alone: sbatch takes it by hand, too. docs/cluster.md tells the rest.
""",
    ),
    "slurm status": Verb(
        "your Slurm jobs and their runs: step, loss, tokens/s, time left, last checkpoint",
        run_slurm_status,
        _status_arguments,
        """\
Examples:
  nemotron-train slurm status                    # all that was submitted from here, sweeps too
  nemotron-train slurm status runs/first runs/loss_gap
""",
    ),
}
