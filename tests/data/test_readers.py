"""Damaged Parquet files and columns that are not UTF-8, through `data prepare`.

Not covered: every kind of damage; a data set's stream breaks in as many ways as its transports.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.readers import (
    InputFile,
    InputFormat,
    Position,
    TextDocuments,
    Undecodable,
    _unbroken,
    read_files,
)


def rows(path: Path) -> list[object]:
    entry = InputFile(path, InputFormat.parquet, path.stat().st_size, 0)
    batches = read_files([entry], Position(), "text", TextDocuments.file)
    return [value for batch in batches for value in batch.payload]


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"row {i} " + "y" * 50 for i in range(5000)]})
    pq.write_table(table, path, row_group_size=1000)
    assert rows(path) == table.column("text").to_pylist()
    content = bytearray(path.read_bytes())
    for place in range(20_000, 20_200):
        content[place] ^= 0x5A
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.parquet: is damaged"):
        rows(path)


def test_text_that_is_not_utf8_is_a_bad_record_of_its_own(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 4, 9, 13)))
    column = pa.Array.from_buffers(
        pa.string(), 3, [None, offsets, pa.py_buffer(b"good\xff\xfebadmore")]
    )
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    good, bad, more = rows(path)
    assert (good, more) == ("good", "more")
    assert isinstance(bad, Undecodable) and "not UTF-8" in bad.reason


def test_a_stream_that_breaks_is_named() -> None:
    def stream():
        yield {"text": ["a"]}
        raise ConnectionError("the server went away\nmore lines")

    batches = _unbroken(stream(), "some/set")
    assert next(batches) == {"text": ["a"]}
    with pytest.raises(
        ConfigError, match=r"input=some/set: the stream broke \(the server went away\)"
    ):
        next(batches)
