"""The order of sources: exact shares, exact phase boundaries, and a state that survives JSON."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.blend import (
    DataState,
    Phase,
    check_state,
    exact_weights,
    fingerprint,
    schedule,
)

WEIGHTS = st.lists(
    st.floats(1e-3, 1e3).map(lambda weight: round(weight, 4)), min_size=1, max_size=8
)


def phase(weights: list[float], from_tokens: int = 0) -> Phase:
    names = [f"source{i}" for i in range(len(weights))]
    return Phase(from_tokens, tuple(zip(names, exact_weights(weights, "blend"), strict=True)))


def start(phases: list[Phase], sequence_length: int = 1) -> DataState:
    return DataState("train", sequence_length, 0, fingerprint(phases, 0))


@settings(deadline=None, max_examples=200)
@given(weights=WEIGHTS)
def test_every_prefix_is_within_one_sample_of_the_weights(weights: list[float]) -> None:
    """Second truth: the definition, in exact integers."""
    blend = phase(weights)
    draws, _ = schedule([blend], start([blend]), 300)
    total = sum(weight for _, weight in blend.weights)
    counts = dict.fromkeys((source for source, _ in blend.weights), 0)
    for length, draw in enumerate(draws, 1):
        assert draw.drawn == counts[draw.source]
        counts[draw.source] += 1
        for source, weight in blend.weights:
            assert abs(counts[source] * total - weight * length) < total


def test_decimal_weights_mean_what_they_say() -> None:
    assert exact_weights([0.1, 0.2, 0.7], "blend") == [1, 2, 7]
    draws, _ = schedule([phase([0.1, 0.2, 0.7])], start([phase([0.1, 0.2, 0.7])]), 1000)
    assert [sum(draw.source == f"source{i}" for draw in draws) for i in range(3)] == [100, 200, 700]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.phases\[0\]\.blend\[1\]\.weight"):
        exact_weights([1.0, weight], "data.phases[0].blend")


@settings(deadline=None)
@given(
    first=WEIGHTS,
    second=WEIGHTS,
    parts=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    sequence_length=st.integers(1, 7),
    from_tokens=st.integers(1, 300),
)
def test_taking_in_parts_and_through_json_equals_taking_at_once(
    first: list[float],
    second: list[float],
    parts: list[int],
    sequence_length: int,
    from_tokens: int,
) -> None:
    phases = [phase(first), phase(second, from_tokens)]
    begin = start(phases, sequence_length)
    at_once, end = schedule(phases, begin, sum(parts))
    draws, state = [], begin
    for part in parts:
        state = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
        check_state(
            phases, state, split="train", sequence_length=sequence_length, seed=0, knob="data"
        )
        more, state = schedule(phases, state, part)
        draws += more
    assert draws == at_once
    assert state == end
    assert state.tokens == sum(parts) * sequence_length


def test_a_phase_begins_at_the_first_sample_at_or_after_its_tokens() -> None:
    only = {name: Phase(tokens, ((name, 1),)) for name, tokens in (("a", 0), ("b", 25), ("c", 40))}
    draws, _ = schedule(list(only.values()), start(list(only.values()), 10), 6)
    # Samples start at 0, 10, 20, 30, 40, 50 tokens.
    assert [draw.source for draw in draws] == list("aaabcc")


@settings(deadline=None)
@given(first=WEIGHTS, second=WEIGHTS, switch=st.integers(1, 60))
def test_a_new_phase_keeps_its_own_shares(
    first: list[float], second: list[float], switch: int
) -> None:
    """Draws of the phase before do not count: every prefix after the switch is within one sample of
    the new weights."""
    phases = [phase(first), phase(second, switch)]
    draws, _ = schedule(phases, start(phases), switch + 100)
    total = sum(weight for _, weight in phases[1].weights)
    drawn = [draw.source for draw in draws[switch:]]
    for source, weight in phases[1].weights:
        for length in range(1, len(drawn) + 1):
            assert abs(drawn[:length].count(source) * total - weight * length) < total


def test_a_source_keeps_its_place_across_phases() -> None:
    a_and_b, only_b = Phase(0, (("a", 1), ("b", 1))), Phase(40, (("b", 1),))
    phases = [a_and_b, only_b, Phase(60, a_and_b.weights)]
    draws, end = schedule(phases, start(phases, 10), 10)
    for source in "ab":
        places = [draw.drawn for draw in draws if draw.source == source]
        assert places == list(range(len(places)))
        assert end.drawn[source] == len(places)


def state_after(phases: list[Phase], samples: int) -> DataState:
    return schedule(phases, start(phases, 10), samples)[1]


def check(phases: list[Phase], state: DataState, **changes: int) -> None:
    expected = {"sequence_length": 10, "seed": 0} | changes
    check_state(phases, state, split="train", knob="data.phases", **expected)


def test_a_later_phase_may_be_added_or_changed_on_resume() -> None:
    state = state_after([phase([1, 2])], 5)
    check([phase([1, 2]), phase([3, 1], 50)], state)
    check([phase([1, 2]), phase([3, 1], 90)], state)


def test_a_state_of_something_else_is_refused() -> None:
    phases = [phase([1, 2]), phase([2, 1], 70)]
    state = state_after(phases, 5)
    check(phases, state)
    with pytest.raises(ConfigError, match=r"data\.phases: .*another blend"):
        check([phase([1, 3]), phases[1]], state)
    with pytest.raises(ConfigError, match=r"source source1 is gone"):
        check([phase([1])], state)
    with pytest.raises(ConfigError, match=r"data\.phases\[1\]\.from_tokens=40: .*50 tokens"):
        check([phases[0], phase([2, 1], 40)], state)
    with pytest.raises(ConfigError, match=r"train\.sequence_length=20"):
        check(phases, state, sequence_length=20)
    with pytest.raises(ConfigError, match=r"train\.seed=1"):
        check(phases, state, seed=1)
    with pytest.raises(ConfigError, match="another blend"):  # the state's phase does not exist
        check(phases[:1], state_after(phases, 9))


def test_fingerprints_of_different_histories_differ() -> None:
    phases = [phase([1, 2]), phase([2, 1], 70), phase([1, 1], 90)]
    for before, after in pairwise(fingerprint(phases, i) for i in range(3)):
        assert before != after


@pytest.mark.parametrize(
    "change",
    [
        {"samples": -1},
        {"samples": 1.0},
        {"samples": True},
        {"phase": "0"},
        {"drawn": {"a": -1}},
        {"drawn": [1]},
        {"seed": None},
        {"extra": 1},
    ],
)
def test_damaged_json_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="data state"):
        DataState.from_dict(start([phase([1])]).to_dict() | change)


def test_ties_go_to_the_source_listed_first() -> None:
    """Three equal weights tie at most samples. The tie rule is part of a run's identity: another
    rule would read other samples after a resume."""
    blend = phase([1.0, 1.0, 1.0])
    draws, _ = schedule([blend], start([blend]), 6)
    assert [draw.source for draw in draws] == ["source0", "source1", "source2"] * 2
    # 1:2:1 by hand. First, source1 has the largest weight. It then has its share of two samples,
    # and source0 ties with source2. Then source0 has its share of three, and source1 (2 / 2) ties
    # with source2 (1 / 1). Last, source2 is left.
    blend = phase([1.0, 2.0, 1.0])
    draws, _ = schedule([blend], start([blend]), 4)
    assert [draw.source for draw in draws] == ["source1", "source0", "source1", "source2"]
