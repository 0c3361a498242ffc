"""Sampling, and that speculative decoding does not change its distribution.

Second truths: Hugging Face's logits processors; closed forms of the first token's distribution;
exact probabilities of whole continuations by enumeration with the full forward pass. The
statistical tests have fixed seeds, so they cannot fail by chance. With a random seed, chance alone
would exceed their thresholds once in ten thousand seeds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.generate.sampling import (
    Draws,
    choose,
    distribution,
    draw,
    judge,
    judge_greedily,
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_distribution_is_hugging_face_s(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(seed)) * 3
    theirs = process.TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        theirs = process.TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = process.TopPLogitsWarper(top_p)(None, theirs)
    ours = distribution(logits, Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(ours, theirs.softmax(-1), atol=1e-12, rtol=1e-9)


def test_greedy_and_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert distribution(logits, Sampling(temperature=0)).tolist() == [[0, 1, 0, 0]]


def test_draw_never_takes_the_impossible() -> None:
    """Random numbers at the edges of the cumulative probabilities, and the largest one below 1."""
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]] * 4, dtype=torch.float64)
    edges = [0.0, 0.25, 0.25 - 1e-17, 1 - 2.0**-53]
    assert draw(probabilities, edges).tolist() == [1, 3, 3, 3]


def test_draws_are_uniform_and_apart() -> None:
    first, other = ([d.next() for _ in range(4000)] for d in (Draws(1, 0), Draws(1, 1)))
    assert first != other and [Draws(1, 0).next()] == first[:1]
    histogram = torch.histc(torch.tensor(first), bins=10, min=0, max=1)
    assert chi_squared(histogram.tolist(), [400.0] * 10) < critical(9)


def chi_squared(found: Sequence[float], expected: list[float]) -> float:
    return sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True))


def critical(degrees: int) -> float:
    """The value exceeded by chance once in 10,000 times (Wilson and Hilferty 1931, within a
    percent)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.719 * spread**0.5) ** 3


def random_distributions(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 1.5).softmax(-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_judge_leaves_the_models_distribution(seed: int) -> None:
    """Two drafted tokens over a vocabulary of five, drafted from a wrong distribution. The counts
    of the first two resulting tokens must follow p alone."""
    rounds, vocabulary = 40_000, 5
    p = random_distributions(seed, 3, vocabulary, vocabulary)  # [position, token before, token]
    q = random_distributions(seed + 100, 2, vocabulary)
    draws = [Draws(seed, number) for number in range(rounds)]
    first = draw(q[:1].expand(rounds, -1), [d.next() for d in draws])
    second = draw(q[1:].expand(rounds, -1), [d.next() for d in draws])
    tokens = torch.stack([first, second], dim=1)
    model = torch.stack([p[0, 0].expand(rounds, -1), p[1][first], p[2][second]], dim=1)
    verdict = judge(model, q.expand(rounds, 2, -1), tokens, draws)
    ones, pairs = Counter(), Counter()
    for row, (accepted, following) in enumerate(
        zip(verdict.accepted, verdict.following, strict=True)
    ):
        out = [*tokens[row, :accepted].tolist(), following]
        ones[out[0]] += 1
        if len(out) > 1:
            pairs[out[0], out[1]] += 1
    expected = (p[0, 0] * rounds).tolist()
    assert chi_squared([ones[v] for v in range(vocabulary)], expected) < critical(vocabulary - 1)
    for before in range(vocabulary):
        total = sum(pairs[before, v] for v in range(vocabulary))
        expected = (p[1, before] * total).tolist()
        found = [pairs[before, v] for v in range(vocabulary)]
        assert chi_squared(found, expected) < critical(vocabulary - 1)
    accepted = sum(count > 0 for count in verdict.accepted) / rounds
    # arXiv 2211.17192, theorem 3.5: the acceptance rate is the sum of min(p, q).
    assert accepted == pytest.approx(torch.minimum(p[0, 0], q[0]).sum().item(), abs=0.01)


@pytest.fixture(scope="module")
def small_vocabulary(groups: Any, build: Any) -> Any:
    return build(groups, "model.vocab_size=16")


SAMPLING = Sampling(temperature=1.3, top_k=4, top_p=0.95, seed=11)


@torch.inference_mode()
def exact_probabilities(model: Any, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation, by the full forward pass over every prefix."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, probability in found.items():
            logits = model(torch.tensor([prompt + list(text)]))[0, -1:].float()
            following = distribution(logits, SAMPLING)[0]
            for token in following.nonzero().flatten().tolist():
                longer[(*text, token)] = probability * following[token].item()
        found = longer
    return found


@pytest.mark.parametrize("speculative", [False, True])
def test_continuations_have_the_exact_probabilities(
    small_vocabulary: Any, speculative: bool
) -> None:
    """1,500 continuations of three tokens, plain and speculative, against enumeration. Rare ones
    are merged, so that each class has an expected count of at least five."""
    prompt, samples, length = [3, 1, 4], 1500, 3
    exact = exact_probabilities(small_vocabulary, prompt, length)
    assert sum(exact.values()) == pytest.approx(1.0)
    knobs = DecodingKnobs(max_new_tokens=length, batch=500, speculative=speculative)
    engine = Engine(small_vocabulary)
    sequences = engine.generate([prompt] * samples, SAMPLING, knobs)
    counts = Counter(tuple(s.new) for s in sequences)
    assert set(counts) <= set(exact), "a token that the distribution excludes was drawn"
    common = [text for text, p in exact.items() if p * samples >= 5]
    found = [float(counts[text]) for text in common]
    expected = [exact[text] * samples for text in common]
    rest = samples - sum(expected)
    if rest >= 5:
        found, expected = [*found, samples - sum(found)], [*expected, rest]
    assert len(found) > 10
    assert chi_squared(found, expected) < critical(len(found) - 1)
    if speculative:
        assert 0 < engine.acceptance.accepted[0] < engine.acceptance.rounds


def test_log_probabilities_are_the_models(small_vocabulary: Any) -> None:
    """They are not those of the processed distribution. The samples come from every branch of the
    rule."""
    prompts = [list(p) for p in product(range(3), repeat=2)]
    knobs = DecodingKnobs(max_new_tokens=6, speculative=True, draft_tokens=2)
    for one in Engine(small_vocabulary).generate(prompts, SAMPLING, knobs):
        with torch.inference_mode():
            logits = small_vocabulary(torch.tensor([one.tokens]))[0].float()
        wanted = torch.log_softmax(logits, -1)[torch.arange(1, 7), torch.tensor(one.new)]
        assert one.log_probabilities == pytest.approx(wanted.tolist(), abs=1e-5)


def test_greedy_short_ways_are_the_rule() -> None:
    """`choose` and `judge_greedily` against `draw` and `judge` with distributions that put all
    probability on one token. Drafts agree on every possible number of places; some logits are
    tied."""
    generator = torch.Generator().manual_seed(3)
    greedy = Sampling(temperature=0)
    logits_BnV = torch.randint(0, 6, (64, 4, 9), generator=generator).float()
    drafted_BkV = logits_BnV[:, :3].clone()
    for row in range(64):
        drafted_BkV[row, row % 4 :] = torch.randn(9, generator=generator)
    draws = [Draws(1, row) for row in range(64)]
    tokens_Bk = choose(drafted_BkV.flatten(0, 1), greedy, []).unflatten(0, (64, 3))
    p_BnV, q_BkV = distribution(logits_BnV, greedy), distribution(drafted_BkV, greedy)
    assert tokens_Bk.flatten().tolist() == draw(q_BkV.flatten(0, 1), [0.5] * 192).tolist()
    verdict = judge_greedily(logits_BnV, tokens_Bk)
    assert verdict == judge(p_BnV, q_BkV, tokens_Bk, draws)
    assert set(verdict.accepted) == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coupled_draws_have_the_distribution(seed: int) -> None:
    """At two positions of the same sequences, which are independent of each other."""
    rounds, vocabulary = 20_000, 4
    p = random_distributions(seed, vocabulary)
    draws = [Draws(seed, number) for number in range(rounds)]
    logits = p.log().float().expand(rounds, -1)
    coupled = Sampling(coupled=True)
    first, second = (choose(logits, coupled, draws, offset) for offset in (0, 1))
    pairs = Counter(zip(first.tolist(), second.tolist(), strict=True))
    expected = torch.outer(p, p).flatten() * rounds
    found = [pairs[a, b] for a in range(vocabulary) for b in range(vocabulary)]
    assert chi_squared(found, expected.tolist()) < critical(vocabulary**2 - 1)
    assert choose(logits, coupled, draws, 1).tolist() == second.tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coupled_drafts_agree_as_often_as_the_theorem_says(seed: int) -> None:
    """arXiv 2408.07978: at least (1 - TV) / (1 + TV); and no coupling agrees more than 1 - TV."""
    rounds = 20_000
    p, q = random_distributions(seed, 2, 6)
    draws = [Draws(seed, number) for number in range(rounds)]
    ours, drafted = (
        choose(d.log().float().expand(rounds, -1), Sampling(coupled=True), draws) for d in (p, q)
    )
    agreed = (ours == drafted).double().mean().item()
    distance = (p - q).abs().sum().item() / 2
    assert (1 - distance) / (1 + distance) - 0.01 < agreed < 1 - distance + 0.01


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}])
def test_coupled_drafts_do_not_change_the_text(
    small_vocabulary: Any, knobs: dict[str, float], drafts: int
) -> None:
    """Token for token, also when sequences come to free places."""
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 3], [3, 3]]
    sampling = Sampling(seed=3, coupled=True, **knobs)  # pyright: ignore[reportArgumentType]
    plain = DecodingKnobs(max_new_tokens=24, batch=3)
    drafting = replace(plain, speculative=True, draft_tokens=drafts)
    expected = Engine(small_vocabulary).generate(prompts, sampling, plain)
    engine = Engine(small_vocabulary)
    found = engine.generate(prompts, sampling, drafting)
    assert [s.new for s in found] == [s.new for s in expected]
    assert len({tuple(s.new) for s in found}) == 5
    assert engine.acceptance.rates[0] > 0.02
