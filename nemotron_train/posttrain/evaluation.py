"""`evaluate environments`: pass@1 and pass@8 of checkpoints, environment by environment.

Owns: which rows are asked, the estimates, table, JSON and picture. Does not own: rollouts
(`sampler`), the statistics (`pass_rates`).

Several checkpoints get the same rows and the same draws, and are compared prompt by prompt.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table

from nemotron_train.config.budget import check_budget
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.data.chat.render import ChatFormat
from nemotron_train.generate.checkpoint import open_checkpoint, open_tokenizer, resolve_checkpoint
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import check_decoding, check_sampling
from nemotron_train.generate.terminal import check_speculative
from nemotron_train.platform.files import check_output, write_output
from nemotron_train.platform.groups import num_ranks, raise_together
from nemotron_train.platform.terminal import open_console, text_column
from nemotron_train.posttrain.environments.protocol import Row
from nemotron_train.posttrain.environments.scoring import Scoring
from nemotron_train.posttrain.knobs import EvaluateEnvironmentsConfig, scoring_limits
from nemotron_train.posttrain.pass_rates import Estimate, mean_difference, mean_rate, pass_at_k
from nemotron_train.posttrain.plot import plot_pass_rates
from nemotron_train.posttrain.rollout import SAMPLED, Rollout, write_rollouts
from nemotron_train.posttrain.sampler import Sampler
from nemotron_train.posttrain.shared_scoring import SharedScoring
from nemotron_train.posttrain.tasks import evaluation_rows

MOST_RUNS = 8
MOST_PROMPT_TOKENS = 4096
_PRINT_SECONDS = 10  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class EnvironmentResult:
    """One checkpoint in one environment.

    pass_1, pass_k: probability that one of 1 or of `k` samples passes. rates: pass@1 of each
    prompt. tokens, thinking_tokens, answer_tokens: sampled in a rollout, in the mean; the close of
    the reasoning is in the first alone. cut, malformed, well_formed: shares of the rollouts that
    the length limit ended, that were not in the chat format, and that were neither. forced, closed:
    shares in which the budget closed the reasoning of a turn, and in which the model closed all of
    it. verdicts: counts of all verdicts.
    """

    environment: str
    prompts: int
    samples: int
    k: int
    pass_1: Estimate
    pass_k: Estimate
    rates: list[float]
    rates_k: list[float]
    tokens: float
    cut: float
    malformed: float
    well_formed: float
    forced: float
    closed: float
    thinking_tokens: float
    answer_tokens: float
    verdicts: dict[str, int]


@dataclass(frozen=True)
class RunResult:
    """One checkpoint in all environments, and in all of their prompts together."""

    checkpoint: str
    environments: list[EnvironmentResult]
    together: EnvironmentResult
    seconds: float


def evaluate_environments(
    runs: Sequence[str], knobs: EvaluateEnvironmentsConfig
) -> list[RunResult]:
    """Measure the checkpoints `runs`, print the tables and write OUTPUT.json, OUTPUT.png and the
    rollouts, OUTPUT.NUMBER.jsonl.gz. COLLECTIVE over the ranks of this launch.

    Raises ConfigError if a knob is out of range, an environment, its rows or a checkpoint cannot be
    used, or a tokenizer lacks the chat format's tokens.
    """
    _check(knobs)
    rows = evaluation_rows(
        knobs.environment, knobs.rows, knobs.split, knobs.seed, knobs.prompts, knobs.level
    )
    for run in runs:  # find errors in every run before measuring the first
        resolve_checkpoint(run, knobs)
    console, results = open_console(), []
    is_first = os.environ.get("RANK", "0") == "0"
    with Scoring(scoring_limits(knobs)) as scoring:
        # Ranks that share a model meet when it is opened; until then the first one keeps what
        # environments say.
        problem = _problem(scoring, rows) if is_first else ""
        if problem and num_ranks() == 1:
            raise ConfigError(problem)
        environments = scoring
        if num_ranks() > 1:
            environments = SharedScoring(scoring if is_first else None)
        for number, run in enumerate(runs):
            with open_checkpoint(run, knobs, console.print) as model:
                raise_together(problem)
                console.quiet = not is_first
                check_speculative(knobs.speculative, model)
                tokenizer, ends = open_tokenizer(model, knobs)
                engine = Engine(model.model, ends, model.platform.device, tokenizer.known_ids)
                chat = ChatFormat(tokenizer, f"{run}: its tokenizer")
                longest = max(MOST_PROMPT_TOKENS, model.config.train.sequence_length)
                most = longest + knobs.max_new_tokens
                sampler = Sampler(engine, chat, environments, knobs, most, knobs)
                started = time.perf_counter()
                rollouts = _rollouts(sampler, rows, knobs, console)
                seconds = time.perf_counter() - started
                checkpoint = str(model.checkpoint)
            results.append(_measure(checkpoint, rollouts, knobs.samples, seconds))
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


def _problem(scoring: Scoring, rows: Sequence[Row]) -> str:
    """Why these rows cannot be asked: an environment does not load, or misses something in a row;
    empty if nothing."""
    try:
        scoring.load(sorted({row.environment for row in rows}))
    except ConfigError as error:
        return str(error)
    for row, missing in zip(rows, scoring.check_rows(rows), strict=True):
        if missing:
            return f"environment {row.environment}: row {row.id}: {missing}"
    return ""


def _check(knobs: EvaluateEnvironmentsConfig) -> None:
    check_sampling(knobs)
    check_decoding(knobs)
    check_budget(knobs)
    for name in ("prompts", "samples"):
        if getattr(knobs, name) < 1:
            raise ConfigError(f"{name}={getattr(knobs, name)}: give 1 or more")
    if knobs.samples > 1 and knobs.temperature == 0:
        raise ConfigError(f"samples={knobs.samples}: greedy answers are all the same; give 1")
    if knobs.output:
        for ending in ("json", "png", "0.jsonl.gz"):
            path = Path(f"{knobs.output}.{ending}")
            with contextlib.suppress(OSError):  # `check_output` says what is wrong
                path.parent.mkdir(parents=True, exist_ok=True)
            check_output(path, "output")


def _rollouts(
    sampler: Sampler, rows: Sequence[Row], knobs: EvaluateEnvironmentsConfig, console: Console
) -> list[Rollout]:
    """All rollouts, with a progress bar, or with a line now and then."""
    if console.is_terminal and not console.quiet:
        columns = (BarColumn(), text_column("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("rollouts", total=len(rows) * knobs.samples)

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, description=f"{done:,} of {total:,} rollouts")

            return sampler.rollouts(rows, knobs.samples, knobs, progress=show)
    printed = time.monotonic()

    def print_line(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= _PRINT_SECONDS:
            printed = time.monotonic()
            console.print(f"{done:,} of {total:,} rollouts")

    return sampler.rollouts(rows, knobs.samples, knobs, progress=print_line)


def _measure(
    checkpoint: str, rollouts: Sequence[Rollout], samples: int, seconds: float
) -> RunResult:
    names = list(dict.fromkeys(rollout.row.environment for rollout in rollouts))
    results = [
        measure(name, [r for r in rollouts if r.row.environment == name], samples) for name in names
    ]
    return RunResult(checkpoint, results, measure("all", rollouts, samples), seconds)


def measure(name: str, rollouts: Sequence[Rollout], samples: int) -> EnvironmentResult:
    """The result of these rollouts, `samples` of each prompt one after the other."""
    passed_Pn = np.array([rollout.passed for rollout in rollouts]).reshape(-1, samples)
    k = min(8, samples)
    rates_P, rates_k_P = pass_at_k(passed_Pn, 1), pass_at_k(passed_Pn, k)
    sampled = [rollout.kinds.count(SAMPLED) for rollout in rollouts]
    faulty = np.array([bool(rollout.episode.last.fault) for rollout in rollouts])
    cut = np.array([rollout.cut for rollout in rollouts])
    forced = np.array([rollout.forced_closes > 0 for rollout in rollouts])
    asked = np.array([rollout.row.thinking for rollout in rollouts])
    unclosed = np.array([rollout.malformed_thinking for rollout in rollouts])
    return EnvironmentResult(
        environment=name,
        prompts=len(passed_Pn),
        samples=samples,
        k=k,
        pass_1=mean_rate(rates_P, samples),
        pass_k=mean_rate(rates_k_P, 1),
        rates=rates_P.tolist(),
        rates_k=rates_k_P.tolist(),
        tokens=float(np.mean(sampled)),
        cut=float(cut.mean()),
        malformed=float((faulty & ~cut).mean()),
        well_formed=float((~faulty & ~cut).mean()),
        forced=float(forced.mean()),
        closed=float((asked & ~forced & ~unclosed).mean()),
        thinking_tokens=float(np.mean([rollout.thinking_tokens for rollout in rollouts])),
        answer_tokens=float(np.mean([rollout.answer_tokens for rollout in rollouts])),
        verdicts=dict(Counter(str(rollout.score.verdict) for rollout in rollouts)),
    )


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
            _percent(entry.pass_1),
            _percent(entry.pass_k),
            f"{entry.tokens:.0f}",
            f"{entry.cut:.1%}",
            f"{entry.malformed:.1%}",
            ", ".join(f"{name} {count}" for name, count in sorted(others.items())),
            end_section=entry is result.environments[-1],
        )
    return table


def _percent(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:{sign}.1f} % ({low:{sign}.1f} to {high:{sign}.1f})"


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
            _percent(of_1, "+"),
            _percent(of_k, "+"),
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
