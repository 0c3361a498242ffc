"""Plots of runs that train on rollouts: reward.png, rewards.png. Matplotlib without a display; no
torch.

Owns: the pictures, and which picture a run gets at its end. Does not own: the metrics
(docs/grpo.md).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemotron_train.platform.files import replacing
from nemotron_train.report.plot.loss import MAX_POINTS, RAW, REFERENCE, SMOOTH, tidy
from nemotron_train.report.runs.policy import GROUPS, environments_of
from nemotron_train.report.runs.read import Run, read_run
from nemotron_train.report.runs.thin import smoothed, thin

# Colours of the groups, from the bottom of the picture to its top.
COLOURS = {"groups_full": "#31a354", "groups_mixed": "#fdae6b", "groups_zero": "#d9d9d9"}
STYLES = ("-", "--", ":", "-.")
SMOOTHING = 40  # curves are means over a 40th of the run on either side


def plot_reward(run_folder: Path, run: Run | None = None) -> Path:
    """Writes and returns `run_folder`/reward.png: against steps the mean reward of each step and
    smoothed, the smoothed reward and pass rate of each environment, and the shares of prompts
    whose samples all have the reward 1, all 0, or neither. `run`: the folder's run if it was
    already read. Raises ConfigError if the folder holds no run."""
    run = run or read_run(run_folder)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    rewards, passed, groups = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 3, 1.3], "hspace": 0.05}
    )
    _draw_reward(rewards, run)
    _draw_passed(passed, run)
    _draw_groups(groups, run)
    rewards.set_title(plain(run.name), loc="left", fontweight="bold")
    rewards.set_title(_subtitle(run), loc="right", fontsize=9, color=REFERENCE)
    path = run_folder / "reward.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def plot_rewards(path: Path, labels: Sequence[str], runs: Sequence[Run]) -> Path:
    """Plots the smoothed rewards of several runs in one figure. Writes and returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (label, run) in enumerate(zip(labels, runs, strict=True)):
        _draw_smoothed(axes, run, "reward", number, label)
    axes.set_xlabel("steps")
    axes.set_ylabel("reward, smoothed")
    _finish(axes)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def plain(text: str) -> str:
    """Text that matplotlib does not read as a formula, and does not hide in a legend, as it does
    with labels that begin with an underscore."""
    return text.replace("$", "\\$").lstrip("_")


def _draw_reward(axes, run: Run) -> None:
    steps, rewards = run.series("reward", along="step")
    each = thin(steps, rewards, MAX_POINTS)
    for number, name in enumerate(environments_of(run)):  # in the colours of the axes below
        _draw_smoothed(axes, run, f"reward/{name}", number)
    axes.plot(each.x, each.mean, color=RAW, linewidth=0.8, label="all, each step")
    if each.size > 1:
        axes.fill_between(each.x, each.low, each.high, color=RAW, linewidth=0)
    curve = thin(steps, smoothed(rewards, len(rewards) // SMOOTHING), MAX_POINTS)
    axes.plot(curve.x, curve.mean, color=SMOOTH, linewidth=2, label="all, smoothed")
    axes.set_ylabel("reward")
    _finish(axes)


def _draw_passed(axes, run: Run) -> None:
    for number, name in enumerate(environments_of(run)):
        _draw_smoothed(axes, run, f"pass/{name}", number, name)
    axes.set_ylabel("passed, smoothed")
    axes.set_ylim(-0.03, 1.03)
    _finish(axes)


def _draw_smoothed(axes, run: Run, metric: str, number: int, label: str = "") -> None:
    """One line in the colour and style of its number; without a label it is thin and pale."""
    steps, values = run.series(metric, along="step")
    curve = thin(steps, smoothed(values, len(values) // SMOOTHING), MAX_POINTS)
    style = STYLES[number // 10 % len(STYLES)]
    look = {"linewidth": 1.4, "label": plain(label)} if label else {"linewidth": 0.7, "alpha": 0.6}
    axes.plot(curve.x, curve.mean, style, color=f"C{number % 10}", **look)


def _draw_groups(axes, run: Run) -> None:
    """Stacked shares; where a step lacks one, as in a file of another version, it counts as 0."""
    steps = run.columns.numbers["step"]
    nothing = np.full(len(steps), np.nan)
    shares = [np.nan_to_num(run.columns.numbers.get(name, nothing)) for name in GROUPS]
    curves = [thin(steps, share, MAX_POINTS) for share in shares]
    heights = [smoothed(curve.mean, len(curve.mean) // SMOOTHING) for curve in curves]
    # Half a step more on either side, so that a run of one step has a picture too.
    places = np.concatenate([[curves[0].x[0] - 0.5], curves[0].x, [curves[0].x[-1] + 0.5]])
    heights = [np.pad(height, 1, mode="edge") for height in heights]
    labels, colours = list(GROUPS.values()), [COLOURS[name] for name in GROUPS]
    axes.stackplot(places, heights, labels=labels, colors=colours, linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_ylabel("groups")
    axes.set_xlabel("steps")
    _finish(axes)


def _finish(axes) -> None:
    tidy(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.get_legend_handles_labels()[0]:
        # Beside the axes, where a long legend hides no curve.
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _subtitle(run: Run) -> str:
    parts = [f"{run.last('step'):,.0f} steps"]
    reward, passed = run.last("reward"), run.last("pass")
    if reward is not None and passed is not None:
        parts.append(f"reward {reward:.3f}, passed {100 * passed:.1f} % at the last")
    return " · ".join(parts)
