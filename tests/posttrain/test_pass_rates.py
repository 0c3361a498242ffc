"""pass@k and its intervals.

Second truths: every subset of the samples, counted; simulated prompts whose rates are known. Not
covered: prompts that are not drawn independently.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from nemotron_train.posttrain.pass_rates import mean_difference, mean_rate, pass_at_k

PASSED = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=7))
RATES = arrays(np.float64, st.integers(1, 12), elements=st.sampled_from([0, 0.25, 0.5, 0.75, 1]))


@given(passed_Pn=PASSED, data=st.data())
@settings(max_examples=60, deadline=None)
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(
    passed_Pn: np.ndarray, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, passed_Pn.shape[1]))
    for passed_n, estimate in zip(passed_Pn, pass_at_k(passed_Pn, k), strict=True):
        subsets = list(itertools.combinations(passed_n.tolist(), k))
        assert estimate == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("k", [0, 4])
def test_more_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of 3 samples"):
        pass_at_k(np.zeros((2, 3), dtype=bool), k)


def test_many_samples_do_not_overflow() -> None:
    passed_Pn = np.arange(2000)[None] < 1000
    assert pass_at_k(passed_Pn, 1)[0] == 0.5
    assert pass_at_k(passed_Pn, 1000)[0] == 1.0


@given(rates_P=RATES, samples=st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_an_interval_of_a_rate_holds_it_within_0_and_1(rates_P: np.ndarray, samples: int) -> None:
    estimate = mean_rate(rates_P, samples)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.value == pytest.approx(rates_P.mean(), abs=1e-12)
    assert estimate.high - estimate.low > 0.01, "also where all prompts agree"


@given(before_P=RATES)
@settings(max_examples=30, deadline=None)
def test_no_difference_is_exactly_none(before_P: np.ndarray) -> None:
    estimate = mean_difference(before_P, before_P)
    assert estimate.value == 0.0
    assert -1 <= estimate.low < 0 < estimate.high <= 1 and estimate.low == -estimate.high


def _prompts(draw: np.random.Generator, mean: float, worth: float, count: int) -> np.ndarray:
    """Rates of prompts: beta with this mean. The smaller `worth`, the more a prompt decides."""
    return draw.beta(mean * worth, (1 - mean) * worth, count)


@pytest.mark.parametrize("worth", [0.3, 2.0, 40.0], ids=["all or none", "spread", "alike"])
@pytest.mark.parametrize("mean", [0.03, 0.5, 0.9])
@pytest.mark.parametrize("num_prompts", [12, 32])
def test_intervals_hold_the_true_rate(num_prompts: int, mean: float, worth: float) -> None:
    """Beta-binomial prompts, 8 samples of each. 95 % are promised; 600 trials deviate by 2."""
    draw, samples, held = np.random.default_rng(7), 8, 0
    for _ in range(600):
        rates_P = _prompts(draw, mean, worth, num_prompts)
        estimate = mean_rate(draw.binomial(samples, rates_P) / samples, samples)
        held += estimate.low <= mean <= estimate.high
    assert held / 600 >= 0.93, held / 600


@pytest.mark.parametrize("worth", [0.3, 4.0], ids=["all or none", "spread"])
@pytest.mark.parametrize("gain", [0.0, 0.15])
def test_intervals_hold_the_true_difference(gain: float, worth: float) -> None:
    """The same prompts twice, the second time with a gain that the prompt limits."""
    draw, samples, held = np.random.default_rng(11), 8, 0
    large_P = _prompts(draw, 0.4, worth, 1_000_000)
    truth = float((np.minimum(large_P + gain, 1) - large_P).mean())
    for _ in range(600):
        rates_P = _prompts(draw, 0.4, worth, 32)
        before_P, after_P = (
            draw.binomial(samples, p) / samples for p in (rates_P, np.minimum(rates_P + gain, 1))
        )
        estimate = mean_difference(before_P, after_P)
        held += estimate.low <= truth <= estimate.high
    assert held / 600 >= 0.93, held / 600
