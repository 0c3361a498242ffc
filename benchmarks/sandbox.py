"""Checks of code a second in the sandbox, against its floor: the start of a process.

    python -m benchmarks.sandbox [--checks 200] [--threads 2]

The floors: a fork of a small interpreter, a new `python -I -S` (what a sandbox without a zygote
starts for each check), and the same under `unshare` of the five namespaces. All run on `--threads`
threads at once, as the scoring of a batch does. The load of the machine is printed, because it
divides the figures.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from nemotron_train.posttrain.environments.families import worked_solution
from nemotron_train.posttrain.sandbox.sandbox import Sandbox
from nemotron_train.posttrain.sandbox.verdict import Verdict
from nemotron_train.posttrain.tasks import rows

_FORKS = """
import os, time
start = time.perf_counter()
for _ in range({count}):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
print({count} / (time.perf_counter() - start))
"""
_UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--mount", "--ipc", "--fork"]


def rate(work: Callable[[int], object], count: int, threads: int) -> tuple[float, float]:
    """Calls a second, and the median seconds of one."""
    seconds: list[float] = []

    def timed(number: int) -> None:
        start = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(timed, range(count)))
    return count / (time.perf_counter() - start), statistics.median(seconds)


def command(words: list[str]) -> Callable[[int], object]:
    """Runs a command to its end."""
    return lambda _: subprocess.run(words, check=True, env={})


def main() -> None:
    """Print the floors and the sandbox's rate."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--checks", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    count, threads = arguments.checks, arguments.threads
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {threads} threads")

    python = [sys.executable, "-I", "-S", "-c"]
    forks = subprocess.run([*python, _FORKS.format(count=count)], capture_output=True, check=True)
    print(f"fork of a small interpreter, one thread  {float(forks.stdout):7.0f} a second")
    lines = {"new interpreter": command([*python, "pass"])}
    if shutil.which("unshare"):
        path = str(shutil.which("unshare"))
        lines["new interpreter in namespaces"] = command([path, *_UNSHARE[1:], *python, "pass"])
    tasks = rows("python_code", "train", 0, count, 2)
    codes = [(worked_solution(task) or [])[-1].content for task in tasks]

    with Sandbox() as sandbox:

        def check(number: int) -> None:
            cases = tasks[number].metadata["cases"]
            result = sandbox.call(codes[number], "f", [case[0] for case in cases])
            assert result.verdict is Verdict.passed, result
            assert result.outputs == [case[1] for case in cases]

        lines["sandbox, 5 cases a check"] = check
        for name, work in lines.items():
            a_second, median = rate(work, count, threads)
            print(f"{name:40} {a_second:7.0f} a second, median {1000 * median:.1f} ms")


if __name__ == "__main__":
    main()
