"""The loss of GRPO and its relatives, as pure functions of tensors.

Owns: the loss of each token from its negative log-likelihood, and ratio, clip and entropy measures.
Does not own: the forward pass, advantages (`advantage`), weights of tokens (`correction`), the sum
over micro-batches and ranks.

A is a token's advantage, w its weight, lp its log-probability, sg a constant copy. The sum of the
losses of all tokens of the global batch, divided by `denominator`, is the objective:

    grpo      w max(-A r, -A clip(r)) / tokens           arXiv 2402.03300, 2503.14476 (token mean)
    dr_grpo   the same / (sequences * constant_length)    arXiv 2503.20783
    gspo      w max(-A s, -A clip(s)) / length / sequences, s = exp(mean of log r over the sequence)
              arXiv 2507.18071
    cispo     -w A sg(clip(r)) lp / tokens                arXiv 2506.13585

with r = exp(lp - previous) and clip(r) = r limited to [1 - clip_low, 1 + clip_high]. With
ratio=forced, `previous` is sg(lp): r is 1 and its gradient is that of lp. grpo's gradient is then
that of a negative log-likelihood whose mask is `signed_weights`.

Every mean has the count of the whole global batch, never of a micro-batch or a rank: otherwise
tokens of micro-batches with few trained tokens would count more. A token with weight 0 has the loss
0 and no gradient, whatever its other values are, also NaN and inf.

Shapes: [...] is any shape, the same for all tensors, such as [S,B] of packed rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotron_train.config.grpo_knobs import Objective, ObjectiveKnobs, Ratio

_LARGEST_LOG_RATIO = 20.0  # exp(20) is 5e8; beyond it the gradient is 0


@dataclass(frozen=True)
class TokenConstants:
    """What the loss of a token needs beside its log-likelihood, without gradient, [...] each.

    advantage: that of the token's sample. weight: from the correction, 0 where it is not trained.
    previous: log-probability before the first update on these rollouts, for ratio=clipped.
    reference: log-probability by the reference policy, for kl_weight above 0. sequence: int64 ids,
    for gspo; all tokens of a sequence must be in the same call.
    """

    advantage: Tensor
    weight: Tensor
    previous: Tensor | None = None
    reference: Tensor | None = None
    sequence: Tensor | None = None


def token_losses(nll: Tensor, constants: TokenConstants, knobs: ObjectiveKnobs) -> Tensor:
    """The loss of each token, [...]: to be summed over everything and divided by `denominator`.

    nll: negative log-likelihoods with gradient, in the dtype of the result. The KL penalty is
    kl_weight * w * r * k3 with k3 = exp(x) - x - 1, x = reference - lp. The factor r makes the
    gradient that of KL(policy || reference) of the token's distribution; k3 alone would have that
    of KL(reference || policy) (arXiv 2506.09477). What a token changes in the KL of later ones is
    not in it. The loss of gspo is spread evenly over the tokens of its sequence.
    """
    trained, logprob, log_ratio = _log_ratio(nll, constants, knobs)
    advantage = torch.where(trained, constants.advantage, 0.0)
    ratio = log_ratio.exp()
    if knobs.objective is Objective.gspo:
        mean, length = _sequence_means(log_ratio, constants, trained)
        loss, share = _clipped(mean.exp(), advantage, knobs), 1 / length
    elif knobs.objective is Objective.cispo:
        clipped = ratio.detach().clamp(1 - knobs.clip_low, 1 + knobs.clip_high)
        loss, share = -advantage * clipped * logprob, torch.ones_like(ratio)
    else:
        loss, share = _clipped(ratio, advantage, knobs), torch.ones_like(ratio)
    if knobs.kl_weight:
        loss = loss + knobs.kl_weight * ratio * _k3(logprob, constants, trained)
    return constants.weight * share * loss


def denominator(knobs: ObjectiveKnobs, tokens: int, sequences: int) -> int:
    """What the sum of the losses is divided by.

    tokens, sequences: counts over all micro-batches and ranks of the step: tokens that the
    correction counts, in samples with weight 1, and the sequences with such tokens. At least 1, so
    that a step in which all is masked has the loss 0.
    """
    if knobs.objective is Objective.gspo:
        count = sequences
    elif knobs.objective is Objective.dr_grpo:
        count = sequences * knobs.constant_length
    else:
        count = tokens
    return max(count, 1)


def signed_weights[Array: (Tensor, np.ndarray)](
    advantage: Array, weight: Array, divisor: int
) -> Array:
    """The loss mask [...] that makes a sum of masked negative log-likelihoods have the gradient of
    grpo or dr_grpo with ratio=forced. divisor: from `denominator`.

    A KL penalty is in it if kl_weight * (lp - reference) is taken from each token's advantage.
    """
    return advantage * weight / divisor


# Measures, in the order of the two tensors of `token_sums`.
_SUMS = ("tokens", "entropy", "ratio_mean", "clip_low", "clip_high", "kl_reference")
_PEAKS = ("ratio_min", "ratio_max")


@torch.no_grad()
def token_sums(
    nll: Tensor, constants: TokenConstants, knobs: ObjectiveKnobs
) -> tuple[Tensor, Tensor]:
    """Measures of some tokens, FP64: sums [6], to be added over micro-batches and ranks, and peaks
    [2], of which the maximum is taken. `sum_metrics` names them."""
    trained, logprob, log_ratio = _log_ratio(nll.detach(), constants, knobs)
    ratio = log_ratio.exp()
    if knobs.objective is Objective.gspo:
        ratio = _sequence_means(log_ratio, constants, trained)[0].exp()
    weight, advantage = constants.weight, constants.advantage
    below, above = ratio < 1 - knobs.clip_low, ratio > 1 + knobs.clip_high
    if knobs.objective is not Objective.cispo:  # elsewhere a clip acts on one sign only
        below, above = below & (advantage < 0), above & (advantage > 0)
    kl = torch.zeros_like(ratio)
    if knobs.kl_weight:
        kl = weight * log_ratio.exp() * _k3(logprob, constants, trained)
    values = (torch.ones_like(ratio), -weight * log_ratio.exp() * logprob, ratio, below, above, kl)
    sums = torch.stack([torch.where(trained, value, 0.0).double().sum() for value in values])
    infinite = torch.full_like(ratio, -torch.inf)
    peaks = torch.stack(
        [torch.where(trained, value, infinite).double().max() for value in (-ratio, ratio)]
    )
    return sums, peaks


def sum_metrics(sums: Tensor, peaks: Tensor) -> dict[str, float]:
    """The measures by name, from sums and peaks over all micro-batches and ranks.

    entropy: estimate of the mean entropy of the policy, in nats: the mean of w r nll. ratio_*: of
    the policy to the one before the first update. clip_low, clip_high: share of the tokens whose
    ratio the clip changes. kl_reference: mean KL divergence, if kl_weight is above 0. NaN without a
    trained token.
    """
    values = dict(zip(_SUMS, sums.tolist(), strict=True))
    count = values.pop("tokens")
    if not count:
        return dict.fromkeys((*values, *_PEAKS), float("nan"))
    metrics = {name: value / count for name, value in values.items()}
    smallest, largest = peaks.tolist()
    return metrics | {"ratio_min": -smallest, "ratio_max": largest}


def _log_ratio(
    nll: Tensor, constants: TokenConstants, knobs: ObjectiveKnobs
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are trained, their log-probabilities and log r, [...] each; 0 at the others."""
    trained = constants.weight != 0
    # Selected before anything is computed: 0 * inf in a backward pass is NaN.
    logprob = -torch.where(trained, nll, 0.0)
    if knobs.ratio is Ratio.forced:
        previous = logprob.detach()
    else:
        assert constants.previous is not None, "ratio=clipped needs log-probabilities to compare"
        previous = torch.where(trained, constants.previous, 0.0)
    log_ratio = (logprob - previous).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return trained, logprob, log_ratio


def _clipped(ratio: Tensor, advantage: Tensor, knobs: ObjectiveKnobs) -> Tensor:
    """max(-A r, -A clip(r)): a ratio that has moved far in the direction of A has no gradient."""
    clipped = ratio.clamp(1 - knobs.clip_low, 1 + knobs.clip_high)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def _k3(logprob: Tensor, constants: TokenConstants, trained: Tensor) -> Tensor:
    """exp(x) - x - 1 with x = reference - lp: an estimate of the KL divergence, never below 0."""
    assert constants.reference is not None, "kl_weight needs log-probabilities of a reference"
    difference = torch.where(trained, constants.reference, 0.0) - logprob
    difference = difference.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return torch.expm1(difference) - difference


def _sequence_means(
    values: Tensor, constants: TokenConstants, trained: Tensor
) -> tuple[Tensor, Tensor]:
    """For each token the mean over the trained tokens of its sequence, and their number, at least
    1. `values` must be 0 at the other tokens."""
    assert constants.sequence is not None, "gspo needs ids of sequences"
    ids, number = torch.unique(constants.sequence, return_inverse=True)
    number, shape = number.flatten(), values.shape
    zeros = torch.zeros(len(ids), dtype=values.dtype, device=values.device)
    sums = zeros.index_add(0, number, values.flatten())
    lengths = zeros.index_add(0, number, trained.flatten().to(values.dtype)).clamp(min=1)
    return (sums / lengths)[number].view(shape), lengths[number].view(shape)
