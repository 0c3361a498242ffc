"""Runs nemotron-train in this process with injected faults: inject.py JSON VERB WORDS...

None of this is in the shipped code. It watches the interpreter's audit events (PEP 578), which
report every file opened, renamed and removed, and wraps functions by name. JSON is an object:

    kill      {"event": n, "delay": seconds}: sends SIGKILL to the whole process group, `delay`
              seconds after the n-th write event under a `checkpoints` folder
    count     path: when the process ends, writes the number of such events there
    signal    {"event": n, "number": s, "times": k}: sends itself the signal at that event
    at        {"function": "module:Class.name", "call": n, "signal": s}: sends itself a signal when
              that call begins
    import    {"module": name, "signal": s}: sends itself a signal when that module is imported
    error     {"event": n, "errno": e}: that write event fails, as on a broken disk
    file_size bytes: no file may grow past it (RLIMIT_FSIZE), as on a full disk
"""

import atexit
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}


def _path(arguments: tuple[Any, ...]) -> str:
    """The first path of an audit event, made absolute."""
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    folder = arguments[-1] if isinstance(arguments[-1], int) and arguments[-1] > 2 else None
    if path and not os.path.isabs(path) and folder is not None:
        try:
            return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        except OSError:
            return path
    return os.path.abspath(path) if path else ""


def _is_write(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        _, mode, flags = arguments
        writes = bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))
    else:
        writes = event in WRITES
    return writes and "/checkpoints/" in _path(arguments) + "/"


def watch_writes(reached: Callable[[int], None]) -> None:
    """Calls `reached(n)` before the n-th write event under a `checkpoints` folder."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if (event == "open" or event in WRITES) and _is_write(event, arguments):
            count += 1
            reached(count)

    sys.addaudithook(hook)


def kill_at(event: int, delay: float) -> None:
    """Sends SIGKILL to the process group, `delay` seconds after the write event."""

    def kill() -> None:
        time.sleep(delay)
        os.killpg(0, signal.SIGKILL)

    def reached(count: int) -> None:
        if count == event:
            if delay > 0:
                threading.Thread(target=kill, daemon=True).start()
            else:
                os.killpg(0, signal.SIGKILL)

    watch_writes(reached)


def signal_at(event: int, number: int, times: int = 1) -> None:
    def reached(count: int) -> None:
        if event <= count < event + times:
            os.kill(os.getpid(), number)

    watch_writes(reached)


def fail_at(event: int, errno: int) -> None:
    def reached(count: int) -> None:
        if count == event:
            raise OSError(errno, os.strerror(errno))

    watch_writes(reached)


def count_into(path: str) -> None:
    last = 0

    def reached(count: int) -> None:
        nonlocal last
        last = count

    watch_writes(reached)
    process = os.getpid()
    atexit.register(lambda: os.getpid() == process and Path(path).write_text(str(last)))


def at_call(function: str, call: int, number: int) -> None:
    """Sends the signal when the `call`-th call of `module:Class.name` begins."""
    module_name, _, path = function.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), 0

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    setattr(owner, name, wrapped)


def at_import(module: str, number: int) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import" and arguments[0] == module:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def inject(faults: dict[str, Any]) -> None:
    """Installs every fault of `faults`."""
    if "file_size" in faults:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = faults["file_size"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "kill" in faults:
        kill_at(**faults["kill"])
    if "error" in faults:
        fail_at(**faults["error"])
    if "count" in faults:
        count_into(faults["count"])
    if "signal" in faults:
        signal_at(**faults["signal"])
    if "import" in faults:
        at_import(faults["import"]["module"], faults["import"]["signal"])
    if "at" in faults:
        from nemotron_train.platform import device

        device.prepare()  # the wrapped function's module may import Megatron-Core
        at_call(faults["at"]["function"], faults["at"]["call"], faults["at"]["signal"])


if __name__ == "__main__":
    inject(json.loads(sys.argv[1]))
    from nemotron_train.cli.main import main

    sys.exit(main(sys.argv[2:]))
