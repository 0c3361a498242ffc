"""A real Slurm on this machine for these tests: launch/lab.sh with its own folder and ports."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Enough steps to interrupt the run midway, with checkpoints to go back to.
STEPS, SAVE_EVERY = 60, 10
RUN = [
    "train.micro_batch_sequences=2",
    f"train.total_tokens={STEPS * 256}",
    f"train.save_every_steps={SAVE_EVERY}",
    "train.threads=1",  # fixes the order of sums on every node
]


class Lab:
    """Two virtual nodes, and the folder of prepared data from which jobs are submitted."""

    def __init__(self, folder: Path, workdir: Path, common: list[str]) -> None:
        self.workdir, self.common = workdir, [*common, *RUN]
        self.environment = os.environ | {
            "LAB_FOLDER": str(folder),
            "LAB_PORT": "17900",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command: str, code: int = 0) -> str:
        """Runs a command in the working folder. Returns its standard output."""
        done = subprocess.run(
            command, cwd=self.workdir, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, name: str, *overrides: str) -> list[str]:
        """Runs `nemotron-train slurm` on both nodes. Returns the job numbers."""
        command = [sys.executable, "-m", "nemotron_train", "slurm", "cluster=local_lab", "nodes=2"]
        command.append("cluster.time_limit_minutes=60")
        self.call(*command, *self.common, f"name={name}", *overrides)
        return (self.run(name) / "slurm/links").read_text().split()

    def run(self, name: str) -> Path:
        return self.workdir / "runs" / name

    def steps(self, name: str) -> int:
        """The number of steps that a run has logged."""
        path = self.run(name) / "metrics.jsonl"
        return path.read_text().count('"grad_norm"') if path.exists() else 0

    def states(self) -> dict[str, str]:
        lines = self.call("squeue", "--array", "--noheader", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait(
        self, until: Callable[[], bool], what: str, seconds: float = 900, alone: bool = False
    ) -> None:
        """`alone`: the controller does not answer."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"{what}: {alone or self.states()}"
            time.sleep(0.2)

    def wait_for_step(self, name: str, step: int) -> None:
        self.wait(lambda: self.steps(name) >= step, f"{name} does not reach step {step}")

    def wait_for_end(self, name: str, jobs: list[str]) -> list[list[str]]:
        """Waits until none of the jobs is in the queue. Returns the run's chain of events."""
        self.wait(lambda: not set(jobs) & set(self.states()), f"{name} does not end")
        return self.chain(name)

    def chain(self, name: str) -> list[list[str]]:
        """The run's chain of events so far. slurm/job.sh describes the fields."""
        path = self.run(name) / "slurm/chain.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split("\t") for line in lines]

    def rank_process(self, name: str, rank: int) -> int:
        """The process that trains as `rank` in a run."""
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            trains = words[1:4] == [b"-m", b"nemotron_train", b"pretrain"]
            if (
                trains
                and f"name={name}".encode() in words
                and f"RANK={rank}".encode() in environment
            ):
                return int(entry.name)
        raise AssertionError(f"{name} has no rank {rank}")

    def sweep(self, *overrides: str) -> str:
        """Runs `nemotron-train sweep` as a job array, each cell on one node. Returns its output."""
        command = [sys.executable, "-m", "nemotron_train", "sweep", "launcher=slurm"]
        command += ["cluster=local_lab", "cluster.time_limit_minutes=60"]
        return self.call(*command, *self.common, *overrides)

    def batch_shell(self, job: str) -> int:
        """The process of a job's script."""
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            is_script = len(words) > 1 and words[1].endswith(b"/slurm_script")
            if is_script and f"SLURM_JOB_ID={job}".encode() in environment:
                return int(entry.name)
        raise AssertionError(f"job {job} has no batch shell here")

    def kill_controller(self) -> None:
        folder = Path(self.environment["LAB_FOLDER"])
        os.kill(int((folder / "run/slurmctld.pid").read_text()), signal.SIGKILL)

    def kill_node(self, name: str) -> None:
        """Ends a node's daemon and everything it started, as if its power failed."""
        folder = Path(self.environment["LAB_FOLDER"])
        daemon = int((folder / f"run/slurmd.{name}.pid").read_text())
        # The step daemons leave slurmd's process tree. They stay in its host-name namespace.
        space = os.readlink(f"/proc/{daemon}/ns/uts")
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and os.readlink(entry / "ns/uts") == space:
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue


@pytest.fixture(scope="session")
def lab(small_run: tuple[Path, list[str]]) -> Iterator[Lab]:
    packages = {"slurmctld", "slurmd", "sbatch", "munged", "unshare"}
    missing = sorted(name for name in packages if shutil.which(name) is None)
    if missing or os.geteuid() != 0:
        pytest.fail(f"the lab needs root and the packages in launch/lab.sh; missing: {missing}")
    workdir, common = small_run
    # munge needs a socket that every user can reach, which pytest's own folders forbid.
    folder = Path(tempfile.mkdtemp(prefix="nemotron_train_lab_"))
    started = Lab(folder, workdir, common)
    try:
        started.call(str(ROOT / "launch/lab.sh"), "start")
        yield started
    finally:
        started.call(str(ROOT / "launch/lab.sh"), "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def trajectory() -> Callable[[Path], list[tuple[int, float, float]]]:
    """Step, loss and gradient norm of every step of a run folder."""
    return _trajectory


def _trajectory(folder: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "grad_norm" in row]


@pytest.fixture(scope="session")
def reference(
    lab: Lab, trajectory: Callable[[Path], list[tuple[int, float, float]]]
) -> list[tuple[int, float, float]]:
    """The uninterrupted run on two ranks of this machine, without Slurm."""
    command = [sys.executable, "-m", "nemotron_train", "pretrain", *lab.common, "name=reference"]
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 17890, "OMP_NUM_THREADS": 1}
        environment = lab.environment | {name: str(value) for name, value in place.items()}
        processes.append(subprocess.Popen(command, cwd=lab.workdir, env=environment))
    assert [process.wait(timeout=900) for process in processes] == [0, 0]
    found = trajectory(lab.run("reference"))
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    return found
