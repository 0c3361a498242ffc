"""Batches checked without knowledge of how they were made.

The synthetic documents hold every token id once, so each row shows which documents it was cut from
and where. Order, overlap, labels, masks and document numbers are checked from the ids alone. The
permutations behind the order have their own tests.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import BlendSource, DataConfig, DataKind, DataPhase
from nemotron_train.data import windows
from nemotron_train.data.batches import Batch, BatchSource
from nemotron_train.data.blend import DataState

Documents = list[list[int]]
VOCAB = 60_000


def unique_documents(lengths: list[int], first: int = 0) -> Documents:
    ends = np.cumsum(lengths) + first
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


def config(tokenizer: Path, *blends: dict[Path, float], starts: tuple[int, ...] = (0,)):
    phases = [
        DataPhase(start, [BlendSource(str(path), weight) for path, weight in blend.items()])
        for start, blend in zip(starts, blends, strict=True)
    ]
    return DataConfig(
        kind=DataKind.prepared,
        tokenizer=str(tokenizer),
        phases=phases,
        validation=[BlendSource(str(path), weight) for path, weight in blends[0].items()],
    )


def source(data: DataConfig, length: int = 8, split: str = "train", **changes: int) -> BatchSource:
    return BatchSource(
        data, sequence_length=length, split=split, **{"seed": 1, "vocab_size": VOCAB, **changes}
    )


def assert_same(first: Batch, second: Batch) -> None:
    for name in vars(first):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(**{name: value[start:stop] for name, value in vars(batch).items()})


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(windows, "_DOCUMENTS_A_BLOCK", 3)
    yield


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    sequence_length=st.integers(1, 12),
    shard_tokens=st.sampled_from([1, 40, 10**9]),
    block=st.sampled_from([1, 3, 4096]),
    seed=st.integers(0, 5),
)
def test_an_epoch_is_every_document_once_in_a_new_order_cut_into_windows(
    tmp_path_factory: pytest.TempPathFactory,
    write_folder,
    lengths: list[int],
    sequence_length: int,
    shard_tokens: int,
    block: int,
    seed: int,
) -> None:
    """Brute force from the ids. Not covered: how random the order is."""
    documents = unique_documents(lengths)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    num_windows = (sum(lengths) - 1) // sequence_length
    if num_windows < 1:
        return
    folder = write_folder(tmp_path_factory.mktemp("d") / "x", documents, shard_tokens=shard_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_DOCUMENTS_A_BLOCK", block)
        data = source(config(folder / "tokenizer", {folder: 1}), sequence_length, seed=seed)
        batch, _ = data.take(data.state_at_start(), 2 * num_windows)
    assert batch.sample_ids_B.tolist() == list(range(2 * num_windows))
    assert batch.origins_B3[:, 1].tolist() == [0] * num_windows + [1] * num_windows
    for epoch in (0, 1):
        mine = rows(batch, epoch * num_windows, (epoch + 1) * num_windows)
        order = np.argsort(mine.origins_B3[:, 2])
        assert mine.origins_B3[order, 2].tolist() == list(range(num_windows))
        windows_T = np.column_stack([mine.tokens_BS, mine.labels_BS[:, -1]])
        assert np.array_equal(mine.labels_BS, windows_T[:, 1:])
        ordered = windows_T[order]
        assert np.array_equal(ordered[1:, 0], ordered[:-1, -1])  # neighbours share one token
        stream = np.append(ordered[:, :-1].ravel(), ordered[-1, -1])
        # The stream is whole documents, none twice. Only the last one may be cut.
        where, seen = 0, set()
        while where < stream.size:
            document = int(document_of[stream[where]])
            expected = documents[document][: stream.size - where]
            assert document not in seen
            assert stream[where : where + len(expected)].tolist() == expected
            seen.add(document)
            where += len(expected)
        assert sum(lengths) - stream.size < sequence_length
        documents_T = document_of[windows_T]
        changes = documents_T[:, 1:] != documents_T[:, :-1]
        assert np.array_equal(mine.loss_mask_BS, 1.0 - changes)
        numbers = np.column_stack([np.zeros(num_windows), np.cumsum(changes, axis=1)[:, :-1]])
        assert np.array_equal(mine.document_ids_BS, numbers)


@pytest.fixture
def blended(tmp_path: Path, write_folder, small_blocks: None) -> DataConfig:
    """Two phases over three sources of different sizes."""
    random = np.random.default_rng(0)
    folders, first = [], 0
    for name, count in (("a", 40), ("b", 25), ("c", 9)):
        lengths = random.integers(1, 40, count).tolist()
        held_out = random.integers(1, 40, 6).tolist()
        train = unique_documents(lengths, first)
        validation = unique_documents(held_out, first + sum(lengths))
        first += sum(lengths) + sum(held_out)
        folders.append(write_folder(tmp_path / name, train, validation, shard_tokens=300))
    a, b, c = folders
    return config(a / "tokenizer", {a: 0.7, b: 0.3}, {b: 1, c: 2}, starts=(0, 250))


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.integers(1, 40), min_size=1, max_size=5), data=st.data())
def test_parts_ranks_and_restarts_see_one_order(
    blended_once: DataConfig, parts: list[int], data: st.DataObject
) -> None:
    """take(5) then take(7) equals take(12). Rank slices together equal the whole. A new source, and
    a state that went through JSON, continue where the old ones stopped."""
    reader = source(blended_once)
    whole, end = reader.take(reader.state_at_start(), sum(parts))
    state, done = reader.state_at_start(), 0
    for part in parts:
        if data.draw(st.booleans()):
            reader = source(blended_once)
            state = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
        cut = data.draw(st.integers(0, part))
        left, after = reader.take(state, part, rank_slice=(0, cut))
        right, same = reader.take(state, part, rank_slice=(cut, part))
        assert after == same
        assert_same(left, rows(whole, done, done + cut))
        assert_same(right, rows(whole, done + cut, done + part))
        state, done = after, done + part
    assert state == end


@pytest.fixture(scope="module")
def blended_once(tmp_path_factory: pytest.TempPathFactory, write_folder) -> DataConfig:
    folder = tmp_path_factory.mktemp("blend")
    for name, first in (("a", 0), ("b", 2000), ("c", 4000)):
        write_folder(folder / name, unique_documents([7, 30, 1, 55, 12] * 4, first))
    a, b, c = folder / "a", folder / "b", folder / "c"
    return config(a / "tokenizer", {a: 0.7, b: 0.3}, {b: 1, c: 2}, starts=(0, 250))


def test_realised_shares_and_the_switch(blended: DataConfig) -> None:
    reader = source(blended)
    batch, state = reader.take(reader.state_at_start(), 100)
    sources = batch.origins_B3[:, 0]
    switch = -(-250 // 8)  # the first sample that starts at or after token 250
    before, after = sources[:switch], sources[switch:]
    assert set(before.tolist()) == {0, 1} and set(after.tolist()) == {1, 2}
    assert abs((before == 0).sum() - 0.7 * switch) < 1
    assert abs((after == 2).sum() - after.size * 2 / 3) < 1
    drawn = {str(folder): (sources == i).sum() for i, folder in enumerate(reader.folders)}
    assert state.samples == 100 and state.tokens == 800
    for folder, epochs in reader.epochs(state).items():
        one = source(config(Path(folder) / "tokenizer", {Path(folder): 1}))
        assert epochs == pytest.approx(drawn[folder] / one.num_samples)


def test_no_sample_comes_twice_in_an_epoch_across_phases(blended: DataConfig) -> None:
    reader = source(blended)
    batch, _ = reader.take(reader.state_at_start(), 300)
    origins = list(map(tuple, batch.origins_B3.tolist()))
    assert len(set(origins)) == len(origins)
    for number in range(3):
        mine = [(epoch, window) for which, epoch, window in origins if which == number]
        epochs = [epoch for epoch, _ in mine]
        assert epochs == sorted(epochs)
        for epoch in range(max(epochs)):  # a completed epoch has every window
            assert sorted(w for e, w in mine if e == epoch) == list(range(epochs.count(0)))


def test_validation_is_the_files_in_order(blended: DataConfig) -> None:
    only_a = DataConfig(
        kind=DataKind.prepared,
        tokenizer=blended.tokenizer,
        validation=blended.phases[0].blend[:1],
    )
    reader = source(only_a, split="validation")
    batch, _ = reader.take(reader.state_at_start(), reader.num_samples)
    first = int(batch.tokens_BS[0, 0])
    assert batch.tokens_BS.ravel().tolist() == list(range(first, first + batch.tokens_BS.size))
    train = source(blended)
    trained, _ = train.take(train.state_at_start(), 500)
    assert not set(trained.tokens_BS.ravel()) & set(batch.tokens_BS.ravel())


def test_cut_rows_are_the_windows_of_the_shorter_length(blended: DataConfig) -> None:
    """Second truth: a source opened with the shorter length, in file order."""
    for length, pieces in ((12, 3), (8, 4), (8, 8)):
        whole = source(blended, length, split="validation")
        short = source(blended, length // pieces, split="validation")
        count = min(s.num_windows for s in whole._sources.values())
        cut = whole.take(whole.state_at_start(), count)[0].cut(length // pieces)
        # All pieces of a long row come from one source.
        for mine, origin in enumerate(cut.origins_B3[::pieces]):
            number, epoch, window = origin.tolist()
            reader = short._sources[short._keys[number]]
            for piece in range(pieces):
                tokens_T, documents_T, _ = reader.read(epoch, window * pieces + piece)
                row = mine * pieces + piece
                assert np.array_equal(cut.tokens_BS[row], tokens_T[:-1])
                assert np.array_equal(cut.labels_BS[row], tokens_T[1:])
                assert np.array_equal(cut.document_ids_BS[row], documents_T[:-1])
                same = documents_T[1:] == documents_T[:-1]
                assert np.array_equal(cut.loss_mask_BS[row], same)


def test_orders_differ_by_epoch_and_seed_but_not_by_place(blended: DataConfig) -> None:
    reader = source(blended)
    batch, _ = reader.take(reader.state_at_start(), 30)
    other = source(blended, seed=2)
    assert not np.array_equal(other.take(other.state_at_start(), 30)[0].tokens_BS, batch.tokens_BS)
    folders = reader.folders
    moved = [folder.rename(folder.with_name(f"moved_{folder.name}")) for folder in folders]
    a, b, c = moved
    elsewhere = source(config(a / "tokenizer", {a: 0.7, b: 0.3}, {b: 1, c: 2}, starts=(0, 250)))
    assert elsewhere.fingerprint == reader.fingerprint
    assert_same(elsewhere.take(elsewhere.state_at_start(), 30)[0], batch)


def test_the_order_is_the_same_for_ever(tmp_path: Path, write_folder, small_blocks: None) -> None:
    """Frozen values: a run resumed under a newer version must see the old order."""
    folder = write_folder(tmp_path / "x", unique_documents([5, 9, 2, 31, 8, 1, 17, 4]))
    reader = source(config(folder / "tokenizer", {folder: 1}))
    batch, _ = reader.take(reader.state_at_start(), 18)
    digest = hashlib.sha256(batch.tokens_BS.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "978c34246db741eb"


def test_a_changed_shard_changes_the_fingerprint_and_refuses_the_old_state(
    tmp_path: Path, write_folder
) -> None:
    documents = unique_documents([20, 30])
    folder = write_folder(tmp_path / "x", documents)
    data = config(folder / "tokenizer", {folder: 1})
    before = source(data)
    _, state = before.take(before.state_at_start(), 2)
    shutil.rmtree(folder)
    write_folder(folder, documents[::-1])
    after = source(data)
    assert after.fingerprint != before.fingerprint
    with pytest.raises(ConfigError, match=r"data\.phases: the checkpoint was made with other data"):
        after.take(state, 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES = {
    "folder": (lambda f: shutil.rmtree(f), r"data/x: no such folder"),
    "manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: missing"),
    "manifest cut": (lambda f: os.truncate(f / "manifest.json", 99), r"manifest\.json: not JSON"),
    "manifest no object": (
        lambda f: (f / "manifest.json").write_text("[]"),
        r"manifest\.json: format_version=None",
    ),
    "manifest version": (
        lambda f: edit(f / "manifest.json", '"format_version": 1', '"format_version": 9'),
        r"manifest\.json: format_version=9",
    ),
    "manifest leads outside": (
        lambda f: edit(f / "manifest.json", '"train_00000"', '"../train_00000"'),
        r"manifest\.json: damaged .*no plain file name",
    ),
    "manifest totals": (
        lambda f: edit(f / "manifest.json", '"max_token_id"', '"other"'),
        r"manifest\.json: damaged .*max_token_id",
    ),
    "shard": (lambda f: (f / "train_00000.bin").unlink(), r"train_00000\.bin: .*missing"),
    "bin cut": (lambda f: os.truncate(f / "train_00000.bin", 9), r"train_00000\.bin: .*truncated"),
    "idx cut": (lambda f: os.truncate(f / "train_00000.idx", 40), r"train_00000\.idx: .*truncated"),
    "flipped bit": (lambda f: flip(f / "train_00000.bin"), r"train_00000\.bin: its checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data_is_refused_before_any_training(
    tmp_path: Path, write_folder, tokenizer_folder: Path, damage: str
) -> None:
    folder = write_folder(tmp_path / "data" / "x", unique_documents([20, 30]))
    data = config(tokenizer_folder, {folder: 1})
    source(data)
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(ConfigError, match=message):
        source(data)


def test_wrong_knobs_are_named(tmp_path: Path, write_folder, tokenizer_folder: Path) -> None:
    folder = write_folder(tmp_path / "x", unique_documents([20, 30]))
    copy = shutil.copytree(folder, tmp_path / "copy")
    token = tokenizer_folder

    def refused(data: DataConfig, message: str, length: int = 8, **more) -> None:
        with pytest.raises(ConfigError, match=message):
            source(data, length, **more)

    good = config(token, {folder: 1})
    refused(good, r"train\.sequence_length=50: .*only 50 tokens", 50)
    refused(good, r"model\.vocab_size=59999: the tokenizer of .* has 60000", vocab_size=59_999)
    refused(good, r"has no validation split", split="validation")
    refused(config(token, {folder: 0}), r"data\.phases\[0\]\.blend\[0\]\.weight=0")
    refused(config(token, {folder: 1, copy: 1}), r"blend\[1\]\.path=.*copy: holds the same data")
    refused(config(token, {}), r"data\.phases: empty")
    refused(DataConfig(tokenizer=str(token)), r"data\.phases: empty")
    refused(DataConfig(tokenizer=str(token)), r"data\.validation: empty", split="validation")
    both = {folder: 1.0}
    refused(config(token, both, starts=(5,)), r"data\.phases\[0\]\.from_tokens=5")
    refused(config(token, both, both, starts=(0, 0)), r"data\.phases\[1\]\.from_tokens=0")
    refused(config(token, both, {}, starts=(0, 9)), r"data\.phases\[1\]\.blend: empty")
    refused(config(tmp_path, both), r"data\.tokenizer=.*: holds no tokenizer\.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(config(tmp_path, both), r"data\.tokenizer=.*another tokenizer")


def test_a_shard_with_ids_above_the_vocabulary_is_named(
    tmp_path: Path, write_folder, tokenizer_folder: Path
) -> None:
    """The manifest's tokenizer fits and its shard does not, as if shards were mixed up."""
    folder = write_folder(tmp_path / "x", unique_documents([20, 30]))
    edit(folder / "manifest.json", '"vocab_size": 60000', '"vocab_size": 40')
    with pytest.raises(ConfigError, match=r"train_00000\.bin: holds token id 49"):
        source(config(tokenizer_folder, {folder: 1}), vocab_size=45)


def test_more_shards_than_may_be_open(
    tmp_path: Path, write_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of one document, with two shards open at a time, give the same batches as one
    shard."""
    monkeypatch.setattr(windows, "_OPEN_SHARDS", 2)
    documents = unique_documents([9, 4, 30, 11, 6])
    many = write_folder(tmp_path / "many", documents, documents, shard_tokens=1)
    one = write_folder(tmp_path / "one", documents, documents)
    batches = []
    for folder in (many, one):
        reader = source(config(folder / "tokenizer", {folder: 1}), split="validation")
        batches.append(reader.take(reader.state_at_start(), 20)[0])
    assert_same(*batches)


def test_documents_lie_in_another_order_in_each_epoch(tmp_path: Path, write_folder) -> None:
    """All in one block of documents, read in the order of the windows: another order of the windows
    alone would always put the same documents side by side."""
    folder = write_folder(tmp_path / "x", unique_documents([4] * 50))
    orders = set()
    for seed in (0, 1):
        data = source(config(folder / "tokenizer", {folder: 1}), 4, seed=seed)
        count = data.num_samples
        batch, _ = data.take(data.state_at_start(), 3 * count)
        for epoch in range(3):
            mine = rows(batch, epoch * count, (epoch + 1) * count)
            place = np.argsort(mine.origins_B3[:, 2])
            orders.add(tuple(mine.tokens_BS[place].ravel().tolist()))
    assert len(orders) == 6
