"""The curriculum: which prompts of an environment a step draws. NumPy, no torch.

Owns: what is known of each prompt's pass rate, its form as JSON, the draw. Does not own: how many
prompts an environment gives (`ratios`), the prompts (`tasks`), what counts as a pass.

A prompt with the estimated pass rate x is drawn with a probability that is proportional to
exp(-(x - m)^2 / (2 deviation^2)). The mean m moves linearly over the run from easy to hard, as in
the report of Nemotron 3 Nano, whose numbers are not published.

The estimate is that of the prompt's newest visit: the policy changes, and older rollouts are of
another one. A prompt that was solved each time in its newest visit rests for `solved_rest_steps`
steps and may then come back, since a policy can forget and a group is small.

A draw depends on (seed, step, environment), the ids and what was observed alone, so that a resumed
run needs the state and nothing else.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.grpo_knobs import CurriculumKind, CurriculumKnobs
from nemotron_train.config.json_text import json_text
from nemotron_train.config.visible import one_line
from nemotron_train.data.permutation import key64

_VERSION = 1


@dataclass(frozen=True)
class Visit:
    """The newest rollouts of one prompt: how many were judged, how many passed, and the step."""

    attempts: int
    passes: int
    step: int


@dataclass
class CurriculumState:
    """The newest visit of each prompt that was tried: visits[environment][row id]."""

    visits: dict[str, dict[str, Visit]] = field(default_factory=dict)

    def observe(self, step: int, outcomes: Iterable[tuple[str, str, int, int]]) -> None:
        """Take in all outcomes of a step: (environment, row id, attempts, passes).

        A prompt that is there twice is one visit. Outcomes without attempts say nothing. A step
        that is observed again replaces itself; one older than what is known is ignored.
        """
        seen: dict[tuple[str, str], tuple[int, int]] = {}
        for environment, row, attempts, passes in outcomes:
            if not 0 <= passes <= attempts:
                raise ValueError(f"{environment} {row}: {passes} passes of {attempts}")
            before = seen.get((environment, row), (0, 0))
            seen[environment, row] = (before[0] + attempts, before[1] + passes)
        for (environment, row), (attempts, passes) in seen.items():
            known = self.visits.get(environment, {}).get(row)
            if attempts and (known is None or known.step <= step):
                self.visits.setdefault(environment, {})[row] = Visit(attempts, passes, step)

    def to_json(self) -> str:
        """The state as one line. Equal states give equal texts, in whatever order they grew."""
        environments = {
            name: {row: [v.attempts, v.passes, v.step] for row, v in rows.items()}
            for name, rows in self.visits.items()
        }
        value = {"version": _VERSION, "environments": environments}
        return json_text(value, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str, where: str) -> "CurriculumState":
        """The state that `to_json` wrote. where: the file, for messages.

        Raises ConfigError with the place of what is not a state.
        """
        try:
            value = json.loads(text, object_pairs_hook=_without_doubles)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not JSON ({one_line(error)[:80]})") from None
        if not isinstance(value, dict) or set(value) != {"version", "environments"}:
            raise ConfigError(f"{where}: must be an object with version and environments")
        version = value["version"]
        if type(version) is not int or version != _VERSION:
            shown = json_text(version)[:20]
            raise ConfigError(f"{where}: version is {shown}; this program reads {_VERSION}")
        visits: dict[str, dict[str, Visit]] = {}
        for name, rows in _object(value["environments"], f"{where}: environments").items():
            place = f"{where}: environments.{one_line(name)}"
            visits[name] = {
                row: _visit(entry, f"{place}.{one_line(row)}")
                for row, entry in _object(rows, place).items()
            }
        return CurriculumState(visits)


def rate_mean(knobs: CurriculumKnobs, step: int, total_steps: int) -> float:
    """The preferred pass rate at `step`, counted from 0: linear from the first to the last of the
    run's steps, and constant after it."""
    done = min(step / (total_steps - 1), 1.0) if total_steps > 1 else 0.0
    return knobs.rate_mean_start + (knobs.rate_mean_end - knobs.rate_mean_start) * done


def pass_rates(
    state: CurriculumState, environment: str, ids: Sequence[str], knobs: CurriculumKnobs
) -> np.ndarray:
    """The estimated pass rate of each row, FP64 [n]: `rate_prior` if it was not tried."""
    visits = state.visits.get(environment, {})
    known = (visits.get(row) for row in ids)
    return np.array([v.passes / v.attempts if v else knobs.rate_prior for v in known], np.float64)


def is_resting(
    state: CurriculumState, environment: str, ids: Sequence[str], step: int, knobs: CurriculumKnobs
) -> np.ndarray:
    """Whether each row is left out as solved at `step`, bool [n]."""
    visits = state.visits.get(environment, {})
    known = (visits.get(row) for row in ids)
    return np.array(
        [
            v is not None and v.passes == v.attempts and step - v.step <= knobs.solved_rest_steps
            for v in known
        ],
        dtype=bool,
    ) & bool(knobs.solved_rest_steps)


def draw_prompts(
    state: CurriculumState,
    environment: str,
    ids: Sequence[str],
    count: int,
    step: int,
    total_steps: int,
    seed: int,
    knobs: CurriculumKnobs,
) -> list[int]:
    """The places in `ids` of the `count` prompts that `environment` gives to `step`.

    ids: row ids of the environment's pool, each once. Drawn without putting back, each next one in
    proportion to the weights of those that are left. Resting prompts follow after all others, and
    a prompt is repeated only when the pool has none left. Raises ValueError for an empty pool.
    """
    if not ids:
        raise ValueError(f"environment {environment} has no prompts")
    log_weight = np.zeros(len(ids))
    if knobs.curriculum is CurriculumKind.gaussian:
        distance = pass_rates(state, environment, ids, knobs) - rate_mean(knobs, step, total_steps)
        log_weight = -0.5 * (distance / knobs.rate_deviation) ** 2
    # The order of log-weight + Gumbel noise is that of a draw without putting back. No weight is
    # formed, so none becomes 0, however far all pass rates are from the mean.
    score = log_weight + _gumbel(key64("curriculum", seed, step, environment), len(ids))
    resting = is_resting(state, environment, ids, step, knobs)
    order = np.lexsort((-score, resting))
    return order[np.arange(count) % len(ids)].tolist()


def _gumbel(key: int, count: int) -> np.ndarray:
    """Standard Gumbel noise, FP64 [count]. Number i does not depend on `count`, so that a pool that
    grows keeps the noise of its rows. Philox's own words are used because they are the same in
    every version of NumPy."""
    words = np.random.Philox(key=key).random_raw(count)
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # above 0, below 1
    return -np.log(-np.log(uniform))


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be an object")
    return value


def _visit(entry: Any, where: str) -> Visit:
    numbers = isinstance(entry, list) and len(entry) == 3 and all(type(n) is int for n in entry)
    if not numbers or not (0 <= entry[1] <= entry[0] and 0 < entry[0] < 2**53 and entry[2] >= 0):
        raise ConfigError(f"{where} must be [attempts, passes, step], not {json_text(entry)[:40]}")
    return Visit(*entry)
