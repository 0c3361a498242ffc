"""Text of users on a console: no markup, no emoji, no control character reaches the terminal.

Not covered: what a terminal does with other characters: wide, combining, look-alike ones.
"""

import io
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from nemotron_train.config.visible import one_line, visible
from nemotron_train.platform.terminal import open_console, text_column

NASTY = "[red]a[/red] :smile: [u]b[/u] \x1b[31mc\x07\x1b]0;title\x07 \u202eflip\u2066 \x9b2J"
SHOWN = r"[red]a[/red] :smile: [u]b[/u] \x1b[31mc\x07\x1b]0;title\x07 \u202eflip\u2066 \x9b2J"


def table(title: str = "", header: str = "", cell: Any = "") -> Table:
    made = Table(title=title, box=None)
    made.add_column(header)
    made.add_row(cell)
    return made


WAYS: dict[str, Callable[[Console], None]] = {
    "line": lambda console: console.print(NASTY, soft_wrap=True),
    "text": lambda console: console.print(Text(NASTY), soft_wrap=True),
    "object": lambda console: console.print(ValueError(NASTY), soft_wrap=True),
    "style": lambda console: console.print(NASTY, style="bold", soft_wrap=True),
    "cell": lambda console: console.print(table(cell=NASTY)),
    "cell of text": lambda console: console.print(table(cell=Text(NASTY))),
    "header": lambda console: console.print(table(header=NASTY)),
    "title": lambda console: console.print(table(title=NASTY, cell="x" * 150)),
    "rule": lambda console: console.rule(NASTY),
    "log": lambda console: console.log(NASTY),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_has_a_meaning(way: str) -> None:
    out = io.StringIO()
    WAYS[way](open_console(file=out, width=400))
    assert "[red]a[/red] :smile: [u]b[/u]" in out.getvalue()
    # rich itself drops the bell of a ready Text before it counts columns.
    assert SHOWN in out.getvalue() or way in ("text", "object", "cell of text")
    assert not [c for c in out.getvalue() if unicodedata.category(c) == "Cc" and c != "\n"]


def test_a_spinner_and_a_progress_bar_on_a_terminal() -> None:
    """They write escape sequences of their own, and none of the text's."""
    out = io.StringIO()
    console = open_console(file=out, width=400, force_terminal=True)
    with console.status(NASTY):
        pass
    with Progress(text_column("{task.description}"), console=console) as bar:
        bar.add_task(NASTY)
    assert out.getvalue().count(SHOWN) >= 2
    for sequence in ("\x1b[31m", "\x1b]0", "\x07", "\u202e", "\x9b"):
        assert sequence not in out.getvalue()


def test_styles_by_argument_still_work() -> None:
    out = io.StringIO()
    open_console(file=out, width=40, force_terminal=True, color_system="standard").print(
        "bold", style="bold"
    )
    assert out.getvalue() == "\x1b[1mbold\x1b[0m\n"


@given(st.text(alphabet=st.characters()))
def test_visible_leaves_no_control(text: str) -> None:
    """Second truth: Python's tables of Unicode. Text without controls is left as it is."""
    for shown in (visible(text), one_line(text)):
        bad = {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
        assert bad <= {"\n", "\t"}
        assert not {
            c
            for c in shown
            if unicodedata.bidirectional(c)[:2] in ("LR", "RL", "PD", "FS")
            and unicodedata.category(c) == "Cf"
        }
        shown.encode()
    assert "\n" not in one_line(text)
    plain = "".join(c for c in text if unicodedata.category(c)[0] in "LMNPS" or c == " ")
    assert visible(plain) == plain
