"""`evaluate budget`: accuracy of a checkpoint against its reasoning budget.

Owns: which budgets are asked, table, JSON and picture. Does not own: the budget itself
(`generate.budget`), rows and measures (`evaluation_parts`), rollouts (`sampler`).

All budgets get the same rows and the same draws: a rollout says the same up to the place where its
budget closes the reasoning, and one that is not closed there is the same as without a limit. So the
differences between budgets are paired.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nemotron_train.config.budget import NO_LIMIT, BudgetScope
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.generate.checkpoint import resolve_checkpoint
from nemotron_train.platform.files import write_output
from nemotron_train.platform.terminal import open_console
from nemotron_train.posttrain.environments.protocol import Row
from nemotron_train.posttrain.evaluation_parts import (
    OpenedRun,
    RunResult,
    check_evaluation,
    chosen_rows,
    measure_run,
    open_environments,
    open_run,
    percent,
    rollouts_with_progress,
)
from nemotron_train.posttrain.knobs import (
    EvaluateBudgetConfig,
    budget_label,
    given_budgets,
    in_order,
)
from nemotron_train.posttrain.pass_rates import Estimate, mean_difference
from nemotron_train.posttrain.plot import plot_budgets
from nemotron_train.posttrain.rollout import Rollout, write_rollouts

_PARTS = (0, 1 / 8, 1 / 4, 1 / 2, 1)  # of B: the budgets unless some are given
_QUANTILE = 0.95  # of the lengths of reasoning that was closed: B unless it is given


@dataclass(frozen=True)
class BudgetPoint:
    """One budget, None for no limit. difference: pass@1 of all prompts against the largest budget,
    prompt by prompt."""

    budget: int | None
    result: RunResult
    difference: Estimate


def evaluate_budget(run: str, knobs: EvaluateBudgetConfig) -> list[BudgetPoint]:
    """Measure the checkpoint `run` under several budgets, print the tables and write OUTPUT.json,
    OUTPUT.png and the rollouts, OUTPUT.BUDGET.jsonl.gz. COLLECTIVE over the ranks of this launch.

    Raises ConfigError as `evaluate_environments`, and for budgets that are no numbers, or no row
    with reasoning.
    """
    budgets = given_budgets(knobs)
    check_evaluation(knobs, budget_label(budgets[-1] if budgets else NO_LIMIT))
    rows = chosen_rows(knobs)
    if not any(row.thinking for row in rows):
        raise ConfigError("rows: none asks for reasoning, which a budget limits")
    resolve_checkpoint(run, knobs)
    console = open_console()
    results: dict[int, RunResult] = {}
    with (
        open_environments(rows, knobs) as environments,
        open_run(run, replace(knobs, budget=NO_LIMIT), environments, console) as opened,
    ):
        if not budgets:
            free = _ask(opened, rows, NO_LIMIT, knobs, console, results)
            budgets = default_budgets(free, knobs)
        for budget in budgets:
            if budget not in results:
                _ask(opened, rows, budget, knobs, console, results)
    points = _points({budget: results[budget] for budget in budgets})
    console.print(_table(points))
    console.print(_environments(points))
    if knobs.output and opened.is_first_rank:
        _write(points, knobs)
        console.print(
            f"wrote {knobs.output}.json, {knobs.output}.png; the rollouts are in "
            f"{knobs.output}.{budget_label(budgets[-1])}.jsonl.gz and so on "
            "(`nemotron-train rollouts show`)",
            soft_wrap=True,
        )
    return points


def default_budgets(free: Sequence[Rollout], knobs: EvaluateBudgetConfig) -> list[int]:
    """0, B/8, B/4, B/2, B and no limit, rounded up. B is the knob `budget`, or measured on rollouts
    without a limit."""
    largest = knobs.budget if knobs.budget != NO_LIMIT else _usual_length(free, knobs)
    return in_order([*(math.ceil(part * largest) for part in _PARTS), NO_LIMIT])


def _usual_length(free: Sequence[Rollout], knobs: EvaluateBudgetConfig) -> int:
    """Thinking tokens that most of the reasoning does not exceed, in what the budget is for."""
    asked = [rollout for rollout in free if rollout.row.thinking]
    closed = [rollout for rollout in asked if not rollout.malformed_thinking] or asked
    turns = [r.turns if knobs.budget_scope == BudgetScope.turn else 1 for r in closed]
    lengths = [r.thinking_tokens / max(1, n) for r, n in zip(closed, turns, strict=True)]
    return max(1, math.ceil(np.quantile(lengths, _QUANTILE)))


def _ask(
    opened: OpenedRun,
    rows: Sequence[Row],
    budget: int,
    knobs: EvaluateBudgetConfig,
    console: Console,
    results: dict[int, RunResult],
) -> list[Rollout]:
    """Measure one budget, and write its rollouts."""
    own = None if budget == NO_LIMIT else budget
    limited = [replace(row, budget=own) for row in rows]
    started = time.perf_counter()
    rollouts = rollouts_with_progress(opened.sampler, limited, knobs, console)
    seconds = time.perf_counter() - started
    result = measure_run(opened.checkpoint, rollouts, knobs.samples, seconds)
    results[budget] = result
    label = budget_label(budget)
    console.print(f"budget {label}: pass@1 {percent(result.together.pass_1)}, {seconds:.0f} s")
    if knobs.output and opened.is_first_rank:
        write_rollouts(Path(f"{knobs.output}.{label}.jsonl.gz"), rollouts)
    return rollouts


def _points(results: Mapping[int, RunResult]) -> list[BudgetPoint]:
    reference = np.array(list(results.values())[-1].together.rates)
    return [
        BudgetPoint(
            None if budget == NO_LIMIT else budget,
            result,
            mean_difference(reference, np.array(result.together.rates)),
        )
        for budget, result in results.items()
    ]


def _label(point: BudgetPoint) -> str:
    return budget_label(NO_LIMIT if point.budget is None else point.budget)


def _table(points: Sequence[BudgetPoint]) -> Table:
    """All environments together, one budget a row."""
    last = points[-1]
    first = last.result.together
    title = f"{last.result.checkpoint}: {first.prompts} × {first.samples} rollouts a budget"
    table = Table(title=title, title_justify="left")
    names = ("budget", "pass@1", f"against {_label(last)}, points", "forced", "closed itself")
    for name in (*names, "thinking", "answer", "well-formed"):
        table.add_column(name, justify="right")
    for point in points:
        entry = point.result.together
        table.add_row(
            _label(point),
            percent(entry.pass_1),
            "" if point is last else percent(point.difference, "+"),
            f"{entry.forced:.1%}",
            f"{entry.closed:.1%}",
            f"{entry.thinking_tokens:.1f}",
            f"{entry.answer_tokens:.1f}",
            f"{entry.well_formed:.1%}",
        )
    return table


def _environments(points: Sequence[BudgetPoint]) -> Table:
    """pass@1 of each environment, one budget a column."""
    table = Table(title="pass@1 in percent, by budget", title_justify="left")
    table.add_column("environment")
    for point in points:
        table.add_column(_label(point), justify="right")
    for name, estimates in _pass_1(points).items():
        table.add_row(name, *(f"{100 * estimate.value:.1f}" for estimate in estimates))
    return table


def _pass_1(points: Sequence[BudgetPoint]) -> dict[str, list[Estimate]]:
    """Environment, and last all of them -> pass@1 of each budget."""
    found: dict[str, list[Estimate]] = {}
    for point in points:
        for entry in (*point.result.environments, point.result.together):
            found.setdefault(entry.environment, []).append(entry.pass_1)
    return found


def _write(points: Sequence[BudgetPoint], knobs: EvaluateBudgetConfig) -> None:
    names = ("split", "level", "temperature", "top_k", "top_p", "seed", "max_new_tokens")
    names += ("budget_grace", "budget_scope")
    settings = {name: getattr(knobs, name) for name in names}
    content = {"knobs": settings, "budgets": [asdict(point) for point in points]}
    write_output(Path(f"{knobs.output}.json"), json_text(content, indent=1) + "\n", "output")
    together = [point.result.together for point in points]
    plot_budgets(
        Path(f"{knobs.output}.png"),
        points[-1].result.checkpoint,
        [_label(point) for point in points],
        _pass_1(points),
        {
            "thinking": [entry.thinking_tokens for entry in together],
            "answer": [entry.answer_tokens for entry in together],
        },
        {
            "closed by the budget": [entry.forced for entry in together],
            "well-formed": [entry.well_formed for entry in together],
        },
    )
