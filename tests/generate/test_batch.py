"""The listener of the decode loop: answers that come at once, or later as futures.

Second truths: the same answers given at once; the whole sequences scored by a forward pass. Not
covered: several ranks (tests/distributed/test_rollouts.py).
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from nemotron_train.generate.continuation import Answer, Continuation
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling

SAMPLING = Sampling(seed=5, coupled=True)
KNOBS = DecodingKnobs(max_new_tokens=14, batch=3)


@pytest.fixture(scope="module")
def model(groups: Any, build: Any) -> Any:
    return build(groups)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as opened:
        yield opened


def environment(number: int, length: int, token: int) -> Answer:
    """What a sequence is answered: now and then some ids, none, or its end."""
    draw = random.Random(f"{number} {length} {token}")
    kind = draw.randrange(6)
    if kind == 0:
        return [draw.randrange(512) for _ in range(draw.randint(1, 9))]
    if kind == 1 and length > 6:
        return "over"
    return ""


def outcome(sequences: list[Continuation]) -> list[Any]:
    return [(row.number, row.new, row.given, row.ended_by) for row in sequences]


@pytest.mark.parametrize("speculative", [False, True])
def test_futures_give_what_answers_at_once_give(
    model: Any, prompts: Any, pool: ThreadPoolExecutor, speculative: bool
) -> None:
    """The futures end in any order. What follows given ids is drawn after them."""
    knobs = replace(KNOBS, speculative=speculative)

    def later(sequence: Continuation, token: int) -> Answer | Future[Answer]:
        number, length = sequence.number, len(sequence.new)
        wait = random.Random(f"wait {number} {length}").choice([0, 0, 0.002])

        def answer() -> Answer:
            time.sleep(wait)
            return environment(number, length, token)

        return pool.submit(answer)

    def at_once(sequence: Continuation, token: int) -> Answer:
        return environment(sequence.number, len(sequence.new), token)

    texts = [*prompts, *prompts]
    numbers = [7, 1, 30, 4, 5, 2, 9, 11, 0, 3]
    found = Engine(model).generate(texts, SAMPLING, knobs, later, numbers)
    wanted = Engine(model).generate(texts, SAMPLING, replace(KNOBS, batch=10), at_once, numbers)
    assert outcome(found) == outcome(wanted)
    assert {row.ended_by for row in found} == {"over", "length"}
    assert any(any(row.given) for row in found)
    for row in found:
        assert len(row.new) <= KNOBS.max_new_tokens
        scored = Engine(model).log_probabilities([row.tokens])[0][-len(row.new) :]
        for ours, theirs, given in zip(row.log_probabilities, scored, row.given, strict=True):
            assert given or ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("speculative", [False, True])
def test_the_futures_of_a_round_are_awaited_together(
    model: Any, pool: ThreadPoolExecutor, speculative: bool
) -> None:
    """Each of four answers waits until all four were asked for."""
    barrier = threading.Barrier(4)

    def on_token(sequence: Continuation, token: int) -> Answer | Future[Answer]:
        def answer() -> Answer:
            barrier.wait(timeout=20)
            return "over"

        return pool.submit(answer) if len(sequence.new) == 1 else ""

    prompts = [[number, 3] for number in range(4)]
    knobs = DecodingKnobs(max_new_tokens=4, batch=4, speculative=speculative)
    sequences = Engine(model).generate(prompts, SAMPLING, knobs, on_token)
    assert [row.ended_by for row in sequences] == ["over"] * 4


def _failed() -> Future[Answer]:
    future: Future[Answer] = Future()
    future.set_exception(ZeroDivisionError("of the environment"))
    return future


def test_an_exception_of_a_future_reaches_the_caller(model: Any, prompts: Any) -> None:
    def on_token(sequence: Continuation, token: int) -> Answer | Future[Answer]:
        return _failed() if sequence.number == 2 else ""

    with pytest.raises(ZeroDivisionError, match="of the environment"):
        Engine(model).generate(prompts, SAMPLING, KNOBS, on_token)


@pytest.mark.parametrize("as_future", [False, True])
def test_each_of_several_ids_ends_a_sequence_unless_ids_are_given(
    model: Any, prompts: Any, as_future: bool
) -> None:
    """Which of the ids was drawn does not matter. Ids after it let the sequence go on."""
    sampling = Sampling(seed=5)
    whole = Engine(model).generate(prompts, sampling, KNOBS)
    ends = (whole[1].new[4], whole[2].new[2])

    def run(listener: Callable[[Continuation, int], Any] | None) -> list[Continuation]:
        return Engine(model, ends).generate(prompts, sampling, KNOBS, listener)

    for row, free in zip(run(None), whole, strict=True):
        places = [place for place, token in enumerate(free.new) if token in ends]
        assert row.new == (free.new[: places[0] + 1] if places else free.new)
        assert row.ended_by == ("end" if places else "length")

    def go_on(sequence: Continuation, token: int) -> Any:
        answer: Answer = [9] if token in ends else ""
        if not as_future:
            return answer
        future: Future[Answer] = Future()
        future.set_result(answer)
        return future

    rows = run(go_on)
    assert all(row.ended_by == "length" and len(row.new) == 14 for row in rows)
    for row in rows:
        for place, token in enumerate(row.new[:-1]):
            follows = token in ends and not row.given[place]
            assert row.given[place + 1] == follows and (not follows or row.new[place + 1] == 9)
    assert any(any(row.given) for row in rows)
