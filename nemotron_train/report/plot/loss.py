"""Plots of the loss of runs: loss.png, losses.png. Matplotlib without a display; no torch."""

from collections.abc import Sequence
from pathlib import Path

from nemotron_train.platform.files import replacing
from nemotron_train.report.runs.read import Run, read_run
from nemotron_train.report.runs.thin import smoothed, thin

MAX_POINTS = 2000  # more than the plot has pixel columns
RAW, SMOOTH, VALIDATION, REFERENCE = "#9ecae1", "#08519c", "#d94801", "#636363"


def plot_loss(run_folder: Path, run: Run | None = None) -> Path:
    """Writes and returns `run_folder`/loss.png: training loss (each step, and smoothed), validation
    loss and the unigram entropy as a reference line over tokens, with the learning rate below.
    `run`: the folder's run if it was already read. Raises ConfigError if the folder holds no
    run."""
    run = run or read_run(run_folder)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas without pyplot: no global state, no search for a display.
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1], "hspace": 0.05}
    )
    _draw_loss(loss_axes, run)
    _draw_learning_rate(rate_axes, run)
    loss_axes.set_title(run.name.replace("$", "\\$"), loc="left", fontweight="bold")
    loss_axes.set_title(_subtitle(run), loc="right", fontsize=9, color=REFERENCE)
    path = run_folder / "loss.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def plot_runs(path: Path, labels: Sequence[str], runs: Sequence[Run]) -> Path:
    """Plots the smoothed training losses of several runs in one figure. Writes and returns
    `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (label, run) in enumerate(zip(labels, runs, strict=True)):
        tokens, losses = run.series("loss")
        curve = thin(tokens, smoothed(losses, len(losses) // 40), MAX_POINTS)
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        name = label.replace("$", "\\$").lstrip("_")  # matplotlib hides labels that start with _
        axes.plot(curve.x, curve.mean, style, color=f"C{number % 10}", linewidth=1.4, label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("training loss, smoothed (nats a token)")
    axes.xaxis.set_major_formatter(lambda value, _: format_tokens(value))
    tidy(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def _draw_loss(axes, run: Run) -> None:
    tokens, losses = run.series("loss")
    half_width = len(losses) // 40
    steps = thin(tokens, losses, MAX_POINTS)
    axes.plot(steps.x, steps.mean, color=RAW, linewidth=0.8, label="training, each step")
    if steps.size > 1:
        axes.fill_between(steps.x, steps.low, steps.high, color=RAW, linewidth=0)
    curve = thin(tokens, smoothed(losses, half_width), MAX_POINTS)
    axes.plot(curve.x, curve.mean, color=SMOOTH, linewidth=2, label="training, smoothed")
    tokens_seen, validations = run.series("validation_loss")
    if len(validations):
        axes.plot(
            tokens_seen,
            validations,
            color=VALIDATION,
            linewidth=1,
            marker="o",
            markersize=4.5,
            label="validation",
        )
    entropy = run.summary.get("unigram_entropy")
    if isinstance(entropy, int | float):
        axes.axhline(
            entropy,
            color=REFERENCE,
            linestyle="--",
            linewidth=1.2,
            label=f"unigram entropy {entropy:.2f}",
        )
    axes.set_ylabel("loss (nats a token)")
    tidy(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right")


def _draw_learning_rate(axes, run: Run) -> None:
    curve = thin(*run.series("lr"), MAX_POINTS)
    axes.plot(curve.x, curve.mean, color=SMOOTH, linewidth=1.2)
    axes.set_ylim(0, 1.15 * max(curve.high, default=0.0) or 1.0)
    axes.set_ylabel("learning rate")
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(lambda value, _: format_tokens(value))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    tidy(axes)


def tidy(axes) -> None:
    """Grid, and no frame above and to the right."""
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _subtitle(run: Run) -> str:
    tokens, validation = run.last("tokens"), run.last("validation_loss")
    parts = [f"{format_tokens(tokens)} tokens"] if tokens is not None else []
    if validation is not None:
        parts.append(f"validation loss {validation:.3f}")
    return " · ".join(parts)


def format_tokens(value: float) -> str:
    """512000 -> `512K`, 25e12 -> `25T`; three significant digits."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
