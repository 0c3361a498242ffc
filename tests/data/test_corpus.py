"""The embedded default corpus: built once, never half, never over another folder."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nemotron_train.cli.data import inspect
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import BlendSource, DataConfig, DataKind, DataPhase
from nemotron_train.data import corpus
from nemotron_train.data.batches import BatchSource
from nemotron_train.data.corpus import build_embedded, read_corpus, split_of
from nemotron_train.data.indexed import ShardReader
from nemotron_train.data.manifest import load_manifest
from nemotron_train.data.tokenize import load_tokenizer

BUILD = (
    "import sys; from nemotron_train.data.corpus import build_embedded; "
    "build_embedded(sys.argv[1], 4096)"
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole corpus, built by three processes at once."""
    folder = tmp_path_factory.mktemp("embedded") / "python_stdlib"
    command = [sys.executable, "-c", BUILD, str(folder)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum("building the embedded corpus" in output for output in outputs) == 1
    return folder


def test_the_real_corpus_is_enough_to_train_on(real: Path) -> None:
    """Second truth: the library's files. Counts depend on the Python version, so the test uses
    bounds."""
    texts = read_corpus()
    manifest, loaded = load_manifest(real), load_tokenizer(real / "tokenizer")
    assert inspect(real) is None
    assert manifest.dtype == "uint16" and manifest.tokenizer.vocab_size == 4096
    for name, split in manifest.splits.items():
        names = [key for key in texts if split_of(key) == name]
        shard = ShardReader(real, split.shards[0].name)
        assert split.documents == len(names)
        for i in (0, len(names) - 1):
            assert loaded.decode(shard.document(i)) == texts[names[i]] + "<|endoftext|>"
        counts = np.bincount(shard.tokens(0, shard.num_tokens))
        share = counts[counts > 0] / counts.sum()
        assert split.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())
    assert manifest.splits["train"].tokens > 1_000_000
    assert manifest.splits["validation"].tokens > 50_000
    assert not any(Path(key).name.startswith("_sysconfigdata") for key in texts)


def test_the_real_corpus_feeds_batches(real: Path) -> None:
    blend = [BlendSource(str(real))]
    config = DataConfig(
        kind=DataKind.embedded,
        tokenizer=str(real / "tokenizer"),
        phases=[DataPhase(0, blend)],
        validation=blend,
        embedded_folder=str(real),
    )
    for split in ("train", "validation"):
        source = BatchSource(config, sequence_length=256, seed=1, split=split, vocab_size=4096)
        batch, _ = source.take(source.state_at_start(), 64)
        assert batch.tokens_BS.shape == (64, 256)
        ends = batch.tokens_BS == load_manifest(real).tokenizer.end_of_document_id
        assert np.array_equal(batch.loss_mask_BS == 0, ends)
        with pytest.raises(ConfigError, match=r"model\.vocab_size=1024"):
            BatchSource(config, sequence_length=256, seed=1, split=split, vocab_size=1024)


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    texts = {name: text[:2000] for name, text in list(read_corpus().items())[:120]}
    monkeypatch.setattr(corpus, "read_corpus", lambda: texts)
    return texts


def test_reused_if_it_fits_and_rebuilt_if_not(tmp_path: Path, small_corpus: dict[str, str]) -> None:
    folder, said = tmp_path / "data", []
    first = build_embedded(folder, 400, said.append)
    before = (folder / "manifest.json").stat()
    assert build_embedded(folder, 400, said.append) == first
    assert (folder / "manifest.json").stat().st_ino == before.st_ino
    other = build_embedded(folder, 500, said.append)
    assert other.tokenizer.vocab_size == 500
    name = next(iter(small_corpus))
    small_corpus[name] += "x = 1\n"
    changed = build_embedded(folder, 500, said.append)
    assert changed.fingerprint != other.fingerprint
    small_corpus[name] = small_corpus[name].removesuffix("x = 1\n")
    assert build_embedded(folder, 400, said.append) == first  # deterministic
    assert sum("building" in line for line in said) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_what_a_killed_build_left_is_not_used(
    tmp_path: Path, small_corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_manifest", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_embedded(folder, 400, lambda line: None)
    assert not folder.exists() and (tmp_path / "data.partial").exists()
    build_embedded(folder, 400, lambda line: None)
    assert inspect(folder) is None and not (tmp_path / "data.partial").exists()


def test_callers_at_once_share_one_build(tmp_path: Path, small_corpus: dict[str, str]) -> None:
    said: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        builds = [pool.submit(build_embedded, tmp_path / "x", 400, said.append) for _ in range(4)]
        manifests = [build.result() for build in builds]
    assert all(manifest == manifests[0] for manifest in manifests)
    assert sum("building" in line for line in said) == 1


def test_another_folder_is_never_overwritten(
    tmp_path: Path, small_corpus: dict[str, str], write_folder
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    prepared = write_folder(tmp_path / "prepared", [[1, 2, 3]])
    for folder, reason in ((mine, r"holds no manifest\.json"), (prepared, "other prepared data")):
        with pytest.raises(ConfigError, match=rf"data\.embedded_folder=.*{reason}"):
            build_embedded(folder, 400, lambda line: None)
    assert (mine / "thesis.txt").exists() and (prepared / "manifest.json").exists()


def test_a_python_without_sources_is_refused(tmp_path: Path, small_corpus: dict[str, str]) -> None:
    for name in list(small_corpus)[:40]:
        del small_corpus[name]
    with pytest.raises(ConfigError, match=r"data\.kind=embedded: .*only 80"):
        build_embedded(tmp_path / "x", 400)
