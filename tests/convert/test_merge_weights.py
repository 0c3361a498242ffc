"""Merge weights against closed forms and against a training run with learning-rate decay.

Second truth: `optim.schedule` integrated numerically; SGD simulated with the same gradients at a
constant and at a decayed rate. Not covered: whether a real run's gradients would have been the
same.
"""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import DecayStyle, OptimConfig
from nemotron_train.convert.merge_weights import Weights, mean_scale, merge_weights
from nemotron_train.optim.schedule import learning_rate

ASCENDING = st.lists(st.integers(1, 10**12), min_size=2, max_size=20, unique=True).map(sorted)


def test_closed_forms() -> None:
    assert merge_weights(Weights.uniform, [1, 5, 6]) == [1 / 3] * 3
    assert merge_weights(Weights.linear, [1, 5, 6]) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    # A linear decay over equal distances gives the trapezoid rule.
    linear = merge_weights(Weights.wsd, [0, 10, 20, 30, 40], DecayStyle.linear)
    assert linear == pytest.approx([1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8])
    # 1 - sqrt x has mean 1/3 on [0, 1]: two checkpoints get weights 2/3 and 1/3.
    assert merge_weights(Weights.wsd, [7, 9]) == pytest.approx([2 / 3, 1 / 3])
    with pytest.raises(ConfigError, match="two checkpoints"):
        merge_weights(Weights.wsd, [5])


@given(ASCENDING, st.sampled_from(list(Weights)), st.sampled_from(list(DecayStyle)))
def test_a_weighted_mean(tokens: list[int], kind: Weights, style: DecayStyle) -> None:
    weights = merge_weights(kind, tokens, style)
    assert len(weights) == len(tokens)
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    # Weights are differences of neighbouring means; a gap may be 1e-12 of the whole.
    assert min(weights) > -1e-3


@pytest.mark.parametrize("style", list(DecayStyle))
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.25), (0.25, 0.6), (0.6, 1.0)])
def test_mean_scale_is_the_schedules(style: DecayStyle, start: float, end: float) -> None:
    total = 10**9
    optim = OptimConfig(
        peak_learning_rate=1.0,
        min_learning_rate=0.0,
        warmup_tokens=0,
        decay_tokens=total,
        decay_style=style,
    )
    places = start + (np.arange(20000) + 0.5) / 20000 * (end - start)
    rates = [learning_rate(round(x * total), optim, total) for x in places]
    assert mean_scale(start, end, style) == pytest.approx(np.mean(rates), abs=1e-6)


@pytest.mark.parametrize("style", list(DecayStyle))
def test_merging_a_constant_run_is_the_decayed_run(style: DecayStyle) -> None:
    """Exact for any checkpoint distances if the gradient is constant between two checkpoints."""
    draw = np.random.default_rng(0)
    tokens = [100, 130, 200, 210, 300]
    constant = draw.normal(size=6)
    decayed, checkpoints = constant.copy(), [constant.copy()]
    for before, after in pairwise(tokens):
        gradient = draw.normal(size=6)
        for token in range(before, after):  # one step per token
            place = (token - tokens[0]) / 200, (token + 1 - tokens[0]) / 200
            constant -= 0.01 * gradient
            decayed -= 0.01 * mean_scale(*place, style) * gradient
        checkpoints.append(constant.copy())
    weights = merge_weights(Weights.wsd, tokens, style)
    merged = sum(w * theta for w, theta in zip(weights, checkpoints, strict=True))
    np.testing.assert_allclose(merged, decayed, rtol=1e-9)
    assert not np.allclose(merged, constant)


def test_merging_a_noisy_quadratic_falls_like_a_decay() -> None:
    """With gradients that depend on the weights, the merge only approximates the decay. It still
    ends far below the constant rate, as the decayed run does (loss above the noiseless optimum)."""
    draw, rate, steps = np.random.default_rng(1), 0.2, 400
    constant = draw.normal(size=2000)
    for _ in range(200):
        constant -= rate * (constant + draw.normal(size=2000))
    decayed, checkpoints, tokens = constant.copy(), [constant.copy()], [0]
    for step in range(1, steps + 1):
        noise = draw.normal(size=2000)
        constant -= rate * (constant + noise)
        decayed -= rate * (1 - np.sqrt(step / steps)) * (decayed + noise)
        if step % 20 == 0:
            checkpoints.append(constant.copy())
            tokens.append(step)
    weights = merge_weights(Weights.wsd, tokens)
    merged = sum(w * theta for w, theta in zip(weights, checkpoints, strict=True))
    loss = [float(np.mean(theta**2)) for theta in (constant, decayed, merged)]
    assert loss[1] < loss[0] / 3 and loss[2] < loss[0] / 3
