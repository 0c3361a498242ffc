"""Durable and atomic writes, and line files whose last line was cut off.

Not covered: a real power failure; tests/faults kills processes in the middle of a save.
"""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.platform.files import (
    append_line,
    file_sha256,
    heal_last_line,
    replacing,
    write_atomically,
)


def entries(path: Path) -> list[object]:
    """The lines that can be read, as every reader of a line file takes them."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@given(kept=st.integers(0, 40))
def test_a_cut_last_line_costs_itself_alone(
    tmp_path_factory: pytest.TempPathFactory, kept: int
) -> None:
    """However much of the second line reached the disk, the first and the third are read."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    first, second, third = ({"step": step, "manifest": "0" * 20} for step in (1, 2, 3))
    append_line(path, json.dumps(first))
    with open(path, "a", encoding="utf-8") as file:
        file.write((json.dumps(second) + "\n")[:kept])
    append_line(path, json.dumps(third))
    whole = kept >= len(json.dumps(second))
    assert entries(path) == [first, *([second] if whole else []), third]


def test_healing_changes_no_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    heal_last_line(path)
    assert not path.exists()
    for content in ("", "{}\n", "{}\n{}\n"):
        path.write_text(content)
        heal_last_line(path)
        assert path.read_text() == content


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_digests(tmp_path: Path) -> None:
    path, link = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"abc")
    link.symlink_to(path)
    digest = hashlib.sha256(b"abc").hexdigest()
    assert file_sha256(path) == file_sha256(link) == digest
    with pytest.raises(OSError):
        file_sha256(link, follow_links=False)
