"""`evaluate budget` on a model trained for a few steps.

Second truths: the written rollouts, counted here; the rollouts without a limit, which the others
equal up to the forced close. Not covered: whether reasoning helps (docs/posttrain.md has a run),
how the picture looks.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron_train.cli.main import main
from nemotron_train.config.budget import NO_LIMIT, BudgetScope
from nemotron_train.posttrain.budget_curve import default_budgets
from nemotron_train.posttrain.environments.protocol import Episode, Message, Row, Score
from nemotron_train.posttrain.knobs import EvaluateBudgetConfig
from nemotron_train.posttrain.rollout import Rollout, read_rollouts

pytestmark = pytest.mark.usefixtures("in_small_run")
CLOSE = 4
JUDGE = """
def short(completion, answer):
    return len(completion) < 40
"""
WORDS = ["evaluate", "budget", "runs/curve", "rows=curve_rows.jsonl", "threads=1", "samples=2"]
WORDS += ["max_new_tokens=24", "output=out/curve", "budget_grace=0", "scoring_workers=1"]


@pytest.fixture(scope="module", autouse=True)
def run(small_run: tuple[Path, list[str]]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small_run[0])
        assert main(["pretrain", *small_run[1], "name=curve", "train.stop_after_steps=2"]) == 3
        Path("curve_judge.py").write_text(JUDGE)
        row = {"environment": "curve_judge.py:short", "answer": "a", "budget": 7}
        lines = [json.dumps(row | {"prompt": f"say {number}"}) for number in range(4)]
        Path("curve_rows.jsonl").write_text("\n".join(lines) + "\n")
        yield


def test_budgets_are_paired_and_measured(capsys: pytest.CaptureFixture) -> None:
    """The rows' own budget gives way. A rollout that is not forced is the one without a limit."""
    assert main([*WORDS, "budgets=[inf,3,0,10]"]) == 0
    out = capsys.readouterr().out
    assert "against inf, points" in out and "closed itself" in out and "curve_judge" in out
    content = json.loads(Path("out/curve.json").read_text())
    assert Path("out/curve.png").read_bytes()[:4] == b"\x89PNG"
    points = content["budgets"]
    assert [point["budget"] for point in points] == [0, 3, 10, None]
    free = list(read_rollouts(Path("out/curve.inf.jsonl.gz")))
    assert all(one.row.budget is None and not one.forced_closes for one in free)
    for point in points[:3]:
        budget = point["budget"]
        limited = list(read_rollouts(Path(f"out/curve.{budget}.jsonl.gz")))
        assert [one.sequence for one in limited] == [one.sequence for one in free]
        for one, other in zip(limited, free, strict=True):
            assert one.row.budget == budget
            assert one.prompt_ids == other.prompt_ids + [CLOSE] * (budget == 0)
            if budget:
                same = one.kinds.index("f") if "f" in one.kinds else len(one.ids)
                assert one.ids[:same] == other.ids[:same] and same in (budget, len(other.ids))
        together = point["result"]["together"]
        assert together["forced"] == np.mean([one.forced_closes > 0 for one in limited])
        assert together["closed"] == np.mean(
            [not one.forced_closes and CLOSE in one.ids for one in limited]
        )
        thinking = [one.ids.index(CLOSE) if CLOSE in one.ids else len(one.ids) for one in free]
        wanted = [min(budget, tokens) for tokens in thinking]
        assert together["thinking_tokens"] == pytest.approx(np.mean(wanted))
        passed = [one.passed for one in limited]
        assert together["pass_1"]["value"] == pytest.approx(np.mean(passed))
        before = np.mean([one.passed for one in free])
        assert point["difference"]["value"] == pytest.approx(np.mean(passed) - before)
    assert points[1]["result"]["together"]["forced"] > 0.5


@pytest.mark.parametrize(
    ("budget", "scope", "expected"),
    [
        (80, BudgetScope.turn, [0, 10, 20, 40, 80, NO_LIMIT]),
        (3, BudgetScope.turn, [0, 1, 2, 3, NO_LIMIT]),
        (NO_LIMIT, BudgetScope.turn, [0, 2, 4, 8, 16, NO_LIMIT]),
        (NO_LIMIT, BudgetScope.episode, [0, 4, 8, 16, 32, NO_LIMIT]),
    ],
)
def test_the_default_curve(budget: int, scope: BudgetScope, expected: list[int]) -> None:
    """Measured on two turns with 32 thinking tokens in all; what was not closed does not count."""
    free = [_rollout(32), _rollout(32), replace(_rollout(90), malformed_thinking=True)]
    knobs = EvaluateBudgetConfig(budget=budget, budget_scope=scope)
    assert default_budgets(free, knobs) == expected


def _rollout(thinking: int) -> Rollout:
    turns = (Message("assistant", "a"), Message("user", "b"), Message("assistant", "c"))
    episode = Episode(Row("r", "e", (Message("user", "a"),)), (), turns)
    fields: dict[str, Any] = {"episode": episode, "score": Score(1.0), "cut": False, "text": ""}
    return Rollout(0, 0, 0, [1], [2], "s", [-0.1], **fields, thinking_tokens=thinking)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["budgets=[few,inf]"], "budgets=few: give numbers"),
        (["budgets=[-1,inf]"], "budgets=-1: give numbers"),
        (["budgets=[8]"], "budgets=[8]: give two"),
        (["budget=-3"], "budget=-3: give"),
        (["budget_grace=-3"], "budget_grace=-3"),
        (["budget_scope=all"], "budget_scope"),
        (["rows=curve_plain.jsonl"], "none asks for reasoning"),
        (["output=curve_rows.jsonl/a"], "output"),
        (["runs/other"], "2 are given"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    row = {"environment": "curve_judge.py:short", "prompt": "a", "answer": "a", "thinking": False}
    Path("curve_plain.jsonl").write_text(json.dumps(row) + "\n")
    assert main([*WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
