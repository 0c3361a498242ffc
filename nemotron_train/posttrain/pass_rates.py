"""pass@k with intervals, from samples of several prompts. No torch.

The samples of one prompt depend on it, so intervals are over prompts.

Shapes: P prompts, n samples of each.
"""

import math
from dataclasses import dataclass

import numpy as np

from nemotron_train.report.gap.gap import student_quantile

_TAIL = 0.025  # on each side of an interval of 95 %


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at_k(passed_Pn: np.ndarray, k: int) -> np.ndarray:
    """Probability that one of k samples passes, for each prompt: FP64 [P].

    The unbiased estimate from n >= k samples of which c pass, 1 - C(n-c, k) / C(n, k)
    (arXiv 2107.03374, equation 1). Raises ValueError if k > n.
    """
    num_samples = passed_Pn.shape[1]
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples")
    total = math.comb(num_samples, k)
    # Divided as whole numbers: a float cannot hold the counts of 2000 samples.
    failures = [math.comb(num_samples - passes, k) / total for passes in range(num_samples + 1)]
    return (1 - np.array(failures))[passed_Pn.sum(1)]


def mean_rate(rates_P: np.ndarray, samples: int) -> Estimate:
    """The mean of rates of prompts, each from so many samples.

    Wilson's interval (1927) for as many independent trials as the spread between prompts is worth:
    P at least, if each prompt always passes or always fails, and `samples` P at most. So it stays
    within 0 to 1, and has a width also where all prompts agree. The spread is that with one more
    prompt that always passes and one that never does: few passes tell too little about it, and
    intervals without the two hold the truth in 89 % of simulations of a rate of 3 %.
    """
    num_prompts, mean = len(rates_P), float(rates_P.mean())
    assumed = np.append(rates_P, [0.0, 1.0])
    middle = float(assumed.mean())
    worth = middle * (1 - middle) * num_prompts / float(assumed.var(ddof=1))
    trials = min(float(num_prompts * samples), max(float(num_prompts), worth))
    quantile = student_quantile(max(num_prompts - 1, 1))
    square = quantile**2 / trials
    center = (mean + square / 2) / (1 + square)
    half = math.sqrt(square * mean * (1 - mean) + square**2 / 4) / (1 + square)
    return Estimate(mean, min(mean, max(0.0, center - half)), max(mean, min(1.0, center + half)))


def mean_difference(before_P: np.ndarray, after_P: np.ndarray) -> Estimate:
    """The mean of `after - before` over the same prompts, with a paired Student interval.

    Where all differences are equal, the interval allows for the share of prompts that differ and
    might all have been missed: 1 - 0.025^(1/P).
    """
    differences_P = after_P - before_P
    num_prompts, mean = len(differences_P), float(differences_P.mean())
    spread = float(differences_P.std(ddof=1)) if num_prompts > 1 else 0.0
    if spread > 0:
        quantile = student_quantile(num_prompts - 1)
        half = quantile * spread / math.sqrt(num_prompts)
    else:
        half = 1 - _TAIL ** (1 / num_prompts)
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half))
