"""What the evaluations in environments share: rows, a sampler on a checkpoint, progress, measures.

Owns: the measures of an environment. Does not own: which rollouts are compared and how it is shown
(`evaluation`, `budget_curve`), rollouts (`sampler`), the statistics (`pass_rates`).
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from nemotron_train.config.budget import check_budget
from nemotron_train.config.errors import ConfigError
from nemotron_train.data.chat.render import ChatFormat
from nemotron_train.generate.checkpoint import open_checkpoint, open_tokenizer
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import check_decoding, check_sampling
from nemotron_train.generate.terminal import check_speculative
from nemotron_train.platform.files import check_output
from nemotron_train.platform.groups import num_ranks, raise_together
from nemotron_train.platform.terminal import text_column
from nemotron_train.posttrain.environments.protocol import Row
from nemotron_train.posttrain.environments.scoring import Scoring
from nemotron_train.posttrain.knobs import EvaluateEnvironmentsConfig, scoring_limits
from nemotron_train.posttrain.pass_rates import Estimate, mean_rate, pass_at_k
from nemotron_train.posttrain.rollout import SAMPLED, Rollout
from nemotron_train.posttrain.sampler import Sampler
from nemotron_train.posttrain.shared_scoring import Environments, SharedScoring
from nemotron_train.posttrain.tasks import evaluation_rows

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


def check_evaluation(knobs: EvaluateEnvironmentsConfig, first_rollouts: str) -> None:
    """Raises ConfigError for a knob outside its range, and if the output cannot be written.

    first_rollouts: the part of the name of the first file of rollouts after OUTPUT.
    """
    check_sampling(knobs)
    check_decoding(knobs)
    check_budget(knobs)
    for name in ("prompts", "samples"):
        if getattr(knobs, name) < 1:
            raise ConfigError(f"{name}={getattr(knobs, name)}: give 1 or more")
    if knobs.samples > 1 and knobs.temperature == 0:
        raise ConfigError(f"samples={knobs.samples}: greedy answers are all the same; give 1")
    if knobs.output:
        for ending in ("json", "png", f"{first_rollouts}.jsonl.gz"):
            path = Path(f"{knobs.output}.{ending}")
            with contextlib.suppress(OSError):  # `check_output` says what is wrong
                path.parent.mkdir(parents=True, exist_ok=True)
            check_output(path, "output")


def chosen_rows(knobs: EvaluateEnvironmentsConfig) -> list[Row]:
    """The rows that the knobs choose. Raises ConfigError as `evaluation_rows`."""
    return evaluation_rows(
        knobs.environment, knobs.rows, knobs.split, knobs.seed, knobs.prompts, knobs.level
    )


@dataclass(frozen=True)
class OpenedEnvironments:
    """The environments of an evaluation. problem: why the rows cannot be asked; "" if they can.
    is_first_rank: whether this rank writes."""

    scoring: Environments
    problem: str
    is_first_rank: bool


@contextlib.contextmanager
def open_environments(
    rows: Sequence[Row], knobs: EvaluateEnvironmentsConfig
) -> Iterator[OpenedEnvironments]:
    """The environments of these rows, on the first rank of several. Raises ConfigError for one that
    does not load or misses something in a row; with several ranks `open_run` does."""
    is_first = os.environ.get("RANK", "0") == "0"
    with Scoring(scoring_limits(knobs)) as scoring:
        # Ranks that share a model meet when it is opened; until then the first one keeps what
        # environments say.
        problem = _problem(scoring, rows) if is_first else ""
        if num_ranks() > 1:
            shared = SharedScoring(scoring if is_first else None)
            yield OpenedEnvironments(shared, problem, is_first)
            return
        if problem:
            raise ConfigError(problem)
        yield OpenedEnvironments(scoring, "", True)


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


@dataclass(frozen=True)
class OpenedRun:
    """A checkpoint that is asked. checkpoint: its folder. is_first_rank: whether this rank
    writes."""

    sampler: Sampler
    checkpoint: str
    is_first_rank: bool


@contextlib.contextmanager
def open_run(
    run: str,
    knobs: EvaluateEnvironmentsConfig,
    environments: OpenedEnvironments,
    console: Console,
) -> Iterator[OpenedRun]:
    """A sampler on a checkpoint. COLLECTIVE. Raises ConfigError as `open_checkpoint`, if its
    tokenizer lacks the chat format's tokens, and for the problem of the environments."""
    with open_checkpoint(run, knobs, console.print) as model:
        raise_together(environments.problem)
        console.quiet = not environments.is_first_rank
        check_speculative(knobs.speculative, model)
        tokenizer, ends = open_tokenizer(model, knobs)
        engine = Engine(model.model, ends, model.platform.device, tokenizer.known_ids)
        chat = ChatFormat(tokenizer, f"{run}: its tokenizer")
        longest = max(MOST_PROMPT_TOKENS, model.config.train.sequence_length)
        most = longest + knobs.max_new_tokens
        sampler = Sampler(engine, chat, environments.scoring, knobs, most, knobs)
        yield OpenedRun(sampler, str(model.checkpoint), environments.is_first_rank)


def rollouts_with_progress(
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


def measure_run(
    checkpoint: str, rollouts: Sequence[Rollout], samples: int, seconds: float
) -> RunResult:
    """The result of a checkpoint's rollouts, environment by environment."""
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


def percent(estimate: Estimate, sign: str = "") -> str:
    """An estimate with its interval, in percent."""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:{sign}.1f} % ({low:{sign}.1f} to {high:{sign}.1f})"
