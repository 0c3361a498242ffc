"""Pictures of post-training. Matplotlib without a display; no torch."""

from collections.abc import Mapping, Sequence
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


def plot_budgets(
    path: Path,
    title: str,
    budgets: Sequence[str],
    pass_1: Mapping[str, Sequence[Estimate]],
    tokens: Mapping[str, Sequence[float]],
    shares: Mapping[str, Sequence[float]],
) -> Path:
    """Against the reasoning budget: pass@1 of each environment, the last of them, all together,
    with its interval; tokens of a rollout by kind, one on the other; shares of the rollouts by
    name. Each has one number a budget. Writes and returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = range(len(budgets))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, estimates in pass_1.items():
        is_last = name == list(pass_1)[-1]
        values = [100 * estimate.value for estimate in estimates]
        style = {"color": "0.1", "linewidth": 2.2} if is_last else {"linewidth": 1, "alpha": 0.8}
        left.plot(places, values, marker=".", label=name.replace("$", "\\$"), **style)
        if is_last:
            low, high = ([100 * getattr(e, side) for e in estimates] for side in ("low", "high"))
            left.fill_between(places, low, high, color="0.1", alpha=0.12, linewidth=0)
    left.set_ylabel("pass@1, %, with the 95 % interval of all")
    left.set_ylim(0, 100)
    below = [0.0] * len(budgets)
    for name, values in tokens.items():
        right.bar(places, values, 0.6, bottom=below, label=name, alpha=0.45)
        below = [a + b for a, b in zip(below, values, strict=True)]
    right.set_ylabel("tokens of a rollout")
    second = right.twinx()
    for number, (name, values) in enumerate(shares.items(), len(tokens)):
        shown = [100 * value for value in values]
        second.plot(places, shown, marker=".", color=f"C{number}", label=name)
    second.set_ylabel("share of the rollouts, %")
    second.set_ylim(0, 105)
    kinds = [axes.get_legend_handles_labels() for axes in (right, second)]
    below_axes = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "frameon": False}
    left.legend(fontsize=8, ncols=4, **below_axes)
    handles, names = (of_right + of_second for of_right, of_second in zip(*kinds, strict=True))
    right.legend(handles, names, fontsize=8, ncols=4, **below_axes)
    for axes in (left, right):
        axes.set_xticks(places, [label.replace("inf", "∞") for label in budgets])
        axes.set_xlabel("budget, thinking tokens")
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in (left, right, second):
        axes.spines["top"].set_visible(False)
    left.set_title(title.replace("$", "\\$"), loc="left", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
