"""A rank hangs: the others detect it, write their stacks and end.

Not covered: a launcher that kills the stopped rank (torchrun and srun do), NCCL.
"""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

Start = Callable[[list[str], Path, int], list[subprocess.Popen[str]]]


def test_a_stopped_rank_ends_the_job(small_run: tuple[Path, list[str]], start_ranks: Start) -> None:
    """SIGSTOP of rank 1 during training. Rank 0 exits with 1 soon after guard.hang_minutes, long
    before its collective would time out (here after four minutes). Rank 1 also ends once it can
    run."""
    folder, common = small_run
    words = ["-m", "nemotron_train", "pretrain", *common, "name=hang", "train.threads=1"]
    words += ["train.micro_batch_sequences=2", "train.total_tokens=10000000"]
    words += ["guard.hang_minutes=0.2", "guard.first_step_minutes=3"]
    first, second = start_ranks(words, folder, 2)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("step"):
            break
    second.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        output = first.communicate(timeout=150)[0]
        assert first.returncode == 1 and time.monotonic() - stopped < 150, output
    finally:
        second.send_signal(signal.SIGCONT)
    last = output.splitlines()[-1]
    assert last.startswith("nemotron-train: rank 0: no step since step "), output
    assert "runs/hang/ranks/rank_0000.stacks" in last and "guard.hang_minutes" in last
    stacks = (folder / "runs" / "hang" / "ranks" / "rank_0000.stacks").read_text()
    assert "train/loop.py" in stacks and "watchdog" in stacks
    second.communicate(timeout=150)
    assert second.returncode != 0
