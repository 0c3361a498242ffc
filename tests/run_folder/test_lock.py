"""The lock of a run folder: who holds it, who may take it over, and how a late holder is shut out.

Two processes where the test needs two. The rules for other hosts and for file systems without locks
are tested through the record and a failing flock. Not covered: a real network file system.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_train.config.errors import ConfigError
from nemotron_train.run_folder.lock import LOCK, LostRunFolder, acquire

HOLD = """
import sys, time
from pathlib import Path
from nemotron_train.run_folder.lock import acquire
lock = acquire(Path(sys.argv[1]))
print("held", flush=True)
while True:
    time.sleep(0.05)
    try:
        lock.check_held()
    except RuntimeError as error:
        print(error, flush=True)
        sys.exit(7)
"""


def holder(folder: Path, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_message_names_the_holder(tmp_path: Path) -> None:
    with holder(tmp_path, SLURM_JOB_ID="4711") as process:
        with pytest.raises(ConfigError) as refused:
            acquire(tmp_path)
        for word in (str(process.pid), socket.gethostname(), "job 4711", "epoch 1"):
            assert word in str(refused.value)
        assert "\n" not in str(refused.value)
        process.kill()


def test_a_dead_holder_is_taken_over_and_named(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
    lock = acquire(tmp_path)
    assert str(process.pid) in lock.took_over and lock.epoch == 2
    lock.check_held()
    lock.release()
    assert acquire(tmp_path).took_over == ""


def test_a_late_holder_is_shut_out(tmp_path: Path) -> None:
    """A process is suspended while it holds the lock. An operator removes the lock and another
    process trains. The first one resumes and must notice this before it writes."""
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ConfigError, match="another process"):
            acquire(tmp_path)
        (tmp_path / LOCK).unlink()
        ours = acquire(tmp_path)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 7
        assert process.stdout is not None
        said = process.stdout.read()
    assert "taken over" in said and str(os.getpid()) in said
    ours.check_held()


def test_release_leaves_a_later_holder_alone(tmp_path: Path) -> None:
    first = acquire(tmp_path)
    (tmp_path / LOCK).unlink()
    second = acquire(tmp_path)
    first.release()
    second.check_held()
    record = json.loads((tmp_path / LOCK).read_text())
    assert record["released"] is False, "where there are no locks, the record says who holds it"
    with pytest.raises(LostRunFolder):
        first.check_held()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("content")
    (tmp_path / LOCK).symlink_to(target)
    with pytest.raises(OSError):
        acquire(tmp_path)
    assert target.read_text() == "content"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"epoch": "x", "pid": []}', "\0" * 9999])
def test_a_lock_file_that_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    lock = acquire(tmp_path)
    assert lock.epoch == 1
    lock.check_held()


def _gone() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


HERE, ELSEWHERE = socket.gethostname(), "another-host"


@pytest.mark.parametrize(
    ("host", "alive", "job", "own_job", "released", "free"),
    [
        (HERE, True, "", "", False, False),
        (HERE, False, "", "", False, True),
        (ELSEWHERE, False, "", "", False, False),
        (ELSEWHERE, False, "", "", True, True),
        (ELSEWHERE, False, "12", "12", False, True),  # the same job, requeued on another host
        (ELSEWHERE, False, "12", "13", False, False),
    ],
)
def test_without_locks_the_record_decides(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    alive: bool,
    job: str,
    own_job: str,
    released: bool,
    free: bool,
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setenv("SLURM_JOB_ID", own_job)
    pid = os.getppid() if alive else _gone()
    record = {"host": host, "pid": pid, "job": job, "epoch": 4, "time": "t", "released": released}
    (tmp_path / LOCK).write_text(json.dumps(record))
    if free:
        lock = acquire(tmp_path)
        assert lock.epoch == 5
        lock.check_held()
    else:
        with pytest.raises(ConfigError, match=r"remove .*\.lock"):
            acquire(tmp_path)


def test_a_check_is_cheap(tmp_path: Path) -> None:
    """The lock is checked at every save: 200 checks take well under a second."""
    lock = acquire(tmp_path)
    started = time.perf_counter()
    for _ in range(200):
        lock.check_held()
    assert time.perf_counter() - started < 2
