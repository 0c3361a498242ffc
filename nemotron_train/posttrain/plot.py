"""Pictures of post-training. Matplotlib without a display; no torch."""

from collections.abc import Mapping
from pathlib import Path

from nemotron_train.platform.files import replacing
from nemotron_train.posttrain.pass_rates import Estimate


def plot_pass_rates(
    path: Path, runs: Mapping[str, Mapping[str, tuple[Estimate, Estimate]]], k: int
) -> Path:
    """Bars of pass@1 and pass@k by environment, one pair a run, with their intervals. Writes and
    returns `path`. runs: run -> environment -> the two estimates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(next(iter(runs.values())))
    height = 0.8 / len(runs)
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(names) * (1 + len(runs))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (run, estimates) in enumerate(runs.items()):
        color = f"C{number % 10}"
        for place, name in enumerate(names):
            one, several = estimates[name]
            y = place + height * (number - (len(runs) - 1) / 2)
            label = run.replace("$", "\\$") if place == 0 else None
            axes.barh(y, 100 * several.value, 0.9 * height, color=color, alpha=0.3)
            axes.barh(y, 100 * one.value, 0.9 * height, color=color, label=label)
            for estimate, shift in ((one, 0.12), (several, -0.12)):
                left, right = estimate.value - estimate.low, estimate.high - estimate.value
                axes.errorbar(
                    100 * estimate.value,
                    y + shift * height,
                    xerr=[[100 * left], [100 * right]],
                    color="0.25",
                    linewidth=1,
                    capsize=2,
                )
    axes.set_yticks(range(len(names)), [name.replace("$", "\\$") for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"pass@1 (dark) and pass@{k} (light), %, with 95 % intervals over prompts")
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if len(runs) > 1:
        figure.legend(loc="outside upper left", frameon=False)
    else:
        axes.set_title(next(iter(runs)).replace("$", "\\$"), loc="left", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
