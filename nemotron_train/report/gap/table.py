"""The table of loss gaps, for the terminal and for gap.md, and the notes below it. No torch."""

import math

from nemotron_train.report.gap.gap import TAIL, Gap, Noise, mean_and_error, noise
from nemotron_train.report.gap.pairs import Comparison
from nemotron_train.report.gap.verdict import Verdict, judge, trend_words

HEADINGS = ("runs", "seeds", "validation loss", "validation gap %", "training gap %")
HEADINGS += ("trend a doubling", "verdict")


def gap_rows(comparison: Comparison, results: list[Gap]) -> tuple[list[list[str]], list[str]]:
    """Returns (rows, notes): cells under HEADINGS, one row per group, and the notes below the
    table."""
    if not results:
        return [], []
    spread = noise(comparison)
    verdicts = verdicts_of(comparison, results, spread)
    rows = [_row(gap, comparison, verdicts) for gap in results]
    notes = [
        f"Gaps are to {comparison.baseline} of the same seed, in percent of its loss: mean ± "
        f"standard error over seeds. Training loss: mean of the last {TAIL:.0%} of the steps that "
        "both have. Trend: percentage points a doubling of the tokens, over their last half."
    ]
    return rows, [*notes, *(verdict.text for verdict in verdicts.values())]


def verdicts_of(comparison: Comparison, results: list[Gap], spread: Noise) -> dict[str, Verdict]:
    """Group -> verdict, for all groups except the baseline."""
    baseline = comparison.baseline
    return {gap.group: judge(gap, spread, baseline) for gap in results if gap.group != baseline}


def markdown(rows: list[list[str]], notes: list[str]) -> str:
    """The table and its notes as Markdown, the content of gap.md."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 2) + "|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def _row(gap: Gap, comparison: Comparison, verdicts: dict[str, Verdict]) -> list[str]:
    loss = "-" if math.isnan(gap.loss) else f"{gap.loss:.4f}"
    cells = [gap.group, str(len(gap.seeds)), loss]
    if gap.group == comparison.baseline:
        return [*cells, "(baseline)", "(baseline)", "-", "-"]
    trend = trend_words(gap.trend)
    verdict = verdicts[gap.group].short
    if gap.group in comparison.repeats:
        verdict = "repeat: this is the noise"
    return [*cells, percent(gap.validation), percent(gap.training), trend, verdict]


def percent(values: list[float]) -> str:
    """Fractions as text in percent: mean ± standard error, "-" for none."""
    if not values:
        return "-"
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:+.3f}" if math.isnan(error) else f"{mean:+.3f} ± {error:.3f}"
