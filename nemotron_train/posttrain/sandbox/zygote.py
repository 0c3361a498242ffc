"""The sandbox's own process: forks one fresh child for each check. Standard library only.

    parent ── zygote ── keeper (one a check, trusted) ── code (pid 1 of its namespaces)

The zygote is an interpreter with an empty environment that has read nothing: a fork of it costs a
few milliseconds where a new interpreter costs tens. It never reads a job. The keeper does, sets up
the namespaces, and watches from outside: the wall clock, the amount of output, the end. When it
kills pid 1, the kernel kills everything in the namespace.
"""

import contextlib
import json
import math
import os
import select
import signal
import socket
import time
from typing import Any

from nemotron_train.config.json_text import json_text
from nemotron_train.posttrain.sandbox import namespaces
from nemotron_train.posttrain.sandbox.run_code import flush, run_code, write_frame

_SETUP_SECONDS = 30.0  # for namespaces and mounts on a machine under load
_MAX_JOB_BYTES = 64 << 20
_RESULT = 3  # the descriptor that the code's process writes its frame to


def serve(control: int) -> None:
    """Fork a keeper for each connection that arrives on the socket `control`, until it closes."""
    server = socket.socket(fileno=control)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the keepers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    while True:
        message, files, _, _ = socket.recv_fds(server, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            server.close()
            status = 1
            with contextlib.suppress(BaseException):
                _keep(socket.socket(fileno=files[0]))
                status = 0
            os._exit(status)
        for file in files:
            os.close(file)


def _keep(connection: socket.socket) -> None:
    """Run one job of a connection and answer on it."""
    namespaces.die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    job = _read_job(connection)
    signal.setitimer(signal.ITIMER_REAL, _SETUP_SECONDS + job["limits"]["wall_seconds"] + 10)
    try:
        report = _run(job)
    except OSError as error:
        report = {"ended": "setup", "message": str(error)}
    connection.sendall(json_text(report).encode())
    connection.shutdown(socket.SHUT_WR)


def _read_job(connection: socket.socket) -> dict[str, Any]:
    """The job: everything until the parent shuts its side."""
    parts, size = [], 0
    while part := connection.recv(1 << 16):
        size += len(part)
        if size > _MAX_JOB_BYTES:
            raise ValueError("the job is too large")
        parts.append(part)
    return json.loads(b"".join(parts))


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Start the code's process and watch it to its end. Raises OSError if it cannot be set up."""
    isolated, limits = job["isolated"], job["limits"]
    proc, as_root = namespaces.open_proc(), namespaces.is_root_of_machine()
    null = os.open("/dev/null", os.O_RDONLY)
    if isolated:
        namespaces.enter_namespaces(as_root)
        namespaces.change_root(job["library"], limits["file_bytes"])
    else:
        os.chdir(job["folder"])
    result, result_end = socket.socketpair()
    output, output_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _become_code(job, null, (proc, as_root), result_end.fileno(), output_end)
        finally:
            os._exit(1)
    for file in (null, output_end, proc):
        os.close(file)
    result_end.close()
    try:
        return _watch(child, result, output, limits)
    finally:
        _kill(child, isolated)


def _become_code(
    job: dict[str, Any], null: int, rights: tuple[int, bool], result: int, output: int
) -> None:
    """In the code's process: give up all rights, tell the keeper, run, report. rights: arguments of
    `namespaces.drop_rights`."""
    os.setsid()
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    try:
        if job["isolated"]:
            namespaces.drop_rights(*rights)
        namespaces.die_with_parent()
        namespaces.set_limits(job["limits"])
    except OSError as error:
        os.write(result, f"!{error}".encode()[:300])
        os._exit(1)
    os.write(result, b"r")
    if os.read(result, 1) != b"g":  # the keeper is gone
        os._exit(1)
    os.dup2(result, 63)
    os.dup2(63, _RESULT)
    os.closerange(_RESULT + 1, 4096)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.clear()
    pid = os.getpid()
    value = run_code(job["code"], job["function"], job["inputs"])
    flush()
    if os.getpid() == pid:  # not a fork that the code left behind
        write_frame(job["nonce"], value, _RESULT)
    os._exit(0)


def _watch(
    child: int, result: socket.socket, output: int, limits: dict[str, Any]
) -> dict[str, Any]:
    """Wait for the frame and the end of the code's process, within the limits."""
    result.settimeout(_SETUP_SECONDS)
    first = result.recv(301)
    if first != b"r":
        raise OSError(0, first[1:].decode(errors="replace") or "the process ended in its set-up")
    result.sendall(b"g")
    ended = os.pidfd_open(child)
    deadline = time.monotonic() + limits["wall_seconds"]
    frame, printed, files = bytearray(), 0, {result.fileno(), output, ended}
    for file in (result.fileno(), output):
        os.set_blocking(file, False)
    while True:
        seconds = deadline - time.monotonic()
        poll = select.poll()
        for file in files:
            poll.register(file, select.POLLIN)
        ready = [file for file, _ in poll.poll(max(0, math.ceil(1000 * seconds)))]
        if not ready and seconds <= 0:
            return {"ended": "timeout"}
        for file in ready:
            if file == ended and len(ready) > 1:
                continue  # first what it wrote
            if file == ended:
                end = _end_of(child, limits)
                return {"ended": "exit", "frame": frame.decode(errors="replace")} | end
            try:
                data = os.read(file, 1 << 16)
            except BlockingIOError:
                continue
            except ConnectionError:
                data = b""
            if not data:
                files.discard(file)
            elif file == output:
                printed += len(data)
            else:
                frame += data
        if printed > limits["output_bytes"] or len(frame) > limits["output_bytes"]:
            return {"ended": "output"}


def _end_of(child: int, limits: dict[str, Any]) -> dict[str, Any]:
    """How the ended process ended: its signal or 0, and whether its processor time was used up. The
    kernel counts for its limit by ticks, which may be far from the usage on a busy machine."""
    _, status, usage = os.wait4(child, 0)
    used = usage.ru_utime + usage.ru_stime
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"signal": number, "cpu_used_up": used > 0.5 * limits["cpu_seconds"]}


def _kill(child: int, isolated: bool) -> None:
    """End the code's process with all that it started, and reap it. Without namespaces, what left
    the process group gets away."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if not isolated:
            os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # reaped already
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
