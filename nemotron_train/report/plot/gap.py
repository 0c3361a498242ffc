"""Plot of loss gaps: gap.png. Matplotlib without a display; no torch."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_train.platform.files import replacing
from nemotron_train.report.gap.gap import SMOOTH, curve, gaps, mean_and_error, noise
from nemotron_train.report.gap.pairs import Comparison
from nemotron_train.report.plot.loss import MAX_POINTS, format_tokens
from nemotron_train.report.runs.thin import thin

MAX_BANDS = 3  # more standard-error bands than this would hide each other


def plot_gaps(path: Path, comparisons: Sequence[Comparison]) -> Path:
    """Writes and returns `path`.

    Left: the relative gap of the smoothed training loss over tokens, mean over seeds. A band shows
    one standard error if there are few groups; a single group also shows the raw gap; a single
    comparison also shows its noise in grey. Right: the final gaps, one dot per seed, with mean and
    standard error, of the validation loss if all runs are finished, else of the training loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    others = [(comparison, gap) for comparison in comparisons for gap in gaps(comparison)]
    others = [(comparison, gap) for comparison, gap in others if gap.group != comparison.baseline]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, ends = figure.subplots(1, 2, width_ratios=[3, 2])
    is_final = all(len(gap.validation) == len(gap.seeds) for _, gap in others)
    for index, (comparison, gap) in enumerate(others):
        color = f"C{index % 10}"
        _draw_curve(curves, comparison, gap.group, color, len(others))
        values = [100 * value for value in (gap.validation if is_final else gap.training)]
        mean, error = mean_and_error(values)
        height = len(others) - index
        ends.plot(values, [height] * len(values), "o", color=color, alpha=0.45, markersize=5)
        error = 0 if math.isnan(error) else error
        ends.errorbar(mean, height, xerr=error, fmt="|", color=color, markersize=14, capsize=3)
    # Keep the limits of the curves, so that large noise does not flatten them. Several comparisons
    # have one noise band each, which would hide each other, so they show none.
    limits = curves.get_ylim()
    if len(comparisons) == 1:
        _draw_noise(curves, comparisons[0])
    curves.set_ylim(min(limits[0], -0.05), max(limits[1], 0.05))
    ends.set_yticks(range(len(others), 0, -1), [_plain(gap.group) for _, gap in others])
    for index, label in enumerate(ends.get_yticklabels()):
        label.set_color(f"C{index % 10}")  # these labels are also the legend of the curves
    metric = "final validation loss" if is_final else "training loss so far"
    ends.set_xlabel(f"gap of the {metric} (%)")
    curves.set_xlabel("tokens")
    curves.set_ylabel("gap of the smoothed training loss (%)")
    curves.xaxis.set_major_formatter(lambda value, _: format_tokens(value))
    for axes in (curves, ends):
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    curves.axhline(0, color="0.4", linewidth=1)
    ends.axvline(0, color="0.4", linewidth=1)
    names = " or ".join(comparison.baseline for comparison in comparisons)
    title = f"{comparisons[0].name}: loss relative to {names} of the same seed"
    figure.suptitle(_plain(title), x=0.01, ha="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", "\\$")


def _draw_noise(axes: Any, comparison: Comparison) -> None:
    spread = noise(comparison)
    if len(spread.tokens):
        band = thin(spread.tokens, spread.band, MAX_POINTS)
        label = "noise of the sums' order" if spread.source == "sums" else "noise between seeds"
        axes.fill_between(
            band.x,
            -band.mean,
            band.mean,
            color="0.5",
            alpha=0.18,
            linewidth=0,
            zorder=0.5,
            label=label,
        )
        axes.legend(frameon=False, loc="upper right")


def _draw_curve(axes: Any, comparison: Comparison, group: str, color: str, num_groups: int) -> None:
    gap = curve(comparison.pairs(group))
    if gap is None:
        return
    if num_groups == 1:
        raw = thin(gap.tokens, gap.raw, MAX_POINTS)
        axes.plot(raw.x, raw.mean, color=color, alpha=0.3, linewidth=0.8)
    # Near the ends the smoothing window is too short to be meaningful.
    margin = len(gap.tokens) // SMOOTH
    inside = slice(margin, len(gap.tokens) - margin)
    mean = thin(gap.tokens[inside], gap.smooth[inside], MAX_POINTS)
    axes.plot(mean.x, mean.mean, color=color, linewidth=1.6)
    if num_groups <= MAX_BANDS and np.isfinite(gap.error).all():
        error = thin(gap.tokens[inside], gap.error[inside], MAX_POINTS).mean
        axes.fill_between(
            mean.x, mean.mean - error, mean.mean + error, color=color, alpha=0.15, linewidth=0
        )
