"""`check environment` from the command line: what is refused, with which line and exit code.

Not covered: hacks that no canary imitates.
"""

import re
import time
from pathlib import Path

import pytest

from nemotron_train.cli.main import main
from nemotron_train.posttrain.environments.canaries import canaries, right_answers
from nemotron_train.posttrain.environments.families import FAMILY_NAMES
from nemotron_train.posttrain.tasks import rows

JUDGES = f"{Path(__file__).parents[1] / 'posttrain' / 'environments' / 'judges.py'}"


def check(*words: str) -> int:
    return main(["check", "environment", *words])


@pytest.mark.parametrize(
    "words",
    [
        ("arithmetic",),
        ("tools", "level=4"),
        ("instructions", "level=3"),
        (f"{JUDGES}:exact",),
    ],
)
def test_good_environments_pass(words: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    assert check(*words, "samples=3") == 0
    output = capsys.readouterr().out
    assert "canary: listed in lines" in output and "3 pass" in output
    assert "same score in another process" in output and "not tried" not in output


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((f"{JUDGES}:contains",), r"canary: listed in lines: scores 1; completion '.*' of row"),
        ((f"{JUDGES}:parts",), r"canary: empty: scores 0.25; completion ''"),
        ((f"{JUDGES}:dice",), "same score twice: one completion scored"),
        (
            (f"{JUDGES}:remembers", "scoring_workers=1"),
            "same score in another process: one completion scored",
        ),
        ((f"{JUDGES}:BadScore",), "canary: empty: error: part is nan, no finite number"),
        ((f"{JUDGES}:Raises",), "RuntimeError: no license"),
        (("sums",), "there are arithmetic"),
        (("mathematics", "rows=none.jsonl"), "none.jsonl: cannot be read"),
        (("arithmetic", "samples=0"), "samples=0: give 1 to 1000"),
        (("arithmetic", "level=9"), "level=9: there are 1, 2, 3 and 4"),
        (("arithmetic", "scoring_seconds=0"), "scoring_seconds=0.0: give a number above 0"),
        (("arithmetic", "scoring_workers=0"), "scoring_workers=0"),
        (("arithmetic", "most_reward=nan"), "most_reward=nan"),
        (("arithmetic", "sandbox=off"), "expected one of"),
        (("arithmetic", "sample=3"), "sample"),
    ],
)
def test_bad_environments_are_refused_in_one_line(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture
) -> None:
    assert check(*words) == 2
    error = capsys.readouterr().err
    assert re.search(line, error) and error.count("\n") == 1


def test_a_start_that_raises_is_refused(capsys: pytest.CaptureFixture) -> None:
    """The generated sums have no metadata.below, which this environment reads."""
    assert check(f"{JUDGES}:Guess", "samples=2") == 2
    assert "start: row arithmetic/" in capsys.readouterr().err


def test_a_judge_that_hangs_is_not_asked_again(capsys: pytest.CaptureFixture) -> None:
    """13 kinds of canary for 4 rows would take 13 s with this limit and two workers."""
    started = time.monotonic()
    assert check(f"{JUDGES}:hangs", "samples=4", "scoring_seconds=0.5") == 2
    assert time.monotonic() - started < 8
    assert "canary: empty: timeout: no answer within 0.5 s" in capsys.readouterr().err


def test_rows_of_a_file_are_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "2 + 2 ="}\n')
    assert check("arithmetic", f"rows={path}") == 2
    assert "rows: row rows/2: answer: missing" in capsys.readouterr().err
    path.write_text('{"id": "a", "prompt": "1 + 1 =", "answer": "2"}\n')
    assert check("arithmetic", f"rows={path}") == 0
    path.write_text('{"environment": "strings", "prompt": "x", "answer": "2"}\n')
    assert check("arithmetic", f"rows={path}") == 2
    assert "no row is of environment arithmetic" in capsys.readouterr().err


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_each_kind_of_canary_exists(name: str) -> None:
    """A kind that is silently left out would be a check that cannot fail."""
    made = rows(name, "train", 1, 3, 2)
    kinds = {canary.kind for canary in canaries(made)}
    assert {"empty", "judge", "prompt", "listed in lines", "several answers"} <= kinds
    assert {"answer in the prompt", "repeated thinking", "several tags"} <= kinds
    assert len(right_answers(made)) == 3
    assert ("exit code 0" in kinds) == (name == "python_code")
