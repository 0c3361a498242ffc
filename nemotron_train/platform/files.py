"""Durable and atomic writes, and digests of files. No torch.

A reader, or a crash, sees the old content of a file or the new one, never a part.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nemotron_train.config.errors import ConfigError


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


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a small file in place and flush it to disk. Text is UTF-8."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    flush_to_disk(path)


def check_output(path: Path, knob: str) -> None:
    """Raises ConfigError if no file can be written at `path`: no such folder, a folder in its
    place, no permission. Verbs ask before the work, which may take hours. knob: the option."""
    if path.is_dir():
        raise ConfigError(f"{knob}={path}: is a folder; give the name of a file")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"{knob}={path}: there is no folder {folder}; make it first")
    target = path if path.exists() else folder
    if not os.access(target, os.W_OK):
        raise ConfigError(f"{knob}={path}: {target} cannot be written (no permission)")


def check_output_folder(path: Path, knob: str, sources: Iterable[Path] = ()) -> None:
    """Raises ConfigError if no folder can be made at `path`: below a file, without permission, or
    inside one of the `sources`, which are read. What exists is not refused. knob: the option."""
    if os.path.lexists(path):
        return
    place = Path(os.path.realpath(path))
    for source in sources:
        if place.is_relative_to(os.path.realpath(source)):
            raise ConfigError(f"{knob} {path}: lies in {source}, which is read; give another")
    above = next(folder for folder in place.parents if os.path.lexists(folder))
    if not os.path.isdir(above):
        raise ConfigError(f"{knob} {path}: {above} is no folder; give another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{knob} {path}: {above} cannot be written (no permission)")


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error in the chain of causes, if there is one. For a full disk, torch
    raises an error about a position in its archive, whose cause is the OSError."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def write_output(path: Path, text: str, knob: str) -> None:
    """Write a result atomically. Raises ConfigError where that fails, the disk full, say."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ConfigError(f"{knob}={path}: cannot be written ({error.strerror})") from None


@contextmanager
def writing(
    folder: Path, knob: str, needed: Callable[[], int] = lambda: 0, then: str = ""
) -> Iterator[None]:
    """Raises ConfigError, one line with the free space, where writing in `folder` fails in the
    block: disk full, quota, file size limit, read-only, broken disk.

    needed: bytes that were still to be written, estimated; 0 if unknown. then: what helps.
    """
    try:
        yield
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        reason = f"{error.strerror or error}{where}"
        raise ConfigError(
            f"{knob}={folder}: cannot be written: {reason}; {_room(folder, needed())}{then}"
        ) from error


def _room(folder: Path, needed: int) -> str:
    """How much is free on the disk of a folder, which may not exist, and how much is needed."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    text = f"{shutil.disk_usage(existing).free:,} bytes are free there"
    return text + (f", about {needed:,} more are needed" if needed else "")


def text_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, without a byte order mark. Only line feeds and carriage returns
    end a line: U+2028, U+0085 and form feeds are text. Raises OSError or UnicodeDecodeError."""
    text = path.read_text(encoding="utf-8-sig")  # universal newlines: CR LF and CR become LF
    return text.removesuffix("\n").split("\n") if text else []


def heal_last_line(path: Path) -> None:
    """End an incomplete last line of a line file, which a full disk or a crash has left. The next
    line then stands alone, and readers skip the incomplete one. No file: nothing to do."""
    try:
        with open(path, "rb+") as file:
            if file.seek(0, os.SEEK_END) and not _ends_a_line(file):
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
    except FileNotFoundError:
        pass


def _ends_a_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def append_line(path: Path, line: str) -> None:
    """Append one line to a line file, durably, after healing an incomplete last line."""
    heal_last_line(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def file_sha256(path: Path, *, flush: bool = False, follow_links: bool = True) -> str:
    """SHA-256 of a file, hexadecimal. flush: its content is on disk on return. Raises OSError, also
    for a symbolic link unless `follow_links`."""
    flags = os.O_RDONLY | os.O_NONBLOCK  # a FIFO must not block
    descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        if flush:
            os.fsync(descriptor)
        return hashlib.file_digest(file, "sha256").hexdigest()
