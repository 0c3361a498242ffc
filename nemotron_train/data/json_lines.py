"""JSON lines that users write, read strictly: one object a line, with its place for errors.

Owns: bytes to objects, and the one form of an error about a field: `FILE:LINE: FIELD is VALUE; it
must be …`. Does not own: which fields there are (`chat/messages`, `chat/rows`, `posttrain/tasks`),
and documents to pretrain on (`readers`), which are many and whose bad records may be left out.
"""

import gzip
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text, strict_json
from nemotron_train.config.visible import one_line

MAX_LINE_BYTES = 16 << 20
_MAX_SHOWN = 60  # characters of a wrong value


@dataclass(frozen=True)
class Fields:
    """The fields of a JSON object.

    where: begins an error, such as "rows.jsonl:3". path: the object's own place in the line, such
    as "messages[0]"; "" for the line itself.
    """

    value: Mapping[str, Any]
    where: str
    path: str = ""

    def get(self, name: str) -> Any:
        """A field's value; None if it is missing."""
        return self.value.get(name)

    def name(self, field: str) -> str:
        """The full name of a field, such as "messages[0].role"."""
        return f"{self.path}.{field}" if self.path else field

    def wrong(self, field: str, needed: str) -> ConfigError:
        """The error about a field that is missing or not what it must be."""
        if field not in self.value:
            return self.error(f"{self.name(field)} is missing; it must be {needed}")
        return wrong_value(self.where, self.name(field), self.value[field], needed)

    def error(self, message: str) -> ConfigError:
        """Another error about this object."""
        return ConfigError(f"{self.where}: {message}")

    def text(self, field: str, default: str | None = None) -> str:
        """A text that is not blank; the default if the field is missing. Raises ConfigError."""
        value = self.value.get(field, default)
        if not isinstance(value, str) or (field in self.value and not value.strip()):
            raise self.wrong(field, "a text that is not empty")
        return value

    def whether(self, field: str, default: bool, hint: str = "") -> bool:
        """true or false; the default if the field is missing. Raises ConfigError."""
        value = self.value.get(field, default)
        if not isinstance(value, bool):
            raise self.wrong(field, f"true or false{hint}")
        return value

    def check_known(self, known: Collection[str], hint: str = "") -> None:
        """Raises ConfigError for a field that is not among the known ones."""
        unknown = [name for name in self.value if name not in known]
        if unknown:
            owner = f"{self.path} has " if self.path else ""
            name = one_line(unknown[0])[:40]
            raise self.error(f"{owner}no field {name}{hint}; there are {', '.join(known)}")


def wrong_value(where: str, name: str, value: Any, needed: str) -> ConfigError:
    """The error about a value that is not what it must be. where, name: as in `Fields`."""
    shown = one_line(json_text(value, ensure_ascii=False)[:_MAX_SHOWN])
    return ConfigError(f"{where}: {name} is {shown}; it must be {needed}")


def json_lines(path: Path) -> Iterator[tuple[int, Fields]]:
    """(number of the line, its object) for each line of a .jsonl or .jsonl.gz file, in order. Blank
    lines are skipped, but counted; a byte order mark at the beginning is, too.

    Raises ConfigError, naming the file and the line: a file that cannot be read, a line of more
    than MAX_LINE_BYTES, that is not UTF-8, that `strict_json` refuses or that is no object.
    """
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            value = strict_json(line.decode())
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}: not UTF-8 at byte {error.start}") from None
        except ValueError as error:
            raise ConfigError(f"{where}: not a JSON object ({one_line(error)[:120]})") from None
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: not a JSON object but {type(value).__name__}")
        yield number, Fields(value, where)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Every line that is not blank, with its number from 1. No more than one line is in memory."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ConfigError(f"{path}:{number}: more than {MAX_LINE_BYTES:,} bytes")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as editors write
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({one_line(reason)})") from None
