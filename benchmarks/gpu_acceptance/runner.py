"""Runs the stages one after the other, each in a process group of its own.

A stage may take its share of the time that is left: its planned seconds over those of all stages
that are to come, so that the whole keeps to its budget and a stage that hangs takes no time of the
others. What is left over by quick stages goes to the later ones. At its limit the whole group is
killed. After every stage the results are on disk.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu_acceptance.page import build_page
from benchmarks.gpu_acceptance.results import Acceptance, Result, Verdict, read_report
from benchmarks.gpu_acceptance.setting import ROOT, Setting
from benchmarks.gpu_acceptance.stages import Stage
from nemotron_train.config.visible import one_line
from nemotron_train.platform.files import write_atomically

JSON, PAGE, LOG = "results.json", "index.html", "log.txt"
_MOST_SHARES = 3.0  # a stage gets at most so many times its planned seconds, on a GPU
_LAST_LINES, _LINE_LENGTH = 25, 300
_LOG_BYTES = 200_000  # kept of each stage


def run_stages(
    stages: Sequence[Stage],
    setting: Setting,
    output: Path,
    budget: float,
    say: Callable[[str], None] = print,
) -> Acceptance:
    """Run all stages. Writes results.json, index.html and log.txt to `output` at the start and
    after every stage; say: gets each verdict line."""
    started = time.monotonic()
    results = [Result(stage.name, stage.title, stage.checks) for stage in stages]
    acceptance = Acceptance(setting.pretend, budget, results)
    (output / LOG).write_text("")

    def write() -> None:
        acceptance.seconds = time.monotonic() - started
        write_atomically(output / JSON, acceptance.as_json())
        write_atomically(output / PAGE, build_page(acceptance))

    write()
    for number, (stage, result) in enumerate(zip(stages, results, strict=True), start=1):
        planned = [later.seconds for later in stages[number - 1 :]]
        left = budget - (time.monotonic() - started)
        result.limit = left * planned[0] / sum(planned)
        if not setting.pretend:  # the plan is not that of a CPU
            result.limit = min(result.limit, _MOST_SHARES * planned[0])
        try:
            _run(stage, result, setting)
        finally:
            if stage.name == "environment":
                acceptance.machine = result.figure
            _keep_log(output / LOG, setting.work / f"{stage.name}.log", result.line(number))
            write()
        say(result.line(number))
    acceptance.is_over = True
    write()
    return acceptance


def _run(stage: Stage, result: Result, setting: Setting) -> None:
    """Run one stage to its end or its limit, and fill in the result."""
    if result.limit < 1:
        result.verdict, result.reason = Verdict.failed, "no time was left of --budget"
        return
    report, log = setting.work / f"{stage.name}.json", setting.work / f"{stage.name}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_acceptance.worker", stage.target]
    command += [str(report), str(setting.work), str(setting.pretend)]
    environment = setting.environment()
    if setting.pretend and stage.interprets:
        environment["TRITON_INTERPRET"] = "1"
    started, is_late, cut = time.monotonic(), False, None
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            process.wait(timeout=result.limit)
        except subprocess.TimeoutExpired:
            is_late = True
        except (KeyboardInterrupt, SystemExit) as error:  # what the stage has so far is kept
            cut = error
        finally:
            _kill_group(process)
            result.seconds = time.monotonic() - started
    found = read_report(report)
    result.figure, result.tables = found.get("figure", ""), found.get("tables", {})
    if "verdict" in found and not is_late:
        result.verdict, result.reason = Verdict(found["verdict"]), found["reason"]
    else:
        result.verdict = Verdict.failed
        result.reason = _ending(process.returncode, result.limit if is_late else 0.0)
        if cut is not None:
            result.reason = "ended from outside"
    if result.verdict == Verdict.failed:
        lines = log.read_text("utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        result.log = [one_line(line)[:_LINE_LENGTH] for line in lines]
    if cut is not None:
        raise cut


def _ending(code: int, limit: float) -> str:
    """Why a process ended without a verdict, in words. limit: in seconds, 0 if it was not late."""
    if limit:
        return f"killed at its limit of {limit:.0f} s"
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with {code} and without a verdict"


def _kill_group(process: subprocess.Popen) -> None:
    """Kill what a stage has left running, in any case."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _keep_log(whole: Path, part: Path, heading: str) -> None:
    """Append the end of a stage's log."""
    content = part.read_bytes()[-_LOG_BYTES:] if part.exists() else b""
    with open(whole, "ab") as file:
        file.write(f"\n===== {heading}\n".encode() + content)
