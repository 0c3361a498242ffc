"""The watchdog alone: when it fires, when it must not, what it writes.

tests/distributed/test_hang.py covers whole jobs with a hanging rank.
"""

import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from nemotron_train.config.guard import GuardConfig
from nemotron_train.train.guard.watchdog import Watchdog, collective_timeout


def waits_for_ever(over: threading.Event) -> None:
    over.wait(60)


def test_bites_and_writes_every_threads_stack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()
    other = threading.Thread(target=waits_for_ever, args=[over])
    other.start()
    with Watchdog(tmp_path, 3, 0.5, 0.0, end=over.set) as watchdog:
        watchdog.beat(57)
        assert over.wait(30), "it never bit"
    other.join()
    stacks = (tmp_path / "ranks" / "rank_0003.stacks").read_text()
    assert "rank 3: no step since step 57 for 1 s" in stacks.splitlines()[0]
    assert "in waits_for_ever" in stacks and "in test_bites_and_writes" in stacks
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "guard.hang_minutes" in line and "rank_0003.stacks" in line


def test_leaves_a_living_run_alone(tmp_path: Path) -> None:
    """Beats closer together than the limit, for longer than the limit, and a slow first step."""
    ended = threading.Event()
    with Watchdog(tmp_path, 0, 1.0, 60.0, end=ended.set) as watchdog:
        time.sleep(2.5)
        for step in range(12):
            watchdog.beat(step)
            time.sleep(0.25)
    assert not ended.is_set()
    time.sleep(1.5)
    assert not ended.is_set() and not (tmp_path / "ranks").exists()


def test_off(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 0.0, 0.1, end=lambda: pytest.fail("it watches")):
        time.sleep(0.3)
    assert collective_timeout(GuardConfig(hang_minutes=0)) == timedelta(minutes=10)


@pytest.mark.parametrize(("hang", "first"), [(10, 30), (45, 30), (0.1, 0.05)])
def test_collectives_wait_longer_than_any_watchdog(hang: float, first: float) -> None:
    guard = GuardConfig(hang_minutes=hang, first_step_minutes=first)
    assert collective_timeout(guard) > timedelta(minutes=max(hang, first))


def test_a_suspended_job_is_no_hang(tmp_path: Path) -> None:
    """The process is suspended for three limits and continues: alive. Then it hangs: exit code
    1."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from nemotron_train.train.guard.watchdog import Watchdog\n"
        "with Watchdog(Path(sys.argv[1]), 0, 2.0, 2.0) as watchdog:\n"
        "    watchdog.beat(1)\n"
        "    print('started', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    watchdog.beat(2)\n"
        "    print('alive', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.stdin.write("\n")
        process.stdin.flush()
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "alive\n"
        assert process.wait(timeout=60) == 1
