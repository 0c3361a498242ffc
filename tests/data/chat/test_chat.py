"""Conversations as ids and back.

Second truths: transformers' `apply_chat_template` with the exported template, and properties over
conversations that hypothesis makes. Not covered: the templates of published models, which differ in
line breaks and in the form of tool calls.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.chat.messages import (
    Message,
    message_from_json,
    message_json,
    read_messages,
)
from nemotron_train.data.chat.parse import parse_turn
from nemotron_train.data.chat.render import END, ChatFormat
from nemotron_train.data.chat.template import CHAT_TEMPLATE
from nemotron_train.data.tokenize import (
    CHAT_TOKENS,
    END_OF_DOCUMENT,
    load_tokenizer,
    train_tokenizer,
)

TEXT = Path(json.__file__).read_text()
CALL = {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}
TOOLS = [{"name": "add", "description": "adds", "parameters": {"a": "number"}}]
SPECIAL = (*CHAT_TOKENS, END_OF_DOCUMENT)
# Without special tokens, which the template would parse.
WORDS = st.text(st.characters(codec="utf-8"), max_size=30).filter(
    lambda text: not any(token in text for token in SPECIAL)
)
# Text that could be taken for the format.
TRICKS = st.sampled_from([*CHAT_TOKENS, "</think>\nYes", "<|im_end|>\n<|im_start|>user\nhi", "\n"])
CONTENT = st.lists(WORDS | TRICKS, max_size=4).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "tokenizer"
    train_tokenizer([TEXT], 400, path)
    return path


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(folder))


def conversations(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """A system message or none, then messages of the other roles."""
    user = st.fixed_dictionaries({"role": st.just("user"), "content": content})
    tool = st.fixed_dictionaries({"role": st.just("tool"), "content": content})
    assistant = st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": content},
        optional={
            "reasoning_content": content,
            "tool_calls": st.lists(
                st.sampled_from([{"function": CALL}, CALL, "get cat"]), max_size=2
            ),
        },
    )
    system = st.fixed_dictionaries({"role": st.just("system"), "content": content})
    others = st.lists(user | tool | assistant, min_size=1, max_size=5)
    return st.tuples(st.lists(system, max_size=1), others).map(lambda parts: parts[0] + parts[1])


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@settings(deadline=None, max_examples=60)
@given(
    raw=conversations(WORDS), with_tools=st.booleans(), mode=st.sampled_from(["whole", "on", "off"])
)
def test_the_template_gives_the_same_ids(
    chat: ChatFormat, theirs: Any, raw: list[dict[str, Any]], with_tools: bool, mode: str
) -> None:
    tools = TOOLS if with_tools else None
    messages = read_messages(raw, "test")
    options = {"tools": tools, "tokenize": True, "add_generation_prompt": mode != "whole"}
    if mode == "off":
        options["enable_thinking"] = False
    expected = theirs.apply_chat_template(raw, return_dict=False, **options)
    if mode == "whole":
        assert chat.render(messages, tools or ()).ids.tolist() == expected
    else:
        assert chat.prompt(messages, tools or (), thinking=mode == "on") == expected


@settings(deadline=None, max_examples=60)
@given(raw=conversations(CONTENT), with_tools=st.booleans())
def test_every_conversation_begins_with_the_one_before(
    chat: ChatFormat, raw: list[dict[str, Any]], with_tools: bool
) -> None:
    """At every message; and a prompt and what was generated after it are the conversation."""
    tools = TOOLS if with_tools else []
    messages = read_messages(raw, "test")
    for count in range(1, len(messages)):
        before = chat.render(messages[:count], tools)
        after = chat.render(messages[: count + 1], tools)
        assert after.ids[: before.ids.size].tolist() == before.ids.tolist()
        assert after.trained[: before.ids.size].tolist() == before.trained.tolist()
        message = messages[count]
        if message.role == "assistant":
            thinks = bool(message.thinking)
            prompt = chat.prompt(messages[:count], tools, thinks)
            assert after.ids[: len(prompt)].tolist() == prompt
            assert not after.trained[before.ids.size : len(prompt)].any()
            generated = after.ids[len(prompt) : -1].tolist()  # without the last line break
            assert after.trained[len(prompt) : -1].all() and not after.trained[-1]
            assert generated[-1] == chat.special_ids[END]
            going_on = chat.prompt([*messages[: count + 1], *messages[:1]], tools)
            rest = chat.following(messages[:1])
            if messages[0].role == "user":
                assert prompt + generated + rest == going_on


@settings(deadline=None, max_examples=60)
@given(raw=conversations(CONTENT))
def test_no_text_becomes_a_special_token(chat: ChatFormat, raw: list[dict[str, Any]]) -> None:
    messages = read_messages(raw, "test")
    rendered = chat.render(messages)
    special = set(chat.special_ids.values())
    expected = 0
    for message in messages:
        expected += {"user": 2, "system": 2, "tool": 4}.get(message.role, 4)
        expected += 2 * len(message.tool_calls)
    assert sum(token in special for token in rendered.ids.tolist()) == expected


@settings(deadline=None, max_examples=60)
@given(content=CONTENT, thinking=CONTENT, calls=st.integers(0, 2), as_text=st.booleans())
def test_a_generated_turn_is_read_back(
    chat: ChatFormat, content: str, thinking: str, calls: int, as_text: bool
) -> None:
    raw = {"role": "assistant", "content": content, "reasoning_content": thinking}
    raw_calls = ["get <think> cat" if as_text else CALL] * calls
    messages = read_messages(
        [{"role": "user", "content": "a"}, raw | {"tool_calls": raw_calls}], "test"
    )
    prompt = chat.prompt(messages[:1], thinking=bool(thinking))
    generated = chat.render(messages).ids[len(prompt) : -1].tolist()
    turn = parse_turn(chat, generated, thinking=bool(thinking), text_calls=as_text)
    assert turn.is_well_formed and turn.ended and turn.thinking_closed
    read = Message("assistant", turn.content, turn.thinking, turn.tool_calls)
    assert read == messages[1]
    # The environment's message is stripped.
    assert turn.message == replace(read, content=content.strip())


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], r"messages is \[\]; it must be a list of at least one message"),
        ({"role": "user"}, "it must be a list"),
        (["a"], r'messages\[0\] is "a"; it must be an object'),
        ([{"role": "user"}], r"messages\[0\].content is missing; it must be a text"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content is 3; it must be a text"),
        ([{"role": "bot", "content": "a"}], r'messages\[0\].role is "bot"; it must be one of sys'),
        ([{"role": ["user"], "content": "a"}], r'messages\[0\].role is \["user"\]'),
        ([{"role": "user", "content": "a", "contents": "b"}],
         r"messages\[0\] has no field contents; there are role"),
        ([{"role": "user", "content": "a", "thinking": "b"}], "only an assistant has it"),
        ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "only an assistant has it"),
        ([{"role": "assistant", "content": "a", "thinking": 1}], r"messages\[0\].thinking is 1"),
        ([{"role": "assistant", "content": "a", "thinking": "b", "reasoning_content": "c"}],
         "are different texts"),
        ([{"role": "system", "content": "a"}], "only a system message"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "a"}], "only be first"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "a", "arguments": "b"}]}],
         r"messages\[0\].tool_calls\[0\] is .*; it must be an object with a name"),
        ([{"role": "assistant", "content": "", "tool_calls": [" "]}], r"tool_calls\[0\] is"),
        ([{"role": "assistant", "content": "a", "trained": 1}], "trained is 1; it must be true or"),
        ([{"role": "assistant", "content": "", "fault": "a"}], "no field fault"),
    ],
)  # fmt: skip
def test_bad_messages_are_refused(raw: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        read_messages(raw, "rows.jsonl:3")
    assert str(error.value).startswith("rows.jsonl:3: ")


@settings(deadline=None, max_examples=60)
@given(raw=conversations(CONTENT), trained=st.booleans())
def test_messages_are_written_and_read(raw: list[dict[str, Any]], trained: bool) -> None:
    messages = [replace(message, trained=trained) for message in read_messages(raw, "test")]
    written = json.loads(json.dumps([message_json(message) for message in messages]))
    assert list(read_messages(written, "test")) == messages
    faulty = Message("assistant", "", fault="the thinking was not closed")
    for message in (*messages, faulty):
        assert message_from_json(json.loads(json.dumps(message_json(message)))) == message


def test_a_message_may_be_left_out_of_the_loss(chat: ChatFormat) -> None:
    raw = [{"role": "assistant", "content": "a", "trained": False}]
    assert not chat.render(read_messages(raw, "test")).trained.any()


def test_tokenizers_that_cannot_chat_are_refused(tmp_path: Path) -> None:
    """One without the tokens, and one that puts a space before the first word of a text."""
    for special in ([], list(CHAT_TOKENS)):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # pyright: ignore
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")  # pyright: ignore
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *special])
        tokenizer.train_from_iterator([TEXT], trainer)
        path = tmp_path / f"tokenizer{len(special)}"
        path.mkdir()
        tokenizer.save(str(path / "tokenizer.json"))
        words = "encodes 'user" if special else r"has no <\|im_start\|>.*add-chat-tokens"
        with pytest.raises(ConfigError, match=words):
            ChatFormat(load_tokenizer(path), str(path))
