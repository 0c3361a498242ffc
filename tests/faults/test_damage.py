"""Checkpoints that were damaged, swapped, linked or forged: reported by name, not used, and nothing
in them executed.

To pass, the newest whole checkpoint before the bad one is always chosen and the bad one is named.
Not covered: memory damage between reading a file for its checksum and loading it.
"""

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Newest = Callable[[Path], tuple[Path | None, list[str]]]


@pytest.fixture(scope="module")
def trained(small_run, reference) -> Path:
    """A run folder with the checkpoints of steps 5 and 10."""
    return reference(10, "train.save_every_steps=5")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run folder, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


def newest_step(run: Path) -> Path:
    return run / "checkpoints" / "step_00000010"


def expect_the_one_before(run: Path, newest: Newest, detail: str = "") -> None:
    found, said = newest(run)
    assert found == run / "checkpoints" / "step_00000005", said
    assert any("step_00000010" in line and detail in line for line in said), said


FILES = ["shard", ".metadata", "metadata.json", "progress.json", "precision.json", "manifest.json"]
HARMS: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "removed": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


def file_of(step: Path, name: str) -> Path:
    return next(step.glob("*.distcp")) if name == "shard" else step / name


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_harmed_file_is_named(run: Path, newest: Newest, name: str, harm: str) -> None:
    path = file_of(newest_step(run), name)
    HARMS[harm](path)
    expect_the_one_before(run, newest, path.name)


def test_a_shard_swapped_for_another_steps_is_named(run: Path, newest: Newest) -> None:
    shard = file_of(newest_step(run), "shard")
    shutil.copy(run / "checkpoints" / "step_00000005" / shard.name, shard)
    expect_the_one_before(run, newest, shard.name)


def test_an_unknown_file_is_named(run: Path, newest: Newest) -> None:
    (newest_step(run) / "extra.distcp").write_bytes(b"x")
    expect_the_one_before(run, newest, "extra.distcp")


def test_100_flipped_bits_are_found(run: Path, newest: Newest) -> None:
    """One bit at a time, in every file of the checkpoint in turn, at a seeded place."""
    draw, files = random.Random(5), sorted(newest_step(run).iterdir())
    found = 0
    for turn in range(100):
        path = files[turn % len(files)]
        content = path.read_bytes()
        place = draw.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        chosen, said = newest(run)
        found += chosen == run / "checkpoints" / "step_00000005" and len(said) == 1
        path.write_bytes(content)
    assert found == 100
    assert newest(run)[0] == newest_step(run)  # restored, it is whole again


def test_no_pointer_is_believed(run: Path, newest: Newest, tmp_path: Path) -> None:
    """Files with which other programs name the newest checkpoint, and modification times."""
    folder = run / "checkpoints"
    for content in ("", "9999", "../outside", "step_00000005", "\0garbage"):
        for name in ("latest", "latest_checkpointed_iteration.txt"):
            (folder / name).write_text(content)
        assert newest(run) == (newest_step(run), [])
    times = {5: 2_000_000_000, 10: 1}
    for step, when in times.items():
        path = folder / f"step_{step:08d}"
        for each in [*path.iterdir(), path]:
            os.utime(each, (when, when))
    assert newest(run) == (newest_step(run), [])


@pytest.mark.parametrize("name", ["step_10", "step_00000020.tmp", ".step_00000020.partial", "x"])
def test_other_folders_are_left_alone(run: Path, newest: Newest, name: str) -> None:
    shutil.copytree(newest_step(run), run / "checkpoints" / name)
    assert newest(run)[0] == newest_step(run)


def test_a_linked_shard_is_refused(run: Path, newest: Newest, tmp_path: Path) -> None:
    """Refused even if its content is right: it could change after the check."""
    shard = file_of(newest_step(run), "shard")
    shutil.move(shard, tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    expect_the_one_before(run, newest, shard.name)


def test_a_linked_checkpoint_is_refused(run: Path, newest: Newest, tmp_path: Path) -> None:
    shutil.move(newest_step(run), tmp_path / "outside")
    newest_step(run).symlink_to(tmp_path / "outside")
    found, _ = newest(run)
    assert found == run / "checkpoints" / "step_00000005"


@pytest.mark.faults
def test_retention_follows_no_link(job, small_run, tmp_path: Path) -> None:
    """Old checkpoints are dropped while one of them is a link to a folder elsewhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    checkpoints = small_run[0] / "runs" / "linked" / "checkpoints"
    first = job("name=linked", "train.save_every_steps=1", "train.stop_after_steps=2")
    assert first.wait() == [3], first.output()
    (checkpoints / "step_00000000").symlink_to(outside)
    second = job("name=linked", "train.save_every_steps=1", "train.stop_after_steps=3")
    assert second.wait() == [3], second.output()
    assert (outside / "precious").read_text() == "kept"
    whole = [p.name for p in sorted(checkpoints.glob("step_*")) if not p.is_symlink()]
    assert whole == ["step_00000004", "step_00000005"]


class _Runs:
    """Pickles as a call that makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "name",
    [".metadata", *(pytest.param(n, marks=pytest.mark.faults) for n in ("shard", "progress.json"))],
)
def test_a_forged_pickle_never_runs(
    job, run: Path, small_run, forge, tmp_path: Path, name: str
) -> None:
    """The forger may write the whole checkpoint folder, checksums included, and the run continues.
    Whether the forgery is refused or read as data, nothing of it runs. The run exits non-zero or
    names it."""
    marker = tmp_path / "code_ran"
    path = file_of(newest_step(run), name)
    path.write_bytes(pickle.dumps(_Runs(marker)))
    forge(newest_step(run))
    where = small_run[0] / "runs" / f"forged_{name.strip('.').replace('.', '_')}"
    shutil.copytree(run, where)
    words = [f"name={where.name}", "train.save_every_steps=5", "train.total_tokens=2560"]
    resumed = job(*words)
    (code,) = resumed.wait()
    assert not marker.exists()
    assert code != 0 or "step_00000010" in resumed.output(), resumed.output()


FORGED_PLACES: dict[str, dict[str, Any]] = {
    "outside": {"relative_path": "../outside.bin"},
    "absolute": {"relative_path": "/etc/passwd"},
    "huge": {"length": 1 << 50},
    "negative": {"offset": -8},
    "not_a_number": {"offset": float("nan")},
    "unlisted": {"relative_path": "__9_0.distcp"},
    "long_name": {"relative_path": "x" * 1_000_000},
}


@pytest.mark.parametrize("places", FORGED_PLACES)
def test_a_forged_index_is_refused(run: Path, newest: Newest, forge, places: str) -> None:
    """An index with a correct checksum that points out of the folder, past a file's end, or
    nowhere."""
    path = newest_step(run) / ".metadata"
    index = pickle.loads(path.read_bytes())
    for place in index.storage_data.values():
        for field, value in FORGED_PLACES[places].items():
            setattr(place, field, value)
    path.write_bytes(pickle.dumps(index))
    forge(newest_step(run))
    expect_the_one_before(run, newest)


def test_goes_on_from_the_one_before(
    job, run: Path, small_run, trained: Path, metrics, weights
) -> None:
    """The newest checkpoint is damaged. The run continues from step 5 and ends as without
    damage."""
    where = small_run[0] / "runs" / "harmed"
    shutil.copytree(run, where)
    HARMS["truncated"](file_of(newest_step(where), "shard"))
    resumed = job("name=harmed", "train.save_every_steps=5")
    assert resumed.wait() == [0], resumed.output()
    assert "step_00000010" in resumed.output() and "step_00000005" in resumed.output()
    assert metrics(where) == metrics(trained)
    assert weights(where, 10) == weights(trained, 10)


def test_nothing_whole_is_never_a_silent_step_0(job, run: Path, small_run) -> None:
    """Both checkpoints are damaged: the run is refused and nothing in its folder changes."""
    where = small_run[0] / "runs" / "all_harmed"
    shutil.copytree(run, where)
    for step in (where / "checkpoints").iterdir():
        HARMS["truncated"](file_of(step, "shard"))
    before = (where / "metrics.jsonl").read_bytes()
    resumed = job("name=all_harmed", "train.save_every_steps=5")
    assert resumed.wait() == [2], resumed.output()
    assert "step_00000010" in resumed.output().strip().splitlines()[-1]
    assert (where / "metrics.jsonl").read_bytes() == before
    assert len(list((where / "checkpoints").iterdir())) == 2
