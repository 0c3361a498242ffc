"""One self-contained page of an acceptance: verdicts first, then what each stage measured.

It loads nothing and has no script. The look is that of the reports (report/html).
"""

from benchmarks.gpu_acceptance.results import Acceptance, Cell, Result, Verdict
from nemotron_train.report.html.elements import details, element, still_frame, table

TITLE = "GPU acceptance"
_NUMBERED_SHARE = 0.03  # a narrower part of the strip has no room for its number
_STYLE = """
.pretended { border: 3px solid var(--bad); border-radius: .5rem; padding: .9rem 1.2rem;
  margin: 1.1rem 0 0; color: var(--bad); font-size: 1.5rem; font-weight: 700; line-height: 1.3; }
.pretended p { font-size: 1rem; font-weight: 400; color: var(--ink); }
.lead { font-size: 1.1rem; margin-top: .5rem; }
.badge.PASS { color: var(--good); }
.badge.FAIL { color: var(--paper); background: var(--bad); border-color: var(--bad); }
.badge.SKIP { color: var(--unsure); }
.strip { display: flex; gap: 2px; height: 1.6rem; margin: .4rem 0 1rem; }
.strip span { min-width: 3px; border-radius: 2px; color: var(--paper); font-size: .72rem;
  line-height: 1.6rem; text-align: center; overflow: hidden; }
.strip .PASS { background: var(--good); }
.strip .FAIL { background: var(--bad); }
.strip .SKIP { background: var(--unsure); }
.strip .left { background: var(--line); }
td:first-child { min-width: 1.4rem; }
table.stages { width: 100%; }
.stages td:nth-child(2) { min-width: 7rem; }
.stages td:nth-child(4) { min-width: 10rem; max-width: none; width: 60%; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .4rem;
  padding: .6rem .8rem; overflow-x: auto; font-size: .76rem; line-height: 1.45; }
.why { font-weight: 600; }
.why.FAIL { color: var(--bad); }
.why.SKIP { color: var(--unsure); }
"""


def build_page(acceptance: Acceptance) -> str:
    """The HTML of the whole page."""
    parts = [
        "<header>",
        element("h1", TITLE),
        _pretended(acceptance),
        element("p", acceptance.summary(), cls="lead"),
        element("p", acceptance.machine, cls="note") if acceptance.machine else "",
        element("p", f"begun {acceptance.started}{_unfinished(acceptance)}", cls="note"),
        "</header><main>",
        _strip(acceptance),
        _overview(acceptance.results),
        *(_stage(number, result) for number, result in enumerate(acceptance.results, start=1)),
        "</main>",
    ]
    return still_frame(TITLE, "\n".join(filter(None, parts)), _STYLE)


def _pretended(acceptance: Acceptance) -> str:
    if not acceptance.pretended:
        return ""
    words = element(
        "p",
        "A CPU computed, with small sizes, to test the acceptance itself. Seconds, rates, ratios "
        "and model FLOPs utilization on this page mean nothing. No kernel was run on a GPU.",
    )
    return f'<div class="pretended">THE DEVICE IS PRETENDED{words}</div>'


def _unfinished(acceptance: Acceptance) -> str:
    return "" if acceptance.is_over else " · not at its end when this page was written"


def _strip(acceptance: Acceptance) -> str:
    """The time as a strip: each stage as wide as its share, what is left of the budget in grey. On
    a pretended device the whole is the time that it took."""
    budget = 0.0 if acceptance.pretended else acceptance.budget
    whole = max(budget, acceptance.seconds, 1e-9)
    cells = []
    for number, result in enumerate(acceptance.results, start=1):
        share = result.seconds / whole
        words = f"width:{share:.2%}"
        if result.verdict != Verdict.waiting:
            text = str(number) if share > _NUMBERED_SHARE else ""
            title = f"{number} {result.title}, {result.seconds:.0f} s"
            cells.append(element("span", text, cls=str(result.verdict), style=words, title=title))
    return (
        f"<section>{element('h2', f'{whole:.0f} seconds')}"
        f'<div class="strip">{"".join(cells)}<span class="left" style="flex:1"></span></div>'
    )


def _overview(results: list[Result]) -> str:
    headings = ("", "stage", "verdict", "figure", "s", "of")
    cells = [
        [
            str(number),
            result.title,
            str(result.verdict),
            "; ".join(filter(None, (result.reason, result.figure))),
            f"{result.seconds:.0f}",
            f"{result.limit:.0f}" if result.limit else "",
        ]
        for number, result in enumerate(results, start=1)
    ]
    marks = [str(verdict) for verdict in Verdict if verdict != Verdict.waiting]
    return table(headings, cells, numbers=(0, 4, 5), marks=marks, cls="stages") + "</section>"


def _stage(number: int, result: Result) -> str:
    """A stage's section: what a PASS says, why it did not pass, its tables, its last lines."""
    if result.verdict == Verdict.waiting:
        return ""
    parts = [element("p", result.checks, cls="note")]
    if result.reason:
        parts.append(
            element("p", f"{result.verdict}: {result.reason}", cls=f"why {result.verdict}")
        )
    for title, rows in result.tables.items():
        parts.append(details(f"{title} ({len(rows)})", _rows(rows), is_open=len(rows) <= 12))
    if result.log:
        log = element("pre", "\n".join(result.log))
        parts.append(details("last lines of its log", log, is_open=True))
    return f"<section>{element('h2', f'{number} {result.title}')}{''.join(parts)}</section>"


def _rows(rows: list[dict[str, Cell]]) -> str:
    headings = list(dict.fromkeys(name for row in rows for name in row))
    numbers = [
        column
        for column, name in enumerate(headings)
        if all(isinstance(row.get(name, 0), int | float) for row in rows)
    ]
    cells = [[_text(row.get(name)) for name in headings] for row in rows]
    words = [heading.replace("_", " ") for heading in headings]
    return table(words, cells, numbers=numbers)


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:,}" if isinstance(cell, int | float) else cell
