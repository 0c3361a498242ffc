"""Applies each mutant of `list` to a copy of the package and runs the tests that should fail.

`make mutants` runs all of them; `make mutants ARGS="-k data"` those whose name or file contains the
word. The project is copied to a temporary folder, once a process, where one mutant at a time is
applied and taken back. All named tests must first pass on the unchanged copy: a test that fails
anyway kills nothing.

Exit code 0: each mutant was killed, or survived and is marked as equivalent. 1: anything else.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, Python knows only the folder of this file

from tests.mutants.mutants import Mutant, load_mutants  # noqa: E402

COPIED = ("nemotron_train", "recipes", "slurm", "launch", "tests", "docs", "benchmarks")
COPIED += ("pyproject.toml", "constraints.txt", "README.md", "Makefile")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*")
TIMEOUT_SECONDS = 300


class Result(StrEnum):
    """What became of a mutant. Good are `killed`, and `survived` if it is marked as equivalent."""

    killed = "killed"
    survived = "survived"
    timed_out = "timed out"
    stale = "stale"  # the text before is not in the file exactly once
    broken = "broken"  # no test ran: the mutant cannot be imported, or a named test is gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen mutants, print a table, return the exit code."""
    parser = argparse.ArgumentParser(prog="make mutants", description="Mutants against their tests")
    parser.add_argument("-k", default="", metavar="WORD", help="part of a mutant's name or file")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default 2)")
    options = parser.parse_args(arguments)
    chosen = [m for m in load_mutants() if options.k in m.name or options.k in m.file]
    if not chosen:
        print(f"no mutant has {options.k!r} in its name or file", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the tests are ended, too
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        roots = [Path(folder, f"copy_{number}") for number in range(max(1, options.jobs))]
        for root in roots:
            copy_project(root)
        failure = _failure_without_mutant(roots[0], chosen, len(roots))
        if failure:
            print(f"the named tests must pass without a mutant:\n{failure}", file=sys.stderr)
            return 1
        results = judge_all(roots, chosen, say=lambda line: print(line, flush=True))
    _print_table(chosen, results)
    print(f"{(time.monotonic() - started) / 60:.0f} minutes")
    return 0 if all(is_good(mutant, results[mutant]) for mutant in chosen) else 1


def is_good(mutant: Mutant, result: Result) -> bool:
    """A mutant must be killed. One that is marked as equivalent must survive: otherwise its reason
    is wrong."""
    return result == (Result.survived if mutant.equivalent else Result.killed)


def copy_project(root: Path) -> None:
    """Copy what the tests read to the new folder `root`."""
    root.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, root / name)


def judge_all(
    roots: Sequence[Path],
    chosen: Sequence[Mutant],
    timeout: float = TIMEOUT_SECONDS,
    say: Callable[[str], None] = print,
) -> dict[Mutant, Result]:
    """Judge each mutant, as many at a time as there are copies, and say each result."""
    waiting, free = deque(chosen), list(roots)
    running: list[_Trial] = []
    results: dict[Mutant, Result] = {}
    try:
        while waiting or running:
            while waiting and free:
                running.append(_Trial(free.pop(), waiting.popleft(), timeout))
            time.sleep(0.1)
            for trial in [trial for trial in running if trial.result() is not None]:
                mutant, result = trial.mutant, trial.result()
                assert result is not None
                trial.end()
                running.remove(trial)
                free.append(trial.root)
                results[mutant] = result
                mark = " (equivalent)" if mutant.equivalent else ""
                say(f"{result + mark:22} {trial.seconds:4.0f} s  {mutant.file}: {mutant.name}")
    finally:
        for trial in running:  # also if this process is asked to stop
            trial.end()
    return results


class _Trial:
    """A mutant that is applied to a copy, and its tests that run there until `end`."""

    def __init__(self, root: Path, mutant: Mutant, timeout: float) -> None:
        self.root, self.mutant = root, mutant
        self._path = root / "nemotron_train" / mutant.file
        self._text = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
        self._begun, self._timeout = time.monotonic(), timeout
        self._process: subprocess.Popen | None = None
        if self._text.count(mutant.before) == 1:
            self._write(self._text.replace(mutant.before, mutant.after))
            self._process = _start_pytest(root, mutant.tests, subprocess.DEVNULL)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._begun

    def result(self) -> Result | None:
        """What became of the mutant; None while its tests run."""
        if self._process is None:
            return Result.stale
        code = self._process.poll()
        if code is None:
            return Result.timed_out if self.seconds > self._timeout else None
        by_code = {0: Result.survived, 1: Result.killed}  # pytest: 0 all passed, 1 some failed
        return by_code.get(code, Result.broken)

    def end(self) -> None:
        """Stop the tests and take the mutant back."""
        if self._process is not None:
            _end(self._process)
            self._write(self._text)

    def _write(self, text: str) -> None:
        # Python takes a compiled file for current if time (in seconds) and size are those of the
        # source. A mutant of the same length would then not be compiled.
        Path(importlib.util.cache_from_source(str(self._path))).unlink(missing_ok=True)
        self._path.write_text(text, encoding="utf-8")


def _failure_without_mutant(root: Path, chosen: Sequence[Mutant], num_processes: int) -> str:
    """The end of the output of all named tests on the unchanged copy, or "" if they pass."""
    named = {test for mutant in chosen for test in mutant.tests}
    # Sorted, so that the tests of a file, which share fixtures, come one after the other.
    tests = sorted(t for t in named if t.partition("::")[0] not in named or "::" not in t)
    tests = ["--numprocesses", str(num_processes), "--dist", "loadfile", *tests]
    with open(root / "first_run.log", "w+", encoding="utf-8") as log:
        process = _start_pytest(root, tests, log)
        try:
            process.wait()
        finally:
            _end(process)
        log.seek(0)
        return log.read()[-4000:] if process.returncode else ""


def _start_pytest(root: Path, tests: Sequence[str], output: Any) -> subprocess.Popen:
    """Start tests of the copy against the copy, in a session of their own."""
    # python -m puts the current folder first on the path. Tests that start processes in another
    # folder find the copy by PYTHONPATH.
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(root / ".cache"),  # keeps the kernels of mutants out of the user's
    }
    return subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _end(process: subprocess.Popen) -> None:
    """End a session of tests with all processes that they started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _print_table(chosen: Sequence[Mutant], results: dict[Mutant, Result]) -> None:
    """For each package the number of mutants of each result; then those that need a look."""
    counts: dict[str, Counter[str]] = {}
    for mutant in chosen:
        for row in (mutant.package, "all"):
            column = "equivalent" if mutant.equivalent else results[mutant]
            counts.setdefault(row, Counter())[column] += 1
    columns = [*Result, "equivalent"]
    print(f"\n| package | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|")
    for row in [*(row for row in counts if row != "all"), "all"]:
        print(f"| {row} | {' | '.join(str(counts[row][column]) for column in columns)} |")
    print()
    for mutant in chosen:
        if not is_good(mutant, results[mutant]):
            print(f"{results[mutant]}: {mutant.file}: {mutant.name} ({', '.join(mutant.tests)})")


if __name__ == "__main__":
    sys.exit(main())
