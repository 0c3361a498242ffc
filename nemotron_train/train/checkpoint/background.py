"""One save at a time beside the training: written by every rank, committed by the first.

Owns: the writer's thread, and what the ranks agree on about it. Does not own: what is written
(`checkpoint`), nor what a checkpoint must hold to be trusted (`integrity`).

A thread and not a process: writing and hashing let go of the interpreter's lock, a forked child of
a process with gloo's, OpenMP's and CUDA's threads may deadlock, and a spawned one costs a second
torch a rank and another copy of every tensor. benchmarks/async_save.py has the figures.

Two phases, so that nobody ever waits: every rank writes and hashes its own files; once all have,
the first rank alone writes what names them, and renames. Each step in between costs one number
over the control group.
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

NICENESS = 10  # of the writer's thread: a core that both want goes to the training
RUNNING, DONE, FAILED = 0, 1, 2


class SaveFailed(TrainingFailed):
    """A checkpoint could not be written; the ones before it are as they were."""


class Background:
    """Runs one save; every method is COLLECTIVE."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=_step_back)
        self._is_first = dist.get_rank() == 0
        self._num_ranks = dist.get_world_size()
        # Gloo, on the host: a number that the device need not be waited for.
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
        """Whether a save was started whose end `poll` has not told; the same on every rank."""
        return self._commit is not None

    def together(self, problem: str) -> None:
        """Raise SaveFailed on every rank if the first one has a `problem`."""
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
        """Begin to `write` on every rank; the first one gets all results in `commit`.

        Where training waits for the end anyway, the caller's own thread does both: the other one
        steps back for whatever else the machine does, and on a busy one takes seconds for it.
        """
        assert not self.in_flight, "one save at a time"
        self._problem, self._commit = "", commit
        self._submit = _run_here if is_waited_for else self._pool.submit
        self._writing = self._submit(write)

    def poll(self, *, wait: bool = False) -> bool:
        """Whether the save has come to its end with this call; with `wait` it has.

        Raises SaveFailed on every rank for what any rank's writer met: by the end of the step in
        which it did.
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
        """Whether every rank has written; if so, the first one goes on to commit."""
        if wait:
            wait_for([writing])
        done = torch.tensor([int(writing.done())])
        if self._num_ranks > 1:
            dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._group)
        if not done.item():
            return False
        own = (_words(writing.exception()), None if writing.exception() else writing.result())
        results: list[Any] = [own]
        if self._num_ranks > 1:
            results = [None] * self._num_ranks
            dist.gather_object(own, results if self._is_first else None, 0, group=self._group)
        self._writing = None
        if self._is_first:
            problems = [f"rank {rank}: {words}" for rank, (words, _) in enumerate(results) if words]
            self._problem = "; ".join(problems)
            if not problems:
                assert self._commit is not None
                payloads = [payload for _, payload in results]
                self._committing = self._submit(self._commit, payloads)
        return True

    def _agreed_state(self) -> int:
        """RUNNING, DONE or FAILED: what the first rank says."""
        state = RUNNING
        if self._is_first and self._committing is not None and self._committing.done():
            self._problem = _words(self._committing.exception())
            state = DONE
        if self._problem:
            state = FAILED
        if self._num_ranks == 1:
            return state
        agreed = torch.tensor([state])
        dist.broadcast(agreed, src=0, group=self._group)
        return int(agreed.item())


def _run_here(task: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """What an executor's `submit` returns, when it is done."""
    future: Future[Any] = Future()
    try:
        future.set_result(task(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def _words(error: BaseException | None) -> str:
    if error is None:
        return ""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _step_back() -> None:
    """A thread has a niceness of its own on Linux."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
