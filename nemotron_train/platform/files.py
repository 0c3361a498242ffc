"""Durable and atomic writes, and digests of files. No torch.

A reader, or a crash, sees the old content of a file or the new one, never a part.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder: its contents (a folder's: the names in it) then survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, with the same suffix. The file written there replaces `path`
    when the block ends, and is removed if the block raises. durable: flush it to disk first."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if durable:
            flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file atomically and durably."""
    with replacing(path, durable=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_durably(path: Path, text: str) -> None:
    """Write a text file in place and flush it to disk."""
    path.write_text(text, encoding="utf-8")
    flush_to_disk(path)


def file_sha256(path: Path, *, flush: bool = False, follow_links: bool = True) -> str:
    """SHA-256 of a file, hexadecimal. flush: its content is on disk on return. Raises OSError, also
    for a symbolic link unless `follow_links`."""
    flags = os.O_RDONLY | os.O_NONBLOCK  # a FIFO must not block
    descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        if flush:
            os.fsync(descriptor)
        return hashlib.file_digest(file, "sha256").hexdigest()
