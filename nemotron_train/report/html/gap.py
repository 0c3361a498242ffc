"""A comparison on the page: the gap over tokens with its noise, the losses with a band over seeds,
the table, the verdicts. No torch.

Owns: the sections' HTML and their charts. Does not own: the numbers (`report.gap`), drawing a chart
(page.js).
"""

from collections.abc import Sequence

import numpy as np

from nemotron_train.report.gap.gap import SMOOTH, Curve, curve, gaps, noise
from nemotron_train.report.gap.pairs import Comparison
from nemotron_train.report.gap.sizes import by_size, slope_sentence
from nemotron_train.report.gap.table import HEADINGS, gap_rows, percent, verdicts_of
from nemotron_train.report.html.data import PageData
from nemotron_train.report.html.elements import element, table
from nemotron_train.report.runs.read import Run
from nemotron_train.report.runs.thin import rounded, smoothed, thin

_LEVELS = {"same": "≈", "unclear": "?", "worse": "▲", "better": "▼"}


def gap_section(comparison: Comparison, data: PageData, number: int) -> str:
    """HTML of a comparison; adds its charts to `data`. "" if there is no pair. `number`: index of
    the comparison, for the charts' ids."""
    results = gaps(comparison)
    others = [gap for gap in results if gap.group != comparison.baseline]
    if not others:
        return ""
    _add_gap_chart(comparison, data, number)
    _add_loss_chart(comparison, data, number)
    rows, notes = gap_rows(comparison, results)
    spread = noise(comparison)
    cards = []
    for group, verdict in verdicts_of(comparison, results, spread).items():
        if group in comparison.repeats:
            continue
        group_name, _, explanation = verdict.text.partition(": ")
        sign = element("span", _LEVELS[verdict.level], cls="sign", aria_hidden="true")
        title = element("strong", f"{group_name}: {verdict.short}")
        cards.append(
            f'<div class="card {verdict.level}">{sign}{title}{element("p", explanation)}</div>'
        )
    title = f"Loss gap to {comparison.baseline}, {comparison.name}"
    return (
        f"<h2>{element('span', title)}</h2>"
        f'<div class="cards">{"".join(cards)}</div>'
        f'<div class="grid"><figure data-chart="gap-{number}"></figure>'
        f'<figure data-chart="bands-{number}"></figure></div>'
        f"{table(HEADINGS, rows, numbers=range(1, 6))}{element('p', notes[0], cls='note')}"
    )


def size_section(comparisons: Sequence[Comparison]) -> str:
    """HTML of the gaps against model size; "" if the comparisons have only one size."""
    plans = by_size(comparisons)
    if not plans:
        return ""
    rows = [
        [plan, f"{size.active:,}", str(len(size.training))]
        + [_mean(values) for values in (size.validation, size.training)]
        for plan, sizes in plans.items()
        for size in sizes
    ]
    texts = [text for plan, sizes in plans.items() if (text := slope_sentence(plan, sizes))]
    headings = ("plan", "active parameters", "seeds", "validation gap %", "training gap %")
    return (
        f"<h2>{element('span', 'Gap against size')}</h2>"
        f"{''.join(element('p', text) for text in texts)}"
        f"{table(headings, rows, numbers=range(1, 5))}"
        f"{element('p', 'Its picture is gap_sizes.png, beside the sweep.', cls='note')}"
    )


def _mean(values: list[float]) -> str:
    return percent([value / 100 for value in values])


def _add_gap_chart(comparison: Comparison, data: PageData, number: int) -> None:
    title = f"Training loss against {comparison.baseline} of the same seed and tokens"
    chart = data.chart(f"gap-{number}", "gap", title, "relative gap, %", zero=True)
    spread = noise(comparison)
    if len(spread.tokens):
        band = thin(spread.tokens, spread.band, 1000)
        values = rounded(band.mean, 4)
        text = "noise of the sums' order" if spread.source == "sums" else "noise between seeds"
        negative = [None if v is None else -v for v in values]
        line = {"name": text, "x": data.place(band.x), "lo": negative, "hi": values, "noise": True}
        chart["lines"].append(line | {"y": [0] * len(values), "fixed": True, "color": -1})
    for color, group in enumerate(comparison.groups):
        gap = curve(comparison.pairs(group)) if group != comparison.baseline else None
        if gap is None:
            continue
        raw = data.line(
            gap.tokens, gap.raw, extremes=True, name=f"{group}, raw", raw=True, fixed=True
        )
        chart["lines"].append(raw | {"color": color})
        chart["lines"].append(_smooth_line(gap, data, group) | {"color": color})


def _smooth_line(gap: Curve, data: PageData, group: str) -> dict:
    # Near the ends the smoothing window is too short to be meaningful.
    margin = len(gap.tokens) // SMOOTH
    inside = slice(margin, len(gap.tokens) - margin)
    tokens = gap.tokens[inside]
    line = data.line(tokens, gap.smooth[inside], name=group, fixed=True)
    if np.isfinite(gap.error).all():
        mean = thin(tokens, gap.smooth[inside], len(line["y"])).mean
        error = thin(tokens, gap.error[inside], len(line["y"])).mean
        line |= {"lo": rounded(mean - error), "hi": rounded(mean + error), "band": True}
    return line


def _add_loss_chart(comparison: Comparison, data: PageData, number: int) -> None:
    title = "Training loss, smoothed: mean of the seeds, band from least to greatest"
    chart = data.chart(f"bands-{number}", "gap", title, "nats a token")
    for color, (group, runs) in enumerate(comparison.groups.items()):
        tokens, losses = seeds_together(list(runs.values()))
        if not len(tokens):
            continue
        mean = losses.mean(axis=0)
        name = f"{group} ({len(losses)} seed{'s' if len(losses) > 1 else ''})"
        line = data.line(tokens, mean, name=name, fixed=True, color=color)
        if len(losses) > 1:
            size = len(line["y"])
            low = thin(tokens, losses.min(axis=0), size).mean
            high = thin(tokens, losses.max(axis=0), size).mean
            line |= {"lo": rounded(low), "hi": rounded(high), "band": True}
        chart["lines"].append(line)


def seeds_together(runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Token counts that all runs logged, [n], and the smoothed training losses there, [runs, n]."""
    series = [run.series("loss") for run in runs]
    tokens = series[0][0]
    for run_tokens, _ in series[1:]:
        tokens = np.intersect1d(tokens, run_tokens)
    losses = [
        smoothed(v[np.isin(run_tokens, tokens)], len(tokens) // 40) for run_tokens, v in series
    ]
    return tokens, np.array(losses)
