"""Shards that change while a run reads them: one line that names the file, never a bus error.

Not covered: network file systems, whose clients may show a change seconds later, and a change
between the `stat` of a batch and its use.
"""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import BlendSource, DataConfig, DataPhase
from nemotron_train.data import windows
from nemotron_train.data.batches import BatchSource
from nemotron_train.data.indexed import ShardReader, ShardWriter, token_dtype
from nemotron_train.data.manifest import load_manifest
from nemotron_train.data.watched import WatchedFile

DOCUMENTS = [list(range(start, start + 30)) for start in range(0, 1500, 30)]


def open_source(folder: Path) -> BatchSource:
    blend = [BlendSource(str(folder), 1.0)]
    data = DataConfig(tokenizer=str(folder / "tokenizer"), phases=[DataPhase(0, blend)])
    return BatchSource(data, sequence_length=8, seed=1, split="train", vocab_size=60_000)


def zeros(path: Path) -> None:
    """Same size, and the modification time set back, as `rsync --inplace --times` would."""
    status = path.stat()
    with path.open("r+b") as stream:
        stream.write(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def one_bit(path: Path) -> None:
    """In the middle, outside the marks of a larger file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as stream:
        stream.write(content)


def exchange(path: Path) -> None:
    """By a rename: the old file stays readable through its descriptor."""
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[::-1])
    os.replace(other, path)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (
        lambda path: os.truncate(path, path.stat().st_size // 2),
        "ends at byte|holds .* bytes",
    ),
    "emptied": (lambda path: os.truncate(path, 0), "ends at byte|holds 0 bytes"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 1), "holds .* and held"),
    "zeros": (zeros, "its checksum"),
    "one bit": (one_bit, "its checksum"),
    "exchanged": (exchange, "its checksum"),
    "removed": (lambda path: path.unlink(), "removed|missing"),
    "folder removed": (lambda path: shutil.rmtree(path.parent), "removed|missing"),
    "now a folder": (lambda path: (path.unlink(), path.mkdir()), "holds .* bytes|is no file"),
    "now a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "holds 0 bytes|is no file"),
}


@pytest.mark.parametrize("is_evicted", [False, True], ids=["open", "reopened"])
@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_under_a_run_is_named_before_it_is_trained_on(
    tmp_path: Path, write_folder, monkeypatch, change: str, suffix: str, is_evicted: bool
) -> None:
    """The batch that reads the changed shard is refused, also if the shard was closed in between
    and opened again. `longer` and the others that can be read need the `stat` of each batch."""
    folder = write_folder(tmp_path / "x", DOCUMENTS, shard_tokens=500 if is_evicted else 10**9)
    monkeypatch.setattr(windows, "_OPEN_SHARDS", 1 if is_evicted else 128)
    reader = open_source(folder)
    _, state = reader.take(reader.state_at_start(), 20)
    harm, message = CHANGES[change]
    harm(folder / f"train_00000.{suffix}")
    # With an empty file the reader says what it reads first: the header or a size.
    message = rf"train_0000\d\.(bin|idx): .*({message}|truncated|missing|not a Megatron|magic)"
    with pytest.raises(ConfigError, match=message):
        for _ in range(10):
            _, state = reader.take(state, 20)


@pytest.mark.parametrize("is_evicted", [False, True], ids=["open", "reopened"])
def test_what_leaves_the_content_alone_is_no_change(
    tmp_path: Path, write_folder, monkeypatch, is_evicted: bool
) -> None:
    """Other permissions, other times, a hard link, a copy put in the file's place: the batches
    equal those of an untouched folder."""
    folder = write_folder(tmp_path / "x", DOCUMENTS, shard_tokens=500 if is_evicted else 10**9)
    monkeypatch.setattr(windows, "_OPEN_SHARDS", 1 if is_evicted else 128)
    untouched = open_source(shutil.copytree(folder, tmp_path / "copy"))
    reader = open_source(folder)
    state = reader.state_at_start()
    for number in range(4):
        for path in folder.glob("train_*"):
            if number == 0:
                path.chmod(0o600)
            elif number == 1:
                os.utime(path, (1, 1))
            elif number == 2:
                os.link(path, tmp_path / path.name)
            else:
                shutil.copy(path, tmp_path / "new")
                os.replace(tmp_path / "new", path)
        batch, after = reader.take(state, 60)
        assert np.array_equal(batch.tokens_BS, untouched.take(state, 60)[0].tokens_BS)
        state = after


def test_a_shortened_file_is_an_error_and_no_bus_error(tmp_path: Path) -> None:
    """Read without the check, as in the moment before the `stat`."""
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)) * 100)
    file = WatchedFile(path)
    assert file.read(5000, 100) == bytes(range(100))
    os.truncate(path, 5050)
    with pytest.raises(ConfigError, match=r"x: ends at byte 5,050, and had 10,000 bytes when"):
        file.read(5000, 100)


def test_large_splits_are_known_by_the_ends_of_their_files(
    tmp_path: Path, write_folder, monkeypatch
) -> None:
    """A split too large to be hashed when it is opened: a file overwritten with zeros is found all
    the same, and a manifest of an older version, without marks, is still read."""
    monkeypatch.setattr(windows, "_VERIFIED_BYTES", 0)
    folder = write_folder(tmp_path / "x", DOCUMENTS)
    manifest = folder / "manifest.json"
    entry = load_manifest(folder).splits["train"].shards[0]
    old = "\n".join(line for line in manifest.read_text().splitlines() if "_mark" not in line)
    old = old.replace(f'"{entry.idx_sha256}",', f'"{entry.idx_sha256}"')
    zeros(folder / "train_00000.bin")
    with pytest.raises(ConfigError, match=r"train_00000\.bin: its checksum .*4096 bytes"):
        open_source(folder)
    manifest.write_text(old)
    open_source(folder)


@pytest.fixture(scope="module")
def small_shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    folder = tmp_path_factory.mktemp("shard")
    documents = [[5, 6, 7, 0], [1], [2, 2, 0], list(range(50))]
    writer = ShardWriter(folder, "shard", token_dtype(100))
    for document in documents:
        writer.add(np.array(document))
    writer.finish(100)
    return folder, documents


def read_all(folder: Path) -> list[list[int]]:
    shard = ShardReader(folder, "shard")
    shard.verify()
    return [shard.document(i).tolist() for i in range(shard.documents)]


def with_index(folder: Path, content: bytes) -> list[list[int]]:
    (folder / "shard.idx").write_bytes(content)
    return read_all(folder)


def test_an_index_cut_at_any_byte_is_refused(small_shard: tuple[Path, list[list[int]]]) -> None:
    folder, documents = small_shard
    whole = (folder / "shard.idx").read_bytes()
    for length in range(len(whole)):
        with pytest.raises(ConfigError, match=r"shard\.idx: "):
            with_index(folder, whole[:length])
    assert with_index(folder, whole) == documents


NUMBERS = st.sampled_from([-1, -(2**31), 0, 1, 2, 2**31 - 1, 2**62, 2**63 - 1]) | st.integers(
    -(2**63), 2**63 - 1
)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 121), number=NUMBERS, width=st.sampled_from([1, 4, 8]))
def test_an_index_with_any_other_number_is_refused_or_means_the_same(
    small_shard: tuple[Path, list[list[int]]], at: int, number: int, width: int
) -> None:
    """Counts, dtype, lengths, pointers and boundaries: any bytes overwritten, or garbage."""
    folder, documents = small_shard
    whole = (folder / "shard.idx").read_bytes()
    assert len(whole) == 34 + 20 * 4 + 8
    harmed = whole[:at] + struct.pack("<q", number)[:width] + whole[at + width :]
    try:
        assert with_index(folder, harmed) == documents and harmed[:34] == whole[:34]
    except ConfigError as error:
        assert str(folder / "shard.") in str(error) and "\n" not in str(error)
    finally:
        (folder / "shard.idx").write_bytes(whole)


@settings(max_examples=50, deadline=None)
@given(garbage=st.binary(max_size=300), keep=st.sampled_from([0, 9, 17, 18, 26, 34]))
def test_garbage_is_no_index(
    small_shard: tuple[Path, list[list[int]]], garbage: bytes, keep: int
) -> None:
    folder, _ = small_shard
    whole = (folder / "shard.idx").read_bytes()
    try:
        with pytest.raises(ConfigError, match=r"shard\.(idx|bin): "):
            with_index(folder, whole[:keep] + garbage + b"x")
    finally:
        (folder / "shard.idx").write_bytes(whole)
