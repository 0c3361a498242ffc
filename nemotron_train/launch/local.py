"""Trains on several ranks of this machine: `python -m nemotron_train.launch.local RANKS [KNOB=VALUE
...]`, which `launch/local.sh` calls. No torch.

Owns: the ranks' environment, the signals they get, the exit code of the launch, and that the reason
of a refusal is printed once, last. Does not own: training. torchrun starts the same ranks, but ends
with 1 whatever the ranks end with, prints a stop on request as a failure, and buries a refusal in
its own report.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path

from nemotron_train.config.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED
from nemotron_train.platform.local_ranks import (
    ERROR_FILE_VARIABLE,
    free_port,
    rank_environment,
    read_refusal,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_GRACE_SECONDS = 5.0  # between the first rank's failure and the kill of the others


class LocalRanks:
    """The ranks of one launch. Signals to this process go to every rank, once each.

    The ranks form process groups of their own, so that Ctrl-C in a terminal does not reach them
    twice.
    """

    def __init__(self, command: Sequence[str], num_ranks: int, folder: Path) -> None:
        """Start the ranks. folder: gets one file a refused rank (`error_file`)."""
        self._folder = folder
        self._processes: list[subprocess.Popen] = []
        for number in SIGNALS:
            signal.signal(number, self._forward)
        port = free_port()
        for rank in range(num_ranks):
            environment = rank_environment(rank, num_ranks, port)
            environment[ERROR_FILE_VARIABLE] = str(self._error_file(rank))
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
            self._processes.append(
                subprocess.Popen(command, env=os.environ | environment, process_group=0)
            )

    def wait(self) -> tuple[int, int]:
        """Wait until all ranks have ended. Returns (rank, exit code) of the one that decides: the
        first that failed, else one that stopped on request, else rank 0.

        The other ranks would wait for a failed one for ever, so they are killed after a few
        seconds.
        """
        failed: tuple[int, int] | None = None
        deadline = float("inf")
        while any(process.poll() is None for process in self._processes):
            if failed is None:
                failed = self._failed()
                deadline = float("inf") if failed is None else time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > deadline:
                for process in self._processes:
                    process.kill()
            time.sleep(0.05)
        codes = [process.returncode for process in self._processes]
        if failed := failed or self._failed():
            return failed
        return next(((rank, code) for rank, code in enumerate(codes) if code), (0, EXIT_DONE))

    def refusal(self, rank: int) -> str:
        """The line with which a rank refused to go on; empty if it left none."""
        return read_refusal(self._error_file(rank))

    def _failed(self) -> tuple[int, int] | None:
        codes = [(rank, process.poll()) for rank, process in enumerate(self._processes)]
        failures = [(rank, code) for rank, code in codes if code not in (None, 0, EXIT_STOPPED)]
        # A rank that refuses has the reason; one that lost its peers at the same moment has not.
        refused = [(rank, code) for rank, code in failures if code == EXIT_CONFIG]
        return next(iter(refused or failures), None)  # type: ignore[arg-type]

    def _error_file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.json"

    def _forward(self, number: int, frame: types.FrameType | None) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


def main(arguments: Sequence[str]) -> int:
    """Train on `arguments[0]` ranks with the knobs that follow. Returns the exit code of
    `pretrain`: that of the first rank that failed, else 3 if one stopped on request, else 0."""
    num_ranks = arguments[0] if arguments else ""
    if not (num_ranks.isascii() and num_ranks.isdecimal() and int(num_ranks) > 0):
        print("usage: launch/local.sh RANKS [KNOB=VALUE ...]", file=sys.stderr)
        return EXIT_CONFIG
    command = [sys.executable, "-m", "nemotron_train", "pretrain", *arguments[1:]]
    with tempfile.TemporaryDirectory() as folder:
        ranks = LocalRanks(command, int(num_ranks), Path(folder))
        rank, code = ranks.wait()
        line = ranks.refusal(rank)
    if line:
        print(line, file=sys.stderr)
    elif code not in (EXIT_DONE, EXIT_STOPPED):
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        print(f"nemotron-train: rank {rank} ended with {how}; see above", file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
