"""Configurations side by side: what two runs, or many, were asked differently. No torch.

Owns: dotted knobs, the table of differences, the verb `report diff`. Does not own: reading a
configuration (`run_folder.folder`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemotron_train.config.knobs import to_plain
from nemotron_train.run_folder.folder import read_config

# Where a run lies and what it is called: no two runs agree there.
PLACE = ("name", "folder", "resume", "switch_precision")
ABSENT = "(none)"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted knob -> value, of a tree of dicts; a list of dicts by places, any other one whole."""
    entries: Mapping[Any, Any] | None = None
    if isinstance(tree, Mapping):
        entries = tree
    elif isinstance(tree, list) and tree and all(isinstance(entry, Mapping) for entry in tree):
        entries = dict(enumerate(tree))
    if not entries:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in entries.items():
        found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def knobs_of(folder: Path) -> dict[str, Any]:
    """Every knob of a run folder's configuration, resolved, with what was changed since its start.
    Raises ConfigError for what is no run folder."""
    return flatten(to_plain(read_config(folder)))


def rows(
    knobs: Sequence[Mapping[str, Any]], *, show_all: bool = False
) -> list[tuple[str, list[str], bool]]:
    """(knob, its value in each configuration, whether they differ), in the schema's order."""
    names = list(dict.fromkeys(name for each in knobs for name in each))
    found = []
    for name in names:
        values = [each.get(name, ABSENT) for each in knobs]
        # 1 is True and 1.0 to Python, not to a person.
        differ = any(type(v) is not type(values[0]) or v != values[0] for v in values)
        if show_all or (differ and name not in PLACE):
            found.append((name, [as_text(value) for value in values], differ))
    return found


def as_text(value: Any) -> str:
    """A value as it is written on the command line, more or less."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value or '""'
    return str(value)


def print_diff(folders: Sequence[Path], console: Console, *, show_all: bool = False) -> None:
    """The two configurations side by side. Raises ConfigError."""
    found = rows([knobs_of(folder) for folder in folders], show_all=show_all)
    table = Table(header_style="bold")
    table.add_column("knob", overflow="fold")
    for folder in folders:
        table.add_column(escape(str(folder)), overflow="fold")
    for name, values, differ in found:
        marked = differ and name not in PLACE
        style = "bold" if marked and show_all else None
        table.add_row(escape(name), *(escape(value) for value in values), style=style)
    if found:
        console.print(table)
    num_different = sum(differ and name not in PLACE for name, _, differ in found)
    console.print(
        f"{num_different} knob{'s' if num_different != 1 else ''} differ"
        if num_different
        else "the configurations are the same, but for name and folder",
        highlight=False,
    )
