"""metrics.jsonl as columns, and downsampled curves.

Second truth: for the fast parser the slow one, and for the slow one the lines themselves, read one
by one. Not covered: a file that is larger than memory.
"""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.report.runs import columns
from nemotron_train.report.runs.columns import parse_columns, parse_rows
from nemotron_train.report.runs.thin import rounded, smoothed, thin


def lines(num_steps: int) -> list[str]:
    """A file like a run's: numbers that come and go, nulls, integers that turn into fractions, an
    occasional list, and events in between."""
    found = []
    for step in range(1, num_steps + 1):
        row: dict = {"step": step, "tokens": 2048 * step, "loss": 3 + 1 / step, "lr": 1e-3}
        row["grad_norm"] = None if step % 17 == 0 else 0.5
        row["zeros"] = step if step < num_steps // 2 else step + 0.5
        if step % 10 == 0:
            row["validation_loss"] = 3.5
            row["expert_load/decoder.layers.1"] = [0.25, 0.25, 0.5, step / num_steps]
        if step > num_steps // 2:
            row["late"] = 1.0
        found.append(json.dumps(row))
        if step % 25 == 0:
            found.append(json.dumps({"kind": "spike", "step": step, "reason": 'a "kind" of {}\n'}))
    return found


def same(ours: columns.Columns, theirs: columns.Columns) -> None:
    assert ours.numbers.keys() == theirs.numbers.keys()
    for name, values in ours.numbers.items():
        np.testing.assert_array_equal(values, theirs.numbers[name], err_msg=name)
    assert ours.lists == theirs.lists and ours.events == theirs.events


def test_both_ways_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    content = ("\n".join(lines(3000)) + "\n").encode()
    slow = parse_columns(content)
    monkeypatch.setattr(columns, "SMALL_BYTES", 0)
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 4096)  # many blocks, with different types
    monkeypatch.setattr(columns, "_slow", lambda content: pytest.fail("the fast way gave up"))
    same(parse_columns(content), slow)
    assert len(slow.events) == 120 and slow.events[0]["reason"] == 'a "kind" of {}\n'
    assert slow.numbers["loss"][9] == 3 + 1 / 10 and np.isnan(slow.numbers["late"][0])
    rows, loads = slow.lists["expert_load/decoder.layers.1"]
    assert rows[:2] == [9, 19] and loads[0] == [0.25, 0.25, 0.5, 10 / 3000]


@pytest.mark.parametrize(
    "harm",
    [
        lambda text: text[:-20],  # the last line is being written
        lambda text: text.replace('"step": 7,', '"step": 7, "lo\n', 1),  # torn in the middle
        lambda text: text + text.splitlines()[3] + "\n",  # a repeated step
        lambda text: text.replace('"loss": 3', '"loss": "high"', 1),
        lambda text: text + '\n\n[1]\n{"loss": 3}\nnull\n',
        lambda text: text.replace('"lr"', '"\udcff"'),  # not UTF-8
        lambda text: text.replace('"tokens": 2048,', '"tokens": ' + "9" * 400 + ",", 1),
        lambda text: text + "[" * 100_000 + "\n",
    ],
)
def test_what_a_crash_leaves(harm: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file contains, both parsers agree, and only the damaged lines are lost."""
    content = harm("\n".join(lines(200)) + "\n").encode("utf-8", "surrogateescape")
    slow = parse_columns(content)
    monkeypatch.setattr(columns, "SMALL_BYTES", 0)
    same(parse_columns(content), slow)
    assert len(slow.numbers["step"]) >= 198


def test_a_file_of_nothing() -> None:
    for content in (b"", b"\n\n", b'{"kind": "spike", "step": 3}\n', b'{"ste'):
        assert parse_columns(content).numbers == {}


def test_rows_and_columns_agree() -> None:
    text = "\n".join(line for line in lines(50) if "kind" not in line)
    found = parse_columns(text.encode())
    for index, row in enumerate(parse_rows(text)):
        for name, values in found.numbers.items():
            expected = row.get(name)
            assert (np.isnan(values[index]) and expected is None) or values[index] == expected


# Curves -------------------------------------------------------------------------------------

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300)


@given(values, st.integers(1, 50))
def test_buckets_keep_what_is_in_them(points: list[float], max_points: int) -> None:
    """Every value lies in the range of exactly one bucket. The extremes of the whole curve survive.
    The mean of the buckets, weighted by their sizes, is the mean of all values."""
    x, y = np.arange(float(len(points))), np.array(points)
    cut = thin(x, y, max_points)
    assert len(cut.x) <= max_points and (np.diff(cut.x) > 0).all()
    assert cut.high.max() == y.max() and cut.low.min() == y.min()
    sizes = [len(part) for part in np.split(y, range(cut.size, len(y), cut.size))]
    assert sum(sizes) == len(y) and len(sizes) == len(cut.mean)
    assert np.average(cut.mean, weights=sizes) == pytest.approx(y.mean(), abs=1e-6)
    for low, mean, high in zip(cut.low, cut.mean, cut.high, strict=True):
        assert low <= mean + 1e-6 and mean <= high + 1e-6


@given(values, st.integers(0, 20), st.integers(2, 8))
def test_buckets_can_be_smoothed_further(points: list[float], reach: int, size: int) -> None:
    """The page's slider averages the means of equal buckets, which equals averaging the points."""
    y = np.repeat(points, size)
    cut = thin(np.arange(float(len(y))), y, len(points))
    assert cut.size in (1, size)
    if cut.size == size:
        assert smoothed(cut.mean, reach) == pytest.approx(smoothed(np.array(points), reach))


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(2, 8))
def test_rounded(value: float, digits: int) -> None:
    [short] = rounded([value], digits)
    if not abs(value) < 1e308:  # near the largest number, rounding exceeds the range
        assert short is None or np.isfinite(value)
    else:
        assert short is not None and abs(short - value) <= abs(value) * 10 ** (1 - digits)
        assert json.loads(json.dumps(short)) == short
