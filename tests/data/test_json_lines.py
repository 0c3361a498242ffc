"""Files of JSON lines from users: what is refused, by file and line.

Second truth: pydantic's strict parser, for values that both take. Not covered: files that change
while they are read.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import MAX_DEPTH
from nemotron_train.data.json_lines import MAX_LINE_BYTES, Fields, json_lines

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=8,
)  # fmt: skip


def write(folder: Path, *lines: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@settings(max_examples=50, deadline=None)
@given(value=VALUES, ascii_only=st.booleans())
def test_values_are_those_of_another_parser(
    tmp_path_factory: pytest.TempPathFactory, value: Any, ascii_only: bool
) -> None:
    line = json.dumps({"value": value}, ensure_ascii=ascii_only).encode()
    path = write(tmp_path_factory.mktemp("lines"), line)
    ((number, row),) = json_lines(path)
    assert (number, row.value) == (1, from_json(line))
    assert repr(row.value) == repr(from_json(line))  # 1 is not 1.0


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_lines_are_counted_with_the_blank_ones(name: str, tmp_path: Path) -> None:
    text = '{"a": "one\u2028line"}'.encode()
    path = write(tmp_path, b'\xef\xbb\xbf{"a": 1}\r', b"", b" \t", text, name=name)
    found = list(json_lines(path))
    assert [(number, row.get("a")) for number, row in found] == [(1, 1), (4, "one\u2028line")]
    assert found[1][1].where == f"{path}:4"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not a JSON object"),
        (b"[1]", "not a JSON object but list"),
        (b'"text"', "not a JSON object but str"),
        (b'{"a": 1} {"a": 2}', "not a JSON object"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'\xef\xbb\xbf{"a": 1}', "not a JSON object"),  # a mark inside the file
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": [-Infinity]}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"b": [{"a": 1, "a": 1}]}', "'a' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * MAX_DEPTH + b"[]" + b"}" * MAX_DEPTH, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON object"),
        (rb'{"a": "\ud800"}', "half a surrogate"),
        (rb'{"a": {"b": ["\uDC00"]}}', "half a surrogate"),
        (rb'{"\ud800": 1}', "half a surrogate"),
        (b'{"a": "' + b"x" * MAX_LINE_BYTES + b'"}', "more than 16,777,216 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_line_is_named(line: bytes, words: str, tmp_path: Path) -> None:
    """The good line before it is not the one that is named, and was read."""
    path = write(tmp_path, b'{"a": 1}', line)
    lines = json_lines(path)
    assert next(lines)[0] == 1
    with pytest.raises(ConfigError, match=words) as error:
        list(lines)
    assert str(error.value).startswith(f"{path}:2: ") and len(str(error.value).splitlines()) == 1


def test_what_is_just_allowed(tmp_path: Path) -> None:
    deep = b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH
    brackets = b'{"a": "' + b"[" * 500 + b'"}'
    whole = rb'{"a": "\ud83d\ude00"}'
    long = b'{"a": "' + b"x" * (MAX_LINE_BYTES - 10) + b'"}\n'
    assert len(list(json_lines(write(tmp_path, deep, brackets, whole, long)))) == 4


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    files = {"cut.gz": whole[:30], "text.gz": b'{"a": 1}', "bits.gz": whole[:12] + b"\xff" * 9}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in (*files, "missing.jsonl", ""):
        with pytest.raises(ConfigError, match=r": cannot be read \(") as error:
            list(json_lines(tmp_path / name))
        assert str(error.value).startswith(str(tmp_path / name))


def test_errors_have_one_form() -> None:
    """Also with values that are long, of several lines, or would move the cursor."""
    row = Fields({"id": "a\x1b[2J\n\u202e" + "x" * 500, "thinking": 1, "b\nc": 1}, "rows.jsonl:3")
    said = str(row.wrong("id", "short"))
    assert said.startswith('rows.jsonl:3: id is "a') and said.endswith("; it must be short")
    assert len(said) < 120 and said.isprintable()
    assert str(row.wrong("answer", "a text")) == (
        "rows.jsonl:3: answer is missing; it must be a text"
    )
    inner = Fields({"role": None}, "rows.jsonl:3", "messages[0]")
    assert str(inner.wrong("role", "a role")) == (
        "rows.jsonl:3: messages[0].role is null; it must be a role"
    )
    with pytest.raises(ConfigError, match=r"rows.jsonl:3: no field b c; there are id, thinking$"):
        row.check_known(("id", "thinking"))
    with pytest.raises(ConfigError, match="thinking is 1; it must be true or false"):
        row.whether("thinking", True)
    with pytest.raises(ConfigError, match="thinking is 1; it must be a text that is not empty"):
        row.text("thinking")
