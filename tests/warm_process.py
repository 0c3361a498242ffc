"""Processes that begin where Python, torch and Megatron-Core are already imported.

A program of this project takes five seconds of a core to import what it needs, and the small runs
of the tests one or two to do their work. `Popen` and `run` here are those of `subprocess` for
Python with `-m MODULE`, `-c PROGRAM` or a script. They too give a process of its own, which can be
killed, stopped and asked to end, and has its own folder, environment, session, finalizers and exit
code. It is forked from a server that has imported the libraries and computed nothing. Even and odd
ranks have a server each, with another hash seed, so that ranks which depend on the order of a set
still part.

Not the same as a new interpreter: modules are there before the program asks for them. Tests of
imports, of start-up and of memory start Python themselves.
"""

import gc
import importlib
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CompletedProcess, TimeoutExpired
from typing import Any

import pytest

__all__ = ["DEVNULL", "PIPE", "STDOUT", "CompletedProcess", "Popen", "TimeoutExpired", "run"]
IMPORTED = ["nemotron_train.cli.main", "nemotron_train.run", "nemotron_train.train.trainer"]
IMPORTED += ["hydra", "matplotlib.figure", "matplotlib.backends.backend_agg", "torch._dynamo"]
IMPORTED += ["megatron.core.models.mimo.optimizer", "nemotron_train.report.write"]
IMPORTED += ["megatron.core.dist_checkpointing.strategies.fully_parallel", "numpy.random"]
_MOST_BYTES = 1 << 18  # of a request
_NAMES = list(inspect.signature(subprocess.Popen._execute_child).parameters)[2:]
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_servers: dict[int, socket.socket] = {}


class Popen(subprocess.Popen):
    """A process that a server forks. Everything about pipes is `subprocess`'s."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        """Replaces fork and exec."""
        given = dict(zip(_NAMES, others, strict=True))
        c2pwrite, errwrite = given["c2pwrite"], given["errwrite"]
        environment = dict(os.environ if given["env"] is None else given["env"])
        assert args[0] == sys.executable
        request = {
            "words": args[1:],
            "folder": str(given["cwd"] or Path.cwd()),
            "environment": environment,
            "session": given["start_new_session"],
        }
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = _server(int(environment.get("RANK", "0")) % 2)
        output = 1 if c2pwrite == -1 else c2pwrite
        errors = 2 if errwrite == -1 else errwrite
        descriptors = [theirs.fileno(), output, errors]
        socket.send_fds(server, [json.dumps(request).encode()], descriptors)
        theirs.close()
        self._close_pipe_fds(*(given[name] for name in _PIPES))
        self.pid = int(self._answers.recv(64))
        self._child_created = True

    def _internal_poll(self, *others: Any, **more: Any) -> int | None:
        if self.returncode is None and self._has_answered(0):
            answer = self._answers.recv(64)
            self.returncode = int(answer) if answer else -signal.SIGKILL
            self._answers.close()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None and not self._has_answered(timeout):
            raise TimeoutExpired(self.args, timeout or 0.0)
        code = self._internal_poll()
        assert code is not None
        return code

    def _has_answered(self, timeout: float | None) -> bool:
        """Whether the end is known within so many seconds. `select` takes no descriptor above
        1023, which a test process with many shards open has."""
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        return bool(poll.poll(None if timeout is None else 1000 * timeout))


def run(command: list[str], timeout: float | None = None, **options: Any) -> Any:
    """Like `subprocess.run`."""
    if options.pop("capture_output", False):
        options |= {"stdout": PIPE, "stderr": PIPE}
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return CompletedProcess(command, process.returncode, output, errors)


@contextmanager
def in_place_of_subprocess(*modules: Any) -> Iterator[None]:
    """These modules of the package start their processes here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "subprocess", sys.modules[__name__])
        yield


def _server(number: int) -> socket.socket:
    """The connection to a server, started on first use. It ends with this process."""
    if number not in _servers:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (mine, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno())],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=DEVNULL,
            stdout=DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        _servers[number] = mine
    return _servers[number]


# The server ------------------------------------------------------------------------------------


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Returns a request in each forked process; None when no client is left."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the parents of jobs, below, need no wait
    while True:
        content, descriptors, _, _ = socket.recv_fds(control, _MOST_BYTES, 3)
        if not content:
            return None
        if os.fork() == 0:
            control.close()
            return _start(json.loads(content), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _start(request: dict[str, Any], answers: int, output: int, errors: int) -> dict[str, Any]:
    """Fork the job and return in it. Here, in its parent: tell its number and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    job = os.fork()
    if job:
        with socket.socket(fileno=answers) as connection:
            os.close(output)
            os.close(errors)
            connection.send(str(job).encode())
            _, status = os.waitpid(job, 0)
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    os.close(answers)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.close(output)
    os.close(errors)
    return request


def _become(request: dict[str, Any]) -> None:
    """Run the program of a request as this process's main program."""
    if request["session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    words = request["words"]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def _main(control: socket.socket) -> None:
    from nemotron_train.platform import device

    device.prepare(1)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    request = _serve(control)
    if request is not None:
        _become(request)


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
