"""An environment of a user for tests: it asks once more, and writes down who called it.

Each call adds a line to the file `calls` beside this one. With the metadata `random` its replies
and scores are different in every process.
"""

import os
from pathlib import Path
from typing import Any

from nemotron_train.data.chat.messages import Message
from nemotron_train.posttrain.environments.protocol import Episode, Row, Score
from nemotron_train.posttrain.sandbox.verdict import Verdict

CALLS = Path(__file__).with_name("calls")


class AsksTwice:
    """Two turns; the reward is the number of letters in both."""

    max_turns = 2

    def check_row(self, row: Row) -> str:
        return "" if row.answer else "answer: missing"

    def start(self, row: Row) -> list[Message]:
        _note("start")
        return list(row.messages)

    def step(self, episode: Episode) -> list[Message] | None:
        _note("step")
        more = os.urandom(4).hex() if episode.row.metadata.get("random") else "more"
        return [Message("user", f"{more} {len(episode.last.content)}")]

    def score(self, episode: Episode) -> Score:
        _note("score")
        turns: list[Any] = [m for m in episode.turns if m.role == "assistant"]
        letters = sum(len(turn.content) for turn in turns)
        noise = os.urandom(1)[0] if episode.row.metadata.get("random") else 0
        return Score(float(letters + noise), {}, Verdict.passed if letters % 2 else Verdict.failed)


def _note(what: str) -> None:
    with open(CALLS, "a") as file:
        file.write(f"{what}\n")
