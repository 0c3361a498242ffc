"""Rows and episodes for the tests of environments."""

from typing import Any

from nemotron_train.data.chat.parse import parse_text
from nemotron_train.posttrain.environments.protocol import Episode, Message, Row


def row(environment: str, prompt: str = "?", answer: Any = None, **fields: Any) -> Row:
    """A row with one user's message, that does not ask to think."""
    fields = {"id": "row", "thinking": False, **fields}
    return Row(
        environment=environment, messages=(Message("user", prompt),), answer=answer, **fields
    )


def answered(task: Row, text: str) -> Episode:
    """The episode of one sampled text."""
    message = parse_text(text, task.thinking, text_calls=True).message
    return Episode(task, task.messages, (message,))
