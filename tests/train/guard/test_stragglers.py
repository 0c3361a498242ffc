"""When a slow rank is named. tests/distributed/test_layouts.py covers the gathering over ranks."""

import pytest

from nemotron_train.train.guard.stragglers import Stragglers


@pytest.fixture
def stragglers(groups: object) -> Stragglers:
    return Stragglers(1, 1.5, "cpu")


def lines(stragglers: Stragglers, measures: list[list[float]]) -> list[bool]:
    stragglers._hosts = [f"node{rank}" for rank in range(4)]
    return [bool(stragglers.judge(seconds)[1]) for seconds in measures]


def test_a_lasting_straggler_is_named_once_in_three_measures(stragglers: Stragglers) -> None:
    assert lines(stragglers, [[1, 1, 1.8, 1.1]] * 7) == [False, False, True] * 2 + [False]
    stragglers.judge([1, 1, 2, 1])
    metrics, line = stragglers.judge([1.0, 1.0, 2.0, 1.0])
    assert metrics == {"slowest_rank": 2, "straggler_ratio": 2.0}
    assert "rank 2 on node2" in line and "2.00 s, the median rank's 1.00 s" in line


def test_one_slow_step_or_changing_ranks_are_not(stragglers: Stragglers) -> None:
    slow = {rank: [1.0 + (other == rank) for other in range(4)] for rank in range(4)}
    even = [1.0, 1.0, 1.0, 1.4]
    assert not any(lines(stragglers, [slow[2], slow[2], even, slow[2], slow[2], slow[1], slow[2]]))


def test_of_two_ranks_the_faster_is_the_measure(stragglers: Stragglers) -> None:
    assert stragglers.judge([3.0, 1.0])[0] == {"slowest_rank": 0, "straggler_ratio": 3.0}


def test_a_rank_alone_measures_nothing(stragglers: Stragglers) -> None:
    assert not stragglers.is_due(1)
