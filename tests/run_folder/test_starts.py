"""Crash loops detected from the starts of a run, the STOP file, the time limit, and one run through
all of them. tests/distributed and tests/train/test_resume.py cover requests of one rank among
several.
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.config.errors import ConfigError
from nemotron_train.run_folder.progress import Progress
from nemotron_train.run_folder.starts import crash_loop, recorded
from nemotron_train.train.stop import SIGNALS, StopOnRequest
from tests import warm_process


def start(step: int, ended: str = "", reason: str = "") -> dict[str, Any]:
    words = {"ended": ended, "reason": reason}
    return {"from_step": step} | {name: word for name, word in words.items() if word}


KILLED, FAILED = start(50), start(50, "failed", "RuntimeError: lost a rank")


@pytest.mark.parametrize(
    ("starts", "step", "is_loop"),
    [
        ([KILLED, KILLED, KILLED], 50, True),
        ([FAILED, KILLED, FAILED], 50, True),
        ([start(0), KILLED, FAILED, KILLED], 50, True),
        ([KILLED, KILLED], 50, False),
        ([KILLED, KILLED, KILLED], 60, False),  # a checkpoint was saved before the last crash
        ([start(40), KILLED, KILLED], 50, False),
        ([KILLED, start(50, "stopped"), KILLED, KILLED], 50, False),  # a person, or a time limit
        ([KILLED, start(50, "refused"), KILLED, start(50, "refused"), KILLED], 50, True),
        ([KILLED, start(50, "refused"), start(50, "refused"), KILLED], 50, False),  # two crashes
        ([{"time": "an earlier version"}] * 5, 0, False),
        ([], 0, False),
    ],
)
def test_three_starts_without_progress(starts: list[dict], step: int, is_loop: bool) -> None:
    assert bool(crash_loop(starts, step, 3)) == is_loop
    assert crash_loop(starts, step, 0) == ""


def test_the_line_says_step_cause_and_way_out() -> None:
    line = crash_loop([KILLED, KILLED, FAILED], 50, 3)
    assert "step 50" in line and "lost a rank" in line and "guard.crash_loop_starts=0" in line
    assert "killed" in crash_loop([FAILED, FAILED, KILLED], 50, 3) and "\n" not in line


def test_how_a_start_ended_is_written(tmp_path: Path) -> None:
    def ends(error: BaseException | None) -> dict:
        (tmp_path / "environment.json").write_text(json.dumps({"run_id": "a", "starts": [{}]}))
        try:
            with recorded(tmp_path) as end:
                if error is not None:
                    raise error
                end["ended"] = "stopped"
        except BaseException as raised:
            assert raised is error
        start = json.loads((tmp_path / "environment.json").read_text())["starts"][-1]
        ended = datetime.fromisoformat(start.pop("end_time"))
        assert abs((datetime.now(UTC) - ended).total_seconds()) < 60
        return start

    assert ends(None) == {"ended": "stopped"}
    assert ends(ConfigError("no")) == {"ended": "refused"}
    assert ends(RuntimeError("two\nlines")) == {
        "ended": "failed", "reason": "RuntimeError: two lines"
    }  # fmt: skip
    assert ends(KeyboardInterrupt())["ended"] == "failed"


def test_a_folder_deleted_under_the_run_hides_no_error(tmp_path: Path) -> None:
    """The error that ended the run is raised. Nothing is written where another run may have
    started."""
    with pytest.raises(RuntimeError, match="the reason"), recorded(tmp_path / "gone"):
        raise RuntimeError("the reason")
    assert not (tmp_path / "gone").exists()


def test_requests_are_heard_and_named(tmp_path: Path, groups: object) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    progress: Any = Progress(1, 1, None)  # type: ignore[arg-type]

    def stop(steps: int = 0, minutes: float = 0.0) -> StopOnRequest:
        return StopOnRequest(steps, minutes, time.monotonic() - 60, tmp_path / "STOP", "cpu")

    try:
        assert not stop().agreed(progress) and not stop(2, 1.5).agreed(progress)
        late = stop(minutes=0.5)
        assert late.agreed(progress) and late.reason == "train.stop_after_minutes=0.5"
        counted = stop(steps=2)
        assert [counted.agreed(progress) for _ in range(2)] == [False, True]
        asked = stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked.agreed(progress) and asked.reason == "SIGUSR1"
        by_file = stop()
        (tmp_path / "STOP").touch()
        assert by_file.agreed(progress) and by_file.reason.endswith("STOP")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_one_run_through_all_of_them(small_run: tuple[Path, list[str]]) -> None:
    """A time limit: exit 3 with a checkpoint. A STOP file: exit 2, nothing changed. Three starts
    that died: exit 4, until the user confirms that the cause is gone."""
    folder, common = small_run
    run = folder / "runs" / "limits"
    command = [sys.executable, "-m", "nemotron_train", "pretrain", "name=limits", *common]

    def pretrain(*overrides: str) -> subprocess.CompletedProcess[str]:
        words = [*command, *overrides]
        return warm_process.run(words, cwd=folder, capture_output=True, text=True, timeout=300)

    done = pretrain("train.stop_after_minutes=0.001")
    assert done.returncode == 3, done.stderr
    assert "stopped at step 1 (train.stop_after_minutes=0.001)" in done.stdout
    environment = run / "environment.json"
    record = json.loads(environment.read_text())
    assert record["starts"][-1]["ended"] == "stopped" and record["starts"][-1]["from_step"] == 0
    (run / "STOP").touch()
    done = pretrain()
    assert done.returncode == 2 and "runs/limits/STOP" in done.stderr
    (run / "STOP").unlink()
    record["starts"] += [{"from_step": 1}] * 3
    environment.write_text(json.dumps(record))
    done = pretrain()
    assert done.returncode == 4 and done.stderr.count("\n") == 1, done.stderr
    assert "runs/limits: the last 3 starts went on from step 1" in done.stderr
    done = pretrain("guard.crash_loop_starts=0", "train.stop_after_steps=1")
    assert done.returncode == 3, done.stderr
