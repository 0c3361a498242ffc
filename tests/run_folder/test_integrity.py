"""Validity of checkpoints: every change of their files is detected, and none of them executes code.

Checkpoints here are made by torch's own writer and committed by our code, without training. Their
content is any tensor. Second truth: the bytes as they were, and a marker that hostile pickles would
create. Not covered: a machine that loses power (kill -9 and copies cannot show a missing flush).
"""

import dataclasses
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nemotron_train.config.errors import ConfigError
from nemotron_train.run_folder import integrity
from nemotron_train.run_folder.integrity import damage, drop_old, latest, step_folder, steps_in
from nemotron_train.train.checkpoint import checkpoints
from tests.conftest import checkpoint_texts

Say = Callable[[str], None]


def written(checkpoints: Path, step: int, held: Callable[[], None] = lambda: None) -> Path:
    """A committed checkpoint of `step`: a tensor, an object and progress."""
    final = step_folder(checkpoints, step)
    partial = integrity.partial_folder(final)
    state = {"weight": torch.arange(600.0) + step, "common": {"step": step}}
    _save(state, partial)
    for name, text in checkpoint_texts(step).items():
        (partial / name).write_text(text)
    integrity.commit(final, {}, held)
    return final


def _save(state: dict[str, Any], folder: Path) -> None:
    """torch's files of a state, without the path that torch stores in them."""
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    metadata = FileSystemReader(folder).read_metadata()
    metadata.storage_meta = None
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 5 and 10."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (5, 10):
        written(checkpoints, step)
    return checkpoints


def nothing(text: str) -> None:
    raise AssertionError(text)


def test_an_untouched_checkpoint_is_the_latest(folder: Path) -> None:
    assert latest(folder, nothing) == step_folder(folder, 10)
    assert steps_in(folder) == [5, 10]
    assert {path.name for path in folder.iterdir()} == {"step_00000005", "step_00000010"}


@pytest.mark.parametrize("seed", range(40))
def test_one_flipped_bit_anywhere_is_noticed(folder: Path, seed: int) -> None:
    """Any bit of any file of the checkpoint, its manifest included."""
    draw, newest = random.Random(seed), step_folder(folder, 10)
    path = sorted(newest.iterdir())[seed % len(list(newest.iterdir()))]
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    said: list[str] = []
    assert latest(folder, said.append) == step_folder(folder, 5), path.name
    assert len(said) == 1 and newest.name in said[0] and path.name in said[0]


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def _swap_steps(newest: Path) -> None:
    """An older checkpoint under the newest one's name. The copy itself is intact."""
    shutil.rmtree(newest)
    shutil.copytree(newest.with_name("step_00000005"), newest)


def _swap_with_new_manifest(newest: Path) -> None:
    """The same with a manifest forged for the name by someone other than the run."""
    _swap_steps(newest)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"step": 10}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "shard cut": lambda p: os.truncate(p / "__0_0.distcp", 100),
    "shard empty": lambda p: os.truncate(p / "__0_0.distcp", 0),
    "shard longer": lambda p: _append(p / "__0_0.distcp"),
    "shard gone": lambda p: (p / "__0_0.distcp").unlink(),
    "metadata gone": lambda p: (p / ".metadata").unlink(),
    "progress cut": lambda p: os.truncate(p / "progress.json", 3),
    "manifest gone": lambda p: (p / "manifest.json").unlink(),
    "manifest empty": lambda p: os.truncate(p / "manifest.json", 0),
    "manifest a list": lambda p: (p / "manifest.json").write_text("[]"),
    "manifest deep": lambda p: (p / "manifest.json").write_text("[" * 100000),
    "file more": lambda p: (p / "common.pt").write_bytes(b"x"),
    "folder inside": lambda p: (p / "more").mkdir(),
    "shard a folder": lambda p: ((p / "__0_0.distcp").unlink(), (p / "__0_0.distcp").mkdir()),
    "shard a pipe": lambda p: ((p / "__0_0.distcp").unlink(), os.mkfifo(p / "__0_0.distcp")),
    "manifest a pipe": lambda p: ((p / "manifest.json").unlink(), os.mkfifo(p / "manifest.json")),
    "two files swapped": lambda p: (
        (p / "progress.json").rename(p / "x"),
        (p / "metadata.json").write_text("{}"),
        (p / "x").rename(p / "precision.json"),
    ),
    "all gone": lambda p: [path.unlink() for path in p.iterdir()],
    "another step's": _swap_steps,
    "another step's, new manifest": _swap_with_new_manifest,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_the_one_before_used(folder: Path, kind: str) -> None:
    DAMAGES[kind](step_folder(folder, 10))
    said: list[str] = []
    assert latest(folder, said.append) == step_folder(folder, 5)
    assert len(said) == 1 and "step_00000010" in said[0] and "\n" not in said[0]


def test_all_damaged_is_no_fresh_start(folder: Path) -> None:
    for step in (5, 10):
        os.truncate(step_folder(folder, step) / "__0_0.distcp", 7)
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"no checkpoint in it is undamaged \(step_00000010"):
        latest(folder, said.append)


def test_no_link_is_followed(folder: Path, tmp_path: Path) -> None:
    """A symbolic link in place of a shard, a manifest, a step or the whole folder. None is read,
    and nothing is deleted through it."""
    newest, outside = step_folder(folder, 10), tmp_path / "outside"
    for name in ("__0_0.distcp", "manifest.json", "progress.json"):
        shutil.copytree(newest, outside)
        (newest / name).rename(tmp_path / name)
        (newest / name).symlink_to(tmp_path / name)
        assert damage(newest) is not None, name
        shutil.rmtree(newest)
        outside.rename(newest)
        assert damage(newest) is None
    newest.rename(outside)
    newest.symlink_to(outside, target_is_directory=True)
    assert steps_in(folder) == [5] and damage(newest) is not None
    drop_old(folder, 1, set())
    assert (outside / "manifest.json").exists()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(ConfigError, match="symbolic link"):
        latest(folder, nothing)


# Nothing in a checkpoint is executed --------------------------------------------------------


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _payloads(marker: Path) -> dict[str, bytes]:
    """Pickles that create the folder `marker`: directly, through a helper of torch that imports by
    name, and through a dotted name in a module that checkpoints do use."""
    path = repr(str(marker))
    helper = f"ctorch._utils\n_import_dotted_name\n(Vos.mkdir\ntR(V{marker}\ntR."
    return {
        "global": pickle.dumps(_Hostile(marker)),
        "import helper": helper.encode(),
        "dotted name": b"\x80\x04"
        + b"\x8c\x27torch.distributed.checkpoint.filesystem"
        + b"\x8c\x08os.mkdir\x93"
        + f"(V{marker}\ntR.".encode(),
        "builtin": f"cbuiltins\nexec\n(Vimport os; os.mkdir({path})\ntR.".encode(),
    }


def _vouched_for(newest: Path, name: str, content: bytes) -> None:
    """The file replaced by someone who can also write the manifest and the run's record."""
    integrity.partial_folder(newest).parent.mkdir(exist_ok=True)
    newest.rename(integrity.partial_folder(newest))
    partial = integrity.partial_folder(newest)
    (partial / name).write_bytes(content)
    (partial / "manifest.json").unlink()
    integrity.commit(newest, {}, lambda: None)


@pytest.mark.parametrize("kind", ["global", "import helper", "dotted name", "builtin"])
def test_hostile_metadata_runs_nothing(folder: Path, tmp_path: Path, kind: str) -> None:
    """Refused even with correct checksums. The same bytes given to pickle do execute: the payloads
    are real."""
    marker, newest = tmp_path / "ran", step_folder(folder, 10)
    payload = _payloads(marker)[kind]
    pickle.loads(payload)
    marker.rmdir()
    _vouched_for(newest, ".metadata", payload)
    problem = damage(newest)
    assert problem is not None and ".metadata is refused" in problem
    with checkpoints.no_code_runs(), pytest.raises(pickle.UnpicklingError, match="belong"):
        FileSystemReader(newest).read_metadata()
    assert not marker.exists()


def test_hostile_object_runs_nothing(folder: Path, tmp_path: Path) -> None:
    """An object in a shard, where torch's planner would unpickle anything."""
    marker, newest = tmp_path / "ran", step_folder(folder, 10)
    partial = integrity.partial_folder(newest)
    state = {"weight": torch.zeros(3), "common": _Hostile(marker)}
    shutil.rmtree(newest)
    _save(state, partial)
    for name, text in checkpoint_texts(10).items():
        (partial / name).write_text(text)
    integrity.commit(newest, {}, lambda: None)
    problem = damage(newest)  # the hash is right and the metadata harmless
    assert problem is not None and "'common' cannot be loaded" in problem
    assert not marker.exists()
    wanted: dict[str, Any] = {"weight": torch.zeros(3), "common": None}
    with checkpoints.no_code_runs(), pytest.raises(CheckpointException, match=r"GLOBAL \w+\.mkdir"):
        load(wanted, storage_reader=FileSystemReader(newest), no_dist=True)
    assert not marker.exists()
    load(wanted, storage_reader=FileSystemReader(newest), no_dist=True)
    assert marker.exists(), "the payload is real"


@pytest.mark.parametrize(
    "change",
    [
        {"relative_path": "../outside.distcp"},
        {"relative_path": "/etc/passwd"},
        {"relative_path": "__1_0.distcp"},
        {"offset": -1},
        {"length": 10**12},
        {"offset": float("nan")},
    ],
)
def test_metadata_cannot_point_outside(folder: Path, change: dict[str, Any]) -> None:
    newest = step_folder(folder, 10)
    metadata = FileSystemReader(newest).read_metadata()
    index, place = next(iter(metadata.storage_data.items()))
    metadata.storage_data[index] = dataclasses.replace(place, **change)
    _vouched_for(newest, ".metadata", pickle.dumps(metadata))
    problem = damage(newest)
    assert problem is not None and ".metadata is refused" in problem


def test_loading_is_as_usual_afterwards(folder: Path) -> None:
    before = torch.load
    with checkpoints.no_code_runs():
        state = {"weight": torch.zeros(600)}
        reader = FileSystemReader(step_folder(folder, 10))
        load(state, storage_reader=reader, no_dist=True)
    assert torch.equal(state["weight"], torch.arange(600.0) + 10)
    assert torch.load is before


# Retention and commits ------------------------------------------------------------------------


def test_retention_never_counts_a_damaged_one(folder: Path) -> None:
    """Two newer checkpoints are damaged: the good one is kept whatever `keep` says, and may be
    deleted later."""
    for step in (15, 20):
        os.truncate(written(folder, step) / "__0_0.distcp", 7)
    drop_old(folder, 1, set())
    assert steps_in(folder) == [10, 15, 20]
    written(folder, 25)
    drop_old(folder, 2, {25})
    assert steps_in(folder) == [10, 15, 20, 25]
    written(folder, 30)
    drop_old(folder, 2, {25, 30})
    assert steps_in(folder) == [25, 30]


def test_retention_reads_what_it_relies_on(folder: Path) -> None:
    """A flipped bit keeps lengths and names, so only reading detects it. This process does not read
    a verified checkpoint again, but still checks names and lengths."""
    shard = step_folder(folder, 10) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    drop_old(folder, 1, set())
    assert steps_in(folder) == [5, 10]
    written(folder, 15).joinpath("__0_0.distcp").unlink()
    drop_old(folder, 1, {5, 10, 15})
    assert steps_in(folder) == [10, 15]


def test_a_lost_folder_commits_nothing(folder: Path) -> None:
    def lost() -> None:
        raise RuntimeError("taken over")

    before = (folder.parent / "checkpoints.jsonl").read_bytes()
    with pytest.raises(RuntimeError, match="taken over"):
        written(folder, 15, lost)
    assert steps_in(folder) == [5, 10]
    assert (folder.parent / "checkpoints.jsonl").read_bytes() == before
    integrity.sweep(folder)
    assert {path.name for path in folder.iterdir()} == {"step_00000005", "step_00000010"}


def test_a_cut_record_line_vouches_for_nothing(folder: Path) -> None:
    """A crash while the record was growing: that checkpoint was not renamed yet, and the others
    count."""
    with open(folder.parent / "checkpoints.jsonl", "a") as file:
        file.write('{"step": 15, "mani')
    assert latest(folder, nothing) == step_folder(folder, 10)
    # A folder of that step, in order by its own manifest, has no line that vouches for it.
    made_up = step_folder(folder, 15)
    shutil.copytree(step_folder(folder, 10), made_up)
    manifest = json.loads((made_up / "manifest.json").read_text()) | {"step": 15}
    (made_up / "manifest.json").write_text(json.dumps(manifest))
    said: list[str] = []
    assert latest(folder, said.append) == step_folder(folder, 10)
    assert len(said) == 1 and "not the one that checkpoints.jsonl" in said[0]


def test_a_copy_without_a_run_folder_is_judged_by_its_manifest(folder: Path) -> None:
    (folder.parent / "checkpoints.jsonl").unlink()
    assert latest(folder, nothing) == step_folder(folder, 10)
    os.truncate(step_folder(folder, 10) / "__0_0.distcp", 7)
    assert damage(step_folder(folder, 10)) is not None


def test_names_that_are_no_steps_are_never_touched(folder: Path) -> None:
    names = [
        "step_10",
        "step_00000010.bak",
        "notes",
        ".step_00000010.partial.mine",
        "step_000000١0",
    ]
    for name in names:
        (folder / name).mkdir()
    integrity.sweep(folder)
    drop_old(folder, 1, {5, 10})
    assert steps_in(folder) == [10]
    assert all((folder / name).is_dir() for name in names)
