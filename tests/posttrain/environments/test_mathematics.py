"""Mathematical answers: one expression, compared by math-verify. Reading is tested without it."""

import pytest

from nemotron_train.posttrain.environments.mathematics import Mathematics, single_answer
from nemotron_train.posttrain.environments.protocol import judge
from tests.posttrain.environments.episodes import answered, row


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("5", "5"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("$x^2$", "x^2"),
        (r"so it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{5} or \boxed{5}", None),
        (r"\boxed{5 or 6}", None),
        (r"\boxed{5", None),
        (r"\boxed{}", None),
        ("4\n5", None),
        ("4; 5", None),
        ("it is five", None),
        ("the answer is 5", None),
        ("", None),
        ("9" * 401, None),
    ],
)
def test_one_answer_or_none(content: str, answer: str | None) -> None:
    assert single_answer(content) == answer


@pytest.mark.parametrize(
    ("truth", "content", "reward"),
    [
        ("1/2", r"\boxed{0.5}", 1),
        (r"\frac{1}{2}", "0.5", 1),
        ("x^2+1", "1+x^2", 1),
        ("(4, 5)", "(4, 5)", 1),
        ("5", "6", 0),
        ("5", "4, 5, 6", 0),
        ("5", "4 5 6", 0),
        ("5", r"\boxed{4} \boxed{5}", 0),
        ("5", "", 0),
    ],
)
def test_equal_expressions(truth: str, content: str, reward: float) -> None:
    pytest.importorskip("math_verify", reason="the extra `posttrain` is not installed")
    task = row("mathematics", answer=truth)
    assert Mathematics().check_row(task) == ""
    assert judge(Mathematics(), answered(task, content)).reward == reward


def test_a_row_without_an_expression_is_named() -> None:
    assert Mathematics().check_row(row("mathematics")).startswith("answer: ")
    assert Mathematics().check_row(row("mathematics", answer=5)).startswith("answer: ")
