"""One split written as shard after shard, with a state from which writing can go on.

The state is JSON; whoever keeps it (prepare.py's journal) calls `state`, stores what it returns,
then calls `stored`. A writer made from a stored state continues to byte-identical shards.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_train.data.indexed import ShardEntry, ShardWriter

_COUNTS = ".counts.npy"  # how often each id occurs in a finished shard


class SplitWriter:
    """Writes documents into shards `SPLIT_00000`, `SPLIT_00001`, … of one folder.

    A shard ends before the document that would take it past `shard_tokens`; only a document
    longer than that makes a larger shard, of its own.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        *,
        vocab_size: int,
        shard_tokens: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype
        self._vocab_size, self._shard_tokens = vocab_size, shard_tokens
        self._shard: ShardWriter | None = None
        self._spent: list[Path] = []  # length files of shards that ended since the last `stored`
        self.finished: list[ShardEntry] = []
        if state:
            self.finished = [ShardEntry(**entry) for entry in state["finished"]]
            if state["open_documents"]:
                self._shard = self._new_shard(state["open_documents"])

    def _new_shard(self, documents: int = 0) -> ShardWriter:
        name = f"{self._split}_{len(self.finished):05d}"
        return ShardWriter(self._folder, name, self._dtype, documents=documents)

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, integer [tokens]."""
        shard = self._shard
        if shard and shard.tokens + tokens.size > self._shard_tokens:
            self._finish(shard)
            shard = None
        if shard is None:
            shard = self._shard = self._new_shard()
        shard.add(tokens)

    def _finish(self, shard: ShardWriter) -> None:
        entry, counts = shard.finish(self._vocab_size)
        np.save(self._counts_path(entry.name), counts)
        self.finished.append(entry)
        self._spent.append(shard.lengths_path)
        self._shard = None

    def _counts_path(self, name: str) -> Path:
        return self._folder / f"{name}{_COUNTS}"

    def state(self) -> dict[str, Any]:
        """Make everything added so far durable and describe it."""
        if self._shard:
            self._shard.sync()
        return {
            "finished": [asdict(entry) for entry in self.finished],
            "open_documents": self._shard.documents if self._shard else 0,
        }

    def stored(self) -> None:
        """The last `state` is safe: drop what only an older one would need."""
        for path in self._spent:
            path.unlink()
        self._spent = []

    def abandon(self) -> None:
        """Close the files without finishing; the last stored state can still be continued."""
        if self._shard:
            self._shard.abandon()

    def close(self) -> np.ndarray:
        """Finish the last shard; returns how often each id occurs: int64 [vocab_size]."""
        if self._shard:
            self._finish(self._shard)
        total = np.zeros(self._vocab_size, dtype=np.int64)
        for entry in self.finished:
            total += np.load(self._counts_path(entry.name))
        return total


def remove_working_files(folder: Path) -> None:
    """Remove what only a continuation would need, once a folder's manifest is written."""
    for pattern in (f"*{_COUNTS}", "*.lengths.partial"):
        for path in folder.glob(pattern):
            path.unlink()
