"""Prepared folders made by hand, for tests that know every token in them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from nemotron_train.data.indexed import token_dtype
from nemotron_train.data.manifest import TokenizerEntry, build_manifest, write_manifest
from nemotron_train.data.rolling import SplitWriter, remove_working_files
from nemotron_train.data.tokenize import train_tokenizer

Documents = Sequence[Sequence[int]]
WriteFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of at most 300 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["def f(x):\n    return x + 1\n", "a b c a b c"], 300, folder)
    return folder


@pytest.fixture(scope="session")
def write_folder(tokenizer_folder: Path) -> WriteFolder:
    """write_folder(folder, train, validation=(), vocab_size=, shard_tokens=) writes prepared data
    of these token lists. The folder's tokenizer is only compared, never used to encode."""
    loaded_file = (tokenizer_folder / "tokenizer.json").read_bytes()

    def write(
        folder: Path,
        train: Documents,
        validation: Documents = (),
        *,
        vocab_size: int = 60_000,
        shard_tokens: int = 10**9,
    ) -> Path:
        import hashlib

        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "tokenizer.json").write_bytes(loaded_file)
        writers = {
            split: SplitWriter(
                folder,
                split,
                token_dtype(vocab_size),
                vocab_size=vocab_size,
                shard_tokens=shard_tokens,
            )
            for split in ("train", "validation")
        }
        for split, documents in (("train", train), ("validation", validation)):
            for document in documents:
                writers[split].add(np.array(document))
        counts = {split: writer.close() for split, writer in writers.items()}
        entry = TokenizerEntry(hashlib.sha256(loaded_file).hexdigest(), vocab_size, 0)
        shards = {split: writer.finished for split, writer in writers.items()}
        manifest = build_manifest({"kind": "test"}, token_dtype(vocab_size), entry, shards, counts)
        write_manifest(folder, manifest)
        remove_working_files(folder)
        return folder

    return write
