"""The terminal table of one or more runs. No torch."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nemotron_train.report.runs.read import Run

LAST_STEPS = (
    20  # the training loss shown is the mean over these steps, since single steps are noisy
)

HEADINGS = ("run", "steps", "tokens", "loss", "validation", "unigram entropy", "tokens/s", "MFU %")
HEADINGS += ("state",)


def print_runs(labels: Sequence[str], runs: Sequence[Run], console: Console) -> None:
    """Prints a table with one row per run."""
    table = Table(title=None, header_style="bold")
    for heading in HEADINGS:
        is_text = heading in ("run", "state")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for label, run in zip(labels, runs, strict=True):
        table.add_row(label, *summarize(run)[1:])
    console.print(table)
    console.print(
        f"loss: nats a token, mean of the last {LAST_STEPS} logged steps; tokens/s: median",
        style="dim",
    )


def summarize(run: Run) -> list[str]:
    """The cells of a run's row, under HEADINGS; `-` for missing values."""
    _, losses = run.series("loss")
    _, speeds = run.series("tokens_per_second", along="step")
    validation = run.last("validation_loss")
    validation = run.summary.get("validation_loss") if validation is None else validation
    _, utilizations = run.series("model_flops_utilization", along="step")
    utilization = float(np.median(utilizations)) if len(utilizations) else None
    return [
        run.name,
        _cell(run.last("step"), ",.0f"),
        _cell(run.last("tokens"), ",.0f"),
        _cell(float(losses[-LAST_STEPS:].mean()) if len(losses) else None, ".4f"),
        _cell(validation, ".4f"),
        _cell(run.summary.get("unigram_entropy"), ".4f"),
        _cell(float(np.median(speeds)) if len(speeds) else None, ",.0f"),
        _cell(utilization and 100 * utilization, ".1f"),
        run.state(),
    ]


def _cell(value: Any, form: str) -> str:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return format(value, form) if is_number else "-"
