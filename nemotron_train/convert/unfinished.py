"""A folder that is built file by file next to its destination and moved there when complete.

Owns: which finished files a killed process leaves for the next one, the final rename, and what is
removed after an error. Does not own: the content of the files.

    DIR/.NAME.partial/           the files while they are written
    DIR/.NAME.conversion.jsonl   the source, then a line for every finished file with its digest
    DIR/.NAME.lock               held by the process that builds
    DIR/NAME                     absent, or complete

The record lies beside the folder, so that nothing in the folder has to be removed before or after
the rename. A line is appended to it, so there is no temporary file. The digests find torn files.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.platform.files import (
    append_line,
    check_output_folder,
    file_sha256,
    flush_to_disk,
    system_error,
)
from nemotron_train.platform.lock import exclusive


class Unfinished:
    """A folder under construction. `folder`: where files are written until `finish`; `final`: its
    destination."""

    def __init__(self, final: Path, source: Mapping[str, Any]) -> None:
        self.final, self._source = final, json.loads(json_text(source))
        self.folder = final.with_name(f".{final.name}.partial")
        self._record = final.with_name(f".{final.name}.conversion.jsonl")
        self._done: dict[str, dict[str, Any]] = {}

    def kept(self, name: str) -> Any | None:
        """The note stored with the finished file `name`; None if the file must be written."""
        entry = self._done.get(name)
        return None if entry is None else entry["note"]

    def digest(self, name: str) -> str:
        """SHA-256 of a finished file."""
        return self._done[name]["sha256"]

    def done(self, name: str, sha256: str, note: Any = True) -> None:
        """Records that the file `name` is complete and flushed to disk. `note`: any JSON value but
        null."""
        self._done[name] = {"sha256": sha256, "note": note}
        append_line(self._record, json_text({"name": name, **self._done[name]}))

    def finish(self) -> None:
        """Flushes everything to disk and moves the folder to its destination."""
        for path in self.folder.rglob("*"):
            flush_to_disk(path)
        flush_to_disk(self.folder)
        self.folder.rename(self.final)
        flush_to_disk(self.final.parent)
        self._record.unlink()

    def remove(self) -> None:
        """Removes everything but the destination, as far as the system lets us."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._record.unlink()

    def begin(self) -> None:
        """Keeps the intact files of a killed process with the same source, removes all others."""
        lines = self._read_record()
        is_same = bool(lines) and lines[0] == {"source": self._source}
        if not (is_same and self.folder.is_dir()):
            self.remove()
            self.folder.mkdir()
            self._record.write_text(json_text({"source": self._source}) + "\n", encoding="utf-8")
            flush_to_disk(self._record)
            return
        for line in lines[1:]:
            path = self.folder / line["name"]
            with contextlib.suppress(OSError):  # missing, or no plain file
                if file_sha256(path, follow_links=False) == line["sha256"]:
                    self._done[line["name"]] = {"sha256": line["sha256"], "note": line["note"]}
        kept = {self.folder / name for name in self._done}
        for path in sorted(self.folder.rglob("*"), reverse=True):  # a folder after its content
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # it holds a file that is kept
                    path.rmdir()
            elif path not in kept:
                path.unlink()

    def _read_record(self) -> list[dict[str, Any]]:
        """The lines of the record, without the last if it is torn; [] if there is none."""
        try:
            lines = self._record.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return []
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries


@contextmanager
def unfinished(
    final: Path, source: Mapping[str, Any], knob: str, is_complete: Callable[[], bool]
) -> Iterator[Unfinished | None]:
    """Context manager that builds the folder `final`. `source`: plain values that identify its
    input. `is_complete`: whether the folder that lies at `final` is what this call would build;
    then yields None and there is nothing to do.

    Continues the work of a killed or interrupted process with the same source, else starts anew.
    After an error nothing remains: it would come again, or the disk is full.

    Raises ConfigError, naming `knob`, if another folder is at `final`, if another process is
    building it, or if it cannot be written.
    """
    if final.name in ("", ".."):  # `.` and `..` have no name to put beside
        final = Path(os.path.abspath(final))
    if not final.name:
        raise ConfigError(f"{knob} {final}: is there already; give another")
    check_output_folder(final, knob)
    with exclusive(final, wait=False):
        making = Unfinished(final, source)
        if os.path.lexists(final):
            if not is_complete():
                raise ConfigError(f"{knob} {final}: is there already; give another")
            making.remove()  # left by a process that was killed after the rename
            yield None
            return
        try:
            making.begin()
            yield making
            making.finish()
        except Exception as error:
            making.remove()
            cause = system_error(error)
            if isinstance(error, ConfigError) or cause is None:
                raise
            where = f"{cause.filename}: " if cause.filename else ""
            raise ConfigError(
                f"{knob} {final}: cannot be written ({where}{cause.strerror})"
            ) from error
