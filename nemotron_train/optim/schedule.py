"""The learning rate as a pure function of tokens: warm-up, stable, decay (WSD).

Owns: the shape of the schedule. Does not own: counting tokens and setting the rate on the optimizer
(the training step). No torch.
"""

from math import cos, pi, sqrt

from nemotron_train.config.schema import DecayStyle, OptimConfig


def learning_rate(tokens: int, optim: OptimConfig, total_tokens: int) -> float:
    """The learning rate of the optimizer step that ends at `tokens` trained tokens.

    `tokens` is the count AFTER the step, with its own batch. So the first warm-up step has a rate
    above 0, and the last step of the run has exactly `min_learning_rate`. A last step that
    overshoots `total_tokens` also gets the minimum.

    Warm-up: linear from 0 to `peak_learning_rate` over the first `warmup_tokens`. Stable: the peak.
    Decay: min + (peak - min) s(x) over the last `decay_tokens` before `total_tokens`, where x in
    [0, 1] is the decayed share and s falls from 1 to 0: linear s = 1 - x; cosine
    s = (1 + cos pi x) / 2; minus_sqrt s = 1 - sqrt x (arXiv 2604.12374, section 2.4; arXiv
    2405.18392 for the forms). With `decay_tokens` 0 the rate stays at the peak to the end.

    `derive` has already checked that warm-up and decay do not overlap and that min <= peak.
    """
    peak, lowest = optim.peak_learning_rate, optim.min_learning_rate
    if tokens < optim.warmup_tokens:
        return peak * tokens / optim.warmup_tokens
    decay_start = total_tokens - optim.decay_tokens
    if tokens <= decay_start or optim.decay_tokens == 0:
        return peak
    if tokens >= total_tokens:
        return lowest
    decayed = (tokens - decay_start) / optim.decay_tokens
    return lowest + (peak - lowest) * _remaining(decayed, optim.decay_style)


def _remaining(decayed: float, style: DecayStyle) -> float:
    """s(x): the remaining share of the difference between peak and minimum."""
    match style:
        case DecayStyle.linear:
            return 1 - decayed
        case DecayStyle.cosine:
            return (1 + cos(pi * decayed)) / 2
        case DecayStyle.minus_sqrt:
            return 1 - sqrt(decayed)
