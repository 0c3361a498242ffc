"""The ranks of a check: processes on this machine, over loopback and gloo, whatever GPUs there are.

Owns their environment, their logs, and that none outlives the check. Does not own what they do
(`check.worker`). No torch.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

WORKER = ("-m", "nemotron_train.check.worker")
_TAIL_LINES = 25


class RanksFailed(RuntimeError):
    """A rank ended with an error or did not end; its last words are in the message."""


class Ranks:
    """Starts tasks on ranks, one after the other.

    folder: gets a folder a task. limit_seconds: for one task, since a layout fault may show as
    ranks that wait for each other for ever. worker: what Python runs in each rank, with the task's
    file as its last argument.
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
        """Run `task` on `num_ranks` ranks; returns the folder that it wrote into.

        Raises RanksFailed with the end of the log of the rank that failed first.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("rank_*"):
            old.unlink()
        path = folder / "task.json"
        path.write_text(json.dumps(task | {"output": str(folder)}, indent=1))
        started = time.monotonic()
        doing = f"{name.replace('_', ' ')}: {num_ranks} rank{'s' if num_ranks > 1 else ''}"
        with self._console.status(doing):
            self._wait(self._start(path, num_ranks), folder, name)
        seconds = time.monotonic() - started
        self._console.print(f"ran {doing}, {seconds:.0f} s", highlight=False)
        return folder

    def _start(self, task: Path, num_ranks: int) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "OMP_NUM_THREADS": 1}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
        processes = []
        for rank in range(num_ranks):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank}
            with open(task.with_name(f"rank_{rank}.log"), "wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *self._worker, str(task)],
                        env=os.environ | {name: str(value) for name, value in own.items()},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        return processes

    def _wait(self, processes: list[subprocess.Popen], folder: Path, name: str) -> None:
        """Until all have ended well; the first that has not ends the others."""
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
            if process.returncode > 0:
                log = (folder / f"rank_{rank}.log").read_text(errors="replace")
                tail = "\n".join(log.rstrip().splitlines()[-_TAIL_LINES:])
                raise RanksFailed(f"{name}: rank {rank} ended with {process.returncode}:\n{tail}")
        if any(process.returncode for process in processes):
            raise RanksFailed(f"{name}: a rank was killed; see {folder}/rank_*.log")
