"""Prints a sweep's loss gaps and writes gap.md, gap.png and gap_sizes.png. No torch.

Owns: the order of tables, notes and files. Does not own: any number (`report.gap`), the plots
(`report.plot`).
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemotron_train.platform.files import write_atomically
from nemotron_train.report.gap.gap import gaps
from nemotron_train.report.gap.pairs import Comparison, read_sweep
from nemotron_train.report.gap.sizes import by_size, slope_sentence
from nemotron_train.report.gap.table import HEADINGS, gap_rows, markdown
from nemotron_train.report.plot.gap import plot_gaps
from nemotron_train.report.plot.sizes import plot_sizes


def report_gaps(folder: Path, console: Console) -> None:
    """Prints the gap table of a sweep folder and writes gap.md, gap.png and, for several model
    sizes, gap_sizes.png. Raises ConfigError if `folder` is not a sweep."""
    for path in write_gaps(folder, read_sweep(folder), console):
        console.print(f"wrote {path}", soft_wrap=True)


def write_gaps(folder: Path, comparisons: Sequence[Comparison], console: Console) -> list[Path]:
    """As `report_gaps`, for comparisons already read. Returns the written paths; writes nothing if
    no run has a baseline to compare with yet."""
    rows, notes = print_gaps(comparisons, console)
    if not rows:
        names = ", ".join(comparison.baseline for comparison in comparisons)
        text = f"{folder}: no run of the baseline {names} to compare with yet"
        console.print(text, soft_wrap=True)
        return []
    sizes = by_size(comparisons)
    for plan, plan_sizes in sizes.items():
        if text := slope_sentence(plan, plan_sizes):
            console.print(text, soft_wrap=True)
            notes = [*notes, text]
    write_atomically(folder / "gap.md", markdown(rows, notes))
    written = [folder / "gap.md", plot_gaps(folder / "gap.png", comparisons)]
    if sizes:
        title = f"{comparisons[0].name}: gap to the baseline of the same size and seed"
        written.append(plot_sizes(folder / "gap_sizes.png", sizes, title))
    return written


def print_gaps(
    comparisons: Sequence[Comparison], console: Console
) -> tuple[list[list[str]], list[str]]:
    """Prints one table for all comparisons and one note per group. Returns (rows, notes), both
    empty if there is no pair."""
    rows: list[list[str]] = []
    notes: list[str] = []
    for comparison in comparisons:
        more_rows, more_notes = gap_rows(comparison, gaps(comparison))
        rows, notes = rows + more_rows, notes + more_notes
    if not rows:
        return [], []
    table = Table(header_style="bold")
    for heading in HEADINGS:
        is_text = heading in ("runs", "verdict")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note, style="dim", soft_wrap=True)
    return rows, notes
