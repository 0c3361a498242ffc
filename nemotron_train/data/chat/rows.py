"""Rows of conversations from files of JSON lines: one object a line.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "answer": "…", "reasoning_content": "…"}

A prompt is a text, or messages to answer; `messages` may lack the answer too. So a row of a task
(`posttrain/tasks`) with an answer that is a text is a conversation. `tools` lists the tools that
may be called. `effort` adds the line of `messages.with_effort`. Other fields are kept out of the
tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.data.chat.messages import (
    Message,
    read_messages,
    read_reasoning,
    with_effort,
)
from nemotron_train.data.json_lines import Fields, json_lines


@dataclass(frozen=True)
class ChatRow:
    """A conversation to train on: its messages, its tools, and where it was read."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    where: str


def read_rows(path: Path) -> Iterator[ChatRow]:
    """The rows of a .jsonl or .jsonl.gz file, in order. Empty lines are skipped.

    Raises ConfigError, naming file, line and field, for the first row that is no conversation with
    an answer to train on, and as `json_lines` does.
    """
    for _, row in json_lines(path):
        messages = with_effort(_conversation(row), row.text("effort", ""))
        yield ChatRow(messages, row_tools(row), row.where)


def row_messages(row: Fields) -> tuple[Message, ...]:
    """The messages of a row, from `messages` or `prompt`, which may be a text. Raises ConfigError
    as `read_messages` does, and unless one of the two is there."""
    if ("messages" in row.value) == ("prompt" in row.value):
        state = "both there" if "messages" in row.value else "both missing"
        raise row.error(f"messages and prompt are {state}; give one")
    field = "prompt" if "prompt" in row.value else "messages"
    if field == "prompt" and not isinstance(row.get("prompt"), list):
        return (Message("user", row.text("prompt")),)
    return read_messages(row.get(field), row.where, field)


def row_tools(row: Fields) -> tuple[Mapping[str, Any], ...]:
    """The `tools` of a row. Raises ConfigError for no list of objects."""
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise row.wrong("tools", "a list of objects")
    return tuple(tools)


def _conversation(row: Fields) -> tuple[Message, ...]:
    messages, has_answer = row_messages(row), row.get("answer") is not None
    if messages[-1].role != "assistant" and ("prompt" in row.value or has_answer):
        messages = (*messages, Message("assistant", row.text("answer"), _reasoning(row)))
    elif has_answer:
        raise row.error("answer is there, and the assistant has the last message; give one")
    if not any(message.role == "assistant" and message.trained for message in messages):
        raise row.error("messages has no assistant's message to train on, and answer is missing")
    return messages


def _reasoning(row: Fields) -> str:
    """The reasoning before `answer`. `thinking` that is true or false is a field of tasks."""
    is_task = isinstance(row.get("thinking"), bool)
    value = {name: row.value[name] for name in row.value if not (is_task and name == "thinking")}
    return read_reasoning(Fields(value, row.where))
