"""`manifest.json`: what a folder of prepared data says about itself, read with suspicion.

A folder of prepared data is

    manifest.json                 written last; a folder without it is no data
    tokenizer/tokenizer.json      the tokenizer its ids belong to
    train_00000.bin/.idx …        the shards (indexed.py)
    validation_00000.bin/.idx …   held out, by document
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.indexed import ShardEntry
from nemotron_train.platform.files import flush_to_disk

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer the ids belong to; `vocab_size` is its largest id plus one."""

    sha256: str  # of tokenizer/tokenizer.json
    vocab_size: int
    end_of_document_id: int


@dataclass(frozen=True)
class SplitEntry:
    """The shards of `train` or of `validation`, in order, and their totals.

    `unigram_entropy` (nats a token) is the loss of a model that knows only how often each token
    of this split occurs: what a language model must beat.
    """

    shards: tuple[ShardEntry, ...]
    documents: int
    tokens: int
    unigram_entropy: float


@dataclass(frozen=True)
class Manifest:
    source: Mapping[str, Any]  # where the data came from; shown, and compared when rebuilding
    dtype: str
    tokenizer: TokenizerEntry
    splits: Mapping[str, SplitEntry]
    fingerprint: str
    format_version: int = FORMAT_VERSION


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution these counts (int64 [vocab_size]) stand for."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def split_fingerprint(split: SplitEntry) -> str:
    """SHA-256 over the hashes of a split's shards, in order."""
    hashes = [(shard.bin_sha256, shard.idx_sha256) for shard in split.shards]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def data_fingerprint(splits: Mapping[str, SplitEntry]) -> str:
    """SHA-256 over all shard hashes of a folder."""
    parts = [(name, split_fingerprint(splits[name])) for name in SPLITS if name in splits]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build_manifest(
    source: Mapping[str, Any],
    dtype: np.dtype,
    tokenizer: TokenizerEntry,
    shards: Mapping[str, list[ShardEntry]],
    counts: Mapping[str, np.ndarray],
) -> Manifest:
    """A manifest of finished shards; `counts[split]` is how often each id occurs in a split.

    A split without a shard is left out.
    """
    splits = {
        name: SplitEntry(
            shards=tuple(entries),
            documents=sum(shard.documents for shard in entries),
            tokens=sum(shard.tokens for shard in entries),
            unigram_entropy=unigram_entropy(counts[name]),
        )
        for name, entries in shards.items()
        if entries
    }
    return Manifest(dict(source), dtype.name, tokenizer, splits, data_fingerprint(splits))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically; call it when everything it names is durable."""
    write_json(folder / FILE_NAME, asdict(manifest))


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file atomically and durably."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    flush_to_disk(path.parent)


def load_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`; ConfigError names the file and what is wrong with it.

    The shards themselves are not opened: that is ShardReader's part.
    """
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; make it with `nemotron-train data prepare`")
    if not path.is_file():
        raise ConfigError(
            f"{path}: missing, so {folder} is no prepared data; make it with "
            "`nemotron-train data prepare`"
        )
    try:
        raw = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); prepare the data again") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format_version={version!r}; this version of the program reads "
            f"{FORMAT_VERSION}; prepare the data again"
        )
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: damaged ({error}); prepare the data again") from None


def _parse(raw: dict[str, Any]) -> Manifest:
    """A Manifest from untrusted JSON; KeyError, TypeError or ValueError if it is none."""
    splits = {}
    for name, split in raw["splits"].items():
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}")
        shards = tuple(_typed(ShardEntry, shard) for shard in split["shards"])
        for shard in shards:
            # The name is joined to the folder: it must not lead out of it.
            if not shard.name or Path(shard.name).name != shard.name:
                raise ValueError(f"shard name {shard.name!r} is no plain file name")
        entropy = split["unigram_entropy"]
        if not isinstance(entropy, float):
            raise TypeError(f"unigram_entropy is {entropy!r}")
        splits[name] = SplitEntry(
            shards,
            sum(shard.documents for shard in shards),
            sum(shard.tokens for shard in shards),
            entropy,
        )
        for total in ("documents", "tokens"):
            if split[total] != getattr(splits[name], total):
                raise ValueError(f"{name}.{total}={split[total]} is not the sum of its shards'")
    fingerprint = data_fingerprint(splits)
    if raw["fingerprint"] != fingerprint:
        raise ValueError("fingerprint does not belong to the shard hashes")
    if not isinstance(raw["source"], dict):
        raise TypeError("source is no object")
    return Manifest(
        source=raw["source"],
        dtype=np.dtype(raw["dtype"]).name,
        tokenizer=_typed(TokenizerEntry, raw["tokenizer"]),
        splits=splits,
        fingerprint=fingerprint,
    )


def _typed(kind: type, raw: dict[str, Any]) -> Any:
    """A flat dataclass of str and int fields from JSON, each field's type checked."""
    for field in fields(kind):
        value = raw[field.name]
        if type(value) is not field.type or (field.type is int and value < 0):
            raise TypeError(f"{field.name}={value!r}")
    return kind(**{field.name: raw[field.name] for field in fields(kind)})
