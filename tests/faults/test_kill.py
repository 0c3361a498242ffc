"""Ranks killed with SIGKILL, mostly while they save. The resumed run equals the uninterrupted one.

Second truth: the same run, uninterrupted. The kill points are seeded: the number of a write event
of a save (Python's open, rename, remove and mkdir, which Megatron-Core's writer also uses) and a
delay after it. Not covered: power loss (the page cache survives a killed process), a file system
that reorders renames.
"""

import itertools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.run_folder import integrity

StartJob = Callable[..., Any]

STEP_TOKENS = 256


def write_events_of_two_saves(job: StartJob, folder: Path, name: str, words: list[str]) -> int:
    """The number of write events in a process whose run saves twice."""
    counted = folder / f"{name}.count"
    ending = [f"name={name}", "train.stop_after_steps=2"]
    run = job(*words, *ending, faults={0: {"count": str(counted)}})
    assert run.wait() == [3], run.output()
    return int(counted.read_text())


def chain_of_kills(
    job: StartJob, folder: Path, name: str, kills: int, overrides: list[str]
) -> list[int]:
    """Starts the run repeatedly. Each process is killed in its second save, or in its first save if
    it had to remove leftovers first. Returns the steps of the newest whole checkpoint after each
    kill, which never decrease."""
    steps = 2 * kills + 2
    words = [f"train.total_tokens={steps * STEP_TOKENS}", "train.save_every_steps=1", *overrides]
    events = write_events_of_two_saves(job, folder, f"{name}_counted", words)
    # Without the guard, three kills in a first save do not end the run.
    words += [f"name={name}", "guard.crash_loop_starts=0"]
    draw = random.Random(name)
    reached = []
    for _ in range(kills):
        fault = {
            "event": draw.randint(events // 2 + 1, events),
            "delay": draw.choice([0, 0, 0.002]),
        }
        run = job(*words, faults={0: {"kill": fault}})
        assert run.wait() == [-signal.SIGKILL], (fault, run.output())
        said: list[str] = []
        newest = integrity.latest(folder / "runs" / name / "checkpoints", said.append)
        assert newest is not None and not said, (fault, said)  # complete or absent, never torn
        reached.append(int(newest.name.removeprefix("step_")))
    final = job(*words)
    assert final.wait() == [0], final.output()
    assert all(b >= a for a, b in itertools.pairwise(reached)), reached
    assert reached[-1] > kills // 2, reached
    leftovers = [p.name for p in (folder / "runs" / name / "checkpoints").glob(".*partial*")]
    assert not leftovers, leftovers
    return reached


KILLS = {
    "four": (4, []),
    "fifty": (50, []),
    "beside_training": (10, ["train.async_save=true"]),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.faults] * (name != "four")) for name in KILLS],
)
def test_killed_in_saves_equals_uninterrupted(
    job, small_run, reference, metrics, weights, name: str
) -> None:
    """Four kills, fifty, and ten with a thread that saves while training continues."""
    folder, _ = small_run
    kills, overrides = KILLS[name]
    steps = 2 * kills + 2
    chain_of_kills(job, folder, f"killed_{name}", kills, overrides)
    whole = reference(steps, "train.save_every_steps=1")
    killed = folder / "runs" / f"killed_{name}"
    assert metrics(killed) == metrics(whole)
    assert weights(killed, steps) == weights(whole, steps)


@pytest.mark.parametrize("when", ["step", "save"])
@pytest.mark.faults
def test_one_rank_killed_ends_the_others(
    job, small_run, reference, metrics, weights, when: str
) -> None:
    """Two data-parallel ranks; the second one dies. The first must not wait for it."""
    folder, _ = small_run
    common = ["train.save_every_steps=2", "train.micro_batch_sequences=2"]
    words = [f"name=rank_killed_{when}", *common]
    if when == "step":
        run = job(*words, ranks=2)
        run.wait_for("step  1/")
        run.signal(signal.SIGKILL, rank=1)
    else:
        run = job(*words, ranks=2, faults={1: {"kill": {"event": 3, "delay": 0}}})
        run.processes[1].wait(300)
    died = time.monotonic()
    codes = run.wait(timeout=60)
    assert codes[0] not in (0, 2, 3) and codes[1] == -signal.SIGKILL, run.output()
    assert time.monotonic() - died < 60
    again = job(*words, ranks=2)
    assert again.wait() == [0, 0], again.output()
    whole = reference(10, *common, ranks=2)
    assert metrics(folder / "runs" / f"rank_killed_{when}") == metrics(whole)
    assert weights(folder / "runs" / f"rank_killed_{when}", 10) == weights(whole, 10)
