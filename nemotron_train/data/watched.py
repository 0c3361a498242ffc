"""Files that a run reads for days: read by position, and watched for changes.

Owns: reading pieces of one open file, its mark, and the check that the file at the path is still
the one that was opened. Does not own: what the pieces mean (indexed.py).

Nothing is memory-mapped. If another process shortens a mapped file, the kernel ends the reader with
a bus error and no message. A read by position returns fewer bytes, which is an error with a name.
Cost on one core of a CPU machine: docs/data.md.
"""

import hashlib
import os
import stat
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.platform.files import file_sha256

MARK_BYTES = 4096  # at each end of a file


class Stamp(NamedTuple):
    """What one `stat` call says about a file. Any write, truncation or replacement changes it: a
    program can set a file's modification time back, but not the time of its last change."""

    device: int
    inode: int
    size: int
    changed_ns: int


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp in the result of a `stat` call."""
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)


def file_mark(path: Path) -> str:
    """First half of the SHA-256 of a file's first and last 4096 bytes, hexadecimal. It costs two
    reads for a file of any size."""
    return WatchedFile(path).mark()


class WatchedFile:
    """One open file: reads by position, and its stamp when it was opened.

    Raises ConfigError, naming the file, if it is missing, no plain file, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        try:
            # O_NONBLOCK: a FIFO in the file's place must not block.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path}: this shard file is missing; prepare the data again"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be opened ({error.strerror})") from None
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{self.path}: is no file; prepare the data again")
        self.stamp = stamp_of(status)

    @property
    def size(self) -> int:
        """Bytes, when the file was opened."""
        return self.stamp.size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. Raises ConfigError if the file ends before them."""
        pieces, missing = [], size
        try:
            while missing:
                piece = os.pread(self._descriptor, missing, offset + size - missing)
                if not piece:
                    raise ConfigError(
                        f"{self.path}: ends at byte {offset + size - missing:,}, and had "
                        f"{self.size:,} bytes when it was opened: cut off while it was read; "
                        "put it back or prepare the data again"
                    )
                if len(piece) == size:
                    return piece
                pieces.append(piece)  # one call returns at most 2 GiB
                missing -= len(piece)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror})") from None
        return b"".join(pieces)

    def array(self, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
        """`count` numbers from byte `offset`, read-only: [count]. Raises ConfigError as `read`."""
        return np.frombuffer(self.read(offset, count * dtype.itemsize), dtype=dtype)

    def mark(self) -> str:
        """As `file_mark`."""
        length = min(MARK_BYTES, self.size)
        ends = self.read(0, length) + self.read(self.size - length, length)
        return hashlib.sha256(ends).hexdigest()[:32]

    def check_mark(self, expected: str) -> None:
        """Raises ConfigError unless `expected`, the mark in a manifest, is this file's. "" is the
        mark in manifests of older versions: nothing is known then."""
        if expected and self.mark() != expected:
            raise ConfigError(
                f"{self.path}: its checksum (of the first and last {MARK_BYTES} bytes) is not the "
                "manifest's; damaged or exchanged; put it back or prepare the data again"
            )

    def check_unchanged(self, sha256: str) -> None:
        """Raises ConfigError if the file at the path is not the one that was opened: it is removed
        or has another size or content.

        Costs one `stat`. Only if that differs is the whole file read and compared with `sha256`, so
        a change of permissions or a copy put back costs one reading, and the run goes on.
        """
        try:
            now = stamp_of(os.stat(self.path))
            if now == self.stamp:
                return
            if now.size != self.size:
                raise ConfigError(
                    f"{self.path}: holds {now.size:,} bytes, and held {self.size:,} when this run "
                    "opened it; put it back and run the same command again"
                )
            self.check_content(sha256)
            self._close()
            self._open()
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path}: was removed while this run reads it; put it back and run the same "
                "command again"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror})") from None

    def check_content(self, sha256: str) -> None:
        """Raises ConfigError unless the file at the path has this SHA-256. Reads all of it."""
        actual = file_sha256(self.path)
        if actual != sha256:
            raise ConfigError(
                f"{self.path}: its checksum is not the manifest's (SHA-256 {actual[:16]}, not "
                f"{sha256[:16]}); damaged or exchanged; put it back or prepare the data again"
            )
