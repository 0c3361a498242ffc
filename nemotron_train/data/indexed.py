"""Megatron `.bin/.idx` shards: a writer that can continue after a kill, a reader with checks.

Owns: reading and writing of shards. Does not own: the manifest of a folder of shards (manifest.py).

The format is that of Megatron-Core (`megatron/core/datasets/indexed_dataset.py`). `NAME.bin` holds
the token ids, concatenated. `NAME.idx` holds, little-endian: the magic `MMIDIDX\\0\\0`, u64 version
1, u8 dtype code, u64 number of sequences n, u64 n + 1, then int32 [n] lengths in tokens, int64 [n]
byte offsets into `.bin`, int64 [n + 1] document boundaries counted in sequences. Here a sequence is
a document, so the boundaries are 0..n.
"""

import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.watched import Stamp, WatchedFile, file_mark
from nemotron_train.platform.files import file_sha256, flush_to_disk, replacing

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
_INT32, _INT64 = np.dtype("<i4"), np.dtype("<i8")
_COUNT_CHUNK = 1 << 22  # tokens read at a time when counting, so that memory use stays small
_VERIFY_CHUNK = 1 << 18  # index entries read at a time when verifying


@dataclass(frozen=True)
class ShardEntry:
    """The manifest entry of a finished shard."""

    name: str  # file name without .bin/.idx
    documents: int
    tokens: int
    max_token_id: int
    bin_sha256: str
    idx_sha256: str
    bin_mark: str = ""  # `file_mark`; "" in manifests of older versions
    idx_mark: str = ""


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron's own writer uses: uint16 below 65500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class ShardWriter:
    """Appends documents to one shard. Only `finish` creates the files with their final names.

    Until then a shard is `NAME.bin.partial` (token ids) and `NAME.lengths.partial` (int32, one per
    document). After `sync`, both survive a kill. A new writer with `documents=<number at that
    sync>` drops everything written later and continues.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, *, documents: int = 0) -> None:
        self.name = name
        self.dtype = dtype
        self.documents = documents
        self.tokens = 0
        self._folder = folder
        self._bin_path = folder / f"{name}.bin"
        self._idx_path = folder / f"{name}.idx"
        self._bin_partial = folder / f"{name}.bin.partial"
        self.lengths_path = folder / f"{name}.lengths.partial"
        self._idx_path.unlink(missing_ok=True)
        if documents:
            if not self._bin_partial.exists():  # killed between finish() and the journal commit
                os.replace(self._bin_path, self._bin_partial)
            lengths = np.fromfile(self.lengths_path, dtype="<i4", count=documents)
            self.tokens = int(lengths.sum(dtype=np.int64))
            is_short = self._bin_partial.stat().st_size < self.tokens * dtype.itemsize
            if len(lengths) < documents or is_short:
                raise ConfigError(
                    f"{self._bin_partial}: is shorter than when it was last saved; delete {folder} "
                    "and prepare again"
                )
            os.truncate(self.lengths_path, documents * 4)
            os.truncate(self._bin_partial, self.tokens * dtype.itemsize)
        else:
            self._bin_path.unlink(missing_ok=True)
        mode = "ab" if documents else "wb"
        self._bin = self._bin_partial.open(mode, buffering=1 << 20)
        self._lengths = self.lengths_path.open(mode)

    def add(self, tokens: np.ndarray) -> None:
        """Append one document: integer [tokens], not empty. Every id must fit the dtype."""
        assert tokens.size, "a document has at least its end-of-document token"
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.write(struct.pack("<i", tokens.size))
        self.documents += 1
        self.tokens += tokens.size

    def sync(self) -> None:
        """Make everything added so far durable."""
        for stream in (self._bin, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())

    def abandon(self) -> None:
        """Close the files without finishing the shard."""
        for stream in (self._bin, self._lengths):
            with suppress(OSError):  # what it holds is not needed; the disk may be full
                stream.close()

    def finish(self, vocab_size: int) -> tuple[ShardEntry, np.ndarray]:
        """Write the index, give both files their final names, and read the tokens back once.

        Returns the entry and the count of each token id: int64 [vocab_size]. The lengths file
        stays, so that the shard can be reopened from a journal written before `finish`. Delete
        `lengths_path` after the next journal commit.
        """
        self.sync()
        self.abandon()  # nothing is left in the buffers
        lengths = np.fromfile(self.lengths_path, dtype="<i4")
        os.replace(self._bin_partial, self._bin_path)
        write_index(self._idx_path, lengths, self.dtype)
        counts = count_tokens(self._bin_path, self.dtype, vocab_size)
        entry = ShardEntry(
            name=self.name,
            documents=self.documents,
            tokens=self.tokens,
            max_token_id=int(np.flatnonzero(counts)[-1]),
            bin_sha256=file_sha256(self._bin_path),
            idx_sha256=file_sha256(self._idx_path),
            bin_mark=file_mark(self._bin_path),
            idx_mark=file_mark(self._idx_path),
        )
        return entry, counts


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the `.idx` of documents with these lengths (int32 [documents]) atomically."""
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    header = _HEADER.pack(_MAGIC, 1, _CODE_OF_DTYPE[dtype], len(lengths), len(lengths) + 1)
    with replacing(path, durable=True) as temporary, temporary.open("wb") as stream:
        stream.write(header)
        stream.write(lengths.astype("<i4").tobytes())
        stream.write((ends - lengths.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    flush_to_disk(path.parent)


def count_tokens(path: Path, dtype: np.dtype, vocab_size: int) -> np.ndarray:
    """The count of each token id in a `.bin` file: int64 [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    with path.open("rb") as stream:
        while (chunk := np.fromfile(stream, dtype=dtype, count=_COUNT_CHUNK)).size:
            counts += np.bincount(chunk, minlength=vocab_size)
    return counts


class ShardReader:
    """An open shard: `documents` and `num_tokens`, and its token ids, read by position.

    With the manifest's `entry`, the marks of both files are compared with it, and
    `check_unchanged` can be called.

    Raises ConfigError, naming the file, if a file is missing or not a shard, or if the sizes of
    `.bin` and `.idx` do not match. These checks need a few reads for any shard size; `verify` reads
    the whole index.
    """

    def __init__(self, folder: Path, name: str, entry: ShardEntry | None = None) -> None:
        self.bin_path = folder / f"{name}.bin"
        self.idx_path = folder / f"{name}.idx"
        self._entry = entry
        self._bin, self._idx = WatchedFile(self.bin_path), WatchedFile(self.idx_path)
        self.dtype, self.documents = self._read_header()
        self._offsets_at = _HEADER.size + 4 * self.documents
        self._boundaries_at = self._offsets_at + 8 * self.documents
        self.num_tokens = self.offset(self.documents)
        expected = self.num_tokens * self.dtype.itemsize
        actual = self._bin.size
        if actual != expected:
            raise ConfigError(
                f"{self.bin_path}: holds {actual:,} bytes where its index promises {expected:,}: "
                "truncated or not this index's file; prepare the data again"
            )
        if self._numbers(self._boundaries_at, self.documents, 1)[0] != self.documents:
            raise ConfigError(f"{self.idx_path}: its last document ends outside the index")
        if not expected:
            raise ConfigError(f"{self.bin_path}: holds no token")
        if entry is not None:
            self._bin.check_mark(entry.bin_mark)
            self._idx.check_mark(entry.idx_mark)

    def _read_header(self) -> tuple[np.dtype, int]:
        """(dtype, number of documents). Raises ConfigError if the header is invalid or does not
        match the size of the index file."""
        path, actual = self.idx_path, self._idx.size
        if actual < _HEADER.size:
            raise ConfigError(f"{path}: truncated: {actual} bytes are less than a header")
        header = self._idx.read(0, _HEADER.size)
        magic, version, code, sequences, boundaries = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise ConfigError(f"{path}: not a Megatron index: it does not begin with MMIDIDX")
        if version != 1:
            raise ConfigError(f"{path}: index version {version}; only version 1 is known")
        if code not in _DTYPE_OF_CODE:
            raise ConfigError(f"{path}: dtype code {code}; token ids are uint16 (8) or int32 (4)")
        if boundaries != sequences + 1 or sequences == 0:
            raise ConfigError(
                f"{path}: {sequences} sequences with {boundaries} document boundaries; a shard "
                "has at least one document and each is one sequence"
            )
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if actual != expected:
            raise ConfigError(
                f"{path}: holds {actual:,} bytes where {sequences:,} documents need {expected:,}: "
                "truncated or damaged; prepare the data again"
            )
        return _DTYPE_OF_CODE[code], sequences

    def _numbers(self, at: int, first: int, count: int) -> np.ndarray:
        """int64 [count] of the index array at byte `at`, from its entry `first`."""
        return self._idx.array(at + 8 * first, _INT64, count)

    def lengths(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Tokens of each document from `first`: int32 [count]; all of them by default."""
        count = self.documents - first if count is None else count
        return self._idx.array(_HEADER.size + 4 * first, _INT32, count)

    def offset(self, document: int) -> int:
        """Where a document begins, in tokens. `offset(documents)` is the length of the shard."""
        if document == self.documents:
            return self.offset(document - 1) + int(self.lengths(document - 1, 1)[0])
        return int(self._numbers(self._offsets_at, document, 1)[0]) // self.dtype.itemsize

    def layout(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each of `count` documents from `first` begins in the shard, and its length, in
        tokens: int64 [count], int32 [count].

        Raises ConfigError, naming the first wrong entry, unless these documents follow each other
        without gaps and lie within the shard.
        """
        lengths = self.lengths(first, count)
        offsets = self._numbers(self._offsets_at, first, count)
        begin = int(offsets[0]) if first else 0
        ends = begin + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        wrong = (offsets != ends - lengths.astype(np.int64) * self.dtype.itemsize) | (lengths < 0)
        wrong |= self._numbers(self._boundaries_at, first, count) != np.arange(first, first + count)
        wrong |= (offsets < 0) | (offsets % self.dtype.itemsize != 0) | (ends > self._bin.size)
        if wrong.any():
            raise ConfigError(
                f"{self.idx_path}: entry {first + int(np.argmax(wrong))} is inconsistent; damaged; "
                "prepare the data again"
            )
        return offsets // self.dtype.itemsize, lengths

    def tokens(self, begin: int, count: int) -> np.ndarray:
        """`count` token ids from token `begin` of the shard: [count]."""
        return self._bin.array(begin * self.dtype.itemsize, self.dtype, count)

    def document(self, index: int, limit: int | None = None) -> np.ndarray:
        """The token ids of one document, at most the first `limit`: [tokens]."""
        length = int(self.lengths(index, 1)[0])
        return self.tokens(self.offset(index), length if limit is None else min(limit, length))

    def token_range(self) -> tuple[int, int]:
        """The smallest and the largest token id. Reads the whole shard."""
        smallest, largest = [], []
        for begin in range(0, self.num_tokens, _COUNT_CHUNK):
            piece = self.tokens(begin, min(_COUNT_CHUNK, self.num_tokens - begin))
            smallest.append(int(piece.min()))
            largest.append(int(piece.max()))
        return min(smallest), max(largest)

    def verify(self) -> None:
        """Check every entry of the index. Raises ConfigError, naming the first wrong entry."""
        end = 0
        for first in range(0, self.documents, _VERIFY_CHUNK):
            begins, lengths = self.layout(first, min(_VERIFY_CHUNK, self.documents - first))
            if begins[0] != end:
                raise ConfigError(f"{self.idx_path}: entry {first} is inconsistent; damaged")
            end = int(begins[-1]) + int(lengths[-1])

    @property
    def stamps(self) -> tuple[Stamp, Stamp]:
        """The stamps of `.bin` and `.idx` when they were opened."""
        return self._bin.stamp, self._idx.stamp

    def check_unchanged(self) -> None:
        """Raises ConfigError, naming the file, if one was removed, replaced or written to since it
        was opened. Costs two `stat` calls."""
        assert self._entry is not None
        self._bin.check_unchanged(self._entry.bin_sha256)
        self._idx.check_unchanged(self._entry.idx_sha256)

    def check_content(self) -> None:
        """Raises ConfigError, naming the file, if one has not the manifest's SHA-256. Reads both
        files."""
        assert self._entry is not None
        self._bin.check_content(self._entry.bin_sha256)
        self._idx.check_content(self._entry.idx_sha256)
