"""Plot of precision telemetry: precision.png. Matplotlib without a display; no torch.

Top: the last measured step as heat maps of layers by kinds of linear, one panel per operand: the
share of non-zero values flushed to zero, and the signal-to-noise ratio. Bottom: flushing and zero
weight gradients over tokens.
"""

import math
from pathlib import Path
from statistics import fmean

from nemotron_train.platform.files import replacing
from nemotron_train.precision.telemetry_record import FORMATS
from nemotron_train.report.plot.loss import format_tokens
from nemotron_train.report.runs.read import Run, read_run
from nemotron_train.report.runs.telemetry import (
    KINDS,
    TelemetryRecord,
    kind_of,
    layer_of,
    telemetry_records,
)

PANELS = {
    "fprop_activation": "activation in fprop",
    "fprop_weight": "weight in fprop",
    "dgrad_gradient": "output gradient in dgrad",
    "wgrad_gradient": "output gradient in wgrad",
    "wgrad_activation": "activation in wgrad",
}
MEASURES = {  # name -> title, factor, colour range, colour map (dark is bad)
    "flush_to_zero": ("flushed to zero, %", 100.0, (0.0, 40.0), "OrRd"),
    "snr_db": ("signal to noise, dB", 1.0, (14.0, 30.0), "PuBu_r"),
}
MAX_ROWS_WITH_NUMBERS = 24


def plot_precision(run_folder: Path, run: Run | None = None) -> Path | None:
    """Writes and returns `run_folder`/precision.png; None if the run has no telemetry. `run`: the
    folder's run if it was already read. Raises ConfigError if the folder holds no run."""
    run = run or read_run(run_folder)
    records = telemetry_records(run)
    if not records:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    form = _drawn_format(records[-1])
    layers = list(dict.fromkeys(layer_of(path) for path in records[-1].modules))
    kinds = [
        kind for kind in KINDS.values() if any(kind_of(p) == kind for p in records[-1].modules)
    ]
    num_rows = len(layers)
    heat_height = max(1.8, (0.24 if num_rows <= MAX_ROWS_WITH_NUMBERS else 0.11) * num_rows)
    panel_width = max(2.6, 0.3 * len(kinds))
    figure = Figure(
        figsize=(1.2 + panel_width * len(PANELS), 2 * heat_height + 4.6), layout="constrained"
    )
    FigureCanvasAgg(figure)
    heights = [2 * heat_height + 1.6, 3.0]
    heat, lines = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = heat.subplots(len(MEASURES), len(PANELS), sharex=True, sharey=True)
    for row, measure in zip(panels, MEASURES, strict=True):
        image = None
        for axes, operand in zip(row, PANELS, strict=True):
            image = _draw_heat(axes, records[-1], form, measure, operand, layers, kinds)
        heat.colorbar(image, ax=list(row), label=MEASURES[measure][0], pad=0.01, extend="both")
        row[0].set_ylabel("layer")
    for axes, title in zip(panels[0], PANELS.values(), strict=True):
        axes.set_title(title, fontsize=10)
    over_time = lines.subplots(1, 2)
    _draw_over_time(over_time[0], records, kinds, form, "activations in fprop flushed to zero, %")
    _draw_over_time(over_time[1], records, kinds, "", "zero-valued weight gradients, %")
    over_time[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    probed = any(form not in module["formats"].values() for module in records[-1].modules.values())
    origin = (
        "as training rounds, or probed where it uses another format" if probed else "in training"
    )
    name = run.name.replace("$", "\\$")  # else matplotlib reads a formula
    figure.suptitle(
        f"{name} · {form.upper()} {origin} · step {records[-1].step}, "
        f"{format_tokens(records[-1].tokens)} tokens",
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    path = run_folder / "precision.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def _drawn_format(record: TelemetryRecord) -> str:
    """NVFP4 if it was measured anywhere, else MXFP8."""
    return next(f for f in FORMATS if any(f in module for module in record.modules.values()))


def _draw_heat(
    axes,
    record: TelemetryRecord,
    form: str,
    measure: str,
    operand: str,
    layers: list[str],
    kinds: list[str],
):
    """Draws one heat map; cells stay grey if the layer has no such linear or it was not measured in
    `form`."""
    _, factor, (low, high), colours = MEASURES[measure]
    cells = [[math.nan] * len(kinds) for _ in layers]
    for path in record.modules:
        number = record.number(path, form, operand, measure)
        if number is not None:
            row, column = layers.index(layer_of(path)), kinds.index(kind_of(path))
            cells[row][column] = factor * number
    axes.set_facecolor("0.93")
    image = axes.imshow(cells, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(kinds)), kinds, rotation=90, fontsize=8)
    stride = max(1, len(layers) // 40)
    axes.set_yticks(range(0, len(layers), stride), layers[::stride], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(layers) <= MAX_ROWS_WITH_NUMBERS:
        for row, values in enumerate(cells):
            for column, value in enumerate(values):
                dark = (value > (low + high) / 2) == (measure == "flush_to_zero")
                if not math.isnan(value):
                    colour = "white" if dark else "0.15"
                    axes.text(
                        column, row, f"{value:.0f}", color=colour, ha="center", va="center", size=7
                    )
    return image


def _draw_over_time(
    axes, records: list[TelemetryRecord], kinds: list[str], form: str, title: str
) -> None:
    """Draws, for each kind of linear, the mean over its linears against tokens: flushed activations
    in format `form`, or zero weight gradients if `form` is ""."""
    from matplotlib import colormaps

    for number, kind in enumerate(kinds):
        points = []
        for record in records:
            values = [
                record.number(path, form, "fprop_activation", "flush_to_zero")
                if form
                else module["zero_weight_gradients"]
                for path, module in record.modules.items()
                if kind_of(path) == kind
            ]
            known = [value for value in values if value is not None]
            if known:
                points.append((record.tokens, 100 * fmean(known)))
        colour = colormaps["tab20"](number)
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=kind)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("tokens")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: format_tokens(value))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
