"""A lock between processes: only one of them may build a folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nemotron_train.config.errors import ConfigError


@contextmanager
def exclusive(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file `.NAME.lock` beside `folder`. The kernel releases it if the process dies;
    the next holder takes over the file that then remains.

    wait: block until the lock is free; otherwise raise ConfigError if another process holds it.
    Also raises ConfigError if the lock file cannot be created. At the end, removes the file and the
    parents of `folder` that it had to create, if they are still empty.
    """
    parents = [folder.parent, *folder.parent.parents]
    created = [parent for parent in parents if not os.path.lexists(parent)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = _locked(folder.parent / f".{folder.name}.lock", wait)
    except BlockingIOError:
        raise ConfigError(f"{folder}: another process is at work in this folder") from None
    except OSError as error:
        _remove_empty(created)
        raise ConfigError(f"{folder}: cannot be made there ({error.strerror})") from None
    with stream:
        try:
            yield
        finally:
            Path(stream.name).unlink(missing_ok=True)
            _remove_empty(created)


def _locked(path: Path, wait: bool) -> IO[str]:
    """The opened and locked file `path`. Raises OSError, BlockingIOError if another process has it.

    The holder removes the file while it has the lock. Whoever waited then has a lock on a file
    without a name, which protects nothing, and tries again.
    """
    while True:
        stream = path.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return stream
        except FileNotFoundError:
            pass
        except BaseException:
            stream.close()
            raise
        stream.close()


def _remove_empty(folders: list[Path]) -> None:
    """Remove these folders, the innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
