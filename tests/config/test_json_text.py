"""JSON for strict readers. Second truth: pydantic's parser in Rust, which takes neither NaN nor
half surrogates, and Python's own writer where that is strict.

Not covered: files that a library writes by itself (tokenizers, safetensors, datasets).
"""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.config.json_text import MAX_DEPTH, json_text, strict_json

pydantic_core = pytest.importorskip("pydantic_core")

TEXTS = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    ["\ud800", "a\udcffb", "\ud83d\ude00", "😀", "\\ud800", "NaN"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=8
)


def expected(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return "".join(f"\\u{ord(c):04x}" if 0xD800 <= ord(c) < 0xE000 else c for c in value)
    if isinstance(value, list):
        return [expected(entry) for entry in value]
    if isinstance(value, dict):
        return {expected(key): expected(entry) for key, entry in value.items()}
    return value


@given(value=VALUES, ensure_ascii=st.booleans(), indent=st.sampled_from([None, 1]))
def test_a_strict_reader_reads_every_text(value: Any, ensure_ascii: bool, indent: Any) -> None:
    text = json_text(value, ensure_ascii=ensure_ascii, indent=indent)
    read = pydantic_core.from_json(text.encode("utf-8"), allow_inf_nan=False)
    assert read == json.loads(text) == expected(value)


@given(VALUES)
def test_what_is_json_is_written_as_python_writes_it(value: Any) -> None:
    """Digests in old files were made with `json.dumps`."""
    try:
        text = json.dumps(value, allow_nan=False)
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        return
    assert json_text(value) == text
    layout: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False}
    assert json_text(value, **layout) == json.dumps(value, **layout)


def test_other_values() -> None:
    assert json_text({"a": (1, math.inf), "b": object}, default=lambda kind: "\udc80") == (
        '{"a": [1, null], "b": "\\\\udc80"}'
    )
    with pytest.raises(TypeError):
        json_text({1, 2})


@given(value=VALUES)
def test_what_is_written_is_read(value: Any) -> None:
    written = json_text(value)
    assert repr(strict_json(written)) == repr(json.loads(written))


@given(text=st.text(st.sampled_from('{}[]",:0a1.eE-\\ud8"'), max_size=12) | st.text(max_size=4))
def test_what_another_strict_reader_refuses_is_refused(text: str) -> None:
    """But for numbers that are too large for it and for fields that are there twice."""
    try:
        value = strict_json(text)
    except ValueError:
        return
    assert repr(pydantic_core.from_json(text.encode(), allow_inf_nan=False)) == repr(value)


def test_readers_agree_on_what_is_read() -> None:
    for text in (
        '{"a": 1, "a": 1}',
        "NaN",
        "1e999",
        '"\\udc00"',
        "[" * (MAX_DEPTH + 1) + "]" * 101,
    ):
        with pytest.raises(ValueError):
            strict_json(text)
    nested = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json_text(strict_json(nested)) == nested
