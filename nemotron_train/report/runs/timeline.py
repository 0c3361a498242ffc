"""What happened to a run and when: its starts, its checkpoints, what the guard saw. No torch.

Owns: joining environment.json, checkpoints.jsonl and the events of metrics.jsonl into one list on
both axes, tokens and time. Does not own: how it is drawn (`page_charts`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from nemotron_train.report.runs.read import Run, read_objects

KINDS = ("start", "checkpoint", "non_finite", "spike", "straggler", "branch", "switch", "phases")


@dataclass(frozen=True)
class Happening:
    """kind: one of KINDS, or another `kind` of metrics.jsonl; time: seconds since 1970, None where
    no file says it; text: one line for a person."""

    kind: str
    step: int
    tokens: float
    time: float | None
    text: str


def timeline(run: Run) -> list[Happening]:
    """By step, then as the files have them."""
    found = [*_starts(run), *_checkpoints(run), *_events(run)]
    return sorted(found, key=lambda happening: happening.step)


def tokens_at(run: Run, step: float) -> float:
    """Tokens trained after `step`, which need not be in the file."""
    steps, tokens = run.series("tokens", along="step")
    if not len(steps):
        return 0.0
    # Steps are equal, so one line through the origin holds beyond the file's ends too.
    return float(step * tokens[-1] / steps[-1]) if steps[-1] else 0.0


def clock_at(run: Run, step: float) -> float | None:
    """When `step` was logged, between lines in proportion; None in files of older versions."""
    steps, times = run.series("time", along="step")
    return float(np.interp(step, steps, times)) if len(steps) else None


def moment(text: Any) -> float | None:
    """Seconds since 1970 of an ISO time; None where it is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _starts(run: Run) -> Iterator[Happening]:
    for number, start in enumerate(run.starts, start=1):
        step = start.get("from_step")
        if start.get("ended") == "refused" or not isinstance(step, int):
            continue
        ended = start.get("ended") or "no end recorded"
        reason = f": {start['reason']}" if start.get("reason") else ""
        text = f"start {number} from step {step:,} ({ended}{reason})"
        yield Happening("start", step, tokens_at(run, step), moment(start.get("time")), text)


def _checkpoints(run: Run) -> Iterator[Happening]:
    seen = set()
    for entry in reversed(read_objects(run.path / "checkpoints.jsonl")):
        step, time = entry.get("step"), entry.get("time")
        if isinstance(step, int) and step not in seen:  # of a step saved twice the later one
            seen.add(step)
            when = float(time) if isinstance(time, int | float) else clock_at(run, step)
            text = f"checkpoint of step {step:,}"
            yield Happening("checkpoint", step, tokens_at(run, step), when, text)


def _events(run: Run) -> Iterator[Happening]:
    for event in run.events:
        kind, step = str(event["kind"]), event["step"]
        if kind == "precision":
            continue
        if kind == "switch" or kind == "branch":
            names = [str(_name(event.get(f"precision_{when}"))) for when in ("before", "after")]
            text = f"{kind} at step {step:,}: {names[0]} to {names[1]}"
        else:
            policy = f" ({event['policy']})" if event.get("policy") else ""
            text = f"{kind} at step {step:,}{policy}: {event.get('reason', '')}".rstrip(": ")
        yield Happening(kind, step, tokens_at(run, step), clock_at(run, step), text)


def _name(plan: Any) -> Any:
    return plan.get("name", "?") if isinstance(plan, dict) else "?"
