"""Reads run folders: metrics.jsonl and the small files next to it. No torch.

Owns: robustness against files left by a crash, a running job or an older version. Does not own: the
lines of metrics.jsonl (`columns`), the use of the numbers (`table`, `plot`, `html`).
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.report.runs.columns import Columns, finite, last_of, parse_columns

GOING_SECONDS = 600  # a run that has logged nothing for this long is no longer taken as running


@dataclass(frozen=True)
class Run:
    """The content of a run folder. `summary`: {} until the run has ended; `environment`: {} in a
    folder of an old version; `written`: last modification of metrics.jsonl, seconds since 1970."""

    path: Path
    name: str
    columns: Columns
    summary: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    written: float = 0.0

    @property
    def events(self) -> list[dict[str, Any]]:
        """Event lines of metrics.jsonl: those with a `kind`."""
        return self.columns.events

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts in environment.json, oldest first."""
        starts = self.environment.get("starts", [])
        return [s for s in starts if isinstance(s, dict)] if isinstance(starts, list) else []

    def series(self, field: str, along: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
        """(along, field) of the lines in which both are finite numbers: float64 [n] each; empty if
        a metric is missing."""
        numbers = self.columns.numbers
        if field not in numbers or along not in numbers:
            return np.empty(0), np.empty(0)
        points = finite(numbers[along], numbers[field])
        return points[0], points[1]

    def last(self, field: str) -> float | None:
        """The last finite value of a metric; None if there is none."""
        return last_of(self.columns.numbers.get(field, []))

    def names(self, prefix: str) -> list[str]:
        """The metrics whose name starts with `prefix`, in file order."""
        return [name for name in self.columns.numbers if name.startswith(prefix)]

    def only(self, fields: Iterable[str]) -> "Run":
        """A copy with only these metrics and no lists, to save memory when comparing many runs."""
        numbers = {n: v for n, v in self.columns.numbers.items() if n in set(fields)}
        return replace(self, columns=Columns(numbers, {}, self.columns.events))

    def state(self, now: float | None = None) -> str:
        """`finished`, `stopped`, `failed`, `going`, or `silent`: no orderly end is recorded and no
        line was logged for GOING_SECONDS. `now`: seconds since 1970, None for the current time."""
        ended = self.starts[-1].get("ended") if self.starts else None
        if self.summary.get("finished") and ended != "failed":
            return "finished"
        if ended in ("stopped", "failed"):
            return ended
        if ended is None and (now or time.time()) - self.written < GOING_SECONDS:
            return "going"
        return "stopped" if self.summary else "silent"


def read_run(path: Path) -> Run:
    """Reads a run folder. Raises ConfigError if `path` is not a run folder or has no metrics
    yet."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run folder")
    try:
        content = (path / "metrics.jsonl").read_bytes()
        written = (path / "metrics.jsonl").stat().st_mtime
    except FileNotFoundError:
        if (path / "config.yaml").is_file():  # imported, merged, or just begun
            reason = "no step was trained in it, so there is nothing to report"
            raise ConfigError(f"{path}: {reason}") from None
        raise ConfigError(f"{path}: no run folder, it has no metrics.jsonl") from None
    except OSError as error:
        raise ConfigError(f"{path}: metrics.jsonl cannot be read ({error.strerror})") from None
    columns = parse_columns(content)
    if not len(columns.numbers.get("step", [])):
        raise ConfigError(f"{path}: metrics.jsonl holds no step yet")
    return Run(
        path,
        path.resolve().name,
        columns,
        read_object(path / "summary.json"),
        read_object(path / "environment.json"),
        written,
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; {} if the file is missing or incomplete."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one object per line. Unreadable lines are skipped; [] if the
    file is missing."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def label_runs(runs: Sequence[Run]) -> list[str]:
    """A unique name for each run: the folder's name, or its path if two runs share the name."""
    names = [run.name for run in runs]
    labels = [
        name if names.count(name) == 1 else str(run.path)
        for name, run in zip(names, runs, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} ({index + 1})"
        for index, label in enumerate(labels)
    ]
