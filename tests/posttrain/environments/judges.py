"""A user's reward functions and environments, good and bad, for the tests of plug-ins."""

import os
import random
import subprocess
import sys
import time
from typing import Any

NOT_CALLABLE = 3


def exact(completion: str, answer: Any) -> bool:
    return completion == answer


def contains(completion: str, answer: str) -> bool:
    return answer in completion


def parts(completion: str, answer: str) -> dict[str, float]:
    return {"right": float(completion == answer), "short": 0.25 * (len(completion) < 9)}


def by_order(completion: str, answer: str) -> Any:
    """Whatever the completion asks for: a judge that behaves badly on some samples only."""
    acts: dict[str, Any] = {
        "half": lambda: 0.5,
        "none": lambda: None,
        "nan": lambda: float("nan"),
        "infinite": lambda: {"a": float("inf")},
        "text": lambda: "1.0",
        "list": lambda: [1.0],
        "empty dict": dict,
        "bad dict": lambda: {"a": "x"},
        "object": object,
        "raise": lambda: 1 / 0,
        "exit": lambda: sys.exit(0),
        "os exit": lambda: os._exit(0),
        "hang": lambda: time.sleep(60),
        "spin": lambda: [0 for _ in iter(int, 1)],
        "flood": lambda: [print("x" * 2**16) for _ in range(64)],
        "print": lambda: print("reward: 1.0\n" * 9) or 0.0,
        "memory": lambda: bytearray(4 << 30),
        "sleeper": lambda: subprocess.Popen([sys.executable, "-c", SLEEPER]) and 0.0,
        "signal": lambda: os.kill(os.getpid(), 11),
    }
    return acts[completion]() if completion in acts else exact(completion, answer)


SLEEPER = "import time; time.sleep(300)  # sleeper_of_a_judge"


def hangs(completion: str, answer: str) -> None:
    time.sleep(60)


def dice(completion: str, answer: str) -> float:
    return 1.0 if completion == answer else -random.random()


_seen: list[str] = []


def remembers(completion: str, answer: str) -> float:
    """Deterministic in one process, not in the order of samples."""
    if completion not in _seen:
        _seen.append(completion)
    return 1.0 if completion == answer else -1.0 - _seen.index(completion)


class Guess:
    """An environment of several turns: warmer or colder."""

    max_turns = 4

    def start(self, row: Any) -> str:
        return f"guess a number below {row.metadata['below']}"

    def step(self, episode: Any) -> Any:
        guess = episode.last.content
        if guess == episode.row.answer:
            return None
        if guess == "hang":
            time.sleep(60)
        return [{"role": "user", "content": "higher" if guess < episode.row.answer else "lower"}]

    def score(self, episode: Any) -> Any:
        return episode.last.content == episode.row.answer


guess = Guess()


class Robot:
    """Its first message is of a role that no format has."""

    def start(self, row: Any) -> Any:
        return [{"role": "robot", "content": "x"}]

    def score(self, episode: Any) -> Any:
        return 1.0


class NoScore:
    pass


class Raises:
    def __init__(self) -> None:
        raise RuntimeError("no license")


class BadScore:
    """Only `score`, and a bad one."""

    def score(self, episode: Any) -> Any:
        from nemotron_train.posttrain.environments.protocol import Score

        return Score(1.0, {"part": float("nan")})
