"""Finds the input files of `data prepare`: every file is read or named with the reason.

Owns: which files are read, in which order, and in which format. Does not own: reading them
(readers.py).
"""

import glob
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from nemotron_train.config.errors import ConfigError

COMPRESSED = (".gz", ".zst")  # decompressed when read
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_ARCHIVES = (
    ".tar",
    ".tgz",
    ".tbz",
    ".tbz2",
    ".txz",
    ".tzst",
    ".zip",
    ".7z",
    ".rar",
    ".jar",
    ".whl",
)
_NOT_DECOMPRESSED = (".xz", ".bz2", ".lz4", ".z", ".lzma", ".br", ".sz", ".snappy", ".lzo", ".zz")


class InputFormat(StrEnum):
    """The format of the input."""

    by_name = "by_name"  # .jsonl .ndjson .json, .parquet; any other file is text
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    dataset = "dataset"  # a Hugging Face `datasets` name or local path, streamed


@dataclass(frozen=True)
class InputFile:
    """An input file and its state when it was listed."""

    path: Path
    format: InputFormat  # text, jsonl or parquet
    size: int  # bytes
    modified: int  # ns; a preparation must not continue if it changed


class LeftOut(NamedTuple):
    """A file or folder under the input that is not read, and why."""

    path: Path
    reason: str


class Found(NamedTuple):
    """The files of an input, sorted by path, and what else was found there."""

    files: list[InputFile]
    left_out: list[LeftOut]


def find_inputs(where: str, input_format: InputFormat) -> Found:
    """The files of a path, folder or glob pattern.

    In a folder, left out by name are hidden files and folders, archives and files with a
    compression that is not read, links to folders, links to nothing, second links to one file,
    folders that cannot be listed, and what is no file (a pipe, a socket).

    Raises ConfigError, naming the first file left out, if no file remains, or if one that `where`
    names itself is left out.
    """
    if not where:
        raise ConfigError("input=: empty; give a file, a folder or a pattern")
    try:
        root = Path(where)
        is_folder, is_named = root.is_dir(), os.path.lexists(root)
        entries = list(_walk(root) if is_folder else _matches(root, where, is_named))
        found = _sorted_out(entries, input_format)
    except OSError as error:
        raise ConfigError(f"input={where}: cannot be read ({error.strerror})") from None
    if is_named and not is_folder and found.left_out:
        raise ConfigError(f"input={where}: {found.left_out[0].reason}")
    if not found.files and found.left_out:
        first = found.left_out[0]
        raise ConfigError(
            f"input={where}: holds no file that is read; {len(found.left_out)} left out, such as "
            f"{first.path}: {first.reason}"
        )
    if not found.files:
        raise ConfigError(
            f"input={where}: no file, folder or pattern with files; for a Hugging Face data set "
            "set format=dataset"
        )
    return found


def _matches(root: Path, where: str, is_named: bool) -> Iterator[Path | LeftOut]:
    """The path itself, or the files that match the pattern."""
    if is_named:
        yield root
        return
    for text in glob.glob(where, recursive=True):
        path = Path(text)
        if not path.is_dir():
            yield path
        elif "**" not in where:  # which matches folders only in order to descend into them
            yield LeftOut(path, "a folder; a pattern names files")


def _walk(folder: Path) -> Iterator[Path | LeftOut]:
    """Everything below a folder: what may be read, and what cannot."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield LeftOut(folder, f"a folder that cannot be listed ({error.strerror})")
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            yield LeftOut(path, "hidden")
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(path)
        else:
            yield path


def _sorted_out(entries: list[Path | LeftOut], input_format: InputFormat) -> Found:
    """The entries that are files which can be read, and the others with a reason."""
    files: list[InputFile] = []
    left_out = [entry for entry in entries if isinstance(entry, LeftOut)]
    seen: dict[tuple[int, int], Path] = {}
    paths = sorted(
        (entry for entry in entries if not isinstance(entry, LeftOut)),
        # A file before links to it, and before itself by way of a link to a folder (a pattern with
        # ** descends into these, and one that leads up gives every file 40 times).
        key=lambda path: (path.is_symlink(), len(path.parts), path.as_posix()),
    )
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            reason = f"a link to {os.readlink(path)}: " if path.is_symlink() else ""
            left_out.append(LeftOut(path, f"{reason}cannot be read ({error.strerror})"))
            continue
        identity = status.st_dev, status.st_ino
        if reason := _not_read(path, status, seen.get(identity)):
            left_out.append(LeftOut(path, reason))
            continue
        seen.setdefault(identity, path)
        file_format = _format_of(path) if input_format == InputFormat.by_name else input_format
        files.append(InputFile(path, file_format, status.st_size, status.st_mtime_ns))
    return Found(
        sorted(files, key=lambda file: file.path.as_posix()),
        sorted(left_out, key=lambda entry: entry.path.as_posix()),
    )


def _not_read(path: Path, status: os.stat_result, same: Path | None) -> str:
    """Why a path is not read; "" if it is."""
    if stat.S_ISDIR(status.st_mode):
        return "a link to a folder; give that folder as input of its own"
    if not stat.S_ISREG(status.st_mode):
        return "no plain file"
    if same is not None and os.path.realpath(path) == os.path.realpath(same):
        return f"a link to {same}, which is read"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    outer = suffixes[:-1] if suffixes[-1:] and suffixes[-1] in COMPRESSED else suffixes
    if outer and outer[-1] in _ARCHIVES:
        return f"an archive ({outer[-1]}); unpack it"
    if suffixes and suffixes[-1] in _NOT_DECOMPRESSED:
        return f"compression {suffixes[-1]} is not read; decompress it, or compress it as .zst"
    return ""


def _format_of(path: Path) -> InputFormat:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    last = suffixes[-1] if suffixes else ""
    if last in _JSON_LINES:
        return InputFormat.jsonl
    return InputFormat.parquet if last == ".parquet" else InputFormat.text
