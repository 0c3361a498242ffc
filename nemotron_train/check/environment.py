"""`check environment`: may a policy be paid by this environment? No torch.

Refuses an environment that pays a hack canary, is not deterministic, raises, returns what is no
finite number, or does not answer within its limit. Not covered: hacks that no canary imitates.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.visible import one_line
from nemotron_train.posttrain.environments.canaries import (
    Canary,
    canaries,
    cut_off,
    right_answers,
    truth_of,
)
from nemotron_train.posttrain.environments.families import FAMILY_NAMES
from nemotron_train.posttrain.environments.family import HELD_OUT_LEVEL
from nemotron_train.posttrain.environments.protocol import Episode, Row, Score
from nemotron_train.posttrain.environments.scoring import Scoring
from nemotron_train.posttrain.knobs import CheckEnvironmentConfig, check_check, scoring_limits
from nemotron_train.posttrain.sandbox.verdict import Verdict
from nemotron_train.posttrain.tasks import Split, read_rows, rows

_ANSWERED = (Verdict.passed, Verdict.failed)


@dataclass(frozen=True)
class Finding:
    """One line of the table. fault: what is wrong, for the refusal; empty if nothing."""

    check: str
    samples: int
    result: str
    fault: str = ""


def check_environment(name: str, knobs: CheckEnvironmentConfig, console: Console) -> None:
    """Check the environment `name` and print a table. Raises ConfigError with what failed and the
    completion that shows it."""
    check_check(name, knobs)
    limits, tasks = scoring_limits(knobs), _rows(name, knobs)
    with Scoring(limits) as scoring:
        started = time.monotonic()
        turns = scoring.load([name])[name]
        loaded = time.monotonic() - started
        findings = [Finding("import", 1, f"{loaded:.1f} s, {turns} turns at most")]
        findings += _findings(tasks, knobs.most_reward, scoring)
    with Scoring(replace(limits, workers=1)) as other:
        findings.append(_other_process(tasks, findings, other))
    table = Table(title=f"environment {name}", title_justify="left")
    for heading in ("check", "samples", "result"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(finding.check, str(finding.samples), finding.fault or finding.result)
    console.print(table)
    faults = [finding for finding in findings if finding.fault]
    if faults:
        raise ConfigError(f"environment {name}: {faults[0].check}: {faults[0].fault}")


def _rows(name: str, knobs: CheckEnvironmentConfig) -> list[Row]:
    """The rows to check with: of a file, generated, or sums that a user's environment gets."""
    if knobs.rows:
        found = [row for row in read_rows(Path(knobs.rows), name) if row.environment == name]
        if not found:
            raise ConfigError(f"rows={knobs.rows}: no row is of environment {name}")
        return found[: knobs.samples]
    split = Split.harder if knobs.level == HELD_OUT_LEVEL else Split.evaluation
    family = name if name in FAMILY_NAMES else "arithmetic"
    made = rows(family, split, 0, knobs.samples, knobs.level)
    if name in FAMILY_NAMES:
        return made
    return [replace(row, environment=name, metadata={}) for row in made]


def _findings(tasks: Sequence[Row], most_reward: float, scoring: Scoring) -> list[Finding]:
    """Everything that one process can tell."""
    findings = [_rows_finding(tasks, scoring), _start_finding(tasks, scoring)]
    if findings[0].fault or findings[1].fault:
        return findings
    traps, scores, started = canaries(tasks), [], time.monotonic()
    for kind, group in groupby(traps, key=attrgetter("kind")):
        some = list(group)
        some_scores = scoring.score([canary.episode for canary in some])
        findings.append(_canary_finding(kind, some, some_scores, most_reward))
        scores += some_scores
        if findings[-1].fault and any(score.verdict not in _ANSWERED for score in some_scores):
            return findings  # a judge that hangs would hang on each of the others
    seconds = time.monotonic() - started
    right = right_answers(tasks)
    right_scores = scoring.score(right)
    findings.append(_right_finding(tasks, right, right_scores))
    cut = [score.reward or 0 for score in scoring.score(cut_off(right))]
    findings.append(_paid("canary: cut off", right, cut, most_reward))
    again = scoring.score([canary.episode for canary in traps] + right)
    findings.append(_same("same score twice", [*scores, *right_scores], again))
    steps = [reply for reply in scoring.step(right) if isinstance(reply, Score)]
    fault = f"step: {steps[0].verdict}: {steps[0].message}" if steps else ""
    findings.append(Finding("step", len(right), "answers", fault))
    speed = f"{len(traps) / max(seconds, 1e-9):.0f} a second"
    return [*findings, Finding("speed", len(traps), speed)]


def _rows_finding(tasks: Sequence[Row], scoring: Scoring) -> Finding:
    pairs = zip(tasks, scoring.check_rows(tasks), strict=True)
    faults = [f"row {row.id}: {fault}" for row, fault in pairs if fault]
    return Finding("rows", len(tasks), "complete", one_line(faults[0]) if faults else "")


def _start_finding(tasks: Sequence[Row], scoring: Scoring) -> Finding:
    fault = ""
    for row, messages in zip(tasks, scoring.start(tasks), strict=True):
        if isinstance(messages, Score):
            fault = f"row {row.id}: {messages.verdict}: {messages.message}"
        elif not messages or messages[-1].role == "assistant":
            fault = f"row {row.id}: start() left nothing to answer"
    return Finding("start", len(tasks), "messages to answer", fault)


def _canary_finding(
    kind: str, traps: Sequence[Canary], scores: Sequence[Score], most_reward: float
) -> Finding:
    """A fault if a canary is paid, or its judging did not end in a finite number in time. Code of a
    model may end in any verdict."""
    for canary, score in zip(traps, scores, strict=True):
        if score.verdict not in _ANSWERED and canary.episode.row.environment != "python_code":
            fault = f"{score.verdict}: {score.message}; {_shown(canary.text, canary.episode)}"
            return Finding(f"canary: {kind}", len(traps), "", fault)
    rewards = [score.reward or 0.0 for score in scores]
    texts = [canary.text for canary in traps]
    episodes = [canary.episode for canary in traps]
    return _paid(f"canary: {kind}", episodes, rewards, most_reward, texts)


def _paid(
    check: str,
    episodes: Sequence[Episode],
    rewards: Sequence[float],
    most_reward: float,
    texts: Sequence[str] = (),
) -> Finding:
    """A fault if one of the episodes is paid."""
    texts = texts or [episode.last.content for episode in episodes]
    for episode, reward, text in zip(episodes, rewards, texts, strict=True):
        if reward > most_reward:
            fault = f"scores {reward:g}; {_shown(text, episode)}"
            return Finding(check, len(episodes), "", fault)
    return Finding(check, len(episodes), f"scores {max(rewards, default=0.0):g} at most")


def _right_finding(
    tasks: Sequence[Row], episodes: Sequence[Episode], scores: Sequence[Score]
) -> Finding:
    passes = sum(score.verdict is Verdict.passed for score in scores)
    result = f"{passes} pass"
    if not episodes:
        result = "no row has an answer"
    fault = ""
    if tasks[0].environment in FAMILY_NAMES and passes < len(episodes):
        wrong = next(
            pair
            for pair in zip(episodes, scores, strict=True)
            if pair[1].verdict is not Verdict.passed
        )
        fault = f"a worked solution is {wrong[1].verdict} ({wrong[1].message}); "
        fault += _shown(truth_of(wrong[0].row), wrong[0])
    return Finding("the answer itself", len(episodes), result, fault)


def _same(check: str, first: Sequence[Score], second: Sequence[Score]) -> Finding:
    for one, other in zip(first, second, strict=True):
        if (one.reward, one.components, one.verdict) != (
            other.reward,
            other.components,
            other.verdict,
        ):
            fault = f"one completion scored {one.reward} ({one.verdict}), then {other.reward}"
            return Finding(check, len(first), "", f"{fault} ({other.verdict})")
    return Finding(check, len(first), "equal")


def _other_process(tasks: Sequence[Row], findings: Sequence[Finding], other: Scoring) -> Finding:
    """The scores of a second process against those of a third: its state is another."""
    name = "same score in another process"
    if any(finding.fault for finding in findings):
        return Finding(name, 0, "not tried")
    episodes = [canary.episode for canary in canaries(tasks)] + right_answers(tasks)
    forwards = other.score(episodes)
    other.restart()
    return _same(name, forwards, other.score(episodes[::-1])[::-1])


def _shown(text: str, episode: Episode) -> str:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return f"completion {one_line(repr(shown))} of row {episode.row.id}"
