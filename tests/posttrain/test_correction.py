"""Weights, masks and measures of the difference of trainer and sampler: by hand, by another way of
computing them, and exact means. Their effect on the gradient is in test_enumeration.py."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.grpo_knobs import CorrectionKnobs, CorrectionRule
from nemotron_train.posttrain.correction import (
    Correction,
    Gap,
    TokenPairs,
    correct,
    correction_metrics,
    largest_gap,
)

RULES = {
    "none": CorrectionKnobs(CorrectionRule.none, sequence_error_bound=0),
    "raw": CorrectionKnobs(CorrectionRule.raw, sequence_error_bound=0),
    "one_sided": CorrectionKnobs(CorrectionRule.truncated, 0.0, 5.0, 0),
    "two_sided": CorrectionKnobs(CorrectionRule.truncated, 0.2, 5.0, 0),
    "icepop": CorrectionKnobs(CorrectionRule.icepop, 0.5, 5.0, 0),
}
MASKED = CorrectionKnobs(CorrectionRule.raw)


def of_ratios(ratios: list[float], sequence: list[int] | None = None) -> TokenPairs:
    """Trained tokens with these ratios, of one sequence unless ids are given."""
    count = len(ratios)
    sampler = np.linspace(-3, -1, count)
    return TokenPairs(
        trainer=sampler + np.log(ratios),
        sampler=sampler,
        sequence=np.array(sequence if sequence else [4] * count),
        trained=np.ones(count, dtype=bool),
        token=100 + np.arange(count),
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", [1, 1, 1, 1, 1, 1]),
        ("raw", [0.1, 0.3, 0.51, 1, 4.9, 7]),
        ("one_sided", [0.1, 0.3, 0.51, 1, 4.9, 5]),
        ("two_sided", [0.2, 0.3, 0.51, 1, 4.9, 5]),
        ("icepop", [0, 0, 0.51, 1, 4.9, 0]),
    ],
)
def test_weights(rule: str, expected: list[float]) -> None:
    result = correct(of_ratios([0.1, 0.3, 0.51, 1, 4.9, 7]), RULES[rule])
    assert result.weight == pytest.approx(expected)
    assert result.masked.tolist() == [value == 0 for value in expected]
    assert result.counted.all() and not result.sequence_masked.any()


def test_equal_log_probabilities_change_nothing() -> None:
    for knobs in (*RULES.values(), CorrectionKnobs()):
        result = correct(of_ratios([1.0] * 5), knobs)
        assert (result.weight == 1).all() and not result.masked.any()


def test_the_sequence_mask() -> None:
    """Mean error of the sequences 7, 3 and 5: 2.05, 1.95 and 1.5, whichever side is larger. All
    tokens of 7 are dropped, and none is counted."""
    ratios = [3.1, 1, 2.9, 1 / 2, 1, 1 / 1.0]
    result = correct(of_ratios(ratios, [7, 7, 3, 5, 3, 5]), MASKED)
    assert result.sequence_masked.tolist() == [True, True, False, False, False, False]
    assert result.counted.tolist() == [False, False, True, True, True, True]
    assert result.weight == pytest.approx([0, 0, 2.9, 0.5, 1, 1])
    swapped = correct(of_ratios([1 / ratio for ratio in ratios], [7, 7, 3, 5, 3, 5]), MASKED)
    assert swapped.sequence_masked.tolist() == result.sequence_masked.tolist()
    tight = correct(
        of_ratios(ratios, [7, 7, 3, 5, 3, 5]), CorrectionKnobs(sequence_error_bound=1.9)
    )
    assert tight.sequence_masked.tolist() == [True, True, True, False, True, False]


@pytest.mark.parametrize("length", [8, 64, 1000])
def test_one_token_can_mask_a_sequence(length: int) -> None:
    """A gap above the log of the length; the tokens that are not trained do not dilute it."""
    for gap, is_masked in ((1.01, True), (0.99, False)):
        ratios = [1.0] * (length - 1) + [gap * (length + 1)]  # mean error 2 at gap 1
        pairs = of_ratios(ratios + [1.0] * 50)
        pairs.trained[length:] = False
        assert correct(pairs, MASKED).sequence_masked[:length].all() == is_masked


@pytest.mark.parametrize("knobs", [*RULES.values(), CorrectionKnobs()])
@pytest.mark.parametrize("junk", [math.nan, -math.inf, math.inf, -30.0])
def test_nothing_leaks_from_tokens_that_are_not_trained(
    knobs: CorrectionKnobs, junk: float
) -> None:
    """Weights, masks, measures and the largest gap are those of the others, without a warning."""
    pairs = of_ratios([1.2, 0.9, 2.0, 0.4, 1, 1], [1, 1, 1, 2, 2, 3])
    expected = pairs.trained & np.array([True, False, True, True, True, False])
    kept = TokenPairs(*(getattr(pairs, name)[expected] for name in pairs.__dataclass_fields__))
    pairs.trained[:] = expected
    for trainer, sampler in ((junk, -1.0), (-1.0, junk), (junk, junk)):
        pairs.trainer[~expected], pairs.sampler[~expected] = trainer, sampler
        with np.errstate(all="raise"):
            result, alone = correct(pairs, knobs), correct(kept, knobs)
            found = metrics_of(pairs, result)
        assert not result.weight[~expected].any() and not result.masked[~expected].any()
        assert not result.counted[~expected].any()
        for name in ("weight", "masked", "sequence_masked", "counted"):
            assert np.array_equal(getattr(result, name)[expected], getattr(alone, name))
        assert found == pytest.approx(metrics_of(kept, alone), nan_ok=True)


def metrics_of(pairs: TokenPairs, result: Correction) -> dict[str, float]:
    """With all sequences wrong and of one environment."""
    ids = np.unique(pairs.sequence).tolist()
    return correction_metrics(pairs, result, dict.fromkeys(ids, False), dict.fromkeys(ids, "e"))


@pytest.mark.parametrize("knobs", list(RULES.values()))
@pytest.mark.parametrize(
    ("trainer", "sampler"), [(math.nan, -1), (-1, math.nan), (-math.inf, -1), (-1, -math.inf)]
)
def test_a_trained_token_without_a_number_is_masked(
    knobs: CorrectionKnobs, trainer: float, sampler: float
) -> None:
    """Under each rule, so that nothing that is not finite reaches the loss. The gap is infinite,
    which stops a run that has a bound, and the sequence mask drops the sequence."""
    pairs = of_ratios([1.0, 1.0, 1.0])
    pairs.trainer[1], pairs.sampler[1] = trainer, sampler
    result = correct(pairs, knobs)
    assert result.weight.tolist() == [1, 0, 1] and result.masked.tolist() == [False, True, False]
    assert largest_gap(pairs) == Gap(math.inf, 4, 1, 101)
    assert correct(pairs, MASKED).sequence_masked.all()
    metrics = metrics_of(pairs, result)
    assert metrics["logprob_gap_max"] == math.inf and metrics["importance_max"] == 1
    assert all(math.isfinite(metrics[name]) for name in ("logprob_error", "gen_kl", "train_kl"))


def test_large_gaps_do_not_overflow() -> None:
    pairs = of_ratios([1.0, 1.0, 1.0])
    pairs.trainer[:2] = [-2000.0, -1.0]
    pairs.sampler[:2] = [-1.0, -2000.0]
    with np.errstate(over="raise", invalid="raise"):
        result = correct(pairs, RULES["raw"])
        metrics = metrics_of(pairs, result)
    assert result.weight == pytest.approx([math.exp(-20), math.exp(20), 1])
    assert metrics["logprob_gap_max"] == 1999 and math.isfinite(metrics["js"])


def test_the_largest_gap_has_an_address() -> None:
    """Sequence, place in it and token, where sequences are interleaved; the first of equal ones."""
    pairs = of_ratios([1, 1, 2, 1, 1 / 4, 1, 4], [8, 9, 8, 9, 9, 8, 8])
    pairs = TokenPairs(
        np.round(pairs.trainer - pairs.sampler, 3),
        np.zeros(7),
        pairs.sequence,
        pairs.trained,
        pairs.token,
    )
    assert largest_gap(pairs) == Gap(1.386, 9, 2, 104)
    pairs.trained[4] = False
    assert largest_gap(pairs) == Gap(1.386, 8, 3, 106)
    pairs.trained[:] = False
    assert largest_gap(pairs) is None


def test_divergences_have_the_exact_mean() -> None:
    """Ten tokens that stand for a sampler with probabilities 0.5, 0.3, 0.2, so that a mean over
    them is one over the sampler, against the sums of the textbook."""
    sampler, trainer = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.25, 0.45])
    drawn = [0] * 5 + [1] * 3 + [2] * 2
    pairs = of_ratios([1.0] * 10)
    pairs.trainer[:], pairs.sampler[:] = np.log(trainer[drawn]), np.log(sampler[drawn])
    metrics = metrics_of(pairs, correct(pairs, RULES["raw"]))
    mixture = (sampler + trainer) / 2

    def divergence(p: np.ndarray, q: np.ndarray) -> float:
        return float(p @ np.log(p / q))

    assert metrics["gen_kl"] == pytest.approx(divergence(sampler, trainer))
    assert metrics["train_kl"] == pytest.approx(divergence(trainer, sampler))
    js = (divergence(sampler, mixture) + divergence(trainer, mixture)) / 2
    assert metrics["js"] == pytest.approx(js)
    assert metrics["importance_mean"] == pytest.approx(1)
    assert metrics["importance_min"] == pytest.approx(0.6)
    assert metrics["importance_max"] == pytest.approx(2.25)
    error = sampler @ np.maximum(trainer / sampler, sampler / trainer)
    assert metrics["logprob_error"] == pytest.approx(error)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.sampled_from(list(RULES)))
@settings(max_examples=80, deadline=None)
def test_measures_are_in_their_ranges(gaps: list[float], rule: str) -> None:
    pairs = of_ratios(np.exp(gaps).tolist())
    result = correct(pairs, RULES[rule])
    metrics = metrics_of(pairs, result)
    assert min(metrics["gen_kl"], metrics["train_kl"], metrics["js"]) >= -1e-12
    assert metrics["logprob_error"] >= 1 and metrics["logprob_gap_max"] < 3.001
    kept = result.weight
    share = kept.sum() ** 2 / (kept**2).sum() / len(kept) if kept.any() else 0
    assert metrics["effective_samples"] == pytest.approx(share) and 0 <= share <= 1.000001


def test_effective_samples() -> None:
    """Equal weights: all. One of four that is not masked: a quarter."""
    assert metrics_of_ratios([1, 1, 1, 1])["effective_samples"] == 1
    assert metrics_of_ratios([0.1, 2, 0.1, 0.1])["effective_samples"] == 0.25
    assert metrics_of_ratios([0.1, 9])["effective_samples"] == 0


def metrics_of_ratios(ratios: list[float]) -> dict[str, float]:
    pairs = of_ratios(ratios)
    return metrics_of(pairs, correct(pairs, RULES["icepop"]))


def test_who_pays_for_the_masking() -> None:
    """Sequences 1 (right, a), 2 (wrong, a), 3 (right, b), 4 (wrong, b). Masked: a token of 1 by
    IcePop, all three trained ones of 3 by its error; one more of 3 is not trained."""
    ratios = [0.45, 1, 1, 1, 1, 9, 1, 1, 1, 1]
    pairs = of_ratios(ratios, [1, 1, 2, 2, 2, 3, 3, 3, 3, 4])
    pairs.trained[8] = False
    result = correct(pairs, CorrectionKnobs())
    assert result.masked.tolist() == [True, *[False] * 4, *[True] * 3, False, False]
    right = {1: True, 2: False, 3: True, 4: False}
    metrics = correction_metrics(pairs, result, right, {1: "a", 2: "a", 3: "b", 4: "b"})
    expected = {
        "masked_tokens": 4 / 9,
        "masked_sequences": 1 / 4,
        "masked_correct": 1,
        "masked_sequences_correct": 1,
        "trained_correct": 5 / 9,
        "masked_tokens/a": 1 / 5,
        "masked_sequences/a": 0,
        "masked_correct/a": 1,
        "masked_sequences_correct/a": math.nan,
        "trained_correct/a": 2 / 5,
        "masked_tokens/b": 3 / 4,
        "masked_sequences/b": 1 / 2,
        "masked_correct/b": 1,
        "masked_sequences_correct/b": 1,
        "trained_correct/b": 3 / 4,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    right |= {1: False, 2: True}
    metrics = correction_metrics(pairs, result, right, {1: "a", 2: "a", 3: "b", 4: "b"})
    assert metrics["masked_correct"] == pytest.approx(3 / 4)
    assert metrics["masked_correct/a"] == 0 and metrics["trained_correct/a"] == pytest.approx(0.6)


def test_nothing_to_count() -> None:
    pairs = of_ratios([1.0, 2.0])
    pairs.trained[:] = False
    result = correct(pairs, CorrectionKnobs())
    assert not result.weight.any() and not result.counted.any()
    assert all(map(math.isnan, metrics_of(pairs, result).values()))


def test_fp32_log_probabilities_are_compared_in_fp64() -> None:
    pairs = of_ratios([1.0, 1.0])
    near = np.array([-1.0, -1.0 - 2**-23], dtype=np.float32)
    pairs = TokenPairs(near, near[::-1].copy(), pairs.sequence, pairs.trained, pairs.token)
    result = correct(pairs, RULES["raw"])
    assert result.weight.dtype == np.float64
    assert result.weight == pytest.approx([math.exp(2**-23), math.exp(-(2**-23))], rel=1e-15)
