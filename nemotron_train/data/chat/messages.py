"""Conversations as data: roles, reasoning, tool calls; read from JSON, checked and written.

The form is that of chat data sets and servers: a list of objects with `role` and `content`. An
assistant's message may have `reasoning_content` (also read as `thinking`) and `tool_calls`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.data.json_lines import Fields, wrong_value

ROLES = ("system", "user", "assistant", "tool")
_FIELDS = ("role", "content", "reasoning_content", "thinking", "tool_calls", "trained")
_IGNORED = ("name", "tool_call_id", "id")  # of other formats; they change no token


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: its name, and its arguments as a JSON object."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One message of a conversation, written by a person, an environment or a policy.

    role: one of ROLES. content: the text, without tags. thinking: an assistant's reasoning; "" if
    there is none. tool_calls: named calls with arguments, or the text of a call in a form of its
    environment's own. trained: whether the tokens of an assistant's message count in the loss of
    fine-tuning. fault: why what a policy sampled is malformed (`parse.Turn.message`); content,
    thinking and calls are then empty, so nothing in it can score. "" for every other message.
    """

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall | str, ...] = ()
    trained: bool = True
    fault: str = ""


def with_effort(messages: Sequence[Message], effort: str) -> tuple[Message, ...]:
    """The messages with the line `{reasoning effort: EFFORT}` under the last one of the user; as
    they are if there is no effort, or no user. It is text like any other, so a chat template needs
    to know nothing about it, and a user may write it."""
    users = [place for place, message in enumerate(messages) if message.role == "user"]
    changed = list(messages)
    if effort and users:
        asked = messages[users[-1]]
        line = f"{{reasoning effort: {effort}}}"
        changed[users[-1]] = replace(asked, content=f"{asked.content}\n\n{line}")
    return tuple(changed)


def call_text(call: ToolCall | str) -> str:
    """A tool call as it stands between <tool_call> and </tool_call>: JSON, or the given text."""
    return call if isinstance(call, str) else json_text(_call_json(call), ensure_ascii=False)


def read_messages(raw: Any, where: str, field: str = "messages") -> tuple[Message, ...]:
    """Messages from JSON values. where: begins an error, such as "rows.jsonl:3". field: what the
    list is called there.

    Raises ConfigError, naming the message and its field, as `read_message` does, and for no list,
    a system message that is not the first, and one after which nobody speaks.
    """
    if not isinstance(raw, list) or not raw:
        raise wrong_value(where, field, raw, "a list of at least one message")
    messages = tuple(
        read_message(entry, where, f"{field}[{place}]") for place, entry in enumerate(raw)
    )
    for place, message in enumerate(messages):
        if message.role == "system" and place > 0:
            raise ConfigError(f"{where}: {field}[{place}]: a system message can only be first")
    if messages[-1].role == "system":
        raise ConfigError(f"{where}: {field} has only a system message; add a user's")
    return messages


def read_message(raw: Any, where: str, path: str) -> Message:
    """One message from a JSON value. path: its own place, such as "messages[0]".

    Raises ConfigError, naming the field: no object, an unknown role or field, a content that is no
    text, reasoning or tool calls of another role than the assistant's.
    """
    if not isinstance(raw, Mapping):
        raise wrong_value(where, path, raw, "an object with role and content")
    entry = Fields({name: raw[name] for name in raw if name not in _IGNORED}, where, path)
    entry.check_known(_FIELDS)
    role = entry.get("role")
    if role not in ROLES:
        raise entry.wrong("role", f"one of {', '.join(ROLES)}")
    calls = _tool_calls(entry)
    thinking = read_reasoning(entry)
    content = entry.get("content")
    if content is None and (calls or thinking):
        content = ""
    if not isinstance(content, str):
        raise entry.wrong("content", "a text")
    if role != "assistant" and (calls or thinking):
        name = "tool_calls" if calls else "reasoning_content"
        raise entry.error(f"{path} has {name} and the role {role}; only an assistant has it")
    return Message(role, content, thinking, calls, entry.whether("trained", True))


def read_reasoning(entry: Fields) -> str:
    """The text of `reasoning_content` or `thinking`; "" if there is neither. Raises ConfigError for
    a value that is no text, and for two different ones."""
    names = ("reasoning_content", "thinking")
    given = [name for name in names if entry.get(name) is not None]
    for name in given:
        if not isinstance(entry.get(name), str):
            raise entry.wrong(name, "a text")
    texts = {entry.get(name) for name in given}
    if len(texts) > 1:
        raise entry.error(f"{' and '.join(map(entry.name, names))} are different texts; give one")
    return texts.pop() if texts else ""


def _tool_calls(entry: Fields) -> tuple[ToolCall | str, ...]:
    raw = entry.get("tool_calls")
    if raw is None:
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise entry.wrong("tool_calls", "a list")
    calls: list[ToolCall | str] = []
    for place, value in enumerate(raw):
        call = value if isinstance(value, str) and value.strip() else as_call(value)
        if call is None:
            name = f"{entry.name('tool_calls')}[{place}]"
            needed = "an object with a name and arguments, which are an object too, or a text"
            raise wrong_value(entry.where, name, value, needed)
        calls.append(call)
    return tuple(calls)


def as_call(value: Any) -> ToolCall | None:
    """A tool call from its JSON value, which may stand inside `function`; None if it is none."""
    call = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(call, Mapping):
        return None
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        return None
    return ToolCall(name, dict(arguments))


def message_json(message: Message) -> dict[str, Any]:
    """A message as a JSON object, without the fields that have their defaults. `read_message` reads
    it, but for a fault, which no file may claim."""
    calls = [call if isinstance(call, str) else _call_json(call) for call in message.tool_calls]
    optional = {"reasoning_content": message.thinking, "tool_calls": calls, "fault": message.fault}
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    value |= {name: entry for name, entry in optional.items() if entry}
    return value if message.trained else value | {"trained": False}


def _call_json(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": dict(call.arguments)}


def message_from_json(value: Mapping[str, Any]) -> Message:
    """The reverse of `message_json`; trusts its input."""
    calls = tuple(
        call if isinstance(call, str) else ToolCall(call["name"], call["arguments"])
        for call in value.get("tool_calls", ())
    )
    return Message(
        value["role"],
        value["content"],
        value.get("reasoning_content", ""),
        calls,
        value.get("trained", True),
        value.get("fault", ""),
    )
