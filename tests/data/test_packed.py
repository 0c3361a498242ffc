"""Rows of whole conversations: packing, batches with their masks, resume, bad input.

Second truth for the batches: the conversations rendered again from their JSONL file. Not covered:
training on them (tests/posttrain).
"""

import gzip
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import BlendSource, DataConfig, DataPhase
from nemotron_train.data.batches import BatchSource
from nemotron_train.data.chat.prepare import ChatDataConfig, TooLong, prepare_chat
from nemotron_train.data.chat.render import END, THINK_END, ChatFormat
from nemotron_train.data.chat.rows import read_rows
from nemotron_train.data.packed import PackedSource, pack
from nemotron_train.data.tokenize import CHAT_TOKENS, load_tokenizer, train_tokenizer

TEXT = Path(json.__file__).read_text()
LENGTH = 96
END_ID = 1 + CHAT_TOKENS.index(END)  # a line break follows it at the end of a conversation


@given(lengths=st.lists(st.integers(1, 50), max_size=80), room=st.integers(50, 120))
def test_every_conversation_is_in_one_row(lengths: list[int], room: int) -> None:
    rows = pack(np.array(lengths, dtype=np.int64), room)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert all(0 < used <= room for used in filled)
    # No two rows could be one, so fewer than twice as many rows as the fewest possible.
    assert all(a + b > room for i, a in enumerate(filled) for b in filled[:i])


def test_packing_finds_the_obvious() -> None:
    assert pack(np.array([4, 6, 3, 7, 5, 5]), 10) == [[2, 3], [0, 1], [4, 5]]


def row(number: int, thinking: bool = True) -> dict[str, Any]:
    words = f"{number} " * (1 + number % 7)
    answer: dict[str, Any] = {"role": "assistant", "content": f"It is {number}."}
    if thinking:
        answer["reasoning_content"] = f"I count: {words}"
    return {"messages": [{"role": "user", "content": f"What is {words}?"}, answer]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ChatDataConfig:
    """60 conversations with reasoning, none changed, in a folder of data."""
    folder = tmp_path_factory.mktemp("conversations")
    train_tokenizer([TEXT], 400, folder / "tokenizer")
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(60))
    (folder / "rows.jsonl").write_text(lines)
    config = ChatDataConfig(
        rows=str(folder / "rows.jsonl"),
        output=str(folder / "data"),
        tokenizer=str(folder / "tokenizer"),
        sequence_length=LENGTH,
        validation_fraction=0.1,
        empty_thinking_share=0.0,
        cut_thinking_share=0.0,
    )
    prepare_chat(config, print)
    return config


def source(config: ChatDataConfig, split: str = "train", length: int = LENGTH) -> BatchSource:
    blend = [BlendSource(config.output, 1.0)]
    data = DataConfig(tokenizer=f"{config.output}/tokenizer", phases=[DataPhase(0, blend)])
    data.validation = blend
    return BatchSource(data, sequence_length=length, seed=7, split=split, vocab_size=512)


Conversation = tuple[tuple[int, ...], tuple[bool, ...]]


def conversations(batches: BatchSource, num_rows: int) -> Counter[Conversation]:
    """(ids, trained) of every conversation in the rows. A mask stands a place before its token."""
    batch, _ = batches.take(batches.state_at_start(), num_rows)
    found: Counter[Conversation] = Counter()
    ids_BT = np.concatenate([batch.tokens_BS, batch.labels_BS[:, -1:]], axis=1)
    for ids, mask, documents in zip(ids_BT, batch.loss_mask_BS, batch.document_ids_BS, strict=True):
        trained = np.concatenate([[0], mask]).astype(bool)
        for number in range(documents.max() + 1):
            places = np.flatnonzero(documents == number)
            is_last = places[-1] == len(documents) - 1 and places.size > 1  # 1: padding
            if is_last and ids[places[-2]] != END_ID:  # the row's last token has no position
                places = np.append(places, len(documents))
            if trained[places].any():  # padding has none
                key = (tuple(ids[places].tolist()), tuple(trained[places].tolist()))
                found[key] += 1
    return found


def test_an_epoch_has_every_conversation_once(made: ChatDataConfig) -> None:
    chat = ChatFormat(load_tokenizer(Path(made.tokenizer)))
    expected: Counter[Conversation] = Counter()
    for entry in read_rows(Path(made.rows)):
        rendered = chat.render(entry.messages, entry.tools)
        expected[tuple(rendered.ids.tolist()), tuple(rendered.trained.tolist())] += 1
    train, validation = source(made), source(made, "validation")
    held_out = conversations(validation, validation.num_samples)
    assert held_out.total() == 6
    assert conversations(train, train.num_samples) + held_out == expected
    assert conversations(train, 2 * train.num_samples) == Counter(
        {key: 2 * count for key, count in (expected - held_out).items()}
    )


def test_the_order_changes_with_the_epoch_and_goes_on_where_it_stood(made: ChatDataConfig) -> None:
    batches = source(made)
    count = batches.num_samples
    whole, _ = batches.take(batches.state_at_start(), 2 * count)
    assert not np.array_equal(whole.tokens_BS[:count], whole.tokens_BS[count:])
    first, state = batches.take(batches.state_at_start(), count - 3)
    second, _ = source(made).take(state, count + 3)
    for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "document_ids_BS"):
        parts = np.concatenate([getattr(first, name), getattr(second, name)])
        assert np.array_equal(parts, getattr(whole, name))


def test_reasoning_is_removed_and_cut_in_the_wanted_shares(
    made: ChatDataConfig, tmp_path: Path
) -> None:
    """A cut one keeps the answer, trained; the `</think>` that the budget forced is not."""
    changes = {"empty_thinking_share": 0.3, "cut_thinking_share": 0.4, "seed": 5}
    config = replace(made, output=str(tmp_path / "data"), **changes)
    prepare_chat(config, print)
    close = 1 + CHAT_TOKENS.index(THINK_END)
    kinds: Counter[str] = Counter()
    for split in ("train", "validation"):
        batches = source(config, split)
        for ids, trained in conversations(batches, batches.num_samples):
            place = ids.index(close)
            assert trained[place + 1]
            is_empty = ids[place - 1] == close - 1  # <think> stands before </think>
            kinds["empty" if is_empty else "whole" if trained[place] else "cut"] += 1
    assert 10 <= kinds["empty"] <= 26 and 14 <= kinds["cut"] <= 34 and kinds.total() == 60


def test_the_same_call_again_makes_nothing_and_another_is_refused(made: ChatDataConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(made.output).rglob("*")}
    prepare_chat(made, print)
    assert before == {path: path.stat().st_mtime_ns for path in Path(made.output).rglob("*")}
    with pytest.raises(ConfigError, match=r"output=.*holds other data"):
        prepare_chat(replace(made, seed=1), print)


def test_compressed_rows_and_prompts_with_answers(made: ChatDataConfig, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        for number in range(4):
            file.write(json.dumps({"prompt": f"{number}?", "answer": "yes", "id": number}) + "\n\n")
    entries = list(read_rows(tmp_path / "rows.jsonl.gz"))
    assert [entry.messages[1].content for entry in entries] == ["yes"] * 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"rows.jsonl:2: not a JSON object"),
        ("[]", r"rows.jsonl:2: not a JSON object but list"),
        ('{"id": "a"}', r"rows.jsonl:2: messages and prompt are both missing"),
        ('{"prompt": "a"}', r"rows.jsonl:2: answer is missing"),
        ('{"prompt": "a", "answer": ""}', r'rows.jsonl:2: answer is ""; it must be a text'),
        ('{"prompt": 3, "answer": "b"}', r"rows.jsonl:2: prompt is 3; it must be a text"),
        ('{"prompt": "a", "answer": "b", "thinking": 3}', r"rows.jsonl:2: thinking is 3; it must"),
        ('{"prompt": "a", "answer": "b", "tools": ["c"]}', r"rows.jsonl:2: tools is .*; it must"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "answer": "b"}',
         r"rows.jsonl:2: answer is there, and the assistant has the last message"),
        ('{"messages": [{"role": "user", "content": "a"}]}',
         r"rows.jsonl:2: messages has no assistant's message to train on"),
        ('{"prompt": "a", "answer": "b", "messages": []}',
         r"rows.jsonl:2: messages and prompt are both there"),
        (json.dumps({"prompt": "a", "answer": "b " * 200}), r"rows.jsonl:2: has \d+ tokens, more"),
        ('{"prompt": "a\\ud800", "answer": "b"}', r"rows.jsonl:2: .*half a surrogate"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_by_line(
    made: ChatDataConfig, tmp_path: Path, line: str, words: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(1)) + "\n" + line + "\n")
    config = replace(made, rows=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "data"))
    with pytest.raises(ConfigError, match=words):
        prepare_chat(config, print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_bad_knobs_are_refused(made: ChatDataConfig, tmp_path: Path) -> None:
    config = replace(made, output=str(tmp_path / "data"))
    for changes, words in (
        ({"rows": str(tmp_path / "none*.jsonl")}, "rows=.*none"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"cut_thinking_share": 1.2}, "cut_thinking_share=1.2"),
        ({"empty_thinking_share": 0.6, "cut_thinking_share": 0.6}, "their sum must be 1"),
        ({"sequence_length": -1}, "sequence_length=-1"),
    ):
        with pytest.raises(ConfigError, match=words):
            prepare_chat(replace(config, **changes), print)
    (tmp_path / "one.jsonl").write_text(json.dumps(row(1)))
    with pytest.raises(ConfigError, match="hold 1 different conversations"):
        prepare_chat(replace(config, rows=str(tmp_path / "one.jsonl")), print)


def test_too_long_conversations(made: ChatDataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.sequence_length=32: .*too_long=drop"):
        source(made, length=32)
    dropping = {"sequence_length": 50, "too_long": TooLong.drop, "output": str(tmp_path / "data")}
    result = prepare_chat(replace(made, **dropping), print)
    kept = sum(
        split.documents for name, split in result.manifest.splits.items() if "mask" not in name
    )
    assert result.dropped > 0 and result.dropped + kept == 60


def test_a_changed_mask_is_noticed(made: ChatDataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(made.output, folder)
    options: dict[str, Any] = {"sequence_length": LENGTH, "seed": 1, "vocab_size": 512}
    opened = PackedSource(folder, "train", **options, shuffle=True)
    opened.read(0, 0)
    mask = folder / "train_mask_00000.bin"
    content = bytearray(mask.read_bytes())
    content[3] ^= 1
    mask.write_bytes(content)
    with pytest.raises(ConfigError, match="train_mask_00000"):
        opened.check_unchanged()
    with pytest.raises(ConfigError, match="train_mask_00000"):
        PackedSource(folder, "train", **options, shuffle=True)
