"""Shards against Megatron-Core's own writer and reader, and damaged shards."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.indexed import ShardReader, ShardWriter, token_dtype

DOCUMENTS = [[5, 6, 7, 0], [1], [2, 2, 0], list(range(50))]


def write(folder: Path, documents: list[list[int]], vocab_size: int = 100) -> ShardReader:
    writer = ShardWriter(folder, "shard", token_dtype(vocab_size))
    for document in documents:
        writer.add(np.array(document))
    writer.finish(vocab_size)
    return ShardReader(folder, "shard")


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_same_bytes_as_megatrons_builder_and_its_dataset_reads_them(
    tmp_path: Path, vocab_size: int
) -> None:
    """Second truth: megatron.core.datasets.indexed_dataset. Not covered: multimodal indices and
    documents of several sequences, which we never write and refuse to read."""
    torch = pytest.importorskip("torch")
    from megatron.core.datasets.indexed_dataset import (
        DType,
        IndexedDataset,
        IndexedDatasetBuilder,
    )

    documents = [*DOCUMENTS, [vocab_size - 1, 0]]
    write(tmp_path, documents, vocab_size)
    theirs = DType.optimal_dtype(vocab_size)
    assert np.dtype(theirs) == token_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=theirs)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "megatron.idx"))
    for suffix in ("bin", "idx"):
        ours = (tmp_path / f"shard.{suffix}").read_bytes()
        assert ours == (tmp_path / f"megatron.{suffix}").read_bytes()
    dataset = IndexedDataset(str(tmp_path / "shard"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))


def test_reader_returns_what_was_written(tmp_path: Path) -> None:
    shard = write(tmp_path, DOCUMENTS)
    shard.verify()
    assert [shard.document(i).tolist() for i in range(shard.documents)] == DOCUMENTS
    assert shard.num_tokens == sum(map(len, DOCUMENTS))
    assert [shard.offset(i) for i in range(5)] == [0, 4, 5, 8, 58]


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1),
    synced=st.integers(1, 100),
    finished=st.booleans(),
)
def test_a_killed_writer_continues_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    synced: int,
    finished: bool,
) -> None:
    """Everything written after the last sync is dropped, even a whole finished shard. Not covered:
    a machine that loses power, and whether the disk keeps its promises."""
    synced = min(synced, len(documents))
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    write(whole, documents)
    first = ShardWriter(broken, "shard", token_dtype(100))
    for document in documents[:synced]:
        first.add(np.array(document))
    first.sync()
    for _ in range(3):
        first.add(np.array([99, 98, 97]))
    if finished:
        first.finish(100)
    else:
        first.sync()
    second = ShardWriter(broken, "shard", token_dtype(100), documents=synced)
    for document in documents[synced:]:
        second.add(np.array(document))
    second.finish(100)
    for suffix in ("bin", "idx"):
        name = f"shard.{suffix}"
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_an_unfinished_shard_has_no_final_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard", token_dtype(100))
    writer.add(np.array([1, 2]))
    writer.sync()
    with pytest.raises(ConfigError, match=r"shard\.bin: this shard file is missing"):
        ShardReader(tmp_path, "shard")


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


DAMAGES = {
    "bin missing": (lambda f: (f / "shard.bin").unlink(), r"shard\.bin: .*missing"),
    "idx missing": (lambda f: (f / "shard.idx").unlink(), r"shard\.idx: .*missing"),
    "bin truncated": (lambda f: os.truncate(f / "shard.bin", 50), r"shard\.bin: .*truncated"),
    "bin empty": (lambda f: os.truncate(f / "shard.bin", 0), r"shard\.bin: .*truncated"),
    "bin too long": (lambda f: os.truncate(f / "shard.bin", 118), r"shard\.bin: .*truncated"),
    "idx truncated": (lambda f: os.truncate(f / "shard.idx", 60), r"shard\.idx: .*truncated"),
    "idx header": (lambda f: os.truncate(f / "shard.idx", 20), r"shard\.idx: truncated"),
    "idx empty": (lambda f: os.truncate(f / "shard.idx", 0), r"shard\.idx: truncated"),
    "magic": (lambda f: overwrite(f / "shard.idx", 0, b"XX"), r"shard\.idx: not a Megatron"),
    "version": (lambda f: overwrite(f / "shard.idx", 9, b"\x02"), r"shard\.idx: index version 2"),
    "dtype": (lambda f: overwrite(f / "shard.idx", 17, b"\x07"), r"shard\.idx: dtype code 7"),
    "counts": (lambda f: overwrite(f / "shard.idx", 26, b"\x09"), r"shard\.idx: .*boundaries"),
    "last document": (lambda f: overwrite(f / "shard.idx", 114, b"\x09"), r"shard\.idx: .*last"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    write(tmp_path, DOCUMENTS)
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    with pytest.raises(ConfigError, match=message):
        ShardReader(tmp_path, "shard")


def test_verify_finds_an_offset_that_opening_does_not_look_at(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS)
    overwrite(tmp_path / "shard.idx", 34 + 4 * 4 + 8, b"\x01")
    with pytest.raises(ConfigError, match=r"shard\.idx: entry 1"):
        ShardReader(tmp_path, "shard").verify()
