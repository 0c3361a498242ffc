"""Differences between the configurations of two or more runs. No torch.

Owns: dotted knobs, the table of differences, the output of `report diff`. Does not own: reading a
configuration (`run_folder.folder`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemotron_train.config.knobs import to_plain
from nemotron_train.run_folder.folder import read_config

# Knobs for a run's location and name, which always differ between runs.
PLACE = ("name", "folder", "resume", "switch_precision")
ABSENT = "(none)"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted knob -> value, from a tree of dicts. A list of dicts is flattened by index; any other
    list is one value."""
    entries: Mapping[Any, Any] | None = None
    if isinstance(tree, Mapping):
        entries = tree
    elif isinstance(tree, list) and tree and all(isinstance(entry, Mapping) for entry in tree):
        entries = dict(enumerate(tree))
    if not entries:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in entries.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def knobs_of(folder: Path) -> dict[str, Any]:
    """Every knob of a run folder's resolved configuration, including changes made after the first
    start. Raises ConfigError if `folder` is not a run folder."""
    return flatten(to_plain(read_config(folder)))


def rows(
    knobs: Sequence[Mapping[str, Any]], *, show_all: bool = False
) -> list[tuple[str, list[str], bool]]:
    """(knob, its value in each configuration, whether they differ), in the schema's order. Only
    differing knobs outside PLACE, unless `show_all`."""
    names = list(dict.fromkeys(name for config in knobs for name in config))
    result = []
    for name in names:
        values = [config.get(name, ABSENT) for config in knobs]
        # Compare types too: in Python 1 == True == 1.0.
        differ = any(type(v) is not type(values[0]) or v != values[0] for v in values)
        if show_all or (differ and name not in PLACE):
            result.append((name, [as_text(value) for value in values], differ))
    return result


def as_text(value: Any) -> str:
    """A value roughly as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value or '""'
    return str(value)


def print_diff(folders: Sequence[Path], console: Console, *, show_all: bool = False) -> None:
    """Prints the configurations side by side and the number of differing knobs. `show_all`: equal
    knobs too. Raises ConfigError if a folder is not a run folder."""
    table_rows = rows([knobs_of(folder) for folder in folders], show_all=show_all)
    table = Table(header_style="bold")
    table.add_column("knob", overflow="fold")
    for folder in folders:
        table.add_column(str(folder), overflow="fold")
    for name, values, differ in table_rows:
        marked = differ and name not in PLACE
        style = "bold" if marked and show_all else None
        table.add_row(name, *values, style=style)
    if table_rows:
        console.print(table)
    num_different = sum(differ and name not in PLACE for name, _, differ in table_rows)
    console.print(
        f"{num_different} knob{'s' if num_different != 1 else ''} differ"
        if num_different
        else "the configurations are the same, but for name and folder",
    )
