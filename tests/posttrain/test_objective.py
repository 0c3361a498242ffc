"""The objective against a NumPy twin, and its invariances.

The twin is written sequence by sequence from the papers' formulas, in FP64. Gradients are compared
with central differences of it, with what the papers hold constant held constant. Invariances are
at the level of these functions: the negative log-likelihoods are given, and a model's forward pass
is not covered here. The expectation over samples is in test_enumeration.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.grpo_knobs import Objective, ObjectiveKnobs, Ratio, check_objective
from nemotron_train.posttrain.objective import (
    TokenConstants,
    denominator,
    signed_weights,
    sum_metrics,
    token_losses,
    token_sums,
)

CLIPPED: dict[str, Any] = {"ratio": Ratio.clipped}
GSPO: dict[str, Any] = {"objective": Objective.gspo, "clip_low": 0.03, "clip_high": 0.04}
DR_GRPO: dict[str, Any] = {"objective": Objective.dr_grpo, "constant_length": 7}
KNOBS = {
    "forced": ObjectiveKnobs(),
    "forced_kl": ObjectiveKnobs(kl_weight=0.3),
    "clipped": ObjectiveKnobs(**CLIPPED),
    "clipped_kl": ObjectiveKnobs(**CLIPPED, kl_weight=0.3),
    "dr_grpo": ObjectiveKnobs(**CLIPPED, **DR_GRPO),
    "gspo": ObjectiveKnobs(**CLIPPED, **GSPO),
    "gspo_forced": ObjectiveKnobs(objective=Objective.gspo),
    "cispo": ObjectiveKnobs(**CLIPPED, objective=Objective.cispo),
}
every_objective = pytest.mark.parametrize("knobs", KNOBS.values(), ids=list(KNOBS))


class Tokens:
    """Random tokens of some sequences, flat, with an advantage a sequence. Ratios leave the clip
    bounds on both sides. The last trained token of each sequence has the weight of a stop token;
    some in the middle are forced."""

    def __init__(self, seed: int, lengths: tuple[int, ...] = (5, 1, 3, 4)) -> None:
        draw = np.random.default_rng(seed)
        count = sum(lengths)
        self.nll = draw.uniform(0.1, 3.0, count)
        self.previous = -self.nll + draw.normal(0, 0.3, count)
        self.reference = -self.nll + draw.normal(0, 0.5, count)
        self.sequence = np.repeat(np.arange(len(lengths)) * 3 + 2, lengths)
        self.advantage = np.repeat(draw.normal(0, 1, len(lengths)), lengths)
        self.weight = draw.uniform(0.5, 2.0, count)
        self.weight[draw.random(count) < 0.25] = 0.0
        self.columns = ("nll", "previous", "reference", "sequence", "advantage", "weight")

    def constants(self, places: np.ndarray | slice = slice(None)) -> TokenConstants:
        """Tensors of chosen tokens, in the shape of `places`."""
        values = {name: torch.from_numpy(getattr(self, name)[places]) for name in self.columns[1:]}
        return TokenConstants(**values)

    def counts(self) -> tuple[int, int]:
        """Trained tokens, and sequences with some."""
        trained = self.weight != 0
        return int(trained.sum()), len(np.unique(self.sequence[trained]))

    def gradient(self, knobs: ObjectiveKnobs) -> tuple[float, np.ndarray]:
        """Objective and its gradient by nll, all in one call."""
        nll = torch.from_numpy(self.nll).requires_grad_()
        loss = token_losses(nll, self.constants(), knobs).sum() / denominator(knobs, *self.counts())
        loss.backward()
        assert nll.grad is not None
        return float(loss.detach()), nll.grad.numpy()


def twin(tokens: Tokens, knobs: ObjectiveKnobs, nll: np.ndarray, frozen: np.ndarray) -> float:
    """The objective from the formulas. frozen: the nll that constant copies see."""
    total, sequences, count = 0.0, 0, 0
    for number in np.unique(tokens.sequence):
        chosen = np.flatnonzero((tokens.sequence == number) & (tokens.weight != 0))
        if not len(chosen):
            continue
        sequences, count = sequences + 1, count + len(chosen)
        logprob, weight, a = -nll[chosen], tokens.weight[chosen], tokens.advantage[chosen[0]]
        before = -frozen[chosen] if knobs.ratio is Ratio.forced else tokens.previous[chosen]
        ratio = [math.exp(x) for x in logprob - before]
        low, high = 1 - knobs.clip_low, 1 + knobs.clip_high
        terms = [min(a * r, a * min(max(r, low), high)) for r in ratio]
        if knobs.objective is Objective.gspo:
            s = math.exp(sum(logprob - before) / len(chosen))
            terms = [min(a * s, a * min(max(s, low), high))] * len(chosen)
        if knobs.objective is Objective.cispo:
            held = np.exp(-frozen[chosen] - before)
            terms = [a * min(max(h, low), high) * x for h, x in zip(held, logprob, strict=True)]
        if knobs.kl_weight:
            x = tokens.reference[chosen] - logprob
            penalty = knobs.kl_weight * np.array(ratio) * (np.exp(x) - 1 - x)
            terms = list(np.array(terms) - penalty)
        value = -float(np.dot(weight, terms))
        total += value / len(chosen) if knobs.objective is Objective.gspo else value
    if knobs.objective is Objective.gspo:
        return total / sequences
    if knobs.objective is Objective.dr_grpo:
        return total / (sequences * knobs.constant_length)
    return total / count


@every_objective
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_are_the_twins(knobs: ObjectiveKnobs, seed: int) -> None:
    check_objective(knobs)
    tokens = Tokens(seed)
    value, gradient = tokens.gradient(knobs)
    assert value == pytest.approx(twin(tokens, knobs, tokens.nll, tokens.nll), abs=1e-12)
    step = 1e-6
    for place in range(len(tokens.nll)):
        up, down = tokens.nll.copy(), tokens.nll.copy()
        up[place] += step
        down[place] -= step
        rise = twin(tokens, knobs, up, tokens.nll) - twin(tokens, knobs, down, tokens.nll)
        assert gradient[place] == pytest.approx(rise / (2 * step), abs=1e-8), place


def test_the_tokens_of_the_tests_are_clipped_on_both_sides() -> None:
    """Otherwise the comparison above would say nothing of clips."""
    sums = sum(token_sums_of(Tokens(seed), KNOBS["clipped"])[0] for seed in range(4))
    assert isinstance(sums, torch.Tensor) and float(sums[3]) > 0 and float(sums[4]) > 0


def token_sums_of(tokens: Tokens, knobs: ObjectiveKnobs) -> tuple[torch.Tensor, torch.Tensor]:
    return token_sums(torch.from_numpy(tokens.nll), tokens.constants(), knobs)


@pytest.mark.parametrize("name", ["forced", "dr_grpo"])
def test_one_update_is_the_existing_pass_with_signed_weights(name: str) -> None:
    """The same gradient up to one rounding; the mask is the same in NumPy and in torch."""
    tokens, knobs = Tokens(1), replace(KNOBS[name], ratio=Ratio.forced)
    divisor = denominator(knobs, *tokens.counts())
    nll = torch.from_numpy(tokens.nll).requires_grad_()
    constants = tokens.constants()
    (nll * signed_weights(constants.advantage, constants.weight, divisor)).sum().backward()
    assert nll.grad is not None
    np.testing.assert_allclose(nll.grad.numpy(), tokens.gradient(knobs)[1], rtol=5e-16)
    by_numpy = signed_weights(tokens.advantage, tokens.weight, divisor)
    np.testing.assert_array_equal(by_numpy, nll.grad.numpy())


def test_one_update_with_a_penalty_is_one_with_other_advantages() -> None:
    """The gradient of k3 with its score is that of a reward reference - lp for the token."""
    tokens, knobs = Tokens(8), KNOBS["forced_kl"]
    expected = tokens.gradient(knobs)[1]
    advantage = tokens.advantage - 0.3 * (-tokens.nll - tokens.reference)
    found = signed_weights(advantage, tokens.weight, denominator(knobs, *tokens.counts()))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_forced_ratio_has_the_value_of_ratio_one() -> None:
    tokens, knobs = Tokens(2), ObjectiveKnobs()
    loss = token_losses(torch.from_numpy(tokens.nll), tokens.constants(), knobs)
    np.testing.assert_array_equal(loss, -tokens.advantage * tokens.weight)
    tokens.previous = -tokens.nll
    unmoved = ObjectiveKnobs(ratio=Ratio.clipped)
    np.testing.assert_array_equal(tokens.gradient(knobs)[1], tokens.gradient(unmoved)[1])


@every_objective
@given(seed=st.integers(0, 10_000), data=st.data())
@settings(max_examples=15, deadline=None)
def test_micro_batches_padding_order_and_packing(
    knobs: ObjectiveKnobs, seed: int, data: st.DataObject
) -> None:
    """Sequences in any order, cut into micro-batches of rows with padding in any place, whose
    values are NaN or inf: the gradient of each token is that of one call, and so are the measures.
    """
    tokens = Tokens(seed, tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))))
    _, expected = tokens.gradient(knobs)
    order = data.draw(st.permutations(sorted(set(tokens.sequence.tolist()))))
    cuts = data.draw(st.integers(1, len(order)))
    gradient, measured = np.zeros_like(expected), []
    for part in np.array_split(np.array(order), cuts):
        places = np.concatenate([np.flatnonzero(tokens.sequence == number) for number in part])
        padding = data.draw(st.integers(0, 4))
        places = np.append(places, np.full(padding + (len(places) + padding) % 2, -1))
        rows = places.reshape(-1, 2) if data.draw(st.booleans()) else places.reshape(2, -1)
        padded = with_padding(tokens, data.draw(st.sampled_from([math.nan, math.inf, -math.inf])))
        nll = torch.from_numpy(padded.nll[rows]).requires_grad_()
        loss = token_losses(nll, padded.constants(rows), knobs)
        assert loss.shape == rows.shape
        (loss.sum() / denominator(knobs, *tokens.counts())).backward()
        assert nll.grad is not None
        gradient[rows[rows >= 0]] += nll.grad.numpy()[rows >= 0]
        assert not nll.grad.numpy()[rows < 0].any()
        measured.append(token_sums(nll, padded.constants(rows), knobs))
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)
    sums = torch.stack([sums for sums, _ in measured]).sum(0)
    peaks = torch.stack([peaks for _, peaks in measured]).amax(0)
    together = sum_metrics(*token_sums_of(tokens, knobs))
    assert sum_metrics(sums, peaks) == pytest.approx(together, rel=1e-12, abs=1e-15, nan_ok=True)


def with_padding(tokens: Tokens, junk: float) -> Tokens:
    """The tokens, and one more at the end that is padding."""
    padded = Tokens(0, (1,))
    for name in tokens.columns:
        values = getattr(tokens, name)
        last = {"sequence": -1, "weight": 0.0}.get(name, junk)
        setattr(padded, name, np.append(values, np.array([last], dtype=values.dtype)))
    return padded


@every_objective
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_nothing_leaks_from_masked_places(knobs: ObjectiveKnobs, junk: float) -> None:
    """Also where all is masked: the loss is 0 and no gradient is NaN."""
    tokens = Tokens(3)
    expected = tokens.gradient(knobs)
    masked = tokens.weight == 0
    for name in ("nll", "previous", "reference", "advantage"):
        getattr(tokens, name)[masked] = junk
    value, gradient = tokens.gradient(knobs)
    assert value == expected[0] and np.array_equal(gradient, expected[1])
    assert all(map(math.isfinite, sum_metrics(*token_sums_of(tokens, knobs)).values()))
    tokens.weight[:] = 0.0
    assert tokens.counts() == (0, 0)
    value, gradient = tokens.gradient(knobs)
    assert value == 0 and not gradient.any()
    assert all(map(math.isnan, sum_metrics(*token_sums_of(tokens, knobs)).values()))


@every_objective
def test_the_gradient_through_a_model_is_finite(knobs: ObjectiveKnobs) -> None:
    """Log-softmax of logits with -inf, as of ids that are never drawn, chosen at a masked place."""
    logits = torch.randn(4, 5, dtype=torch.float64)
    logits[:, 4] = -torch.inf
    logits.requires_grad_()
    chosen = torch.tensor([0, 4, 2, 1])
    nll = -torch.log_softmax(logits, -1).gather(-1, chosen[:, None])[:, 0]
    assert not torch.isfinite(nll).all()
    constants = TokenConstants(
        advantage=torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64),
        weight=torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64),
        previous=-nll.detach(),
        reference=torch.full((4,), -torch.inf, dtype=torch.float64).masked_fill(chosen < 4, -1.0),
        sequence=torch.zeros(4, dtype=torch.int64),
    )
    token_losses(nll, constants, knobs).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert not logits.grad[1].any() and logits.grad[0].any()


@pytest.mark.parametrize("distance", [30.0, 800.0])
@pytest.mark.parametrize("name", ["clipped", "clipped_kl", "gspo", "cispo"])
def test_large_differences_do_not_overflow(name: str, distance: float) -> None:
    """FP32, where exp(89) is inf: trained tokens whose probability collapsed or exploded."""
    nll = torch.tensor([1.0, 1.0 + distance], requires_grad=True)
    constants = TokenConstants(
        advantage=torch.tensor([-1.0, 1.0]),
        weight=torch.ones(2),
        previous=torch.tensor([-1.0 - distance, -1.0]),
        reference=torch.tensor([-1.0 - distance, -1.0]),
        sequence=torch.arange(2),
    )
    loss = token_losses(nll, constants, KNOBS[name]).sum()
    loss.backward()
    assert torch.isfinite(loss) and nll.grad is not None and torch.isfinite(nll.grad).all()


def test_equal_advantage_gives_equal_gradients_whatever_the_length() -> None:
    """A mean over tokens has no length bias. That of sequences has: gspo's tokens share theirs."""
    tokens = Tokens(4, (2, 6))
    tokens.weight, tokens.advantage = np.ones(8), np.full(8, 0.7)
    gradient = tokens.gradient(KNOBS["forced"])[1]
    assert gradient == pytest.approx(np.full(8, 0.7 / 8))
    assert tokens.gradient(replace(KNOBS["dr_grpo"], ratio=Ratio.forced))[1] == pytest.approx(
        np.full(8, 0.7 / (2 * 7))
    )
    gradient = tokens.gradient(KNOBS["gspo_forced"])[1]
    assert gradient[0] / gradient[-1] == pytest.approx(3)


def test_a_forced_token_has_no_gradient_and_a_sampled_stop_has() -> None:
    tokens = Tokens(5, (4,))
    tokens.weight = np.array([1.0, 0.0, 1.0, 1.0])  # forced at 1; the last is the stop
    gradient = tokens.gradient(ObjectiveKnobs())[1]
    assert gradient[1] == 0 and gradient[3] == pytest.approx(tokens.advantage[0] / 3)


def single(ratio: float, advantage: float, knobs: ObjectiveKnobs) -> tuple[float, dict[str, float]]:
    """The gradient by lp of one token's objective, divided by -A, and its measures."""
    nll = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    constants = TokenConstants(
        advantage=torch.tensor([advantage], dtype=torch.float64),
        weight=torch.ones(1, dtype=torch.float64),
        previous=torch.tensor([-1.0 - math.log(ratio)], dtype=torch.float64),
        sequence=torch.zeros(1, dtype=torch.int64),
    )
    token_losses(nll, constants, knobs).sum().backward()
    assert nll.grad is not None
    return float(nll.grad) / advantage, sum_metrics(*token_sums(nll, constants, knobs))


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope", "clip_low", "clip_high"),
    [
        (1.27, 1.0, 1.27, 0, 0),
        (1.29, 1.0, 0.0, 0, 1),  # moved far enough upwards
        (1.29, -1.0, 1.29, 0, 0),  # against the advantage: goes on
        (0.81, -1.0, 0.81, 0, 0),
        (0.79, -1.0, 0.0, 1, 0),
        (0.79, 1.0, 0.79, 0, 0),
    ],
)
def test_clip_bounds(
    ratio: float, advantage: float, slope: float, clip_low: int, clip_high: int
) -> None:
    """0.2 below and 0.28 above, each for one sign. cispo's slope is the clipped ratio instead."""
    found, measures = single(ratio, advantage, ObjectiveKnobs(ratio=Ratio.clipped))
    assert found == pytest.approx(slope)
    assert (measures["clip_low"], measures["clip_high"]) == (clip_low, clip_high)
    assert measures["ratio_min"] == measures["ratio_max"] == pytest.approx(ratio)
    assert measures["ratio_mean"] == pytest.approx(ratio)
    found, measures = single(ratio, advantage, KNOBS["cispo"])
    assert found == pytest.approx(min(max(ratio, 0.8), 1.28))
    assert (measures["clip_low"], measures["clip_high"]) == (ratio < 0.8, ratio > 1.28)


def test_gspo_weighs_all_tokens_of_a_sequence_alike() -> None:
    """Closed form: each has the gradient -A s / length, s the geometric mean of the ratios; one
    token far outside does not silence the others. Another sequence changes nothing."""
    tokens = Tokens(6, (4, 2))
    tokens.weight, tokens.advantage = np.ones(6), np.ones(6)
    tokens.previous = -tokens.nll - np.array([0.5, -0.45, 0.02, -0.01, 0.3, 0.3])
    knobs = KNOBS["gspo"]
    s = math.exp(0.06 / 4)
    gradient = tokens.gradient(knobs)[1]
    np.testing.assert_allclose(gradient, [s / 4 / 2] * 4 + [0, 0], rtol=1e-12)
    metrics = sum_metrics(*token_sums_of(tokens, knobs))
    assert metrics["clip_high"] == pytest.approx(2 / 6)
    assert metrics["ratio_max"] == pytest.approx(math.exp(0.3))
    assert metrics["ratio_min"] == pytest.approx(s)


def test_denominators() -> None:
    assert denominator(KNOBS["clipped"], 11, 3) == 11
    assert denominator(KNOBS["cispo"], 11, 3) == 11
    assert denominator(KNOBS["gspo"], 11, 3) == 3
    assert denominator(KNOBS["dr_grpo"], 11, 3) == 21
    assert denominator(KNOBS["clipped"], 0, 0) == denominator(KNOBS["dr_grpo"], 0, 0) == 1


def minimum_of(values: Callable[[float], float]) -> float:
    """Where a function of one number is smallest on a grid around 0."""
    grid = np.linspace(-1, 1, 201)
    return float(grid[np.argmin([values(x) for x in grid])])


def test_the_penalty_is_least_at_the_reference() -> None:
    """Its value, with an advantage of 0, and a number by hand."""
    tokens = Tokens(7, (1,))
    tokens.weight, tokens.advantage = np.ones(1), np.zeros(1)

    def penalty(difference: float) -> float:
        tokens.reference = -tokens.nll + difference
        constants = tokens.constants()
        return float(token_losses(torch.from_numpy(tokens.nll), constants, KNOBS["forced_kl"]))

    assert minimum_of(penalty) == pytest.approx(0) and penalty(0.0) == 0
    assert penalty(0.2) == pytest.approx(0.3 * (math.exp(0.2) - 1.2))
