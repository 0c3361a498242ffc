"""Rollouts judged again. Second truth: rewards worked out by hand.

Not covered: rollouts of several files.
"""

from pathlib import Path

import pytest

from nemotron_train.cli.main import main
from nemotron_train.posttrain.environments.protocol import Episode, Message, Row, Score
from nemotron_train.posttrain.rollout import Rollout, read_rollouts, write_rollouts
from nemotron_train.posttrain.sandbox.verdict import Verdict


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sums with two answers each: one right, one a tenth too large, one of nobody's form."""
    monkeypatch.chdir(tmp_path)
    Path("rescore_rewards.py").write_text(
        "def first_digit(completion, answer):\n    return completion[:1] == str(answer)[:1]\n"
    )
    answers = [("12 + 30 =", "42", ["42", "46"]), ("20 + 20 =", "40", ["50", "x"])]
    rollouts = []
    for group, (prompt, answer, contents) in enumerate(answers):
        message = Message("user", prompt)
        row = Row(f"sums/{group}", "arithmetic", (message,), answer)
        for sample, content in enumerate(contents):
            turn = Message("assistant", content, "…")
            right = content == answer
            score = Score(float(right), {}, Verdict.passed if right else Verdict.failed)
            episode = Episode(row, (message,), (turn,))
            rollouts.append(
                Rollout(
                    group=group,
                    sample=sample,
                    sequence=2 * group + sample,
                    prompt_ids=[1],
                    ids=[2],
                    kinds="s",
                    log_probabilities=[-0.5],
                    episode=episode,
                    score=score,
                    cut=False,
                    text=content,
                )
            )
    write_rollouts(tmp_path / "old.jsonl.gz", rollouts)
    return tmp_path / "old.jsonl.gz"


def test_another_verifier(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """46 passes by its first digit: the first group becomes trivial, and its advantages 0."""
    words = ["verifier=rescore_rewards.py:first_digit", "output=new.jsonl.gz"]
    assert main(["rollouts", "rescore", str(file), *words]) == 0
    shown = capsys.readouterr().out
    assert "25.0% → 50.0%" in shown and "failed → passed: 1" in shown
    rescored = list(read_rollouts(Path("new.jsonl.gz")))
    assert [rollout.passed for rollout in rescored] == [True, True, False, False]
    assert [rollout.advantage for rollout in rescored] == [0, 0, 0, 0]
    assert [rollout.ids for rollout in rescored] == [[2]] * 4


def test_the_same_verifier_changes_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores were written by hand as the environment gives them."""
    assert main(["rollouts", "rescore", str(file)]) == 0
    assert "no verdict changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["environment=tools"], "has no rollout of environment=tools"),
        (["verifier=mine"], "environment mine: there are"),
        (["verifier=rescore_rewards.py:no"], "has no function or class no"),
        (["advantage_clip=0"], "advantage_clip=0"),
        (["output=no/where.gz"], "there is no folder no"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollouts", "rescore", str(file), *words]) == 2
    assert message in capsys.readouterr().err
