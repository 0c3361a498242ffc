"""Verdicts of the stages: their record, their lines, and the JSON of all of them.

Owns: `Report`, which a stage fills and which is on disk after every addition, so that a killed
stage leaves what it had. Does not own: the page (`page`), when a stage is killed (`runner`).
"""

import json
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.gpu_acceptance.setting import Setting
from nemotron_train.config.json_text import json_text
from nemotron_train.config.visible import one_line
from nemotron_train.platform.files import write_atomically

Cell = str | int | float | bool | None


class Verdict(StrEnum):
    """How a stage ended. waiting: it has not begun."""

    passed = "PASS"
    failed = "FAIL"
    skipped = "SKIP"
    waiting = "-"


class Skip(Exception):
    """The stage cannot run here; the message says why."""


class Fail(Exception):
    """What the stage checks is not so; the message says what."""


@dataclass
class Result:
    """The record of a stage. seconds, limit: wall clock, used and allowed; figure: the one number
    or fact of the line; reason: why it was skipped or failed; tables: title -> rows."""

    name: str
    title: str
    checks: str
    verdict: Verdict = Verdict.waiting
    figure: str = ""
    reason: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    tables: dict[str, list[dict[str, Cell]]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)  # the last lines, of a stage that failed

    def line(self, number: int) -> str:
        """One line for the terminal."""
        said = "; ".join(filter(None, (self.reason, self.figure)))
        return f"{self.verdict}  {number:2} {self.title}, {self.seconds:.0f} s: {one_line(said)}"


class Report:
    """What a stage hands over, in a file of its own."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path, self.setting = path, setting
        self.figure = ""
        self.tables: dict[str, list[dict[str, Cell]]] = {}
        self._write()

    def row(self, table: str, **cells: Cell) -> None:
        """Add a row to a table."""
        self.tables.setdefault(table, []).append(cells)
        self._write()

    def end(self, verdict: Verdict, reason: str = "") -> None:
        """The verdict."""
        self._write(verdict=str(verdict), reason=reason)

    def _write(self, **more: str) -> None:
        found = {"figure": self.figure, "tables": self.tables, **more}
        write_atomically(self.path, json_text(found))


def read_report(path: Path) -> dict[str, Any]:
    """What a stage has written so far; empty if nothing."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


@dataclass
class Acceptance:
    """All stages of one call. seconds: since its start."""

    pretended: bool
    budget: float
    results: list[Result]
    started: str = field(
        default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    )
    seconds: float = 0.0
    is_over: bool = False
    machine: str = ""

    def count(self, verdict: Verdict) -> int:
        """How many stages ended so."""
        return sum(result.verdict == verdict for result in self.results)

    @property
    def exit_code(self) -> int:
        """0 if nothing failed and nothing is missing, else 1."""
        return int(self.count(Verdict.failed) + self.count(Verdict.waiting) > 0)

    def summary(self) -> str:
        """One line."""
        waiting = self.count(Verdict.waiting)
        return (
            f"{self.count(Verdict.passed)} passed, {self.count(Verdict.skipped)} skipped, "
            f"{self.count(Verdict.failed)} failed{f', {waiting} not run' if waiting else ''} in "
            f"{self.seconds:.0f} s of {self.budget:.0f} s"
        )

    def as_json(self) -> str:
        """The text of results.json."""
        record = asdict(self) | {"exit_code": self.exit_code, "summary": self.summary()}
        return json_text(record, indent=1) + "\n"
