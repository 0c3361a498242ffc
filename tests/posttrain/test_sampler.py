"""Rollouts of episodes with several turns.

Second truths: an engine of a few lines that reads from a script; `ChatFormat.render` of the whole
episode; other batch sizes, other ways to share the prompts, drafts. Not covered: whether the model
is any good, ranks that share a model (tests/distributed/test_rollouts.py).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.chat.render import END, THINK_END, ChatFormat
from nemotron_train.data.tokenize import load_tokenizer, train_tokenizer
from nemotron_train.generate.continuation import Continuation
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.generate.sampling import Draws
from nemotron_train.posttrain.environments.families import build_family
from nemotron_train.posttrain.environments.protocol import (
    EndedBy,
    Episode,
    Message,
    Row,
    Score,
    Verdict,
    failed,
    judge,
)
from nemotron_train.posttrain.rollout import Rollout
from nemotron_train.posttrain.sampler import Sampler
from nemotron_train.posttrain.tasks import Split, rows
from tests.generate.conftest import _build as build

KNOBS = DecodingKnobs(max_new_tokens=400, batch=4)
TEXT = Path(ChatFormat.__init__.__code__.co_filename).read_text()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT], 400, folder)
    return ChatFormat(load_tokenizer(folder))


class Environments:
    """An environment in this process, whose replies and scores come a little later."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.scored: list[Episode] = []
        self.stepped: list[Episode] = []
        self.pool = ThreadPoolExecutor(3)

    def load(self, names: Any) -> dict[str, int]:
        return dict.fromkeys(names, self.environment.max_turns)

    def start(self, tasks: Sequence[Row]) -> list[Any]:
        return [self.environment.start(task) for task in tasks]

    def begin_step(self, episode: Episode, then: Callable[[Any], Any]) -> Future[Any]:
        self.stepped.append(episode)
        wait = 0.003 * (len(self.stepped) % 3)

        def answer() -> Any:
            time.sleep(wait)
            return then(self.environment.step(episode))

        return self.pool.submit(answer)

    def begin_score(self, episode: Episode) -> Future[Score]:
        self.scored.append(episode)
        return self.pool.submit(judge, self.environment, episode)


class Scripted:
    """An engine whose tokens are written down: for each sequence the tokens that it draws."""

    end_tokens: frozenset[int] = frozenset()

    def __init__(self, scripts: Sequence[Sequence[int]]) -> None:
        self.scripts = scripts

    def generate(
        self, prompts: Any, sampling: Any, knobs: Any, on_token: Any, numbers: Any
    ) -> list[Continuation]:
        found = []
        for number, prompt in zip(numbers, prompts, strict=True):
            sequence = Continuation(number, list(prompt), Draws(0, number))
            script = iter(self.scripts[number])
            while not sequence.ended_by:
                token = next(script)
                add(sequence, token, -1.0)
                answer = on_token(sequence, token)
                answer = answer.result() if isinstance(answer, Future) else answer
                if isinstance(answer, str):
                    sequence.ended_by = answer
                for given in [] if isinstance(answer, str) else answer:
                    add(sequence, given, math.nan)
                if len(sequence.new) >= knobs.max_new_tokens:
                    sequence.ended_by = sequence.ended_by or "length"
            found.append(sequence)
        return found


def add(sequence: Continuation, token: int, value: float) -> None:
    sequence.new.append(token)
    sequence.drawn_log_probabilities.append(value)


def sampler(
    chat: ChatFormat, environment: Any, *scripts: Sequence[int], **limits: Any
) -> tuple[Sampler, Environments]:
    environments = Environments(environment)
    knobs = replace(KNOBS, max_new_tokens=limits.pop("max_new_tokens", 400))
    engine: Any = Scripted(scripts)
    return Sampler(engine, chat, environments, knobs, limits.get("max_context", 900)), environments


def solved(chat: ChatFormat, task: Row) -> tuple[list[int], list[int], str]:
    """What a policy must draw to solve a task, all ids of the episode, and their kinds."""
    family = build_family(task.environment)
    messages = list(family.start(task))
    drawn, ids, kinds = [], [], ""
    begin = chat.prompt(messages, task.tools, task.thinking)
    for message in family.solution(task):
        messages.append(message)
        if message.role != "assistant":
            continue
        before = chat.prompt(messages[:-1], task.tools, task.thinking)
        given = before[len(begin) + len(ids) :]
        turn = chat.render(messages, task.tools).ids.tolist()[len(before) : -1]
        drawn += turn
        ids += [*given, *turn]
        kinds += "e" * len(given) + "s" * len(turn)
    return drawn, ids, kinds


@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_episode_with_tools_is_its_conversation(chat: ChatFormat, level: int) -> None:
    """The ids are those of the whole conversation rendered at once; what the environment said and
    only that is marked as its."""
    tasks = rows("tools", Split.evaluation, 3, 2, level)
    solutions = [solved(chat, task) for task in tasks]
    scripts = [drawn for drawn, _, _ in solutions for _ in range(2)]
    player, environments = sampler(chat, build_family("tools"), *scripts)
    found = player.rollouts(tasks, 2, Sampling())
    assert [(r.group, r.sample, r.sequence) for r in found] == [
        (0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)
    ]  # fmt: skip
    for one in found:
        _, ids, kinds = solutions[one.group]
        assert (one.ids, one.kinds) == (ids, kinds) and one.passed
        assert one.turns == level + 1 + (level == 2) + (level == 3)
        messages = [*one.episode.prompt, *one.episode.turns]
        whole = chat.render(messages, one.row.tools).ids.tolist()
        assert one.prompt_ids + one.ids == whole[:-1], "all but the last line break"
        assert [math.isnan(v) for v in one.log_probabilities] == [k == "e" for k in kinds]
        assert one.text == chat.tokenizer.decode(ids)
        closes = one.turns
        assert one.thinking_tokens + one.answer_tokens + closes == kinds.count("s")
        assert not one.cut and not one.malformed_calls and one.episode.ended_by == EndedBy.stop
    assert len(environments.scored) == 4, "one score for each sample"


class Talks:
    """Answers every message with its length and the turn; scores the turns."""

    max_turns = 4

    def start(self, row: Row) -> list[Message] | Score:
        refused = row.metadata.get("refuse")
        return failed("not today", Verdict.error) if refused else list(row.messages)

    def step(self, episode: Episode) -> list[Message] | Score | None:
        said = episode.last.content
        if said == "stop":
            return None
        if said == "fail":
            return failed("the step failed", Verdict.timeout)
        if said == "raise":
            raise ZeroDivisionError("a bug of ours")
        return [Message("user", f"{len(said)} and {len(episode.turns)}")]

    def score(self, episode: Episode) -> Score:
        turns = sum(message.role == "assistant" for message in episode.turns)
        return Score(float(turns), {}, Verdict.passed)


def task(name: str, **fields: Any) -> Row:
    return Row(name, "talks", (Message("user", "hello"),), thinking=False, **fields)


def said(chat: ChatFormat, *texts: str) -> list[int]:
    """The ids of turns without thinking."""
    return [
        token
        for text in texts
        for token in (*chat.tokenizer.encode(text).tolist(), chat.special_ids[END])
    ]


def play(chat: ChatFormat, script: Sequence[int], **fields: Any) -> Rollout:
    limits = {n: fields.pop(n) for n in ("max_new_tokens", "max_context") if n in fields}
    player, environments = sampler(chat, Talks(), script, **limits)
    (found,) = player.rollouts([task("row", **fields)], 1, Sampling())
    known_before = found.score.verdict in (Verdict.error, Verdict.timeout)
    assert len(environments.scored) == (0 if known_before else 1)
    return found


def test_ids_are_never_encoded_again(chat: ChatFormat) -> None:
    """A turn in pieces that the tokenizer would not choose goes on as it was drawn."""
    whole = chat.tokenizer.encode("return self").tolist()
    pieces = [t for letter in "return self" for t in chat.tokenizer.encode(letter).tolist()]
    assert chat.tokenizer.decode(pieces) == "return self" and len(whole) < len(pieces)
    found = play(chat, [*pieces, chat.special_ids[END], *said(chat, "stop")])
    assert found.ids[: len(pieces)] == pieces
    other = play(chat, said(chat, "return self", "stop"))
    assert found.episode == other.episode and found.ids != other.ids
    assert found.kinds.count("e") == other.kinds.count("e") > 0


def test_how_an_episode_ends(chat: ChatFormat) -> None:
    stopped = play(chat, said(chat, "a", "stop"))
    assert (stopped.turns, stopped.reward, stopped.episode.ended_by) == (2, 2.0, EndedBy.stop)
    assert stopped.ids[-1] == chat.special_ids[END] and not stopped.cut
    turns = play(chat, said(chat, "a", "b", "c", "d"))
    assert (turns.turns, turns.episode.ended_by) == (4, EndedBy.turns)
    assert turns.kinds.endswith("s") and turns.episode.turns[-1].role == "user"
    failing = play(chat, said(chat, "a", "fail"))
    assert failing.score == failed("the step failed", Verdict.timeout)
    refused = play(chat, [], metadata={"refuse": True})
    assert refused.score == failed("not today", Verdict.error)
    assert refused.ids == refused.prompt_ids == [] and refused.kinds == refused.text == ""
    malformed = play(chat, [*said(chat, "a"), chat.special_ids[THINK_END], *said(chat, "b")])
    assert malformed.episode.last.fault and malformed.reward == 0
    assert malformed.malformed_thinking and malformed.turns == 2
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        play(chat, said(chat, "raise"))


@pytest.mark.parametrize("spare", range(12))
def test_length_limits_cut_at_any_place(chat: ChatFormat, spare: int) -> None:
    """Of tokens drawn and of the context: within a turn, within a reply, after it. What was drawn
    stays; a reply that leaves no room to answer it is left out."""
    script = said(chat, "abc", "def")
    prompt = len(play(chat, said(chat, "stop")).prompt_ids)
    whole = play(chat, [*script, *said(chat, "stop")])
    first = len(said(chat, "abc"))
    reply = whole.kinds.count("e") // 2
    most = [1, 2, first - 1, first, first + 1, first + reply - 1, first + reply, first + reply + 1]
    most += [first + reply + place for place in (2, 3, 4, 5)]
    by_tokens = play(chat, script, max_new_tokens=most[spare])
    by_context = play(chat, script, max_context=prompt + most[spare])
    for found in (by_tokens, by_context):
        assert found.ids == whole.ids[: len(found.ids)] and len(found.ids) <= most[spare]
        assert found.kinds == whole.kinds[: len(found.ids)]
        assert found.kinds.endswith("s"), "it never ends with what was not drawn"
        ended_turn = found.ids[-1] == chat.special_ids[END]
        assert found.cut == (found.episode.ended_by == EndedBy.length)
        assert found.cut and (ended_turn or len(found.ids) == most[spare])
        assert found.reward == 0


def test_a_prompt_without_room_is_refused(chat: ChatFormat) -> None:
    with pytest.raises(ConfigError, match=r"^row long of environment talks: its prompt has \d+"):
        sampler(chat, Talks(), [], max_context=9)[0].rollouts([task("long")], 1, Sampling())


# With a model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(groups: Any) -> Iterator[Any]:
    yield build(groups)


def sampled(model: Any, chat: ChatFormat, **changed: Any) -> Sampler:
    """The model may draw a few letters and the end of a turn."""
    letters = [chat.tokenizer.encode(letter).item() for letter in "abcd"]
    known = [*letters, chat.special_ids[END]]
    knobs = replace(KNOBS, max_new_tokens=100, **changed)
    return Sampler(Engine(model, known_ids=known), chat, Environments(Talks()), knobs, 200)


def compared(found: Sequence[Rollout]) -> list[Any]:
    fields = ("group", "sample", "sequence", "prompt_ids", "ids", "kinds", "episode", "score")
    return [tuple(getattr(one, name) for name in fields) for one in found]


TASKS = [task(f"row{number}", metadata={"refuse": number == 2}) for number in range(4)]
COUPLED = Sampling(temperature=4.0, seed=3, coupled=True)


def test_a_rollout_depends_on_its_number_alone(model: Any, chat: ChatFormat) -> None:
    """Not on the batch, on who samples the others, on drafts or on how fast environments answer."""
    whole = sampled(model, chat).rollouts(TASKS, 3, COUPLED, first_sequence=20)
    assert [one.sequence for one in whole] == list(range(20, 32))
    assert {one.episode.ended_by for one in whole} >= {EndedBy.length, EndedBy.turns}
    assert max(one.turns for one in whole) == 4
    for batch in (1, 7):
        again = sampled(model, chat, batch=batch).rollouts(TASKS, 3, COUPLED, first_sequence=20)
        assert compared(again) == compared(whole)
    parts = [
        one
        for rank in range(2)
        for one in sampled(model, chat).rollouts(
            TASKS[rank::2], 3, COUPLED, 20, groups=range(rank, 4, 2)
        )
    ]
    parts.sort(key=lambda one: (one.group, one.sample))
    assert compared(parts) == compared(whole)
    drafted = sampled(model, chat, speculative=True, batch=3).rollouts(TASKS, 3, COUPLED, 20)
    assert compared(drafted) == compared(whole)
    for one, other in zip(whole, drafted, strict=True):
        for kind, a, b in zip(
            one.kinds, one.log_probabilities, other.log_probabilities, strict=True
        ):
            assert (
                math.isnan(a) and math.isnan(b) if kind == "e" else a == pytest.approx(b, abs=1e-5)
            )


def test_other_samples_are_other_draws(model: Any, chat: ChatFormat) -> None:
    one, two = sampled(model, chat).rollouts(TASKS[:1], 2, COUPLED)
    assert one.ids != two.ids and one.prompt_ids == two.prompt_ids
    third = sampled(model, chat).rollouts(TASKS[:1], 2, replace(COUPLED, seed=4))[0]
    assert third.ids != one.ids
