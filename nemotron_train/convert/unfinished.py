"""A folder that is built file by file next to its destination and moved there when complete.

Owns: which finished files an interrupted process leaves for the next one, the final rename. Does
not own: the content of the files. The record of finished files holds their digests, so a torn file
is written again.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.platform.files import file_sha256, flush_to_disk, write_atomically
from nemotron_train.platform.lock import exclusive

RECORD = ".conversion.json"


class Unfinished:
    """A folder under construction. `folder`: where files are written until `finish`; `final`: its
    destination."""

    def __init__(self, final: Path, source: Mapping[str, Any]) -> None:
        self.final, self._source = final, json.loads(json.dumps(source))
        self.folder = final.with_name(f".{final.name}.partial")
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
        self._write()

    def finish(self) -> None:
        """Flushes everything to disk and moves the folder to its destination."""
        (self.folder / RECORD).unlink()
        for path in self.folder.rglob("*"):
            flush_to_disk(path)
        flush_to_disk(self.folder)
        self.folder.rename(self.final)
        flush_to_disk(self.final.parent)

    def _begin(self) -> None:
        """Keeps the intact files of an interrupted process with the same source, or starts
        empty."""
        record = self.folder / RECORD
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
            is_same = before["source"] == self._source
            files = dict(before["files"])
        except (OSError, ValueError, KeyError, TypeError):
            is_same, files = False, {}
        if not is_same:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            files = {}
        for name, entry in files.items():
            path = self.folder / name
            if path.is_file() and file_sha256(path) == entry["sha256"]:
                self._done[name] = entry
        self._write()

    def _write(self) -> None:
        text = json.dumps({"source": self._source, "files": self._done})
        write_atomically(self.folder / RECORD, text)


@contextmanager
def unfinished(final: Path, source: Mapping[str, Any], knob: str) -> Iterator[Unfinished]:
    """Context manager that builds the folder `final`. `source`: plain values that identify its
    input. Continues the work of an interrupted process with the same source, else starts anew.
    After an error, finished files stay.

    Raises ConfigError, naming `knob`, if `final` exists or another process is building it.
    """
    with exclusive(final, wait=False):
        if final.exists():
            raise ConfigError(f"{knob} {final}: is there already; give another")
        making = Unfinished(final, source)
        making._begin()
        yield making
        making.finish()
        # A process that opened the lock in the meantime finds that `final` exists.
        final.with_name(f".{final.name}.lock").unlink(missing_ok=True)
