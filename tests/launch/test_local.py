"""The ranks of one machine: exit codes, signals, and a refusal that is shown once, last.

Second truth: torchrun's own reader of the file in which a rank leaves its reason. Stub ranks stand
for training; `launch/local.sh` itself is run with a refused configuration. Not covered: GPUs.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_train.launch import local
from nemotron_train.platform.local_ranks import ERROR_FILE_VARIABLE, leave_refusal

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, script: str) -> local.LocalRanks:
    """Two ranks that run `script` with `rank` set."""
    begin = "import os, signal, sys, time; rank = os.environ['RANK']\n"
    return local.LocalRanks([sys.executable, "-c", begin + script], 2, folder)


@pytest.fixture(autouse=True)
def _own_signals() -> object:
    before = {number: signal.getsignal(number) for number in local.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "codes, decides",
    [
        ((0, 0), (0, 0)),
        ((3, 3), (0, 3)),
        ((0, 3), (1, 3)),
        ((3, 1), (1, 1)),
        ((2, 2), (0, 2)),
        ((1, 2), (1, 2)),  # the rank that refuses has the reason
    ],
)
def test_exit_code(tmp_path: Path, codes: tuple[int, int], decides: tuple[int, int]) -> None:
    ranks = launch(tmp_path, f"time.sleep(0.02); sys.exit({codes}[int(rank)])")
    for process in ranks._processes:
        process.wait()
    assert ranks.wait() == decides


def test_a_failed_rank_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank waits for ever, as in a collective, and ignores SIGTERM."""
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.2)
    script = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == '1': sys.exit(1)\n"
    started = time.monotonic()
    assert launch(tmp_path, script + "time.sleep(600)").wait() == (1, 1)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_every_rank_gets_a_signal_once(tmp_path: Path, number: signal.Signals) -> None:
    """A second signal would end a rank at once, without a checkpoint."""
    script = f"""
got = []
signal.signal({int(number)}, lambda *_: got.append(1))
open({str(tmp_path)!r} + "/ready" + rank, "w").close()
deadline = time.monotonic() + 60
while not got and time.monotonic() < deadline: time.sleep(0.01)
time.sleep(0.3)
sys.exit(3 if len(got) == 1 else 1)
"""
    ranks = launch(tmp_path, script)
    while len(list(tmp_path.glob("ready*"))) < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), number)
    assert ranks.wait() == (0, 3)


def test_a_refusal_is_shown_once_and_last(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "launch/local.sh"), "2", "parallel.tensor=3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("nemotron-train: ") and "parallel.tensor=3" in line


@pytest.mark.parametrize("words", [[], ["0"], ["two"], ["-1"], ["²"], ["parallel.tensor=2"]])
def test_usage(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert local.main(words) == 2
    assert capsys.readouterr().err.startswith("usage: launch/local.sh RANKS")


def test_torchrun_reads_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun repeats it under "Root Cause" at the end of its report."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "attempt_0" / "error.json"
    assert not leave_refusal("without a launcher")
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(path))
    assert leave_refusal('nemotron-train: name="ü": the line')
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    report = str(ChildFailedError("nemotron_train", {0: failure}))
    assert report.rstrip("=\n").endswith('nemotron-train: name="ü": the line')
    assert abs(failure.timestamp - time.time()) < 60
    monkeypatch.setenv(ERROR_FILE_VARIABLE, "/dev/null/error.json")
    assert not leave_refusal("a file that cannot be written")
