"""Jobs for fault injection: the ranks of one run as processes that can be killed and signalled."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.platform import device
from nemotron_train.run_folder import integrity
from tests import warm_process

device.prepare()  # before a test module imports Megatron-Core

INJECT = Path(__file__).with_name("inject.py")
STEP_TOKENS = 256  # those of `small_run`


class Job:
    """The ranks of one run, started in `folder`. Each rank writes to a file of its own."""

    def __init__(
        self,
        folder: Path,
        words: list[str],
        ranks: int = 1,
        faults: dict[int, dict[str, Any]] | None = None,
        environment: dict[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.log = folder / f"job_{len(list(folder.glob('job_*')))}"
        self.log.mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []
        port = port or _free_port()
        for rank in range(ranks):
            place: dict[str, object] = {"OMP_NUM_THREADS": 1}
            if ranks > 1:
                place |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
                place |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
                place |= {"MASTER_PORT": port}
            fault = (faults or {}).get(rank)
            command = [sys.executable, "-m", "nemotron_train"]
            start: type[subprocess.Popen[bytes]] = warm_process.Popen
            if fault is not None:
                command = [sys.executable, str(INJECT), json.dumps(fault)]
                start = subprocess.Popen if "import" in fault else start
            with open(self.log / str(rank), "wb") as output:
                self.processes.append(
                    start(
                        [*command, "pretrain", *words],
                        cwd=folder,
                        env=os.environ
                        | {name: str(value) for name, value in place.items()}
                        | (environment or {}),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def output(self, rank: int = 0) -> str:
        return (self.log / str(rank)).read_text(errors="replace")

    def wait(self, timeout: float = 300) -> list[int]:
        """Exit codes by rank; negative if a signal ended the process."""
        return [process.wait(timeout) for process in self.processes]

    def wait_for(self, text: str, rank: int = 0, timeout: float = 300) -> None:
        """Returns once the rank's output contains `text`."""
        end = time.monotonic() + timeout
        while text not in self.output(rank):
            assert self.processes[rank].poll() is None, self.output(rank)
            assert time.monotonic() < end, self.output(rank)
            time.sleep(0.02)

    def signal(self, number: int, rank: int = 0) -> None:
        self.processes[rank].send_signal(number)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def job(small_run: tuple[Path, list[str]]) -> Iterator[Callable[..., Job]]:
    """Starts a `pretrain` of the small run with further overrides. Remaining processes are killed
    when the test ends."""
    folder, common = small_run
    jobs: list[Job] = []

    def start(*overrides: str, where: Path | None = None, **options: Any) -> Job:
        jobs.append(Job(where or folder, [*common, *overrides], **options))
        return jobs[-1]

    yield start
    for each in jobs:
        each.end()


@pytest.fixture(scope="session")
def reference(small_run: tuple[Path, list[str]]) -> Callable[..., Path]:
    """The folder of the uninterrupted run of `steps` steps with these overrides, trained once."""
    folder, common = small_run
    done: dict[tuple[str, ...], Path] = {}

    def train(steps: int, *overrides: str, ranks: int = 1) -> Path:
        key = (str(steps), str(ranks), *overrides)
        if key not in done:
            name = f"reference_{len(done)}"
            words = [*common, f"train.total_tokens={steps * STEP_TOKENS}", f"name={name}"]
            run = Job(folder, [*words, *overrides], ranks=ranks)
            assert run.wait() == [0] * ranks, run.output()
            done[key] = folder / "runs" / name
        return done[key]

    return train


@pytest.fixture(scope="session")
def newest() -> Callable[[Path], tuple[Path | None, list[str]]]:
    """Finds the checkpoint that a run folder would continue from; also returns the messages about
    the checkpoints it rejects."""

    def find(run: Path) -> tuple[Path | None, list[str]]:
        said: list[str] = []
        return integrity.latest(run / "checkpoints", said.append), said

    return find


@pytest.fixture(scope="session")
def forge() -> Callable[[Path], None]:
    """Corrects a changed checkpoint's checksums and the run folder's record of them, as an attacker
    with write access to the whole run folder can."""

    def make_right(step: Path) -> None:
        path = step / "manifest.json"
        manifest = json.loads(path.read_text())
        for name in manifest["sha256"]:
            content = (step / name).read_bytes()
            manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
            manifest["bytes"][name] = len(content)
        path.write_text(json.dumps(manifest))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with open(step.parent.parent / "checkpoints.jsonl", "a") as record:
            record.write(json.dumps({"step": manifest["step"], "manifest": digest}) + "\n")

    return make_right
