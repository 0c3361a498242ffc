"""Scores many episodes in a few processes: one score for each, in order, whatever happens.

Environments run in workers (`worker`), never in the process that trains: a judge that hangs, floods
its output, eats memory or ends its process costs the sample a verdict, and the worker is killed
with its process group, reaped and replaced. The clock is the parent's.

Linux 5.3 or later. Not covered: a user's judge that starts processes in a session of their own and
leaves them; that is what the sandbox is for.
"""

import contextlib
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nemotron_train.config.environments import Isolation
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.posttrain.environments import protocol
from nemotron_train.posttrain.environments.families import check_name
from nemotron_train.posttrain.environments.protocol import Episode, Message, Row, Score, failed
from nemotron_train.posttrain.sandbox.verdict import Verdict

_WORKER = "nemotron_train.posttrain.environments.worker"
_MAX_REPLY_BYTES = 16 << 20
_MAX_PRINTED_BYTES = 1 << 20  # of one call


@dataclass(frozen=True)
class ScoringLimits:
    """workers: processes. seconds: wall clock of one call. load_seconds: of an environment's import
    in a worker. memory_bytes: of data that a worker writes to."""

    workers: int = 2
    seconds: float = 10.0
    load_seconds: float = 60.0
    memory_bytes: int = 8 << 30
    sandbox: Isolation = Isolation.namespaces


class Scoring:
    """A pool of workers. Close it after use. Methods take any number of items."""

    def __init__(self, limits: ScoringLimits | None = None) -> None:
        self.limits = limits or ScoringLimits()
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker(self.limits) for _ in range(self.limits.workers)]
        for worker in self._all:
            self._workers.put(worker)
        self._threads = ThreadPoolExecutor(self.limits.workers, "scoring")

    def load(self, names: Iterable[str]) -> dict[str, int]:
        """Import environments in a worker: name → most turns of an episode. Call it before a run.

        Raises ConfigError for an environment that does not exist, cannot be imported (in time), or
        misses a package or the sandbox.
        """
        turns = {}
        for name in names:
            check_name(name)
            reply = self._threads.submit(self._call, name, "load", None).result()
            if "refused" in reply:
                raise ConfigError(reply["refused"])
            if "verdict" in reply:
                raise ConfigError(
                    f"environment {name}: cannot be loaded ({reply['verdict']}: {reply['message']})"
                )
            turns[name] = reply["value"]
        return turns

    def check_rows(self, rows: Sequence[Row]) -> list[str]:
        """For each row what its environment misses in it; empty if nothing."""
        replies = self._map("check_row", rows, [protocol.row_json(row) for row in rows])
        return [
            reply["value"] if "value" in reply else _failure(reply).message for reply in replies
        ]

    def start(self, rows: Sequence[Row]) -> list[list[Message] | Score]:
        """The first messages of each row's episode, or the score 0 with which it already ends."""
        replies = self._map("start", rows, [protocol.row_json(row) for row in rows])
        return [_messages(reply) if "value" in reply else _failure(reply) for reply in replies]

    def step(self, episodes: Sequence[Episode]) -> list[list[Message] | Score | None]:
        """The reply to each episode's last completion, None if it is done, or its score 0."""
        return [_reply(reply) for reply in self._map_episodes("step", episodes)]

    def begin_step[Result](
        self, episode: Episode, then: Callable[[list[Message] | Score | None], Result]
    ) -> Future[Result]:
        """`step` of one episode, in the background, and what `then` makes of the reply there."""
        item = protocol.episode_json(episode)
        return self._threads.submit(
            lambda: then(_reply(self._call(episode.row.environment, "step", item)))
        )

    def score(self, episodes: Sequence[Episode]) -> list[Score]:
        """The score of each episode, in order."""
        return [_score(reply) for reply in self._map_episodes("score", episodes)]

    def begin_score(self, episode: Episode) -> Future[Score]:
        """`score` of one episode, in the background."""
        item = protocol.episode_json(episode)
        return self._threads.submit(
            lambda: _score(self._call(episode.row.environment, "score", item))
        )

    def restart(self) -> None:
        """End all workers; the next calls start new ones, which know nothing of earlier calls."""
        for worker in self._all:
            worker.stop()

    def close(self) -> None:
        """End and reap all workers, also those with a call in flight."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.kill()
        self._threads.shutdown()
        for worker in self._all:
            worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _map_episodes(self, method: str, episodes: Sequence[Episode]) -> list[dict[str, Any]]:
        items = [protocol.episode_json(episode) for episode in episodes]
        return self._map(method, [episode.row for episode in episodes], items)

    def _map(self, method: str, rows: Sequence[Row], items: Sequence[Any]) -> list[dict[str, Any]]:
        names = [row.environment for row in rows]
        return list(self._threads.map(self._call, names, [method] * len(names), items))

    def _call(self, name: str, method: str, item: Any) -> dict[str, Any]:
        worker = self._workers.get()
        try:
            return worker.call(name, method, item)
        finally:
            self._workers.put(worker)


def _messages(reply: dict[str, Any]) -> list[Message]:
    return list(protocol.messages_from_json(reply["value"]))


def _reply(reply: dict[str, Any]) -> list[Message] | Score | None:
    if "value" not in reply:
        return _failure(reply)
    return None if reply["value"] is None else _messages(reply)


def _score(reply: dict[str, Any]) -> Score:
    return protocol.score_from_json(reply["value"]) if "value" in reply else _failure(reply)


def _failure(reply: dict[str, Any]) -> Score:
    if "refused" in reply:
        return failed(reply["refused"], Verdict.error)
    return failed(reply["message"], Verdict(reply["verdict"]))


class _Ended(Exception):
    """A call that ended without a reply. The worker is of no more use."""

    def __init__(self, verdict: Verdict, message: str) -> None:
        super().__init__(message)
        self.verdict = verdict


class _Worker:
    """One process, started when first needed and again after it was killed."""

    def __init__(self, limits: ScoringLimits) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: dict[str, Any] = {}

    def call(self, name: str, method: str, item: Any) -> dict[str, Any]:
        """The reply to one request: with "value", "refused", or "verdict" and "message"."""
        try:
            if self._process is None:
                self._start()
            if name not in self._loaded:
                request = {"environment": name, "method": "load", "item": None}
                reply = self._exchange(request, self._limits.load_seconds)
                if "value" not in reply:
                    return reply
                self._loaded[name] = reply
            if method == "load":
                return self._loaded[name]
            request = {"environment": name, "method": method, "item": item}
            return self._exchange(request, self._limits.seconds)
        except _Ended as error:
            self.stop()
            return {"verdict": str(error.verdict), "message": str(error)}
        except OSError as error:  # no process can be started now
            return {"verdict": str(Verdict.error), "message": str(error)}

    def kill(self) -> None:
        """Kill the process with its group. The only method for another thread than the caller's."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kill the process with its group and reap it."""
        if self._process is None:
            return
        self.kill()
        self._process.wait()
        for file in (self._requests, self._replies, self._printed, self._ended):
            os.close(file)
        self._process = None
        self._loaded = {}

    def _start(self) -> None:
        requests_end, self._requests = os.pipe()
        self._replies, replies_end = os.pipe()
        self._printed, printed_end = os.pipe()
        settings: dict[str, Any] = {
            "memory_bytes": self._limits.memory_bytes,
            "parent": os.getpid(),
        }
        settings["sandbox"] = str(self._limits.sandbox)
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        arguments = [str(requests_end), str(replies_end), json_text(settings)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER, *arguments],
            pass_fds=[requests_end, replies_end],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=printed_end,
            stderr=printed_end,
            start_new_session=True,
        )
        for file in (requests_end, replies_end, printed_end):
            os.close(file)
        for file in (self._requests, self._replies, self._printed):
            os.set_blocking(file, False)
        self._ended = os.pidfd_open(self._process.pid)

    def _exchange(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and read the reply. Raises _Ended."""
        data = (json_text(request) + "\n").encode()
        reply, printed = bytearray(), 0
        deadline = time.monotonic() + seconds
        readable = {self._replies, self._printed, self._ended}
        while not reply.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise _Ended(Verdict.timeout, f"no answer within {seconds:g} s")
            writable = [self._requests] if data else []
            ready = _ready(readable, writable, left)
            if self._requests in ready:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    data = data[os.write(self._requests, data[: 1 << 16]) :]
            if self._printed in ready:
                part = os.read(self._printed, 1 << 16)
                printed += len(part)
                if not part:
                    readable.discard(self._printed)
            if self._replies in ready:
                part = os.read(self._replies, 1 << 16)
                reply += part
                if not part:
                    readable.discard(self._replies)
            if printed > _MAX_PRINTED_BYTES or len(reply) > _MAX_REPLY_BYTES:
                raise _Ended(Verdict.output, "more output than allowed")
            if ready == {self._ended}:
                raise self._end()
        return json.loads(reply)

    def _end(self) -> _Ended:
        assert self._process is not None
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return _Ended(Verdict.killed, f"the process ended {how}")


def _ready(readable: Collection[int], writable: Collection[int], seconds: float) -> set[int]:
    """The descriptors that can be read or written, within `seconds`. A `select` could not take
    those above 1023, which a process with many shards and runs open has."""
    poll = select.poll()
    for file in readable:
        poll.register(file, select.POLLIN)
    for file in writable:
        poll.register(file, select.POLLOUT)
    return {file for file, _ in poll.poll(math.ceil(1000 * seconds))}
