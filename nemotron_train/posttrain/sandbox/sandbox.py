"""Runs functions that a model wrote and returns what they returned, or how they ended.

Each call runs in a fresh process in its own user, network, pid, mount and ipc namespaces, with a
root in which nothing of the machine has a name but the standard library and the shared libraries,
read-only; with an empty environment; under limits of time, memory, processes, files and output.
The expected values never enter: inputs go in, outputs come out. Linux only.

Not covered: faults of the kernel itself, and what two runs on one machine learn from its load.
"""

import contextlib
import dataclasses
import json
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nemotron_train.config.environments import Isolation
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.posttrain.sandbox.verdict import Verdict

_GRACE_SECONDS = 45.0  # for the sandbox's own set-up and end, on a machine under load
_MAX_REPORT_BYTES = 4 << 20
_START = "import sys; sys.path.insert(0, {root!r}); "
_START += "from nemotron_train.posttrain.sandbox.zygote import serve; del sys.path[0]; serve({fd})"


@dataclass(frozen=True)
class Limits:
    """What one call may use."""

    cpu_seconds: int = 1  # of each process
    wall_seconds: float = 5.0
    memory_bytes: int = 256 << 20  # address space of each process
    output_bytes: int = 256 << 10  # printed, and of the values returned
    processes: int = 8  # threads count
    file_bytes: int = 8 << 20  # of one file, and of all together


@dataclass(frozen=True)
class Result:
    """verdict: `passed` says that the function returned a value for each input, and no more.
    outputs: these values, if it is `passed`. message: one line on any other verdict."""

    verdict: Verdict
    outputs: list[Any] = dataclasses.field(default_factory=list)
    message: str = ""


class Sandbox:
    """A place to run code. Calls from several threads run side by side. Close it after use.

    Raises ConfigError at construction if the machine gives no isolation and `isolation` does not
    say that the risk is accepted.
    """

    def __init__(
        self, isolation: Isolation = Isolation.namespaces, limits: Limits | None = None
    ) -> None:
        self.limits = limits or Limits()
        self._isolated = isolation == Isolation.namespaces
        self._lock = threading.Lock()
        self._control, self._process = _start_zygote()
        try:
            self._probe()
        except BaseException:
            self.close()
            raise

    def call(self, code: str, function: str, inputs: Sequence[Sequence[Any]]) -> Result:
        """Define `function` by `code` and call it with each argument list of `inputs`, in one fresh
        process. Never raises for what the code does."""
        nonce = secrets.token_hex(16)
        job = {"code": code, "function": function, "inputs": inputs, "nonce": nonce}
        job |= {"isolated": self._isolated, "limits": dataclasses.asdict(self.limits)}
        job["library"] = sysconfig.get_path("stdlib")
        try:
            with self._working_folder() as job["folder"]:
                report = self._exchange(json_text(job).encode())
        except (OSError, ValueError, RecursionError) as error:
            return Result(Verdict.error, message=f"the sandbox did not answer ({error})")
        return _result(report, nonce, len(inputs))

    def close(self) -> None:
        """End the sandbox's process and everything that still runs in it."""
        self._control.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _working_folder(self) -> contextlib.AbstractContextManager[str]:
        """A folder for code without isolation; with it, each check mounts its own."""
        if self._isolated:
            return contextlib.nullcontext("")
        return tempfile.TemporaryDirectory(prefix="sandbox_", ignore_cleanup_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _exchange(self, job: bytes) -> dict[str, Any]:
        """Send a job to a keeper of its own and return the keeper's report."""
        ours, theirs = socket.socketpair()
        deadline = time.monotonic() + self.limits.wall_seconds + _GRACE_SECONDS
        with ours:
            with theirs, self._lock:
                if self._process.poll() is not None:  # someone killed it; the next call works again
                    self._control.close()
                    self._control, self._process = _start_zygote()
                socket.send_fds(self._control, [b"j"], [theirs.fileno()])
            ours.settimeout(_GRACE_SECONDS)
            ours.sendall(job)
            ours.shutdown(socket.SHUT_WR)
            parts, size = [], 0
            while True:
                ours.settimeout(max(0.01, deadline - time.monotonic()))
                part = ours.recv(1 << 16)
                if not part:
                    return json.loads(b"".join(parts))
                parts.append(part)
                size += len(part)
                if size > _MAX_REPORT_BYTES:
                    raise ValueError("a report of too many bytes")

    def _probe(self) -> None:
        """Check that code runs, and that it is where it should be. Raises ConfigError."""
        code = "import os\ndef f():\n    return [os.getpid(), sorted(os.listdir('/'))]"
        result = self.call(code, "f", [[]])
        if result.verdict is Verdict.passed and self._isolated:
            pid, names = result.outputs[0]
            if pid != 1 or {"proc", "etc"} & set(names):
                result = Result(Verdict.error, message="the code saw the machine")
        if result.verdict is not Verdict.passed:
            raise ConfigError(
                f"sandbox=namespaces: this machine cannot isolate code ({result.message}). Allow "
                "unprivileged user namespaces, or accept that code of the model may read, write "
                f"and send anything with sandbox={Isolation.none_i_accept_the_risk}"
            )


def _start_zygote() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The zygote and the socket to it. It ends when the socket closes."""
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).resolve().parents[3])
    with theirs:
        command = [sys.executable, "-I", "-S", "-B", "-c"]
        process = subprocess.Popen(
            [*command, _START.format(root=root, fd=theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={"LC_ALL": "C.UTF-8"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return ours, process


def _result(report: dict[str, Any], nonce: str, num_inputs: int) -> Result:
    """The result that a keeper's report says."""
    ended, frame = report["ended"], report.get("frame", "")
    if ended == "setup":
        return Result(Verdict.error, message=report["message"])
    if ended == "timeout":
        return Result(Verdict.timeout, message="the wall clock ran out")
    if ended == "output":
        return Result(Verdict.output, message="more output than allowed")
    if not frame.startswith(nonce):
        if report["signal"] == signal.SIGKILL and report.get("cpu_used_up"):
            return Result(Verdict.timeout, message="the processor time ran out")
        how = f"by signal {report['signal']}" if report["signal"] else "without a result"
        return Result(Verdict.killed, message=f"the process ended {how}")
    try:
        value = json.loads(frame[len(nonce) :])
        if "error" in value:
            verdict = Verdict.memory if value["memory"] is True else Verdict.error
            return Result(verdict, message=str(value["error"])[:200])
        outputs = json.loads(value["outputs"])
        if type(outputs) is not list or len(outputs) != num_inputs:
            raise ValueError("not one value for each input")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return Result(Verdict.error, message=f"a result that cannot be read ({error})"[:200])
    return Result(Verdict.passed, outputs)
