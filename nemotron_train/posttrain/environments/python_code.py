"""`def f(a, b)` from a sentence of steps, run in the sandbox on hidden cases. No torch.

The inputs go into the sandbox and the outputs come back; the expected values stay here.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

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
from nemotron_train.posttrain.environments.structure import same
from nemotron_train.posttrain.sandbox.sandbox import Sandbox
from nemotron_train.posttrain.sandbox.verdict import Verdict

# A step in words -> the same in Python, and what it computes from a and b, or from x and n.
_FIRST: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "a plus b": ("a + b", lambda a, b: a + b),
    "a minus b": ("a - b", lambda a, b: a - b),
    "a times b": ("a * b", lambda a, b: a * b),
    "the larger of a and b": ("max(a, b)", max),
    "the smaller of a and b": ("min(a, b)", min),
}
_LATER: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "plus {n}": ("x + {n}", lambda x, n: x + n),
    "minus {n}": ("x - {n}", lambda x, n: x - n),
    "times {n}": ("x * {n}", lambda x, n: x * n),
    "modulo {n}": ("x % {n}", lambda x, n: x % n),
    "over {n} rounded down": ("x // {n}", lambda x, n: x // n),
    "negated": ("-x", lambda x, n: -x),
    "without sign": ("abs(x)", lambda x, n: abs(x)),
    "squared": ("x * x", lambda x, n: x * x),
}
_NUM_CASES = 5


class PythonCode(SingleTurn):
    """`f(a, b) is a plus b, times 3` → a function. Level n has n + 1 steps.

    A row has `metadata.cases`, a list of [arguments, expected value] in JSON, and may have
    `metadata.function`, the function's name. open_sandbox: called when code is first judged.
    """

    name = "python_code"

    def __init__(self, open_sandbox: Callable[[], Sandbox]) -> None:
        self._open_sandbox = open_sandbox
        self._sandbox: Sandbox | None = None

    def check_row(self, row: Row) -> str:
        """metadata.cases must be a list of pairs."""
        cases = row.metadata.get("cases")
        if not isinstance(cases, list) or not cases:
            return "metadata.cases: missing or empty; give [[arguments, expected value], …]"
        for number, case in enumerate(cases):
            if not isinstance(case, list) or len(case) != 2 or not isinstance(case[0], list):
                return f"metadata.cases[{number}]: no [[argument, …], expected value]"
        function = row.metadata.get("function", "f")
        if not isinstance(function, str) or not function.isidentifier():
            return f"metadata.function: {function!r} is no name"
        return ""

    def generate(self, source: random.Random, level: int) -> Problem:
        """Steps and cases."""
        first = source.choice(list(_FIRST))
        later = [[text, source.randint(2, 9)] for text in source.sample(list(_LATER), level)]
        words = [first, *(text.format(n=n) for text, n in later)]
        places = [[source.randint(-9, 9), source.randint(-9, 9)] for _ in range(_NUM_CASES)]
        cases = [[place, _values(first, later, *place)[-1]] for place in places]
        metadata = {"cases": cases, "first": first, "later": later}
        return Problem(f"f(a, b) is {', '.join(words)}", None, metadata)

    def solution(self, row: Row) -> list[Message]:
        """The values of the first case, then the code."""
        first, later = row.metadata["first"], row.metadata["later"]
        place = row.metadata["cases"][0][0]
        values = " ".join(map(str, [*place, *_values(first, later, *place)]))
        steps = [_FIRST[first][0], *(_LATER[text][0].format(n=n) for text, n in later)]
        lines = [f"    x = {step}" for step in steps[:-1]] + [f"    return {steps[-1]}"]
        return [thought(values, "\n".join(["def f(a, b):", *lines]))]

    def score(self, episode: Episode) -> Score:
        """Run the content on the inputs and compare with types."""
        cases: Sequence[Any] = episode.row.metadata["cases"]
        if not episode.last.content:
            return failed("no code")
        self.open()
        assert self._sandbox is not None
        function = episode.row.metadata.get("function", "f")
        result = self._sandbox.call(episode.last.content, function, [case[0] for case in cases])
        if result.verdict is not Verdict.passed:
            return failed(result.message, result.verdict)
        right = sum(same(out, case[1]) for out, case in zip(result.outputs, cases, strict=True))
        if right == len(cases):
            return passed()
        return failed(f"{right} of {len(cases)} cases are right")

    def candidates(self, row: Row) -> list[str]:
        """Functions that return one value each, for the first cases."""
        body = "def f(a, b):\n    return {}"
        others = [body.format(case[1]) for case in row.metadata["cases"]]
        return around(self.solution(row)[0].content if "first" in row.metadata else "f", others)

    def open(self) -> None:
        """Start the sandbox. Raises ConfigError if there is no isolation."""
        if self._sandbox is None:
            self._sandbox = self._open_sandbox()

    def close(self) -> None:
        """End the sandbox's process."""
        if self._sandbox is not None:
            self._sandbox.close()


def _values(first: str, later: Sequence[Any], a: int, b: int) -> list[int]:
    """The value after each step."""
    values = [_FIRST[first][1](a, b)]
    for text, n in later:
        values.append(_LATER[text][1](values[-1], n))
    return values
