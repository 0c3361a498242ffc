"""The embedded default corpus: the source code of the Python standard library, as prepared data.

Nothing is downloaded: the text is part of every Python installation. It depends on the Python
version, so the corpus is rebuilt if its fingerprint no longer matches.
"""

import hashlib
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.indexed import token_dtype
from nemotron_train.data.manifest import (
    FILE_NAME,
    SPLITS,
    Manifest,
    TokenizerEntry,
    build_manifest,
    load_manifest,
    write_manifest,
)
from nemotron_train.data.rolling import SplitWriter, remove_working_files
from nemotron_train.data.tokenize import END_OF_DOCUMENT, end_of_document_id, train_tokenizer
from nemotron_train.platform.files import flush_to_disk, writing
from nemotron_train.platform.lock import exclusive

_KIND = "python_stdlib"
_RECIPE = 2  # increase it if the choice of files, the split or the tokenizer training changes
_VALIDATION_SHARE = 0.08  # of the files
_FEWEST_FILES = 100  # a stripped or zipped library has fewer, too few for a corpus
_SHARD_TOKENS = 1 << 30

Texts = dict[str, str]  # file name relative to the library folder → source code


def read_corpus(root: Path | None = None) -> Texts:
    """The source files of the library under `root`, sorted by relative name.

    Left out: files that are not UTF-8 or are empty, tests (not installed everywhere), `encodings`
    (tables of numbers), and files specific to this machine (build configuration, installed
    packages).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if all(map(_is_library_folder, name.parts[:-1])) and not name.name.startswith(
            "_sysconfigdata"
        ):
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text:
                texts[name.as_posix()] = text
    return texts


def _is_library_folder(name: str) -> bool:
    # Not a valid package name (site-packages, lib-dynload, config-3.12-…): not part of the library.
    is_test = name in ("test", "tests") or name.endswith("_test")
    return name.isidentifier() and name not in ("encodings", "__pycache__") and not is_test


def split_of(name: str) -> str:
    """The split of a file ("train" or "validation"), chosen by a hash of its relative name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    held_out = int.from_bytes(digest, "little") < _VALIDATION_SHARE * 2.0**64
    return "validation" if held_out else "train"


def corpus_fingerprint(texts: Texts) -> str:
    """SHA-256 over names and texts, in order."""
    digest = hashlib.sha256()
    for name, text in texts.items():
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def build_embedded(
    folder: str | Path, vocab_size: int, progress: Callable[[str], None] = print
) -> Manifest:
    """Make sure that `folder` holds the embedded corpus for this vocabulary. Returns its manifest.

    A folder with this corpus is reused; one with an older embedded corpus is replaced. `progress`
    gets lines of text while the corpus is built. Several processes may call this at once: one
    builds, the others wait. The folder appears only when complete.

    Raises ConfigError if the folder holds anything else (it is then not deleted), or if this Python
    has no source files.
    """
    folder = Path(folder)
    texts = read_corpus()
    if len(texts) < _FEWEST_FILES:
        raise ConfigError(
            f"data.kind=embedded: this Python has only {len(texts)} standard library source files "
            f"(in {sysconfig.get_paths()['stdlib']}); use data=prepared with a text of your own"
        )
    source = {
        "kind": _KIND,
        "recipe": _RECIPE,
        "requested_vocab_size": vocab_size,
        "corpus_fingerprint": corpus_fingerprint(texts),
    }
    with writing(folder, "data.embedded_folder"), exclusive(folder, wait=True):
        if folder.exists():
            manifest = _load_embedded_manifest(folder)
            if manifest.source == source:
                return manifest
        progress(f"building the embedded corpus in {folder} (once) from {len(texts)} files")
        work = folder.with_name(folder.name + ".partial")
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        manifest = _build(work, texts, vocab_size, source)
        _replace(work, folder)
    for name, split in manifest.splits.items():
        num_bytes = sum(len(text.encode()) for key, text in texts.items() if split_of(key) == name)
        progress(
            f"  {name}: {split.documents} documents, {split.tokens:,} tokens, "
            f"{num_bytes / split.tokens:.2f} bytes a token"
        )
    return manifest


def _load_embedded_manifest(folder: Path) -> Manifest:
    """The manifest of an embedded corpus. Raises ConfigError if the folder holds anything else."""
    if not (folder / FILE_NAME).is_file():
        raise ConfigError(
            f"data.embedded_folder={folder}: exists and holds no {FILE_NAME}; choose another folder"
        )
    manifest = load_manifest(folder)
    if manifest.source.get("kind") != _KIND:
        raise ConfigError(
            f"data.embedded_folder={folder}: holds other prepared data, which is not overwritten; "
            "choose another folder, or read it with data=prepared"
        )
    return manifest


def _build(work: Path, texts: Texts, vocab_size: int, source: dict[str, object]) -> Manifest:
    train = [text for name, text in texts.items() if split_of(name) == "train"]
    loaded = train_tokenizer(train, vocab_size, work / "tokenizer")
    end_id = end_of_document_id(loaded, END_OF_DOCUMENT, work / "tokenizer")
    dtype = token_dtype(loaded.vocab_size)
    writers = {
        split: SplitWriter(
            work, split, dtype, vocab_size=loaded.vocab_size, shard_tokens=_SHARD_TOKENS
        )
        for split in SPLITS
    }
    # Encode texts one by one: the threads of the batch call gain nothing on two cores.
    for name, text in texts.items():
        writers[split_of(name)].add(np.append(loaded.encode(text), end_id))
    counts = {split: writer.close() for split, writer in writers.items()}
    tokenizer = TokenizerEntry(loaded.sha256, loaded.vocab_size, end_id)
    shards = {split: writer.finished for split, writer in writers.items()}
    manifest = build_manifest(source, dtype, tokenizer, shards, counts)
    remove_working_files(work)
    write_manifest(work, manifest)
    return manifest


def _replace(work: Path, folder: Path) -> None:
    """Replace `folder` with `work`. A process with the old files open can still read them."""
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        if old.exists():
            shutil.rmtree(old)
        os.replace(folder, old)
        os.replace(work, folder)
        shutil.rmtree(old)
    else:
        os.replace(work, folder)
    flush_to_disk(folder.parent)
