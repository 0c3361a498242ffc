"""A save in the background of the training: order, agreement between ranks, errors that reach every
rank.

Two gloo ranks in separate processes. The writers are plain functions: no model, no files. Second
truth: the events on each rank, step by step. Not covered: NCCL (the control group is gloo there
too), and Megatron's part of a save (tests/distributed).
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RANK = """
import json, sys, threading, time
import torch.distributed as dist
from nemotron_train.train.checkpoint.background import Background, SaveFailed

dist.init_process_group("gloo")
rank = dist.get_rank()
save = Background()

def steps(write, commit, limit=2000):
    # Polls as a loop does, a step a call; returns (steps until told, message).
    save.start(write, commit)
    for step in range(limit):
        dist.barrier()  # the gradients' collective keeps the ranks in step
        try:
            if save.poll():
                return [step, ""]
        except SaveFailed as error:
            return [step, str(error)]
        time.sleep(0.002)
    raise AssertionError("never told")

def slow(seconds, value):
    time.sleep(seconds)
    return value

def broken(kind):
    raise kind("disk full\\nsecond line")

seen = {}
got = []
seen["good"] = steps(lambda: slow(0.3 * rank, {"rank": rank}), got.extend)
seen["payloads"] = got
seen["in_flight"] = save.in_flight
if rank == 0:
    writer_error = lambda: 1
else:
    writer_error = lambda: broken(OSError)
got = []
seen["writer"] = steps(writer_error, got.extend)
seen["committed_after_writer_error"] = got
seen["commit"] = steps(lambda: 1, lambda results: broken(RuntimeError))
try:
    save.together("no room" if rank == 0 else "")
except SaveFailed as error:
    seen["together"] = str(error)
# Told by waiting: the slower rank's writer and the commit are over when it returns.
done = threading.Event()
save.start(lambda: slow(0.5 * rank, rank), lambda results: slow(0.2, done.set()))
seen["waited"] = [save.poll(wait=True), rank != 0 or done.is_set(), save.in_flight]
seen["nothing_in_flight"] = save.poll()
json.dump(seen, open(f"{sys.argv[1]}/{rank}.json", "w"))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The events on each rank."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder)],
            env=os.environ | place | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_learn_of_the_end_at_the_same_step(seen: list[dict[str, Any]]) -> None:
    """Not before the slower rank has written. Training continued in the meantime."""
    assert seen[0]["good"] == seen[1]["good"]
    step, message = seen[0]["good"]
    assert step >= 3 and message == ""
    assert seen[0]["payloads"] == [{"rank": 0}, {"rank": 1}] and seen[1]["payloads"] == []
    assert not seen[0]["in_flight"] and not seen[1]["in_flight"]


def test_a_writers_error_reaches_every_rank(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["writer"] == seen[1]["writer"]
    assert seen[0]["writer"][1] == "rank 1: disk full"
    assert seen[0]["committed_after_writer_error"] == []


def test_an_error_of_the_commit_reaches_every_rank(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["commit"] == seen[1]["commit"]
    assert seen[0]["commit"][1] == "disk full"
    assert seen[0]["together"] == seen[1]["together"] == "no room"


def test_waiting_waits_for_the_commit(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["waited"] == [True, True, False]
        assert rank["nothing_in_flight"] is False
