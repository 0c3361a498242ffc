"""One process a run folder: who holds it, when a holder is gone, and how a late one is shut out.

Owns: the file `.lock` of a run folder. Does not own: what is done in the folder. No torch.

`.lock` is locked with flock(2) for as long as the process lives and holds one JSON object: host,
pid, job (Slurm's, if any), epoch, time, token, released. The rules:

1. flock taken: the holder lives, on this host or on another one that shares the file system's
   locks. Refused; the message says who it is.
2. flock free: whoever is named is gone. Taken over, with the next epoch.
3. The file system has no locks: the record decides. A holder that released it is gone; so is one
   of this host whose pid no longer runs, and an earlier start of the same Slurm job (a job runs
   once at a time). Any other is taken for alive, and the message says which file to remove.

The kernel cannot take a lock from a process that is stopped or cut off, only an operator can, by
removing `.lock`. The next process then writes a record of its own. A holder therefore asks
`check_held` before it makes a checkpoint visible: with another token in the file, or none, it has
lost the folder and must not write again.
"""

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from nemotron_train.config.errors import ConfigError

LOCK = ".lock"
MAX_BYTES = 4096  # of the record: what is longer is none


class LostRunFolder(RuntimeError):
    """Another process took over the run folder; this one must write nothing more into it."""


@dataclass
class RunLock:
    """A held run folder. `took_over`: who left it without releasing it, in words; "" for nobody."""

    path: Path
    epoch: int
    took_over: str
    _token: str
    _file: IO[str] | None = field(repr=False)  # None: the file system has no locks

    def check_held(self) -> None:
        """Raises LostRunFolder if another process took the folder over. Costs one small read."""
        now = _read(self.path)
        if now.get("token") != self._token:
            raise LostRunFolder(
                f"{self.path.parent} was taken over by {_who(now)} while this process (epoch "
                f"{self.epoch}) stood still; nothing more is written by it"
            )

    def release(self) -> None:
        """Lets another process in; the end of this one does it too, but leaves its name."""
        if _read(self.path).get("token") == self._token:
            _write(self.path, {**_read(self.path), "released": True})
        if self._file is not None:
            self._file.close()


def acquire(folder: Path) -> RunLock:
    """Takes the run folder for this process. Raises ConfigError naming the one that has it, and
    OSError where the lock file cannot be opened; a symbolic link in its place is not followed."""
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    file: IO[str] | None = os.fdopen(descriptor, "r+", encoding="utf-8")
    before = _read(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"{folder}: another process is training in this run folder: {_who(before)}; wait for "
            "it, stop it, or give another name=..."
        ) from None
    except OSError:  # a file system without locks
        file.close()
        file = None
        if _may_be_alive(before):
            raise ConfigError(
                f"{folder}: another process may be training in this run folder: {_who(before)}; "
                f"this file system has no locks, so if it is gone, remove {path}"
            ) from None
    before = _read(path)
    epoch, token = _number(before, "epoch") + 1, uuid.uuid4().hex
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "epoch": epoch,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": token,
        "released": False,
    }
    _write(path, record)
    left = bool(before) and before.get("released") is not True
    return RunLock(path, epoch, _who(before) if left else "", token, file)


def _may_be_alive(record: Mapping[str, Any]) -> bool:
    """Rule 3: whether the process of `record` must be taken for alive."""
    if not record or record.get("released") is True:
        return False
    job = os.environ.get("SLURM_JOB_ID", "")
    if job and record.get("job") == job:
        return False
    if record.get("host") != socket.gethostname():
        return True
    pid = _number(record, "pid")
    if pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _who(record: Mapping[str, Any]) -> str:
    """The process of a record in words."""
    if not record:
        return "a process that left no name"
    job = f", job {record['job']}" if record.get("job") else ""
    return (
        f"process {record.get('pid', '?')} on {record.get('host', '?')}{job}, since "
        f"{record.get('time', '?')} (epoch {record.get('epoch', '?')})"
    )


def _number(record: Mapping[str, Any], name: str) -> int:
    value = record.get(name, 0)
    return value if type(value) is int else 0


def _read(path: Path) -> dict[str, Any]:
    """The record; {} where there is none that can be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            loaded = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """In place: a rename would leave the lock on a file that is no longer there."""
    text = json.dumps(record) + "\n"
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.truncate(0)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
