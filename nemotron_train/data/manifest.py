"""`manifest.json`: the description of a folder of prepared data. Reading it checks every field.

A folder of prepared data contains

    manifest.json                 written last; a folder without it is not prepared data
    tokenizer/tokenizer.json      the tokenizer of its ids
    train_00000.bin/.idx …        the shards (indexed.py)
    validation_00000.bin/.idx …   whole documents held out for validation

A folder of conversations (`data chat`) also contains, for each document of a split, a document of
the same length in the split's mask (train_mask_00000.bin/.idx …): 1 for each token that is trained.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.data.indexed import ShardEntry
from nemotron_train.platform.files import flush_to_disk, write_atomically

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
SPLITS = ("train", "validation")
MASK_OF = {"train": "train_mask", "validation": "validation_mask"}
ALL_SPLITS = (*SPLITS, *MASK_OF.values())


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer of the token ids. `vocab_size` is its largest id plus one."""

    sha256: str  # of tokenizer/tokenizer.json
    vocab_size: int
    end_of_document_id: int


@dataclass(frozen=True)
class SplitEntry:
    """The shards of `train`, of `validation` or of a mask, in order, and their totals.

    `unigram_entropy` (nats per token) is the loss of a model that knows only the frequency of each
    token in this split. A language model must do better.
    """

    shards: tuple[ShardEntry, ...]
    documents: int
    tokens: int
    unigram_entropy: float


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    source: Mapping[str, Any]  # origin of the data; displayed, and compared when rebuilding
    dtype: str
    tokenizer: TokenizerEntry
    splits: Mapping[str, SplitEntry]
    fingerprint: str
    format_version: int = FORMAT_VERSION


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy, in nats, of the distribution given by these counts (int64 [vocab_size])."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def split_fingerprint(split: SplitEntry) -> str:
    """SHA-256 over the hashes of the shards of a split, in order."""
    hashes = [(shard.bin_sha256, shard.idx_sha256) for shard in split.shards]
    return hashlib.sha256(json_text(hashes).encode()).hexdigest()


def data_fingerprint(splits: Mapping[str, SplitEntry]) -> str:
    """SHA-256 over all shard hashes of a folder, by split."""
    parts = [(name, split_fingerprint(splits[name])) for name in ALL_SPLITS if name in splits]
    return hashlib.sha256(json_text(parts).encode()).hexdigest()


def build_manifest(
    source: Mapping[str, Any],
    dtype: np.dtype,
    tokenizer: TokenizerEntry,
    shards: Mapping[str, list[ShardEntry]],
    counts: Mapping[str, np.ndarray],
) -> Manifest:
    """The manifest of finished shards. `counts[split]`: count of each token id, int64 [vocab_size].

    A split without shards is left out.
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
    """Write `manifest.json` atomically. Call it when all files that it names are durable."""
    write_json(folder / FILE_NAME, asdict(manifest))


def write_json(path: Path, content: Any) -> None:
    """Write or replace a JSON file atomically and durably."""
    write_atomically(path, json_text(content, indent=2) + "\n")
    flush_to_disk(path.parent)


def load_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`. Raises ConfigError, naming the file, if it is missing or
    invalid.

    The shards are not opened: ShardReader does that.
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
    """A Manifest from untrusted JSON. Raises KeyError, TypeError or ValueError if it is invalid."""
    splits = {}
    for name, split in raw["splits"].items():
        if name not in ALL_SPLITS:
            raise ValueError(f"unknown split {name!r}")
        shards = tuple(_typed(ShardEntry, shard) for shard in split["shards"])
        for shard in shards:
            # The name is joined to the folder path, so it must not point outside the folder.
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
    """A flat dataclass of str and int fields from JSON. Raises KeyError or TypeError if a field
    without a default is missing, or if one has the wrong type."""
    values = {}
    for field in fields(kind):
        if field.name not in raw and field.default is not MISSING:
            continue
        value = values[field.name] = raw[field.name]
        if type(value) is not field.type or (field.type is int and value < 0):
            raise TypeError(f"{field.name}={value!r}")
    return kind(**values)
