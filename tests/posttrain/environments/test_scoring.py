"""Scoring in workers: one score for each sample in order, with judges that do everything wrong.

Not covered: judges that start processes in sessions of their own.
"""

import os
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemotron_train.config.errors import ConfigError
from nemotron_train.posttrain.environments.protocol import Episode, Message, Row, Score, Verdict
from nemotron_train.posttrain.environments.scoring import Scoring, ScoringLimits
from tests.posttrain.environments.episodes import answered, row
from tests.posttrain.environments.judges import SLEEPER

JUDGES = f"{Path(__file__).with_name('judges.py')}"
BY_ORDER = f"{JUDGES}:by_order"
LIMITS = ScoringLimits(workers=2, seconds=1.5, memory_bytes=1 << 30)

EXPECTED: dict[str, tuple[float | None, Verdict]] = {
    "right": (1.0, Verdict.passed),
    "half": (0.5, Verdict.failed),
    "hang": (0.0, Verdict.timeout),
    "none": (None, Verdict.failed),
    "nan": (0.0, Verdict.error),
    "infinite": (0.0, Verdict.error),
    "text": (0.0, Verdict.error),
    "list": (0.0, Verdict.error),
    "empty dict": (0.0, Verdict.error),
    "bad dict": (0.0, Verdict.error),
    "object": (0.0, Verdict.error),
    "raise": (0.0, Verdict.error),
    "exit": (0.0, Verdict.error),
    "spin": (0.0, Verdict.timeout),
    "os exit": (0.0, Verdict.killed),
    "signal": (0.0, Verdict.killed),
    "flood": (0.0, Verdict.output),
    "print": (0.0, Verdict.failed),
    "memory": (0.0, Verdict.memory),
    "sleeper": (0.0, Verdict.failed),
    "wrong": (0.0, Verdict.failed),
}


@pytest.fixture(scope="module")
def scoring() -> Iterator[Scoring]:
    with Scoring(LIMITS) as opened:
        yield opened


def ask(environment: str, *texts: str, **fields: Any) -> list[Episode]:
    return [answered(row(environment, answer="right", **fields), text) for text in texts]


def test_one_score_a_sample_in_order(scoring: Scoring) -> None:
    """Right answers stand between the bad calls: none of them loses its reward to a neighbour."""
    texts = [text for bad in EXPECTED for text in (bad, "right")]
    started = time.monotonic()
    scores = scoring.score(ask(BY_ORDER, *texts))
    assert time.monotonic() - started < 30
    assert [(score.reward, score.verdict) for score in scores[::2]] == list(EXPECTED.values())
    assert [score.reward for score in scores[1::2]] == [1.0] * len(EXPECTED)
    messages = dict(zip(texts[::2], scores[::2], strict=True))
    assert "ZeroDivisionError" in messages["raise"].message
    assert "1.5 s" in messages["hang"].message
    assert all("\n" not in score.message for score in scores)


def test_components_come_along(scoring: Scoring) -> None:
    (score,) = scoring.score(ask(f"{JUDGES}:parts", "right"))
    assert score == Score(1.25, {"right": 1.0, "short": 0.25}, Verdict.passed)
    (bad,) = scoring.score(ask(f"{JUDGES}:BadScore", "right"))
    assert bad.verdict is Verdict.error and "part is nan" in bad.message


def test_environments_of_a_batch_may_differ(scoring: Scoring) -> None:
    episodes = ask("arithmetic", "85", "86") + ask(f"{JUDGES}:exact", "right")
    episodes[:2] = [replace(e, row=replace(e.row, answer="85")) for e in episodes[:2]]
    assert [score.reward for score in scoring.score(episodes)] == [1.0, 0.0, 1.0]
    assert scoring.score([]) == []


def test_a_malformed_completion_does_not_reach_the_judge(scoring: Scoring) -> None:
    """It would be killed by `os exit`."""
    (score,) = scoring.score(ask(BY_ORDER, "</think>os exit", thinking=False))
    assert (score.reward, score.verdict) == (0.0, Verdict.failed)


def test_several_turns_of_a_class(scoring: Scoring) -> None:
    guess = f"{JUDGES}:Guess"
    assert scoring.load([guess, f"{JUDGES}:guess"]) == {guess: 4, f"{JUDGES}:guess": 4}
    task = row(guess, answer="5", metadata={"below": 9})
    (prompt,) = scoring.start([task])
    assert prompt == [Message("user", "guess a number below 9")]
    low, right, hang = (Episode(task, tuple(prompt), answered(task, t).turns) for t in "357")
    hang = replace(hang, turns=answered(task, "hang").turns)
    replies = scoring.step([low, hang, right])
    assert replies[0] == [Message("user", "higher")] and replies[2] is None
    assert isinstance(replies[1], Score) and replies[1].verdict is Verdict.timeout
    assert [score.reward for score in scoring.score([low, right])] == [0.0, 1.0]
    (failed,) = scoring.start([replace(task, metadata={})])
    assert isinstance(failed, Score) and failed.verdict is Verdict.error


def test_messages_of_a_class_are_checked(scoring: Scoring) -> None:
    (failed,) = scoring.start([row(f"{JUDGES}:Robot")])
    assert isinstance(failed, Score) and failed.verdict is Verdict.error
    assert failed.message.startswith('returned messages: [0].role is "robot"; it must be one of')


def test_rows_are_checked(scoring: Scoring) -> None:
    tasks: list[Row] = [row("arithmetic", answer="3"), row("arithmetic"), row(f"{JUDGES}:exact")]
    first, second, third = scoring.check_rows(tasks)
    assert first == "" and second.startswith("answer: ") and third.startswith("answer: ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sums", "there are arithmetic"),
        ("no_such_module:f", "its import raised ModuleNotFoundError"),
        ("no_such_file.py:f", "no such file"),
        (f"{JUDGES}:", "write module:name"),
        (":f", "write module:name"),
        (f"{JUDGES}:missing", "has no function or class missing"),
        (f"{JUDGES}:NOT_CALLABLE", "has no function or class NOT_CALLABLE"),
        (f"{JUDGES}:NoScore", "no method score"),
        (f"{JUDGES}:Raises", "RuntimeError: no license"),
        ("raises.py:f", "its import raised ValueError: two lines"),
        ("exits.py:f", "its import raised SystemExit: 3"),
        ("dies.py:f", "cannot be loaded (killed: the process ended with exit code 7)"),
        ("sleeps.py:f", "cannot be loaded (timeout: no answer within 1 s)"),
        ("syntax.py:f", "its import raised SyntaxError"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raises.py").write_text("raise ValueError('two\\nlines')")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    (tmp_path / "dies.py").write_text("import os\nos._exit(7)")
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(60)")
    (tmp_path / "syntax.py").write_text("def f(:")
    seconds = 1.0 if name.startswith("sleeps") else 30.0
    with (
        Scoring(replace(LIMITS, workers=1, load_seconds=seconds)) as scoring,
        pytest.raises(ConfigError) as error,
    ):
        scoring.load([name])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_closing_does_not_wait_for_a_call() -> None:
    """As after Ctrl-C: the call in flight and those behind it end at once."""
    scoring = Scoring(replace(LIMITS, workers=1, seconds=60))
    assert scoring.score(ask(BY_ORDER, "right"))[0].reward == 1.0
    asked = threading.Thread(target=lambda: scoring.score(ask(BY_ORDER, "hang", "hang")))
    threading.excepthook, hook = lambda _: None, threading.excepthook  # the batch is cancelled
    asked.start()
    time.sleep(0.3)
    started = time.monotonic()
    scoring.close()
    asked.join()
    threading.excepthook = hook
    assert time.monotonic() - started < 20


def sleepers() -> set[int]:
    """Processes that the judge `sleeper` left running."""
    found = psutil.process_iter(["cmdline"])
    return {process.pid for process in found if SLEEPER in (process.info["cmdline"] or [])}


def test_everything_is_reaped() -> None:
    """Killed workers, their children and the descriptors."""
    descriptors, before = len(os.listdir("/proc/self/fd")), sleepers()
    workers = {child.pid for child in psutil.Process().children()}
    with Scoring(replace(LIMITS, workers=1)) as scoring:
        scoring.score(ask(BY_ORDER, "sleeper", "right"))
        assert len(sleepers() - before) == 1
        scoring.score(ask(BY_ORDER, "hang", "right"))
        assert {child.pid for child in psutil.Process().children()} - workers
    assert not {child.pid for child in psutil.Process().children()} - workers
    assert len(os.listdir("/proc/self/fd")) == descriptors
    deadline = time.monotonic() + 10
    while sleepers() - before:  # reaped by init
        assert time.monotonic() < deadline


def test_descriptors_above_1023() -> None:
    """A process that holds many files open, as one with many shards does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"at most {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = []
    try:
        while not held or held[-1] < 1100:
            held.append(os.open(os.devnull, os.O_RDONLY))
        with Scoring(LIMITS) as opened:
            scores = opened.score(ask(BY_ORDER, "right", "hang", "right"))
        assert [score.reward for score in scores] == [1.0, 0.0, 1.0]
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
