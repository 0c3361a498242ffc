"""Loss gaps of a sweep: each group of runs held to the baseline, seed by seed. No torch.

Owns: the numbers, their table and gap.png. Does not own: running the sweep (`launch.sweep`).

A pair shares its seed, hence initial weights and data order, so its difference carries none of the
spread between seeds. The relative gap is (loss - baseline's loss) / baseline's loss, as the
Nemotron 3 and NVFP4 reports give it; the standard error is that of the mean over pairs.
"""

import json
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.config.schema import ConfigError
from nemotron_train.report.plot import format_tokens, smoothed
from nemotron_train.report.read import Run, read_run

MAX_BANDS = 3  # more bands of standard errors than this hide one another
TAIL = 0.1  # share of the steps, at the end, whose mean training loss is compared


@dataclass(frozen=True)
class Gap:
    """A group's relative gaps to the baseline, one a seed that both have finished, by seed.

    `validation` compares the last validation losses, `training` the mean training loss over the
    last tenth of the steps; fractions, not percent.
    """

    group: str
    seeds: list[int]
    loss: float  # mean validation loss, nats a token
    validation: list[float]
    training: list[float]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for fewer than two values)."""
    if not values:
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def is_sweep(folder: Path) -> bool:
    """Whether `folder` is a sweep's rather than a run's."""
    return (folder / "sweep.json").is_file()


def read_sweep(folder: Path) -> tuple[str, dict[str, dict[int, Run]]]:
    """The baseline's name and the finished runs by group and seed. Raises ConfigError."""
    try:
        sweep = json.loads((folder / "sweep.json").read_text())
        cells, baseline = sweep["cells"], sweep["baseline"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: no sweep, its sweep.json cannot be read ({error})") from None
    groups: dict[str, dict[int, Run]] = {}
    for cell in cells:
        runs = groups.setdefault(cell["group"], {})
        path = folder / cell["name"]
        if (path / "metrics.jsonl").exists():
            run = read_run(path)
            if run.summary.get("finished"):
                runs[cell["seed"]] = run
    return baseline, groups


def gaps(baseline: str, groups: dict[str, dict[int, Run]]) -> list[Gap]:
    """In the sweep's order, the baseline itself first (its gaps are zero)."""
    reference = groups.get(baseline, {})
    found = []
    for group, runs in groups.items():
        seeds = sorted(runs.keys() & reference.keys())
        if not seeds:
            continue
        pairs = [(runs[seed], reference[seed]) for seed in seeds]
        found.append(
            Gap(
                group,
                seeds,
                statistics.fmean(_validation(run) for run, _ in pairs),
                [_relative(_validation(run), _validation(twin)) for run, twin in pairs],
                [_relative(_tail_loss(run), _tail_loss(twin)) for run, twin in pairs],
            )
        )
    return sorted(found, key=lambda gap: gap.group != baseline)


def report_gaps(folder: Path, console: Any) -> None:
    """The table on the terminal, gap.md and gap.png in the sweep's folder."""
    baseline, groups = read_sweep(folder)
    found = gaps(baseline, groups)
    if not found:
        raise ConfigError(f"{folder}: no finished run of the baseline {baseline} to compare with")
    from rich.table import Table

    table = Table(header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    rows = [_row(gap, baseline) for gap in found]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    spread = _seed_spread(groups[baseline])
    note = (
        f"Gaps are to {baseline} of the same seed, in percent of its loss: mean ± standard error "
        f"over seeds. Training loss: mean of the last {TAIL:.0%} of the steps. "
        f"{baseline}'s own validation loss differs by {spread:.2f} % between seeds (standard "
        "deviation)."
    )
    console.print(note, style="dim", soft_wrap=True)
    (folder / "gap.md").write_text(_markdown(rows, note))
    picture = plot_gaps(folder, baseline, groups)
    console.print(f"wrote {folder / 'gap.md'} and {picture}", highlight=False, soft_wrap=True)


HEADINGS = ("runs", "seeds", "validation loss", "validation gap %", "training gap %")


def _row(gap: Gap, baseline: str) -> list[str]:
    cells = [gap.group, str(len(gap.seeds)), f"{gap.loss:.4f}"]
    if gap.group == baseline:
        return [*cells, "(baseline)", "(baseline)"]
    return cells + [_percent(values) for values in (gap.validation, gap.training)]


def _percent(values: list[float]) -> str:
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:+.3f}" if math.isnan(error) else f"{mean:+.3f} ± {error:.3f}"


def _markdown(rows: list[list[str]], note: str) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + f"\n\n{note}\n"


def plot_gaps(folder: Path, baseline: str, groups: dict[str, dict[int, Run]]) -> Path:
    """gap.png: on the left the relative gap of the smoothed training loss over tokens, mean of the
    seeds, with a band of one standard error where there are few groups; on the right the
    validation gaps at the end, a dot a seed, mean and standard error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    others = [gap for gap in gaps(baseline, groups) if gap.group != baseline]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, ends = figure.subplots(1, 2, width_ratios=[3, 2])
    for index, gap in enumerate(others):
        color = f"C{index % 10}"
        pairs = [(groups[gap.group][seed], groups[baseline][seed]) for seed in gap.seeds]
        _draw_curve(curves, pairs, color, with_band=len(others) <= MAX_BANDS)
        mean, error = mean_and_error([100 * value for value in gap.validation])
        height = len(others) - index
        ends.plot(
            [100 * value for value in gap.validation],
            [height] * len(gap.validation),
            "o",
            color=color,
            alpha=0.45,
            markersize=5,
        )
        ends.errorbar(mean, height, xerr=error, fmt="|", color=color, markersize=14, capsize=3)
    ends.set_yticks(range(len(others), 0, -1), [gap.group for gap in others])
    for index, label in enumerate(ends.get_yticklabels()):
        label.set_color(f"C{index % 10}")  # they are the legend of the curves too
    ends.set_xlabel("gap of the final validation loss (%)")
    curves.set_xlabel("tokens")
    curves.set_ylabel("gap of the smoothed training loss (%)")
    curves.xaxis.set_major_formatter(lambda value, _: format_tokens(value))
    for axes in (curves, ends):
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    curves.axhline(0, color="0.4", linewidth=1)
    ends.axvline(0, color="0.4", linewidth=1)
    figure.suptitle(
        f"{folder.name}: loss relative to {baseline} of the same seed", x=0.01, ha="left"
    )
    path = folder / "gap.png"
    temporary = folder / f".gap.{os.getpid()}.png"
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
    return path


def _draw_curve(axes: Any, pairs: list[tuple[Run, Run]], color: str, with_band: bool) -> None:
    tokens: list[float] = []
    by_seed, reach = [], 0
    for run, twin in pairs:
        (tokens, losses), (_, twin_losses) = run.series("loss"), twin.series("loss")
        length = min(len(losses), len(twin_losses))
        relative = [100 * _relative(losses[i], twin_losses[i]) for i in range(length)]
        reach = length // 16
        by_seed.append(smoothed(relative, reach))
    points = [mean_and_error(list(values)) for values in zip(*by_seed, strict=False)]
    inside = slice(reach, len(points) - reach)  # near the ends the window is short and says little
    tokens, points = tokens[: len(points)][inside], points[inside]
    axes.plot(tokens, [mean for mean, _ in points], color=color, linewidth=1.6)
    if with_band and len(pairs) > 1:
        lower, upper = zip(*((mean - error, mean + error) for mean, error in points), strict=True)
        axes.fill_between(tokens, lower, upper, color=color, alpha=0.15, linewidth=0)


def _validation(run: Run) -> float:
    return float(run.summary["validation_loss"])


def _tail_loss(run: Run) -> float:
    _, losses = run.series("loss")
    return statistics.fmean(losses[-max(1, round(TAIL * len(losses))) :])


def _relative(loss: float, reference: float) -> float:
    return (loss - reference) / reference


def _seed_spread(runs: dict[int, Run]) -> float:
    losses = [_validation(run) for run in runs.values()]
    return 100 * statistics.stdev(losses) / statistics.fmean(losses) if len(losses) > 1 else 0.0
