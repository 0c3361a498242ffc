"""The table of one or more runs, on the terminal. No torch."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemotron_train.report.read import Run, read_run

LAST_STEPS = 20  # the training loss shown is the mean over these: single steps are noisy


def print_runs(run_folders: Sequence[Path], console: Console) -> None:
    """One row a run. Raises ConfigError for a folder that is no run."""
    runs = [read_run(path) for path in run_folders]
    table = Table(title=None, header_style="bold")
    table.add_column("run", overflow="fold")
    for heading in ("steps", "tokens", "loss", "validation", "unigram entropy", "tokens/s"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(*summarize(run))
    console.print(table)
    console.print(
        f"loss: nats a token, mean of the last {LAST_STEPS} logged steps; tokens/s: median",
        style="dim",
    )


def summarize(run: Run) -> list[str]:
    """The cells of a run's row; `-` for what it does not have."""
    _, losses = run.series("loss")
    _, speeds = run.series("tokens_per_second", along="step")
    _, validations = run.series("validation_loss")
    validation = validations[-1] if validations else run.summary.get("validation_loss")
    return [
        run.name,
        _cell(run.rows[-1]["step"], ",d"),
        _cell(run.rows[-1].get("tokens"), ",d"),
        _cell(statistics.fmean(losses[-LAST_STEPS:]) if losses else None, ".4f"),
        _cell(validation, ".4f"),
        _cell(run.summary.get("unigram_entropy"), ".4f"),
        _cell(statistics.median(speeds) if speeds else None, ",.0f"),
    ]


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
