"""The learning rate against closed forms, and its shape by property.

Not covered: that the optimizer receives it, and that tokens are counted correctly.
"""

from math import cos, pi, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.config.schema import DecayStyle, OptimConfig
from nemotron_train.optim.schedule import learning_rate

SUPER = OptimConfig(
    peak_learning_rate=4.5e-4,
    min_learning_rate=4.5e-6,
    warmup_tokens=200_000_000_000,
    decay_tokens=5_000_000_000_000,
)
SUPER_TOTAL = 25_000_000_000_000


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimConfig, int]:
    warmup, stable, decay = (draw(st.integers(0, 5000)) for _ in range(3))
    peak = draw(st.floats(1e-6, 1.0))
    optim = OptimConfig(
        peak_learning_rate=peak,
        min_learning_rate=peak * draw(st.floats(0, 1)),
        warmup_tokens=warmup,
        decay_tokens=decay,
        decay_style=draw(st.sampled_from(DecayStyle)),
    )
    return optim, max(1, warmup + stable + decay)


@pytest.mark.parametrize(
    ("style", "remaining"),
    [
        (DecayStyle.linear, lambda x: 1 - x),
        (DecayStyle.cosine, lambda x: 0.5 * (1 + cos(pi * x))),
        (DecayStyle.minus_sqrt, lambda x: 1 - sqrt(x)),
    ],
)
def test_closed_forms(style: DecayStyle, remaining) -> None:
    optim = OptimConfig(2.0, 0.5, warmup_tokens=100, decay_tokens=400, decay_style=style)
    for tokens in range(1, 1001):
        if tokens < 100:
            expected = 2.0 * tokens / 100
        elif tokens <= 600:
            expected = 2.0
        else:
            expected = 0.5 + 1.5 * remaining((tokens - 600) / 400)
        assert learning_rate(tokens, optim, 1000) == pytest.approx(expected, abs=1e-12)


def test_super_at_known_points() -> None:
    """Super's published schedule: half-way up, on the plateau, a quarter into the decay (where
    minus-sqrt is half-way down), and at the end."""
    assert learning_rate(0, SUPER, SUPER_TOTAL) == 0
    assert learning_rate(100_000_000_000, SUPER, SUPER_TOTAL) == pytest.approx(2.25e-4)
    assert learning_rate(20_000_000_000_000, SUPER, SUPER_TOTAL) == 4.5e-4
    middle = (4.5e-4 + 4.5e-6) / 2
    assert learning_rate(21_250_000_000_000, SUPER, SUPER_TOTAL) == pytest.approx(middle)
    assert learning_rate(SUPER_TOTAL, SUPER, SUPER_TOTAL) == 4.5e-6


@given(schedules(), st.integers(0, 20_000))
def test_bounds_and_end(schedule: tuple[OptimConfig, int], tokens: int) -> None:
    optim, total = schedule
    rate = learning_rate(tokens, optim, total)
    assert 0 <= rate <= optim.peak_learning_rate
    if tokens >= optim.warmup_tokens:
        assert rate >= optim.min_learning_rate * (1 - 1e-12)
    if tokens >= total and optim.decay_tokens > 0:
        assert rate == optim.min_learning_rate
    if tokens >= total and optim.decay_tokens == 0:
        assert rate == optim.peak_learning_rate


@given(schedules(), st.integers(0, 15_000))
def test_rises_then_falls(schedule: tuple[OptimConfig, int], tokens: int) -> None:
    optim, total = schedule
    here, there = (learning_rate(n, optim, total) for n in (tokens, tokens + 1))
    slack = 1e-12 * optim.peak_learning_rate
    if tokens + 1 <= total - optim.decay_tokens:
        assert there >= here - slack
    if tokens >= optim.warmup_tokens:
        assert there <= here + slack


@given(schedules(), st.integers(0, 15_000))
def test_no_jump(schedule: tuple[OptimConfig, int], tokens: int) -> None:
    """One token moves the rate by at most the slope of the steepest form. With minus-sqrt the first
    token falls by sqrt(1/decay) of the range; the warm-up rises by 1/warmup of the peak."""
    optim, total = schedule
    here, there = (learning_rate(n, optim, total) for n in (tokens, tokens + 1))
    rise = 1 / optim.warmup_tokens if optim.warmup_tokens > 0 else 0
    fall = sqrt(1 / optim.decay_tokens) if optim.decay_tokens > 0 else 0
    steepest = max(rise, min(1, pi / 2 * fall)) * optim.peak_learning_rate
    assert abs(there - here) <= steepest * (1 + 1e-9)
