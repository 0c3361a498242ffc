"""Plot of loss gaps against model size: gap_sizes.png. Matplotlib without a display; no torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_train.platform.files import replacing
from nemotron_train.report.gap.gap import mean_and_error
from nemotron_train.report.gap.sizes import Size, is_final
from nemotron_train.report.plot.loss import format_tokens


def plot_sizes(path: Path, plans: Mapping[str, Sequence[Size]], title: str) -> Path:
    """Plots the gap of the validation loss (if all runs are finished) and of the training loss over
    active parameters: one dot per seed, mean and standard error per size. `plans`: plan -> its
    sizes. Writes and returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = {"training loss, last tenth": "training"}
    if all(is_final(sizes) for sizes in plans.values()):
        metrics = {"final validation loss": "validation", **metrics}
    figure = Figure(figsize=(5.5 * len(metrics), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, (metric, name) in zip(panels, metrics.items(), strict=True):
        for number, (plan, sizes) in enumerate(plans.items()):
            # Shift plans that share a size, so that they stand side by side.
            factor = 1 + 0.03 * (number - (len(plans) - 1) / 2)
            _draw(axes, plan, sizes, name, f"C{number % 10}", factor)
        _tidy(axes, metric, plans)
    if len(plans) > 1:
        panels[-1].legend(frameon=False)
    figure.suptitle(title.replace("$", "\\$"), x=0.01, ha="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def _draw(
    axes: Any, plan: str, sizes: Sequence[Size], name: str, color: str, factor: float
) -> None:
    x = [size.active * factor for size in sizes]
    values = [getattr(size, name) for size in sizes]
    for position, gaps in zip(x, values, strict=True):
        axes.plot([position] * len(gaps), gaps, "o", color=color, alpha=0.35, markersize=5)
    means, errors = zip(*(mean_and_error(gaps) for gaps in values), strict=True)
    errors = [0.0 if math.isnan(error) else error for error in errors]
    axes.errorbar(x, means, yerr=errors, fmt="o-", color=color, markersize=5, capsize=4, label=plan)


def _tidy(axes: Any, metric: str, plans: Mapping[str, Sequence[Size]]) -> None:
    active = sorted({size.active for sizes in plans.values() for size in sizes})
    axes.set_xscale("log")
    axes.set_xticks(active, [format_tokens(value) for value in active], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("active parameters")
    axes.set_ylabel(f"gap of the {metric} (%)")
    axes.tick_params(labelleft=True)
    axes.axhline(0, color="0.4", linewidth=1)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
