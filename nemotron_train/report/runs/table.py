"""The tables of one or more runs, for the terminal and for the page. No torch.

Runs that train on data and runs that train on rollouts have a table each: a loss and a reward
cannot be compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nemotron_train.report.runs.policy import LAST_STEPS, Course, policy_numbers, split
from nemotron_train.report.runs.read import Run

HEADINGS = ("run", "steps", "tokens", "loss", "validation", "unigram entropy", "tokens/s", "MFU %")
HEADINGS += ("state",)
NOTE = f"loss: nats a token, mean of the last {LAST_STEPS} logged steps; tokens/s and MFU: median"
POLICY_HEADINGS = ("run", "steps", "reward", "first, last", "passed %", "first, last")
POLICY_HEADINGS += ("rollouts/s", "masked %", "max gap", "state")
POLICY_NOTE = (
    f"reward, passed and masked tokens: mean of the last {LAST_STEPS} logged steps, and at the "
    "first and the last step; rollouts/s: median, while sampling; max gap: the largest difference "
    "of the trainer's and the sampler's log-probability of a token, nats, of all steps"
)


@dataclass(frozen=True)
class RunTable:
    """The runs of one kind: one row per run, cells under the headings."""

    headings: tuple[str, ...]
    rows: list[list[str]]
    note: str

    @property
    def numbers(self) -> range:
        """The columns of numbers: all between the name and the state."""
        return range(1, len(self.headings) - 1)


def run_tables(
    labels: Sequence[str], runs: Sequence[Run], policies: Sequence[bool]
) -> list[RunTable]:
    """The tables of the runs. policies: for each run, whether it trained on rollouts."""
    on_data, on_rollouts = split(policies)
    tables = []
    for indices, headings, cells, note in (
        (on_data, HEADINGS, summarize, NOTE),
        (on_rollouts, POLICY_HEADINGS, summarize_policy, POLICY_NOTE),
    ):
        rows = [[labels[index], *cells(runs[index])[1:]] for index in indices]
        if rows:
            tables.append(RunTable(headings, rows, note))
    return tables


def print_runs(tables: Sequence[RunTable], console: Console) -> None:
    """Prints the tables, each with the meaning of its numbers."""
    for each in tables:
        table = Table(title=None, header_style="bold")
        for column, heading in enumerate(each.headings):
            justify = "right" if column in each.numbers else "left"
            table.add_column(heading, justify=justify, overflow="fold")
        for row in each.rows:
            table.add_row(*row)
        console.print(table)
        console.print(each.note, style="dim", soft_wrap=True)


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


def summarize_policy(run: Run) -> list[str]:
    """The cells of a run's row, under POLICY_HEADINGS; `-` for missing values."""
    numbers = policy_numbers(run)
    return [
        run.name,
        _cell(run.last("step"), ",.0f"),
        _cell(numbers.reward.mean, ".3f"),
        _ends(numbers.reward, 1, ".3f"),
        _cell(100 * numbers.passed.mean, ".1f"),
        _ends(numbers.passed, 100, ".1f"),
        _cell(numbers.rollouts_per_second, ",.1f"),
        _cell(100 * numbers.masked, ".2f"),
        _cell(numbers.largest_gap, ".1e"),
        run.state(),
    ]


def _ends(course: Course, factor: float, form: str) -> str:
    ends = [_cell(factor * course.first, form), _cell(factor * course.last, form)]
    return "-" if ends == ["-", "-"] else ", ".join(ends)


def _cell(value: Any, form: str) -> str:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return format(value, form) if is_number else "-"
