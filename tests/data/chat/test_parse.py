"""Reading what was sampled: only what stands after the one </think> can score.

Ids and texts are two ways to the same turn, so each is the second truth of the other where no tag
is spelled in letters. Not covered: what a judge makes of a message (tests/posttrain).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.data.chat.messages import Message, ToolCall
from nemotron_train.data.chat.parse import Turn, parse_text, parse_turn
from nemotron_train.data.chat.render import END, START, THINK_END, ChatFormat
from nemotron_train.data.tokenize import (
    CHAT_TOKENS,
    END_OF_DOCUMENT,
    load_tokenizer,
    train_tokenizer,
)

TEXT = st.text(st.sampled_from("ab <>/\n"), max_size=6)  # too short for a tag
CALL = {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Path(json.__file__).read_text()], 400, folder)
    return ChatFormat(load_tokenizer(folder))


def ids_of(chat: ChatFormat, parts: Sequence[str]) -> list[int]:
    """Parts that are the text of a special token become that token."""
    special = {token: token_id for token_id, token in chat.tokenizer.control_tokens.items()}
    ids: list[int] = []
    for part in parts:
        ids += [special[part]] if part in special else chat.tokenizer.encode(part).tolist()
    return ids


@given(TEXT, TEXT, st.lists(TEXT.filter(str.strip), max_size=2))
@settings(max_examples=50, deadline=None)
def test_a_text_is_read_back(thinking: str, content: str, calls: list[str]) -> None:
    text = "".join(f"<tool_call>{call}</tool_call>" for call in calls)
    text = f"\n{thinking}\n</think>{content}{text}"
    message = Message("assistant", content.strip(), thinking, tuple(call.strip() for call in calls))
    assert parse_text(text, text_calls=True).message == message
    assert parse_text("<think>" + text, text_calls=True).message == message


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("7", "the thinking was not closed"),
        ("<think>7", "the thinking was not closed"),
        ("</think>5</think>7", "</think> in the answer"),
        ("a<think>b</think>7", "<think> in the thinking"),
        ("</think><think></think>7", "<think> in the answer"),
        ("</think>7<think>", "<think> in the answer"),
        ("</think>7<|im_end|>8", "<|im_end|> in the answer"),
        ("</think><tool_response>7</tool_response>", "<tool_response> in the answer"),
        ("</think><tool_call>get cat", "a tool call is not closed"),
        ("</think><tool_call>a<tool_call>b</tool_call>", "a tool call is not closed"),
        ("</think><tool_call>a<think>b</tool_call>", "a tool call is not closed"),
        ("</think><tool_call>a</tool_call>7", "text after a tool call"),
        ("</think><tool_call> </tool_call>", "a tool call is blank"),
        ("</think>7</tool_call>", "</tool_call> in the answer"),
    ],
)
def test_any_other_tag_is_a_fault(text: str, fault: str) -> None:
    turn = parse_text(text, text_calls=True)
    assert turn.message == Message("assistant", "", fault=fault)
    assert not turn.is_well_formed


def test_without_thinking_a_tag_of_it_is_a_fault() -> None:
    """The prompt has closed the thinking already."""
    assert parse_text("7", thinking=False).message == Message("assistant", "7")
    assert parse_text("5</think>7", thinking=False).fault


PARTS = st.lists(st.sampled_from([*CHAT_TOKENS, "7", " ", "cat"]), max_size=8)


@settings(max_examples=100, deadline=None)
@given(parts=PARTS, thinking=st.booleans(), text_calls=st.booleans())
def test_ids_and_text_give_the_same_turn(
    chat: ChatFormat, parts: list[str], thinking: bool, text_calls: bool
) -> None:
    """But for a <think> that a text may begin with, and for <|im_end|> at the end of ids."""
    while parts and thinking and parts[0] == "<think>":
        parts = parts[1:]
    text = parse_text("".join(parts), thinking, text_calls)
    turn = parse_turn(chat, [*ids_of(chat, parts), chat.special_ids[END]], thinking, text_calls)
    assert turn == text
    message = turn.message
    texts = [message.content, message.thinking, *map(str, message.tool_calls)]
    assert not any(tag in text for tag in CHAT_TOKENS for text in texts)


@pytest.mark.parametrize(
    ("parts", "wrong"),
    [
        (["\nhm\n", THINK_END, "\nyes"], "ended"),
        (["\nhm\n", END], "thinking_closed"),
        (["\nhm\n", THINK_END, "\nyes", THINK_END, END], "thinking_closed"),
        (["\nhm </think> no\n", END], "thinking_closed"),
        (["\nhm\n", THINK_END, "<tool_call>", "{}", "</tool_call>", END], "malformed_calls"),
        (["\nhm\n", THINK_END, "<tool_call>", json.dumps(CALL), END], "malformed_calls"),
        (["\nhm\n", THINK_END, "<tool_call>", "[" * 5000, "</tool_call>", END], "malformed_calls"),
        (["\n", THINK_END, "<tool_call>", '{"name": "a", "arguments": {"b": NaN}}',
          "</tool_call>", END], "malformed_calls"),
        (["\nhm\n", THINK_END, "\na", START, "user\nb", END], "stray"),
        (["\nhm\n", THINK_END, "\na", END_OF_DOCUMENT, "\nb", END], "stray"),
        (["<think>", "\nhm\n", THINK_END, "\na", END], "stray"),
        (["\nhm\n", THINK_END, "<tool_response>", "3", "</tool_response>", END], "stray"),
        (["\nhm", "<tool_call>", json.dumps(CALL), "</tool_call>", THINK_END, "\na", END], "stray"),
        (["\nhm\n", THINK_END, "\na", END, "\nb", END], "stray"),
    ],
)  # fmt: skip
def test_malformed_turns(chat: ChatFormat, parts: Sequence[str], wrong: str) -> None:
    """Each says what is wrong with it, for penalties. Only one that was cut off has no fault."""
    turn = parse_turn(chat, ids_of(chat, parts))
    assert not turn.is_well_formed
    assert (turn.fault == "") == (wrong == "ended")
    found = {name for name in ("ended", "thinking_closed") if not getattr(turn, name)}
    found |= {name for name in ("malformed_calls", "stray") if getattr(turn, name)}
    assert wrong in found


def test_a_tag_in_letters_is_text_among_ids(chat: ChatFormat) -> None:
    ids = ids_of(chat, ["a", THINK_END, " <tool_call>b and </thi", "nk> ", END])
    expected = Turn("a", " <tool_call>b and </think> ", (), True, True, (), (), "")
    turn = parse_turn(chat, ids)
    assert turn == expected
    assert turn.message == Message("assistant", "<tool_call>b and </think>", "a")


def test_calls_are_read_as_asked(chat: ChatFormat) -> None:
    ids = ids_of(chat, ["", THINK_END, "<tool_call>", f"\n{json.dumps(CALL)}\n", "</tool_call>\n"])
    text = f"</think><tool_call>\n{json.dumps(CALL)}\n</tool_call>\n"
    call = ToolCall("add", CALL["arguments"])
    assert parse_text(text).message.tool_calls == (call,)
    assert parse_text(text, text_calls=True).message.tool_calls == (json.dumps(CALL),)
    assert parse_turn(chat, ids).malformed_calls  # the last tag is spelled in letters
