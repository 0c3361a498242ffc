"""The `sweep` verb: arguments, help and exit codes. Imports the implementation on use."""

import argparse
import sys

from nemotron_train.cli.verbs import Verb, open_console

_DONE, _FAILED = 0, 1


def run_sweep(arguments: argparse.Namespace) -> int:
    """Run `sweep`; writes the report once a baseline is finished. Returns 1 if a run failed."""
    from nemotron_train.launch.sweep.local import run_here
    from nemotron_train.launch.sweep.plan import is_finished, plan_sweep
    from nemotron_train.launch.sweep.slurm import plan_array, render_array, submit_array
    from nemotron_train.report.write import report

    sweep, console = plan_sweep(arguments.overrides), open_console()
    array = plan_array(sweep) if sweep.launcher == "slurm" else None
    if arguments.dry_run:
        for cell in sweep.cells:
            console.print(" ".join(cell.overrides), soft_wrap=True)
        if array is not None:
            sys.stdout.write(f"\n{render_array(array)}")
        return _DONE
    failed: list[str] = []
    if array is not None:
        if submit_array(array, console):
            return _DONE
    else:
        failed = run_here(sweep, console)
    finished = {cell.group for cell in sweep.cells if is_finished(sweep.folder / cell.name)}
    if finished & {cell.baseline for cell in sweep.cells}:
        for path in report([sweep.folder], None, console):
            console.print(f"wrote {path}", soft_wrap=True)
    if failed:
        console.print(f"failed: {', '.join(failed)}; the same command tries again", soft_wrap=True)
    return _FAILED if failed else _DONE


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="+", metavar="KNOB=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="print the cells, run nothing")


SWEEP_VERBS: dict[str, Verb] = {
    "sweep": Verb(
        "a grid of runs (precision x seed x size), here or on a cluster, and their loss gaps",
        run_sweep,
        _arguments,
        """\
Overrides are those of pretrain, with several values where a grid is wanted (Hydra's multirun
grammar). Knobs of the sweep itself:
  sweep=RECIPE                   a file under recipes/sweep/
  variant=NAME[,NAME]            only these of the recipe's variants
  name=NAME                      run folders lie in runs/NAME/ (default: the recipe's name)
  at_once=N                      runs at a time (default: 1, which has all cores; on a cluster all)
  baseline=GROUP|VALUE           what the others are compared with: one group, or for each group the
                                 one with this value instead of its own
  launcher=local|slurm           here, or as a Slurm job array, one task a cell
  cluster=NAME, nodes=N          for launcher=slurm, as for the verb slurm; N nodes for each cell

Examples:
  nemotron-train sweep sweep=loss_gap at_once=2
  nemotron-train sweep precision=bf16,nvfp4_all train.seed=1,2,3 name=mine
  nemotron-train sweep model=tiny,proxy_10m precision=bf16,nvfp4_all baseline=bf16 name=sizes
  nemotron-train sweep sweep=loss_gap launcher=slurm cluster=h100_8x cluster.account=mine

The same command again runs what is not finished yet.
""",
    ),
}
