"""One self-contained HTML page of runs: nothing is fetched, nothing else is needed to read it.

Owns: which sections there are and their order. Does not own: the numbers behind the charts
(`page_data`), comparisons (`page_gap`), how a chart looks (assets/page.js, page.css).
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_train.config.knobs import to_plain
from nemotron_train.config.schema import Config
from nemotron_train.report.gap.pairs import Comparison
from nemotron_train.report.html.data import PageData
from nemotron_train.report.html.elements import details, element, frame, table
from nemotron_train.report.html.gap import gap_section, size_section
from nemotron_train.report.plan.diff import as_text, flatten, rows
from nemotron_train.report.runs.card import CPU, EMULATED, GPU, UNVERIFIED, Capability
from nemotron_train.report.runs.read import Run
from nemotron_train.report.runs.table import HEADINGS, summarize
from nemotron_train.report.runs.timeline import moment
from nemotron_train.run_folder.metric_groups import GROUPS, OTHER

FEW_RUNS = 3  # up to so many, what is folded away otherwise stands open
MAX_STARTS = 50  # shown of a run, the last ones

CONTROLS = """\
<div class="bar" id="bar"><div id="legend" aria-label="runs"></div>
<div class="knobs"><label>smoothing <input type="range" id="smoothing" min="0" max="10" value="3"
></label><label><input type="checkbox" id="raw" checked> raw</label>
<button type="button" id="reset">whole range</button></div></div>
<noscript><p class="note">The charts need this page's own script. The pictures beside this file
show the most important ones.</p></noscript>"""


def write_page(path: Path, html: str) -> Path:
    """Replaces the file as a whole: a browser that loads it anew sees the old page or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)
    return path


@dataclass(frozen=True)
class Shown:
    """A run on the page. config: None where this version cannot read it; card: empty then."""

    label: str
    run: Run
    config: Config | None
    card: Sequence[Capability]


def build_page(
    title: str, shown: Sequence[Shown], comparisons: Sequence[Comparison], data: PageData
) -> str:
    """`data` has taken in the runs of `shown` in this order."""
    for number, each in enumerate(shown):
        data.runs[number]["label"] = each.label
    runs = [each.run for each in shown]
    _colour(data, runs, comparisons)
    gap_sections = [gap_section(each, data, number) for number, each in enumerate(comparisons)]
    sizes = size_section(comparisons)
    now = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    going = sum(run.state() == "going" for run in runs)
    words = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    words += f", {going} still going" if going else ""
    parts = [
        f"<header>{element('h1', title)}"
        f"{element('p', f'{words} · written {now} · nemotron-train report', cls='note')}</header>",
        CONTROLS,
        "<main>",
        _runs(shown),
        *(f'<section id="gap-section-{n}">{s}</section>' for n, s in enumerate(gap_sections) if s),
        f"<section>{sizes}</section>" if sizes else "",
        *(_group(group, title, data) for group, (title, _) in GROUPS.items()),
        _group(OTHER, "Other numbers", data),
        _starts(shown),
        _differences(shown),
        _cards(shown),
        "</main>",
    ]
    return frame(title, "\n".join(part for part in parts if part), data.as_json())


def _colour(data: PageData, runs: Sequence[Run], comparisons: Sequence[Comparison]) -> None:
    """Runs of one group share its colour and differ in their dashes; without comparisons every run
    has a colour of its own."""
    places = {run.path: number for number, run in enumerate(runs)}
    taken = 0
    for comparison in comparisons:
        for color, members in enumerate(comparison.groups.values()):
            for dash, run in enumerate(members.values()):
                number = places.pop(run.path, None)
                if number is not None:
                    data.runs[number] |= {"color": color, "dash": dash}
        taken = max(taken, len(comparison.groups))
    for color, number in enumerate(places.values()):
        data.runs[number] |= {"color": taken + color, "dash": 0}


def _runs(shown: Sequence[Shown]) -> str:
    cells = [[each.label, *summarize(each.run)[1:]] for each in shown]
    return (
        f"<section><h2>Runs</h2>{table(HEADINGS, cells, numbers=range(1, 8))}"
        '<p class="note">loss: nats a token, mean of the last 20 logged steps; tokens/s and MFU: '
        "median; silent: not ended in order, and no line for ten minutes</p></section>"
    )


def _group(group: str, title: str, data: PageData) -> str:
    charts = [c for c in data.charts.values() if c["group"] == group]
    heats = [h for h in data.heats.values() if h["group"] == group]
    if not charts and not heats:
        return ""
    # The one that a person looks at first is drawn over the whole width.
    figures = [
        f'<figure data-chart="{c["id"]}"{_wide(c["id"])}></figure>' for c in _ordered(charts)
    ]
    figures += [f'<figure data-heat="{h["id"]}"></figure>' for h in heats]
    return (
        f'<section id="{group}">{element("h2", title)}<div class="grid">'
        f"{''.join(figures)}</div></section>"
    )


def _wide(name: str) -> str:
    return ' class="wide"' if name in ("loss", "clock") else ""


def _ordered(charts: list[dict]) -> list[dict]:
    order = ["loss", "validation_loss", "tokens_per_second", "model_flops_utilization", "step_time"]
    order += ["grad_norm", "max_vio", "clock", "flushing"]
    return sorted(charts, key=lambda c: order.index(c["id"]) if c["id"] in order else len(order))


def _starts(shown: Sequence[Shown]) -> str:
    """Every start of every run, with its machine and code."""
    parts = []
    for each in shown:
        cells = []
        for number, start in list(enumerate(each.run.starts, start=1))[-MAX_STARTS:]:
            machine, git = start.get("machine"), start.get("git")
            machine = machine if isinstance(machine, dict) else {}
            git = git if isinstance(git, dict) else {}
            commit = str(git.get("commit", "-"))[:10] + (" modified" if git.get("modified") else "")
            ended = str(start.get("ended", "no end recorded"))
            ended += f": {start['reason']}" if start.get("reason") else ""
            where = f"{machine.get('device_name', 'not recorded')}, {_count(machine.get('ranks'))}"
            times = (_clock(start.get("time")), _clock(start.get("end_time")))
            step = str(start.get("from_step", "-"))
            cells.append([str(number), *times, step, ended, where, commit])
        if cells:
            headings = ("", "began (UTC)", "ended (UTC)", "from step", "how it ended", "on", "code")
            few = len(shown) <= FEW_RUNS
            parts.append(details(each.label, table(headings, cells), is_open=few))
    return f"<section><h2>Starts</h2>{''.join(parts)}</section>" if parts else ""


def _count(ranks: object) -> str:
    return f"{ranks} rank{'s' if ranks != 1 else ''}" if isinstance(ranks, int) else "ranks unknown"


def _clock(text: object) -> str:
    seconds = moment(text)
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _differences(shown: Sequence[Shown]) -> str:
    """The knobs in which the runs' configurations differ; of a single run, all of them."""
    known = [(each.label, to_plain(each.config)) for each in shown if each.config is not None]
    unread = [each.label for each in shown if each.config is None]
    note = ""
    if unread:
        words = f"not shown, for this version cannot read their config.yaml: {', '.join(unread)}"
        note = element("p", words, cls="note")
    if not known:
        return f"<section><h2>Configuration</h2>{note}</section>"
    trees = [flatten(tree) for _, tree in known]
    headings = ("knob", *(label for label, _ in known))
    if len(known) == 1:
        cells = [(knob, as_text(value)) for knob, value in trees[0].items()]
        folded = details(f"{len(cells)} knobs", table(headings, cells, cls="config"))
        return f"<section><h2>Configuration</h2>{folded}{note}</section>"
    different = [[name, *values] for name, values, _ in rows(trees)]
    if not different:
        content = "<p>The configurations are the same, but for name and folder.</p>"
    else:
        content = table(headings, different, cls="config")
    return f"<section><h2>Differences of the configurations</h2>{content}{note}</section>"


def _cards(shown: Sequence[Shown]) -> str:
    marks = (GPU, CPU, EMULATED, UNVERIFIED)
    headings = ("capability used", "mark", "evidence in the run folder")
    parts = []
    for each in shown:
        cells = [[entry.name, " + ".join(entry.marks), entry.evidence] for entry in each.card]
        if cells:
            content = table(headings, cells, marks=marks)
            parts.append(details(each.label, content, is_open=len(shown) <= FEW_RUNS))
    if not parts:
        return ""
    return (
        "<section><h2>Run cards</h2>"
        '<p class="note">What each run used, marked by what its folder proves: '
        "ran-on-GPU and ran-on-CPU: steps were taken with it there; emulated: computed in the "
        "format's numbers by other arithmetic; unverified: the folder does not show it.</p>"
        f"{''.join(parts)}</section>"
    )
