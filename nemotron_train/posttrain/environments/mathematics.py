"""Mathematical answers of a user's rows, compared by math-verify. No torch.

math-verify simplifies with sympy, which may run for ever, and stops itself with alarms that only
work in a main thread. Its own limits are off here: this environment runs in a process that
`scoring` kills.
"""

import re
from functools import cache
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.posttrain.environments.protocol import (
    Episode,
    Row,
    Score,
    SingleTurn,
    failed,
    passed,
)

_BOX = re.compile(r"\\boxed\s*\{")
_MOST_CHARACTERS = 400
_SEVERAL = re.compile(r"\n|;|\bor\b|\band\b|\\text|\\quad|\$.*\$.*\$")


class Mathematics(SingleTurn):
    """`answer` is LaTeX or a plain number. The content must be one expression, or a text with one
    \\boxed{expression}: of several answers, none counts."""

    name = "mathematics"

    def open(self) -> None:
        """Import the library, which takes a second. Raises ConfigError if it is missing."""
        _library()

    def check_row(self, row: Row) -> str:
        """The answer must be a text that math-verify can read."""
        if not isinstance(row.answer, str) or not row.answer.strip():
            return "answer: missing or no text; this environment compares with it"
        if not _parsed(row.answer):
            return f"answer: math-verify reads no expression in {row.answer[:40]!r}"
        return ""

    def score(self, episode: Episode) -> Score:
        """Whether the two expressions are equal."""
        text = single_answer(episode.last.content)
        if text is None:
            return failed("not exactly one answer")
        answer, truth = _parsed(text), _parsed(episode.row.answer)
        if not answer:
            return failed(f"no expression in {text!r}")
        equal = _library().verify(truth, answer, timeout_seconds=None)
        return passed() if equal else failed(f"{text!r} is not {episode.row.answer!r}")


def single_answer(content: str) -> str | None:
    """The one expression of a content, without its box; None if there is none or several."""
    boxes = list(_BOX.finditer(content))
    if len(boxes) > 1:
        return None
    if boxes:
        start = boxes[0].end()
        end = _closing(content, start)
        content = content[start:end] if end else ""
    content = content.strip()
    whole = content[1:-1] if re.fullmatch(r"\$[^$]+\$", content) else content
    if not whole or len(whole) > _MOST_CHARACTERS or _SEVERAL.search(whole):
        return None
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{4,}", whole)  # a sentence, no expression
    return None if words else whole


def _closing(text: str, start: int) -> int:
    """The place of the brace that closes the one before `start`; 0 if none does."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return 0


def _parsed(text: str) -> list[Any]:
    library = _library()
    configs = [library.LatexExtractionConfig(), library.ExprExtractionConfig()]
    text = text if "$" in text or "\\boxed" in text else f"${text}$"
    return library.parse(text, configs, parsing_timeout=None)


@cache
def _library() -> Any:
    """The library. Raises ConfigError if it is not installed."""
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "environment mathematics needs the package math-verify: install the extra `posttrain`"
        ) from None
    return math_verify
