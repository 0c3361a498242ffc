"""Edge cases of starting a run: repeatedly, at its end, two at once, with a port in use, with a
rank that never starts.

Not covered: a file system without locks, a folder shared by machines.
"""

import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

SMALL = ["train.micro_batch_sequences=2"]  # a batch that two ranks can share


@pytest.mark.faults
def test_resumed_again_and_again(job, small_run, reference, metrics, weights) -> None:
    """Ten processes of one step each, the last one at the run's end. No sample is repeated or lost.
    One more start does nothing and exits with 0."""
    run = small_run[0] / "runs" / "one_step_each"
    codes = []
    for _ in range(10):
        one = job("name=one_step_each", "train.stop_after_steps=1", "train.save_every_steps=1")
        codes += one.wait()
    assert codes == [3] * 9 + [0]
    whole = reference(10, "train.save_every_steps=1")
    assert metrics(run) == metrics(whole)
    assert weights(run, 10) == weights(whole, 10)
    before = (run / "metrics.jsonl").read_bytes()
    again = job("name=one_step_each")
    assert again.wait() == [0] and "nothing to do" in again.output()
    assert (run / "metrics.jsonl").read_bytes() == before


def test_two_jobs_in_one_folder(job, small_run, reference, metrics) -> None:
    """The second job refuses and names the process that holds the folder. The first one is not
    disturbed. A killed job holds no lock."""
    first = job("name=contested", "train.save_every_steps=1")
    first.wait_for("step  1/")
    first.signal(signal.SIGSTOP)  # otherwise it may end before the second has started
    second = job("name=contested", "train.save_every_steps=1")
    assert second.wait() == [2], second.output()
    first.signal(signal.SIGCONT)
    line = second.output().strip().splitlines()[-1]
    assert "contested" in line and str(first.processes[0].pid) in line, line
    assert first.wait() == [0], first.output()
    run = small_run[0] / "runs" / "contested"
    assert metrics(run) == metrics(reference(10, "train.save_every_steps=1"))


@pytest.mark.faults
def test_a_killed_jobs_lock_is_taken_over(job) -> None:
    first = job("name=stale")
    first.wait_for("step  1/")
    first.signal(signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL]
    second = job("name=stale")
    assert second.wait() == [0], second.output()


@pytest.mark.faults
def test_port_taken(job) -> None:
    """Another program listens on the rendezvous port. The run ends within the limit and names the
    port."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        started = time.monotonic()
        run = job("name=port_taken", *SMALL, environment=_place(0, 2, port))
        assert run.wait(timeout=120) == [1], run.output()
        assert time.monotonic() - started < 120
        assert f"127.0.0.1:{port}" in run.output().splitlines()[-1], run.output()


@pytest.mark.faults
@pytest.mark.parametrize("who", ["master", "node"])
def test_somebody_never_comes(job, who: str) -> None:
    """Only one of two ranks starts: the master, or another rank that cannot reach it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = {"master": 1, "node": 0}[who]
    started = time.monotonic()
    run = job(
        f"name=no_{who}", *SMALL, "train.rendezvous_seconds=10", environment=_place(rank, 2, port)
    )
    assert run.wait(timeout=120) == [1], run.output()
    assert time.monotonic() - started < 100
    line = run.output().strip().splitlines()[-1]
    assert f"127.0.0.1:{port}" in line and "rendezvous_seconds" in line, run.output()


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()}


@pytest.mark.faults
def test_a_shard_of_the_corpus_swapped_between_two_starts(job, small_run, tmp_path: Path) -> None:
    """Same lengths, other tokens: refused by its checksum; no training on it."""
    where = tmp_path / "job"
    where.mkdir()
    shutil.copytree(small_run[0] / "data", where / "data")
    first = job("name=swapped", "train.stop_after_steps=2", where=where)
    assert first.wait() == [3], first.output()
    shard = where / "data" / "train_00000.bin"
    tokens = bytearray(shard.read_bytes())
    tokens[:100], tokens[100:200] = tokens[100:200], tokens[:100]
    shard.write_bytes(tokens)
    second = job("name=swapped", where=where)
    assert second.wait() == [2], second.output()
    assert "train_00000.bin" in second.output().splitlines()[-1]
