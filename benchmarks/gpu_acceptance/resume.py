"""Stage 4: the default recipe, saved, killed and resumed, against the uninterrupted run.

The killed run's steps before the kill tell the two causes of a difference apart: if they differ,
the device does not repeat itself; if only later ones do, the resumed run is at fault.
"""

import io
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_acceptance.results import Fail, Report
from benchmarks.gpu_acceptance.setting import Setting
from nemotron_train.run_folder.metric_groups import is_timing

WHOLE, KILLED = "whole", "killed"
_STEPS_AFTER_SAVE = 3  # the kill comes so many steps after the first checkpoint
_FIRST_SAVE = 8  # train.save_every_steps


def run(report: Report) -> None:
    """Three processes: the whole run, the one that is killed, and its resumption."""
    setting = report.setting
    whole_run(setting)
    report.figure = "the whole run ended"
    killed_at = kill_in_the_middle(setting, KILLED)
    report.figure = f"killed after step {killed_at}"
    said = setting.run(*words(setting, KILLED))
    folders = [setting.work / "runs" / name for name in (WHOLE, KILLED)]
    ours, theirs = (metrics(folder) for folder in folders)
    resumed = next((line for line in said.splitlines() if line.startswith("resumed from")), "")
    report.row("runs", what="steps", value=len(ours))
    report.row("runs", what="killed after step", value=killed_at)
    report.row("runs", what="went on", value=resumed or "from the beginning")
    if not resumed:
        raise Fail("the second start did not resume from a checkpoint")
    difference = first_difference(ours, theirs)
    step = max(ours)
    unequal = unequal_tensors(checkpoint(folders[0], step), checkpoint(folders[1], step))
    report.row("runs", what="unequal parts of the last checkpoint", value=len(unequal))
    if difference:
        where = "the device does not repeat itself" if difference[0] <= _FIRST_SAVE else "resumed"
        raise Fail(f"step {difference[0]} differs in {difference[1]} ({where})")
    if unequal:
        raise Fail(f"the last checkpoints differ in {len(unequal)} parts, the first: {unequal[0]}")
    report.figure = f"killed after step {killed_at} of {step}: equal in every bit"


def words(setting: Setting, name: str) -> list[str]:
    """The words of the default run."""
    return ["pretrain", *setting.sizes.default_run, f"name={name}"]


def whole_run(setting: Setting) -> tuple[str, int]:
    """The uninterrupted default run, which runs unless it is there: its folder, relative to `work`,
    and its last step."""
    folder = setting.work / "runs" / WHOLE
    if not (folder / "summary.json").exists():
        setting.run(*words(setting, WHOLE))
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    return f"runs/{WHOLE}", summary["step"]


def kill_in_the_middle(setting: Setting, name: str) -> int:
    """Start the run and kill it a few steps after its first checkpoint; returns the last step that
    it logged. Raises Fail if it ends before."""
    path = setting.work / "runs" / name / "metrics.jsonl"
    process = subprocess.Popen(
        setting.verb(*words(setting, name)),
        cwd=setting.work,
        env=setting.environment(),
    )
    try:
        while (step := _last_step(path)) < _FIRST_SAVE + _STEPS_AFTER_SAVE:
            if process.poll() is not None:
                raise Fail(f"the run to kill ended with {process.returncode} after step {step}")
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    return _last_step(path)


def _last_step(path: Path) -> int:
    """The last whole line's step; 0 without one."""
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    steps = [json.loads(line).get("step", 0) for line in lines[-3:] if line.endswith("\n")]
    return max(steps, default=0)


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> what was logged, without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {k: v for k, v in row.items() if not is_timing(k)}
        for row in rows
        if "loss" in row
    }


def first_difference(ours: dict[int, dict], theirs: dict[int, dict]) -> tuple[int, str] | None:
    """The first step that differs, and in which metric by how much."""
    for step in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(step, {}), theirs.get(step, {})
        for name in one.keys() | other.keys():
            if one.get(name) != other.get(name):
                return step, f"{name}: {one.get(name)} and {other.get(name)}"
    return None


def checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """Every saved tensor (its bytes) and every other value of a checkpoint."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    path = folder / "checkpoints" / f"step_{step:08d}"
    saved: dict[str, Any] = {"progress": (path / "progress.json").read_text()}
    for index, place in FileSystemReader(path).read_metadata().storage_data.items():
        with open(path / place.relative_path, "rb") as file:
            file.seek(place.offset)
            content: Any = file.read(place.length)
        if index.offset is None:
            content = torch.load(io.BytesIO(content), weights_only=True)
        saved[f"{index.fqn} {index.offset}"] = content
    return saved


def unequal_tensors(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of the parts that are not the same."""
    return [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
