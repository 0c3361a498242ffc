"""A family of generated tasks: an environment that makes its own rows and worked solutions.

No torch.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemotron_train.posttrain.environments.protocol import Environment, Message, Row

LEVELS = (1, 2, 3)  # of warm start, training and evaluation
HELD_OUT_LEVEL = 4  # harder, and only for evaluation


@dataclass(frozen=True)
class Problem:
    """A generated task before it belongs to a split. prompt: the user's message. metadata: with
    what `score` and `solution` need. hidden: what makes two problems with one prompt differ."""

    prompt: str
    answer: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    hidden: str = ""


class Family(Environment, Protocol):
    """An environment with a generator."""

    def generate(self, source: random.Random, level: int) -> Problem:
        """A problem. level: 1 to HELD_OUT_LEVEL, see the class."""
        ...

    def solution(self, row: Row) -> list[Message]:
        """Turns that score 1, with the thinking written out: what the warm start trains on."""
        ...

    def candidates(self, row: Row) -> list[str]:
        """Plausible answers with the right one in their middle, for the canary that lists them."""
        ...


def thought(thinking: str, content: str) -> Message:
    """An assistant's message."""
    return Message("assistant", content, thinking)


def around(answer: str, others: list[str]) -> list[str]:
    """`others` with `answer` in the middle: neither the first nor the last, which a judge that
    reads the first or the last answer would rightly take."""
    others = [other for other in others if other != answer]
    middle = len(others) // 2
    return [*others[:middle], answer, *others[middle:]]
