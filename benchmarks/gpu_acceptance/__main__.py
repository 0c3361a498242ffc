"""The command line: `python -m benchmarks.gpu_acceptance`."""

import argparse
import ctypes
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_acceptance.runner import JSON, PAGE, run_stages
from benchmarks.gpu_acceptance.setting import Setting
from benchmarks.gpu_acceptance.stages import STAGES

BUDGET, PRETENDED_BUDGET = 480.0, 3600.0  # seconds
PRETENDED = "The device is PRETENDED: sizes are small, and times, rates and ratios mean nothing."


def main(words: list[str] | None = None) -> int:
    """Run the stages. 0: nothing failed; 1: a stage failed; 2: they cannot run here."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="gpu-acceptance", description="The first eight minutes on a GPU (docs/gpu.md)."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_acceptance"), metavar="DIR")
    parser.add_argument(
        "--budget", type=float, default=0.0, metavar="SECONDS", help=f"of all stages ({BUDGET:.0f})"
    )
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument(
        "--pretend", action="store_true", help="on a device that is not there, with small sizes"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep runs and logs here (default: thrown away)"
    )
    arguments = parser.parse_args(words)
    problem = _problem(arguments)
    if problem:
        print(f"gpu-acceptance: {problem}", file=sys.stderr)
        return 2
    # Ended from outside, the stage that runs is killed too, and the results so far are written.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    budget = arguments.budget or (PRETENDED_BUDGET if arguments.pretend else BUDGET)
    stages = [stage for stage in STAGES if stage.name in arguments.stages]
    with tempfile.TemporaryDirectory(prefix="gpu_acceptance_", ignore_cleanup_errors=True) as made:
        work = (arguments.work or Path(made)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if arguments.pretend:
            print(PRETENDED, flush=True)
        acceptance = run_stages(
            stages,
            Setting(work, arguments.pretend),
            arguments.output,
            budget,
            lambda line: print(line, flush=True),
        )
    print(acceptance.summary())
    if arguments.pretend:
        print(PRETENDED)
    print(f"{arguments.output / PAGE}, {arguments.output / JSON}")
    return acceptance.exit_code


def _problem(arguments: argparse.Namespace) -> str:
    """Why the stages cannot run, in one line; "" if they can."""
    if arguments.budget < 0:
        return f"--budget={arguments.budget:g}: give a number of seconds above 0"
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--output={arguments.output}: {error.strerror}"
    if arguments.pretend:
        return ""
    if _num_gpus() == 0:
        return "the driver finds no GPU here; --pretend runs all stages on a pretended one"
    return ""


def _num_gpus() -> int:
    """As the driver counts. torch would say the same, but its import costs ten seconds of the
    budget on a cold disk."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


if __name__ == "__main__":
    sys.exit(main())
