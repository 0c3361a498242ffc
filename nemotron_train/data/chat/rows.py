"""Rows of conversations from JSONL files: one JSON object a line.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "answer": "…", "thinking": "…"}

`tools` lists the tools that a conversation may call. Other fields are kept out of the tokens.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.chat.messages import Message, read_messages


@dataclass(frozen=True)
class ChatRow:
    """A conversation to train on: its messages, its tools, and where it was read."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...]
    where: str


def read_rows(path: Path) -> Iterator[ChatRow]:
    """The rows of a .jsonl or .jsonl.gz file, in order. Empty lines are skipped.

    Raises ConfigError, naming file, line and field, for the first row that is no conversation with
    an answer to train on.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(_json(line, f"{path}:{number}"), f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error.reason})") from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason})") from None


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON ({error!s:.100})") from None


def _row(raw: Any, where: str) -> ChatRow:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: must be an object with messages, or with prompt and answer")
    if "messages" in raw and ("prompt" in raw or "answer" in raw):
        raise ConfigError(f"{where}: has messages and a prompt or answer; give one of the two")
    if "messages" not in raw:
        for name in ("prompt", "answer"):
            if not isinstance(raw.get(name), str) or not raw[name]:
                raise ConfigError(f"{where}: {name} is missing or no text")
        assistant = {"role": "assistant", "content": raw["answer"], "thinking": raw.get("thinking")}
        raw = {**raw, "messages": [{"role": "user", "content": raw["prompt"]}, assistant]}
    messages = read_messages(raw["messages"], where)
    if not any(message.role == "assistant" and message.trained for message in messages):
        raise ConfigError(f"{where}: has no assistant's message to train on")
    tools = raw.get("tools") or []
    if not isinstance(tools, list):
        raise ConfigError(f"{where}: tools must be a list")
    return ChatRow(tuple(messages), tuple(tools), where)
