"""metrics.jsonl as columns: one array per metric, also from a file that a crash left damaged. No
torch.

Owns: separating step lines from events (lines with a `kind`); the fast parser (Arrow's JSON reader)
and the slow one, which defines the result and takes over for torn or unusual lines. Does not own:
the other files of a run folder (`read`), the use of the numbers.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SMALL_BYTES = 1_000_000  # below this, importing Arrow takes longer than the slow parser
_BLOCK_BYTES = 1 << 22  # Arrow reads block by block; every line is shorter than a block


@dataclass(frozen=True)
class Columns:
    """The content of a metrics.jsonl.

    numbers: name -> float64 [rows], NaN where a line lacks it; `step` is strictly ascending. lists:
    name -> (rows, values) of the lines that have it, such as `expert_load/LAYER`. events: the lines
    with a `kind`, unchanged."""

    numbers: dict[str, np.ndarray]
    lists: dict[str, tuple[list[int], list[list[float]]]]
    events: list[dict[str, Any]]


def parse_columns(content: bytes) -> Columns:
    """The columns of a whole file. Torn lines are skipped. If a step was logged twice, the later
    values win."""
    content = content[: content.rfind(b"\n") + 1] if not _ends_whole(content) else content
    steps, events = _without_events(content)
    parsed = _fast(steps) if len(steps) > SMALL_BYTES else None
    numbers, lists = parsed or _slow(steps)
    return Columns(numbers, lists, events)


def parse_rows(text: str) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, by ascending step. Torn lines are skipped. If a step was
    logged twice, the later values win."""
    rows: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        row = _object(line)
        if row is not None:
            rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object in a line; None if it is torn or has no integer `step`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and type(row.get("step")) is int
    return row if is_row else None


def _ends_whole(content: bytes) -> bool:
    """Whether the last line is complete. A running job may be in the middle of writing it."""
    last = content[content.rfind(b"\n") + 1 :]
    return not last.strip() or _object(last.decode("utf-8", "replace")) is not None


def _without_events(content: bytes) -> tuple[bytes, list[dict[str, Any]]]:
    """Returns (content without events, events). Events are few and long, and their structure
    differs from that of step lines, so Arrow must not see them."""
    pieces = []
    events = []
    start = 0
    at = content.find(b'"kind"')
    while at >= 0:
        begin = content.rfind(b"\n", 0, at) + 1
        end = content.find(b"\n", at)
        end = len(content) if end < 0 else end + 1
        row = _object(content[begin:end].decode("utf-8", "replace"))
        if row is None or "kind" in row:
            pieces.append(content[start:begin])
            events += [row] if row is not None else []
            start = end
        at = content.find(b'"kind"', end)
    pieces.append(content[start:])
    return b"".join(pieces), events


def _slow(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, tuple[list[int], list]]]:
    """(numbers, lists) of Columns, line by line with Python's JSON parser."""
    rows = parse_rows(content.decode("utf-8", "replace"))
    numbers: dict[str, np.ndarray] = {}
    lists: dict[str, tuple[list[int], list]] = {}
    for index, row in enumerate(rows):
        for name, value in row.items():
            if _is_number(value):
                if name not in numbers:
                    numbers[name] = np.full(len(rows), np.nan)
                numbers[name][index] = value
            elif isinstance(value, list) and value and all(_is_number(entry) for entry in value):
                line_numbers, values = lists.setdefault(name, ([], []))
                line_numbers.append(index)
                values.append(value)
    return numbers, lists


def _is_number(value: Any) -> bool:
    # JSON allows integers of hundreds of digits, which do not fit a float64.
    if type(value) is int:
        return abs(value) < 2**1023
    return type(value) is float and math.isfinite(value)


def _fast(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """As `_slow`, with Arrow; None if the content has anything that needs the slow parser."""
    import pyarrow
    import pyarrow.json

    try:
        table = pyarrow.json.read_json(
            pyarrow.BufferReader(content),
            read_options=pyarrow.json.ReadOptions(
                block_size=_BLOCK_BYTES,
                use_threads=False,  # the caller reads several runs in parallel
            ),
        )
        names, types = table.column_names, table.schema.types
    except (pyarrow.ArrowException, UnicodeDecodeError):
        return None
    if len(set(names)) < len(names):
        return None
    numbers, lists = {}, {}
    for name, kind, column in zip(names, types, table.columns, strict=True):
        if pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind):
            chunks = [_float64(chunk) for chunk in column.chunks]
            values = np.concatenate(chunks) if chunks else np.empty(0)
            if not np.isnan(values).all():
                numbers[name] = values
        elif pyarrow.types.is_list(kind) and (
            pyarrow.types.is_floating(kind.value_type) or pyarrow.types.is_integer(kind.value_type)
        ):
            valid = np.concatenate([_valid(chunk) for chunk in column.chunks])
            entries = [(row, column[row].as_py()) for row in np.flatnonzero(valid).tolist()]
            entries = [(row, value) for row, value in entries if value and None not in value]
            if entries:
                lists[name] = ([row for row, _ in entries], [value for _, value in entries])
    steps = numbers.get("step")
    if steps is None or not (steps == np.floor(steps)).all() or not (np.diff(steps) > 0).all():
        return None
    return numbers, lists


def _float64(chunk: Any) -> np.ndarray:
    """An Arrow array of 64-bit numbers as float64, NaN for missing or non-finite values. Reads the
    buffers directly: Arrow's own conversion imports pandas, which takes longer than everything
    else."""
    import pyarrow

    kind = np.int64 if pyarrow.types.is_integer(chunk.type) else np.float64
    raw = np.frombuffer(chunk.buffers()[1], dtype=kind)[chunk.offset : chunk.offset + len(chunk)]
    values = raw.astype(np.float64)
    values[~(_valid(chunk) & np.isfinite(values))] = np.nan
    return values


def _valid(chunk: Any) -> np.ndarray:
    """Which entries of an Arrow array are not null: bool [entries]."""
    bitmap = chunk.buffers()[0]
    if bitmap is None:
        return np.ones(len(chunk), dtype=bool)
    bits = np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), bitorder="little")
    return bits[chunk.offset : chunk.offset + len(chunk)].astype(bool)


def finite(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays, restricted to the positions where all of them are finite."""
    keep = np.logical_and.reduce([np.isfinite(array) for array in arrays])
    return tuple(array[keep] for array in arrays)


def last_of(values: Sequence[float] | np.ndarray) -> float | None:
    """The last finite value; None if there is none."""
    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    return float(array[-1]) if len(array) else None
