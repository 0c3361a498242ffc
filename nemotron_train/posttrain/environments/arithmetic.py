"""Sums and differences of whole numbers, worked column by column in the thinking. No torch."""

import random
import re

from nemotron_train.posttrain.environments.family import Problem, around, thought
from nemotron_train.posttrain.environments.protocol import (
    Episode,
    Message,
    Row,
    Score,
    SingleTurn,
    failed,
    passed,
)

_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)", re.ASCII)
_PROMPT = re.compile(r"([0-9]+) ([+-]) ([0-9]+) =", re.ASCII)
_DIGITS = {1: 2, 2: 2, 3: 3, 4: 4}  # of both numbers, by level


class Arithmetic(SingleTurn):
    """`37 + 48 =` → `85`. Level 1: sums of two digits; 2: with differences; 3: three digits; 4:
    four digits. Differences are not negative.

    The thinking writes one column at a time from the right, `a+b+carry=sum`; in a difference,
    `a-b-borrow=digit` with ten already added to `a` where it borrows.
    """

    name = "arithmetic"

    def check_row(self, row: Row) -> str:
        """The answer must be a whole number, written as a text without leading zeros."""
        if row.answer is None:
            return "answer: missing; this environment compares with it"
        if not isinstance(row.answer, str) or not _WHOLE.fullmatch(row.answer):
            return f"answer: {row.answer!r} is no whole number written as a text"
        return ""

    def generate(self, source: random.Random, level: int) -> Problem:
        """Two numbers whose count of digits the level sets."""
        low, high = 10 ** (_DIGITS[level] - 1), 10 ** _DIGITS[level] - 1
        first, second = source.randint(low, high), source.randint(low, high)
        if level > 1 and source.random() < 0.5:
            first, second = max(first, second), min(first, second)
            return Problem(f"{first} - {second} =", str(first - second))
        return Problem(f"{first} + {second} =", str(first + second))

    def solution(self, row: Row) -> list[Message]:
        """The columns, then the answer."""
        match = _PROMPT.fullmatch(row.messages[-1].content)
        assert match, "solutions exist for generated rows"
        first, sign, second = match.groups()
        columns = _sum_columns(first, second) if sign == "+" else _difference_columns(first, second)
        return [thought(" ".join(columns), row.answer)]

    def score(self, episode: Episode) -> Score:
        """The whole content must be the number."""
        content, answer = episode.last.content, episode.row.answer
        return passed() if content == answer else failed(f"{content!r} is not {answer}")

    def candidates(self, row: Row) -> list[str]:
        """Numbers near the answer."""
        return around(row.answer, [str(int(row.answer) + step) for step in range(-10, 11)])


def _columns(first: str, second: str) -> list[tuple[int, int]]:
    width = max(len(first), len(second))
    pairs = zip(reversed(first.zfill(width)), reversed(second.zfill(width)), strict=True)
    return [(int(a), int(b)) for a, b in pairs]


def _sum_columns(first: str, second: str) -> list[str]:
    columns, carry = [], 0
    for a, b in _columns(first, second):
        total = a + b + carry
        columns.append(f"{a}+{b}+{carry}={total}")
        carry = total // 10
    return columns


def _difference_columns(first: str, second: str) -> list[str]:
    columns, borrow = [], 0
    for a, b in _columns(first, second):
        top = a + 10 if a < b + borrow else a
        columns.append(f"{top}-{b}-{borrow}={top - b - borrow}")
        borrow = int(top > a)
    return columns
