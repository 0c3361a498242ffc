"""What an environment is: rows in, messages in turns, one score out. No torch.

An environment keeps nothing between calls. `step` and `score` get the whole episode, so any process
may serve any call, a stored episode can be scored again without a model, and a resumed run needs no
state of environments. Everything here is plain data that pickle and JSON carry.

Owns: the types, their form as JSON, and `judge`, the one way to a score. Does not own: messages,
and how what was sampled becomes one (`data/chat`), processes and time limits (`scoring`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.chat.messages import Message, message_from_json, message_json
from nemotron_train.posttrain.sandbox.verdict import Verdict


@dataclass(frozen=True)
class Row:
    """One task. answer: any JSON value, None if the environment needs none. metadata: free, a JSON
    object. tools: descriptions for the chat template. thinking: whether the policy is asked to
    think. budget: most thinking tokens, None for no limit. effort: a name, such as "low"."""

    id: str
    environment: str
    messages: tuple[Message, ...]
    answer: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = True
    budget: int | None = None
    effort: str = ""


class EndedBy(StrEnum):
    """Why an episode has no further turn."""

    stop = "stop"  # the environment had no reply to a finished completion
    length = "length"  # the last completion was cut off
    turns = "turns"  # the environment would have gone on, but the most turns were reached


@dataclass(frozen=True)
class Episode:
    """A row and all that was said. prompt: the messages of `Environment.start`. turns: the sampled
    assistant messages, and the environment's replies between them."""

    row: Row
    prompt: tuple[Message, ...]
    turns: tuple[Message, ...]
    ended_by: EndedBy = EndedBy.stop

    @property
    def last(self) -> Message:
        """The last sampled message; an empty one if there is none."""
        sampled = [message for message in self.turns if message.role == "assistant"]
        return sampled[-1] if sampled else Message("assistant", "")


@dataclass(frozen=True)
class Score:
    """reward: a finite number, or None if the reward does not apply to this sample. components: its
    parts by name, for the log. message: one line that explains a verdict."""

    reward: float | None
    components: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict = Verdict.failed
    message: str = ""


def passed() -> Score:
    """The score of a right answer."""
    return Score(1.0, {}, Verdict.passed)


def failed(message: str, verdict: Verdict = Verdict.failed) -> Score:
    """A score of 0. message: why."""
    return Score(0.0, {}, verdict, " ".join(message.split())[:300])


class Environment(Protocol):
    """Gives tasks and judges answers. An environment may also have `open()`, which is called once
    before the first row and raises ConfigError if something is missing, and `close()`.

    name: for messages and metrics. max_turns: completions of an episode at most.
    """

    name: str
    max_turns: int

    def check_row(self, row: Row) -> str:
        """What this environment misses in a row, beginning with the field; empty if nothing."""
        ...

    def start(self, row: Row) -> list[Message]:
        """The first messages, which end before the policy's turn."""
        ...

    def step(self, episode: Episode) -> list[Message] | None:
        """The reply to the last completion, or None if the episode is done."""
        ...

    def score(self, episode: Episode) -> Score:
        """The score of a finished episode. May raise; `judge` makes it a verdict."""
        ...


class SingleTurn:
    """The part that environments with one completion share."""

    max_turns = 1

    def start(self, row: Row) -> list[Message]:
        """The row's own messages."""
        return list(row.messages)

    def step(self, episode: Episode) -> list[Message] | None:
        """Nothing follows the one completion."""
        return None


def judge(environment: Environment, episode: Episode) -> Score:
    """The environment's score of an episode, whatever happens: one score per sample.

    A malformed or cut-off completion scores 0 and does not reach the environment. An exception and
    a reward that is no finite number become a verdict; a ConfigError is raised.
    """
    if episode.last.fault:
        return failed(episode.last.fault)
    if episode.ended_by == EndedBy.length:
        return failed("the completion was cut off")
    try:
        score = environment.score(episode)
    except ConfigError:  # a missing package or sandbox is no fault of the sample
        raise
    except MemoryError:
        return failed("MemoryError", Verdict.memory)
    except Exception as error:  # of a user's code: anything
        return failed(f"{type(error).__name__}: {error}", Verdict.error)
    return checked(score)


def checked(score: Any) -> Score:
    """`score` if it is a Score of finite numbers; else one with the verdict `error`."""
    if not isinstance(score, Score):
        return failed(f"score() returned {type(score).__name__}, not a Score", Verdict.error)
    numbers = {"reward": score.reward} if score.reward is not None else {}
    try:
        numbers |= dict(score.components)
        for name, number in numbers.items():
            if isinstance(number, bool) or not math.isfinite(number):
                return failed(f"{name} is {number}, no finite number", Verdict.error)
        reward = None if score.reward is None else float(score.reward)
        components = {str(name): float(number) for name, number in score.components.items()}
        return Score(reward, components, Verdict(score.verdict), str(score.message)[:300])
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        return failed(f"a score of wrong types ({error})", Verdict.error)


def row_json(row: Row) -> dict[str, Any]:
    """A row as a JSON object, as `tasks.read_rows` reads it; without the fields that are empty."""
    value: dict[str, Any] = {"id": row.id, "environment": row.environment}
    value["messages"] = [message_json(message) for message in row.messages]
    optional = {"answer": row.answer, "metadata": dict(row.metadata), "tools": list(row.tools)}
    optional |= {"budget": row.budget, "effort": row.effort}
    value |= {name: entry for name, entry in optional.items() if entry not in (None, {}, [], "")}
    if row.answer == "" or row.answer == [] or row.answer == {}:
        value["answer"] = row.answer
    if not row.thinking:
        value["thinking"] = False
    return value


def row_from_json(value: Mapping[str, Any]) -> Row:
    """The reverse of `row_json`; trusts its input."""
    return Row(
        id=value["id"],
        environment=value["environment"],
        messages=messages_from_json(value["messages"]),
        answer=value.get("answer"),
        metadata=value.get("metadata", {}),
        tools=tuple(value.get("tools", ())),
        thinking=value.get("thinking", True),
        budget=value.get("budget"),
        effort=value.get("effort", ""),
    )


def messages_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Messages from a list of JSON objects."""
    return tuple(message_from_json(value) for value in values)


def episode_json(episode: Episode) -> dict[str, Any]:
    """An episode as a JSON object."""
    return {
        "row": row_json(episode.row),
        "prompt": [message_json(message) for message in episode.prompt],
        "turns": [message_json(message) for message in episode.turns],
        "ended_by": str(episode.ended_by),
    }


def episode_from_json(value: Mapping[str, Any]) -> Episode:
    """The reverse of `episode_json`."""
    return Episode(
        row_from_json(value["row"]),
        messages_from_json(value["prompt"]),
        messages_from_json(value["turns"]),
        EndedBy(value["ended_by"]),
    )


def score_json(score: Score) -> dict[str, Any]:
    """A score as a JSON object."""
    return {
        "reward": score.reward,
        "components": dict(score.components),
        "verdict": str(score.verdict),
        "message": score.message,
    }


def score_from_json(value: Mapping[str, Any]) -> Score:
    """The reverse of `score_json`."""
    components, verdict = value["components"], Verdict(value["verdict"])
    return Score(value["reward"], components, verdict, value["message"])
