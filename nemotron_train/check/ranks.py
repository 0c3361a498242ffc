"""Starts the ranks of a check: CPU processes on this machine, with gloo over loopback.

Owns: their environment, their logs, and that no rank outlives the check. GPUs are hidden from the
ranks. Does not own: what a rank does (`check.worker`). No torch.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nemotron_train.config.json_text import json_text
from nemotron_train.platform.local_ranks import free_port, rank_environment

WORKER = ("-m", "nemotron_train.check.worker")
_TAIL_LINES = 25


class RanksFailed(RuntimeError):
    """A rank failed, was killed, or did not end in time. The message has the end of its log or its
    path."""


class Ranks:
    """Runs tasks on ranks, one task at a time.

    folder: gets one subfolder a task. limit_seconds: time limit of one task; a wrong layout may
    deadlock. worker: Python arguments of each rank; the task file is appended as the last argument.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        limit_seconds: float = 600.0,
        worker: Sequence[str] = WORKER,
    ) -> None:
        self.folder, self._console = folder, console
        self._limit, self._worker = limit_seconds, list(worker)

    def run(self, name: str, task: dict[str, Any], num_ranks: int) -> Path:
        """Run `task` on `num_ranks` ranks and return its output folder.

        Raises RanksFailed if a rank fails, is killed, or exceeds the time limit. For a failure, the
        message holds the end of the log of the lowest failed rank.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("rank_*"):
            stale.unlink()
        path = folder / "task.json"
        path.write_text(json_text(task | {"output": str(folder)}, indent=1))
        started = time.monotonic()
        description = f"{name.replace('_', ' ')}: {num_ranks} rank{'s' if num_ranks > 1 else ''}"
        with self._console.status(description):
            self._wait(self._start(path, num_ranks), folder, name)
        seconds = time.monotonic() - started
        self._console.print(f"ran {description}, {seconds:.0f} s")
        return folder

    def _start(self, task: Path, num_ranks: int) -> list[subprocess.Popen]:
        port = free_port()
        shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        processes = []
        for rank in range(num_ranks):
            environment = shared | rank_environment(rank, num_ranks, port)
            with open(task.with_name(f"rank_{rank}.log"), "wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *self._worker, str(task)],
                        env=os.environ | environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        return processes

    def _wait(self, processes: list[subprocess.Popen], folder: Path, name: str) -> None:
        """Wait until all processes end. The first failure or the deadline kills the others."""
        deadline = time.monotonic() + self._limit
        try:
            while any(process.poll() is None for process in processes):
                if any(process.returncode for process in processes):
                    break
                if time.monotonic() > deadline:
                    raise RanksFailed(
                        f"{name}: the ranks did not end within {self._limit:.0f} s; do they wait "
                        f"for each other? Their logs: {folder}/rank_*.log"
                    )
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        for rank, process in enumerate(processes):
            # Ranks that this function killed have a negative code; report the one that failed.
            if process.returncode > 0:
                log = (folder / f"rank_{rank}.log").read_text(errors="replace")
                tail = "\n".join(log.rstrip().splitlines()[-_TAIL_LINES:])
                raise RanksFailed(f"{name}: rank {rank} ended with {process.returncode}:\n{tail}")
        if any(process.returncode for process in processes):
            raise RanksFailed(f"{name}: a rank was killed; see {folder}/rank_*.log")
