"""Background saves: every rank writes its files, the first rank commits. One save at a time.

Owns: the writer thread, and the agreement of the ranks on its state. Does not own: what is written
(`checkpoints`), what makes a checkpoint trustworthy (`integrity`).

Why a thread and not a process: writing and hashing release the GIL. A forked child of a process
with gloo, OpenMP and CUDA threads may deadlock. A spawned process costs a second copy of torch per
rank and another copy of every tensor. benchmarks/async_save.py has the measurements.

Two phases, so that training never waits. First, every rank writes and hashes its own files. When
all ranks are done, the first rank writes the files that describe them, and renames the folder. Each
training step during a save costs one collective of one number over a gloo group.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import torch
import torch.distributed as dist

from nemotron_train.config.errors import TrainingFailed

NICENESS = 10  # of the writer thread: training has priority on a shared core
RUNNING, DONE, FAILED = 0, 1, 2


class SaveFailed(TrainingFailed):
    """A checkpoint could not be written. Earlier checkpoints are not affected."""


class Background:
    """Runs one save at a time. Every method is COLLECTIVE."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=_lower_priority)
        self._is_first = dist.get_rank() == 0
        self._num_ranks = dist.get_world_size()
        # Gloo works on host tensors, so agreeing on a number does not synchronize the device.
        self._group: Any = None
        if self._num_ranks > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        self._submit: Callable[..., Future[Any]] = self._pool.submit
        self._writing: Future[Any] | None = None
        self._committing: Future[None] | None = None
        self._commit: Callable[[Sequence[Any]], None] | None = None
        self._problem = ""

    @property
    def in_flight(self) -> bool:
        """Whether a save was started and `poll` has not reported its end; equal on all ranks."""
        return self._commit is not None

    def together(self, problem: str) -> None:
        """Raise SaveFailed on every rank if `problem` is not "" on the first rank."""
        message = [problem]
        if self._num_ranks > 1:
            dist.broadcast_object_list(message, src=0, group=self._group)
        if message[0]:
            raise SaveFailed(message[0])

    def start(
        self,
        write: Callable[[], Any],
        commit: Callable[[Sequence[Any]], None],
        is_waited_for: bool = False,
    ) -> None:
        """Start `write` on every rank. Later, the first rank calls `commit` with all results.

        With `is_waited_for`, the calling thread runs both, because training waits anyway. The
        writer thread has a low priority and would take seconds longer on a busy machine.
        """
        assert not self.in_flight, "one save at a time"
        self._problem, self._commit = "", commit
        self._submit = _run_here if is_waited_for else self._pool.submit
        self._writing = self._submit(write)

    def poll(self, *, wait: bool = False) -> bool:
        """Whether the save in flight ended with this call. With `wait`, waits for its end first.

        Raises SaveFailed on every rank if any rank failed to write, or the first rank to commit.
        Polled after every step, it reports an error by the end of the step in which it occurred.
        """
        if not self.in_flight:
            return False
        if self._writing is not None and not self._all_written(self._writing, wait):
            return False
        if self._committing is not None and wait:
            wait_for([self._committing])
        state = self._agreed_state()
        if state == RUNNING:
            return False
        self._committing, self._commit = None, None
        if state == FAILED:
            self.together(self._problem)
        return True

    def _all_written(self, writing: Future[Any], wait: bool) -> bool:
        """Whether every rank has written. If so, gather the results and start the commit."""
        if wait:
            wait_for([writing])
        done = torch.tensor([int(writing.done())])
        if self._num_ranks > 1:
            dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._group)
        if not done.item():
            return False
        local_result = (
            _message(writing.exception()),
            None if writing.exception() else writing.result(),
        )
        results: list[Any] = [local_result]
        if self._num_ranks > 1:
            results = [None] * self._num_ranks
            dist.gather_object(
                local_result, results if self._is_first else None, 0, group=self._group
            )
        self._writing = None
        if self._is_first:
            problems = [
                f"rank {rank}: {message}" for rank, (message, _) in enumerate(results) if message
            ]
            self._problem = "; ".join(problems)
            if not problems:
                assert self._commit is not None
                payloads = [payload for _, payload in results]
                self._committing = self._submit(self._commit, payloads)
        return True

    def _agreed_state(self) -> int:
        """RUNNING, DONE or FAILED, as decided by the first rank."""
        state = RUNNING
        if self._is_first and self._committing is not None and self._committing.done():
            self._problem = _message(self._committing.exception())
            state = DONE
        if self._problem:
            state = FAILED
        if self._num_ranks == 1:
            return state
        agreed_state = torch.tensor([state])
        dist.broadcast(agreed_state, src=0, group=self._group)
        return int(agreed_state.item())


def _run_here(task: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Run `task` in the calling thread. Returns a finished future, like an executor's `submit`."""
    future: Future[Any] = Future()
    try:
        future.set_result(task(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def _message(error: BaseException | None) -> str:
    """The first line of the error's text, or its type name if it has none; "" for None."""
    if error is None:
        return ""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _lower_priority() -> None:
    """Lower the priority of the calling thread. On Linux, every thread has its own niceness."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
