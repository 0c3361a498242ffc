"""`evaluate environments`: pass@1 and pass@8 of checkpoints, environment by environment.

Owns: table, JSON and picture. Does not own: rows and measures (`evaluation_parts`), rollouts
(`sampler`), the statistics (`pass_rates`).

Several checkpoints get the same rows and the same draws, and are compared prompt by prompt.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.table import Table

from nemotron_train.config.json_text import json_text
from nemotron_train.generate.checkpoint import resolve_checkpoint
from nemotron_train.platform.files import write_output
from nemotron_train.platform.terminal import open_console
from nemotron_train.posttrain.evaluation_parts import (
    RunResult,
    check_evaluation,
    chosen_rows,
    measure_run,
    open_environments,
    open_run,
    percent,
    rollouts_with_progress,
)
from nemotron_train.posttrain.knobs import EvaluateEnvironmentsConfig
from nemotron_train.posttrain.pass_rates import mean_difference
from nemotron_train.posttrain.plot import plot_pass_rates
from nemotron_train.posttrain.rollout import write_rollouts


def evaluate_environments(
    runs: Sequence[str], knobs: EvaluateEnvironmentsConfig
) -> list[RunResult]:
    """Measure the checkpoints `runs`, print the tables and write OUTPUT.json, OUTPUT.png and the
    rollouts, OUTPUT.NUMBER.jsonl.gz. COLLECTIVE over the ranks of this launch.

    Raises ConfigError if a knob is out of range, an environment, its rows or a checkpoint cannot be
    used, or a tokenizer lacks the chat format's tokens.
    """
    check_evaluation(knobs, "0")
    rows = chosen_rows(knobs)
    for run in runs:  # find errors in every run before measuring the first
        resolve_checkpoint(run, knobs)
    console, results = open_console(), []
    with open_environments(rows, knobs) as environments:
        for number, run in enumerate(runs):
            with open_run(run, knobs, environments, console) as opened:
                started = time.perf_counter()
                rollouts = rollouts_with_progress(opened.sampler, rows, knobs, console)
                seconds = time.perf_counter() - started
            is_first = environments.is_first_rank
            results.append(measure_run(opened.checkpoint, rollouts, knobs.samples, seconds))
            console.print(_table(results[-1]))
            if knobs.output and is_first:
                write_rollouts(Path(f"{knobs.output}.{number}.jsonl.gz"), rollouts)
    for result in results[1:]:
        console.print(_comparison(results[0], result))
    if knobs.output and is_first:
        _write(results, knobs)
        console.print(
            f"wrote {knobs.output}.json, {knobs.output}.png; the rollouts are in "
            f"{knobs.output}.0.jsonl.gz (`nemotron-train rollouts show`)",
            soft_wrap=True,
        )
    return results


def _table(result: RunResult) -> Table:
    first = result.together
    rate = len(first.rates) * first.samples / result.seconds
    title = f"{result.checkpoint}: {result.seconds:.0f} s, {rate:.1f} rollouts a second"
    table = Table(title=title, title_justify="left")
    table.add_column("environment")
    for name in ("prompts", "pass@1", f"pass@{first.k}", "tokens", "cut", "malformed"):
        table.add_column(name, justify="right")
    table.add_column("other verdicts")
    for entry in (*result.environments, result.together):
        others = {
            name: count
            for name, count in entry.verdicts.items()
            if name not in ("passed", "failed")
        }
        table.add_row(
            entry.environment,
            f"{entry.prompts} × {entry.samples}",
            percent(entry.pass_1),
            percent(entry.pass_k),
            f"{entry.tokens:.0f}",
            f"{entry.cut:.1%}",
            f"{entry.malformed:.1%}",
            ", ".join(f"{name} {count}" for name, count in sorted(others.items())),
            end_section=entry is result.environments[-1],
        )
    return table


def _comparison(before: RunResult, after: RunResult) -> Table:
    """The differences of two checkpoints over the same prompts, with paired intervals."""
    title = f"{after.checkpoint} against {before.checkpoint}, points, the same prompts"
    table = Table(title=title, title_justify="left")
    table.add_column("environment")
    for name in ("pass@1", f"pass@{before.together.k}"):
        table.add_column(name, justify="right")
    for one, other in zip(
        (*before.environments, before.together), (*after.environments, after.together), strict=True
    ):
        of_1 = mean_difference(np.array(one.rates), np.array(other.rates))
        of_k = mean_difference(np.array(one.rates_k), np.array(other.rates_k))
        table.add_row(
            one.environment,
            percent(of_1, "+"),
            percent(of_k, "+"),
            end_section=one is before.environments[-1],
        )
    return table


def _write(results: Sequence[RunResult], knobs: EvaluateEnvironmentsConfig) -> None:
    settings = {
        name: getattr(knobs, name)
        for name in (
            *("split", "level", "temperature", "top_k", "top_p", "seed", "max_new_tokens"),
            *("budget", "budget_grace", "budget_scope"),
        )
    }
    content = {"knobs": settings, "runs": [asdict(result) for result in results]}
    write_output(Path(f"{knobs.output}.json"), json_text(content, indent=1) + "\n", "output")
    bars = {
        result.checkpoint: {
            entry.environment: (entry.pass_1, entry.pass_k)
            for entry in (*result.environments, result.together)
        }
        for result in results
    }
    plot_pass_rates(Path(f"{knobs.output}.png"), bars, results[0].together.k)
