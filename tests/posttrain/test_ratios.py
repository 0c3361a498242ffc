"""Ratios: exact in every step and over all steps, with fractions and Hamilton's method written out
again as the second truth.
"""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.errors import ConfigError
from nemotron_train.posttrain.environments.families import FAMILY_NAMES
from nemotron_train.posttrain.knobs import EnvironmentConfig, check_environments
from nemotron_train.posttrain.ratios import step_counts, step_ranges

RATIOS = st.lists(st.sampled_from([0, 0.05, 0.3, 1, 2, 7.5]), min_size=1, max_size=5).filter(any)


def named(ratios: list[float]) -> dict[str, float]:
    return dict(zip(FAMILY_NAMES, ratios, strict=False))


@given(RATIOS, st.integers(1, 24), st.integers(0, 40), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_counts_add_up(ratios: list[float], total: int, step: int, seed: int) -> None:
    """Each count is its share rounded down or up, and a ratio of 0 never gives one."""
    counts = step_counts(named(ratios), total, seed, step)
    assert sum(counts.values()) == total and list(counts) == list(named(ratios))
    for name, ratio in named(ratios).items():
        share = total * ratio / sum(ratios)
        assert math.floor(share - 1e-9) <= counts[name] <= math.ceil(share + 1e-9)
        assert ratio or not counts[name]
    assert counts == step_counts(named(ratios), total, seed, step)


@given(RATIOS, st.integers(1, 24))
@settings(max_examples=20, deadline=None)
def test_the_first_step_is_largest_remainder(ratios: list[float], total: int) -> None:
    """Hamilton's method by sorting: the counts of the first step, up to ties."""
    exact = [Fraction(str(float(ratio))) for ratio in ratios]
    quotas = [total * ratio / sum(exact) for ratio in exact]
    left = total - sum(map(math.floor, quotas))
    remainders = sorted((quota % 1 for quota in quotas), reverse=True)[:left]
    counts = list(step_counts(named(ratios), total, 0, 0).values())
    given = [q % 1 for q, count in zip(quotas, counts, strict=True) if count > math.floor(q)]
    assert sorted(given, reverse=True) == remainders


def test_small_ratios_get_their_turn() -> None:
    """2 % of 4 prompts is none by rounding in each step alone."""
    ratios = {"arithmetic": 0.98, "strings": 0.02}
    total = sum(step_counts(ratios, 4, 0, step)["strings"] for step in range(300))
    assert total == 24  # 2 % of 1,200


def test_ties_depend_on_the_seed() -> None:
    ratios = {"arithmetic": 1, "strings": 1, "tools": 1}
    first = {tuple(step_counts(ratios, 1, seed, 0).values()) for seed in range(20)}
    assert len(first) == 3


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ({"arithmetic": 0, "strings": 0.0}, "no ratio is above 0"),
        ({}, "no environment is named"),
        ({"arithmetic": -1}, "ratio of environment arithmetic: -1"),
        ({"arithmetic": float("nan")}, "ratio of environment arithmetic: nan"),
        ({"arithmetic": float("inf")}, "inf"),
        ({"arithmetic": True}, "True"),
        ({"arithmetic": "1"}, "ratio of environment arithmetic"),
        ({"sums": 1}, "environment sums: there are"),
    ],
)
def test_wrong_ratios(ratios: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        step_counts(ratios, 4, 0, 0)


@given(RATIOS, st.integers(1, 9), st.integers(0, 300), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_each_row_is_given_once_in_order(
    ratios: list[float], total: int, first_step: int, seed: int
) -> None:
    """Also where a run resumes: the ranges of following steps join, and begin with row 0."""
    assert all(
        numbers.start == 0 for numbers in step_ranges(named(ratios), total, seed, 0).values()
    )
    before = step_ranges(named(ratios), total, seed, first_step)
    after = step_ranges(named(ratios), total, seed, first_step + 1)
    for name, ratio in named(ratios).items():
        assert after[name].start == before[name].stop
        share = (first_step + 1) * total * ratio / sum(ratios)
        assert abs(before[name].stop - share) < len(ratios)


@pytest.mark.parametrize(
    ("environments", "words"),
    [
        ({"arithmetic": EnvironmentConfig(ratio=0)}, "no ratio is above 0"),
        ({}, "no environment is named"),
        ({"arithmetic": EnvironmentConfig(ratio=-1)}, "ratio of environment arithmetic: -1"),
        ({"arithmetic": EnvironmentConfig(level=4)}, "environments.arithmetic.level=4"),
        ({"mine:exact": EnvironmentConfig()}, "environments.mine:exact.rows is empty"),
        ({"mathematics": EnvironmentConfig()}, "environments.mathematics.rows is empty"),
        ({"sums": EnvironmentConfig()}, "environment sums: there are"),
    ],
)
def test_wrong_knobs(environments: dict[str, EnvironmentConfig], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_environments(environments)


def test_good_knobs() -> None:
    environments = {"tools": EnvironmentConfig(2.0, 3), "a:b": EnvironmentConfig(0, 1, "r.jsonl")}
    assert check_environments(environments) == {"tools": 2.0, "a:b": 0}
