"""Correction for a sampler whose probabilities differ from the trainer's. NumPy, no torch.

Owns: the weights and masks of tokens, and the measures of the difference. Does not own: the bound
at which a run stops, advantages, the loss.

p is the trainer's log-probability of a sampled token before the update, g the sampler's, of the
distribution that was drawn from. The gap is d = p - g, and the ratio exp(d), with d clipped to
[-20, 20].

The ratio is that of one token. The mean of ratio * f under the sampler is then the mean of f under
the trainer for what depends on this token alone. What depends on a whole sequence, as a reward
does, keeps an error of first order in the gaps of the other tokens; the product of all ratios would
not, but has a variance that grows with the length. Masking and clipping add an error of their own.

Arrays are flat: n tokens of any number of sequences, in any order. Log-probabilities of tokens that
are not trained may be any numbers, also NaN. One that is not finite at a trained token counts as
the largest gap, and the token is masked under each rule.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nemotron_train.config.grpo_knobs import CorrectionKnobs, CorrectionRule

LARGEST_GAP = 20.0  # of log-probabilities; exp(20) is 5e8


@dataclass(frozen=True)
class TokenPairs:
    """Log-probabilities of the same tokens by trainer and sampler, [n] each.

    trainer, sampler: FP64 or FP32. sequence: int, ids of sequences. trained: bool, the tokens that
    were sampled and count; not those of prompts, tools and forced closes. token: int ids, for
    messages.
    """

    trainer: np.ndarray
    sampler: np.ndarray
    sequence: np.ndarray
    trained: np.ndarray
    token: np.ndarray


@dataclass(frozen=True)
class Correction:
    """The result, [n] each.

    weight: FP64, of the token's loss; 0 where it is not trained or masked. masked: bool, trained
    tokens that the rule or the sequence mask sets to 0. sequence_masked: bool, trained tokens of
    sequences above the error bound. counted: bool, tokens to count in the mean over tokens, which
    are the trained ones of the other sequences.
    """

    weight: np.ndarray
    masked: np.ndarray
    sequence_masked: np.ndarray
    counted: np.ndarray


@dataclass(frozen=True)
class Gap:
    """The largest gap. position: place of the token among those of its sequence, from 0."""

    size: float
    sequence: int
    position: int
    token: int


def correct(pairs: TokenPairs, knobs: CorrectionKnobs) -> Correction:
    """Weights and masks of all tokens.

    A sequence is masked whose mean of exp|d| over its trained tokens is above
    `sequence_error_bound`. One token with |d| above the log of the length is enough for a bound of
    2, so this finds outliers.
    """
    gap, finite = _gaps(pairs)
    ratio = np.exp(gap)
    if knobs.correction is CorrectionRule.none:
        weight = np.ones_like(ratio)
    elif knobs.correction is CorrectionRule.raw:
        weight = ratio
    elif knobs.correction is CorrectionRule.truncated:
        weight = np.clip(ratio, knobs.ratio_low, knobs.ratio_high)
    else:
        inside = (ratio >= knobs.ratio_low) & (ratio <= knobs.ratio_high)
        weight = np.where(inside, ratio, 0.0)
    sequence_masked = np.zeros_like(pairs.trained)
    if knobs.sequence_error_bound:
        error = _sequence_means(np.exp(np.abs(gap)), pairs)
        sequence_masked = pairs.trained & (error > knobs.sequence_error_bound)
    weight = np.where(pairs.trained & finite & ~sequence_masked, weight, 0.0)
    return Correction(
        weight=weight,
        masked=pairs.trained & (weight == 0),
        sequence_masked=sequence_masked,
        counted=pairs.trained & ~sequence_masked,
    )


def largest_gap(pairs: TokenPairs) -> Gap | None:
    """The first trained token with the largest |d|, not clipped: inf where a log-probability is not
    finite. None without a trained token."""
    if not pairs.trained.any():
        return None
    with np.errstate(invalid="ignore"):  # -inf less -inf
        size = np.abs(pairs.trainer.astype(np.float64) - pairs.sampler)
    size = np.where(np.isfinite(size), size, math.inf)
    place = int(np.argmax(np.where(pairs.trained, size, -1.0)))
    sequence = pairs.sequence[place]
    position = int(np.count_nonzero(pairs.sequence[:place] == sequence))
    return Gap(float(size[place]), int(sequence), position, int(pairs.token[place]))


def correction_metrics(
    pairs: TokenPairs,
    correction: Correction,
    passed: Mapping[int, bool],
    environment: Mapping[int, str],
) -> dict[str, float]:
    """Measures of the gaps and of what was masked, by name. NaN where there is nothing to count.

    passed, environment: of each sequence id. The measures are means over trained tokens:

    logprob_error       mean of exp|d|
    gen_kl, train_kl    KL(sampler || trainer) and KL(trainer || sampler): means of r - 1 - log r
                        and r log r - r + 1, r = exp(d)
    js                  Jensen-Shannon divergence: mean of (r log(2r/(1+r)) + log(2/(1+r))) / 2
    importance_*        of r
    effective_samples   (sum of weights)^2 / sum of squares, as a share of the trained tokens
    masked_tokens       share of the trained tokens
    masked_sequences    share of the sequences that the error bound masked
    masked_correct      share of the masked tokens that belong to right answers; trained_correct is
                        that of all trained tokens. Masking is neutral if the two are equal.
    masked_sequences_correct   share of the masked sequences that were right

    The divergences are never below 0 and have the right mean under the sampler. masked_* are also
    there for each environment, as masked_tokens/NAME.
    """
    gap, finite = _gaps(pairs)
    gap, ratio = gap[pairs.trained], np.exp(gap[pairs.trained])
    usable = ratio[finite[pairs.trained]]
    worst = largest_gap(pairs)
    weight = correction.weight[pairs.trained]
    metrics = {
        "logprob_error": _mean(np.exp(np.abs(gap))),
        "logprob_gap_max": worst.size if worst else math.nan,
        "gen_kl": _mean(np.expm1(gap) - gap),
        "train_kl": _mean(ratio * gap - np.expm1(gap)),
        "js": _mean((ratio * np.log(2 * ratio / (1 + ratio)) + np.log(2 / (1 + ratio))) / 2),
        "importance_mean": _mean(usable),
        "importance_min": float(usable.min()) if usable.size else math.nan,
        "importance_max": float(usable.max()) if usable.size else math.nan,
        "effective_samples": _effective_share(weight),
    }
    # One entry a token: what is known of its sequence.
    ids, number = np.unique(pairs.sequence, return_inverse=True)
    right = np.array([passed[int(sequence)] for sequence in ids], dtype=bool)[number]
    names = np.array([environment[int(sequence)] for sequence in ids], dtype=object)[number]
    metrics |= _masked(pairs, correction, right, np.ones_like(pairs.trained), "")
    for name in sorted(set(environment.values())):
        metrics |= _masked(pairs, correction, right, names == name, f"/{name}")
    return metrics


def _masked(
    pairs: TokenPairs,
    correction: Correction,
    right: np.ndarray,
    chosen: np.ndarray,
    suffix: str,
) -> dict[str, float]:
    """What was masked of the chosen tokens. right: of each token's sequence."""
    trained, masked = pairs.trained & chosen, correction.masked & chosen
    sequences = np.unique(pairs.sequence[trained])
    dropped, first = np.unique(
        pairs.sequence[correction.sequence_masked & chosen], return_index=True
    )
    dropped_right = right[correction.sequence_masked & chosen][first]
    values = {
        "masked_tokens": _mean(masked[trained]),
        "masked_sequences": _share(len(dropped), len(sequences)),
        "masked_correct": _mean(right[masked]),
        "masked_sequences_correct": _mean(dropped_right),
        "trained_correct": _mean(right[trained]),
    }
    return {f"{name}{suffix}": value for name, value in values.items()}


def _effective_share(weight: np.ndarray) -> float:
    """How many equal weights would have the same variance of their mean, as a share of them."""
    squares = float((weight**2).sum())
    return _share(float(weight.sum()) ** 2, len(weight) * squares) if squares else _mean(weight)


def _share(count: float, total: float) -> float:
    return count / total if total else math.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def _gaps(pairs: TokenPairs) -> tuple[np.ndarray, np.ndarray]:
    """d clipped, FP64 [n]; and where both log-probabilities are finite, bool [n]."""
    trainer, sampler = pairs.trainer.astype(np.float64), pairs.sampler.astype(np.float64)
    finite = np.isfinite(trainer) & np.isfinite(sampler)
    # Selected before the difference is formed, so that no inf meets another.
    gap = np.where(finite, trainer, LARGEST_GAP) - np.where(finite, sampler, 0.0)
    return np.clip(gap, -LARGEST_GAP, LARGEST_GAP), finite


def _sequence_means(values: np.ndarray, pairs: TokenPairs) -> np.ndarray:
    """For each token the mean of `values` over the trained tokens of its sequence, or 0."""
    _, number = np.unique(pairs.sequence, return_inverse=True)
    sums = np.bincount(number, np.where(pairs.trained, values, 0.0))
    counts = np.bincount(number, pairs.trained)
    return (sums / np.maximum(counts, 1))[number]
