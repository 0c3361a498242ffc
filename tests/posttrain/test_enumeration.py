"""Advantages, correction and objective together, over all samples that a small policy can give.

The policy has three symbols and three places, and a table of logits for each place and prefix: 27
sequences. The mean of the estimated gradient over all groups of samples, weighted by their
probability, is compared with the gradient of the exact objective by autograd. No sampling, so
nothing is within an error bar.

Not covered: the model, and a mean over tokens where lengths vary: its divisor is then itself
random, so the estimate is a ratio of two.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemotron_train.config.grpo_knobs import (
    AdvantageKnobs,
    Baseline,
    CorrectionKnobs,
    CorrectionRule,
    Deviation,
    Objective,
    ObjectiveKnobs,
    Ratio,
)
from nemotron_train.posttrain.advantage import Outcome, compute_advantages
from nemotron_train.posttrain.correction import TokenPairs, correct
from nemotron_train.posttrain.objective import (
    TokenConstants,
    denominator,
    sum_metrics,
    token_losses,
    token_sums,
)

SYMBOLS, PLACES, STOP = 3, 3, 2
SUMMED = ObjectiveKnobs(objective=Objective.dr_grpo, constant_length=1)  # mean over sequences
LEAVE_ONE_OUT = AdvantageKnobs(baseline=Baseline.leave_one_out)


@dataclass
class Space:
    """All that can be sampled: symbols [n,3] and which of them the policy chose, [n,3]."""

    symbols: np.ndarray
    sampled: np.ndarray

    @property
    def truncated(self) -> np.ndarray:
        """Which end without the stop symbol, [n]."""
        last = self.sampled.cumsum(1).argmax(1)
        return self.symbols[np.arange(len(last)), last] != STOP


def build_space(kind: str) -> Space:
    """full: three sampled symbols. stop: the symbol 2 ends a sequence, what follows is padding.
    forced: the middle symbol is not sampled, as that of a tool or a forced close. bandit: one."""
    rows, masks = [], []
    for symbols in itertools.product(range(SYMBOLS), repeat=PLACES):
        mask = [True] * PLACES
        if kind == "stop" and STOP in symbols:
            mask = [place <= symbols.index(STOP) for place in range(PLACES)]
        if kind == "forced":
            mask = [True, False, True]
        if kind == "bandit":
            mask = [True, False, False]
        padding = [s for s, m in zip(symbols, mask, strict=True) if not m]
        if not any(padding):  # what is not sampled is symbol 0
            rows.append(symbols)
            masks.append(mask)
    return Space(np.array(rows), np.array(masks))


def build_policy(seed: int, size: float = 1.0) -> Tensor:
    """Logits [1 + 3 + 9, 3] of all prefixes."""
    source = torch.Generator().manual_seed(seed)
    prefixes = sum(SYMBOLS**place for place in range(PLACES))
    return size * torch.randn(prefixes, SYMBOLS, generator=source, dtype=torch.float64)


def log_probabilities(policy: Tensor, space: Space) -> Tensor:
    """Of each symbol after its prefix, [n,3]."""
    tables, symbols = torch.log_softmax(policy, -1), torch.from_numpy(space.symbols)
    first, second, _ = symbols.T
    rows = torch.stack([0 * first, 1 + first, 4 + SYMBOLS * first + second], 1)
    return tables[rows, symbols]


def probabilities(policy: Tensor, space: Space) -> Tensor:
    """Of each sample, [n]: the product over what was sampled."""
    return (log_probabilities(policy, space) * torch.from_numpy(space.sampled)).sum(1).exp()


def exact_gradient(policy: Tensor, space: Space, value: np.ndarray) -> np.ndarray:
    """The gradient of the mean of `value` [n] over the policy's samples."""
    leaf = policy.clone().requires_grad_()
    (probabilities(leaf, space) * torch.from_numpy(value)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad.numpy()


def mean_gradient(
    policy: Tensor,
    space: Space,
    reward: np.ndarray,
    group_size: int,
    knobs: AdvantageKnobs | None,
    objective: ObjectiveKnobs = SUMMED,
    sampler: Tensor | None = None,
    token_weight: np.ndarray | None = None,
) -> np.ndarray:
    """The mean over all groups of minus the gradient of a step on one group.

    knobs: None for rewards as they are. sampler: the policy that samples, if it is another.
    token_weight: [n,3] of the correction.
    """
    count = len(reward)
    groups = np.array(list(itertools.product(range(count), repeat=group_size)))
    chance = probabilities(policy if sampler is None else sampler, space).numpy()
    assert chance.sum() == pytest.approx(1)
    outcomes = [
        Outcome(number, reward[n], truncated=bool(space.truncated[n]))
        for number, group in enumerate(groups)
        for n in group
    ]
    places = groups.flatten()
    advantage, weight = reward[places], np.ones(len(places))
    if knobs is not None:
        result = compute_advantages(outcomes, knobs)
        advantage, weight = result.advantage, result.weight
    of_group = np.repeat(chance[groups].prod(1), group_size)
    of_token = np.ones(space.sampled.shape) if token_weight is None else token_weight
    weight_nT = (weight * of_group)[:, None] * of_token[places] * space.sampled[places]
    leaf = policy.clone().requires_grad_()
    logprob = log_probabilities(leaf, space)
    constants = TokenConstants(
        advantage=torch.from_numpy(advantage)[:, None].expand(-1, PLACES),
        weight=torch.from_numpy(weight_nT),
        previous=logprob.detach()[places] if sampler is None else None,
    )
    losses = token_losses(-logprob[places], constants, objective)
    tokens = group_size * int(space.sampled[0].sum())
    (-losses.sum() / denominator(objective, tokens, group_size)).backward()
    assert leaf.grad is not None
    return leaf.grad.numpy()


def build_reward(space: Space, values: tuple[float, ...] = (0.0, 1.0, 0.25)) -> np.ndarray:
    """One of a few values for each sample, so that some groups have equal rewards."""
    return np.random.default_rng(5).choice(values, len(space.symbols))


SPACES = [("full", 2), ("stop", 2), ("stop", 3), ("forced", 2), ("forced", 3), ("bandit", 4)]
in_each_space = pytest.mark.parametrize(("kind", "group_size"), SPACES)


@in_each_space
@pytest.mark.parametrize("baseline", [None, *Baseline], ids=str)
def test_the_mean_of_the_estimate_is_the_gradient(
    kind: str, group_size: int, baseline: Baseline | None
) -> None:
    """Without baseline and with the mean of the others it is that of E[R]; the mean of the whole
    group, which contains the sample, gives (G-1)/G of it. Forced tokens are in no gradient, and a
    sampled stop symbol is: without either the two sides would differ."""
    policy, space = build_policy(1), build_space(kind)
    reward = build_reward(space)
    knobs = AdvantageKnobs(baseline=baseline, overlong_filter=False) if baseline else None
    factor = (group_size - 1) / group_size if baseline is Baseline.group else 1.0
    exact = exact_gradient(policy, space, reward)
    found = mean_gradient(policy, space, reward, group_size, knobs)
    np.testing.assert_allclose(found, factor * exact, atol=1e-14)
    assert np.abs(exact).max() > 0.01
    if kind == "forced":
        assert not found[1:4].any()


def test_the_mean_over_tokens_is_the_gradient_over_the_length() -> None:
    """Sequences of equal length, so that the number of tokens is not random."""
    policy, space = build_policy(2), build_space("full")
    reward = build_reward(space)
    exact = exact_gradient(policy, space, reward)
    knobs = AdvantageKnobs(baseline=Baseline.leave_one_out, overlong_filter=False)
    for objective in (ObjectiveKnobs(), ObjectiveKnobs(ratio=Ratio.clipped)):
        found = mean_gradient(policy, space, reward, 2, knobs, objective)
        np.testing.assert_allclose(found, exact / PLACES, atol=1e-14)


def test_the_overlong_filter_drops_the_sample_and_keeps_its_reward() -> None:
    """The estimate is then that of the finished samples against the mean of all."""
    policy, space = build_policy(3), build_space("stop")
    reward, chance = build_reward(space), probabilities(policy, space).numpy()
    assert 0 < space.truncated.sum() < len(reward)
    value = np.where(space.truncated, 0.0, reward - chance @ reward)
    found = mean_gradient(policy, space, reward, 2, LEAVE_ONE_OUT)
    np.testing.assert_allclose(found, exact_gradient(policy, space, value), atol=1e-14)


@pytest.mark.parametrize("baseline", list(Baseline))
@pytest.mark.parametrize("deviation", list(Deviation))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, -3.7, 1e9])
def test_a_constant_reward_moves_nothing(
    baseline: Baseline, deviation: Deviation, reward: float
) -> None:
    """Not by a small number: by exactly 0, in each group."""
    space = build_space("forced")
    knobs = AdvantageKnobs(baseline=baseline, deviation=deviation)
    rewards = np.full(len(space.symbols), reward)
    assert not mean_gradient(build_policy(4), space, rewards, 3, knobs).any()


@pytest.mark.parametrize("group_size", [2, 4])
def test_the_deviation_changes_the_length_of_the_gradient_alone(group_size: int) -> None:
    """For one prompt and rewards of 0 and 1. With k winners of G, each has (1-k/G)/s and each loser
    -(k/G)/s, s^2 = k(G-k)/(G(G-1)). The factor depends on the pass rate: prompts are weighted."""
    policy, space = build_policy(5), build_space("bandit")
    reward = np.array([1.0, 0.0, 0.0])
    p, g = float(probabilities(policy, space)[0]), group_size
    factor = 0.0
    for k in range(1, g):
        deviation = math.sqrt(k * (g - k) / (g * (g - 1)))
        won, lost = (1 - k / g) / deviation, -(k / g) / deviation
        part = k / g * won / p - (g - k) / g * lost / (1 - p)
        factor += math.comb(g, k) * p**k * (1 - p) ** (g - k) * part
    knobs = AdvantageKnobs(deviation=Deviation.group, overlong_filter=False)
    found = mean_gradient(policy, space, reward, g, knobs)
    np.testing.assert_allclose(found, factor * exact_gradient(policy, space, reward), atol=1e-14)


def test_softmax_bandit() -> None:
    """The textbook gradient by logit a: pi_a (R_a - mean reward)."""
    policy, space = build_policy(6), build_space("bandit")
    reward, pi = np.array([0.3, -1.0, 2.0]), torch.softmax(policy[0], -1).numpy()
    knobs = AdvantageKnobs(baseline=Baseline.leave_one_out, overlong_filter=False)
    found = mean_gradient(policy, space, reward, 3, knobs)
    np.testing.assert_allclose(found[0], pi * (reward - pi @ reward), atol=1e-14)


def weights(policy: Tensor, sampler: Tensor, space: Space, knobs: CorrectionKnobs) -> np.ndarray:
    """The correction's weights of all tokens of all samples, [n,3]. -inf where none was sampled."""
    count = len(space.symbols)
    sampled = space.sampled.flatten()
    pairs = TokenPairs(
        trainer=np.where(sampled, log_probabilities(policy, space).flatten(), -np.inf),
        sampler=np.where(sampled, log_probabilities(sampler, space).flatten(), -np.inf),
        sequence=np.repeat(np.arange(count), PLACES),
        trained=sampled,
        token=space.symbols.flatten(),
    )
    return correct(pairs, knobs).weight.reshape(count, PLACES)


RAW = CorrectionKnobs(CorrectionRule.raw, sequence_error_bound=0)
UNFILTERED = AdvantageKnobs(baseline=Baseline.leave_one_out, overlong_filter=False)


@pytest.mark.parametrize("knobs", [None, UNFILTERED], ids=["no_baseline", "leave_one_out"])
def test_raw_correction_of_one_token_is_unbiased(knobs: AdvantageKnobs | None) -> None:
    """E_sampler[ratio f] = E_trainer[f], with a baseline of rewards that the sampler drew."""
    policy, sampler, space = build_policy(7), build_policy(8), build_space("bandit")
    reward = np.array([0.3, -1.0, 2.0])
    weight = weights(policy, sampler, space, RAW)
    found = mean_gradient(policy, space, reward, 2, knobs, SUMMED, sampler, weight)
    np.testing.assert_allclose(found, exact_gradient(policy, space, reward), atol=1e-14)
    without = mean_gradient(policy, space, reward, 2, knobs, SUMMED, sampler)
    assert np.abs(without - exact_gradient(policy, space, reward)).max() > 0.1


def test_raw_correction_where_only_the_last_token_differs() -> None:
    """The prefixes are drawn alike; the ratios of the last token then correct all of its own
    gradient, whatever depends on the whole sequence."""
    policy, space = build_policy(7), build_space("full")
    sampler = torch.cat([policy[:4], build_policy(8)[4:]])
    reward = build_reward(space)
    weight = weights(policy, sampler, space, RAW)
    assert (weight[:, :2] == 1).all()
    found = mean_gradient(policy, space, reward, 2, UNFILTERED, SUMMED, sampler, weight)
    exact = exact_gradient(policy, space, reward)
    np.testing.assert_allclose(found[4:], exact[4:], atol=1e-14)


def test_token_ratios_are_biased_in_first_order_where_sequences_differ() -> None:
    """A token's ratio leaves out those of the others. Halving the gaps halves the error, which is
    below that without correction; the product of the ratios has none. In numbers for gaps of about
    0.1 nats: 9 % of the gradient's length without correction, 7 % with ratios of tokens."""
    policy, space = build_policy(7), build_space("full")
    reward = build_reward(space)
    exact = exact_gradient(policy, space, reward)

    def error(size: float, rule: str) -> float:
        sampler = policy + build_policy(8, size)
        weight = weights(policy, sampler, space, RAW)
        if rule == "product":
            weight = np.repeat(weight.prod(1, keepdims=True), PLACES, axis=1)
        if rule == "none":
            weight = np.ones_like(weight)
        found = mean_gradient(policy, space, reward, 2, UNFILTERED, SUMMED, sampler, weight)
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    assert error(0.1, "product") < 1e-13
    assert error(0.1, "raw") / error(0.05, "raw") == pytest.approx(2, abs=0.1)
    assert error(0.1, "raw") == pytest.approx(0.074, abs=1e-3)
    assert error(0.1, "none") == pytest.approx(0.094, abs=1e-3)


UNBOUNDED: dict[str, Any] = {"sequence_error_bound": 0}


@pytest.mark.parametrize(
    ("knobs", "plain", "with_baseline"),
    [
        (CorrectionKnobs(CorrectionRule.raw, **UNBOUNDED), 0.175, 0.175),
        (CorrectionKnobs(CorrectionRule.none, **UNBOUNDED), -0.15, 0.1),
        (CorrectionKnobs(CorrectionRule.truncated, 0.0, 2.0, **UNBOUNDED), 0.085, 0.13),
        (CorrectionKnobs(CorrectionRule.truncated, 0.5, 2.0, **UNBOUNDED), 0.015, 0.13),
        (CorrectionKnobs(CorrectionRule.icepop, 0.5, 5.0, **UNBOUNDED), 0.21, 0.175),
        (CorrectionKnobs(CorrectionRule.icepop, 0.5, 2.0, **UNBOUNDED), 0.0, 0.07),
    ],
    ids=["raw", "none", "one_sided", "two_sided", "icepop", "icepop_narrow"],
)
def test_the_bias_of_each_rule_in_numbers(
    knobs: CorrectionKnobs, plain: float, with_baseline: float
) -> None:
    """The gradient by the first logit, 0.175 exactly. By hand: with the mass m = sampler * weight
    that a rule leaves of each symbol it is the sum of m (R - b) ((is first) - 0.7), b = 0 or the
    sampler's mean reward 0.5. A rule that changes mass makes the baseline matter."""
    pi, chance = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.2, 0.6])  # ratio 3.5, 1, 1/6
    policy, sampler, space = build_policy(1), build_policy(1), build_space("bandit")
    policy[0], sampler[0] = pi.double().log(), chance.double().log()
    reward = np.array([1.0, 0.0, 0.5])
    weight = weights(policy, sampler, space, knobs)
    for advantage, expected in ((None, plain), (UNFILTERED, with_baseline)):
        found = mean_gradient(policy, space, reward, 2, advantage, SUMMED, sampler, weight)
        assert found[0, 0] == pytest.approx(expected, abs=1e-7)
    assert exact_gradient(policy, space, reward)[0, 0] == pytest.approx(0.175, abs=1e-7)


def test_clipped_updates_in_closed_form() -> None:
    """Drawn by the policy before the updates: the mean gradient is that of sum of pi A over the
    symbols that no clip holds back."""
    policy, sampler, space = build_policy(9), build_policy(9), build_space("bandit")
    policy[0] = torch.tensor([0.7, 0.2, 0.1]).log()
    sampler[0] = torch.tensor([0.5, 0.3, 0.2]).log()
    reward = np.array([1.0, 0.9, 0.0])
    chance, pi = probabilities(sampler, space).numpy(), probabilities(policy, space).numpy()
    advantage = reward - chance @ reward
    ratio = pi / chance
    held = ((ratio > 1.28) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    assert held.tolist() == [True, False, True]
    leaf = policy.clone().requires_grad_()
    logprob = log_probabilities(leaf, space)[:, 0]
    constants = TokenConstants(
        advantage=torch.from_numpy(advantage),
        weight=torch.from_numpy(chance),
        previous=log_probabilities(sampler, space)[:, 0],
    )
    knobs = ObjectiveKnobs(ratio=Ratio.clipped)
    (-token_losses(-logprob, constants, knobs).sum()).backward()
    assert leaf.grad is not None
    expected = exact_gradient(policy, space, np.where(held, 0.0, advantage))
    np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=1e-14)


def divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) of the first symbol."""
    return (torch.softmax(policy[0], -1) * first_gap(policy, reference)).sum()


def first_gap(policy: Tensor, reference: Tensor) -> Tensor:
    return torch.log_softmax(policy[0], -1) - torch.log_softmax(reference[0], -1)


def gradient_of(policy: Tensor, value: Tensor) -> np.ndarray:
    (gradient,) = torch.autograd.grad(value, policy, retain_graph=True)
    return gradient.numpy()


@pytest.mark.parametrize("ratio", list(Ratio))
def test_the_kl_penalty_has_the_right_mean_and_gradient(ratio: Ratio) -> None:
    """Those of KL(policy || reference), also where another policy sampled (several updates). The
    textbook's alternatives, as constants drawn by the policy: k1 = lp - reference has the right
    mean and no gradient at all, k2 = k1^2 / 2 the right gradient and another mean, k3 alone the
    gradient of KL(reference || policy)."""
    policy, reference, space = build_policy(11), build_policy(12), build_space("bandit")
    sampler = policy if ratio is Ratio.forced else build_policy(13)
    policy = policy.requires_grad_()
    logprob, chance = log_probabilities(policy, space)[:, 0], probabilities(sampler, space).detach()
    constants = TokenConstants(
        advantage=torch.zeros(3, dtype=torch.float64),
        weight=chance,
        previous=log_probabilities(sampler, space)[:, 0].detach(),
        reference=log_probabilities(reference, space)[:, 0],
    )
    loss = token_losses(-logprob, constants, ObjectiveKnobs(ratio=ratio, kl_weight=1.0)).sum()
    exact = divergence(policy, reference)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), abs=1e-14)
    right = gradient_of(policy, exact)
    np.testing.assert_allclose(gradient_of(policy, loss), right, atol=1e-14)
    assert np.abs(right).max() > 0.1
    sums = token_sums(-logprob, constants, ObjectiveKnobs(ratio=ratio, kl_weight=1.0))
    assert float(sums[0][5]) == pytest.approx(float(exact.detach()), abs=1e-14)

    pi, gap = probabilities(policy, space).detach(), first_gap(policy, reference)
    np.testing.assert_allclose(gradient_of(policy, (pi * gap).sum()), 0, atol=1e-14)
    np.testing.assert_allclose(gradient_of(policy, (pi * gap**2 / 2).sum()), right, atol=1e-14)
    alone = gradient_of(policy, (pi * (torch.expm1(-gap) + gap)).sum())
    reverse = gradient_of(policy, divergence(reference, policy))
    np.testing.assert_allclose(alone, reverse, atol=1e-14)
    assert np.abs(alone - right).max() > 0.05


def test_the_kl_penalty_of_sequences_is_that_of_each_token() -> None:
    """The sum over prefixes of their probability, held constant, times the KL of the symbol after
    them. What a symbol changes in the KL of later ones is not in the gradient."""
    policy, reference, space = build_policy(14), build_policy(15), build_space("full")
    policy = policy.requires_grad_()
    logprob, chance = log_probabilities(policy, space), probabilities(policy, space).detach()
    constants = TokenConstants(
        advantage=torch.zeros(27, 3, dtype=torch.float64),
        weight=chance[:, None].expand(-1, 3),
        reference=log_probabilities(reference, space),
    )
    loss = token_losses(-logprob, constants, ObjectiveKnobs(kl_weight=1.0)).sum()
    tables, other = torch.log_softmax(policy, -1), torch.log_softmax(reference, -1)
    of_prefix = (tables.exp() * (tables - other)).sum(-1)
    reached = torch.ones(13, dtype=torch.float64)
    reached[1:4] = tables[0].exp().detach()
    reached[4:] = (tables[1:4] + tables[0][:, None]).exp().detach().flatten()
    expected = (reached * of_prefix).sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-14)
    np.testing.assert_allclose(gradient_of(policy, loss), gradient_of(policy, expected), atol=1e-14)


@pytest.mark.parametrize("source", ["policy", "sampler", "before"])
def test_the_mean_of_the_entropy_estimate_is_the_entropy(source: str) -> None:
    """Drawn by the policy, by another sampler with raw weights, or by the policy before updates."""
    policy, space = build_policy(16), build_space("bandit")
    other = policy if source == "policy" else build_policy(17)
    logprob = log_probabilities(policy, space)[:, 0]
    weight = probabilities(other, space)
    if source == "sampler":
        weight = weight * torch.from_numpy(weights(policy, other, space, RAW)[:, 0])
    constants = TokenConstants(
        advantage=torch.ones(3, dtype=torch.float64),
        weight=weight,
        previous=log_probabilities(other, space)[:, 0],
    )
    knobs = ObjectiveKnobs(ratio=Ratio.clipped if source == "before" else Ratio.forced)
    sums, peaks = token_sums(-logprob, constants, knobs)
    entropy = -float((logprob.exp() * logprob).sum())
    # The weights hold the probabilities, so the sum is the mean of one token; three are counted.
    assert 3 * sum_metrics(sums, peaks)["entropy"] == pytest.approx(entropy)
