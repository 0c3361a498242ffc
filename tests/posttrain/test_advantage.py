"""Advantages of given rewards: closed forms, groups, flags. That their mean over samples gives the
right gradient is in test_enumeration.py."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.grpo_knobs import AdvantageKnobs, Baseline, Deviation
from nemotron_train.posttrain.advantage import (
    Advantages,
    Outcome,
    advantage_metrics,
    compute_advantages,
)

PLAIN = AdvantageKnobs()
SCALED = AdvantageKnobs(deviation=Deviation.group)
OTHERS = AdvantageKnobs(baseline=Baseline.leave_one_out)


def of_rewards(rewards: list[float | None], knobs: AdvantageKnobs = PLAIN) -> np.ndarray:
    """Advantages of one group."""
    return compute_advantages([Outcome("g", reward) for reward in rewards], knobs).advantage


def test_by_hand() -> None:
    assert of_rewards([1, 0, 0, 1]).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert of_rewards([1, 0, 0, 0], OTHERS) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def test_one_winner_in_sixteen() -> None:
    """The deviation of the group gives 3.75 and -0.25, whose sum is 0. One that leaves the sample
    out, which is not offered, gives the losers -0.258 and the winner a division by 0; with its
    difference kept as it is, 1, the sum is -2.87."""
    rewards = [1.0] + [0.0] * 15
    found = of_rewards(rewards, SCALED)
    assert found == pytest.approx([3.75] + [-0.25] * 15) and sum(found) == pytest.approx(0)
    both = of_rewards(rewards, replace(SCALED, baseline=Baseline.leave_one_out))
    assert both == pytest.approx(16 / 15 * found)
    others = [1.0] + [0.0] * 14
    loser = -statistics.mean(others) / statistics.stdev(others)
    assert loser == pytest.approx(-0.258, abs=1e-3)
    assert 1 + 15 * loser == pytest.approx(-2.87, abs=5e-3)
    assert statistics.stdev([0.0] * 15) == 0


REWARDS = st.lists(st.sampled_from([0.0, 1.0, 0.25, -2.0, 0.1, 1 / 3]), min_size=1, max_size=9)


@given(REWARDS)
@settings(max_examples=100, deadline=None)
def test_by_pythons_statistics(rewards: list[float]) -> None:
    """Sums of all but the leave-one-out baseline's are 0 as well: it only scales."""
    plain, scaled, others = (of_rewards(rewards, knobs) for knobs in (PLAIN, SCALED, OTHERS))
    for place, reward in enumerate(rewards):
        rest = rewards[:place] + rewards[place + 1 :]
        assert plain[place] == pytest.approx(reward - statistics.mean(rewards))
        if len(set(rewards)) > 1:
            assert others[place] == pytest.approx(reward - statistics.mean(rest))
            assert scaled[place] == pytest.approx(plain[place] / statistics.stdev(rewards))
    for found in (plain, scaled, others):
        assert sum(found) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("knobs", [PLAIN, SCALED, OTHERS])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e-300, -7.3, 1e300])
@pytest.mark.parametrize("count", [1, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(knobs: AdvantageKnobs, reward: float, count: int) -> None:
    """Also where a mean is not exact, and where only one sample of the group has a reward."""
    assert not of_rewards([reward] * count, knobs).any()
    assert not of_rewards([reward, *[None] * count], knobs).any()


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e200])
def test_the_deviation_has_no_size(size: float) -> None:
    """Small differences are differences: they are not taken for rounding. Squares of large ones do
    not overflow."""
    assert of_rewards([0.0, size, size], SCALED) == pytest.approx(of_rewards([0, 1, 1], SCALED))


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_groups_are_ids_in_any_order(data: st.DataObject) -> None:
    """Two rows with the same prompt are two groups, and a shuffle changes no bit."""
    outcomes = [
        Outcome(group, reward, tokens=place)
        for group in ("same prompt, row 1", "same prompt, row 2", 3, (4, 1))
        for place, reward in enumerate(data.draw(REWARDS))
    ]
    knobs = data.draw(st.sampled_from([PLAIN, SCALED, OTHERS]))
    found = compute_advantages(outcomes, knobs).advantage
    order = data.draw(st.permutations(range(len(outcomes))))
    shuffled = compute_advantages([outcomes[place] for place in order], knobs).advantage
    assert shuffled.tolist() == [found[place] for place in order]
    for group in {outcome.group for outcome in outcomes}:
        alone = [outcome for outcome in outcomes if outcome.group == group]
        expected = compute_advantages(alone, knobs).advantage.tolist()
        assert [a for o, a in zip(outcomes, found, strict=True) if o.group == group] == expected


def test_a_reward_that_does_not_apply_leaves_the_baseline() -> None:
    result = compute_advantages([Outcome(1, r) for r in (1.0, None, 0.0, None, 0.0)], PLAIN)
    assert result.advantage == pytest.approx([2 / 3, 0, -1 / 3, 0, -1 / 3])
    assert result.weight.tolist() == [1, 0, 1, 0, 1]
    assert np.isnan(result.reward).tolist() == [False, True, False, True, False]


def test_the_overlong_filter_keeps_the_baseline() -> None:
    outcomes = [Outcome(1, 1.0), Outcome(1, 0.0, truncated=True), Outcome(1, 0.0)]
    result = compute_advantages(outcomes, PLAIN)
    assert result.advantage == pytest.approx([2 / 3, 0, -1 / 3])
    assert result.weight.tolist() == [1, 0, 1]
    off = compute_advantages(outcomes, AdvantageKnobs(overlong_filter=False))
    assert off.advantage == pytest.approx([2 / 3, -1 / 3, -1 / 3]) and off.weight.all()


def test_the_clip() -> None:
    """One winner in 1,024 has 31.97 deviations."""
    rewards = [1.0] + [0.0] * 1023
    assert of_rewards(rewards, SCALED).max() == 20.0
    wide = replace(SCALED, advantage_clip=50.0)
    assert of_rewards(rewards, wide).max() == pytest.approx(1023 / 32)
    assert of_rewards([-reward for reward in rewards], SCALED).min() == -20.0


def test_malformed_samples() -> None:
    """The advantage is set, whatever the reward; the others' baseline counts the reward. Nothing is
    set without the knobs, and nothing of a sample that is not trained."""
    outcomes = [
        Outcome(1, 1.0, malformed_thinking=True),
        Outcome(1, 1.0, malformed_call=True),
        Outcome(1, 1.0, malformed_call=True, malformed_thinking=True),
        Outcome(1, 0.0),
        Outcome(1, 0.0, malformed_call=True, truncated=True),
        Outcome(1, None, malformed_call=True),
    ]
    base = [0.4, 0.4, 0.4, -0.6, 0, 0]
    assert compute_advantages(outcomes, PLAIN).advantage == pytest.approx(base)
    thinking = AdvantageKnobs(malformed_thinking_advantage=-5)
    assert compute_advantages(outcomes, thinking).advantage == pytest.approx(
        [-5, 0.4, -5, -0.6, 0, 0]
    )
    call = AdvantageKnobs(malformed_call_advantage=-3)
    assert compute_advantages(outcomes, call).advantage == pytest.approx([0.4, -3, -3, -0.6, 0, 0])
    both = AdvantageKnobs(malformed_call_advantage=-3, malformed_thinking_advantage=-5)
    assert compute_advantages(outcomes, both).advantage == pytest.approx([-5, -3, -5, -0.6, 0, 0])


def test_groups_without_a_signal_can_leave_the_count() -> None:
    outcomes = [Outcome("zero", 0.0)] * 2 + [Outcome("mixed", 0.0), Outcome("mixed", 1.0)]
    outcomes += [Outcome("full", 1.0), Outcome("full", 1.0, malformed_thinking=True)]
    assert compute_advantages(outcomes, PLAIN).weight.tolist() == [1] * 6
    knobs = AdvantageKnobs(drop_trivial=True, malformed_thinking_advantage=-1)
    result = compute_advantages(outcomes, knobs)
    assert result.weight.tolist() == [0, 0, 1, 1, 0, 1]
    assert result.advantage.tolist() == [0, 0, -0.5, 0.5, 0, -1]


def test_low_effort() -> None:
    """A right answer of 0 tokens gains half its reward, one of 64 a quarter, one of 128 or more
    nothing. A wrong one and one of another effort gain nothing, whatever their length."""
    rewards = [(1.0, 0), (1.0, 64), (1.0, 128), (1.0, 900), (0.0, 0), (-1.0, 0), (0.5, 64)]
    outcomes = [Outcome(1, reward, tokens, effort="low") for reward, tokens in rewards]
    found = compute_advantages(outcomes, PLAIN).reward.tolist()
    assert found == [1.5, 1.25, 1.0, 1.0, 0.0, -1.0, 0.625]
    for other in ("", "medium", "Low"):
        same = compute_advantages([replace(o, effort=other) for o in outcomes], PLAIN).reward
        assert same.tolist() == [reward for reward, _ in rewards]
    off = compute_advantages(outcomes, AdvantageKnobs(low_effort_weight=0)).reward
    assert off.tolist() == [reward for reward, _ in rewards]
    knobs = AdvantageKnobs(low_effort_weight=1.0, low_effort_tokens=256)
    assert compute_advantages(outcomes, knobs).reward[1] == 1.75


def test_low_effort_makes_a_signal_among_right_answers() -> None:
    """All right, of different lengths: the shorter is better; all wrong: no signal."""
    right = [Outcome(1, 1.0, tokens, effort="low") for tokens in (10, 90)]
    result = compute_advantages(right, AdvantageKnobs(drop_trivial=True))
    assert result.advantage[0] > 0 > result.advantage[1] and result.weight.all()
    wrong = [replace(outcome, reward=0.0) for outcome in right]
    assert not compute_advantages(wrong, PLAIN).advantage.any()


def test_metrics() -> None:
    """Shares of groups by the rewards of the environment, without the length reward."""
    groups = {"a": [0, 0], "b": [1, 1], "c": [1, 0], "d": [0.5, 0.5, None], "e": [None]}
    outcomes = [Outcome(g, r, effort="low") for g, rewards in groups.items() for r in rewards]
    outcomes[0] = replace(outcomes[0], truncated=True)
    advantages = Advantages(
        np.array([9.0, 0, 0, 0, 2.0, -0.5, 0, 0, 9.0, 9.0]),
        np.array([0.0, 1, 1, 1, 1, 1, 1, 1, 0, 0]),
        np.full(10, 7.0),
    )
    assert advantage_metrics(outcomes, advantages) == pytest.approx(
        {
            "reward": 4 / 8,
            "groups_zero": 1 / 4,
            "groups_full": 1 / 4,
            "groups_mixed": 2 / 4,
            "groups_trivial": 3 / 4,
            "advantage_sum": 1.5,
            "advantage_mean": 1.5 / 7,
            "advantage_min": -0.5,
            "advantage_max": 2.0,
        }
    )


def test_nothing_to_count() -> None:
    assert compute_advantages([], PLAIN).advantage.shape == (0,)
    metrics = advantage_metrics([], compute_advantages([], PLAIN))
    assert metrics.pop("advantage_sum") == 0 and all(map(math.isnan, metrics.values()))


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    with pytest.raises(ValueError, match="in group g"):
        of_rewards([0.0, reward])
