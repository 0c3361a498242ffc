"""Reading run folders: metrics.jsonl and the small files around it. No torch.

Owns: being robust to what a crash, a running job or an older version leaves behind. Does not own:
what is made of the numbers (`table`, `plot`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.config.schema import ConfigError


@dataclass(frozen=True)
class Run:
    """What a run folder says. `rows`: one a logged step, ascending; `summary`: {} until the end."""

    path: Path
    name: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    def series(self, field: str, along: str = "tokens") -> tuple[list[float], list[float]]:
        """The points (along, field) of the rows that have both as numbers."""
        rows = [row for row in self.rows if _is_number(row.get(along), row.get(field))]
        return [row[along] for row in rows], [row[field] for row in rows]


def read_run(path: Path) -> Run:
    """Raises ConfigError when `path` is no run folder or has no metrics yet."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run folder")
    try:
        text = (path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no run folder, it has no metrics.jsonl") from None
    rows = parse_rows(text)
    if not rows:
        raise ConfigError(f"{path}: metrics.jsonl holds no step yet")
    return Run(path, path.resolve().name, rows, _read_summary(path / "summary.json"))


def parse_rows(text: str) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, by ascending step. A torn line is left out; of a step that
    was logged twice the later values hold."""
    rows: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _is_number(*values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
