"""The lock of a run folder: at most one process trains in it.

Owns: the file `.lock` of a run folder. Does not own: the other files of the folder. No torch.

The process holds an flock(2) on `.lock` until it ends. The file contains one JSON object: host,
pid, job (Slurm job id, if any), epoch, time, token, released. The rules:

1. The flock is taken: the holder is alive, on this host or on another host that shares the file
   system's locks. `acquire` refuses and names the holder.
2. The flock is free: the recorded holder is gone. `acquire` takes over with the next epoch.
3. The file system has no locks: the record decides. A holder is gone if it released the folder, if
   its pid no longer runs on this host, or if it is an earlier start of the same Slurm job (a job
   runs once at a time). Any other holder is assumed to be alive; the error names the file to
   remove.

The kernel does not release the lock of a process that is stopped or disconnected. An operator can
do it by removing `.lock`; the next process then writes a new record. A holder therefore calls
`check_held` before it makes a checkpoint visible. If the token in the file differs or is missing,
the process has lost the folder and must not write to it again.
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
from nemotron_train.config.json_text import json_text

LOCK = ".lock"
MAX_BYTES = 4096  # of the record; a longer one is not valid


class LostRunFolder(RuntimeError):
    """Another process has taken over the run folder; this process must not write to it again."""


@dataclass
class RunLock:
    """The lock on a run folder that this process holds.

    took_over: describes the previous holder if it did not release the folder, else "".
    """

    path: Path
    epoch: int
    took_over: str
    _token: str
    _file: IO[str] | None = field(repr=False)  # None: the file system has no locks

    def check_held(self) -> None:
        """Raise LostRunFolder if another process has taken over. Costs one small read."""
        current = _read(self.path)
        if current.get("token") != self._token:
            raise LostRunFolder(
                f"{self.path.parent} was taken over by {_holder_text(current)} while this process "
                f"(epoch {self.epoch}) stood still; nothing more is written by it"
            )

    def release(self) -> None:
        """Release the folder. If the process just ends, the record stays marked as not released."""
        if _read(self.path).get("token") == self._token:
            _write(self.path, {**_read(self.path), "released": True})
        if self._file is not None:
            self._file.close()


def acquire(folder: Path) -> RunLock:
    """Lock the run folder for this process.

    Raises ConfigError, which names the holder, if another process has it. Raises OSError if the
    lock file cannot be opened; symbolic links are not followed.
    """
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    file: IO[str] | None = os.fdopen(descriptor, "r+", encoding="utf-8")
    before = _read(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"{folder}: another process is training in this run folder: {_holder_text(before)}; "
            "wait for it, stop it, or give another name=..."
        ) from None
    except OSError:  # a file system without locks
        file.close()
        file = None
        if _may_be_alive(before):
            raise ConfigError(
                f"{folder}: another process may be training in this run folder: "
                f"{_holder_text(before)}; this file system has no locks, so if it is gone, remove "
                f"{path}"
            ) from None
    before = _read(path)  # again: the holder may have changed before the lock was taken
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
    is_unreleased = bool(before) and before.get("released") is not True
    return RunLock(path, epoch, _holder_text(before) if is_unreleased else "", token, file)


def _may_be_alive(record: Mapping[str, Any]) -> bool:
    """Rule 3: whether the process of `record` must be assumed to be alive."""
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


def _holder_text(record: Mapping[str, Any]) -> str:
    """Description of the process of a record, for messages."""
    if not record:
        return "a process that left no name"
    job = f", job {record['job']}" if record.get("job") else ""
    return (
        f"process {record.get('pid', '?')} on {record.get('host', '?')}{job}, since "
        f"{record.get('time', '?')} (epoch {record.get('epoch', '?')})"
    )


def _number(record: Mapping[str, Any], name: str) -> int:
    """An integer field of the record; 0 if it is missing or no integer."""
    value = record.get(name, 0)
    return value if type(value) is int else 0


def _read(path: Path) -> dict[str, Any]:
    """The record in the lock file; {} if it is missing or not valid."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            loaded = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record in place. After a rename, the flock would be on the old, unlinked file."""
    text = json_text(record) + "\n"
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.truncate(0)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
