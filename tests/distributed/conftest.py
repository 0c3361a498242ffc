"""Processes that are the ranks of one job, over gloo."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import warm_process


@pytest.fixture(scope="session")
def start_ranks() -> Callable[[list[str], Path, int], list[subprocess.Popen[str]]]:
    """Starts Python with the given arguments in a folder, one process per rank."""
    return _start_ranks


@pytest.fixture(scope="session")
def run_ranks() -> Callable[[list[str], Path, int], None]:
    """Runs Python with the given arguments in a folder, one process per rank. All must succeed."""
    return _run_ranks


def _start_ranks(arguments: list[str], folder: Path, ranks: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start: type[subprocess.Popen[str]] = warm_process.Popen
    if Path(arguments[0]).name == "counted_traffic.py":  # wraps what Megatron-Core imports
        start = subprocess.Popen
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        processes.append(
            start(
                [sys.executable, *arguments],
                cwd=folder,
                env=os.environ | {name: str(value) for name, value in place.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def _run_ranks(arguments: list[str], folder: Path, ranks: int) -> None:
    processes = _start_ranks(arguments, folder, ranks)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
