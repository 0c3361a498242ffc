"""A lock between processes: only one of them may build a data folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotron_train.config.errors import ConfigError


@contextmanager
def exclusive(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file `.NAME.lock` beside `folder`. The kernel releases it if the process dies.

    wait: block until the lock is free; otherwise raise ConfigError if another process holds it.
    Also raises ConfigError if the lock file cannot be created. The empty lock file is not removed:
    removing it would let two processes lock different files.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made there ({error.strerror})") from None
    with lock as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process is at work in this folder") from None
        yield
