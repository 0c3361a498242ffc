"""The rule for spikes against numpy over the same values, and its robustness to broken values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.train.guard.spikes import SpikeWindow

ordinary = st.floats(0.5, 10.0)
broken = st.sampled_from([math.nan, math.inf, -math.inf])


def feed(window: SpikeWindow, values: list[float]) -> list[bool]:
    """Judges and adds each value, as the guard does."""
    verdicts = []
    for value in values:
        verdicts.append(window.is_spike(window.deviations(value)))
        window.add(value, verdicts[-1])
    return verdicts


@given(st.lists(ordinary, min_size=1, max_size=60), st.integers(2, 20), st.floats(0.5, 8))
def test_verdicts_are_those_of_the_plain_rule(
    values: list[float], size: int, sigmas: float
) -> None:
    """Mean and sample deviation by numpy over the last `size` ordinary values, in one loop that
    keeps all of them. The restart at a new level has its own test."""
    kept: list[float] = []
    expected: list[bool] = []
    run = 0
    for value in values:
        window = kept[-size:]
        is_spike = False
        if len(window) >= max(2, size // 2):
            mean = np.mean(window)
            deviation = max(np.std(window, ddof=1), 1e-3 * abs(mean))
            margin = (value - mean) / deviation - sigmas
            if abs(margin) < 1e-6:
                return  # numpy and fsum may differ here
            is_spike = bool(margin > 0)
        run = run + 1 if is_spike else 0
        if run >= max(2, size // 2):
            kept, run = [], 0
        elif not is_spike:
            kept.append(value)
        expected.append(is_spike)
    assert feed(SpikeWindow(size, sigmas), values) == expected


@given(st.lists(st.one_of(ordinary, broken), max_size=60), st.integers(2, 20))
def test_what_is_not_finite_leaves_no_trace(values: list[float], size: int) -> None:
    """All other verdicts are the same with the broken values removed. One NaN in OLMo's window made
    the next 128 steps look like spikes."""
    verdicts = feed(SpikeWindow(size, 6.0), values)
    assert not any(v for v, x in zip(verdicts, values, strict=True) if not math.isfinite(x))
    finite = [x for x in values if math.isfinite(x)]
    kept = [v for v, x in zip(verdicts, values, strict=True) if math.isfinite(x)]
    assert kept == feed(SpikeWindow(size, 6.0), finite)


def test_one_nan_costs_one_step_not_129() -> None:
    rng = np.random.default_rng(0)
    values = list(3 + 0.05 * rng.standard_normal(400))
    values[200] = math.nan
    assert feed(SpikeWindow(128, 6.0), values) == [False] * 400


@pytest.mark.parametrize("factor", [1.2, 10.0])
def test_a_spike_does_not_hide_the_next(factor: float) -> None:
    rng = np.random.default_rng(1)
    values = list(3 + 0.05 * rng.standard_normal(300))
    for step in (200, 201, 205, 290):
        values[step] *= factor
    verdicts = feed(SpikeWindow(128, 6.0), values)
    assert [step for step, verdict in enumerate(verdicts) if verdict] == [200, 201, 205, 290]


def test_a_new_level_is_accepted_after_half_a_window() -> None:
    rng = np.random.default_rng(2)
    values = list(3 + 0.05 * rng.standard_normal(100)) + list(5 + 0.05 * rng.standard_normal(100))
    verdicts = feed(SpikeWindow(32, 6.0), values)
    assert verdicts == [False] * 100 + [True] * 16 + [False] * 84


@given(ordinary, st.integers(2, 40))
def test_rounding_on_a_flat_line_is_no_spike(value: float, size: int) -> None:
    values = [float(np.nextafter(value, math.inf)) if n % 7 == 0 else value for n in range(80)]
    assert not any(feed(SpikeWindow(size, 6.0), values))


def test_nothing_is_judged_before_half_a_window() -> None:
    assert (
        feed(SpikeWindow(128, 6.0), [3.0 + 0.01 * (n % 5) for n in range(63)] + [300.0])
        == [False] * 64
    )
