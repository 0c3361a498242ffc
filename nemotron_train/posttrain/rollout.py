"""A rollout: one sampled episode of a row, token by token, and its form in files.

Owns: the type, its JSON, reading and writing of files of rollouts. Does not own: how rollouts are
made (`sampler`). No torch.

A file is gzip-compressed JSON lines, one rollout a line, `*.jsonl.gz`.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.visible import one_line
from nemotron_train.platform.files import replacing
from nemotron_train.posttrain.advantage import Outcome
from nemotron_train.posttrain.environments import protocol
from nemotron_train.posttrain.environments.protocol import Episode, Row, Score

SAMPLED, FORCED, ENVIRONMENT = "s", "f", "e"


@dataclass(frozen=True)
class Rollout:
    """One sampled episode.

    group: number of its row among those of the step; the samples of a row share it. sample: number
    within the group. sequence: number that its random draws depend on, with the seed.
    prompt_ids: what the policy was given. ids: what followed, and kinds, one letter for each: `s`
    sampled, `f` forced by a budget, `e` said by the environment. log_probabilities: of the sampled
    ids under the distribution that they were drawn from, NaN for the others. cut: whether the
    length limit ended it. text: the ids as text, special tokens included. thinking_tokens,
    answer_tokens: sampled before and after `</think>`, in all turns. forced_closes: turns whose
    reasoning the budget closed; with budget 0 the close of the first is in the prompt.

    Of rollouts that were trained on: policy_version, the optimizer steps before they were sampled;
    trainer_log_probabilities, those of the sampled ids by the trainer before its update;
    advantage; weight, 1 if the sample was trained and counted, else 0.
    """

    group: int
    sample: int
    sequence: int
    prompt_ids: list[int]
    ids: list[int]
    kinds: str
    log_probabilities: list[float]
    episode: Episode
    score: Score
    cut: bool
    text: str
    thinking_tokens: int = 0
    answer_tokens: int = 0
    forced_closes: int = 0
    malformed_calls: int = 0
    malformed_thinking: bool = False
    policy_version: int = 0
    trainer_log_probabilities: list[float] = field(default_factory=list)
    advantage: float = 0.0
    weight: float = 0.0

    @property
    def row(self) -> Row:
        """The task."""
        return self.episode.row

    @property
    def reward(self) -> float:
        """The reward; 0 where it does not apply."""
        return self.score.reward or 0.0

    @property
    def passed(self) -> bool:
        """Whether the environment's verdict is that the answer is right."""
        return self.score.verdict == "passed"

    @property
    def turns(self) -> int:
        """Sampled messages."""
        return sum(message.role == "assistant" for message in self.episode.turns)


def outcome_of(rollout: Rollout) -> Outcome:
    """What the advantages depend on."""
    return Outcome(
        group=rollout.group,
        reward=rollout.score.reward,
        tokens=rollout.kinds.count(SAMPLED),
        truncated=rollout.cut,
        malformed_thinking=rollout.malformed_thinking and not rollout.cut,
        malformed_call=rollout.malformed_calls > 0,
        effort=rollout.row.effort,
    )


def to_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout as a JSON object. Kinds are run-length coded: [["s", 12], ["e", 9], …]."""
    return {
        "id": rollout.row.id,
        "environment": rollout.row.environment,
        "group": rollout.group,
        "sample": rollout.sample,
        "sequence": rollout.sequence,
        "prompt_ids": rollout.prompt_ids,
        "ids": rollout.ids,
        "kinds": [[kind, len(list(run))] for kind, run in groupby(rollout.kinds)],
        "log_probabilities": _without_nan(rollout.log_probabilities),
        "episode": protocol.episode_json(rollout.episode),
        "score": protocol.score_json(rollout.score),
        "cut": rollout.cut,
        "text": rollout.text,
        "thinking_tokens": rollout.thinking_tokens,
        "answer_tokens": rollout.answer_tokens,
        "forced_closes": rollout.forced_closes,
        "malformed_calls": rollout.malformed_calls,
        "malformed_thinking": rollout.malformed_thinking,
        "policy_version": rollout.policy_version,
        "trainer_log_probabilities": _without_nan(rollout.trainer_log_probabilities),
        "advantage": rollout.advantage,
        "weight": rollout.weight,
    }


def from_json(value: Mapping[str, Any]) -> Rollout:
    """The reverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
    counts = [count for _, count in value["kinds"]]
    if sum(counts) != len(value["ids"]) or min(counts, default=0) < 0:
        raise ValueError("kinds are not those of the ids")
    rollout = Rollout(
        group=value["group"],
        sample=value["sample"],
        sequence=value["sequence"],
        prompt_ids=value["prompt_ids"],
        ids=value["ids"],
        kinds="".join(kind * count for kind, count in value["kinds"]),
        log_probabilities=_with_nan(value["log_probabilities"]),
        episode=protocol.episode_from_json(value["episode"]),
        score=protocol.score_from_json(value["score"]),
        cut=value["cut"],
        text=value["text"],
        thinking_tokens=value["thinking_tokens"],
        answer_tokens=value["answer_tokens"],
        forced_closes=value["forced_closes"],
        malformed_calls=value["malformed_calls"],
        malformed_thinking=value["malformed_thinking"],
        policy_version=value["policy_version"],
        trainer_log_probabilities=_with_nan(value["trainer_log_probabilities"]),
        advantage=float(value["advantage"]),
        weight=float(value["weight"]),
    )
    _check(rollout)
    return rollout


def _check(rollout: Rollout) -> None:
    """Raises ValueError for a field of another type, or lists that do not belong together."""
    counts = ("group", "sample", "sequence", "thinking_tokens", "answer_tokens", "forced_closes")
    for name in (*counts, "malformed_calls", "policy_version"):
        if type(getattr(rollout, name)) is not int:
            raise ValueError(f"{name} is no whole number")
    if any(type(token) is not int for token in (*rollout.prompt_ids, *rollout.ids)):
        raise ValueError("an id is no whole number")
    if set(rollout.kinds) - {SAMPLED, FORCED, ENVIRONMENT}:
        raise ValueError("there is no such kind of id")
    of_trainer = len(rollout.trainer_log_probabilities)
    if of_trainer not in (0, rollout.kinds.count(SAMPLED)):
        raise ValueError("the trainer's log-probabilities are not those of the sampled ids")
    if len(rollout.log_probabilities) != len(rollout.ids):
        raise ValueError("log-probabilities are not those of the ids")
    if type(rollout.text) is not str or type(rollout.score.message) is not str:
        raise ValueError("text is no text")
    if rollout.score.reward is not None and not math.isfinite(rollout.score.reward):
        raise ValueError("reward is no finite number")


def _without_nan(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _with_nan(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def write_rollouts(path: Path, rollouts: Iterable[Rollout]) -> None:
    """Write a file of rollouts, atomically and durably. Equal rollouts give equal bytes."""
    lines = [json_text(to_json(rollout), ensure_ascii=False) + "\n" for rollout in rollouts]
    with replacing(path, durable=True) as temporary:
        temporary.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def read_rollouts(path: Path) -> Iterator[Rollout]:
    """The rollouts of a file. Raises ConfigError, naming file and line, if it is none."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield from_json(json.loads(line))
                except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                    raise ConfigError(
                        f"{path} line {number}: is no rollout "
                        f"({type(error).__name__}: {one_line(error)[:80]})"
                    ) from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"{path}: is no file of rollouts ({reason})") from None
