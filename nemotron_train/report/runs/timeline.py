"""Timeline of a run: starts, checkpoints, guard and precision events. No torch.

Owns: joining environment.json, checkpoints.jsonl and the events of metrics.jsonl into one list with
step, tokens and time. Does not own: drawing (`html.data`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from nemotron_train.report.runs.read import Run, read_objects

KINDS = ("start", "checkpoint", "non_finite", "spike", "straggler", "branch", "switch", "phases")


@dataclass(frozen=True)
class TimelineEvent:
    """kind: one of KINDS, or another `kind` of metrics.jsonl; time: seconds since 1970, None if no
    file records it; text: one line to display."""

    kind: str
    step: int
    tokens: float
    time: float | None
    text: str


def timeline(run: Run) -> list[TimelineEvent]:
    """The run's events by ascending step; events of one step keep the order of the files."""
    events = [*_starts(run), *_checkpoints(run), *_events(run)]
    return sorted(events, key=lambda event: event.step)


def tokens_at(run: Run, step: float) -> float:
    """Number of tokens trained after `step`, which may be missing from metrics.jsonl."""
    steps, tokens = run.series("tokens", along="step")
    if not len(steps):
        return 0.0
    # All steps have the same size, so tokens are proportional to steps, also outside the file.
    return float(step * tokens[-1] / steps[-1]) if steps[-1] else 0.0


def time_at(run: Run, step: float) -> float | None:
    """When `step` was logged, in seconds since 1970, interpolated between lines; None in files of
    older versions, which have no times."""
    steps, times = run.series("time", along="step")
    return float(np.interp(step, steps, times)) if len(steps) else None


def parse_time(text: Any) -> float | None:
    """Seconds since 1970 of an ISO 8601 time; None if `text` is not one."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _starts(run: Run) -> Iterator[TimelineEvent]:
    for number, start in enumerate(run.starts, start=1):
        step = start.get("from_step")
        if start.get("ended") == "refused" or not isinstance(step, int):
            continue
        ended = start.get("ended") or "no end recorded"
        reason = f": {start['reason']}" if start.get("reason") else ""
        text = f"start {number} from step {step:,} ({ended}{reason})"
        yield TimelineEvent(
            "start", step, tokens_at(run, step), parse_time(start.get("time")), text
        )


def _checkpoints(run: Run) -> Iterator[TimelineEvent]:
    seen = set()
    for entry in reversed(read_objects(run.path / "checkpoints.jsonl")):
        step, time = entry.get("step"), entry.get("time")
        if isinstance(step, int) and step not in seen:  # the later one, if a step was saved twice
            seen.add(step)
            when = float(time) if isinstance(time, int | float) else time_at(run, step)
            text = f"checkpoint of step {step:,}"
            yield TimelineEvent("checkpoint", step, tokens_at(run, step), when, text)


def _events(run: Run) -> Iterator[TimelineEvent]:
    for event in run.events:
        kind, step = str(event["kind"]), event["step"]
        if kind == "precision":
            continue
        if kind == "switch" or kind == "branch":
            names = [str(_name(event.get(f"precision_{when}"))) for when in ("before", "after")]
            plans = f"{names[0]} to {names[1]}" if names[0] != names[1] else f"still {names[1]}"
            text = f"{kind} at step {step:,}: {plans}"
        else:
            policy = f" ({event['policy']})" if event.get("policy") else ""
            text = f"{kind} at step {step:,}{policy}: {event.get('reason', '')}".rstrip(": ")
        yield TimelineEvent(kind, step, tokens_at(run, step), time_at(run, step), text)


def _name(plan: Any) -> Any:
    return plan.get("name", "?") if isinstance(plan, dict) else "?"
