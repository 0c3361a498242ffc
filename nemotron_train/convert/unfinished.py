"""A folder that is made file by file beside its place, and appears there complete or not at all.

Owns: what of it survives a process that was cut off, the rename at the end. Does not own: what is
in the files. The record of finished files holds their digests, so that a torn one is made again.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.platform.files import flush_to_disk
from nemotron_train.platform.lock import exclusive
from nemotron_train.run_folder.folder import write_atomically
from nemotron_train.run_folder.integrity import file_sha256

RECORD = ".conversion.json"


class Unfinished:
    """The folder in the making; `folder` is where files go until `finish`."""

    def __init__(self, final: Path, source: Mapping[str, Any]) -> None:
        self.final, self._source = final, json.loads(json.dumps(source))
        self.folder = final.with_name(f".{final.name}.partial")
        self._done: dict[str, dict[str, Any]] = {}

    def kept(self, name: str) -> Any | None:
        """What was noted with the finished file `name`; None where it has to be made."""
        entry = self._done.get(name)
        return None if entry is None else entry["note"]

    def digest(self, name: str) -> str:
        """SHA-256 of a finished file."""
        return self._done[name]["sha256"]

    def done(self, name: str, sha256: str, note: Any = True) -> None:
        """The file `name` is complete and on the disk."""
        self._done[name] = {"sha256": sha256, "note": note}
        self._write()

    def finish(self) -> None:
        """Put the folder in its place."""
        (self.folder / RECORD).unlink()
        for path in self.folder.rglob("*"):
            flush_to_disk(path)
        flush_to_disk(self.folder)
        self.folder.rename(self.final)
        flush_to_disk(self.final.parent)

    def _begin(self) -> None:
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
    """Make `final` from `source` (plain values that identify it): goes on where a process with the
    same source was cut off, and begins anew otherwise. An error leaves what is finished.

    Raises ConfigError naming `knob` where `final` is there already or another process makes it.
    """
    with exclusive(final, wait=False):
        if final.exists():
            raise ConfigError(f"{knob} {final}: is there already; give another")
        making = Unfinished(final, source)
        making._begin()
        yield making
        making.finish()
        # Whoever opened it meanwhile finds `final` in its place.
        final.with_name(f".{final.name}.lock").unlink(missing_ok=True)
