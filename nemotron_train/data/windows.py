"""Training samples from one source: its documents, concatenated and cut into overlapping windows.

In every epoch the documents of a split are shuffled, concatenated, and cut into windows of
sequence_length + 1 tokens. Neighbouring windows share one token, as in Megatron's GPTDataset. The
windows are shuffled too. The last tokens of an epoch, which do not fill a window, are left out;
they differ from epoch to epoch.

Memory does not grow with the number of tokens or documents, except for a few bytes per block of
4096 neighbouring documents. Shuffling has two levels: the order of the blocks, and the order of the
documents within a block. So a window costs one search among the blocks and one within a block.

Array legend: S sequence length, T = S + 1.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.indexed import ShardReader
from nemotron_train.data.manifest import FILE_NAME, Manifest, load_manifest, split_fingerprint
from nemotron_train.data.permutation import key64, permute, shuffled
from nemotron_train.data.watched import Stamp

_DOCUMENTS_A_BLOCK = 4096
_OPEN_SHARDS = 128  # two file descriptors each; common limits allow 1024 per process
_CACHED_BLOCKS = 256  # 64 KiB each
_PAGE_BYTES = 4096
_VERIFIED_BYTES = 64 << 20  # splits up to this size are hashed when opened
_VERIFIED_DOCUMENTS = 50_000_000  # the index of splits up to this size is read when opened: 1 GB


class Window(NamedTuple):
    """The tokens of a sample: ids and document numbers from 0 within it, int64 [T]; whether each
    token is trained, bool [T]."""

    tokens_T: np.ndarray
    documents_T: np.ndarray
    trained_T: np.ndarray


class WindowedSource:
    """The windows of one split of one prepared folder.

    `key` identifies the data, not the path: a moved folder keeps its order, and changed data gets
    another key. `num_windows`: windows per epoch.

    Raises ConfigError, naming the file or knob, if the manifest or the split is missing, if a shard
    is missing, truncated or replaced, if a token id is outside `vocab_size`, or if the split has
    too few tokens for a window.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        sequence_length: int,
        seed: int,
        vocab_size: int,
        shuffle: bool,
    ) -> None:
        self.folder = folder
        self.manifest = load_manifest(folder)
        entry = self.manifest.splits.get(split)
        if entry is None:
            raise ConfigError(
                f"{folder / FILE_NAME}: has no {split} split; it has "
                f"{', '.join(self.manifest.splits) or 'none'}"
            )
        check_vocabulary(folder, self.manifest, split, vocab_size)
        self.key = split_fingerprint(entry)[:16]
        self.num_tokens = entry.tokens
        self.num_windows = (entry.tokens - 1) // sequence_length
        if self.num_windows < 1:
            raise ConfigError(
                f"train.sequence_length={sequence_length}: the {split} split of {folder} has only "
                f"{entry.tokens} tokens; a sample needs sequence_length + 1"
            )
        self._sequence_length, self._shuffle = sequence_length, shuffle
        self._vocab_size = vocab_size
        self._order_key = key64("order", seed, self.key)
        self._entries = entry.shards
        self._stamps: dict[int, tuple[Stamp, Stamp]] = {}  # of shards opened so far
        self._read_since_check: set[int] = set()
        # Caches per instance, freed with it; a cache on the module or class would outlive it.
        self._shard = lru_cache(_OPEN_SHARDS)(self._open_shard)
        self._epoch_layout = lru_cache(2)(self._lay_out_epoch)
        self._block_layout = lru_cache(_CACHED_BLOCKS)(self._lay_out_block)
        self._open_blocks()

    def _open_shard(self, index: int) -> ShardReader:
        """Open a shard, perhaps not for the first time: one whose files are not those of the first
        time must have the manifest's content."""
        shard = ShardReader(self.folder, self._entries[index].name, self._entries[index])
        if shard.stamps != self._stamps.setdefault(index, shard.stamps):
            shard.check_content()
            self._stamps[index] = shard.stamps
        return shard

    def _open_blocks(self) -> None:
        """Open and check every shard. Store shard, first document, number of documents and number
        of tokens of every block. Small splits are also checked against their SHA-256."""
        split_bytes = self.num_tokens * np.dtype(self.manifest.dtype).itemsize
        num_documents = sum(entry.documents for entry in self._entries)
        rows = []
        for index, entry in enumerate(self._entries):
            shard = self._shard(index)
            if (shard.documents, shard.num_tokens) != (entry.documents, entry.tokens):
                raise ConfigError(
                    f"{shard.idx_path}: {shard.documents} documents and {shard.num_tokens} tokens, "
                    f"where the manifest says {entry.documents} and {entry.tokens}; prepare again"
                )
            if split_bytes <= _VERIFIED_BYTES:
                shard.check_content()
            if num_documents <= _VERIFIED_DOCUMENTS:
                shard.verify()
            for first in range(0, shard.documents, _DOCUMENTS_A_BLOCK):
                end = min(first + _DOCUMENTS_A_BLOCK, shard.documents)
                num_tokens = shard.offset(end) - shard.offset(first)
                rows.append((index, first, end - first, num_tokens))
        self._block_shard, self._block_first, self._block_documents, self._block_tokens = np.array(
            rows, dtype=np.int64
        ).T

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks in the order of this epoch, their cumulative tokens): int64 [blocks] each."""
        order = np.arange(self._block_tokens.size)
        if self._shuffle:
            order = shuffled(order.size, key64("blocks", self._order_key, epoch))
        return order, np.cumsum(self._block_tokens[order])

    def _lay_out_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(where each document begins in its shard, in the order of this epoch; their cumulative
        tokens): int64 [documents] each, in tokens."""
        shard = self._shard(int(self._block_shard[block]))
        first, count = int(self._block_first[block]), int(self._block_documents[block])
        begins, lengths = shard.layout(first, count)
        if self._shuffle:
            order = shuffled(count, key64("documents", self._order_key, epoch, block))
            begins, lengths = begins[order], lengths[order]
        return begins, np.cumsum(lengths, dtype=np.int64)

    def window_at(self, drawn: int) -> tuple[int, int]:
        """(epoch, window) of sample number `drawn` (from 0) of this source."""
        epoch, position = divmod(drawn, self.num_windows)
        if not self._shuffle:
            return epoch, position
        key = key64("windows", self._order_key, epoch)
        return epoch, int(permute(np.array([position]), self.num_windows, key)[0])

    def read(self, epoch: int, window: int) -> Window:
        """One window, of which every token is trained.

        Raises ConfigError, naming the file, if a shard has changed so that it cannot be read, and
        if a token id is outside the vocabulary.
        """
        num_tokens = self._sequence_length + 1
        tokens_T = np.empty(num_tokens, dtype=np.int64)
        documents_T = np.empty(num_tokens, dtype=np.int64)
        order, ends = self._epoch_layout(epoch)
        begin = window * self._sequence_length
        slot = int(np.searchsorted(ends, begin, side="right"))
        skip = begin - (int(ends[slot - 1]) if slot else 0)  # tokens of the block to skip
        filled = document = 0
        while filled < num_tokens:
            block = int(order[slot])
            shard_index = int(self._block_shard[block])
            shard = self._shard(shard_index)
            self._read_since_check.add(shard_index)
            begins, ends = self._block_layout(epoch, block)
            index = int(np.searchsorted(ends, skip, side="right"))
            before = int(ends[index - 1]) if index else 0  # tokens of the block's documents so far
            last = int(np.searchsorted(ends, skip + num_tokens - filled))
            read = _reader_of(shard, begins, int(ends[-1]), last - index)
            while filled < num_tokens and index < begins.size:
                end = int(ends[index])
                size = min(end - skip, num_tokens - filled)
                if size:  # shards of other writers may have empty documents
                    piece = slice(filled, filled + size)
                    tokens_T[piece] = read(int(begins[index]) + skip - before, size)
                    documents_T[piece] = document
                    filled, document = filled + size, document + 1
                index, before, skip = index + 1, end, end
            slot, skip = slot + 1, 0
        if tokens_T.min() < 0 or tokens_T.max() >= self._vocab_size:
            self.check_unchanged()  # names the file, if one was written to
            raise ConfigError(
                f"{self.folder}: token id {tokens_T.max()} in sample {window} of epoch {epoch}, "
                f"outside the vocabulary of {self._vocab_size}; `nemotron-train data inspect` "
                "finds the damaged shard"
            )
        return Window(tokens_T, documents_T, np.ones(num_tokens, dtype=bool))

    def check_unchanged(self) -> None:
        """Raises ConfigError, naming the file, if a shard read since the last call was removed,
        replaced or written to since it was opened. Costs two `stat` calls for each such shard."""
        for index in self._read_since_check:
            self._shard(index).check_unchanged()
        self._read_since_check.clear()


def _reader_of(
    shard: ShardReader, begins: np.ndarray, num_tokens: int, num_documents: int
) -> Callable[[int, int], np.ndarray]:
    """A function from (first token, number of tokens) to token ids, for reads within one block.

    A read of a short document touches a whole page. So if `num_documents` pages are more than the
    block's `num_tokens`, the block is read at once: many short documents then cost one system call.
    """
    if num_tokens * shard.dtype.itemsize > num_documents * _PAGE_BYTES:
        return shard.tokens
    first = int(begins.min())
    block = shard.tokens(first, num_tokens)
    return lambda begin, count: block[begin - first : begin - first + count]


def check_vocabulary(folder: Path, manifest: Manifest, split: str, vocab_size: int) -> None:
    """Raises ConfigError if the tokenizer or a shard has ids outside `vocab_size`."""
    if manifest.tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: the tokenizer of {folder} has "
            f"{manifest.tokenizer.vocab_size} ids; raise it or prepare with a smaller tokenizer"
        )
    for shard in manifest.splits[split].shards:
        if shard.max_token_id >= vocab_size:
            raise ConfigError(
                f"{folder / shard.name}.bin: holds token id {shard.max_token_id}, outside "
                f"model.vocab_size={vocab_size}"
            )
