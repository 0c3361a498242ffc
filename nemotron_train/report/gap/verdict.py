"""The verdict on a gap, in words that claim no more than the numbers show.

Owns: the rule and the sentences. Does not own: the numbers (`gap`).

A gap differs from zero if Student's 95 % interval of the mean over seeds excludes zero. It is more
than noise if it also exceeds twice the noise. One seed gives no interval, so it proves nothing.
"""

import math
from dataclasses import dataclass

from nemotron_train.report.gap.gap import Gap, Noise, Trend, interval, mean_and_error

SOURCES = {
    "sums": "the same runs with their sums in another order",
    "seeds": "spread of the baseline's seeds",
}


@dataclass(frozen=True)
class Verdict:
    """short: text for a table cell; level: `same`, `unclear`, `worse` or `better`; text: the full
    sentence."""

    short: str
    level: str
    text: str


def judge(gap: Gap, noise: Noise, baseline: str) -> Verdict:
    """The verdict from the validation losses if every pair has them, else from the training
    losses."""
    is_final = bool(gap.validation) and len(gap.validation) == len(gap.seeds)
    values = [100 * value for value in (gap.validation if is_final else gap.training)]
    spread = noise.validation if is_final else noise.training
    metric = "validation loss" if is_final else "training loss so far, last tenth"
    mean, error = mean_and_error(values)
    tail = f"{_noise_text(spread, noise)}. {_trend_text(gap.trend)}".strip()
    if not values:
        text = f"{gap.group}: no step yet that {baseline} has too."
        return Verdict("nothing to compare", "unclear", text)
    if math.isnan(error):
        beyond = spread == spread and abs(mean) > 2 * spread
        remark = ", more than twice the noise" if beyond else ""
        text = (
            f"{gap.group}: one pair, so no error can be given: {mean:+.2f} % of {baseline}'s "
            f"{metric}{remark}; repeat it with other seeds{tail}"
        )
        return Verdict("one seed", "unclear", text)
    low, high = interval(values)
    numbers = (
        f"{mean:+.2f} ± {error:.2f} % of the {metric} "
        f"({len(values)} seeds, 95 % interval {low:+.2f} to {high:+.2f} %)"
    )
    if low <= 0 <= high:
        words, short, level = f"not apart from {baseline}", "not apart from zero", "same"
    elif spread == spread and abs(mean) <= 2 * spread:
        words = f"apart from {baseline}, but within twice the noise"
        short, level = "within noise", "same"
    else:
        level = "worse" if mean > 0 else "better"
        words, short = f"{level} than {baseline}", level
    return Verdict(short, level, f"{gap.group}: {words}: {numbers}{tail}")


def trend_words(trend: Trend | None) -> str:
    """Text for a table cell: percentage points per doubling of the tokens, "-" for no trend."""
    if trend is None:
        return "-"
    mean, error = mean_and_error(trend.slopes)
    return f"{mean:+.3f}" if math.isnan(error) else f"{mean:+.3f} ± {error:.3f}"


def _noise_text(spread: float, noise: Noise) -> str:
    if math.isnan(spread):
        return ", noise not known (no second seed, no repeat)"
    return f", noise {spread:.2f} % ({SOURCES[noise.source]})"


def _trend_text(trend: Trend | None) -> str:
    if trend is None:
        return "Too few steps for a trend."
    slope = f"{trend_words(trend)} points a doubling of the tokens, over their last half"
    low, high = interval(trend.slopes)
    if math.isnan(low):
        return f"Trend: {slope}, one seed."
    if low <= 0 <= high:
        return f"No trend apart from zero: {slope}."
    return f"The gap {'grows' if low > 0 else 'falls'}: {slope}."
