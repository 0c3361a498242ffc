"""The table of loss gaps, on the terminal and as gap.md, and the sentences below it. No torch."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemotron_train.report.gap import TAIL, Gap, Noise, gaps, mean_and_error, noise
from nemotron_train.report.pairs import Comparison, read_sweep
from nemotron_train.report.plot_gap import plot_gaps
from nemotron_train.report.plot_sizes import plot_sizes
from nemotron_train.report.sizes import by_size, sentence
from nemotron_train.report.verdict import Verdict, judge, trend_words
from nemotron_train.train.run_folder import write_atomically

HEADINGS = ("runs", "seeds", "validation loss", "validation gap %", "training gap %")
HEADINGS += ("trend a doubling", "verdict")


def report_gaps(folder: Path, console: Console) -> None:
    """Table, gap.md, gap.png and, of several sizes, gap_sizes.png of a sweep's folder. Raises
    ConfigError for another folder."""
    for path in write_gaps(folder, read_sweep(folder), console):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def write_gaps(folder: Path, comparisons: Sequence[Comparison], console: Console) -> list[Path]:
    """The same of what was read of it; what was written: nothing before the first pair."""
    rows, notes = print_gaps(comparisons, console)
    if not rows:
        names = ", ".join(comparison.baseline for comparison in comparisons)
        text = f"{folder}: no run of the baseline {names} to compare with yet"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return []
    sizes = by_size(comparisons)
    for plan, found in sizes.items():
        if text := sentence(plan, found):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
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
    """One table of all, and a sentence a group; both as returned, empty where there is no pair."""
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
        table.add_row(*map(escape, row))
    console.print(table)
    for note in notes:
        console.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
    return rows, notes


def gap_rows(comparison: Comparison, found: list[Gap]) -> tuple[list[list[str]], list[str]]:
    """Cells under HEADINGS, a row a group, and the sentences that go with them."""
    if not found:
        return [], []
    spread = noise(comparison)
    verdicts = verdicts_of(comparison, found, spread)
    rows = [_row(gap, comparison, verdicts) for gap in found]
    notes = [
        f"Gaps are to {comparison.baseline} of the same seed, in percent of its loss: mean ± "
        f"standard error over seeds. Training loss: mean of the last {TAIL:.0%} of the steps that "
        "both have. Trend: percentage points a doubling of the tokens, over their last half."
    ]
    return rows, [*notes, *(verdict.text for verdict in verdicts.values())]


def verdicts_of(comparison: Comparison, found: list[Gap], spread: Noise) -> dict[str, Verdict]:
    """By group, of all but the baseline."""
    baseline = comparison.baseline
    return {gap.group: judge(gap, spread, baseline) for gap in found if gap.group != baseline}


def markdown(rows: list[list[str]], notes: list[str]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 2) + "|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def _row(gap: Gap, comparison: Comparison, verdicts: dict[str, Verdict]) -> list[str]:
    loss = "-" if math.isnan(gap.loss) else f"{gap.loss:.4f}"
    cells = [gap.group, str(len(gap.seeds)), loss]
    if gap.group == comparison.baseline:
        return [*cells, "(baseline)", "(baseline)", "-", "-"]
    trend = trend_words(gap.trend)
    verdict = verdicts[gap.group].short
    if gap.group in comparison.repeats:
        verdict = "repeat: this is the noise"
    return [*cells, percent(gap.validation), percent(gap.training), trend, verdict]


def percent(values: list[float]) -> str:
    """Fractions as percent: mean ± standard error."""
    if not values:
        return "-"
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:+.3f}" if math.isnan(error) else f"{mean:+.3f} ± {error:.3f}"
