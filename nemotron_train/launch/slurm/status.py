"""Status of the user's jobs: joins Slurm's queue with the run folders. No torch.

Owns: the join and the table. The jobs of a run are listed in its `slurm/links` (submitted jobs) and
`slurm/chain.log` (started jobs; `slurm/job.sh` defines the format).
"""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from nemotron_train.config.errors import ConfigError
from nemotron_train.report.runs.columns import parse_rows

# squeue columns. Only the last one may contain a |.
_COLUMNS = ("number", "state", "used", "left", "nodes", "reason")
_FORMAT = "%i|%T|%M|%L|%D|%R"
_TAIL_BYTES = 1 << 16  # enough for the last rows of a metrics.jsonl


@dataclass(frozen=True)
class Queued:
    """One line of squeue. used, left: time, as squeue prints it."""

    number: str
    state: str
    used: str
    left: str
    nodes: str
    reason: str


def print_status(folders: Sequence[Path], console: Any) -> None:
    """Print one row per queued job, and one row for each run without a queued job.

    Raises ConfigError if no run under `folders` was submitted, or if squeue does not answer.
    """
    runs = _runs(folders)
    if not runs:
        paths = ", ".join(map(str, folders))
        raise ConfigError(f"{paths}: no run here was submitted with nemotron-train slurm")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "run",
        "job",
        "state",
        "nodes",
        "step",
        "loss",
        "tokens/s",
        "to go",
        "job ends in",
    ):
        table.add_column(name, no_wrap=True)
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("remark", overflow="fold")  # why it is pending, or how its last start ended
    queue = {queued.number: queued for queued in read_queue()}
    for name, run in runs.items():
        jobs = [queue[number] for number in job_numbers(run) if number in queue]
        for job in jobs or [None]:
            table.add_row(name, *_row(run, job))
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; the default would cut off numbers
    console.print(table)


def read_queue() -> list[Queued]:
    """The user's jobs, pending ones included. Raises ConfigError if squeue does not answer."""
    command = ["squeue", "--me", "--noheader", "--all", "--array", f"--format={_FORMAT}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"squeue does not answer ({error}): ask on the cluster") from error
    if result.returncode != 0:
        raise ConfigError(f"squeue does not answer: {' '.join(result.stderr.split())}")
    jobs = []
    for line in result.stdout.splitlines():
        parts = line.split("|", len(_COLUMNS) - 1)
        if len(parts) == len(_COLUMNS):
            jobs.append(Queued(*(part.strip() for part in parts)))
    return jobs


def _runs(folders: Sequence[Path]) -> dict[str, Path]:
    """Submitted runs and sweep cells in `folders`: displayed name -> run folder."""
    runs: dict[str, Path] = {}
    for folder in folders:
        if (folder / "slurm").is_dir():
            runs[folder.name] = folder
        for pattern in ("*/slurm", "*/*/slurm"):
            for path in sorted(folder.glob(pattern)):
                if path.is_dir():
                    runs[str(path.parent.relative_to(folder))] = path.parent
    return runs


def job_numbers(run: Path) -> list[str]:
    """Numbers of all jobs of the run, the oldest first. Includes jobs that were submitted by hand,
    once they started."""
    numbers = _read(run / "slurm/links").split()
    return list(dict.fromkeys([event[2] for event in read_chain(run)] + numbers))


def read_chain(run: Path) -> list[list[str]]:
    """The events of chain.log: time, `begin` or `end`, job, start, step, then the nodes (`begin`)
    or the exit code and the next action (`end`)."""
    lines = _read(run / "slurm/chain.log").splitlines()
    return [parts for line in lines if len(parts := line.split("\t")) >= 6]


def last_end(run: Path) -> str:
    """How the run's last start ended, such as `exit 3, requeue`; "" if none has ended."""
    ends = [event for event in read_chain(run) if event[1] == "end"]
    return f"exit {ends[-1][5]}, {ends[-1][-1]}" if ends else ""


def _row(run: Path, job: Queued | None) -> list[str]:
    rows = parse_rows(_read_tail(run / "metrics.jsonl"))
    trained = [row for row in rows if isinstance(row.get("loss"), int | float)]
    last = trained[-1] if trained else {}
    total = _total_steps(run, last)
    step = last.get("step", 0)
    time_left = "-"
    seconds = last.get("step_seconds")
    if total and isinstance(seconds, int | float):
        time_left = _duration(max(0, total - step) * seconds)
    remark = last_end(run) or "-"
    if job and job.state == "PENDING":
        remark = job.reason.strip("()")
    return [
        job.number if job else "-",
        job.state.lower() if job else "-",
        job.nodes if job else "-",
        f"{step:,}/{total:,}" if total else f"{step:,}",
        f"{last['loss']:.3f}" if last else "-",
        f"{last['tokens_per_second']:,.0f}" if "tokens_per_second" in last else "-",
        time_left,
        job.left if job else "-",
        _newest_checkpoint(run),
        remark,
    ]


def _newest_checkpoint(run: Path) -> str:
    """The step of the newest complete checkpoint and the time of day it was written."""
    manifests = sorted((run / "checkpoints").glob("step_????????/manifest.json"))
    if not manifests:
        return "-"
    written = datetime.fromtimestamp(manifests[-1].stat().st_mtime)
    return f"{int(manifests[-1].parent.name.removeprefix('step_')):,} at {written:%H:%M}"


def _total_steps(run: Path, last: Mapping[str, Any]) -> int:
    """The number of the run's last step; 0 if the files do not tell.

    Counted from the current step: a branch includes its parent's steps, which may have had another
    batch size.
    """
    try:
        derived = yaml.safe_load(_read(run / "derived.yaml"))
        if "tokens" not in last:
            return int(derived["total_steps"])
        train = yaml.safe_load(_read(run / "config.yaml"))["train"]
        tokens_left = max(0, int(train["total_tokens"]) - int(last["tokens"]))
        return int(last["step"]) + -(-tokens_left // int(derived["tokens_per_step"]))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_tail(path: Path) -> str:
    """The last `_TAIL_BYTES` of a file; the first line may be incomplete."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    return f"{days}d {hours:02}:{minutes % 60:02}" if days else f"{hours}:{minutes % 60:02}"
