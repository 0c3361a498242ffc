"""Training samples from a folder of conversations: whole conversations packed into rows.

`WindowedSource` cuts a stream of documents anywhere, but an answer without its question teaches
nothing. Here every conversation lies whole in one row. Rows are packed once for a folder and a row
length: the longest first, each into the fullest row that still has room (best fit decreasing; D. S.
Johnson, "Near-optimal bin packing algorithms", 1973). What remains of a row is padding that no loss
counts. Every epoch has the same rows in another order.

Memory: 16 bytes a conversation. Array legend: S sequence length, T = S + 1, C conversations.
"""

from bisect import bisect_left, insort
from functools import lru_cache
from pathlib import Path

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.indexed import ShardReader
from nemotron_train.data.manifest import (
    FILE_NAME,
    MASK_OF,
    SplitEntry,
    load_manifest,
    split_fingerprint,
)
from nemotron_train.data.permutation import key64, permute
from nemotron_train.data.windows import Window, check_vocabulary

_OPEN_SHARDS = 64


class PackedSource:
    """The rows of one split of a folder of conversations; the same interface as `WindowedSource`.

    Raises ConfigError, naming the file or knob, if the manifest or the split is missing, if a shard
    is missing, truncated or replaced, if mask and tokens do not belong together, if a token id is
    outside `vocab_size`, or if a conversation is longer than a row.
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
        if split not in self.manifest.splits or MASK_OF[split] not in self.manifest.splits:
            raise ConfigError(
                f"{folder / FILE_NAME}: has no {split} split of conversations; it has "
                f"{', '.join(self.manifest.splits) or 'none'}"
            )
        check_vocabulary(folder, self.manifest, split, vocab_size)
        tokens, mask = self.manifest.splits[split], self.manifest.splits[MASK_OF[split]]
        self.key = f"{key64(split_fingerprint(tokens), split_fingerprint(mask)):016x}"
        self.num_tokens = tokens.tokens
        self._length, self._shuffle = sequence_length, shuffle
        self._padding_id = self.manifest.tokenizer.end_of_document_id
        self._order_key = key64("packed", seed, self.key)
        self._tokens, self._mask = _Documents(folder, tokens), _Documents(folder, mask)
        if not np.array_equal(self._tokens.lengths, self._mask.lengths):
            raise ConfigError(f"{folder / FILE_NAME}: the {split} split and its mask do not match")
        longest = int(self._tokens.lengths.max(initial=0))
        if longest > sequence_length + 1:
            raise ConfigError(
                f"train.sequence_length={sequence_length}: a conversation of {folder} has "
                f"{longest} tokens; {longest - 1} would be enough, or make the folder again with "
                "too_long=drop"
            )
        self._rows = pack(self._tokens.lengths, sequence_length + 1)
        self.num_windows = len(self._rows)

    def window_at(self, drawn: int) -> tuple[int, int]:
        """(epoch, row) of sample number `drawn` (from 0) of this source."""
        epoch, position = divmod(drawn, self.num_windows)
        if not self._shuffle:
            return epoch, position
        key = key64("rows", self._order_key, epoch)
        return epoch, int(permute(np.array([position]), self.num_windows, key)[0])

    def read(self, epoch: int, window: int) -> Window:
        """One row, whose documents are its conversations. Padding is a document of its own, which
        is not trained. The epoch does not matter."""
        num_tokens = self._length + 1
        tokens_T = np.full(num_tokens, self._padding_id, dtype=np.int64)
        trained_T = np.zeros(num_tokens, dtype=bool)
        documents_T = np.empty(num_tokens, dtype=np.int64)
        filled = 0
        for number, conversation in enumerate(self._rows[window]):
            ids = self._tokens.read(conversation)
            piece = slice(filled, filled + ids.size)
            tokens_T[piece] = ids
            trained_T[piece] = self._mask.read(conversation)
            documents_T[piece] = number
            filled += ids.size
        documents_T[filled:] = len(self._rows[window])
        return Window(tokens_T, documents_T, trained_T)

    def check_unchanged(self) -> None:
        """Raises ConfigError, naming the file, if a shard read since the last call was removed,
        replaced or written to since it was opened."""
        self._tokens.check_unchanged()
        self._mask.check_unchanged()


class _Documents:
    """The documents of a split by number, over all its shards. Every shard is checked against its
    SHA-256 when it is opened first: conversations are few."""

    def __init__(self, folder: Path, split: SplitEntry) -> None:
        self._folder, self._entries = folder, split.shards
        self._shard = lru_cache(_OPEN_SHARDS)(self._open)
        self._read: set[int] = set()
        lengths = []
        for index in range(len(split.shards)):
            shard = self._shard(index)
            shard.verify()
            lengths.append(shard.lengths())
        self.lengths = np.concatenate(lengths).astype(np.int64)
        self._firsts = np.cumsum([0, *(entry.documents for entry in split.shards)])

    def _open(self, index: int) -> ShardReader:
        entry = self._entries[index]
        shard = ShardReader(self._folder, entry.name, entry)
        shard.check_content()
        return shard

    def read(self, number: int) -> np.ndarray:
        index = int(np.searchsorted(self._firsts, number, side="right")) - 1
        self._read.add(index)
        return self._shard(index).document(number - int(self._firsts[index]))

    def check_unchanged(self) -> None:
        for index in self._read:
            self._shard(index).check_unchanged()
        self._read.clear()


def pack(lengths_C: np.ndarray, room: int) -> list[list[int]]:
    """Conversations of these lengths in rows of `room` tokens: for each row the numbers of its
    conversations, in ascending order. Best fit decreasing; equal lengths in ascending order.

    The result has at most 11/9 of the fewest possible rows, and one more (Johnson 1973). Time
    O(C log room). Every length must be at most `room`.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # the keys of by_room, ascending
    for number in np.argsort(-lengths_C, kind="stable").tolist():
        length = int(lengths_C[number])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            left = rooms[place]
            row = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[place]
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(number)
        left -= length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(row)
    return [sorted(row) for row in rows]
