"""Conversations as data: roles, reasoning, tool calls; read from JSON and checked.

The form is that of chat data sets and servers: a list of objects with `role` and `content`. An
assistant's message may have `reasoning_content` (also read as `thinking`) and `tool_calls`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemotron_train.config.errors import ConfigError

ROLES = ("system", "user", "assistant", "tool")
_FIELDS = {"role", "content", "reasoning_content", "thinking", "tool_calls", "trained"}
_IGNORED = {"name", "tool_call_id", "id"}  # of other formats; they change no token


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: its name, and its arguments as a JSON object."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One message.

    thinking: the assistant's reasoning; "" if the message has none. trained: whether the tokens of
    an assistant's message count in the loss. thinking_limit: the reasoning is cut after so many
    tokens, as a budget does; 0: it is whole. tool_calls: named calls with arguments, or the text of
    a call in a form of its environment's own.
    """

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall | str, ...] = field(default=())
    trained: bool = True
    thinking_limit: int = 0


def read_messages(raw: Any, where: str) -> list[Message]:
    """Messages from JSON values. where: begins an error message, such as "rows.jsonl:3".

    Raises ConfigError, naming the message and its field: no list, an unknown role or field, a
    content that is no text, reasoning or tool calls of another role than the assistant's, a system
    message that is not the first, and a conversation in which nobody but the system speaks.
    """
    if not isinstance(raw, list) or not raw:
        raise ConfigError(f"{where}: messages must be a list of at least one message")
    messages = [_message(entry, f"{where}: messages[{n}]") for n, entry in enumerate(raw)]
    for number, message in enumerate(messages):
        if message.role == "system" and number > 0:
            raise ConfigError(f"{where}: messages[{number}]: a system message can only be first")
    if all(message.role == "system" for message in messages):
        raise ConfigError(f"{where}: messages hold only a system message; add a user's")
    return messages


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: must be an object with role and content")
    unknown = sorted(set(raw) - _FIELDS - _IGNORED)
    if unknown:
        raise ConfigError(
            f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(_FIELDS))}"
        )
    role = raw.get("role")
    if role not in ROLES:
        raise ConfigError(f"{where}: role={role!r}; must be one of {', '.join(ROLES)}")
    thinking = raw.get("reasoning_content", raw.get("thinking"))
    calls = _tool_calls(raw.get("tool_calls"), where)
    content = raw.get("content")
    if content is None and (calls or thinking):
        content = ""
    for name, value in (("content", content), ("reasoning_content", thinking or "")):
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {name} must be a text, not {type(value).__name__}")
        _check_text(value, f"{where}: {name}")
    if role != "assistant" and (thinking or calls):
        name = "tool_calls" if calls else "reasoning_content"
        raise ConfigError(f"{where}: {name} of the role {role}; only an assistant has it")
    trained = raw.get("trained", True)
    if not isinstance(trained, bool):
        raise ConfigError(f"{where}: trained={trained!r}; must be true or false")
    return Message(role, content, thinking or "", calls, trained)  # pyright: ignore[reportArgumentType]


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where} holds half a surrogate pair at {error.start}: no text"
        ) from None


def _tool_calls(raw: Any, where: str) -> tuple[ToolCall | str, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise ConfigError(f"{where}: tool_calls must be a list")
    calls: list[ToolCall | str] = []
    for number, entry in enumerate(raw):
        if isinstance(entry, str) and entry:
            _check_text(entry, f"{where}: tool_calls[{number}]")
            calls.append(entry)
            continue
        call = entry.get("function", entry) if isinstance(entry, Mapping) else None
        name = call.get("name") if isinstance(call, Mapping) else None
        arguments = call.get("arguments", {}) if isinstance(call, Mapping) else None
        if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
            raise ConfigError(
                f"{where}: tool_calls[{number}] must be an object with a name and arguments, which "
                "are an object too, or a text"
            )
        calls.append(ToolCall(name, dict(arguments)))
    return tuple(calls)
