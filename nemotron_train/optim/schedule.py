"""The learning rate as a pure function of tokens: warm-up, stable, decay (WSD).

Owns the shape of the schedule and nothing else: who counts tokens and who sets the rate on the
optimizer is the training step's business. No torch.
"""

from math import cos, pi, sqrt

from nemotron_train.config.schema import DecayStyle, OptimConfig


def learning_rate(tokens: int, optim: OptimConfig, total_tokens: int) -> float:
    """The rate of the optimizer step that brings the run to `tokens` trained tokens.

    `tokens` is the count AFTER the step, its own batch included: the first step of a warm-up so
    moves a little instead of not at all, and the last step of the run is taken at exactly
    `min_learning_rate`. A last step that overshoots `total_tokens` also gets the minimum.

    Linear from 0 to `peak_learning_rate` over the first `warmup_tokens`; constant; then over the
    last `decay_tokens` before `total_tokens`, with x the decayed share in [0, 1] and s(x) from 1
    to 0, min + (peak - min) s(x): linear s = 1 - x; cosine s = (1 + cos pi x) / 2; minus_sqrt
    s = 1 - sqrt x (arXiv 2604.12374, section 2.4; arXiv 2405.18392 for the forms). With
    `decay_tokens` 0 the rate stays at its peak to the end.

    `derive` has checked that warm-up and decay do not overlap and that min <= peak.
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
    """s(x): the share of the way from the minimum to the peak that is left."""
    match style:
        case DecayStyle.linear:
            return 1 - decayed
        case DecayStyle.cosine:
            return (1 + cos(pi * decayed)) / 2
        case DecayStyle.minus_sqrt:
            return 1 - sqrt(decayed)
