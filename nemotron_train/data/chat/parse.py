"""What a model generated, read back: reasoning, answer, tool calls, and what is malformed.

A turn is `thinking</think>content`, then any number of `<tool_call>call</tool_call>`. Any other
tag, or one twice, is a fault: a policy that is paid for one of several answers learns to give
several. Ids and texts differ in what a tag is, and in nothing else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemotron_train.config.json_text import strict_json
from nemotron_train.data.chat.messages import Message, ToolCall, as_call
from nemotron_train.data.chat.render import CALL, CALL_END, END, THINK, THINK_END, ChatFormat
from nemotron_train.data.tokenize import CHAT_TOKENS

_TAGS = re.compile("|".join(map(re.escape, CHAT_TOKENS)))


@dataclass(frozen=True)
class Turn:
    """An assistant's message as generated.

    thinking, content: texts without the line breaks that the format adds. tool_calls: those that
    can be read. ended: whether <|im_end|> was generated last. thinking_closed: whether there was no
    reasoning to close, or it was closed exactly once. malformed_calls: texts of tool calls that are
    blank, not closed, or not a JSON object with a name and arguments where one is asked for. stray:
    special tokens where the format has none. fault: the first thing that is malformed, as a text;
    "" if there is none. A turn that was cut off in its answer has none, but has not ended.
    """

    thinking: str
    content: str
    tool_calls: tuple[ToolCall | str, ...]
    ended: bool
    thinking_closed: bool
    malformed_calls: tuple[str, ...]
    stray: tuple[str, ...]
    fault: str

    @property
    def is_well_formed(self) -> bool:
        """Whether a conversation can go on from it as the format says."""
        return self.ended and not self.fault

    @property
    def message(self) -> Message:
        """The message for an environment: its content and the texts of its calls are stripped. With
        a fault it is empty."""
        if self.fault:
            return Message("assistant", "", fault=self.fault)
        calls = tuple(call.strip() if isinstance(call, str) else call for call in self.tool_calls)
        return Message("assistant", self.content.strip(), self.thinking, calls)


def parse_turn(
    chat: ChatFormat, ids: Sequence[int], thinking: bool = True, text_calls: bool = False
) -> Turn:
    """Read the ids that were sampled after `ChatFormat.prompt` with the same `thinking`, with or
    without the <|im_end|> at their end.

    Only ids of special tokens count as tags: one that was spelled in letters is text. Special
    tokens that are not of the format have no place in a turn. text_calls: a tool call is any text
    that is not blank, in a form of the environment's own.
    """
    ids = [int(token_id) for token_id in ids]
    ended = bool(ids) and ids[-1] == chat.special_ids[END]
    names = chat.tokenizer.control_tokens
    cuts = [place for place, token_id in enumerate(ids[: len(ids) - ended]) if token_id in names]
    begins, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(ids) - ended]
    texts = [chat.tokenizer.decode(ids[a:b]) for a, b in zip(begins, ends, strict=True)]
    tags = ["", *(names[ids[cut]] for cut in cuts)]
    return _turn(list(zip(tags, texts, strict=True)), thinking, text_calls, ended)


def parse_text(text: str, thinking: bool = True, text_calls: bool = False) -> Turn:
    """Read a turn that is written as text without its <|im_end|>, as people and tests write one.

    Here tags are what is spelled like one. With `thinking` it may begin with <think>, which
    otherwise stands in the prompt.
    """
    text = text.removeprefix(THINK) if thinking else text
    tags = ["", *_TAGS.findall(text)]
    return _turn(list(zip(tags, _TAGS.split(text), strict=True)), thinking, text_calls, True)


@dataclass
class _Reader:
    """The state of reading a turn part by part. place: "thinking", "answer", "call" or "after
    calls"."""

    text_calls: bool
    place: str
    thought: str = ""
    content: str = ""
    calls: list[ToolCall | str] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def tag(self, tag: str, before: str) -> None:
        """Go to another place. before: the text since the last tag."""
        if self.place == "call":
            self.end_call(before, closed=tag == CALL_END)
            if tag == CALL_END:
                return
        if self.place == "thinking" and tag == THINK_END:
            self.place = "answer"
        elif self.place != "thinking" and tag == CALL:
            self.place = "call"
        else:
            self.stray.append(tag)
            part = "thinking" if self.place == "thinking" else "answer"
            self.faults.append(f"{tag} in the {part}")

    def end_call(self, text: str, closed: bool) -> None:
        """Take the text of a call."""
        self.place = "after calls"
        call = text if self.text_calls else _read_call(text)
        if closed and call and text.strip():
            self.calls.append(call)
            return
        self.malformed.append(text)
        form = "is blank" if self.text_calls else "is no JSON object with name and arguments"
        self.faults.append(f"a tool call {form if closed else 'is not closed'}")

    def text(self, text: str) -> None:
        """Take a text between two tags that is not a call's."""
        if self.place == "thinking":
            self.thought += text
        elif self.place == "answer":
            self.content += text
        elif text.strip():
            self.content += text
            self.faults.append("text after a tool call")


def _turn(parts: Sequence[tuple[str, str]], thinking: bool, text_calls: bool, ended: bool) -> Turn:
    """parts: each text with the tag before it, "" before the first."""
    reader = _Reader(text_calls, "thinking" if thinking else "answer")
    before = ""
    for tag, text in parts:
        if tag:
            reader.tag(tag, before)
        if reader.place != "call":
            reader.text(text)
        before = text
    if reader.place == "call":
        reader.end_call(before, closed=False)
    if reader.place == "thinking":
        reader.faults.append("the thinking was not closed")
    closes = sum(tag == THINK_END for tag, _ in parts)
    return Turn(
        thinking=reader.thought.removeprefix("\n").removesuffix("\n"),
        content=reader.content.removeprefix("\n"),
        tool_calls=tuple(reader.calls),
        ended=ended,
        thinking_closed=closes == (1 if thinking else 0),
        malformed_calls=tuple(reader.malformed),
        stray=tuple(reader.stray),
        fault=next(iter(reader.faults), ""),
    )


def _read_call(text: str) -> ToolCall | None:
    """A tool call from its JSON; None if it is none."""
    try:
        value = strict_json(text)
    except ValueError:
        return None
    has_form = isinstance(value, dict) and set(value) == {"name", "arguments"}
    return as_call(value) if has_form else None
