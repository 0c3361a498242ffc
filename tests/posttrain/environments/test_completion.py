"""Reading a completion: only what stands after the one </think> can score."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.posttrain.environments.completion import (
    TAGS,
    completion_text,
    parse_completion,
)
from nemotron_train.posttrain.environments.protocol import Message

TEXT = st.text(st.sampled_from("ab <>/\n"), max_size=6)  # too short for a tag


@given(TEXT, TEXT, st.lists(TEXT, max_size=2))
@settings(max_examples=50, deadline=None)
def test_a_message_is_read_back(thinking: str, content: str, calls: list[str]) -> None:
    stripped = tuple(call.strip() for call in calls)
    message = Message("assistant", content.strip(), thinking, stripped)
    assert parse_completion(completion_text(message)) == message
    assert parse_completion("<think>" + completion_text(message)) == message


@pytest.mark.parametrize(
    "text",
    [
        "7",  # the thinking is not closed
        "<think>7",
        "</think>5</think>7",
        "a<think>b</think>7",
        "</think><think></think>7",
        "</think>7<think>",
        "</think>7<|im_end|>8",
        "</think><tool_response>7</tool_response>",
        "</think><tool_call>get cat",
        "</think><tool_call>a<tool_call>b</tool_call>",
        "</think><tool_call>a</tool_call>7",
        "</think>7</tool_call>",
    ],
)
def test_any_other_tag_is_a_fault(text: str) -> None:
    message = parse_completion(text)
    assert message.fault and not message.content and not message.tool_calls


def test_without_thinking_a_tag_of_it_is_a_fault() -> None:
    """The prompt has closed the thinking already."""
    assert parse_completion("7", thinking=False) == Message("assistant", "7")
    assert parse_completion("5</think>7", thinking=False).fault


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([*TAGS, "7", " "]), max_size=8), st.booleans())
def test_content_and_calls_never_hold_a_tag(parts: list[str], thinking: bool) -> None:
    message = parse_completion("".join(parts), thinking)
    assert not any(tag in part for tag in TAGS for part in (message.content, *message.tool_calls))
