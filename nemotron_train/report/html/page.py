"""One self-contained HTML page about runs; it loads no other file.

Owns: the sections and their order. Does not own: the data of the charts (`data`), comparisons
(`gap`), the look of a chart (assets/page.js, page.css).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_train.config.knobs import to_plain
from nemotron_train.config.schema import Config
from nemotron_train.platform.files import write_atomically
from nemotron_train.report.gap.pairs import Comparison
from nemotron_train.report.html.data import PageData
from nemotron_train.report.html.elements import details, element, frame, table
from nemotron_train.report.html.gap import gap_section, size_section
from nemotron_train.report.html.rollouts import rollout_section
from nemotron_train.report.plan.diff import as_text, flatten, rows
from nemotron_train.report.runs.card import CPU, EMULATED, GPU, UNVERIFIED, Capability
from nemotron_train.report.runs.policy import is_policy
from nemotron_train.report.runs.read import Run
from nemotron_train.report.runs.rollouts import Rollout
from nemotron_train.report.runs.table import run_tables
from nemotron_train.report.runs.timeline import parse_time
from nemotron_train.run_folder.metric_groups import GROUPS, OTHER

FEW_RUNS = 3  # with at most this many runs, foldable parts are open
MAX_STARTS = 50  # the last starts shown per run

CONTROLS = """\
<div class="bar" id="bar"><div id="legend" aria-label="runs"></div>
<div class="knobs"><label>smoothing <input type="range" id="smoothing" min="0" max="10" value="3"
></label><label><input type="checkbox" id="raw" checked> raw</label>
<button type="button" id="reset">whole range</button></div></div>
<noscript><p class="note">The charts need this page's own script. The pictures beside this file
show the most important ones.</p></noscript>"""


def write_page(path: Path, html: str) -> Path:
    """Writes the page atomically and returns `path`: a browser that reloads it sees either the old
    page or the new one."""
    write_atomically(path, html)
    return path


@dataclass(frozen=True)
class ReportedRun:
    """A run on the page. config: None if this version cannot read it; card: empty in that case;
    rollouts: a sample of them."""

    label: str
    run: Run
    config: Config | None
    card: Sequence[Capability]
    rollouts: Sequence[Rollout] = ()

    @property
    def is_policy(self) -> bool:
        """Whether the run trained on rollouts."""
        return is_policy(self.run, self.config)


def build_page(
    title: str, shown: Sequence[ReportedRun], comparisons: Sequence[Comparison], data: PageData
) -> str:
    """The HTML of the whole page. `data` must already contain the runs of `shown`, in this
    order."""
    for number, entry in enumerate(shown):
        data.runs[number]["label"] = entry.label
    runs = [entry.run for entry in shown]
    _set_colours(data, runs, comparisons)
    gap_sections = [
        gap_section(comparison, data, number) for number, comparison in enumerate(comparisons)
    ]
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
        *_groups(shown, data),
        _starts(shown),
        _differences(shown),
        _cards(shown),
        "</main>",
    ]
    return frame(title, "\n".join(part for part in parts if part), data.as_json())


def _set_colours(data: PageData, runs: Sequence[Run], comparisons: Sequence[Comparison]) -> None:
    """Runs of one group share a colour and differ in their dashes. Runs outside all comparisons get
    a colour each."""
    unassigned = {run.path: number for number, run in enumerate(runs)}
    taken = 0
    for comparison in comparisons:
        for color, members in enumerate(comparison.groups.values()):
            for dash, run in enumerate(members.values()):
                number = unassigned.pop(run.path, None)
                if number is not None:
                    data.runs[number] |= {"color": color, "dash": dash}
        taken = max(taken, len(comparison.groups))
    for color, number in enumerate(unassigned.values()):
        data.runs[number] |= {"color": taken + color, "dash": 0}


def _runs(shown: Sequence[ReportedRun]) -> str:
    labels, runs = [entry.label for entry in shown], [entry.run for entry in shown]
    tables = run_tables(labels, runs, [entry.is_policy for entry in shown])
    parts = [
        table(each.headings, each.rows, numbers=each.numbers) + element("p", each.note, cls="note")
        for each in tables
    ]
    silent = "silent: not ended in order, and no line for ten minutes"
    return f"<section><h2>Runs</h2>{''.join(parts)}{element('p', silent, cls='note')}</section>"


def _groups(shown: Sequence[ReportedRun], data: PageData) -> list[str]:
    """The sections of the metrics, and the sampled rollouts after the metrics about them. If no run
    trains on data, its loss follows what is said of the policies."""
    groups = {group: title for group, (title, _) in GROUPS.items()} | {OTHER: "Other numbers"}
    sections = {group: _group(group, title, data) for group, title in groups.items()}
    sections["rollouts"] += rollout_section([(entry.label, entry.rollouts) for entry in shown])
    order = list(sections)
    if all(entry.is_policy for entry in shown):
        order.remove("loss")
        order.insert(order.index("correction") + 1, "loss")
    return [sections[group] for group in order]


def _group(group: str, title: str, data: PageData) -> str:
    charts = [c for c in data.charts.values() if c["group"] == group]
    heats = [h for h in data.heats.values() if h["group"] == group]
    if not charts and not heats:
        return ""
    # The most important chart of a group spans the full width.
    figures = [
        element("figure", "", cls=_width_of(c["id"]), data_chart=c["id"]) for c in _ordered(charts)
    ]
    figures += [element("figure", "", data_heat=h["id"]) for h in heats]
    return (
        f'<section id="{group}">{element("h2", title)}<div class="grid">'
        f"{''.join(figures)}</div></section>"
    )


def _width_of(name: str) -> str:
    return "wide" if name in ("loss", "clock", "reward") else ""


def _ordered(charts: list[dict]) -> list[dict]:
    order = ["loss", "validation_loss", "tokens_per_second", "model_flops_utilization", "step_time"]
    order += ["grad_norm", "max_vio", "clock", "flushing"]
    order += ["reward", "reward/", "pass/", "pass", "groups", "entropy", "logprob_gap_max"]
    return sorted(charts, key=lambda c: order.index(c["id"]) if c["id"] in order else len(order))


def _starts(shown: Sequence[ReportedRun]) -> str:
    """Table of the starts of each run, with machine and code version."""
    parts = []
    for reported in shown:
        cells = []
        for number, start in list(enumerate(reported.run.starts, start=1))[-MAX_STARTS:]:
            machine, git = start.get("machine"), start.get("git")
            machine = machine if isinstance(machine, dict) else {}
            git = git if isinstance(git, dict) else {}
            commit = str(git.get("commit", "-"))[:10] + (" modified" if git.get("modified") else "")
            ended = str(start.get("ended", "no end recorded"))
            ended += f": {start['reason']}" if start.get("reason") else ""
            device = f"{machine.get('device_name', 'not recorded')}, {_count(machine.get('ranks'))}"
            times = (_clock(start.get("time")), _clock(start.get("end_time")))
            step = str(start.get("from_step", "-"))
            cells.append([str(number), *times, step, ended, device, commit])
        if cells:
            headings = ("", "began (UTC)", "ended (UTC)", "from step", "how it ended", "on", "code")
            few = len(shown) <= FEW_RUNS
            parts.append(details(reported.label, table(headings, cells), is_open=few))
    return f"<section><h2>Starts</h2>{''.join(parts)}</section>" if parts else ""


def _count(ranks: object) -> str:
    return f"{ranks} rank{'s' if ranks != 1 else ''}" if isinstance(ranks, int) else "ranks unknown"


def _clock(text: object) -> str:
    seconds = parse_time(text)
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _differences(shown: Sequence[ReportedRun]) -> str:
    """Table of the knobs in which the runs' configurations differ; for a single run, all knobs."""
    known = [(entry.label, to_plain(entry.config)) for entry in shown if entry.config is not None]
    unread = [entry.label for entry in shown if entry.config is None]
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


def _cards(shown: Sequence[ReportedRun]) -> str:
    marks = (GPU, CPU, EMULATED, UNVERIFIED)
    headings = ("capability used", "mark", "evidence in the run folder")
    parts = []
    for reported in shown:
        cells = [[entry.name, " + ".join(entry.marks), entry.evidence] for entry in reported.card]
        if cells:
            content = table(headings, cells, marks=marks)
            parts.append(details(reported.label, content, is_open=len(shown) <= FEW_RUNS))
    if not parts:
        return ""
    return (
        "<section><h2>Run cards</h2>"
        '<p class="note">What each run used, marked by what its folder proves: '
        "ran-on-GPU and ran-on-CPU: steps were taken with it there; emulated: computed in the "
        "format's numbers by other arithmetic; unverified: the folder does not show it.</p>"
        f"{''.join(parts)}</section>"
    )
