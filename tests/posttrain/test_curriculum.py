"""The curriculum: the draw against exact probabilities, its state, its form as JSON."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.grpo_knobs import CurriculumKind, CurriculumKnobs
from nemotron_train.data.permutation import key64
from nemotron_train.posttrain.curriculum import (
    CurriculumState,
    Visit,
    draw_prompts,
    is_resting,
    pass_rates,
    rate_mean,
)

IDS = [f"row/{number}" for number in range(8)]
KNOBS = CurriculumKnobs()
UNIFORM = CurriculumKnobs(curriculum=CurriculumKind.uniform)


def known(passes: dict[int, int], step: int = 0) -> CurriculumState:
    """Rows with so many passes of 8 in their newest visit."""
    state = CurriculumState()
    state.observe(step, [("e", IDS[row], 8, count) for row, count in passes.items()])
    return state


def draw(state: CurriculumState, count: int, step: int = 1, **other: Any) -> list[int]:
    """Rows of a step of a run of 11, environment e."""
    values = {"environment": "e", "ids": IDS, "total_steps": 11, "seed": 3, "knobs": KNOBS}
    return draw_prompts(state, count=count, step=step, **{**values, **other})


def test_the_mean_falls_linearly() -> None:
    means = [rate_mean(KNOBS, step, 11) for step in range(13)]
    assert means == pytest.approx([0.8 - 0.06 * step for step in range(11)] + [0.2, 0.2])
    assert rate_mean(KNOBS, 0, 1) == 0.8


@pytest.mark.parametrize("step", [0, 10])
def test_a_draw_has_the_gaussians_probabilities(step: int) -> None:
    """Two of five rows with pass rates 0, 1/4, 1/2 (not known), 3/4, 7/8, in order, 6,000 times,
    against the exact probability of each ordered pair: the first in proportion to its weight, the
    second to those that are left. Chi-square with 19 degrees of freedom, 0.1 % bound."""
    rates, mean = np.array([0, 0.25, 0.5, 0.75, 0.875]), 0.8 if step == 0 else 0.2
    weight = np.exp(-((rates - mean) ** 2) / (2 * 0.2**2))
    state = known({0: 0, 1: 2, 3: 6, 4: 7})
    count = 6000
    found = Counter(tuple(draw(state, 2, step, ids=IDS[:5], seed=seed)) for seed in range(count))
    chi_square = 0.0
    for pair in itertools.permutations(range(5), 2):
        first, second = weight[list(pair)]
        expected = count * first / weight.sum() * second / (weight.sum() - first)
        chi_square += (found[pair] - expected) ** 2 / expected
    assert sum(found.values()) == count and chi_square < 43.8


def test_uniform_knows_nothing_of_pass_rates() -> None:
    state = known({0: 0, 1: 1, 2: 7})
    found = Counter(
        draw(state, 1, ids=IDS[:4], seed=seed, knobs=UNIFORM)[0] for seed in range(2000)
    )
    assert sum((found[row] - 500) ** 2 / 500 for row in range(4)) < 16.3


@pytest.mark.parametrize("kind", list(CurriculumKind))
def test_no_prompt_is_repeated_while_there_are_others(kind: CurriculumKind) -> None:
    knobs = CurriculumKnobs(curriculum=kind)
    state = known({0: 8, 1: 8, 2: 3})
    for seed in range(20):
        rows = draw(state, 8, seed=seed, knobs=knobs)
        assert sorted(rows) == list(range(8)) and set(rows[6:]) == {0, 1}
        more = draw(state, 19, seed=seed, knobs=knobs)
        assert more == (rows * 3)[:19]
    assert draw(state, 0) == []


def test_solved_prompts_rest_and_come_back() -> None:
    """8 of 8 at step 5 and 100 steps of rest: not drawn from step 6 to 105, drawn again at 106."""
    state = known({0: 8, 1: 7}, step=5)
    ids = IDS[:2]
    for step, rests in ((6, True), (105, True), (106, False)):
        assert is_resting(state, "e", ids, step, KNOBS).tolist() == [rests, False]
        knobs = CurriculumKnobs(rate_mean_start=1.0, rate_mean_end=1.0, rate_deviation=0.01)
        assert (draw(state, 1, step, ids=ids, knobs=knobs) == [1]) == rests
    never = CurriculumKnobs(solved_rest_steps=0)
    assert not is_resting(state, "e", ids, 6, never).any()
    assert not is_resting(state, "f", ids, 6, KNOBS).any()  # the same id elsewhere


def test_pass_rates_are_those_of_the_newest_visit() -> None:
    state = known({0: 8, 1: 2}, step=3)
    state.observe(7, [("e", IDS[0], 4, 1)])
    assert pass_rates(state, "e", IDS[:3], KNOBS).tolist() == [0.25, 0.25, 0.5]
    assert not is_resting(state, "e", IDS, 8, KNOBS).any()
    assert pass_rates(state, "f", IDS[:1], CurriculumKnobs(rate_prior=0.7)).tolist() == [0.7]


def test_observations() -> None:
    """A prompt that is drawn twice in a step is one visit, a step that is observed again replaces
    itself, an older one is ignored, and rollouts that were not judged say nothing."""
    state = CurriculumState()
    outcomes = [("e", "a", 8, 2), ("e", "a", 8, 6), ("e", "b", 0, 0), ("f", "a", 3, 0)]
    for _ in range(2):
        state.observe(4, outcomes)
        assert state.visits == {"e": {"a": Visit(16, 8, 4)}, "f": {"a": Visit(3, 0, 4)}}
    state.observe(3, [("e", "a", 8, 8)])
    assert state.visits["e"]["a"] == Visit(16, 8, 4)
    for attempts, passes in ((8, 9), (8, -1)):
        with pytest.raises(ValueError, match="e a: "):
            state.observe(5, [("e", "a", attempts, passes)])


def test_a_draw_depends_on_seed_step_and_environment() -> None:
    ids = [str(number) for number in range(1000)]
    state = CurriculumState()
    base = draw(state, 20, ids=ids)
    assert base == draw(CurriculumState(), 20, ids=ids)
    for other in ({"seed": 4}, {"step": 2}, {"environment": "f"}):
        assert len(set(draw(state, 20, ids=ids, **other)) & set(base)) < 5
    first = draw(state, 5, ids=ids)
    assert first == base[:5]


def philox4x64(key: int, block: int) -> list[int]:
    """Four words of Philox4x64-10 (Salmon et al. 2011), in Python's integers."""
    c, k0, k1 = [block, 0, 0, 0], key, 0
    for _ in range(10):
        product_0, product_1 = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        high_0, high_1 = product_0 >> 64, product_1 >> 64
        c = [high_1 ^ c[1] ^ k0, product_1 % 2**64, high_0 ^ c[3] ^ k1, product_0 % 2**64]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
    return c


@pytest.mark.parametrize("step", range(5))
def test_the_words_are_those_of_philox(step: int) -> None:
    """Of the key of seed, step and environment, whatever NumPy's version is. Without a state all
    weights are equal, and the order is that of the words. A pool that grows keeps its noise."""
    key = key64("curriculum", 3, step, "e")
    words = [word for block in (1, 2) for word in philox4x64(key, block)]
    expected = sorted(range(8), key=lambda row: -words[row])
    assert draw(CurriculumState(), 8, step) == expected
    smaller = draw(CurriculumState(), 5, step, ids=IDS[:5])
    assert smaller == [row for row in expected if row < 5]


def test_no_weight_is_rounded_to_zero() -> None:
    """A deviation of 0.001: exp(-320,000) is 0, and the nearest pass rate is drawn all the same."""
    state = known({row: row for row in range(8)})
    knobs = CurriculumKnobs(rate_deviation=0.001)
    for seed in range(20):
        assert draw(state, 8, 10, seed=seed, knobs=knobs) == [2, 1, 3, 0, 4, 5, 6, 7]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["e", "mine:f"]),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
            st.integers(0, 9),
            st.integers(0, 9),
            st.integers(0, 5),
        ),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_json_round_trip(entries: list[tuple[str, str, int, int, int]]) -> None:
    """Exact, and the text does not depend on the order in which prompts were first seen."""
    state, turned = CurriculumState(), CurriculumState()
    for environment, row, attempts, passes, step in entries:
        state.observe(step, [(environment, row, attempts, min(passes, attempts))])
    for environment in reversed(state.visits):
        rows = state.visits[environment]
        turned.visits[environment] = {row: rows[row] for row in reversed(rows)}
    text = state.to_json()
    again = CurriculumState.from_json(text, "curriculum.json")
    assert again == state and again.to_json() == text == turned.to_json() and "\n" not in text


def test_the_form_of_the_file() -> None:
    state = known({0: 3}, step=2)
    text = '{"environments":{"e":{"row/0":[8,3,2]}},"version":1}'
    assert state.to_json() == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "an object with version and environments"),
        ('{"version":1}', "an object with version and environments"),
        ('{"version":2,"environments":{}}', "version is 2; this program reads 1"),
        ('{"version":true,"environments":{}}', "version is true"),
        ('{"version":1,"environments":[]}', "environments must be an object"),
        ('{"version":1,"environments":{"e":3}}', "environments.e must be an object"),
        ('{"version":1,"environments":{"e":{"a":[8,3]}}}', r"environments.e.a must be \[attempts"),
        ('{"version":1,"environments":{"e":{"a":[8,9,1]}}}', r"not \[8, 9, 1\]"),
        ('{"version":1,"environments":{"e":{"a":[0,0,1]}}}', r"not \[0, 0, 1\]"),
        ('{"version":1,"environments":{"e":{"a":[8,-1,1]}}}', r"not \[8, -1, 1\]"),
        ('{"version":1,"environments":{"e":{"a":[8,3,-1]}}}', r"not \[8, 3, -1\]"),
        ('{"version":1,"environments":{"e":{"a":[8,3.0,1]}}}', r"not \[8, 3.0, 1\]"),
        ('{"version":1,"environments":{"e":{"a":[8,true,1]}}}', r"not \[8, true, 1\]"),
        ('{"version":1,"environments":{"e":{"a":[1e999,1,1]}}}', "must be"),
        (f'{{"version":1,"environments":{{"e":{{"a":[{10**400},1,1]}}}}}}', "must be"),
        ('{"version":1,"environments":{"e":{"a":[8,3,1],"a":[8,3,1]}}}', "a name is there twice"),
        ('{"version":1,"environments":{"e\\u001b[2J":3}}', r"environments.e\\x1b\[2J must be"),
    ],
)
def test_another_file_is_refused(text: str, words: str) -> None:
    """In one line that names the file."""
    with pytest.raises(ConfigError, match=words) as refused:
        CurriculumState.from_json(text, "runs/a/curriculum.json")
    assert str(refused.value).startswith("runs/a/curriculum.json: ")
    message = str(refused.value)
    assert len(message) < 200 and "\n" not in message and "\x1b" not in message


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="environment e has no prompts"):
        draw(CurriculumState(), 1, ids=[])


def test_over_a_run_easy_prompts_come_first() -> None:
    """Rows with pass rates 0 to 7 of 8: the mean pass rate of what is drawn follows the mean."""
    ids = [str(number) for number in range(400)]
    state = CurriculumState()
    state.observe(0, [("e", row, 8, number % 8) for number, row in enumerate(ids)])
    rates = pass_rates(state, "e", ids, KNOBS)
    drawn = [
        np.mean([rates[draw(state, 16, step, ids=ids, seed=seed)].mean() for seed in range(10)])
        for step in range(11)
    ]
    grid = np.arange(8) / 8
    for step, found in enumerate(drawn):
        weight = np.exp(-((grid - (0.8 - 0.06 * step)) ** 2) / 0.08)
        assert found == pytest.approx(weight @ grid / weight.sum(), abs=4 * 0.2 / math.sqrt(160))
