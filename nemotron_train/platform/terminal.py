"""Consoles that show the text of users as it is. No torch.

rich would read `[red]` in a name as markup and `:smile:` as an emoji, and a terminal would obey an
escape sequence. All tables and lines are printed through `open_console`; tests/test_architecture.py
forbids other consoles and markup. Lines without rich: `config.visible.one_line`.
"""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Task, TextColumn
from rich.segment import Segment
from rich.text import Text

from nemotron_train.config.visible import visible

_PIPE_WIDTH = 120  # a pipe has no width; rich's 80 columns would break the tables


class _PlainConsole(Console):
    """A console for which no text has a meaning. Styles are given as arguments, not as markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a string or a table's cell. Made visible here, so that columns get the
        right width."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of anything that is printed: here also ready `Text` is made visible."""
        for segment in super().render(renderable, options):
            if segment.control:  # from rich itself: it moves the cursor of a progress bar
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)

    def status(self, status: RenderableType, **options: Any) -> Any:
        """As rich's, whose spinner would read markup in a string."""
        if isinstance(status, str):
            status = Text(visible(status))
        return super().status(status, **options)


def open_console(*, stderr: bool = False, width: int | None = None, **options: Any) -> Console:
    """A rich console without markup, emoji and highlighting, which makes control characters
    visible. Its width is that of the terminal, or 120 for a pipe, unless `width` is given."""
    stream = sys.stderr if stderr else sys.stdout
    if width is None and not (options.get("file") or stream).isatty():
        width = _PIPE_WIDTH
    return _PlainConsole(stderr=stderr, width=width, **options)


class _PlainColumn(TextColumn):
    """A column of a progress bar that makes control characters visible."""

    def render(self, task: Task) -> Text:
        """The text of a task."""
        return Text(visible(self.text_format.format(task=task)), style=self.style)


def text_column(text: str, style: str = "none") -> TextColumn:
    """A column of a progress bar, without markup. text: a format string, as for rich's own."""
    return _PlainColumn(text, style=style, markup=False)
