"""The verbs `report` and `report diff`: arguments and help. Imports the implementation on use. No
torch."""

import argparse
from pathlib import Path

from nemotron_train.cli.verbs import Verb, open_console


def run_report(arguments: argparse.Namespace) -> int:
    """Run `report` and print the paths of the written files."""
    from nemotron_train.report.write import report

    console = open_console()
    for path in report(arguments.runs, arguments.output, console):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


def run_diff(arguments: argparse.Namespace) -> int:
    """Run `report diff`."""
    from nemotron_train.report.plan.diff import print_diff

    print_diff(arguments.runs, open_console(), show_all=arguments.all)
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run, a sweep, or of runs",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help="where the page goes (default: beside)"
    )


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument("--all", action="store_true", help="knobs that agree too")


REPORT_VERBS = {
    "report": Verb(
        "runs as tables, pictures and one HTML page; loss gaps of a sweep or of twins",
        run_report,
        _report_arguments,
        """\
Examples:
  nemotron-train report runs/tiny
  nemotron-train report runs/a runs/b        # a twin in BF16 among them: the loss gap too
  nemotron-train report runs/loss_gap        # a sweep's folder, while it is going too
  nemotron-train report runs                 # all runs in a folder

The page, report.html, needs no network and nothing beside it. It and the pictures are written into
the run's or the sweep's folder; for several, into the one above.
""",
    ),
    "report diff": Verb(
        "the configurations of two runs side by side",
        run_diff,
        _diff_arguments,
        """\
Examples:
  nemotron-train report diff runs/a runs/b
  nemotron-train report diff runs/a runs/b --all
""",
    ),
}
