"""Writes one split as a sequence of shards, with a state from which writing can continue.

The state is JSON. The caller (the journal of prepare.py) calls `state`, stores the result, then
calls `on_state_saved`. A writer created from a stored state continues with byte-identical shards.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_train.data.indexed import ShardEntry, ShardWriter

_COUNTS = ".counts.npy"  # how often each id occurs in a finished shard


class SplitWriter:
    """Writes documents into shards `SPLIT_00000`, `SPLIT_00001`, … of one folder.

    A shard ends before the document that would make it longer than `shard_tokens`. A document
    longer than `shard_tokens` gets a shard of its own. `state`: continue from this state.
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
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._vocab_size = vocab_size
        self._shard_tokens = shard_tokens
        self._shard: ShardWriter | None = None
        # Length files of shards finished since the last `on_state_saved`.
        self._obsolete_lengths: list[Path] = []
        self.finished: list[ShardEntry] = []
        if state:
            self.finished = [ShardEntry(**entry) for entry in state["finished"]]
            if state["open_documents"]:
                self._shard = self._new_shard(state["open_documents"])

    def _new_shard(self, documents: int = 0) -> ShardWriter:
        name = f"{self._split}_{len(self.finished):05d}"
        return ShardWriter(self._folder, name, self._dtype, documents=documents)

    def add(self, tokens: np.ndarray) -> None:
        """Append one document: integer token ids [tokens]."""
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
        self._obsolete_lengths.append(shard.lengths_path)
        self._shard = None

    def _counts_path(self, name: str) -> Path:
        return self._folder / f"{name}{_COUNTS}"

    def state(self) -> dict[str, Any]:
        """Make everything added so far durable. Returns the state, as JSON values."""
        if self._shard:
            self._shard.sync()
        return {
            "finished": [asdict(entry) for entry in self.finished],
            "open_documents": self._shard.documents if self._shard else 0,
        }

    def on_state_saved(self) -> None:
        """Call when the last `state` is durable: deletes files that only older states need."""
        for path in self._obsolete_lengths:
            path.unlink()
        self._obsolete_lengths = []

    def abandon(self) -> None:
        """Close the files without finishing. A writer can still continue from the last stored
        state."""
        if self._shard:
            self._shard.abandon()

    def close(self) -> np.ndarray:
        """Finish the last shard. Returns the count of each token id: int64 [vocab_size]."""
        if self._shard:
            self._finish(self._shard)
        total = np.zeros(self._vocab_size, dtype=np.int64)
        for entry in self.finished:
            total += np.load(self._counts_path(entry.name))
        return total


def remove_working_files(folder: Path) -> None:
    """Delete the files that only a continuation needs. Call it when the manifest is written."""
    for pattern in (f"*{_COUNTS}", "*.lengths.partial", ".*.idx", ".*.json", ".*.txt"):
        for path in folder.glob(pattern):
            path.unlink()
