"""Rows from files and generators.

Splits are compared by what is generated. Not covered: whether so few different problems teach a
model anything.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.chat.messages import with_effort
from nemotron_train.data.chat.rows import read_rows as read_chat_rows
from nemotron_train.posttrain.environments.families import FAMILY_NAMES
from nemotron_train.posttrain.environments.protocol import Message, row_from_json, row_json
from nemotron_train.posttrain.tasks import Split, read_rows, rows

GOOD: dict[str, Any] = {"environment": "arithmetic", "prompt": "1 + 1 =", "answer": "2"}


def problem_of(row: Any) -> tuple[str, str]:
    return row.messages[0].content, str(row.metadata.get("store"))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_no_problem_is_in_two_splits(name: str) -> None:
    """With one seed and with several: the split is a property of the problem."""
    parts = [
        {problem_of(row) for seed in (1, 2) for row in rows(name, split, seed, 40, level)}
        for split, level in (("warm_start", 1), ("train", 1), ("evaluation", 1), ("harder", 4))
    ]
    assert all(len(part) >= 15 for part in parts)
    for one in range(4):
        for other in range(one):
            assert not parts[one] & parts[other]


def test_a_row_depends_on_its_number_alone() -> None:
    assert rows("strings", "train", 1, 3, 2) == rows("strings", "train", 1, 9, 2)[:3]
    assert rows("strings", "train", 1, 3, 2) != rows("strings", "train", 2, 3, 2)
    ids = [row.id for split in ("train", "warm_start") for row in rows("tools", split, 1, 5, 2)]
    assert len(set(ids)) == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("arithmetic", "train", 1, 1, 4), "level=4: the split train has 1, 2, 3"),
        (("arithmetic", "train", 1, 1, 0), "level=0"),
        (("arithmetic", "harder", 1, 1, 1), "level=1: the split harder has 4"),
        (("arithmetic", "test", 1, 1, 1), "split=test: there are warm_start, train"),
        (("arithmetic", "train", 1, -1, 1), "count=-1"),
        (("sums", "train", 1, 1, 1), "environment sums: there are arithmetic"),
        (("mathematics", "train", 1, 1, 1), "makes no rows"),
        (("mine:exact", "train", 1, 1, 1), "makes no rows"),
    ],
)
def test_generators_refuse(arguments: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rows(*arguments)


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "rows.jsonl"
    texts = [
        line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=True).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def test_rows_are_read(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1 + 1 ="},
        {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
        {"role": "user", "content": "and 2 + 2?"},
    ]
    full = {"id": "b", "environment": "my_rewards:exact", "messages": messages, "answer": ["4", 4]}
    full |= {"metadata": {"from": "me"}, "thinking": False, "budget": 9, "effort": "low"}
    full |= {"tools": [{"name": "add"}]}
    first, second = read_rows(write(tmp_path, GOOD, b"", full))
    assert (first.id, first.messages, first.thinking) == (
        "rows/1",
        (Message("user", "1 + 1 ="),),
        True,
    )
    assert second.messages[2] == Message("assistant", "2", "one and one")
    assert (second.answer, second.budget, second.effort) == (["4", 4], 9, "low")
    for row in (first, second):
        assert row_from_json(json.loads(json.dumps(row_json(row)))) == row
        assert read_rows(write(tmp_path, row_json(row))) == [row]
    compressed = tmp_path / "rows.jsonl.gz"
    compressed.write_bytes(gzip.compress(write(tmp_path, GOOD).read_bytes()))
    assert read_rows(compressed)[0].id == "rows/1"
    without = {name: value for name, value in GOOD.items() if name != "environment"}
    assert read_rows(write(tmp_path, without), "strings")[0].environment == "strings"


def test_a_row_with_an_answer_is_a_conversation(tmp_path: Path) -> None:
    """One file for both. What only a task or only a conversation uses is ignored by the other."""
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 + 1 ="}]
    both = GOOD | {"id": "a", "reasoning_content": "one and one", "thinking": False, "budget": 4}
    both |= {"metadata": {"level": 1}, "tools": [{"name": "add"}], "effort": "low"}
    del both["prompt"]
    lines = [GOOD, both | {"messages": messages}, both | {"prompt": messages, "id": "b"}]
    path = write(tmp_path, *lines)
    tasks, conversations = read_rows(path), list(read_chat_rows(path))
    assert len(tasks) == len(conversations) == 3
    for task, conversation in zip(tasks, conversations, strict=True):
        assert conversation.messages[:-1] == with_effort(task.messages, task.effort)
        assert conversation.tools == task.tools
        assert conversation.messages[-1].content == task.answer == "2"
    assert [row.messages[-1].thinking for row in conversations] == [
        "",
        "one and one",
        "one and one",
    ]
    said = {"role": "assistant", "content": "2"}
    (row,) = read_chat_rows(write(tmp_path, {"messages": [*messages, said], "answer": None}))
    assert len(row.messages) == 3
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: answer is 2; it must be a text"):
        list(read_chat_rows(write(tmp_path, GOOD | {"answer": 2})))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_generated_rows_can_be_written_and_read(name: str, tmp_path: Path) -> None:
    made = rows(name, "train", 1, 5, 3)
    assert read_rows(write(tmp_path, *map(row_json, made))) == made


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not a JSON object"),
        (b'{"answer": NaN}', "NaN is not JSON"),
        ({"prompt": "x"}, "environment is missing"),
        (GOOD | {"environment": "sums"}, "environment sums: there are arithmetic"),
        (GOOD | {"environment": 3}, "environment is 3; it must be a text"),
        (GOOD | {"environment": ""}, 'environment is ""; it must be'),
        (GOOD | {"prompt": ""}, 'prompt is ""; it must be a text that is not empty'),
        (GOOD | {"prompt": " \n"}, "prompt is"),
        (GOOD | {"prompt": None}, "prompt is null"),
        ({**GOOD, "messages": []}, "messages and prompt are both there"),
        ({"environment": "arithmetic"}, "messages and prompt are both missing"),
        (GOOD | {"anwser": "2"}, "no field anwser"),
        (GOOD | {"id": 3}, "id is 3"),
        (GOOD | {"id": ""}, 'id is ""'),
        (GOOD | {"budget": -1}, "budget is -1; it must be a whole number of tokens"),
        (GOOD | {"budget": True}, "budget is true"),
        (GOOD | {"thinking": "on"}, 'thinking is "on"; it must be true or false'),
        (GOOD | {"metadata": []}, None),  # empty is nothing
        (GOOD | {"metadata": ["x"]}, "metadata is"),
        (GOOD | {"tools": {"a": 1}}, "tools is"),
        (GOOD | {"prompt": []}, "prompt is"),
        (GOOD | {"prompt": [{"role": "robot", "content": "x"}]}, r"prompt\[0\].role is"),
        (GOOD | {"prompt": [{"role": "user"}]}, r"prompt\[0\].content is"),
        (
            GOOD | {"prompt": [{"role": "user", "content": "", "x": 1}]},
            r"prompt\[0\] has no field x",
        ),
        (GOOD | {"prompt": [{"role": "user", "content": " "}]}, r'prompt\[0\].content is " "; it'),
        (GOOD | {"prompt": [{"role": "system", "content": "x"}]}, "only a system message"),
        (GOOD | {"prompt": [{"role": "assistant", "content": "x"}]}, "ends with the assistant"),
        (GOOD | {"prompt": ["x"]}, r"prompt\[0\] is"),
    ],
)
def test_a_bad_line_is_named(line: Any, words: str | None, tmp_path: Path) -> None:
    """The good line before it is not the one that is named."""
    path = write(tmp_path, GOOD, line)
    if words is None:
        assert len(read_rows(path)) == 2
        return
    with pytest.raises(ConfigError, match=f"rows.jsonl:2: .*{words}") as error:
        read_rows(path)
    assert len(str(error.value).splitlines()) == 1


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no rows"):
        read_rows(write(tmp_path, b"", b"  "))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path)
    with pytest.raises(ConfigError, match=r"rows.jsonl:2: id 'a' is also that of line 1"):
        read_rows(write(tmp_path, GOOD | {"id": "a"}, GOOD | {"id": "a"}))


def test_splits_are_these() -> None:
    assert list(Split) == ["warm_start", "train", "evaluation", "harder"]
