"""What a model generated, read back: reasoning, answer, tool calls, and what is malformed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from nemotron_train.data.chat.messages import Message, ToolCall
from nemotron_train.data.chat.render import (
    CALL,
    CALL_END,
    END,
    THINK_END,
    ChatFormat,
)


@dataclass(frozen=True)
class Turn:
    """An assistant's message as generated.

    thinking, content: texts without the line breaks that the format adds. tool_calls: those that
    can be read. ended: whether <|im_end|> was generated. thinking_closed: whether there was no
    reasoning to close, or it was closed exactly once. malformed_calls: texts of tool calls that are
    not a JSON object with a name and arguments, or that were not closed. stray: special tokens
    where the format has none.
    """

    thinking: str
    content: str
    tool_calls: tuple[ToolCall | str, ...]
    ended: bool
    thinking_closed: bool
    malformed_calls: tuple[str, ...]
    stray: tuple[str, ...]

    @property
    def is_well_formed(self) -> bool:
        """Whether a conversation can go on from it as the format says."""
        whole = self.ended and self.thinking_closed
        return whole and not self.malformed_calls and not self.stray

    @property
    def message(self) -> Message:
        """The message that renders to this turn, if it is well formed."""
        return Message("assistant", self.content, self.thinking, self.tool_calls)


def parse_turn(
    chat: ChatFormat, ids: Sequence[int], thinking: bool = True, text_calls: bool = False
) -> Turn:
    """Read the ids that followed `ChatFormat.prompt` with the same `thinking`.

    Only ids of special tokens count as such: a tag that was spelled in letters is text. text_calls:
    a tool call is any text that is not empty, in a form of the environment's own.
    """
    names = {token_id: token for token, token_id in chat.special_ids.items()}
    parts: list[tuple[str, str]] = []  # (special token before it or "", text)
    begin, before = 0, ""
    ids = list(ids)
    for place, token_id in enumerate(ids):
        if token_id in names:
            parts.append((before, chat.tokenizer.decode(ids[begin:place])))
            begin, before = place + 1, names[token_id]
    parts.append((before, chat.tokenizer.decode(ids[begin:])))
    ended = before == END and begin == len(ids)
    return _turn(parts, thinking, ended, text_calls)


def _turn(parts: Sequence[tuple[str, str]], thinking: bool, ended: bool, text_calls: bool) -> Turn:
    closes = sum(token == THINK_END for token, _ in parts)
    thought, content = "", ""
    in_thought = thinking
    calls: list[ToolCall | str] = []
    malformed: list[str] = []
    stray: list[str] = []
    for number, (token, text) in enumerate(parts):
        following = parts[number + 1][0] if number + 1 < len(parts) else ""
        if token == CALL and not in_thought:
            call: ToolCall | str | None = text if text_calls else read_call(text)
            if following != CALL_END or not call:
                malformed.append(text)
            else:
                calls.append(call)
            continue
        if token == THINK_END and in_thought:
            in_thought = False
        elif token == END and number == len(parts) - 1 and not text:
            continue
        elif token and not (token == CALL_END and parts[number - 1][0] == CALL):
            stray.append(token)
        if in_thought:
            thought += text
        else:
            content += text
    return Turn(
        thinking=thought.removeprefix("\n").removesuffix("\n"),
        content=content.removeprefix("\n"),
        tool_calls=tuple(calls),
        ended=ended,
        thinking_closed=closes == (1 if thinking else 0),
        malformed_calls=tuple(malformed),
        stray=tuple(stray),
    )


def read_call(text: str) -> ToolCall | None:
    """A tool call from its JSON; None if it is none."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or set(raw) != {"name", "arguments"}:
        return None
    name, arguments = raw["name"], raw["arguments"]
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments)
