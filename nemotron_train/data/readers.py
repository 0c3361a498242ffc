"""Reads the inputs of `data prepare` as a stream of raw batches, each with the position after it.

The reading process does not decode. A batch holds bytes or values as they are in the input;
encode.py turns it into documents in a worker. A position is enough to continue after a kill.
"""

import codecs
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.inputs import InputFile, InputFormat

_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 512


class TextDocuments(StrEnum):
    """What counts as one document in text files."""

    file = "file"  # a text file is one document
    package = "package"  # all text files under one entry of the input folder are one document
    line = "line"  # a line is one document


@dataclass(frozen=True)
class Position:
    """How far the input has been read.

    file: index of the file. offset: bytes of the decompressed file (text, jsonl) or rows (parquet,
    dataset) read. line: lines read.
    """

    file: int = 0
    offset: int = 0
    line: int = 0


@dataclass(frozen=True)
class RawBatch:
    """A piece of the input, not yet decoded.

    payload: the bytes of whole lines (jsonl, text lines), the bytes of a whole file or package
    (text), or a list of values (parquet, dataset). name: of the file, for messages. first_line:
    line or row number of the first record, from 1; 0 for a whole file. after: the position after
    this batch. files: the range of input files that the batch is from, [first, end).
    """

    format: InputFormat
    payload: bytes | list[Any]
    name: str
    first_line: int
    after: Position
    bytes_read: int  # of all input files so far; 0 if their size is unknown
    files: tuple[int, int] = (0, 0)


def read_files(
    files: list[InputFile], start: Position, text_field: str, text_documents: TextDocuments
) -> Iterator[RawBatch]:
    """All batches of `files` after `start`, in order. Raises ConfigError, naming the file, if one
    cannot be read or has no column `text_field`."""
    bytes_before = sum(entry.size for entry in files[: start.file])
    if text_documents == TextDocuments.package:
        yield from _read_packages(files, start.file, bytes_before)
        return
    for index in range(start.file, len(files)):
        entry = files[index]
        begin = start if index == start.file else Position(index)
        if entry.format == InputFormat.parquet:
            yield from _read_parquet(entry, begin, text_field, bytes_before)
        elif entry.format == InputFormat.text and text_documents == TextDocuments.file:
            raw, stream = _open(entry.path)
            with raw, stream:
                payload = _read(stream, str(entry.path), -1)
            after, bytes_read = Position(index + 1), bytes_before + entry.size
            name, batch_files = str(entry.path), (index, index + 1)
            yield RawBatch(InputFormat.text, payload, name, 0, after, bytes_read, batch_files)
        else:
            yield from _read_lines(entry, begin, bytes_before)
        bytes_before += entry.size


def _read_packages(files: list[InputFile], first: int, bytes_before: int) -> Iterator[RawBatch]:
    """One batch per package: its files in the order of their paths, separated by newlines. This
    makes long documents, whose parts refer to one another, from short files.

    Raises ConfigError if a file is not text: rows have no package.
    """
    for entry in files:
        if entry.format != InputFormat.text:
            raise ConfigError(
                f"text_documents=package: {entry.path} is {entry.format.value}, and only text "
                "files make a package; narrow `input` or give format=text"
            )
    root = Path(os.path.commonpath([entry.path.parent for entry in files]))
    while first < len(files):
        package = files[first].path.relative_to(root).parts[0]
        last, parts = first, []
        while last < len(files) and files[last].path.relative_to(root).parts[0] == package:
            raw, stream = _open(files[last].path)
            with raw, stream:
                part = _read(stream, str(files[last].path), -1).removeprefix(codecs.BOM_UTF8)
            parts.append(part if part.endswith(b"\n") else part + b"\n")
            bytes_before += files[last].size
            last += 1
        after = Position(last)
        payload, name = b"".join(parts), str(root / package)
        yield RawBatch(InputFormat.text, payload, name, 0, after, bytes_before, (first, last))
        first = last


@dataclass(frozen=True)
class Undecodable:
    """A record of a text column that is no text; the reason."""

    reason: str


def _open(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    """(the raw file, its decompressed stream); the same object if the file is not compressed.
    Raises ConfigError if it cannot be opened."""
    try:
        raw = path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be opened ({error.strerror})") from None
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return raw, gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]
    if suffix == ".zst":
        import pyarrow

        return raw, pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return raw, raw


def _read_lines(entry: InputFile, begin: Position, bytes_before: int) -> Iterator[RawBatch]:
    """Batches of whole lines. A compressed file is decompressed again up to `begin`."""
    raw, stream = _open(entry.path)
    name = str(entry.path)
    offset = begin.offset
    line = begin.line
    partial_line: list[bytes] = []
    with raw, stream:
        if stream is raw:
            raw.seek(offset)
        else:
            skip = offset
            while skip:
                skipped = len(_read(stream, name, min(skip, _BATCH_BYTES)))
                if not skipped:
                    raise ConfigError(f"{name}: ends before the place it was read to; it changed")
                skip -= skipped
        while True:
            chunk = _read(stream, name, _BATCH_BYTES)
            whole, newline, tail = chunk.rpartition(b"\n")
            if chunk and not newline:  # the line is longer than a batch
                partial_line.append(tail)
                continue
            # At the end of the file, a last line without a newline counts as a line.
            payload = b"".join([*partial_line, whole, newline])
            partial_line = [tail] if tail else []
            if payload:
                num_lines = payload.count(b"\n")
                offset += len(payload)
                after = Position(begin.file, offset, line + num_lines)
                bytes_read = bytes_before + min(raw.tell(), entry.size)
                files = (begin.file, begin.file + 1)
                yield RawBatch(entry.format, payload, name, line + 1, after, bytes_read, files)
                line += num_lines
            if not chunk:
                return


def _read(stream: IO[bytes], name: str, size: int) -> bytes:
    """Up to `size` bytes (-1: all). Raises ConfigError, naming the file, if it cannot be read or
    decompressed."""
    try:
        return stream.read(size)
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigError(f"{name}: cannot be read ({error})") from None


def _read_parquet(
    entry: InputFile, begin: Position, text_field: str, bytes_before: int
) -> Iterator[RawBatch]:
    """Batches of rows, one row group at a time. Row groups before `begin` are not read."""
    import pyarrow
    import pyarrow.parquet

    name = str(entry.path)
    try:
        table = pyarrow.parquet.ParquetFile(entry.path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{name}: not a Parquet file ({error})") from None
    with table:
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise ConfigError(
                f"text_field={text_field}: not a column of {name}; it has {', '.join(columns)}"
            )
        row = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            if row + num_rows <= begin.offset:
                row += num_rows
                continue
            batches = table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[text_field])
            for batch in _undamaged(batches, name):
                skip = min(max(begin.offset - row, 0), batch.num_rows)
                values = _values(batch.column(0))[skip:]
                first, row = row + skip, row + batch.num_rows
                if values:
                    bytes_read = bytes_before + entry.size * row // table.metadata.num_rows
                    after = Position(begin.file, row)
                    files = (begin.file, begin.file + 1)
                    yield RawBatch(entry.format, values, name, first + 1, after, bytes_read, files)


def _undamaged(batches: Iterator[Any], name: str) -> Iterator[Any]:
    """The batches of a Parquet file. Raises ConfigError, naming the file, at a damaged page."""
    import pyarrow

    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{name}: is damaged ({reason}); replace the file") from None
        if batch is None:
            return
        yield batch


def _values(column: Any) -> list[Any]:
    """The values of a Parquet column; an `Undecodable` for text that is not UTF-8."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(pyarrow.binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | Undecodable | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        return Undecodable(f"not UTF-8 ({error.reason} at byte {error.start})")


def read_dataset(
    name: str, config_name: str, split: str, text_field: str, start: Position
) -> Iterator[RawBatch]:
    """Batches of rows of a Hugging Face data set, streamed. Raises ConfigError if it cannot be
    opened or has no column `text_field`.

    The `datasets` library imports torch, if installed, into this process, but not into the workers.
    """
    import datasets

    try:
        stream = datasets.load_dataset(name, config_name or None, split=split, streaming=True)
    except Exception as error:  # the library and its transports raise many kinds
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ConfigError(f"input={name}: `datasets` cannot open it ({reason})") from error
    assert isinstance(stream, datasets.IterableDataset)
    if stream.column_names is not None:
        if text_field not in stream.column_names:
            raise ConfigError(
                f"text_field={text_field}: not a column of {name}; it has "
                f"{', '.join(stream.column_names)}"
            )
        stream = stream.select_columns([text_field])
    row = start.offset
    for rows in _unbroken(stream.skip(row).batch(_BATCH_ROWS), name):
        values = list(rows[text_field])
        after = Position(0, row + len(values))
        yield RawBatch(InputFormat.dataset, values, name, row + 1, after, 0)
        row += len(values)


def _unbroken(stream: Iterable[Any], name: str) -> Iterator[Any]:
    """The batches of a data set. Raises ConfigError, naming it, where the stream breaks."""
    iterator = iter(stream)
    while True:
        try:
            rows = next(iterator, None)
        except Exception as error:  # the library and its transports raise many kinds
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            raise ConfigError(f"input={name}: the stream broke ({reason}); run it again") from error
        if rows is None:
            return
        yield rows
