"""Files of rollouts: written, read, damaged.

Second truths: the rollouts themselves; gzip and json of the standard library. Not covered: files
larger than memory.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.errors import ConfigError
from nemotron_train.posttrain.rollout import Rollout, read_rollouts, to_json, write_rollouts
from tests.posttrain.rollouts import rollout, rollouts

TWO = [
    rollout([5, 6], [7, 8, 9, 10, 2], "ssees", passed=True),
    rollout([5, 6], [7], cut=True, sample=1, text="sieben – ∞"),
]


def comparable(rollout: Rollout) -> Rollout:
    """NaN is no equal of itself."""
    values = [str(value) for value in rollout.log_probabilities]
    return replace(rollout, log_probabilities=values)  # type: ignore[arg-type]


@given(written=st.lists(rollouts(), max_size=3))
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: Any, written: list[Rollout]) -> None:
    """And equal rollouts give equal bytes, whenever and wherever they are written."""
    folder = tmp_path_factory.mktemp("rollouts")
    paths = [folder / name for name in ("one.jsonl.gz", "other name.jsonl.gz")]
    for path in paths:
        write_rollouts(path, written)
    read = list(read_rollouts(paths[0]))
    assert [comparable(r) for r in read] == [comparable(r) for r in written]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes()[4:8] == bytes(4), "no time of writing"
    lines = gzip.decompress(paths[0].read_bytes()).decode().split("\n")
    for line, of in zip([line for line in lines if line], written, strict=True):
        value = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert "".join(kind * count for kind, count in value["kinds"]) == of.kinds
        assert value["ids"] == of.ids and value["id"] == of.row.id


def written_with(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A file whose second line was changed, or is what `change` returns in a tuple."""
    lines: list[Any] = [to_json(one) for one in TWO]
    changed = change(lines[1])
    if isinstance(changed, tuple):
        (lines[1],) = changed
    path.write_bytes(gzip.compress("".join(json.dumps(x) + "\n" for x in lines).encode()))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        list(read_rollouts(path))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("ids"),
        lambda value: value.update(kinds=[["s", 2]]),
        lambda value: value.update(kinds=[["s", 10**18], ["s", 1 - 10**18]]),
        lambda value: value.update(kinds=[["x", 1]]),
        lambda value: value.update(kinds="s"),
        lambda value: value.update(ids=["7"]),
        lambda value: value.update(ids=[7.5]),
        lambda value: value.update(ids="7"),
        lambda value: value.update(prompt_ids=None),
        lambda value: value.update(group="0"),
        lambda value: value.update(log_probabilities=[]),
        lambda value: value.update(log_probabilities=["low"]),
        lambda value: value.update(trainer_log_probabilities=[0.5, 0.5]),
        lambda value: value.update(text=None),
        lambda value: value["score"].update(verdict="maybe"),
        lambda value: value["score"].update(reward="1"),
        lambda value: value["episode"].pop("turns"),
        lambda value: value["episode"].update(prompt=[["user", "?"]]),
        lambda value: ([value],),
        lambda value: ("a rollout",),
        lambda value: (7,),
    ],
)
def test_a_wrong_field_is_named_by_its_line(tmp_path: Path, change: Any) -> None:
    said = refusal(written_with(tmp_path / "x.jsonl.gz", change))
    assert said.startswith(f"{tmp_path}/x.jsonl.gz line 2: is no rollout (")


WHOLE = gzip.compress(b"".join(json.dumps(to_json(one)).encode() + b"\n" for one in TWO))


@pytest.mark.parametrize(
    "content",
    [
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:-4],
        WHOLE[:5],
        WHOLE[:40] + b"\xff\xff\xff\xff" + WHOLE[44:],
        WHOLE + b"more",
        b"not gzip\n",
        json.dumps(to_json(TWO[0])).encode(),
        gzip.compress(b"\xff\xfe\n"),
        gzip.compress(b"{\n"),
        gzip.compress(b"[" * 100_000),
    ],
    ids=["half", "no end", "header", "bits", "more", "text", "plain", "utf-8", "json", "deep"],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content)
    assert refusal(path).startswith(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "x.jsonl.gz")
    assert "Is a directory" in refusal(tmp_path)
